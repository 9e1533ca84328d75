"""Stochastic depth."""

import torch
from torch import Tensor, nn

from dla.nn.checks import number
from dla_kernels.ops.common import compute_dtype


class DropPath(nn.Module):
    """Drops the whole branch of a sample with probability ``rate`` while training.

    What stays is divided by the probability of staying, so that the mean is unchanged.

    Args:
        rate: in [0, 1).

    Raises:
        ValueError, TypeError: ``rate`` out of its range, or no number.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = number("drop_path", rate)
        if not 0.0 <= self.rate < 1.0:
            raise ValueError(f"drop_path: expected a rate in [0, 1), got {rate!r}")

    @property
    def draws(self) -> bool:
        """Whether a call draws random numbers."""
        return self.training and self.rate != 0.0

    def scale(self, x: Tensor) -> Tensor | None:
        """This step's factors [B, 1, 1, 1] in the compute dtype of ``x``; None where all are 1."""
        if not self.draws:
            return None
        keep = 1.0 - self.rate
        shape = (x.shape[0], 1, 1, 1)
        noise = torch.rand(shape, dtype=compute_dtype(x.dtype), device=x.device)
        return torch.floor(noise + keep) / keep

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same with each sample dropped or scaled up."""
        scale = self.scale(x)
        return x if scale is None else (x * scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
