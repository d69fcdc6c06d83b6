"""Counts what others change of what PEFT keeps beside tensors: what nobody has changed, a swap need not read."""

from __future__ import annotations

from typing import Any


class Edits:
    """How many there were, of whatever: they are rare, and a few readings in vain cost less than to tell them apart."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


edits = Edits()


class CountingDict(dict[str, Any]):
    """adapter_name → record, as PEFT's own dict; counts its changes. A copy or a pickle is a plain dict."""

    def __setitem__(self, key: str, value: Any) -> None:
        edits.count += 1
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        edits.count += 1
        super().__delitem__(key)

    def __ior__(self, other: Any) -> CountingDict:  # type: ignore[override,misc]
        self.update(other)
        return self

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As dict's, each value through `__setitem__`."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As dict's."""
        edits.count += 1
        return super().setdefault(key, default)

    def pop(self, *args: Any) -> Any:
        """As dict's."""
        edits.count += 1
        return super().pop(*args)

    def popitem(self) -> tuple[str, Any]:
        """As dict's."""
        edits.count += 1
        return super().popitem()

    def clear(self) -> None:
        """As dict's."""
        edits.count += 1
        super().clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)
