"""``gate`` on the compiled CUDA kernels (``csrc/ops/gate/cuda.cu``)."""

from dla_kernels.ops.cuda_common import on_cuda
from dla_kernels.ops.cuda_common import unsupported as unsupported
from dla_kernels.ops.gate import cpp

forward = on_cuda(cpp.forward)
backward = on_cuda(cpp.backward)
