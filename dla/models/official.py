"""Loading the authors' CIFAR checkpoints into our models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from dla.models.registry import VARIANTS, Variant

_KEYS_SHOWN = 6


class LoadedKeys(NamedTuple):
    """What `load_official` could not match up, as nn.Module.load_state_dict reports it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_official(
    model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True
) -> LoadedKeys:
    """Load a checkpoint of the authors' CIFAR code into ``model``.

    Their code gates every sample by the context of the batch's first one. Weights trained so
    give the authors' predictions in a model made with ``context="first_sample"``; the default,
    ``"per_sample"``, is what their network computes at batch size 1.

    Args:
        model: from `create_model`, of the checkpoint's variant, depth and number of classes.
            DLA-L needs ``spec="official"``.
        state_dict: of their model, bare or wrapped as ``{"state_dict": ...}``; the
            ``module.`` prefix of DataParallel is accepted.
        strict: whether missing and unexpected keys are errors. Wrong shapes always are.

    Returns:
        The missing keys (our names) and the unexpected ones (theirs): none under ``strict``.

    Raises:
        TypeError: ``model`` or ``state_dict`` is of the wrong type.
        ValueError: the checkpoint does not fit. ``model`` is then unchanged.
    """
    variant = _variant_of(model)
    source = _unwrap(state_dict)
    target = model.state_dict()
    loaded: dict[str, Tensor] = {}
    unexpected: list[str] = []
    misshapen: list[str] = []
    for key, value in source.items():
        name = variant.rename_official(key)
        if name not in target:
            unexpected.append(key)
            continue
        # The authors keep lambda as [C, 1, 1].
        loaded[name] = value.reshape(-1) if name.endswith(".lam") else value
        if loaded[name].shape != target[name].shape:
            got, expected = list(value.shape), list(target[name].shape)
            misshapen.append(f"{key} (got {got}, expected {expected})")
    missing = [name for name in target if name not in loaded]
    if misshapen or (strict and (missing or unexpected)):
        problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
        raise ValueError(_explain(model, variant, source, problems))
    model.load_state_dict(loaded, strict=False)
    return LoadedKeys(missing, unexpected)


def _variant_of(model: nn.Module) -> Variant:
    name = getattr(model, "variant", None)
    if name not in VARIANTS:
        raise TypeError(f"model: expected one made by create_model, got {type(model).__name__}")
    variant = VARIANTS[name]
    if not variant.official_keys:
        raise ValueError(f"model: the authors published no checkpoints of variant {name!r}")
    return variant


def _unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The checkpoint's tensors, without wrapper and prefix."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
    if isinstance(state_dict.get("state_dict"), Mapping):
        state_dict = state_dict["state_dict"]
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(
                "state_dict: expected a mapping from names to tensors, "
                f"got {key!r}: {type(value).__name__}"
            )
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def _explain(
    model: nn.Module,
    variant: Variant,
    source: Mapping[str, Tensor],
    problems: Mapping[str, list[str]],
) -> str:
    lines = [f"state_dict: does not fit this {type(model).__name__} of variant {variant.name!r}"]
    lines += [f"  {len(keys)} {what}: {_abridge(keys)}" for what, keys in problems.items() if keys]
    likely = [other.name for other in VARIANTS.values() if other.explains(source)]
    if likely and variant.name not in likely:
        lines.append(f"  it looks like a checkpoint of variant {', '.join(map(repr, likely))}")
    elif variant.official_options:
        options = ", ".join(f"{key}={value!r}" for key, value in variant.official_options.items())
        lines.append(f"  the authors' {variant.name} models are those made with {options}")
    return "\n".join(lines)


def _abridge(keys: list[str]) -> str:
    more = ", ..." if len(keys) > _KEYS_SHOWN else ""
    return ", ".join(keys[:_KEYS_SHOWN]) + more
