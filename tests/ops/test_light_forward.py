"""light_attention in CUDA, forward alone: to be dropped when its gradients are there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dla_kernels
from dla_kernels import use_backend
from light_cases import OUTPUTS, Case
from op_cases import covering, in_float64, reference
from test_light_attention import AXES, check, is_valid, make_case
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")

each_cuda = pytest.mark.parametrize("backend", ["cuda"])
each_layout = pytest.mark.parametrize("layout", ["nchw", "nhwc"])


@each_cuda
@pytest.mark.parametrize("axes", covering(AXES, is_valid), ids=lambda a: str(make_case(**a)))
def test_forward(backend: str, axes: dict[str, Any]) -> None:
    check(backend, make_case(**axes).with_(wants=()))


@each_cuda
@each_layout
@pytest.mark.parametrize("shape", [(2, 4, 20, 300), (1, 40, 37, 9)])
def test_more_columns_or_channels_than_a_block_has(
    backend: str, shape: tuple[int, int, int, int], layout: str
) -> None:
    check(backend, Case(shape=shape, head_dim=4, x_layout=layout, p_layout=layout, wants=()))


@each_cuda
@each_layout
def test_large_mean(backend: str, layout: str, generator: torch.Generator) -> None:
    case = Case(shape=(3, 6, 24, 21), x_layout=layout, p_layout=layout)
    inputs = case.inputs(generator)
    inputs["x"] += 1e3
    inputs["p"] += 1e3
    with use_backend(backend):
        got = dla_kernels.light_attention(*inputs.values(), **case.flags())
    want = reference("light_attention")(*in_float64(inputs).values(), **case.flags())
    for i in (3, 4):
        assert_close(got[i], want[i], name=OUTPUTS[i], dtype=torch.float32)
