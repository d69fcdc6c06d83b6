"""A tier: what waits under its name in one kind of memory, accounted to the byte and bounded."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar

from ..errors import CacheFullError


class Sized(Protocol):
    """Anything that knows how many bytes of the tier's memory it holds."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


T = TypeVar("T", bound=Sized)


class Room:
    """Bytes of a tier that are about to be filled, as long as anybody has this, or until an item has them."""

    __slots__ = ("__weakref__", "nbytes")

    def __init__(self) -> None:
        self.nbytes = 0


class Tier(Generic[T]):
    """name → item, and never more bytes of them than the limit: what was not used for longest goes first.

    An item's size is taken when it is added; if it changes, `weigh` it anew. Any thread may call anything. Methods
    that evict return what has gone, so that their owner lets go of what belongs to it. Using, adding and evicting one
    item costs the same with ten as with 10,000.

    An interrupt comes where something is called or a loop goes on, and leaves all accounted: what belongs together is
    changed where nothing is called.

    Args:
        limit_bytes: of all items; None: as many as there is memory for.
        keeps: says of an item that it may not go now, such as one that is live. That counts as a use. It is asked with
            the tier's lock held and must not call the tier.
        memory: what the bytes are of, for messages.
    """

    def __init__(
        self,
        limit_bytes: int | None = None,
        *,
        keeps: Callable[[T], bool] = lambda item: False,
        memory: str = "host memory",
    ) -> None:
        self.limit_bytes = limit_bytes
        self._keeps = keeps
        self._memory = memory
        self._lock = threading.RLock()
        self._items: OrderedDict[str, T] = OrderedDict()  # the least recently used first
        self._sizes: dict[str, int] = {}
        self._retired: list[tuple[T, int]] = []  # with their sizes
        self._rooms: weakref.WeakSet[Room] = weakref.WeakSet()  # what is broken off before it gives one back has none
        self._nbytes = 0
        self.evictions = 0  # of what had to go for others, or was told to

    # -- what there is ----------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all items, and of what is reserved."""
        with self._lock:
            return self._nbytes + sum(room.nbytes for room in self._rooms)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def items(self) -> list[tuple[str, T]]:
        """All names and items, the least recently used first. That is no use of them."""
        with self._lock:
            return list(self._items.items())

    def peek(self, name: str) -> T | None:
        """The item, if it is here. That is no use of it."""
        return self._items.get(name)

    def get(self, name: str) -> T | None:
        """The item, if it is here: now the last one that would go."""
        with self._lock:
            item = self._items.get(name)
            if item is not None:
                self._items.move_to_end(name)
            return item

    def at_rest(self) -> AbstractContextManager[Any]:
        """For a block: no other thread reads or changes anything."""
        return self._lock

    # -- what comes and goes ----------------------------------------------------------------------------------------

    def add(self, name: str, item: T, room: Room | None = None) -> list[T]:
        """Hold an item, in place of what was under its name. Returns what had to go for it.

        Args:
            name: of the item.
            item: what is held.
            room: that was reserved for it, and is empty once it is held.

        Raises:
            CacheFullError: it does not fit beside what may not go. Nothing has changed, the reservation included.
        """
        with self._lock:
            size, reserved = item.nbytes, 0 if room is None else room.nbytes
            gone = self._make_room(size - reserved - self._sizes.get(name, 0), name, besides=name)
            known, before = self._items.get(name), self._sizes.get(name, 0)
            if known is not None:
                del self._items[name]
            self._items[name], self._sizes[name] = item, size
            self._nbytes += size - before
            if room is not None:
                room.nbytes = 0
            return gone if known is None else [*gone, known]

    def reserve(self, room: Room, nbytes: int, name: str = "") -> list[T]:
        """Give a room so many bytes more. Returns what had to go.

        Args:
            room: to be filled.
            nbytes: more than it has.
            name: of what will fill it. An item that has the name goes first, as far as it may: it is to be replaced.

        Raises:
            CacheFullError: there is no room for as many. Nothing has changed.
        """
        with self._lock:
            if name in self._items:
                self._items.move_to_end(name, last=False)
            gone = self._make_room(nbytes, name)
            self._rooms.add(room)
            room.nbytes += nbytes
            return gone

    def remove(self, name: str) -> T | None:
        """Let go of an item, whether it may go or not; None if there is none."""
        with self._lock:
            return self._forget(name)

    def retire(self, name: str) -> None:
        """Find an item no more; it is accounted for until `settle` finds that it may go, or room is needed."""
        with self._lock:
            if name in self._items:
                self._retired = [*self._retired, (self._items[name], self._sizes[name])]
                del self._items[name], self._sizes[name]

    def settle(self) -> list[T]:
        """Let go of what was retired, as far as it may go by now. Returns what has gone."""
        if not self._retired:
            return []
        with self._lock:
            known = [(item, size, self._keeps(item)) for item, size in self._retired]  # first: it may be broken off
            staying = [(item, size) for item, size, stays in known if stays]
            gone = [item for item, _, stays in known if not stays]
            nbytes = sum(size for _, size, stays in known if not stays)
            self._retired = staying
            self._nbytes -= nbytes
            return gone

    def evict(self, name: str) -> T | None:
        """Let go of an item as if there were no room; None if there is none.

        Raises:
            CacheFullError: it may not go now.
        """
        with self._lock:
            item = self._items.get(name)
            if item is not None and self._keeps(item):
                raise CacheFullError(
                    f"{name!r} cannot leave {self._memory} now.",
                    where=name,
                    found="pinned, in use, or of no other place than this",
                    expected="an adapter that is none of these",
                    hint="unpin it, or swap to another one, before; or unload it",
                )
            return self._take(name) if item is not None else None

    def clear(self) -> None:
        """Let go of all."""
        with self._lock:
            self._items.clear()
            self._sizes.clear()
            self._retired.clear()
            self._nbytes = 0

    def weigh(self, name: str) -> list[T]:
        """Take an item's size anew. If it has grown, others go as far as they may, and are returned."""
        with self._lock:
            item = self._items.get(name)
            if item is None:
                return []
            size = item.nbytes
            self._nbytes += size - self._sizes[name]
            self._sizes[name] = size
            chosen, _ = self._victims(self._excess(0), name)
            return [self._take(victim) for victim in chosen]

    def check_integrity(self) -> None:
        """Raise AssertionError unless the bytes that are accounted are those that are held, and within the limit."""
        with self._lock:
            sizes = {name: item.nbytes for name, item in self._items.items()}
            assert sizes == self._sizes, f"accounted {self._sizes}, held {sizes}"
            held = sum(sizes.values()) + sum(size for _, size in self._retired)
            assert self._nbytes == held, f"accounted {self._nbytes}, held {held}"
            assert self.limit_bytes is None or self.nbytes <= self.limit_bytes, f"{self.nbytes} > {self.limit_bytes}"

    # -- inside, with the lock held ---------------------------------------------------------------------------------

    def _excess(self, more: int) -> int:
        """Bytes beyond the limit, with `more` of them."""
        return 0 if self.limit_bytes is None else self.nbytes + more - self.limit_bytes

    def _victims(self, nbytes: int, besides: str | None) -> tuple[list[str], int]:
        """Who goes for so many bytes, not the item of the name `besides`; and how many bytes are lacking then."""
        chosen, kept = [], []
        for name, item in self._items.items():
            if nbytes <= 0:
                break
            if name == besides:
                continue
            if self._keeps(item):
                kept.append(name)
            else:
                chosen.append(name)
                nbytes -= self._sizes[name]
        for name in kept:
            self._items.move_to_end(name)  # else the next ones in need would look at all of them again
        return chosen, max(nbytes, 0)

    def _make_room(self, more: int, name: str, *, besides: str | None = None) -> list[T]:
        """Let go of what has to for `more` bytes, not the item of the name `besides`."""
        settled = self.settle()
        chosen, lacking = self._victims(self._excess(more) if more > 0 else 0, besides)
        if lacking:
            raise CacheFullError(
                f"{name!r} does not fit into {self._memory}.",
                where=name or None,
                found=f"{lacking:,} bytes too many, with all gone that may go: what is pinned, in use, or of no other "
                "place stays",
                expected=f"{self.limit_bytes:,} bytes at most in all, by the cache's limit",
                hint="unpin or unload adapters, or raise the limit",
            )
        return settled + [self._take(victim) for victim in chosen]

    def _take(self, name: str) -> T:
        item = self._forget(name)
        assert item is not None
        self.evictions += 1
        return item

    def _forget(self, name: str) -> T | None:
        item = self._items.get(name)
        if item is not None:
            self._nbytes -= self._sizes[name]
            del self._items[name], self._sizes[name]
        return item
