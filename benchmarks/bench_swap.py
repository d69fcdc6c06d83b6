"""Times swaps of LoRA adapters: hotslot beside PEFT and beside a plain copy of the same bytes, in one process.

    scripts/bench swap [--json] [--plot swap.png]        or    python -m benchmarks.bench_swap

All contenders swap the same two adapters by turns, in an order drawn anew for each round; a row's time is the median
over the rounds. Before, and once more after, each contender's model is compared with a fresh PeftModel.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from rich.console import Console

from hotslot import HotslotError

from .contenders import COLD, HOT, INSTEAD, WARM, Contender, contenders
from .llama import SIZES, Bench, Size, quiet
from .report import Row, describe, document, draw, render

CASES = (COLD, INSTEAD, WARM, HOT)
DEFAULT_SIZES = ("9MB", "84MB")
DEFAULT_ROUNDS = 20
SLOT_FACTORS = (1, 4)  # slots of the adapters' own rank, and of four times that
_TABLE_COLUMNS = 160

Progress = Callable[[str], None]


def run(
    sizes: Sequence[str] = DEFAULT_SIZES,
    *,
    rounds: int = DEFAULT_ROUNDS,
    device: str | None = None,
    threads: int = 1,
    progress: Progress = lambda line: None,
) -> list[Row]:
    """Time all cases.

    Args:
        sizes: names in `SIZES`.
        rounds: timed swaps of each contender.
        device: "cpu" or "cuda"; by default a GPU if there is one.
        threads: of torch on the CPU. One, by default: on a machine that does other work, two threads of one copy wait
            for each other.
        progress: is told what is being done.

    Raises:
        HotslotError: there is no such size, or a contender's outputs are not those of a fresh PeftModel.
    """
    unknown = set(sizes) - SIZES.keys()
    if unknown:
        raise HotslotError("No such size.", found=", ".join(unknown), expected=f"of {', '.join(SIZES)}")
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = []
    with tempfile.TemporaryDirectory() as folder, _torch_threads(threads), quiet():
        for name in sizes:
            size = SIZES[name]
            progress(f"{name}: model and adapters of {size.tensors} tensors")
            bench = Bench(size, Path(folder), chosen)
            for factor in SLOT_FACTORS:
                progress(f"{name}: into slots of rank {size.rank * factor}")
                taking_part = contenders(bench, size.rank * factor)
                times = _time(taking_part, rounds, chosen)
                rows += _rows(size, size.rank * factor, times)
    return rows


@dataclass(slots=True)
class Times:
    """Of one contender: the wall time and the process's CPU time of each swap, and its largest error."""

    wall_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    error: float = 0.0


def _time(taking_part: Sequence[Contender], rounds: int, device: torch.device) -> dict[Contender, Times]:
    times = {contender: Times() for contender in taking_part}
    order, shuffled = Random(0), list(taking_part)
    with _only_own_garbage():
        for contender in taking_part:
            for _ in range(2):  # to each of the adapters
                _checked_swap(contender, times[contender], device)
        for _ in range(rounds):
            order.shuffle(shuffled)
            for contender in shuffled:
                wall, cpu = _swap(contender, device)
                times[contender].wall_seconds.append(wall)
                times[contender].cpu_seconds.append(cpu)
        for contender in taking_part:
            _checked_swap(contender, times[contender], device)
    return times


def _swap(contender: Contender, device: torch.device) -> tuple[float, float]:
    """Bring the adapter that is not live; (wall, CPU) seconds."""
    twin = contender.twin
    other = 1 - twin.live
    _synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    contender.swap(other)
    _synchronize(device)
    taken = time.perf_counter() - wall, time.process_time() - cpu
    twin.live = other
    return taken


def _checked_swap(contender: Contender, times: Times, device: torch.device) -> None:
    _swap(contender, device)
    times.error = max(times.error, contender.twin.error())
    if times.error == float("inf"):
        raise HotslotError(
            "A contender's outputs after a swap are not those of a fresh PeftModel: its times would mean nothing.",
            where=f"{contender.case}, {contender.name}",
        )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _only_own_garbage() -> Iterator[None]:
    """Garbage collection as usual, but not over the objects of all models that wait beside the one being swapped."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rows(size: Size, slot_rank: int, times: dict[Contender, Times]) -> list[Row]:
    ms = {contender: statistics.median(taken.wall_seconds) * 1e3 for contender, taken in times.items()}

    def measure(contender: Contender, kind: str) -> float:
        """The time of the first of this kind that does the same job."""
        case = COLD if contender.case == INSTEAD else contender.case
        return next(ms[other] for other in times if other.case == case and other.name.startswith(kind))

    rows = [
        Row(
            size=size.name,
            slot_rank=slot_rank,
            case=contender.case,
            contender=contender.name,
            ms=ms[contender],
            min_ms=min(taken.wall_seconds) * 1e3,
            cpu_ms=statistics.median(taken.cpu_seconds) * 1e3,
            times_peft=measure(contender, "PEFT") / ms[contender],
            percent_of_copy=100 * measure(contender, "plain") / ms[contender],
            nbytes=size.adapter_bytes,
            gigabytes_per_second=size.adapter_bytes / ms[contender] / 1e6,
            error=taken.error,
        )
        for contender, taken in times.items()
    ]
    return sorted(rows, key=lambda row: (CASES.index(row.case), row.contender.startswith("plain")))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of `python -m benchmarks.bench_swap`."""
    parser = argparse.ArgumentParser(prog="benchmarks.bench_swap", description="Time swaps of LoRA adapters.")
    parser.add_argument("--size", action="append", choices=SIZES, dest="sizes", help="may be repeated")
    parser.add_argument("--rounds", type=int, default=DEFAULT_ROUNDS, help="timed swaps of each contender")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument(
        "--json", action="store_true", dest="as_json", help="print one JSON document in place of the table"
    )
    parser.add_argument("--plot", type=Path, help="draw the table into this image file")
    command(**vars(parser.parse_args(arguments)))


def command(
    *,
    sizes: Sequence[str] | None = None,
    rounds: int = DEFAULT_ROUNDS,
    device: str | None = None,
    threads: int = 1,
    as_json: bool = False,
    plot: Path | None = None,
) -> None:
    """Run, and print the table or the JSON document on stdout; progress goes to stderr."""
    console = Console(stderr=True)
    with console.status("") as status:
        conditions = describe(device, threads=threads, rounds=rounds)
        rows = run(sizes or DEFAULT_SIZES, rounds=rounds, device=device, threads=threads, progress=status.update)
    if plot is not None:
        draw(rows, conditions, plot)
    if as_json:
        print(document(rows, conditions))
    else:
        # Piped, rich takes a terminal of 80 columns, and would cut the names.
        render(rows, conditions, Console(width=max(_TABLE_COLUMNS, Console().width)))


if __name__ == "__main__":
    main()
