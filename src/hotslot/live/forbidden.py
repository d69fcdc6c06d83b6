"""Refuses PEFT's calls that go by a model's layers while what is live is merged into the base weights below them.

The slots are empty then: PEFT would save nothing in the adapter's place, and what it passes over or takes off the model
would leave the adapter where it is, in silence. A model without layers of PEFT's has no such calls, or none that know
of an adapter; its `save_pretrained` writes its weights, with what is merged in them, and goes on doing so.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from torch import nn

from ..errors import MergedError
from .discover import callable_roots
from .slots import Slot

_SAVING = ("save_pretrained",)
_PASSING_OVER = ("disable_adapter", "disable_adapter_layers", "disable_adapters", "disable_lora")
_CHOOSING = ("set_adapter", "set_adapters")  # passes over what it does not name
_TAKING_OFF = ("unload", "unload_lora")
_DELETING = ("delete_adapter", "delete_adapters")  # takes off what it names
_ADDING = ("add_adapter", "load_adapter", "load_lora_adapter")  # of transformers and diffusers: makes it the active one
_CALLS = (*_SAVING, *_PASSING_OVER, *_CHOOSING, *_TAKING_OFF, *_DELETING, *_ADDING)
_NAMES = ("adapter_name", "adapter_names")

_seen_to: ContextVar[bool] = ContextVar("hotslot_seen_to", default=False)


@contextmanager
def seen_to() -> Iterator[None]:
    """For a block in which adapters are taken off by somebody who then takes off what is merged in their stead."""
    token = _seen_to.set(True)
    try:
        yield
    finally:
        _seen_to.reset(token)


class _Forbidden:
    """Stands in a model's `__dict__` for one of the calls.

    Attributes:
        merged: slot → adapter that is merged in its stead.
    """

    def __init__(
        self, root: nn.Module | None, name: str, merged: Mapping[str, str | None] = MappingProxyType({})
    ) -> None:
        self._root = weakref.ref(root) if root is not None else None  # or the model would be part of a cycle
        self._name = name
        self.merged = dict(merged)

    def __repr__(self) -> str:
        return f"<{self._name} is forbidden: merged in the stead of slots are {self.merged}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._name in _SAVING:
            raise self._refusal(
                "PEFT would save the empty slots in its place",
                "copy the adapter's own folder; or swapper.deactivate() to save the model's other adapters",
            )
        if self._misses_what_is_merged(*args, **kwargs) and not _seen_to.get():
            raise self._refusal(
                f"{self._name} would leave it there, in silence",
                "swapper.deactivate(); or for a block: with swapper.using(None)",
            )
        root = self._root() if self._root is not None else None
        return getattr(type(root), self._name)(root, *args, **kwargs)

    def __reduce__(self) -> Any:
        # A copy or pickle of the model has the adapter in its base weights for good. Its slots are empty still.
        if self._name in _SAVING:
            return _Forbidden, (None, self._name, self.merged)
        return getattr, (self._root() if self._root is not None else None, self._name)

    def _misses_what_is_merged(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the adapter would be computed where it is not to be."""
        if self._name in _ADDING:
            return not kwargs.get("hotswap")
        if self._name in (*_PASSING_OVER, *_TAKING_OFF):
            return True
        named = args[0] if args else next((kwargs[key] for key in _NAMES if key in kwargs), ())
        names = {named} if isinstance(named, str) else set(named)
        return bool(names & self.merged.keys()) if self._name in _DELETING else not self.merged.keys() <= names

    def _refusal(self, reason: str, hint: str) -> MergedError:
        return MergedError(
            f"The live adapter is merged into the base weights, and {reason}.",
            where=self._name,
            found=", ".join(f"{adapter!r} in the stead of slot {slot!r}" for slot, adapter in self.merged.items()),
            expected="an adapter in the model's slots",
            hint=hint,
        )


def forbid(model: nn.Module, slot: str, adapter: str | None) -> None:
    """Let the calls that would miss what is merged in the slot's stead raise; `allow` takes it back."""
    for root in callable_roots(model):
        if not getattr(root, "peft_config", None):
            continue
        for name in _CALLS:
            if hasattr(type(root), name) and not (name in _ADDING and isinstance(root, _of_peft())):
                present = root.__dict__.get(name)
                if not isinstance(present, _Forbidden):
                    present = root.__dict__[name] = _Forbidden(root, name)
                present.merged[slot] = adapter


def _of_peft() -> tuple[type[nn.Module], ...]:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    return PeftModel, BaseTuner


def allow(model: nn.Module, slot: str) -> None:
    """Undo `forbid` of this slot. May be repeated."""
    for root in callable_roots(model):
        for name in _CALLS:
            present = root.__dict__.get(name)
            if isinstance(present, _Forbidden):
                present.merged.pop(slot, None)
                if not present.merged:
                    del root.__dict__[name]


def refuse_passed_over(slots: Mapping[str, Slot], adapter: str | None) -> None:
    """Raise if the model does not compute with the slots now: what is merged would be computed all the same."""
    for fqn, slot in slots.items():
        layer: Any = slot.layer
        if not slot.is_active:
            raise MergedError(
                f"The adapter {adapter!r} is merged into the base weights, and the model passes its slot over.",
                where=fqn,
                found="adapters are disabled" if layer.disable_adapters else f"active: {layer.active_adapters}",
                expected=f"{slot.adapter_name!r}, which it comes in the stead of, among the active adapters",
                hint=f"swap after model.set_adapter({slot.adapter_name!r}), or after the block of disable_adapter()",
            )
