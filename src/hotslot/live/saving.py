"""Refuses to save a model's adapter while what is live is merged into the base weights: the slots are empty then."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

from torch import nn

from ..errors import MergedError
from .discover import callable_roots

_SAVE = "save_pretrained"


def forbid_saving(model: nn.Module, slot: str, adapter: str | None) -> None:
    """Let `save_pretrained` of the models that would write the slot raise; `allow_saving` takes it back.

    A model without PEFT's configs writes its weights, with what is merged in them, and goes on doing so.
    """
    for root in callable_roots(model):
        if getattr(root, "peft_config", None) and hasattr(type(root), _SAVE):
            merged = _merged(root) or {}
            merged[slot] = adapter
            root.__dict__[_SAVE] = partial(_refuse, merged)


def allow_saving(model: nn.Module, slot: str) -> None:
    """Undo `forbid_saving` of this slot. May be repeated."""
    for root in callable_roots(model):
        merged = _merged(root)
        if merged is not None:
            merged.pop(slot, None)
            if not merged:
                del root.__dict__[_SAVE]


def _merged(root: nn.Module) -> dict[str, str | None] | None:
    """Slot → adapter that is merged in its stead, where saving is forbidden."""
    found = root.__dict__.get(_SAVE)
    return found.args[0] if isinstance(found, partial) and found.func is _refuse else None


def _refuse(merged: Mapping[str, str | None], *args: Any, **kwargs: Any) -> NoReturn:
    raise MergedError(
        "The live adapter is merged into the base weights, and PEFT would save the empty slots in its place.",
        where=_SAVE,
        found=", ".join(f"{adapter!r} in the stead of slot {slot!r}" for slot, adapter in merged.items()),
        expected="an adapter in the model's slots",
        hint="copy the adapter's own folder; or swapper.deactivate() to save the model's other adapters",
    )
