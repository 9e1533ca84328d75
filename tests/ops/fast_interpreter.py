"""Spares Triton's interpreter two thirds of its time; knows the insides of Triton 3.9."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import triton.language as tl


def hasten() -> None:
    """Leaves out what is done in vain; does nothing with a Triton that is made otherwise.

    - A function that a kernel calls patches all of triton.language, which the kernel's launch has
      done already.
    - Sums and products of integers are computed again in 64 bits to see whether they overflow, as
      none does of those that maps of a few thousand values need.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch = interpreter._patch_lang

    def patch_once(function: Any) -> Any:
        used = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        patched = all(not tl.core.is_builtin(language.load) for language in used)
        return interpreter._LangPatchScope() if patched else patch(function)

    interpreter._patch_lang = patch_once
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
