"""Swaps under load: how many forward passes see parts of two adapters, and what keeping them whole costs.

    scripts/bench concurrency [--json]        or    python -m benchmarks.bench_concurrency

Four threads run forward passes. First without swaps, on a guarded and an unguarded model by turns; then while a fifth
thread swaps two adapters: by PEFT, by hotslot without waiting, and by hotslot with the model guarded. An output is
whole if it is bit for bit that of one of the two adapters, on the same model at rest.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.utils import hotswap as peft_hotswap
from rich.console import Console
from rich.table import Table
from torch import nn

import hotslot
from hotslot import HotslotError

from .command import Command
from .contenders import _hotswap_from_state_dict, _state_dicts
from .llama import ADAPTER_NAME, SIZES, Bench, quiet
from .running import chosen_device, refuse_unknown, torch_threads

DEFAULT_SIZES = ("tiny", "9MB")
DEFAULT_ROUNDS = 20
FORWARD_THREADS = 4
SECONDS = 0.5  # of each round
NAMES = ("first", "second")


@dataclass(frozen=True, slots=True)
class Row:
    """One way to swap under load.

    Attributes:
        size: name of the adapters' size.
        way: who swaps, and how.
        forwards: outputs that were looked at.
        torn_percent: of them, that are neither adapter's.
        swaps_per_second, forwards_per_second: of all threads together.
    """

    size: str
    way: str
    forwards: int
    torn_percent: float
    swaps_per_second: float
    forwards_per_second: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What a guard costs where nothing swaps.

    Attributes:
        size: name of the adapters' size.
        percent_of_unguarded: guarded throughput of four threads; the median over pairs of rounds side by side.
        forwards_per_second: unguarded, the median.
        goal_percent: at least.
    """

    size: str
    percent_of_unguarded: float
    forwards_per_second: float
    goal_percent: float = 90.0


