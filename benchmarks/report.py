"""The swap benchmark's rows, and how they are told: a table, a JSON document, a plot, and which goals were met.

`python -m benchmarks.report FILE.json` prints a document as the Markdown of a report.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import hotslot

PLAIN_READ = "plain read into a kept buffer + copy"
PACKAGES = ("torch", "peft", "transformers", "safetensors", "numpy")


@dataclass(frozen=True, slots=True)
class Row:
    """One contender in one case.

    Attributes:
        size: name of the adapters' size.
        slot_rank: rank that the slots have room for.
        case: what is done.
        contender: who does it, and how.
        ms: median of the rounds.
        min_ms: the fastest round.
        cpu_ms: median of the CPU time of all threads. Where other work takes the cores away, compare this.
        times_peft: how many times faster than PEFT at the same case (than the first of PEFT's rows of it).
        percent_of_copy: how near to the plain copy of the same bytes by the same path; 100 is as fast.
        nbytes: of the adapter.
        gigabytes_per_second: adapter bytes over the median.
        error: largest difference of the outputs to a fresh PeftModel's, as a part of what a swap changes in them.
    """

    size: str
    slot_rank: int
    case: str
    contender: str
    ms: float
    min_ms: float
    cpu_ms: float
    times_peft: float
    percent_of_copy: float
    nbytes: int
    gigabytes_per_second: float
    error: float


@dataclass(frozen=True, slots=True)
class Goal:
    """What the project wants of a pair of rows, and what it has: a ratio of times.

    Attributes:
        text: which ratio.
        found: what was measured.
        wanted: at least so much; or at most, if `at_most`.
    """

    text: str
    found: float
    wanted: float
    at_most: bool = False

    def __str__(self) -> str:
        bound = "at most" if self.at_most else "at least"
        return f"{'met   ' if self.met else 'MISSED'} {self.text}: {self.found:.2f}, {bound} {self.wanted:g}"

    @property
    def met(self) -> bool:
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted


def goals(rows: Sequence[Row]) -> list[Goal]:
    """The goals for slots of the adapters' own rank, as far as their rows are there."""
    ms = {f"{row.size} {row.case.partition(':')[0]} {row.contender}": row.ms for row in reversed(rows)}
    drop_in, activate = "cold hotslot hotswap_adapter", "warm hotslot Swapper.activate"
    packed = "cold hotslot Swapper.load + activate, packed"
    theirs, read, copy = "cold PEFT hotswap_adapter", f"cold {PLAIN_READ}", "warm plain copy"
    wanted = [
        ("9MB", "drop-in cold, times faster than PEFT's", theirs, drop_in, 5.0),
        ("9MB", "warm activate, times faster than PEFT's hotswap_adapter", theirs, activate, 20.0),
        ("9MB", "warm activate, part of the plain copy's speed", copy, activate, 0.5),
        ("9MB", "the same of exclusive slots, part of the plain copy's speed", copy, f"{activate}, exclusive", 0.5),
        ("9MB", "cold from a packed file, times faster than PEFT's hotswap_adapter", theirs, packed, 15.0),
        ("9MB", "cold from a packed file, part of plain read + copy's speed", read, packed, 1 / 3),
        ("9MB", "the same into exclusive slots, times faster than PEFT's", theirs, f"{packed}, exclusive", 15.0),
        ("84MB", "drop-in cold, part of plain read + copy's speed", read, drop_in, 0.5),
        ("84MB", "warm activate, part of the plain copy's speed", copy, activate, 0.5),
    ]
    return [
        Goal(f"{size}: {text}", ms[f"{size} {peer}"] / ms[f"{size} {ours}"], least)
        for size, text, peer, ours, least in wanted
        if f"{size} {peer}" in ms and f"{size} {ours}" in ms
    ]


def describe(device: str | None, **settings: Any) -> dict[str, Any]:
    """Where and how the rows were made: all that a reader needs to make them again."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    hardware: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
    }
    versions = {"python": platform.python_version(), "hotslot": hotslot.__version__}
    return {
        "benchmark": "swap",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "hardware": hardware,
        "versions": versions | {package: version(package) for package in PACKAGES},
        "settings": settings,
    }


def render(rows: Sequence[Row], conditions: dict[str, Any], console: Console) -> None:
    """Print the table, the goals, and where it was made."""
    table = Table(title="Swaps of LoRA adapters", title_justify="left")
    for heading in ("case", "contender"):
        table.add_column(heading, no_wrap=True)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for (size, slot_rank, case), group in groupby(rows, key=_panel):
        label = f"{size}, slots of rank {slot_rank}\n{case}"
        for row in group:
            table.add_row(label, *_cells(row))
            label = ""
        table.add_section()
    console.print(table)
    for goal in goals(rows):
        console.print(goal)
    hardware = conditions["hardware"]
    console.print(", ".join(f"{key} {value}" for key, value in (hardware | conditions["versions"]).items()))
    console.print(f"{conditions['date']}: {conditions['command']}")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.contender,
        f"{row.ms:.2f}",
        f"{row.min_ms:.2f}",
        f"{row.cpu_ms:.2f}",
        f"{row.times_peft:.2f}",
        f"{row.percent_of_copy:.0f}",
        f"{row.nbytes:,}",
        f"{row.gigabytes_per_second:.2f}",
        "equal" if row.error == 0 else f"±{row.error:.0e}",
    )


def markdown(told: dict[str, Any]) -> str:
    """A JSON document as the text of a report."""
    rows = [Row(**row) for row in told["rows"]]
    lines = [f"# Swaps: {told['hardware']['device']}, {told['date']}", "", f"`{told['command']}`", ""]
    for part in ("hardware", "versions", "settings"):
        lines.append(f"- {part}: " + ", ".join(f"{key} {value}" for key, value in told[part].items()))
    lines += ["", "| goal | found | wanted | |", "|---|---:|---:|---|"]
    for goal in told["goals"]:
        verdict = "met" if goal["met"] else "**missed**"
        lines.append(f"| {goal['text']} | {goal['found']:.2f} | {goal['wanted']:g} | {verdict} |")
    for (size, slot_rank, case), group in groupby(rows, key=_panel):
        lines += ["", f"## {size}, slots of rank {slot_rank} – {case}", ""]
        lines += ["| contender | " + " | ".join(_HEADINGS).replace("\n", " ") + " |", "|---" + "|---:" * 8 + "|"]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in group]
    return "\n".join(lines)


_HEADINGS = ("ms", "min", "CPU ms", "× PEFT", "% of a\nplain copy", "bytes", "GB/s", "outputs")


def _panel(row: Row) -> tuple[str, int, str]:
    return row.size, row.slot_rank, row.case


def draw(rows: Sequence[Row], conditions: dict[str, Any], path: Path) -> None:
    """Write the medians as bars on a logarithmic axis: a column of panels for each size, one panel for each case."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    sizes = list(dict.fromkeys(row.size for row in rows))
    ranks = sorted({row.slot_rank for row in rows})
    cases = [(rank, case) for rank in ranks for case in dict.fromkeys(r.case for r in rows if r.slot_rank == rank)]
    heights = [1 + max(sum((r.size, r.slot_rank, r.case) == (s, *c) for r in rows) for s in sizes) for c in cases]
    figure, panels = plt.subplots(
        len(cases), len(sizes), figsize=(4 + 6 * len(sizes), 1 + 0.3 * sum(heights)), height_ratios=heights,
        sharex="col", sharey="row", squeeze=False, layout="constrained",
    )  # fmt: skip
    for i, (slot_rank, case) in enumerate(cases):
        for j, size in enumerate(sizes):
            group = [row for row in rows if (row.size, row.slot_rank, row.case) == (size, slot_rank, case)]
            panels[i, j].set_title(f"{size}, slots of rank {slot_rank} – {case}", loc="left", fontsize=9)
            _bars(panels[i, j], group)
        panels[i, 0].invert_yaxis()
    hardware, versions = conditions["hardware"], conditions["versions"]
    place = hardware["cpu"] if hardware["device"] == "cpu" else hardware["device"]
    figure.supxlabel(
        f"milliseconds, median – {place}, torch {versions['torch']}, peft {versions['peft']}, {conditions['date']}"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


_COLOURS = {"hotslot": "tab:blue", "PEFT": "tab:gray", "diffusers": "tab:gray", "plain": "tab:green"}


def _bars(panel: Any, group: Sequence[Row]) -> None:
    names = [row.contender for row in group]
    bars = panel.barh(names, [row.ms for row in group], color=[_COLOURS[name.split()[0]] for name in names])
    panel.bar_label(bars, [f" {row.ms:.2f} ms, {row.times_peft:.1f} × PEFT" for row in group], fontsize=8)
    panel.set_xscale("log")
    panel.margins(x=0.3)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def bars(panels: Mapping[str, Sequence[tuple[str, float, str]]], caption: str, path: Path) -> None:
    """Write an image of one panel for each title, one below the other: who, milliseconds, and a note."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    heights = [1 + len(rows) for rows in panels.values()]
    figure, axes = plt.subplots(
        len(panels), figsize=(11, 1 + 0.3 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, (title, rows) in zip(axes[:, 0], panels.items(), strict=True):
        names, ms, notes = zip(*rows, strict=True)
        drawn = axis.barh(names, ms, color=[_COLOURS[name.split()[0].strip(",")] for name in names])
        axis.bar_label(drawn, [f" {time:.2f} ms, {note}" for time, note in zip(ms, notes, strict=True)], fontsize=8)
        axis.set_title(title, loc="left", fontsize=9)
        axis.margins(x=0.3)
        axis.tick_params(labelsize=8)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(caption, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def place(conditions: dict[str, Any]) -> str:
    """Where and when, in one line."""
    hardware, versions, settings = (conditions[part] for part in ("hardware", "versions", "settings"))
    where = hardware["cpu"] if hardware["device"] == "cpu" else hardware["device"]
    told = ", ".join(f"{key} {value}" for key, value in settings.items())
    return (
        f"{where}, {hardware['cores']} cores, load {hardware['load_average']}; {told}; torch {versions['torch']}, "
        f"peft {versions['peft']}, {conditions['date']}"
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
