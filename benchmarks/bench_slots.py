"""Times what slots cost a forward pass: neutral, filled, and filled with room to spare, beside the base model.

    scripts/bench slots [--json]        or    python -m benchmarks.bench_slots

All variants of one row are the same model with the same weights, eager or compiled with inductor. They run by turns, in
an order drawn anew for each round; a ratio is of medians over the rounds.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import hotslot
from hotslot import HotslotError

from .command import Command
from .llama import SIZES, Bench, quiet
from .running import by_turns, chosen_device, refuse_unknown, timed, torch_threads

DEFAULT_SIZES = ("small",)
DEFAULT_ROUNDS = 30
FACTORS = (1, 4)  # rank of the slots, in ranks of the adapter
BASE = "base, no slots"


@dataclass(frozen=True, slots=True)
class Row:
    """One variant's forward pass: its median, and what that is in medians of the base model of the same mode."""

    size: str
    mode: str
    tokens: int
    variant: str
    slot_rank: int
    ms: float
    min_ms: float
    times_base: float


def run(
    sizes: Sequence[str] = DEFAULT_SIZES,
    *,
    rounds: int = DEFAULT_ROUNDS,
    device: str | None = None,
    threads: int = 1,
    modes: Sequence[str] = ("eager", "compiled"),
    tokens: Sequence[int] = (1, 64),
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Time all variants.

    Raises:
        HotslotError: a variant's output is not what a fresh PeftModel, or the base, computes.
    """
    refuse_unknown(sizes, SIZES)
    chosen = chosen_device(device)
    with tempfile.TemporaryDirectory() as folder, torch_threads(threads), quiet(), torch.no_grad():
        benches = [Bench(SIZES[name], Path(folder), chosen) for name in sizes]
        rows: list[Row] = []
        for bench, mode, count in product(benches, modes, tokens):
            progress(f"{bench.size.name}, {mode}, {count} tokens")
            rows += _rows(bench, mode, count, rounds)
        return rows


def _rows(bench: Bench, mode: str, tokens: int, rounds: int) -> list[Row]:
    x = bench.inputs.expand(tokens, -1).contiguous()
    torch._dynamo.reset()  # it compiles one function eight times, and runs what is beyond in eager
    variants = _variants(bench)
    calls = {name: _callable(model, mode) for name, (model, _) in variants.items()}
    for name, call in calls.items():
        for _ in range(3):
            call(x)
        _check(bench, name, variants[name][0])
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name in by_turns(calls, rounds):
        times[name].append(timed(partial(calls[name], x), bench.device)[0])
    base = statistics.median(times[BASE])
    return [
        Row(
            size=bench.size.name,
            mode=mode,
            tokens=tokens,
            variant=name,
            slot_rank=variants[name][1],
            ms=statistics.median(taken) * 1e3,
            min_ms=min(taken) * 1e3,
            times_base=statistics.median(taken) / base,
        )
        for name, taken in times.items()
    ]


def _variants(bench: Bench) -> dict[str, tuple[nn.Module, int]]:
    """Name → model and the rank of its slots."""
    variants: dict[str, tuple[nn.Module, int]] = {BASE: (bench.base(), 0)}
    for factor in FACTORS:
        rank = bench.size.rank * factor
        for name in ("neutral slots", "active adapter"):
            model = bench.base()
            plan = hotslot.plan(model, [bench.folders[0]], max_rank=rank, dtype="base")
            swapper = hotslot.attach(model, {"0": bench.folders[0]}, plan=plan)
            if name == "active adapter":
                swapper.activate("0")
            variants[f"{name}, rank {rank}"] = model, rank
    return variants


def _callable(model: nn.Module, mode: str) -> Callable[[torch.Tensor], Any]:
    if mode == "eager":
        return model
    compiled: Callable[[torch.Tensor], Any] = torch.compile(model, dynamic=False, fullgraph=True)
    return compiled


def _check(bench: Bench, name: str, model: nn.Module) -> None:
    want = bench.expected[0] if name.startswith("active") else bench.output(bench.base())
    error = (bench.output(model).double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1)
    if not error <= (1e-4 if want.dtype == torch.float32 else 0.1):
        raise HotslotError("A variant's output is not what it should be: its times would mean nothing.", where=name)


def render(rows: Sequence[Row], conditions: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table("size", "mode", "tokens", "variant", "ms", "min ms", "× base")
    for row in rows:
        figures = f"{row.ms:.3f}", f"{row.min_ms:.3f}", f"{row.times_base:.2f}"
        table.add_row(row.size, row.mode, str(row.tokens), row.variant, *figures)
    console.print(table)


command = Command("slots", run, SIZES, DEFAULT_SIZES, DEFAULT_ROUNDS, render)


if __name__ == "__main__":
    command.main()
