"""``light_attention`` on the compiled CUDA kernels (``csrc/ops/light_attention/cuda.cu``)."""

from dla_kernels.ops.cell.cuda import refuses_step
from dla_kernels.ops.cuda_common import step_on_cuda
from dla_kernels.ops.cuda_common import unsupported as unsupported
from dla_kernels.ops.light_attention import cpp

forward, backward = step_on_cuda(cpp.forward), step_on_cuda(cpp.backward)
refuses = refuses_step(cpp)
