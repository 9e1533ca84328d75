"""``light_attention`` on the compiled CUDA kernels (``csrc/ops/light_attention/cuda.cu``)."""

from typing import Any

from torch import Tensor

from dla_kernels import native
from dla_kernels.ops.common import compute_dtype
from dla_kernels.ops.cuda_common import unsupported as unsupported
from dla_kernels.ops.light_attention import cpp


def forward(x: Tensor, p: Tensor | None, state: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Arguments and results of ``dla_kernels::light_attention``."""
    batch, channels = x.shape[:2]
    size = (13 + len(state)) * batch * channels
    scratch = x.new_empty(size, dtype=compute_dtype(x.dtype))
    return cpp.forward(x, p, state, *rest, load=native.load_cuda, scratch=scratch)


def backward(*_: Any) -> list[Tensor]:
    """Not there yet."""
    raise NotImplementedError(
        "light_attention: there are no CUDA kernels for its gradients yet; "
        "dla_kernels.use_backend('triton') or 'reference' has them"
    )
