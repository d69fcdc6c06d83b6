"""The host tier: adapters by name, in memory, accounted to the byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Anything that knows how many bytes of host memory it holds."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


T = TypeVar("T", bound=Sized)


class HostTier(Mapping[str, T], Generic[T]):
    """name → what waits under it, in the order of loading. Holds everything until it is removed."""

    def __init__(self) -> None:
        self._entries: dict[str, T] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all entries, as they are now."""
        return sum(entry.nbytes for entry in list(self._entries.values()))  # others may add to it meanwhile

    def add(self, name: str, entry: T) -> None:
        """Hold `entry` under `name`, in place of what was there."""
        self._entries.pop(name, None)  # it comes last
        self._entries[name] = entry

    def remove(self, name: str) -> T:
        """Let go of `name`'s entry and return it; KeyError if there is none."""
        return self._entries.pop(name)

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
