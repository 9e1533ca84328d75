"""``global_pool`` on the compiled CUDA kernels (``csrc/ops/global_pool/cuda.cu``)."""

from dla_kernels.ops.cuda_common import on_cuda
from dla_kernels.ops.cuda_common import unsupported as unsupported
from dla_kernels.ops.global_pool import cpp

forward = on_cuda(cpp.forward)
backward = on_cuda(cpp.backward)
