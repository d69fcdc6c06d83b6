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
    """What a registry asks for `swapper.metrics()`; it keeps the swappers alive, and adds nothing to a swap.

        REGISTRY.register(Collector(swapper))
        REGISTRY.register(Collector({"chat": swapper, "search": another}))  # one collector for all of a process

    Metrics: `hotslot_swaps_total{outcome,tier}`, `hotslot_swap_seconds{tier}` (a histogram of the swaps that changed
    something), `hotslot_written_bytes_total`, `hotslot_adapters_loaded`, `hotslot_host_bytes`, each with the label
    `slot`; `hotslot_recompilations_total`, which is the process's as far as each swapper has seen it, too. What each of
    them counts: `hotslot.metrics.Metrics`.

    Args:
        swappers: one, whose slot's name is the label `slot`; or label → swapper.
    """

    def __init__(self, swappers: Swapper | Mapping[str, Swapper]) -> None:
        self._swappers = dict(swappers) if isinstance(swappers, Mapping) else {swappers.metrics().slot: swappers}

    def collect(self) -> Iterator[Metric]:
        """All swappers' metrics, of now."""
        seen = {slot: swapper.metrics() for slot, swapper in self._swappers.items()}
        yield _swaps(seen)
        yield _seconds(seen)
        written = CounterMetricFamily("hotslot_written_bytes", "Bytes that swaps have brought in.", labels=["slot"])
        loaded = GaugeMetricFamily("hotslot_adapters_loaded", "Adapters that are loaded.", labels=["slot"])
        host = GaugeMetricFamily("hotslot_host_bytes", "Host memory that loaded adapters hold.", labels=["slot"])
        recompilations = CounterMetricFamily(
            "hotslot_recompilations",
            "Compilations by dynamo, in all of this process, of frames that it had compiled before, since attach.",
            labels=["slot"],
        )
        for slot, metrics in seen.items():
            written.add_metric([slot], metrics.written_bytes)
            loaded.add_metric([slot], metrics.adapters)
            host.add_metric([slot], metrics.host_bytes)
            recompilations.add_metric([slot], metrics.recompilations)
        yield from (written, loaded, host, recompilations)


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
