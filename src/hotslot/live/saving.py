"""Refuses to save a model's adapter while what is live is merged into the base weights: the slots are empty then."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

from torch import nn

from ..errors import MergedError
from .discover import callable_roots

_SAVE = "save_pretrained"


def forbid_saving(model: nn.Module, adapter: str | None) -> None:
    """Let `save_pretrained` of the models that would write the slot's adapter raise; `allow_saving` takes it back.

    A model without PEFT's configs writes its weights, with what is merged in them, and goes on doing so.
    """
    for root in callable_roots(model):
        if getattr(root, "peft_config", None) and hasattr(type(root), _SAVE):
            root.__dict__[_SAVE] = partial(_refuse, adapter)


def allow_saving(model: nn.Module) -> None:
    """Undo `forbid_saving`. May be repeated."""
    for root in callable_roots(model):
        root.__dict__.pop(_SAVE, None)


def _refuse(adapter: str | None, *args: Any, **kwargs: Any) -> NoReturn:
    raise MergedError(
        "The live adapter is merged into the base weights, and PEFT would save the empty slots in its place.",
        where=_SAVE,
        found=f"{adapter!r}, which no slot holds",
        expected="an adapter in the model's slots",
        hint="copy the adapter's own folder; or swapper.deactivate() to save the model's other adapters",
    )
