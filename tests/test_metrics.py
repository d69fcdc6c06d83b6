"""What a swapper says of its own work: counts, Prometheus's text, log records."""

from __future__ import annotations

import gc
import itertools
import logging
import math
import os
import signal
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from threading import Event, Semaphore, Thread
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode

import hotslot
from adapters import make_adapter
from compiling import Backend
from hotslot.checkpoint import read
from hotslot.errors import MergedError, UnknownAdapterError
from hotslot.metrics import BOUNDS
from zoo import ZOO

MLP = ZOO["mlp"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("metrics")
    return {
        name: make_adapter(place / name, MLP, seed=i, r=4, target_modules=["up"]) for i, name in enumerate(["a", "b"])
    }


@pytest.fixture
def model(folders: dict[str, Path]) -> Any:
    return PeftModel.from_pretrained(MLP.build(), folders["a"]).eval()


@pytest.fixture
def swapper(model: Any, folders: dict[str, Path]) -> hotslot.Swapper:
    return hotslot.attach(model, folders)


def swap_all_ways(model: Any, swapper: hotslot.Swapper) -> list[hotslot.SwapReport]:
    """Six swaps that change something, two that do not, two that fail. Returns the reports that the user gets."""
    reports = [swapper.activate("a"), swapper.activate("a"), swapper.activate("b")]
    with swapper.lease(), pytest.raises(hotslot.errors.ModelError):
        swapper.activate("a")  # refused before it begins
    with pytest.raises(UnknownAdapterError):
        swapper.activate("c")
    model.merge_adapter()
    for _ in range(2):
        with pytest.raises(MergedError):
            swapper.activate("a")
    model.unmerge_adapter()
    reports.append(swapper.deactivate())
    with swapper.using("b") as report:  # two swaps
        reports.append(report)
    reports += [swapper.rollback(), swapper.activate("b")]
    return reports


def test_counts_are_those_of_the_reports(model: Any, swapper: hotslot.Swapper) -> None:
    nothing = swapper.metrics()
    assert (nothing.changed, nothing.unchanged, nothing.failed, nothing.written_bytes) == (0, 0, 0, 0)
    assert not nothing.latency
    reports = swap_all_ways(model, swapper)
    metrics = swapper.metrics()
    changed = [report for report in reports if report.changed]
    assert (metrics.changed, metrics.unchanged, metrics.failed) == (len(changed) + 1, len(reports) - len(changed), 2)
    assert metrics.unchanged == 2
    assert metrics.written_bytes == sum(report.nbytes for report in reports)
    assert (metrics.slot, metrics.adapters, metrics.host_bytes) == ("default", 2, swapper.host_bytes)
    seconds = [report.seconds for report in changed if report.tier == "host"]
    histogram = metrics.latency["host"]
    assert histogram.count == len(seconds)
    assert histogram.sum_seconds == pytest.approx(sum(seconds))
    assert histogram.cumulative[:-1] == tuple(sum(second <= bound for second in seconds) for bound in BOUNDS)
    assert nothing.changed == 0  # a Metrics is of one moment
    swapper.detach()
    assert (swapper.metrics().changed, swapper.metrics().adapters) == (metrics.changed, 0)


@dataclass
class Plain:
    """What must have happened, without any of hotslot's code: names in memory, the least recently used first."""

    room: int
    memory: list[str]
    live: str | None = None
    previous: str | None = None
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    unchanged: int = 0
    failed: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    written_bytes: int = 0

    def need(self, name: str) -> str:
        """Returns the tier that a swap to it would be from."""
        if name in self.memory:
            self.hits += 1
            self.memory.remove(name)
            self.memory.append(name)
            return "host"
        self.misses += 1
        lacking, stayed = len(self.memory) + 1 - self.room, []
        for other in list(self.memory):
            if lacking <= 0:
                break
            self.memory.remove(other)
            if other in (self.live, self.previous):
                stayed.append(other)
            else:
                lacking -= 1
                self.evictions += 1
        self.memory += [*stayed, name]
        return "disk"

    def swapped(self, report: hotslot.SwapReport, to: str | None, tier: str, nbytes: int) -> None:
        changes = to != self.live
        assert (report.changed, report.adapter, report.previous) == (changes, to, self.live)
        assert (report.tier, report.nbytes) == ((tier, nbytes) if changes else ("none", 0))
        if not changes:
            self.unchanged += 1
            return
        self.live, self.previous = to, self.live
        self.written_bytes += nbytes
        self.seconds.setdefault(tier, []).append(report.seconds)

    def agrees_with(self, metrics: hotslot.Metrics) -> None:
        counts = ("hits", "misses", "evictions", "unchanged", "failed", "written_bytes")
        assert {name: getattr(metrics, name) for name in counts} == {name: getattr(self, name) for name in counts}
        assert metrics.host_adapters == len(self.memory)
        assert metrics.changed == sum(map(len, self.seconds.values()))
        assert metrics.latency.keys() == self.seconds.keys()
        for tier, seconds in self.seconds.items():
            assert metrics.latency[tier].sum_seconds == pytest.approx(sum(seconds))
            bounds = (*BOUNDS, math.inf)
            assert metrics.latency[tier].cumulative == tuple(sum(one <= bound for one in seconds) for bound in bounds)


class Failing(TorchDispatchMode):
    """Breaks off once, at the first tensor operation."""

    failed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.failed:
            self.failed = True
            raise ZeroDivisionError
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
def test_counts_are_those_of_a_plain_model(packed: bool, tmp_path: Path) -> None:
    """Random operations on seven adapters with room for four."""
    random, names = Random(0), "abcdefg"
    for seed, name in enumerate(names):
        make_adapter(tmp_path / "all" / name, MLP, seed=seed, r=4, target_modules=["up"])
    (nbytes,) = {read(tmp_path / "all" / name).nbytes for name in names}
    cache = hotslot.Cache(host_bytes=5 * nbytes - 1, disk_bytes=1 << 20 if packed else 0, folder=tmp_path / "packed")
    model = MLP.build()
    swapper = hotslot.attach(model, tmp_path / "all", cache=cache)
    plain = Plain(4, [name for name in names if swapper._library.peek(name) is not None])  # one of the family was read
    for _ in range(300):
        name = random.choice(names)
        match random.choice(["activate"] * 5 + ["deactivate", "rollback", "prefetch", "evict", "know", "fail"]):
            case "activate":
                tier = plain.need(name)
                plain.swapped(swapper.activate(name), name, tier, nbytes)
            case "deactivate":
                plain.swapped(swapper.deactivate(), None, "none", 0)
            case "rollback" if plain.seconds:
                to = plain.previous
                plain.swapped(swapper.rollback(), to, "host" if to else "none", nbytes if to else 0)
            case "prefetch":
                plain.need(name)
                assert swapper.prefetch(name).result() == "host"
            case "evict" if name not in (plain.live, plain.previous):
                assert swapper.evict(name) == (name in plain.memory)
                if name in plain.memory:
                    plain.memory.remove(name)
                    plain.evictions += 1
            case "know" if name not in (plain.live, plain.previous):
                swapper.load(name, tmp_path / "all" / name, lazy=True)
                if name in plain.memory:
                    plain.memory.remove(name)
            case "fail" if name in plain.memory and name != plain.live:
                plain.need(name)
                with pytest.raises(ZeroDivisionError), Failing():
                    swapper.activate(name)
                plain.failed += 1
        swapper._library.finish_packing()  # what is being packed stays in memory meanwhile
        plain.agrees_with(swapper.metrics())
        assert swapper.metrics().host_bytes == len(plain.memory) * nbytes
    assert all(getattr(plain, count) > 5 for count in ("hits", "misses", "evictions", "unchanged", "failed"))
    assert plain.seconds.keys() == {"host", "disk", "none"}


def test_a_scrape_waits_for_no_swap_and_a_swap_for_no_scrape(swapper: hotslot.Swapper) -> None:
    prometheus_client = pytest.importorskip("prometheus_client")
    from hotslot.integrations.prometheus import Collector

    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector(swapper))
    texts: list[str] = []

    class Scraped(TorchDispatchMode):
        """Another process asks in the middle of the swap."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asking = Thread(target=lambda: texts.append(prometheus_client.generate_latest(registry).decode()))
            asking.start()
            asking.join(timeout=10)
            assert not asking.is_alive()
            return func(*args, **(kwargs or {}))

    with Scraped():
        swapper.activate("a")
    assert texts
    assert all('outcome="changed"' not in text for text in texts), "the swap is counted when it is done"
    assert 'outcome="changed"' in prometheus_client.generate_latest(registry).decode()


class Watched:
    """A lock that knows how many have come to it."""

    def __init__(self, lock: Any) -> None:
        self.lock, self.came = lock, Semaphore(0)

    def __enter__(self) -> None:
        self.came.release()
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def test_who_waits_for_another_who_reads_has_not_hit_it(swapper: hotslot.Swapper) -> None:
    swapper.evict("b")
    reading: Any = swapper._library._reading
    swapper._library._reading = watched = Watched(reading)  # type: ignore[assignment]
    with ThreadPoolExecutor(2) as threads:
        with reading:
            both = [threads.submit(swapper.activate, "b") for _ in range(2)]
            for _ in both:
                watched.came.acquire()
        reports = [each.result() for each in both]
    assert sorted(report.tier for report in reports) == ["disk", "none"]
    assert (swapper.metrics().hits, swapper.metrics().misses) == (0, 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_fork_amid_a_scrape_leaves_no_lock_taken(folders: dict[str, Path]) -> None:
    """As a server's workers do, that are forked while the parent's metrics are read."""
    model = MLP.build()
    swapper = hotslot.attach(model, folders)
    stop = Event()

    def scrape() -> None:
        while not stop.is_set():
            swapper.metrics()

    with ThreadPoolExecutor(3) as threads:
        scraping = [threads.submit(scrape) for _ in range(3)]
        try:
            for _ in range(12):
                child = os.fork()
                if not child:
                    signal.alarm(20)
                    with suppress(BaseException):
                        swapper.activate("a")
                        os._exit(swapper.metrics().changed - 1)
                    os._exit(1)
                assert os.waitpid(child, 0)[1] == 0
        finally:
            stop.set()
        for each in scraping:
            each.result()


def test_many_scrapes_beside_blends_and_loads(folders: dict[str, Path]) -> None:
    model = MLP.build()
    swapper = hotslot.attach(model, folders, plan=hotslot.plan(model, folders))
    stop, seen = Event(), list[hotslot.Metrics]()

    def scrape() -> None:
        while not stop.is_set():
            seen.append(swapper.metrics())

    with ThreadPoolExecutor(2) as threads:
        scraping = [threads.submit(scrape) for _ in range(2)]
        written = 0
        for i in range(200):
            written += swapper.activate({"a": 1.0, "b": i % 7}).nbytes
            swapper.load("c", folders["a"])
        stop.set()
        for each in scraping:
            each.result()
    assert all(2 <= metrics.host_adapters <= 3 for metrics in seen)
    assert all((metrics.changed == 0) == (metrics.written_bytes == 0) for metrics in seen)
    assert (swapper.metrics().changed, swapper.metrics().written_bytes) == (200, written)


def test_a_swapper_that_was_detached_keeps_its_counts_and_nothing_else(folders: dict[str, Path]) -> None:
    prometheus_client = pytest.importorskip("prometheus_client")
    from hotslot.integrations.prometheus import Collector

    registry, model = prometheus_client.CollectorRegistry(), MLP.build()
    swapper = hotslot.attach(model, folders)
    registry.register(Collector(swapper))
    swapper.activate("a")
    entry = swapper.engine.live.entry
    assert entry is not None
    held = [weakref.ref(each) for each in (*model.parameters(), *model.modules(), entry, swapper.engine.binding.memory)]
    swapper.detach()
    del model, entry
    gc.collect()
    assert [each() for each in held if each() is not None] == []
    assert (swapper.active, swapper.version, swapper.generation) == (None, None, 2)
    assert 'outcome="changed",slot="default",tier="host"} 1.0' in prometheus_client.generate_latest(registry).decode()
    with pytest.raises(hotslot.errors.ModelError, match="detached"):
        swapper.activate("a")


def test_swaps_by_pefts_functions_are_counted_and_told(
    model: Any, swapper: hotslot.Swapper, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    told: list[hotslot.SwapReport] = []
    swapper.on_swap(told.append)
    with caplog.at_level(logging.DEBUG, logger="hotslot.swapper"):
        hotslot.hotswap_adapter(model, str(folders["b"]), "default")
    assert [report.version for report in told] == [swapper.version] == [read(folders["b"]).version]
    assert [record.version for record in caplog.records] == [swapper.version]
    metrics = swapper.metrics()
    assert (metrics.changed, metrics.written_bytes) == (1, told[0].nbytes)


def test_bounds_are_one_two_five() -> None:
    assert BOUNDS[:4] == (1e-5, 2e-5, 5e-5, 1e-4)
    assert BOUNDS[-2:] == (5.0, 10.0)
    assert all(2 <= round(b / a, 6) <= 2.5 for a, b in itertools.pairwise(BOUNDS))


def test_recompilations_are_dynamos(model: Any, swapper: hotslot.Swapper) -> None:
    """First compilations do not count, swaps cause none; another shape, the control, causes some."""
    torch._dynamo.reset()
    compiled, inputs = torch.compile(model, backend=Backend(), dynamic=False), MLP.inputs()
    MLP.output(compiled, inputs)
    swapper.activate("b")
    MLP.output(compiled, inputs)
    assert swapper.metrics().recompilations == 0
    backend = Backend()
    compiled = torch.compile(lambda x: x + 1, backend=backend, dynamic=False)
    for size in (2, 3, 4):
        compiled(torch.ones(size))
    assert backend.graphs == 3
    assert swapper.metrics().recompilations == 2


def test_recompilations_begin_anew_with_dynamo(swapper: hotslot.Swapper) -> None:
    """Reset, its numbers grow from 0 beyond those that it had before attach, which are subtracted no more."""
    recompile(3)
    swapper = hotslot.attach(MLP.build(), {}, plan=swapper.plan)
    assert swapper.metrics().recompilations == 0
    torch._dynamo.reset()
    seen = []
    for _ in range(2):
        recompile(2)
        seen.append(swapper.metrics().recompilations)
    assert seen == [2, 5]  # the second time the first size, too, is compiled for a frame that is known


def recompile(times: int) -> None:
    compiled = torch.compile(lambda x: x + 1, backend=Backend(), dynamic=False)
    for size in range(times + 1):
        compiled(torch.ones(2 + size))


def test_prometheus_reads_the_same(model: Any, swapper: hotslot.Swapper, folders: dict[str, Path]) -> None:
    prometheus_client = pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    from hotslot.integrations.prometheus import Collector

    other = hotslot.attach(MLP.build(), {"a": folders["a"]})
    registry = prometheus_client.CollectorRegistry(auto_describe=True)
    registry.register(Collector({"first": swapper, "second": other}))
    swap_all_ways(model, swapper)
    families = list(text_string_to_metric_families(prometheus_client.generate_latest(registry).decode()))
    got = {
        (sample.name, *sorted(sample.labels.items())): sample.value for family in families for sample in family.samples
    }
    metrics = {"first": swapper.metrics(), "second": other.metrics()}
    assert got == dict(itertools.chain.from_iterable(expected(slot, each) for slot, each in metrics.items()))
    assert {family.name: family.type for family in families} == {
        "hotslot_swaps": "counter",
        "hotslot_swap_seconds": "histogram",
        "hotslot_written_bytes": "counter",
        "hotslot_lookups": "counter",
        "hotslot_evictions": "counter",
        "hotslot_adapters": "gauge",
        "hotslot_bytes": "gauge",
        "hotslot_recompilations": "counter",
    }
    assert next(iter(Collector(other).collect())).samples[0].labels["slot"] == "default"


def test_swappers_come_and_go_at_a_collector(swapper: hotslot.Swapper, folders: dict[str, Path]) -> None:
    prometheus_client = pytest.importorskip("prometheus_client")
    from hotslot.cli.top.readings import parse
    from hotslot.integrations.prometheus import Collector

    served = {"first": swapper}
    registries = [prometheus_client.CollectorRegistry(auto_describe=True) for _ in range(2)]
    collector = Collector(served)
    for registry in registries:
        registry.register(collector)
    odd = 'a"b\\c\nd{e}#f=,g é'
    served[odd] = hotslot.attach(MLP.build(), {"a": folders["a"]})
    served[odd].activate("a")
    texts = {prometheus_client.generate_latest(registry).decode() for registry in registries}
    assert len(texts) == 1
    _, slots = parse(texts.pop(), url="here")
    assert slots.keys() == {"first", odd}
    assert slots[odd].written_bytes == served[odd].metrics().written_bytes > 0
    del served["first"]
    assert "first" not in prometheus_client.generate_latest(registries[0]).decode()


def expected(slot: str, metrics: hotslot.Metrics) -> Iterator[tuple[tuple[Any, ...], float]]:
    label = ("slot", slot)
    swaps = {("changed", tier): histogram.count for tier, histogram in metrics.latency.items()}
    swaps |= {("unchanged", "none"): metrics.unchanged, ("failed", "none"): metrics.failed}
    for (outcome, tier), count in swaps.items():
        yield ("hotslot_swaps_total", ("outcome", outcome), label, ("tier", tier)), count
    for tier, histogram in metrics.latency.items():
        place = (label, ("tier", tier))
        for bound, count in zip([*map(str, BOUNDS), "+Inf"], histogram.cumulative, strict=True):
            yield ("hotslot_swap_seconds_bucket", ("le", bound), *place), count
        yield ("hotslot_swap_seconds_count", *place), histogram.count
        yield ("hotslot_swap_seconds_sum", *place), histogram.sum_seconds
    yield ("hotslot_written_bytes_total", label), metrics.written_bytes
    yield ("hotslot_lookups_total", ("outcome", "hit"), label), metrics.hits
    yield ("hotslot_lookups_total", ("outcome", "miss"), label), metrics.misses
    yield ("hotslot_evictions_total", label), metrics.evictions
    yield ("hotslot_adapters", ("place", "known"), label), metrics.adapters
    yield ("hotslot_adapters", ("place", "host"), label), metrics.host_adapters
    yield ("hotslot_bytes", label, ("tier", "host")), metrics.host_bytes
    yield ("hotslot_bytes", label, ("tier", "device")), metrics.device_bytes
    yield ("hotslot_recompilations_total", label), metrics.recompilations


def test_who_asks_is_told_of_each_swap_that_changed_something(
    model: Any, swapper: hotslot.Swapper, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[hotslot.SwapReport] = []
    stale: list[str | None] = []

    def invalidate(report: hotslot.SwapReport) -> None:
        told.append(report)
        stale.append(swapper.version)  # what is live when it is called

    def fail(report: hotslot.SwapReport) -> None:
        raise RuntimeError("a user's mistake")

    take_back = swapper.on_swap(invalidate)
    swapper.on_swap(fail)
    reports = swap_all_ways(model, swapper)
    changed = [report for report in reports if report.changed]
    assert [report for report in told if report in reports] == changed
    assert len(told) == len(changed) + 1, "a block of using is two swaps"
    assert stale == [report.version for report in told]
    assert sum("a user's mistake" in (record.exc_text or "") for record in caplog.records) == len(told)
    take_back()
    take_back()
    swapper.deactivate()
    assert len(told) == len(changed) + 1


def test_a_log_record_for_each_swap(swapper: hotslot.Swapper, caplog: pytest.LogCaptureFixture) -> None:
    swapper.activate("a")
    assert not caplog.records  # below WARNING, where nobody asks
    with caplog.at_level(logging.DEBUG, logger="hotslot.swapper"):
        reports = [swapper.activate("b"), swapper.activate("b"), swapper.deactivate()]
    fields = ("adapter", "version", "tier", "bytes", "seconds", "changed")
    assert [tuple(getattr(record, field) for field in fields) for record in caplog.records] == [
        (report.adapter, report.version, report.tier, report.nbytes, report.seconds, report.changed)
        for report in reports
    ]
