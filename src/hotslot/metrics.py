"""What a swapper has done so far, counted: a swap adds a few integers, everything else waits until it is asked for.

Takes SwapReports, gives numbers. Knows nothing of models, nor of whoever collects them.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple

from .report import SwapReport

# Upper bounds of the histograms' buckets in seconds, inclusive: 1-2-5 from 10 µs to 10 s. One more bucket has no bound.
BOUNDS = (*(float(f"{digit}e{power}") for power in range(-5, 1) for digit in (1, 2, 5)), 10.0)


@dataclass(frozen=True, slots=True)
class Histogram:
    """How long the swaps of one tier took.

    Attributes:
        cumulative: how many took at most as long as each of `BOUNDS`; and last, how many there were.
        sum_seconds: of all of them.
    """

    cumulative: tuple[int, ...]
    sum_seconds: float

    @property
    def count(self) -> int:
        """How many there were."""
        return self.cumulative[-1]


@dataclass(frozen=True, slots=True)
class Metrics:
    """One swapper's counts since attach, taken at one moment.

    A swap is what gives a SwapReport, or would if it had not raised; a block of `using` is two. What is refused before
    it begins (an unknown name, a blend beyond the plan, work in flight that does not end in time) is none, nor is what
    attach and detach write. One by PEFT's functions (`hotslot.hotswap_adapter`, transformers' `load_adapter`) in this
    slot is one, if it did not raise; reading its file is not in its seconds.

    Attributes:
        slot: PEFT's name of the adapter that is swapped.
        changed: swaps that changed what is live.
        unchanged: swaps to what was live already, untouched: nothing was written.
        failed: swaps that raised, and left the model as it was.
        written_bytes: brought in by swaps, `SwapReport.nbytes` added up.
        latency: `SwapReport.tier` → the seconds of the swaps that changed something.
        recompilations: by dynamo, of any code in this process: how often it has compiled, or begun to compile, a frame
            that it had compiled before (a frame is a function, or the rest of one after a graph break). First
            compilations do not count, and `torch._dynamo.reset()` makes it begin anew, once `metrics` has seen it.
        hits: adapters that were in memory when they were needed.
        misses: those that had to be read, or were being read and had to be waited for.
        evictions: adapters, and blends, that had to leave host memory for others, or were told to.
        adapters: loaded now.
        host_adapters: of them, in host memory.
        host_bytes: of host memory that they hold, see `Swapper.host_bytes`; and what nobody needs any more, until the
            next call lets go of it.
        device_bytes: of GPU memory that they hold, see `Swapper.device_bytes`.
    """

    slot: str
    changed: int
    unchanged: int
    failed: int
    written_bytes: int
    latency: Mapping[str, Histogram]
    recompilations: int
    hits: int
    misses: int
    evictions: int
    adapters: int
    host_adapters: int
    host_bytes: int
    device_bytes: int


class _Tier(NamedTuple):
    """The swaps from one tier that changed something.

    Attributes:
        buckets: how many took at most as long as each of `BOUNDS`, and longer than the one before; and last the others.
        sum_seconds: of all of them.
        written_bytes: that they brought in.
    """

    buckets: tuple[int, ...]
    sum_seconds: float
    written_bytes: int


_NOTHING = _Tier((0,) * (len(BOUNDS) + 1), 0.0, 0)


class Recorder:
    """Counts the swaps of one swapper. Whoever adds one holds the swapper's lock; whoever reads holds nothing.

    So of a tier there is one object, which nobody writes into: a reader has a swap in all of its counts, or in none.
    """

    def __init__(self) -> None:
        self._unchanged = self._failed = 0
        self._tiers: dict[str, _Tier] = {}
        self._compiled_before = _compilations()

    def add(self, report: SwapReport) -> None:
        """Count a swap that came to its end."""
        if not report.changed:
            self._unchanged += 1
            return
        buckets, seconds, written_bytes = self._tiers.get(report.tier, _NOTHING)
        place = bisect_left(BOUNDS, report.seconds)
        counted = (*buckets[:place], buckets[place] + 1, *buckets[place + 1 :])
        self._tiers[report.tier] = _Tier(counted, seconds + report.seconds, written_bytes + report.nbytes)

    def add_failure(self) -> None:
        """Count a swap that raised."""
        self._failed += 1

    def metrics(self, slot: str, **waiting: int) -> Metrics:
        """All counts so far, with what the swapper knows itself: the last attributes of Metrics."""
        tiers = dict(self._tiers)
        latency = {name: Histogram(tuple(accumulate(tier.buckets)), tier.sum_seconds) for name, tier in tiers.items()}
        compiled = _compilations()
        if any(compiled.get(frame, 0) < times for frame, times in self._compiled_before.items()):
            self._compiled_before = {}  # dynamo was reset since; from now on, for these may grow beyond those
        return Metrics(
            slot=slot,
            changed=sum(histogram.count for histogram in latency.values()),
            unchanged=self._unchanged,
            failed=self._failed,
            written_bytes=sum(tier.written_bytes for tier in tiers.values()),
            latency=MappingProxyType(latency),
            recompilations=_recompilations(compiled) - _recompilations(self._compiled_before),
            **waiting,
        )


def log_fields(report: SwapReport) -> dict[str, Any]:
    """The fields of a swap's log record."""
    return {
        "adapter": report.adapter,
        "version": report.version,
        "tier": report.tier,
        "bytes": report.nbytes,
        "seconds": report.seconds,
        "changed": report.changed,
    }


def _compilations() -> dict[Any, int]:
    """Frame → how often dynamo has compiled it; empty while nobody has imported dynamo, which is slow.

    `torch._dynamo.utils.counters` has no such number: its graphs and frames count first compilations too.
    """
    dynamo: Any = sys.modules.get("torch._dynamo.convert_frame")
    return dict(dynamo.FRAME_COMPILE_COUNTER) if dynamo is not None else {}


def _recompilations(compilations: Mapping[Any, int]) -> int:
    return sum(compilations.values()) - len(compilations)
