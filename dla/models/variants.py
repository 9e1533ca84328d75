"""The variants: how a run of residual blocks becomes a stage, one function each.

The patterns beside a variant say where the authors' CIFAR code keeps the same parameters, after
`dla.models.official` has brought both of its spellings of a stage to ``stages.<i>.``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

import dla_kernels
from dla.models.registry import register_variant
from dla.nn import DIAStage, DLAStage, ECAGate, SEGate
from dla.nn.checks import match_autocast
from dla.nn.form import SPECS
from dla.nn.stage import parts_of
from dla_kernels.ops.checks import one_of
from dla_kernels.ops.step_checks import STATIC

# In the authors' key: the stem and the head, then what a block consists of.
_STEM_AND_HEAD = (r"^(conv1|bn1|fc)\.", r"\1.")
_IN_BLOCK = r"(conv\d|bn\d|downsample\.\d)\."


class PlainStage(nn.Module):
    """A run of residual blocks and nothing else: [B, C_in, H, W] -> [B, C, H', W']."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x)
        return x


@register_variant(
    "plain",
    official_keys=(
        _STEM_AND_HEAD,
        (r"^stages\.(\d+)\.(\d+)\." + _IN_BLOCK, r"stages.\1.blocks.\2.\3."),
    ),
)
def plain(blocks: Sequence[nn.Module], channels: int) -> nn.Module:
    """The backbone alone: the baseline."""
    return PlainStage(blocks)


class ChannelGateStage(nn.Module):
    """Blocks whose residual branches are scaled by channel gates: [B, C_in, H, W] -> [B, C, ...].

    Args:
        blocks: each with ``parts(x)``, its residual branch and its shortcut, see `DIAStage`.
        gates: a module per block, from means of the branch [B, C] to gates [B, C].
    """

    def __init__(self, blocks: Sequence[nn.Module], gates: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.layers = nn.ModuleList(gates)

    def forward(self, x: Tensor) -> Tensor:
        for index, (block, layer) in enumerate(zip(self.blocks, self.layers, strict=True)):
            branch, shortcut = parts_of(index, block, x)
            gate = layer(dla_kernels.global_pool(branch))
            x = dla_kernels.residual_gate(branch, gate, match_autocast(shortcut, branch))
        return x


@register_variant("se")
def se(blocks: Sequence[nn.Module], channels: int) -> nn.Module:
    """Squeeze-and-excitation with a hidden width of C // 16 and no biases."""
    return ChannelGateStage(blocks, (SEGate(channels) for _ in blocks))


@register_variant("eca")
def eca(blocks: Sequence[nn.Module], channels: int) -> nn.Module:
    """Efficient channel attention."""
    return ChannelGateStage(blocks, (ECAGate(channels) for _ in blocks))


# The authors' cell is Sequential(Linear, ReLU, Linear) for each of its inputs.
_CELL_KEYS = tuple(
    (
        rf"^stages\.(\d+)\.lstm\.w_{theirs}h\.0\.seq\.{linear}\.(\w)\w+$",
        rf"stages.\1.cell.{ours}_\g<2>{number}",
    )
    for theirs, ours in (("i", "y"), ("h", "h"))
    for number, linear in ((1, 0), (2, 2))
)


@register_variant(
    "dia",
    official_keys=(
        _STEM_AND_HEAD,
        (r"^stages\.(\d+)\.ModuleList\.(\d+)\." + _IN_BLOCK, r"stages.\1.blocks.\2.\3."),
        *_CELL_KEYS,
    ),
)
def dia(
    blocks: Sequence[nn.Module],
    channels: int,
    *,
    spec: str = "paper",
    fused: bool = True,
    cell: str = "dia",
    activation: str = "sigmoid",
    reduction: int = 4,
) -> nn.Module:
    """DIANet; with another ``cell``, the LII family. It has one form: ``spec`` changes nothing."""
    one_of("spec", spec, SPECS)
    return DIAStage(blocks, channels, cell, reduction, fused=fused, activation=activation)


_MRLA_KEYS = (
    _STEM_AND_HEAD,
    (r"^stages\.(\d+)\.(\d+)\.mrla\.mrla\.W([qkv])\.", r"stages.\1.layers.\2.\3_conv."),
    (r"^stages\.(\d+)\.(\d+)\.bn_mrla\.", r"stages.\1.layers.\2.norm."),
    (r"^stages\.(\d+)\.(\d+)\." + _IN_BLOCK, r"stages.\1.blocks.\2.\3."),
)
_MRLA_LAM = (r"^stages\.(\d+)\.(\d+)\.mrla\.lambda_t$", r"stages.\1.layers.\2.lam")


def _mrla(variant: str) -> Callable[..., nn.Module]:
    """Builds stages of the static counterpart; ``spec`` only sets the initialisation."""

    def build_stage(
        blocks: Sequence[nn.Module],
        channels: int,
        *,
        spec: str = "paper",
        fused: bool = True,
        head_dim: int = 32,
        drop_path: float = 0.0,
    ) -> nn.Module:
        options = {"fused": fused, "head_dim": head_dim, "drop_path": drop_path}
        return DLAStage(blocks, channels, variant, spec, cell=STATIC, **options)

    return build_stage


register_variant("mrla_l", official_keys=(_MRLA_LAM, *_MRLA_KEYS))(_mrla("light"))
register_variant("mrla_b", official_keys=_MRLA_KEYS)(_mrla("base"))


_ATTENTION = r"^stages\.(\d+)\.attention\.(\d+)\."
_DLA_KEYS = (
    _STEM_AND_HEAD,
    (r"^stages\.(\d+)\.layers\.(\d+)\." + _IN_BLOCK, r"stages.\1.blocks.\2.\3."),
    (
        _ATTENTION + r"layer_attention\.layer_attention\.W([qkv])\.",
        r"stages.\1.layers.\2.\3_conv.",
    ),
    (_ATTENTION + r"bn_layer_attention\.", r"stages.\1.layers.\2.norm."),
    *_CELL_KEYS,
)
_DLA_LIGHT_KEYS = (
    (_ATTENTION + r"layer_attention\.lambda_t$", r"stages.\1.layers.\2.lam"),
    (r"^stages\.(\d+)\.excite\.", r"stages.\1.prev_conv."),
)


def _dla(variant: str) -> Callable[..., nn.Module]:
    """Builds stages of dynamic layer attention. ``cell=None`` is the spec's own cell."""

    def build_stage(
        blocks: Sequence[nn.Module],
        channels: int,
        *,
        spec: str = "paper",
        fused: bool = True,
        cell: str | None = None,
        activation: str = "sigmoid",
        reduction: int = 4,
        head_dim: int = 32,
        context: str = "per_sample",
        drop_path: float = 0.0,
    ) -> nn.Module:
        return DLAStage(
            blocks,
            channels,
            variant,
            spec,
            cell=cell,
            reduction=reduction,
            drop_path=drop_path,
            activation=activation,
            fused=fused,
            head_dim=head_dim,
            context=context,
        )

    return build_stage


_OFFICIAL = {"spec": "official"}
register_variant("dla_l", official_keys=(*_DLA_LIGHT_KEYS, *_DLA_KEYS), official_options=_OFFICIAL)(
    _dla("light")
)
register_variant("dla_b", official_keys=_DLA_KEYS, official_options=_OFFICIAL)(_dla("base"))