def run(
    sizes: Sequence[str] = DEFAULT_SIZES,
    *,
    rounds: int = DEFAULT_ROUNDS,
    seconds: float = SECONDS,
    device: str | None = None,
    threads: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[list[Cost], list[Row]]:
    """Measure all sizes.

    Raises:
        HotslotError: there is no such size, or a guarded forward pass was torn.
    """
    refuse_unknown(sizes, SIZES)
    chosen = chosen_device(device)
    costs, rows = [], []
    with tempfile.TemporaryDirectory() as folder, torch_threads(threads), quiet():
        for size in sizes:
            bench = Bench(SIZES[size], Path(folder), chosen)
            progress(f"{size}: what a guard costs")
            costs.append(_cost(bench, rounds, seconds))
            for way, make in WAYS.items():
                progress(f"{size}: {way}")
                rows.append(_under_load(bench, way, make, rounds, seconds))
    torn = [row for row in rows if row.way == GUARDED and row.torn_percent]
    if torn:
        raise HotslotError("A guarded forward pass saw parts of two adapters.", where=torn[0].size, found=torn[0])
    return costs, rows


def _attached(bench: Bench) -> tuple[nn.Module, hotslot.Swapper]:
    model = bench.peft_model(0)
    folders = dict(zip(NAMES, map(str, bench.folders), strict=True))
    return model, hotslot.attach(model, folders, adapter_name=ADAPTER_NAME)


def _cost(bench: Bench, rounds: int, seconds: float) -> Cost:
    unguarded, _ = _attached(bench)
    guarded, swapper = _attached(bench)
    swapper.guard()
    counts: dict[nn.Module, list[float]] = {guarded: [], unguarded: []}
    for i in range(rounds):
        for model in (guarded, unguarded)[:: 1 if i % 2 else -1]:
            with _forwards(partial(bench.output, model), keep=False) as outputs:
                time.sleep(seconds)
            counts[model].append(outputs.rate)
    ratios = [100 * with_it / without for with_it, without in zip(*counts.values(), strict=True)]
    return Cost(bench.size.name, statistics.median(ratios), statistics.median(counts[unguarded]))


class Outputs:
    """What the threads of `_forwards` have put out, and how many a second."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []
        self.rate = 0.0


@contextmanager
def _forwards(forward: Callable[[], torch.Tensor], *, keep: bool) -> Iterator[Outputs]:
    """Four threads that run forward passes for the time of the block."""
    stop, outputs = threading.Event(), Outputs()

    def loop() -> int:
        count = 0
        while not stop.is_set():
            output = forward()
            count += 1
            if keep:
                outputs.found.append(output)
        return count

    with ThreadPoolExecutor(FORWARD_THREADS) as pool:
        started = time.perf_counter()
        running = [pool.submit(loop) for _ in range(FORWARD_THREADS)]
        try:
            yield outputs
        finally:
            stop.set()
        outputs.rate = sum(future.result() for future in running) / (time.perf_counter() - started)


Way = tuple[nn.Module, Callable[[int], object]]


def _peft(bench: Bench) -> Way:
    model, loaded = bench.peft_model(0), _state_dicts(bench, "cpu")
    return model, partial(_hotswap_from_state_dict, peft_hotswap.hotswap_adapter_from_state_dict, model, loaded)


def _now(bench: Bench) -> Way:
    model, swapper = _attached(bench)
    return model, lambda adapter: swapper.activate(NAMES[adapter], in_flight="now")


def _guarded(bench: Bench) -> Way:
    model, swapper = _attached(bench)
    swapper.guard()
    return model, lambda adapter: swapper.activate(NAMES[adapter])


GUARDED = "hotslot, guarded"
WAYS: dict[str, Callable[[Bench], Way]] = {
    "PEFT hotswap_adapter_from_state_dict": _peft,
    'hotslot, in_flight="now"': _now,
    GUARDED: _guarded,
}


def _under_load(bench: Bench, way: str, make: Callable[[Bench], Way], rounds: int, seconds: float) -> Row:
    model, swap = make(bench)
    whole = []
    for adapter in (1, 0):
        swap(adapter)
        whole.append(bench.output(model))
    swaps, started = 0, time.perf_counter()
    with _forwards(partial(bench.output, model), keep=True) as outputs:
        while time.perf_counter() - started < rounds * seconds / 4:
            swaps += 1
            swap(swaps % 2)
        taken = time.perf_counter() - started
    torn = sum(not any(torch.equal(output, one) for one in whole) for output in outputs.found)
    percent = 100 * torn / max(1, len(outputs.found))
    return Row(bench.size.name, way, len(outputs.found), percent, swaps / taken, outputs.rate)


def told(found: tuple[list[Cost], list[Row]]) -> dict[str, Any]:
    """What the JSON document says of what was found."""
    costs, rows = found
    return {"costs": list(map(asdict, costs)), "rows": list(map(asdict, rows))}


def render(found: tuple[list[Cost], list[Row]], conditions: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    costs, rows = found
    table = Table(title=f"{FORWARD_THREADS} threads of forward passes while another swaps", title_justify="left")
    for heading in ("size", "way", "outputs", "torn", "swaps/s", "forwards/s"):
        table.add_column(heading, justify="left" if heading in ("size", "way") else "right")
    for row in rows:
        rates = f"{row.swaps_per_second:.0f}", f"{row.forwards_per_second:.0f}"
        table.add_row(row.size, row.way, str(row.forwards), f"{row.torn_percent:.1f} %", *rates)
    console.print(table)
    for cost in costs:
        console.print(
            f"{cost.size}: guarded throughput without swaps is {cost.percent_of_unguarded:.1f} % of unguarded "
            f"({cost.forwards_per_second:.0f} forwards/s); goal {cost.goal_percent:.0f} %"
        )


command = Command("concurrency", run, SIZES, DEFAULT_SIZES, DEFAULT_ROUNDS, render, told=told, columns=100)


if __name__ == "__main__":
    command.main()
