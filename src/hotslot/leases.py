"""Who may read a model's weights, and who may write them: shared leases for forward passes, one writer for a swap.

Knows threads and contexts; knows no model, and nothing of what a swap is.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

from .errors import InFlightError, ModelError

InFlight = Literal["now", "finish", "drain"]
_IN_FLIGHT = (None, *get_args(InFlight))

# The innermost lease of this context; each knows the one around it. Some may be closed: a context variable set within
# a generator stays set for its caller, and one set in a context that was copied stays set in the copy.
_innermost: ContextVar[Lease | None] = ContextVar("hotslot_lease", default=None)

_gates: weakref.WeakKeyDictionary[object, Gate] = weakref.WeakKeyDictionary()
_gates_mutex = threading.Lock()


class Lease:
    """That somebody reads the weights behind `gate`.

    Attributes:
        uses: how many blocks and forward passes read under it: those of the context that took it, and of contexts
            copied from that one while it was open (asyncio tasks, `asyncio.to_thread`). Open while there is one.
        since: when it was taken, by `time.monotonic`.
        outer: the lease of this context, of whatever gate, in which it was taken.
    """

    __slots__ = ("gate", "outer", "since", "uses")
    outer: Lease | None
    uses: int

    def __init__(self, gate: Gate, outer: Lease | None) -> None:
        self.gate = gate
        while outer is not None and not outer.uses:  # or the chain would grow with every lease
            outer = outer.outer
        self.outer = outer
        self.uses = 0
        self.since = time.monotonic()


class Turn:
    """One that waits at a gate, or writes.

    Attributes:
        lease: that it waits for; of an upgrade its own, for whose end it does not wait; else None.
        exclusive: whether it wants to write.
        gives_way: an upgrade that is refused rather than one that must be.
        refused: whether it was.
        thread: identity of the thread that waits, and then writes.
        passed: released when its turn has come.
    """

    __slots__ = ("exclusive", "gives_way", "lease", "passed", "refused", "thread")

    def __init__(self, lease: Lease | None, *, exclusive: bool, gives_way: bool = False) -> None:
        self.lease = lease
        self.exclusive = exclusive
        self.gives_way = gives_way
        self.refused = False
        self.thread = threading.get_ident()
        self.passed = threading.Lock()
        self.passed.acquire()

    @property
    def is_upgrade(self) -> bool:
        """Whether it writes under a lease that it keeps."""
        return self.exclusive and self.lease is not None


class Gate:
    """Any number of leases, or one writer. First come, first served: a swap that waits holds new leases up.

    A context that holds a lease gets every further one at once, as it would else wait for a swap that waits for it;
    and it does not swap, as that would wait for itself. Only a `visit` may, which says that it will.

    Attributes:
        generation: how many swaps have changed what is behind it.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._mutex = threading.Lock()  # of all below, and of each lease's `uses`; never held while waiting
        self._open: dict[Lease, None] = {}
        self._writer: Turn | None = None
        self._queue: deque[Turn] = deque()

    @staticmethod
    def of(model: object) -> Gate:
        """The one gate of this model. It goes when the model goes."""
        with _gates_mutex:
            gate = _gates.get(model)
            if gate is None:
                gate = _gates[model] = Gate()
            return gate

    def __repr__(self) -> str:
        return f"<Gate: {len(self._open)} leases, {len(self._queue)} waiting{', a swap' if self._writer else ''}>"

    @property
    def busy(self) -> bool:
        """Whether a swap would have to wait."""
        return bool(self._open or self._queue or self._writer is not None)

    @property
    def holds_lease(self) -> bool:
        """Whether this context holds a lease."""
        return self._own() is not None

    # -- leases ------------------------------------------------------------------------------------------------------

    def enter(self, timeout_seconds: float | None = None) -> Lease:
        """Take a lease, once no swap is under way or waits before it. `leave` gives it back.

        Raises:
            InFlightError: its turn has not come within `timeout_seconds`.
        """
        outer = _innermost.get()
        own = outer and self._own()
        lease, turn = Lease(self, outer), None
        with self._mutex:
            if own is not None and own.uses:
                own.uses += 1
                return own
            if (self._writer is None and not self._queue) or self._writes():
                lease.uses = 1
                self._open[lease] = None
            else:
                turn = Turn(lease, exclusive=False)
                self._queue.append(turn)
        if turn is not None:
            self._wait(turn, timeout_seconds)
        _innermost.set(lease)
        return lease

    def leave(self, lease: Lease) -> None:
        """Give back a lease, from whatever thread or context."""
        with self._mutex:
            lease.uses -= 1
            if lease.uses:
                return
            del self._open[lease]
            if self._queue:
                self._admit_next()
        if _innermost.get() is lease:
            _innermost.set(lease.outer)

    @contextmanager
    def lease(self) -> Iterator[None]:
        """A lease for a block."""
        lease = self.enter()
        try:
            yield
        finally:
            self.leave(lease)

    # -- swaps -------------------------------------------------------------------------------------------------------

    @contextmanager
    def swap(self, in_flight: InFlight | None = None, timeout_seconds: float | None = None) -> Iterator[None]:
        """Be the only one for a block, once all leases before it have ended. With "now" at once, beside them.

        Raises:
            ModelError: this context holds a lease.
            InFlightError: leases were open still after `timeout_seconds`.
        """
        check_in_flight(in_flight, timeout_seconds)
        own = self._own()
        if self._writes():
            raise ModelError("A swap within another swap of the model.", hint="swap when that one has ended")
        if own is not None:
            raise ModelError(
                "A swap within one's own lease would wait for itself.",
                where="a block of swapper.lease() or swapper.using(…), or a guarded forward pass",
                found=f"a lease of this thread or task, open for {_age(own):.3g} s",
                expected="no lease, or another thread's or task's, which can end",
                hint="swap after that block, or with swapper.using(name), which may stand within it",
            )
        if in_flight == "now":
            yield
            return
        with self._writing(Turn(None, exclusive=True), timeout_seconds):
            yield

    @contextmanager
    def visit(self, in_flight: InFlight | None = None, timeout_seconds: float | None = None) -> Iterator[Visit]:
        """A lease for a block that swaps when it begins and back when it ends."""
        check_in_flight(in_flight, timeout_seconds)
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        visit = Visit(self, self.enter(timeout_seconds), in_flight, deadline)
        try:
            yield visit
        finally:
            if visit.lease.uses:
                self.leave(visit.lease)

    def count_change(self) -> None:
        """Note that a swap has changed something."""
        with self._mutex:  # two slots may be written "now"
            self.generation += 1

    # -- inside ------------------------------------------------------------------------------------------------------

    def _writes(self) -> bool:
        """Whether this thread is the writer."""
        return self._writer is not None and self._writer.thread == threading.get_ident()

    def _enter_writing(self, lease: Lease) -> None:
        """A lease for the writer, which lasts when it has written."""
        with self._mutex:
            assert self._writes()
            self._admit(lease)
        _innermost.set(lease)

    def _own(self) -> Lease | None:
        """The lease on this gate that this context holds."""
        lease = _innermost.get()
        while lease is not None and not (lease.gate is self and lease.uses):
            lease = lease.outer
        return lease

    @contextmanager
    def _writing(
        self, turn: Turn, timeout_seconds: float | None, *, first: bool = False, giving: Lease | None = None
    ) -> Iterator[None]:
        """For a block: queue for the right to write, wait for it, and have it.

        Args:
            turn: to be queued.
            timeout_seconds: of the wait.
            first: before any other that waits, but for upgrades.
            giving: a lease that is given back for it, once it is queued.
        """
        try:
            with self._mutex:
                self._enqueue(turn, first=first)
                self._admit_next()
            if giving is not None:
                self.leave(giving)
            self._wait(turn, timeout_seconds)
            yield
        finally:
            try:
                self._give_up(turn)
            except BaseException:  # an interrupt: nobody else would ever end it
                self._give_up(turn)
                raise

    def _enqueue(self, turn: Turn, *, first: bool = False) -> None:
        """Upgrades come before all others, who would wait for their leases; then those who are to be `first`."""
        ahead = self._queue[0] if self._queue and self._queue[0].is_upgrade else None
        if turn.is_upgrade and ahead is not None and ahead.lease is not turn.lease:  # each waits for the other's lease
            if turn.gives_way or not ahead.gives_way:
                raise _stuck()
            ahead.refused = True
            self._queue.popleft()
            ahead.passed.release()
        if turn.is_upgrade:
            self._queue.appendleft(turn)
        elif first:
            self._queue.insert(sum(other.is_upgrade for other in self._queue), turn)
        else:
            self._queue.append(turn)

    def _admit(self, lease: Lease) -> None:
        lease.uses = 1
        self._open[lease] = None

    def _admit_next(self) -> None:
        """Hand over to whoever may go on now; who waits need not race for it with newcomers. May be repeated."""
        while self._queue:
            turn = self._queue[0]
            if self._writer is not turn:  # else this was broken off here
                if self._writer is not None or (turn.exclusive and len(self._open) > (turn.lease is not None)):
                    return
                if turn.exclusive:
                    self._writer = turn
                else:
                    assert turn.lease is not None
                    self._admit(turn.lease)
            if turn.passed.locked():
                turn.passed.release()
            self._queue.popleft()

    def _wait(self, turn: Turn, timeout_seconds: float | None) -> None:
        limit = -1 if timeout_seconds is None else min(timeout_seconds, threading.TIMEOUT_MAX)
        try:
            passed = turn.passed.acquire(timeout=limit)
        except BaseException:  # an interrupt
            self._give_up(turn)
            raise
        if turn.refused:
            raise _stuck()
        if not passed:
            self._give_up(turn)
            raise InFlightError(
                f"Work in flight did not end within {timeout_seconds:.3g} s.",
                found=self._describe(),
                expected="leases that end: of guarded forward passes, swapper.lease() and swapper.using(…)",
                hint='a longer timeout_seconds; or in_flight="now", under which work in flight may mix adapters',
            )

    def _give_up(self, turn: Turn) -> None:
        """Take it out of the queue, and give back what it got if its turn has come. May be repeated."""
        with self._mutex:
            if turn in self._queue:
                self._queue.remove(turn)
            if self._writer is turn:
                self._writer = None
            elif turn.lease is not None and not turn.exclusive:
                turn.lease.uses = 0
                self._open.pop(turn.lease, None)
            self._admit_next()

    def _describe(self) -> str:
        with self._mutex:
            ages, waiting = [_age(lease) for lease in self._open], len(self._queue)
        leases = f"{len(ages)} leases open" + (f", the oldest for {max(ages):.3g} s" if ages else "")
        return f"{leases}; {waiting} others wait"


