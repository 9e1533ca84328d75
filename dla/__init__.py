"""Dynamic Layer Attention networks: `dla.nn` has the layers, `dla.models` networks made of them."""

from dla import models, nn

__all__ = ["models", "nn"]
