"""`patch_peft` and `unpatch_peft`: PEFT's functions, and the calls of libraries that are built on PEFT."""

from __future__ import annotations

from collections.abc import Callable

from .. import dropin
from . import diffusers, transformers
from .imports import when_imported

_ONCE_IMPORTED = {
    "diffusers.loaders.peft": diffusers.patch_models,
    "diffusers.loaders.lora_base": diffusers.patch_pipelines,
}
_call_off: list[Callable[[], None]] = []


def patch_peft() -> None:
    """Put hotslot's functions in the place of PEFT's, in `peft.utils.hotswap` and wherever they were imported from it.

    transformers, diffusers and the user's own modules then use hotslot without a changed line. `load_adapter` and
    `enable_peft_hotswap` of transformers, which call none of PEFT's, go through hotslot too (docs/transformers.md), and
    so do diffusers' own LoRA calls, whether diffusers was imported before or is imported later (docs/diffusers.md).
    Calling it again reaches modules that have imported PEFT's functions meanwhile.
    """
    _wait_no_longer()
    dropin.patch_functions()
    transformers.patch()
    _call_off.extend(when_imported(name, patch) for name, patch in _ONCE_IMPORTED.items())


def unpatch_peft() -> None:
    """Give PEFT, transformers and diffusers their own functions back, wherever `patch_peft` has put hotslot's."""
    _wait_no_longer()
    diffusers.unpatch()
    transformers.unpatch()
    dropin.unpatch_functions()


def _wait_no_longer() -> None:
    while _call_off:
        _call_off.pop()()
