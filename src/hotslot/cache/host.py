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
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return self._nbytes

    def add(self, name: str, entry: T) -> None:
        """Hold `entry` under `name`, in place of what was there."""
        if name in self._entries:
            self.remove(name)
        self._entries[name] = entry
        self._nbytes += entry.nbytes

    def remove(self, name: str) -> T:
        """Let go of `name`'s entry and return it; KeyError if there is none."""
        entry = self._entries.pop(name)
        self._nbytes -= entry.nbytes
        return entry

    def check_integrity(self) -> None:
        """Raise AssertionError unless the account is the sum of what is held."""
        held = sum(entry.nbytes for entry in self._entries.values())
        assert held == self._nbytes, f"{held:,} bytes held, {self._nbytes:,} accounted"

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
