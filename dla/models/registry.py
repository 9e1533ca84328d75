"""Which models exist: families (a backbone and its depths) times variants (what attends to what).

A model's name is ``resnet<depth>_<variant>``. A new attention mechanism is one function under
`register_variant`; a new backbone is one function under `register_family`. Every combination of
the two then exists, is listed and is checked, with no other place to edit.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from dla_kernels.ops.common import describe

BLOCK_OPTION = "block"


@dataclass(frozen=True)
class Variant:
    """One way to build a stage, with what it accepts and how the authors name its parameters."""

    name: str
    build_stage: Callable[..., nn.Module]
    options: tuple[str, ...]
    official_keys: tuple[tuple[str, str], ...]
    official_options: Mapping[str, Any]

    def rename_official(self, key: str) -> str | None:
        """The name that the authors' ``key`` has here; None where this variant has no such key."""
        key = _stage_spelling(key)
        for pattern, replacement in self.official_keys:
            renamed, hits = re.subn(pattern, replacement, key)
            if hits:
                return renamed
        return None

    def explains(self, keys: Iterable[str]) -> bool:
        """Whether the authors' ``keys`` are all known here, with every kind of key among them."""
        keys = [_stage_spelling(key) for key in keys]
        patterns = [re.compile(pattern) for pattern, _ in self.official_keys]
        known = all(any(pattern.match(key) for pattern in patterns) for key in keys)
        used = all(any(pattern.match(key) for key in keys) for pattern in patterns)
        return bool(patterns) and known and used


def _stage_spelling(key: str) -> str:
    """The authors' ``layer1.`` and ``stages.0.`` are the same stage: write the latter for both."""
    return re.sub(r"^layer(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}.", key)


@dataclass(frozen=True)
class Family:
    """A backbone in several depths: ``build(depth, variant, num_classes, **options)``."""

    name: str
    depths: tuple[int, ...]
    num_classes: int
    build: Callable[..., nn.Module]


VARIANTS: dict[str, Variant] = {}
FAMILIES: dict[str, Family] = {}


def register_variant(
    name: str,
    *,
    official_keys: Sequence[tuple[str, str]] = (),
    official_options: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Register ``build_stage(blocks, channels, *, option=default, ...)`` as the variant ``name``.

    The keyword-only parameters of the function *are* the options of the variant's models; an
    option that it does not name is a TypeError in `create_model`. ``official_keys`` holds pairs
    of an anchored regular expression and its replacement (first match wins), from the authors'
    parameter names (their stages spelt ``stages.<i>.``) to ours, and ``official_options`` the
    options of the models they trained; see `dla.models.load_official`.

    Raises:
        ValueError: there is a variant ``name`` already.
    """
    if name in VARIANTS:
        raise ValueError(f"name: there is a variant {name!r} already")

    def register(build_stage: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        parameters = inspect.signature(build_stage).parameters.values()
        options = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        VARIANTS[name] = Variant(name, build_stage, options, tuple(official_keys), official_options)
        return build_stage

    return register


def register_family(
    name: str, *, depths: Iterable[int], num_classes: int
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Register ``build(depth, variant, num_classes, **options)`` as a backbone family.

    Families share the name scheme.

    Raises:
        ValueError: there is a family ``name`` already, or another has one of the ``depths``.
    """
    if name in FAMILIES:
        raise ValueError(f"name: there is a family {name!r} already")
    depths = tuple(depths)
    for other in FAMILIES.values():
        if shared := set(other.depths) & set(depths):
            raise ValueError(f"depths: the family {other.name!r} has {sorted(shared)} already")

    def register(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        FAMILIES[name] = Family(name, depths, num_classes, build)
        return build

    return register


def _catalogue() -> dict[str, tuple[Family, int, Variant]]:
    return {
        f"resnet{depth}_{variant.name}": (family, depth, variant)
        for family in FAMILIES.values()
        for depth in family.depths
        for variant in VARIANTS.values()
    }


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell ``pattern``, by depth, then by variant.

    >>> list_models("resnet20_*")
    ['resnet20_plain', 'resnet20_se', ..., 'resnet20_dla_l', 'resnet20_dla_b']
    """
    catalogue = _catalogue()
    names = [name for name in catalogue if fnmatch.fnmatchcase(name, pattern)]
    return sorted(names, key=lambda name: catalogue[name][1])


def _hint(name: str, catalogue: Iterable[str]) -> str:
    """What may have been meant by ``name``, which is none of the catalogue."""
    variants = [known for known in catalogue if known.startswith(f"{name}_")]
    near = variants or difflib.get_close_matches(name, catalogue, n=3)
    if near:
        return f"did you mean {', '.join(near)}?"
    return (
        "expected resnet<depth>_<variant>, variant one of "
        f"{', '.join(VARIANTS)}; list_models() names them all"
    )


def create_model(name: str, num_classes: int | None = None, **options: Any) -> nn.Module:
    """Build the model ``name`` (see `list_models`) with fresh weights.

    Args:
        name: ``resnet<depth>_<variant>``, for instance ``"resnet56_dla_l"``.
        num_classes: width of the classifier, 0 for none; by default the family's own
            (10 for the CIFAR models).
        **options: of ``block``, ``spec``, ``fused``, ``cell``, ``activation``, ``reduction``,
            ``head_dim``, ``context`` and ``drop_path`` those that the variant has. ``plain``,
            ``se`` and ``eca`` have ``block`` alone.

    Raises:
        ValueError: unknown name, or an option's value that cannot be served.
        TypeError: ``name`` is no string, or an option that this model does not have.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {describe(name)}")
    catalogue = _catalogue()
    if name not in catalogue:
        raise ValueError(f"name: no model is called {name!r}; {_hint(name, catalogue)}")
    family, depth, variant = catalogue[name]
    allowed = (BLOCK_OPTION, *variant.options)
    unknown = [option for option in options if option not in allowed]
    if unknown:
        raise TypeError(
            f"create_model({name!r}) has no option {', '.join(map(repr, unknown))}; "
            f"this model takes {', '.join(allowed)}"
        )
    classes = family.num_classes if num_classes is None else num_classes
    return family.build(depth, variant.name, classes, **options)