class Visit:
    """A lease whose holder swaps at the begin and at the end. Made by `Gate.visit`.

    Two visits overlap where the second finds live what it wants: it has nothing to swap, then or later.

    Attributes:
        lease: without uses once it was given up for the swap at the end.
    """

    def __init__(self, gate: Gate, lease: Lease, in_flight: InFlight | None, deadline: float | None) -> None:
        self.lease = lease
        self._gate = gate
        self._now = in_flight == "now"
        self._deadline = deadline
        self._turn: Turn | None = None

    @contextmanager
    def arriving(self, needless: Callable[[], bool]) -> Iterator[None]:
        """The block that swaps at the begin: alone, unless the swap is `needless`. The lease goes on after it.

        Raises:
            ModelError: the visit is within a lease, and another such visit waits for that lease to end.
            InFlightError: leases were open still after the timeout.
        """
        gate, lease = self._gate, self.lease
        if self._now or needless():
            yield
            return
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        if lease.uses > 1:
            self._turn = Turn(lease, exclusive=True, gives_way=True)
            with gate._writing(self._turn, left):
                yield
            return
        # Two that hold leases and wait for each other's end would wait for ever.
        gate.leave(lease)
        self._turn = Turn(None, exclusive=True)
        with gate._writing(self._turn, left):
            self.lease = Lease(gate, _innermost.get())
            gate._enter_writing(self.lease)
            yield

    @contextmanager
    def leaving(self, needless: Callable[[], bool]) -> Iterator[None]:
        """The block that swaps back, before any swap that waits. Waits without a timeout, for it has to be done.

        If it was broken off it may be done again.
        """
        gate, lease = self._gate, self.lease
        if self._turn is not None:  # of a swap that was broken off: it is held as long as anybody has the traceback
            gate._give_up(self._turn)
        if self._now or needless():
            yield
            return
        self._turn = Turn(lease if lease.uses > 1 else None, exclusive=True)
        with gate._writing(self._turn, None, first=True, giving=lease if lease.uses == 1 else None):
            yield


def check_in_flight(in_flight: InFlight | None, timeout_seconds: float | None) -> None:
    """Raise ValueError unless the two options go together."""
    if in_flight not in _IN_FLIGHT:
        raise ValueError(f"in_flight must be 'now', 'finish' or 'drain', got {in_flight!r}")
    if (timeout_seconds is None) == (in_flight == "drain"):
        raise ValueError(
            f"in_flight='drain' needs timeout_seconds, and no other takes it: got in_flight={in_flight!r}, "
            f"timeout_seconds={timeout_seconds!r}"
        )
    if timeout_seconds is not None and not timeout_seconds >= 0:  # NaN is neither
        raise ValueError(f"timeout_seconds must be 0 or more, got {timeout_seconds!r}")


def _stuck() -> ModelError:
    return ModelError(
        "This swap within a lease and another one would wait for each other's lease.",
        where="swapper.using(…) within swapper.lease() or swapper.using(…)",
        found="another thread or task that holds a lease, and waits to swap within it",
        expected="one of them at a time",
        hint='leave the outer block before; or in_flight="now", under which work in flight may mix adapters',
    )


def _age(lease: Lease) -> float:
    return time.monotonic() - lease.since
