"""``light_attention`` on the compiled CUDA kernels (``csrc/ops/light_attention/cuda.cu``)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dla_kernels import native
from dla_kernels.ops.common import compute_dtype
from dla_kernels.ops.cuda_common import unsupported as unsupported
from dla_kernels.ops.light_attention import cpp

# Of a plane, that a block takes: enough to be worth the rows above and below, which it reads too.
ROWS = 16


def forward(x: Tensor, p: Tensor | None, state: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Arguments and results of ``dla_kernels::light_attention``."""
    batch, channels = x.shape[:2]
    strips = _strips(x)
    size = (10 * strips + 21 + len(state)) * batch * channels
    return cpp.forward(
        *(x, p, state, *rest),
        load=native.load_cuda,
        scratch=x.new_empty(size, dtype=compute_dtype(x.dtype)),
        strips=strips,
    )


def backward(
    grad_out: Tensor | None,
    grad_o: Tensor | None,
    grad_state: Tensor | None,
    x: Tensor,
    p: Tensor | None,
    state: Tensor,
    cell_params: Sequence[Tensor],
    q_weight: Tensor,
    *rest: Any,
) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::light_attention_backward``."""
    batch, channels = x.shape[:2]
    strips, dtype = _strips(x), compute_dtype(x.dtype)
    hidden = cell_params[0].shape[0] if cell_params else 0
    size = (21 * strips + 28 + 3 * len(state)) * batch * channels
    size += (5 * channels + 4 * hidden + 2 * q_weight.numel()) * batch + 6 * channels
    *_, branch_norm, _, _ = rest
    if branch_norm == "batch":
        size += -(-x.nbytes // 16) * 16 // dtype.itemsize
    return cpp.backward(
        *(grad_out, grad_o, grad_state, x, p, state, cell_params, q_weight, *rest),
        load=native.load_cuda,
        scratch=x.new_empty(size, dtype=dtype),
        strips=strips,
    )


def _strips(x: Tensor) -> int:
    """Blocks that share the rows of a plane."""
    return -(-x.shape[2] // ROWS)
