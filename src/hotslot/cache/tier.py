"""A tier: what waits under its name in one kind of memory, accounted to the byte and bounded."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

from ..errors import CacheFullError


class Sized(Protocol):
    """Anything that knows how many bytes of the tier's memory it holds."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


T = TypeVar("T", bound=Sized)


class Tier(Generic[T]):
    """name → item, and never more bytes of them than the limit: what was not used for longest goes first.

    An item's size is that at which it is added. Any thread may call anything. Methods that evict return what has gone,
    so that their owner lets go of what belongs to it. Using, adding and evicting one item costs the same with ten as
    with 10,000.

    Args:
        limit_bytes: of all items; None: as many as there is memory for.
        memory: what the bytes are of, for messages.
    """

    def __init__(self, limit_bytes: int | None = None, *, memory: str = "host memory") -> None:
        self.limit_bytes = limit_bytes
        self._memory = memory
        self._lock = threading.RLock()
        self._items: OrderedDict[str, T] = OrderedDict()  # the least recently used first
        self._sizes: dict[str, int] = {}
        self._nbytes = self._reserved = 0

    # -- what there is ----------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all items, and of what is reserved."""
        return self._nbytes + self._reserved

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def get(self, name: str) -> T | None:
        """The item, if it is here: now the last one that would go."""
        with self._lock:
            item = self._items.get(name)
            if item is not None:
                self._items.move_to_end(name)
            return item

    # -- what comes and goes ----------------------------------------------------------------------------------------

    def add(self, name: str, item: T, *, reserved: int = 0) -> list[T]:
        """Hold an item, in place of what was under its name. Returns what had to go for it.

        Args:
            name: of the item.
            item: what is held.
            reserved: bytes that were reserved for it and are not any more once it is held.

        Raises:
            CacheFullError: it is larger than all the room there is. Nothing has changed, the reservation included.
        """
        with self._lock:
            size = item.nbytes
            gone = self._make_room(size - reserved - self._sizes.get(name, 0), name)
            known = self._forget(name)
            self._items[name], self._sizes[name] = item, size
            self._nbytes += size
            self._reserved -= reserved
            return gone if known is None else [*gone, known]

    def reserve(self, nbytes: int, name: str = "") -> list[T]:
        """Count bytes that are about to be filled, and make room for them. Returns what had to go.

        Raises:
            CacheFullError: there is no room for as many. Nothing has changed.
        """
        with self._lock:
            gone = self._make_room(nbytes, name)
            self._reserved += nbytes
            return gone

    def release(self, nbytes: int) -> None:
        """Count no longer what was reserved and came to nothing."""
        with self._lock:
            self._reserved -= nbytes

    def remove(self, name: str) -> T | None:
        """Let go of an item; None if there is none."""
        with self._lock:
            return self._forget(name)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the bytes that are accounted are those that are held, and within the limit."""
        with self._lock:
            sizes = {name: item.nbytes for name, item in self._items.items()}
            assert sizes == self._sizes, f"accounted {self._sizes}, held {sizes}"
            assert self._nbytes == sum(sizes.values()), f"accounted {self._nbytes}, held {sum(sizes.values())}"
            assert self._reserved >= 0
            assert self.limit_bytes is None or self.nbytes <= self.limit_bytes, f"{self.nbytes} > {self.limit_bytes}"

    # -- inside, with the lock held ---------------------------------------------------------------------------------

    def _make_room(self, more: int, name: str) -> list[T]:
        """Let go of what has to for `more` bytes, besides the item of this name."""
        excess = 0 if self.limit_bytes is None or more <= 0 else self.nbytes + more - self.limit_bytes
        chosen: list[str] = []
        for victim in self._items:
            if excess <= 0:
                break
            if victim != name:
                chosen.append(victim)
                excess -= self._sizes[victim]
        if excess > 0:
            raise CacheFullError(
                f"{name!r} does not fit into {self._memory}.",
                where=name or None,
                found=f"{excess:,} bytes too many, with everything else gone",
                expected=f"{self.limit_bytes:,} bytes at most in all, by the cache's limit",
                hint="raise the limit",
            )
        return [gone for victim in chosen if (gone := self._forget(victim)) is not None]

    def _forget(self, name: str) -> T | None:
        item = self._items.pop(name, None)
        if item is not None:
            self._nbytes -= self._sizes.pop(name)
        return item
