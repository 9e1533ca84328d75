"""Channel attention: residual branches scaled by gates made from their own means."""

import torch
from torch import Tensor, nn

import dla_kernels
from dla.nn.cells import CELLS, Cell
from dla.nn.checks import (
    boolean,
    check_features,
    check_rows,
    hidden_width,
    match_autocast,
    positive_int,
)
from dla.nn.form import channel_kernel_size, check_kind
from dla.nn.state import DLAState, check_state, stage_of
from dla.nn.tensors import cast
from dla_kernels.ops.cell import reference as cell_reference
from dla_kernels.ops.checks import like, one_of
from dla_kernels.ops.common import compute_dtype
from dla_kernels.ops.global_pool import reference as pool_reference
from dla_kernels.ops.residual_gate import reference as gate_reference


class SEGate(nn.Module):
    """Squeeze-and-excitation: sigmoid(W2 relu(W1 y)), without biases; C^2 / 8 parameters.

    Args:
        channels: C.
        reduction: the hidden width is C // reduction.

    Raises:
        ValueError, TypeError: an argument out of its range or of the wrong type.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = hidden_width(channels, reduction)
        self.fc1 = nn.Linear(channels, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, channels, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        """Means of a branch [B, C] -> gates [B, C]."""
        check_rows("y", y, self.fc2.out_features)
        hidden = torch.relu(self.fc1(y.to(self.fc1.weight.dtype)))
        return torch.sigmoid(self.fc2(hidden).to(y.dtype))


class ECAGate(nn.Module):
    """Efficient channel attention: sigmoid of one convolution over the channel axis.

    Args:
        channels: C, from which the size of the convolution follows.

    Raises:
        ValueError, TypeError: ``channels`` out of its range or of the wrong type.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        size = channel_kernel_size(channels)
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        """Means of a branch [B, C] -> gates [B, C]."""
        check_rows("y", y, self.channels)
        rows = y.to(self.conv.weight.dtype).unsqueeze(1)
        return torch.sigmoid(self.conv(rows).squeeze(1).to(y.dtype))


class DIALayer(nn.Module):
    """DIANet's layer ("A Generic Shared Attention Mechanism"): a recurrent cell as channel gate::

        state' = cell(mean of u over space, state)
        out    = relu(u * h + shortcut)

    with h the cell's output h', or sigmoid(c') of "dsu", which has no other.

    Args:
        channels: C of the features.
        cell: "dsu", "dsu_split", "dia", "lstm" or "rnn".
        reduction: the cell's hidden width is C // reduction.
        fused: as of `DLALayer`.
        activation: of c inside "dsu": "sigmoid", "tanh", "relu" or "identity".
        initial_state: of the cell: "zeros", "normal" or "learned".
        shared: leave the cell to the owner of the layers, which passes it to every call.

    Raises:
        ValueError, TypeError: an argument out of its range or of the wrong type.
    """

    def __init__(
        self,
        channels: int,
        cell: str = "dia",
        reduction: int = 4,
        *,
        fused: bool = True,
        activation: str = "sigmoid",
        initial_state: str = "zeros",
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        self.kind, self.fused = one_of("cell", cell, CELLS), boolean("fused", fused)
        self.cell = None
        if not boolean("shared", shared):
            self.cell = CELLS[cell](channels, reduction, activation, initial_state)

    def extra_repr(self) -> str:
        return f"{self.channels}, cell={self.kind!r}, fused={self.fused}"

    def forward(
        self,
        u: Tensor,
        shortcut: Tensor,
        state: DLAState | None = None,
        *,
        cell: Cell | None = None,
    ) -> tuple[Tensor, DLAState]:
        """The end of one block.

        Args:
            u: output of the block's residual branch [B, C, H, W], as the parameters are (under
                autocast: any).
            shortcut: like u.
            state: what the layer before returned; None for the first layer of a stage.
            cell: the stage's, for a layer made with ``shared=True``.

        Returns:
            out like u, and the state for the next layer of the stage.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
        """
        cell = self.cell if cell is None else cell
        stage = stage_of(self.cell, cell)
        check_kind(cell, self.kind, self.channels)
        weights = cell.weights(None)
        check_features("u", u, self.channels, weights[0])
        dtype = compute_dtype(u.dtype)
        if state is None:
            context = cell.initial_state(u.shape[0], dtype, u.device)
        else:
            check_state(state, cell, stage, u, dtype)
            context, stage = state.context, state.stage
        shortcut = match_autocast(shortcut, u)
        like("shortcut", shortcut, u.shape, u.dtype, u.device)
        pool = (dla_kernels if self.fused else pool_reference).global_pool
        step = (dla_kernels if self.fused else cell_reference).cell
        finish = (dla_kernels if self.fused else gate_reference).residual_gate
        weights = [cast(weight, dtype) for weight in weights]
        context = step(pool(u), context, weights, cell.kind, cell.activation)
        h = torch.sigmoid(context[0]) if cell.kind == "dsu" else context[0]
        out = finish(u, h, shortcut)
        return out, DLAState(context, None, (u.shape[2], u.shape[3]), cell.kind, stage)
