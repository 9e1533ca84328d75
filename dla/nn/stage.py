"""Runs of blocks with layer attention."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dla.nn.batch_norm import is_unhooked, join
from dla.nn.cells import CELLS
from dla.nn.channel import DIALayer
from dla.nn.checks import module_list
from dla.nn.form import shared_parts
from dla.nn.layer import DLALayer
from dla_kernels.ops.base_attention import MAX_LAYERS


class DLAStage(nn.Module):
    """Blocks of one resolution, each followed by a `DLALayer`; the layers share one cell.

    A block maps x to its output, or to (output, shortcut). The shortcut, which layers with
    ``prev_from="shortcut"`` attend to, has the shape of the output; it is the block's input unless
    the block returns it. A block may have a method ``raw_parts(x) -> (branch, norm, shortcut)``;
    its output is then relu(norm(branch) + shortcut), norm a module or None, and left to fused
    operations: to the layer's own step if that reads the shortcut. A block with hooks, with a
    ``forward`` that is more derived, or in a wrapper (activation checkpointing, FSDP,
    torch.compile) is called instead. The recurrent state starts anew in every call.

    Args:
        blocks: at least one; all put out ``channels`` channels at one resolution.
        channels: C.
        variant, spec, cell, layer_options: of every layer, see `DLALayer` (``fused``, ``head_dim``,
            ``context`` ..).
        reduction, activation, initial_state: of the shared cell, see `DLALayer`.
        drop_path: one rate, or one per block.

    Attributes:
        blocks, layers: lists of equal length.
        cell, prev_conv: shared by all layers; None where the form has none.

    Raises:
        ValueError, TypeError: an argument out of its range or of the wrong type.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        channels: int,
        variant: str = "light",
        spec: str = "paper",
        *,
        cell: str | None = None,
        reduction: int = 4,
        drop_path: float | Sequence[float] = 0.0,
        activation: str = "sigmoid",
        initial_state: str = "zeros",
        **layer_options: Any,
    ) -> None:
        super().__init__()
        self.blocks = module_list("blocks", blocks)
        rates = _one_per_block(drop_path, len(self.blocks))
        if "shared" in layer_options:
            raise TypeError("shared: the layers of a stage always share; expected it not given")
        self.layers = nn.ModuleList(
            DLALayer(
                channels,
                variant,
                spec,
                cell=cell,
                drop_path=rate,
                shared=True,
                **layer_options,
            )
            for rate in rates
        )
        if variant == "base" and self.layers[0].fused and len(self.blocks) > MAX_LAYERS:
            raise ValueError(
                f"blocks: expected at most {MAX_LAYERS} under variant='base' (any number with "
                f"fused=False), got {len(self.blocks)}"
            )
        form = self.layers[0].form
        self.cell, self.prev_conv = shared_parts(
            channels, form, spec, reduction, activation, initial_state
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, H', W'], as the blocks do.

        Raises:
            ValueError, TypeError: what a block puts out does not fit; under ``prev`` in the
                message it is the shortcut.
        """
        state = None
        last = len(self.layers) - 1
        for index, (block, layer) in enumerate(zip(self.blocks, self.layers, strict=True)):
            reads_shortcut = layer.form.prev_from == "shortcut"
            options = {}
            if _hands_over(block):
                parts = block.raw_parts(x)
                out, norm, shortcut = _checked_parts(block, "raw_parts", parts, _RAW_PARTS)
                if reads_shortcut:
                    options = {"join": True, "branch_norm": norm}
                else:
                    out = join(out, norm, shortcut, layer.fused)
            else:
                result = block(x)
                parts = result if isinstance(result, tuple) else (result, x)
                out, shortcut = _checked_parts(block, "forward", parts, _PARTS)
            x, state = layer(
                out,
                shortcut if reads_shortcut else None,
                state,
                cell=self.cell,
                prev_conv=self.prev_conv,
                keep_output=index < last,
                **options,
            )
        return x


class DIAStage(nn.Module):
    """Blocks of one resolution, each ended by a `DIALayer`; the layers share one cell.

    Args:
        blocks: at least one; ``block.parts(x)`` gives a residual branch and its shortcut, both of
            ``channels`` channels at one resolution. Blocks are not called, so that wrappers of them
            are refused: wrap the stage.
        channels: C.
        cell, reduction, fused, activation, initial_state: see `DIALayer`.

    Attributes:
        blocks, layers: lists of equal length.
        cell: shared by all layers.

    Raises:
        ValueError, TypeError: an argument out of its range or of the wrong type.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        channels: int,
        cell: str = "dia",
        reduction: int = 4,
        *,
        fused: bool = True,
        activation: str = "sigmoid",
        initial_state: str = "zeros",
    ) -> None:
        super().__init__()
        self.blocks = module_list("blocks", blocks)
        for index, block in enumerate(self.blocks):
            _check_has_parts(index, block)
        self.layers = nn.ModuleList(
            DIALayer(channels, cell, fused=fused, shared=True) for _ in self.blocks
        )
        self.cell = CELLS[cell](channels, reduction, activation, initial_state)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, H', W'], as the blocks do.

        Raises:
            ValueError, TypeError: what a block puts out does not fit.
        """
        state = None
        for index, (block, layer) in enumerate(zip(self.blocks, self.layers, strict=True)):
            branch, shortcut = parts_of(index, block, x)
            x, state = layer(branch, shortcut, state, cell=self.cell)
        return x


_PARTS = {"output": Tensor, "shortcut": Tensor}
_RAW_PARTS = {"branch": Tensor, "norm": (nn.Module, type(None)), "shortcut": Tensor}


def parts_of(index: int, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """``block.parts(x)``, a residual branch and its shortcut; ``index``: the block's in its stage.

    Raises:
        TypeError: the block has no such method, or it gives something else.
    """
    _check_has_parts(index, block)
    return _checked_parts(block, "parts", block.parts(x), _PARTS)


def _check_has_parts(index: int, block: nn.Module) -> None:
    if not hasattr(type(block), "parts"):
        raise TypeError(
            f"blocks[{index}]: expected a Module with a method parts(x), got "
            f"{type(block).__name__}; a wrapper of one would not be called: wrap the stage"
        )


def _hands_over(block: nn.Module) -> bool:
    """Whether calling the block is what its ``raw_parts`` says. Not so with hooks or a call that is
    compiled, for a wrapper, which passes on that of its block, nor for a class that inherits it and
    has a ``forward`` of its own."""
    if not is_unhooked(block) or block._compiled_call_impl is not None:
        return False
    for owner in type(block).__mro__:
        if "raw_parts" in owner.__dict__:
            return True
        if "forward" in owner.__dict__:
            return False
    return False


def _checked_parts(block: nn.Module, method: str, parts: Any, types: Mapping[str, Any]) -> Any:
    """``parts``, which a block's method gave, or TypeError if it is no tuple of these types."""
    several = isinstance(parts, tuple) and len(parts) == len(types)
    if several and all(map(isinstance, parts, types.values())):
        return parts
    found = parts if isinstance(parts, tuple) else (parts,)
    but = ", but for the norm, a Module or None" if "norm" in types else ""
    raise TypeError(
        f"blocks: expected {type(block).__name__}.{method} to give ({', '.join(types)}), "
        f"tensors{but}; got ({', '.join(type(part).__name__ for part in found)})"
    )


def _one_per_block(drop_path: float | Sequence[float], count: int) -> list[float]:
    if isinstance(drop_path, str) or not isinstance(drop_path, Sequence):
        return [drop_path] * count
    if len(drop_path) != count:
        raise ValueError(
            f"drop_path: expected one rate or one for each of the {count} blocks, "
            f"got {len(drop_path)}"
        )
    return list(drop_path)
