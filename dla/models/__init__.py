"""Networks with layer attention, by name, and the authors' checkpoints for them."""

from dla.models import cifar as _cifar  # noqa: F401  (registers its family)
from dla.models import variants as _variants  # noqa: F401  (registers its variants)
from dla.models.blocks import BasicBlock, Bottleneck
from dla.models.cifar import CifarResNet
from dla.models.official import load_official
from dla.models.registry import create_model, list_models, register_family, register_variant

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "CifarResNet",
    "create_model",
    "list_models",
    "load_official",
    "register_family",
    "register_variant",
]
