"""Functional kernels of dynamic layer attention on tensors."""

from importlib.metadata import PackageNotFoundError, version

from dla_kernels.backend import use_backend
from dla_kernels.ops.base_attention import base_attention
from dla_kernels.ops.cell import cell
from dla_kernels.ops.gate import gate
from dla_kernels.ops.global_pool import global_pool
from dla_kernels.ops.light_attention import light_attention
from dla_kernels.ops.residual_gate import residual_gate
from dla_kernels.ops.residual_norm import residual_norm

try:
    __version__ = version("dla-kernels")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "__version__",
    "base_attention",
    "cell",
    "gate",
    "global_pool",
    "light_attention",
    "residual_gate",
    "residual_norm",
    "use_backend",
]
