"""Metrics' text → the `Metrics` that it was made of; two readings → what happened between them.

The inverse of `hotslot.integrations.prometheus`. Knows nothing of where the text came from, nor how it is shown.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf
from operator import sub

from ... import __version__
from ...errors import HotslotError
from ...metrics import BOUNDS, Histogram, Metrics

# A process has thousands of other samples, and the parser takes a microsecond for each character.
_OURS = ("hotslot_", "process_start_time_seconds ")
_MAX_LINE_CHARACTERS = 2_000  # for as many labels as a line holds, the parser copies the rest of the line

# Only ever grow, while a swapper lives. Recompilations do not: `torch._dynamo.reset()` makes them begin anew.
_COUNTS = ("changed", "unchanged", "failed", "written_bytes", "hits", "misses", "evictions")

_Samples = dict[tuple[str, ...], float]  # name, and the labels' values but for the slot's, in the order of their names


@dataclass(frozen=True, slots=True)
class Reading:
    """What a process had counted when it was asked.

    Attributes:
        unix_seconds: when that was.
        monotonic_seconds: the same by a clock that nobody sets.
        process_started: when the process began, in Unix seconds, if it says so.
        slots: label `slot` → `swapper.metrics()`.
    """

    unix_seconds: float
    monotonic_seconds: float
    process_started: float | None
    slots: Mapping[str, Metrics]


@dataclass(frozen=True, slots=True)
class Latency:
    """How long a tier's swaps took.

    Attributes:
        swaps: how many there were, at least one.
        mean_seconds: exact.
        p50_seconds: half of them took no longer. Interpolated in the histogram's bucket, whose upper bound is 2 or 2.5
            times its lower one; None beyond the last bound, 10 s.
        p99_seconds: of 99 in 100, likewise.
    """

    swaps: int
    mean_seconds: float
    p50_seconds: float | None
    p99_seconds: float | None


@dataclass(frozen=True, slots=True)
class Activity:
    """What a slot has done, between two readings or since attach.

    The first eight are `Metrics`' own. None stands for what cannot be said: a rate since attach, which was at no known
    time, or a share of nothing.

    Attributes:
        swaps_per_second: of those that changed something.
        gigabytes_per_second: that swaps brought in, over all of the time.
        swapping_gigabytes_per_second: the same over the time spent in swaps.
        hit_rate: hits among all that was needed.
        latency: `SwapReport.tier` → of the swaps that changed something; tiers without any left out.
    """

    changed: int
    unchanged: int
    failed: int
    written_bytes: int
    hits: int
    misses: int
    evictions: int
    recompilations: int
    swaps_per_second: float | None
    gigabytes_per_second: float | None
    swapping_gigabytes_per_second: float | None
    hit_rate: float | None
    latency: dict[str, Latency]


@dataclass(frozen=True, slots=True)
class SlotView:
    """One slot at one reading.

    Attributes:
        slot: its label.
        adapters: known.
        host_adapters: of them, in host memory.
        host_bytes: that they hold there.
        device_bytes: that they hold on the device, beside the slots.
        restarted: its counts began anew after the reading before; `interval` is since then.
        interval: since the reading before; None if there was none.
        since_attach: all of it.
    """

    slot: str
    adapters: int
    host_adapters: int
    host_bytes: int
    device_bytes: int
    restarted: bool
    interval: Activity | None
    since_attach: Activity


@dataclass(frozen=True, slots=True)
class View:
    """What is shown of a reading.

    Attributes:
        url: that was read.
        unix_seconds: when.
        interval_seconds: since the reading before; None if there was none.
        slots: in the service's order.
    """

    url: str
    unix_seconds: float
    interval_seconds: float | None
    slots: list[SlotView]


# -- text → Metrics ----------------------------------------------------------------------------------------------------


def parse(text: str, *, url: str) -> tuple[float | None, dict[str, Metrics]]:
    """When the process started, if it says so, and its slots' metrics.

    Args:
        text: of Prometheus or OpenMetrics; what is not hotslot's is ignored.
        url: where it came from, for errors.

    Raises:
        HotslotError: prometheus_client is missing; the text is none of metrics, has no slot, or is of another version.
    """
    started: float | None = None
    slots: dict[str, _Samples] = {}
    try:
        for name, labels, value in _samples(text):
            if name == "process_start_time_seconds":
                started = value
            elif (slot := labels.pop("slot", None)) is not None:
                if not 0 <= value < inf:
                    raise ValueError(f"{name} {value}")
                samples = slots.setdefault(slot, {})
                key = (name, *(labels[label] for label in sorted(labels)))
                if key in samples:
                    raise _refusal(url, f"twice {name} of slot {slot!r}", "those of one process")
                samples[key] = value
        metrics = {slot: _metrics(slot, samples) for slot, samples in slots.items()}
    except KeyError as missing:
        lacking = " ".join(missing.args[0])
        raise _refusal(url, f"none of the name and labels {lacking}", f"those of hotslot {__version__}") from None
    except ValueError as error:
        raise _refusal(url, str(error), "Prometheus's text format, and numbers that count something") from None
    if not metrics:
        lines = text.count("\n")
        raise _refusal(url, f"{lines:,} lines, and no slot of hotslot's among them", "hotslot_swaps_total{slot=…} …")
    return started, metrics


def _samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        raise HotslotError(
            "hotslot top reads metrics with prometheus_client, which is not installed here.",
            expected="prometheus_client",
            hint="pip install hotslot[prometheus]",
        ) from None
    # Without the comments on types each sample is a family of its own, under its full name, whatever the dialect.
    ours = [line for line in text.split("\n") if line.startswith(_OURS)]
    longest = max(map(len, ours), default=0)
    if longest > _MAX_LINE_CHARACTERS:
        raise ValueError(f"a line of {longest:,} characters")
    for family in text_string_to_metric_families("\n".join(ours)):
        for sample in family.samples:
            yield sample.name, dict(sample.labels), sample.value


def _metrics(slot: str, samples: _Samples) -> Metrics:
    def count(*key: str) -> int:
        return int(samples[key])

    tiers = [tier for name, *labels in samples if name == "hotslot_swap_seconds_count" for tier in labels]
    latency = {tier: _histogram(samples, tier) for tier in tiers}
    return Metrics(
        slot=slot,
        changed=sum(histogram.count for histogram in latency.values()),
        unchanged=count("hotslot_swaps_total", "unchanged", "none"),
        failed=count("hotslot_swaps_total", "failed", "none"),
        written_bytes=count("hotslot_written_bytes_total"),
        latency=latency,
        recompilations=count("hotslot_recompilations_total"),
        hits=count("hotslot_lookups_total", "hit"),
        misses=count("hotslot_lookups_total", "miss"),
        evictions=count("hotslot_evictions_total"),
        adapters=count("hotslot_adapters", "known"),
        host_adapters=count("hotslot_adapters", "host"),
        host_bytes=count("hotslot_bytes", "host"),
        device_bytes=count("hotslot_bytes", "device"),
    )


def _histogram(samples: _Samples, tier: str) -> Histogram:
    # By value: whoever passes metrics on may write a bound in another way.
    counts = {
        float(labels[0]): int(value)
        for (name, *labels), value in samples.items()
        if name == "hotslot_swap_seconds_bucket" and labels[1:] == [tier]
    }
    for bound in (*BOUNDS, inf):
        if bound not in counts:
            raise KeyError(("hotslot_swap_seconds_bucket", str(bound), tier))
    cumulative = tuple(counts[bound] for bound in (*BOUNDS, inf))
    return Histogram(cumulative, samples["hotslot_swap_seconds_sum", tier])


def _refusal(url: str, found: str, expected: str) -> HotslotError:
    return HotslotError(
        "What answers there does not give hotslot's metrics.",
        where=url,
        found=found,
        expected=expected,
        hint="in the service: REGISTRY.register(hotslot.integrations.prometheus.Collector(swapper)); of one version",
    )


# -- Metrics → what happened -------------------------------------------------------------------------------------------


def view(url: str, now: Reading, before: Reading | None = None) -> View:
    """What `now` shows, and what happened since `before`."""
    seconds = None if before is None else now.monotonic_seconds - before.monotonic_seconds
    slots = []
    for slot, metrics in now.slots.items():
        interval, restarted = None, False
        # Of a slot that was not there before, nobody knows since when it counts.
        if before is not None and slot in before.slots:
            since = None if _another_process(before, now) else _difference(before.slots[slot], metrics)
            restarted = since is None
            interval = _activity(metrics if since is None else since, seconds)
        slots.append(
            SlotView(
                slot=slot,
                adapters=metrics.adapters,
                host_adapters=metrics.host_adapters,
                host_bytes=metrics.host_bytes,
                device_bytes=metrics.device_bytes,
                restarted=restarted,
                interval=interval,
                since_attach=_activity(metrics, None),
            )
        )
    return View(url, now.unix_seconds, seconds, slots)


def _another_process(before: Reading, now: Reading) -> bool:
    """Counts of a new process may be larger than those of the old one were."""
    return before.process_started != now.process_started


def _difference(before: Metrics, now: Metrics) -> Metrics | None:
    """What `now` has counted since; None if its counts began anew."""
    counts = {name: getattr(now, name) - getattr(before, name) for name in _COUNTS}
    latency = dict(now.latency)
    for tier, earlier in before.latency.items():
        if tier not in latency:
            return None
        later = latency[tier]
        latency[tier] = Histogram(
            tuple(map(sub, later.cumulative, earlier.cumulative)), later.sum_seconds - earlier.sum_seconds
        )
    buckets = [count for histogram in latency.values() for count in histogram.cumulative]
    if min(*counts.values(), *buckets) < 0:
        return None
    fresh = now.recompilations < before.recompilations
    recompilations = now.recompilations - (0 if fresh else before.recompilations)
    return replace(now, latency=latency, recompilations=recompilations, **counts)


def _activity(done: Metrics, seconds: float | None) -> Activity:
    swapping = sum(histogram.sum_seconds for histogram in done.latency.values())
    gigabytes = done.written_bytes / 1e9
    needed = done.hits + done.misses
    return Activity(
        **{name: getattr(done, name) for name in (*_COUNTS, "recompilations")},
        swaps_per_second=done.changed / seconds if seconds else None,
        gigabytes_per_second=gigabytes / seconds if seconds else None,
        swapping_gigabytes_per_second=gigabytes / swapping if swapping else None,
        hit_rate=done.hits / needed if needed else None,
        latency={tier: _latency(histogram) for tier, histogram in done.latency.items() if histogram.count},
    )


def _latency(histogram: Histogram) -> Latency:
    return Latency(
        swaps=histogram.count,
        mean_seconds=histogram.sum_seconds / histogram.count,
        p50_seconds=_quantile(histogram, 0.5),
        p99_seconds=_quantile(histogram, 0.99),
    )


def _quantile(histogram: Histogram, share: float) -> float | None:
    """As Prometheus's histogram_quantile: as if a bucket's swaps lay evenly in it."""
    wanted = share * histogram.count
    bucket = bisect_left(histogram.cumulative, wanted)
    if bucket == len(BOUNDS):
        return None
    below, low = (histogram.cumulative[bucket - 1], BOUNDS[bucket - 1]) if bucket else (0, 0.0)
    return low + (BOUNDS[bucket] - low) * (wanted - below) / (histogram.cumulative[bucket] - below)
