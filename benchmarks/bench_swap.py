"""Times swaps of LoRA adapters: hotslot beside PEFT and beside a plain copy of the same bytes, in one process.

    scripts/bench swap [--json] [--plot swap.png]        or    python -m benchmarks.bench_swap

All contenders swap the same two adapters by turns, in an order drawn anew for each round; a row's time is the median
over the rounds. Before, and once more after, each contender's model is compared with a fresh PeftModel.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hotslot import HotslotError

from .command import Command
from .contenders import COLD, HOT, INSTEAD, WARM, Contender, contenders
from .llama import SIZES, Bench, Size, quiet
from .report import Row, draw, goals, render
from .running import by_turns, chosen_device, only_own_garbage, refuse_unknown, timed, torch_threads

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
    refuse_unknown(sizes, SIZES)
    chosen = chosen_device(device)
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch_threads(threads), quiet():
        for name in sizes:
            size = SIZES[name]
            progress(f"{name}: model and adapters of {size.tensors} tensors")
            bench = Bench(size, Path(folder), chosen)
            for factor in SLOT_FACTORS:
                progress(f"{name}: into slots of rank {size.rank * factor}")
                taking_part = contenders(bench, size.rank * factor)
                times = time_swaps(taking_part, rounds, chosen)
                rows += _rows(size, size.rank * factor, times)
    return rows


@dataclass(slots=True)
class Times:
    """Of one contender: the wall time and the process's CPU time of each swap, and its largest error."""

    wall_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    error: float = 0.0


def time_swaps(taking_part: Sequence[Contender], rounds: int, device: torch.device) -> dict[Contender, Times]:
    """Time each contender's swap to the adapter that is not live, by turns, between two checks of all of them."""
    times = {contender: Times() for contender in taking_part}
    with only_own_garbage():
        for contender in taking_part:
            for _ in range(2):  # to each of the adapters
                _checked_swap(contender, times[contender], device)
        for contender in by_turns(taking_part, rounds):
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
    taken = timed(lambda: contender.swap(other), device)
    twin.live = other
    return taken


def _checked_swap(contender: Contender, times: Times, device: torch.device) -> None:
    _swap(contender, device)
    times.error = max(times.error, contender.twin.error())
    if times.error == float("inf"):
        raise HotslotError(
            "A contender's outputs after a swap are not those of a fresh load: its times would mean nothing.",
            where=f"{contender.case}, {contender.name}",
        )


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


command = Command("swap", run, SIZES, DEFAULT_SIZES, DEFAULT_ROUNDS, render, draw, goals, columns=_TABLE_COLUMNS)


if __name__ == "__main__":
    command.main()
