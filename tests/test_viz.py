"""dla.viz: what is recorded is what the layers computed, and nothing is recorded unasked."""

from __future__ import annotations

from typing import Any

import matplotlib
import pytest
import torch
from torch import Tensor

from dla.models import create_model
from dla.nn import DLALayer, DLAStage
from dla.nn.recording import recordings
from dla.viz import attention_matrix, plot_attention, record_attention
from refusals import assert_refused
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

each_fused = pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape or (2, 3, 16, 16), generator=generator)


@each_fused
@pytest.mark.parametrize("spec", ["paper", "official"])
@torch.no_grad()
def test_scores_and_gates_of_a_base_model(spec: str, fused: bool) -> None:
    model = create_model("resnet29_dla_b", spec=spec, fused=fused).eval()
    with record_attention() as records:
        model(images())
    assert [r.layer for r in records] == [m for m in model.modules() if type(m) is DLALayer]
    assert [len(r.scores) for r in records] == [1, 2, 3] * 3
    for r in records:
        channels = r.layer.channels
        assert r.scores.shape == (len(r.scores), 2, channels // 32)
        assert r.gates.shape == (len(r.scores), 2, channels)
        assert_close(r.scores.sum(0), torch.ones(2, channels // 32))
        assert (r.gates[-1] == 1).all()


@each_fused
def test_scores_and_gates_of_light_layers(fused: bool) -> None:
    """The recorded numbers, put into Eq. 3, give the layer's output."""
    torch.manual_seed(0)
    layer = DLALayer(8, spec="official", head_dim=4, norm=False, fused=fused).double()
    x, p = images(2, 8, 5, 6).double(), images(2, 8, 5, 6).double().flip(0)
    with record_attention() as records:
        out, _ = layer(x, p)
    ((owner, scores, gates),) = records
    assert owner is layer and scores.shape == (2, 2) and gates.shape == (2, 8)
    a = scores.repeat_interleave(4, 1)[:, :, None, None]
    history = p * gates[:, :, None, None] + layer.prev_conv(p)
    expected = x + a * layer.v_conv(x) + layer.lam[:, None, None] * history
    assert_close(out, expected)


@pytest.mark.parametrize("variant", ["light", "base"])
def test_static_layers_have_no_gates(variant: str) -> None:
    stage = DLAStage([torch.nn.Identity()], 8, variant, cell="none", head_dim=4)
    with record_attention() as records:
        stage(images(2, 8, 5, 6))
    assert [r.gates for r in records] == [None]


def test_recordings_nest_and_end() -> None:
    layer = DLALayer(8, head_dim=4)
    with record_attention() as outer:
        layer(images(2, 8, 5, 6))
        with pytest.raises(KeyError), record_attention() as inner:
            layer(images(2, 8, 5, 6))
            raise KeyError
    layer(images(2, 8, 5, 6))
    assert (len(outer), len(inner)) == (2, 1) and not recordings
    assert not any(r.scores.requires_grad for r in outer)


@torch.no_grad()
def test_attention_matrix() -> None:
    model = create_model("resnet29_mrla_b").eval()
    with record_attention() as records:
        model(images())
    for stage in (0, 1, -1):
        matrix = attention_matrix(records, stage)
        assert matrix.shape == (3, 3) and matrix[0, 0] == 1
        assert torch.equal(matrix.isnan(), torch.ones(3, 3).triu(1).bool())
        assert_close(matrix.nansum(1), torch.ones(3))
    assert torch.equal(
        attention_matrix(records, 2).nan_to_num(), attention_matrix(records).nan_to_num()
    )
    assert_refused(lambda: attention_matrix(records, 3), "stage", "3 stages", "got 3")
    assert_refused(lambda: attention_matrix(records, -4), "stage", "3 stages", "got -4")
    assert_refused(lambda: attention_matrix(records, None), "stage", "integer", "NoneType")
    assert_refused(lambda: attention_matrix(records, "2"), "stage", "integer", "str '2'")
    assert_refused(lambda: attention_matrix(records[1:]), "records", "whole stages", "2")
    assert_refused(lambda: attention_matrix(records[:1] * 2 + records[2:]), "records", "3")
    assert_refused(lambda: attention_matrix([]), "records", "none")
    assert_refused(lambda: attention_matrix(None), "records", "list", "NoneType")
    assert_refused(lambda: attention_matrix([model]), "records", "AttentionRecord", "CifarResNet")


def test_plot(tmp_path: Any) -> None:
    matplotlib.use("Agg")
    stage = DLAStage([torch.nn.Identity()] * 4, 8, "base", head_dim=4)
    with record_attention() as records:
        stage(images(2, 8, 5, 6))
    axes = plot_attention(records)
    drawn = axes.images[0].get_array()
    assert drawn.shape == (4, 4)
    axes.figure.savefig(tmp_path / "attention.png")
    assert plot_attention(records, ax=axes) is axes
    assert_refused(lambda: plot_attention(records, stage=None), "stage", "integer", "NoneType")
    assert_refused(lambda: plot_attention(records, ax=[axes]), "ax", "Axes", "list")
    with record_attention() as records:
        DLALayer(8, head_dim=4)(images(2, 8, 5, 6))
    assert_refused(lambda: plot_attention(records), "records", "base", "none")
