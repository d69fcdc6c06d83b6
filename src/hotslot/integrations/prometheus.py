"""Swappers' metrics for prometheus_client, read when they are scraped. `pip install hotslot[prometheus]`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector as BaseCollector

from ..metrics import BOUNDS, Histogram, Metrics
from ..swapper import Swapper

_BOUNDS = [*map(str, BOUNDS), "+Inf"]


class Collector(BaseCollector):
    """What a registry asks for `swapper.metrics()`; a scrape waits for no swap, and no swap for a scrape.

        REGISTRY.register(Collector(swapper))
        REGISTRY.register(Collector({"chat": swapper, "search": another}))  # one collector for all of a process

    Metrics, each with the label `slot`: `hotslot_swaps_total{outcome,tier}`, `hotslot_swap_seconds{tier}` (a histogram
    of the swaps that changed something), `hotslot_written_bytes_total`, `hotslot_lookups_total{outcome}` ("hit" or
    "miss", in host memory), `hotslot_evictions_total`, `hotslot_adapters{place}` ("known", or "host": in memory),
    `hotslot_bytes{tier}` ("host", "device"), `hotslot_recompilations_total`, which is the process's as far as each
    swapper has seen it. What each of them counts: `hotslot.metrics.Metrics`.

    The counts of a swapper that was detached stay, as counters should.

    Args:
        swappers: one, whose slot's name is the label `slot`; or label → swapper, a mapping that is yours: what you add
            to it, and take out, is seen at the next scrape.
    """

    def __init__(self, swappers: Swapper | Mapping[str, Swapper]) -> None:
        self._swappers = swappers if isinstance(swappers, Mapping) else {swappers.metrics().slot: swappers}

    def collect(self) -> Iterator[Metric]:
        """All swappers' metrics, of now."""
        seen = {slot: swapper.metrics() for slot, swapper in dict(self._swappers).items()}
        yield _swaps(seen)
        yield _seconds(seen)
        yield from _counts(seen)
        yield from _places(seen)


def _counts(seen: Mapping[str, Metrics]) -> Iterator[Metric]:
    written = CounterMetricFamily("hotslot_written_bytes", "Bytes that swaps have brought in.", labels=["slot"])
    lookups = CounterMetricFamily(
        "hotslot_lookups", "Adapters that were needed: in host memory, or not.", labels=["slot", "outcome"]
    )
    evictions = CounterMetricFamily("hotslot_evictions", "Adapters that had to leave host memory.", labels=["slot"])
    recompilations = CounterMetricFamily(
        "hotslot_recompilations",
        "Compilations by dynamo, in all of this process, of frames that it had compiled before, since attach.",
        labels=["slot"],
    )
    for slot, metrics in seen.items():
        written.add_metric([slot], metrics.written_bytes)
        lookups.add_metric([slot, "hit"], metrics.hits)
        lookups.add_metric([slot, "miss"], metrics.misses)
        evictions.add_metric([slot], metrics.evictions)
        recompilations.add_metric([slot], metrics.recompilations)
    yield from (written, lookups, evictions, recompilations)


def _places(seen: Mapping[str, Metrics]) -> Iterator[Metric]:
    adapters = GaugeMetricFamily("hotslot_adapters", "Adapters: known, in host memory.", labels=["slot", "place"])
    held = GaugeMetricFamily("hotslot_bytes", "Memory that adapters hold.", labels=["slot", "tier"])
    for slot, metrics in seen.items():
        adapters.add_metric([slot, "known"], metrics.adapters)
        adapters.add_metric([slot, "host"], metrics.host_adapters)
        held.add_metric([slot, "host"], metrics.host_bytes)
        held.add_metric([slot, "device"], metrics.device_bytes)
    yield from (adapters, held)


def _swaps(seen: Mapping[str, Metrics]) -> CounterMetricFamily:
    family = CounterMetricFamily(
        "hotslot_swaps",
        "Swaps, by what came of them and where the bytes came from.",
        labels=["slot", "outcome", "tier"],
    )
    for slot, metrics in seen.items():
        for tier, histogram in metrics.latency.items():
            family.add_metric([slot, "changed", tier], histogram.count)
        family.add_metric([slot, "unchanged", "none"], metrics.unchanged)
        family.add_metric([slot, "failed", "none"], metrics.failed)
    return family


def _seconds(seen: Mapping[str, Metrics]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(
        "hotslot_swap_seconds", "Seconds of swaps that changed what is live.", labels=["slot", "tier"]
    )
    for slot, metrics in seen.items():
        for tier, histogram in metrics.latency.items():
            family.add_metric([slot, tier], _buckets(histogram), histogram.sum_seconds)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    return list(zip(_BOUNDS, histogram.cumulative, strict=True))
