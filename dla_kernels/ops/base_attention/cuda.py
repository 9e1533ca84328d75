"""``base_attention`` on the compiled CUDA kernels (``csrc/ops/base_attention/cuda.cu``)."""

from dla_kernels.ops.base_attention import cpp
from dla_kernels.ops.cell.cuda import refuses_step
from dla_kernels.ops.cuda_common import step_on_cuda
from dla_kernels.ops.cuda_common import unsupported as unsupported

forward, backward = step_on_cuda(cpp.forward), step_on_cuda(cpp.backward)
refuses = refuses_step(cpp)
