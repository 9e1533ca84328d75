"""``base_attention`` on the compiled CUDA kernels (``csrc/ops/base_attention/cuda.cu``)."""

import functools
from typing import Any

from torch import Tensor

from dla_kernels import native
from dla_kernels.ops.base_attention import cpp
from dla_kernels.ops.cuda_common import unsupported as unsupported


def _with_memory(module: Any, function: str, step: Any, like: Tensor) -> Tensor:
    """Sets the working memory of a step."""
    memory = like.new_empty(getattr(module, f"{function}_scratch")(step))
    step.scratch = memory.data_ptr()
    return memory


forward = functools.partial(cpp.forward, load=native.load_cuda, prepare=_with_memory)
backward = functools.partial(cpp.backward, load=native.load_cuda, prepare=_with_memory)
