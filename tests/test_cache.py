"""What waits under its name: tiers that keep to their bytes, whatever is done to them."""

from __future__ import annotations

import threading
from collections import Counter
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hotslot.cache import Tier
from hotslot.errors import CacheFullError

NAMES = st.sampled_from("abcdef")
SIZES = st.integers(0, 40)


class Item:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class AgainstAModel(RuleBasedStateMachine):
    """A Tier beside a list in the order of use, searched from the front."""

    @initialize(limit=st.one_of(st.none(), st.integers(0, 100)))
    def begin(self, limit: int | None) -> None:
        self.limit = limit
        self.used: list[tuple[str, Item]] = []
        self.added: list[str] = []
        self.pins: Counter[str] = Counter()
        self.live: set[Item] = set()
        self.reserved: list[int] = []
        self.tier: Tier[Item] = Tier(limit, keeps=lambda item: item in self.live)

    def known(self, name: str) -> Item | None:
        return next((item for key, item in self.used if key == name), None)

    def drop(self, name: str) -> None:
        self.used = [(key, item) for key, item in self.used if key != name]
        self.added = [key for key in self.added if key != name]

    def nbytes(self) -> int:
        return sum(item.nbytes for _, item in self.used) + sum(self.reserved)

    def victims(self, more: int, besides: str) -> list[Item] | None:
        """Who goes for so many bytes more; None if that is not enough."""
        if self.limit is None or more <= 0:
            return []
        gone: list[Item] = []
        excess = self.nbytes() + more - self.limit
        for name, item in self.used:
            if excess > 0 and name != besides and not self.pins[name] and item not in self.live:
                gone.append(item)
                excess -= item.nbytes
        return gone if excess <= 0 else None

    @rule(name=NAMES, size=SIZES, from_reserved=st.booleans())
    def add(self, name: str, size: int, from_reserved: bool) -> None:
        item, before = Item(size), self.known(name)
        reserved = self.reserved[-1] if from_reserved and self.reserved else 0
        gone = self.victims(size - reserved - (before.nbytes if before else 0), name)
        if gone is None:
            with pytest.raises(CacheFullError):
                self.tier.add(name, item, reserved=reserved)
            return
        assert self.tier.add(name, item, reserved=reserved) == [*gone, *([before] if before else [])]
        for other, victim in list(self.used):
            if victim in gone:
                self.drop(other)
        self.drop(name)
        self.used.append((name, item))
        self.added.append(name)
        if reserved:
            self.reserved.pop()

    @rule(size=SIZES)
    def reserve(self, size: int) -> None:
        gone = self.victims(size, "")
        if gone is None:
            with pytest.raises(CacheFullError):
                self.tier.reserve(size)
            return
        assert self.tier.reserve(size) == gone
        for other, victim in list(self.used):
            if victim in gone:
                self.drop(other)
        self.reserved.append(size)

    @precondition(lambda self: self.reserved)
    @rule()
    def release(self) -> None:
        self.tier.release(self.reserved.pop())

    @rule(name=NAMES)
    def get(self, name: str) -> None:
        item = self.known(name)
        assert self.tier.peek(name) is self.tier.get(name) is item
        if item is not None:
            self.used = [pair for pair in self.used if pair[0] != name] + [(name, item)]

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        assert self.tier.remove(name) is self.known(name)
        self.drop(name)
        self.pins.pop(name, None)

    @rule(name=NAMES)
    def evict(self, name: str) -> None:
        item = self.known(name)
        if item is not None and (self.pins[name] or item in self.live):
            with pytest.raises(CacheFullError):
                self.tier.evict(name)
            return
        assert self.tier.evict(name) is item
        self.drop(name)

    @rule(name=NAMES)
    def pin(self, name: str) -> None:
        item = self.known(name)
        assert self.tier.pin(name) is (item is not None)
        if item is not None:
            self.pins[name] += 1

    @rule(name=NAMES)
    def unpin(self, name: str) -> None:
        self.tier.unpin(name)
        item = self.known(name)
        if self.pins[name] == 1 and item is not None:
            self.used = [pair for pair in self.used if pair[0] != name] + [(name, item)]
        if self.pins[name]:
            self.pins[name] -= 1

    @rule(name=NAMES)
    def make_live(self, name: str) -> None:
        item = self.known(name)
        self.live = {item} if item is not None else set()

    @rule(name=NAMES, size=SIZES)
    def change_size(self, name: str, size: int) -> None:
        item = self.known(name)
        if item is None:
            assert self.tier.weigh(name) == []
            return
        more = size - item.nbytes
        if self.victims(more, name) is None:
            return  # the one way beyond the limit, which has a test of its own
        gone = self.victims(more, name)
        item.nbytes = size
        assert self.tier.weigh(name) == gone
        for other, victim in list(self.used):
            if victim in (gone or ()):
                self.drop(other)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "tier"):
            return
        self.tier.check_integrity()
        assert self.tier.nbytes == self.nbytes()
        assert list(self.tier) == self.added
        assert self.tier.values() == [self.known(name) for name in self.added]
        assert len(self.tier) == len(self.used)


AgainstAModel.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestTier = AgainstAModel.TestCase


def test_what_does_not_fit_changes_nothing_and_says_what_stands_in_the_way() -> None:
    tier: Tier[Item] = Tier(100)
    tier.add("pinned", Item(70))
    tier.add("idle", Item(30))
    tier.pin("pinned")
    with pytest.raises(CacheFullError, match="'new' does not fit") as caught:
        tier.add("new", Item(40))
    assert caught.value.found == "40 bytes more, beside 70 that are pinned, in use, or have no other place"
    assert caught.value.expected.startswith("100 bytes at most")
    assert list(tier) == ["pinned", "idle"]
    tier.check_integrity()


def test_an_item_that_has_grown_beyond_the_limit_shows() -> None:
    tier: Tier[Item] = Tier(10)
    item = Item(10)
    tier.add("a", item)
    item.nbytes = 11
    with pytest.raises(AssertionError, match="accounted"):
        tier.check_integrity()
    tier.weigh("a")
    assert tier.nbytes == 11
    with pytest.raises(AssertionError, match="11 > 10"):
        tier.check_integrity()


def test_threads_leave_it_sound() -> None:
    tier: Tier[Item] = Tier(500)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = Random(seed)
        try:
            for _ in range(400):
                name = rng.choice("abcdefgh")
                match rng.randrange(5):
                    case 0:
                        tier.add(name, Item(rng.randrange(100)))
                    case 1:
                        tier.get(name)
                    case 2:
                        tier.remove(name)
                    case 3 if tier.pin(name):
                        tier.unpin(name)
                    case _:
                        tier.reserve(50)
                        tier.release(50)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    tier.check_integrity()
