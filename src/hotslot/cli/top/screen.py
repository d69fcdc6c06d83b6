"""A View as rich shows it: a block for each slot, beside each other where the terminal is wide enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...errors import HotslotError
from ...metrics import BOUNDS
from ..terminal import add_row, new_table, printable
from .readings import Activity, Latency, SlotView, View

_Cell = Callable[[Activity], str]


def draw(view: View, trouble: HotslotError | None = None) -> RenderableType:
    """All of it; with `trouble` the view is the last one that there was."""
    read_at = time.strftime("%H:%M:%S", time.localtime(view.unix_seconds))
    lines = [Text(f"{view.url}  {read_at}", style="bold")]
    if trouble is not None:
        lines.append(Text(printable(f"nothing newer: {trouble.summary} {trouble.found or ''}"), style="red"))
    return Group(*lines, Text(), Columns([_block(slot, view.interval_seconds) for slot in view.slots], padding=(1, 6)))


def _block(slot: SlotView, seconds: float | None) -> RenderableType:
    lines = [
        Text(printable(slot.slot), style="bold"),
        Text(f"adapters  {slot.adapters:,} known, {slot.host_adapters:,} in host memory"),
        Text(f"bytes     {slot.host_bytes:,} host, {slot.device_bytes:,} device"),
    ]
    if slot.restarted:
        lines.append(Text("restarted: counts began anew", style="yellow"))
    return Group(*lines, Text(), _table(slot, seconds))


def _table(slot: SlotView, seconds: float | None) -> Table:
    columns: dict[str, Activity | None] = {} if seconds is None else {f"last {seconds:.1f} s": slot.interval}
    columns["since attach"] = slot.since_attach
    table = new_table("", *(f">{heading}" for heading in columns))
    for heading, cell in _rows(slot):
        cells = ["" if activity is None else cell(activity) for activity in columns.values()]
        if any(cells):
            add_row(table, [heading, *cells])
    return table


def _rows(slot: SlotView) -> list[tuple[str, _Cell]]:
    rows: list[tuple[str, _Cell]] = [
        ("swaps/s", lambda done: _number(done.swaps_per_second, ".1f")),
        ("written", lambda done: _rate(done.gigabytes_per_second)),
        ("written in swaps", lambda done: _rate(done.swapping_gigabytes_per_second)),
        ("hit rate", lambda done: _number(done.hit_rate, ".1%")),
        ("misses", lambda done: f"{done.misses:,}"),
        ("evictions", lambda done: f"{done.evictions:,}"),
        ("recompilations", lambda done: f"{done.recompilations:,}"),
        ("swaps", lambda done: f"{done.changed:,}"),
        ("  unchanged", lambda done: f"{done.unchanged:,}"),
        ("  failed", lambda done: f"{done.failed:,}"),
    ]
    for tier in slot.since_attach.latency:
        rows += [
            (f"from {tier}", _of(tier, lambda latency: f"{latency.swaps:,}")),
            ("  mean", _of(tier, lambda latency: _duration(latency.mean_seconds))),
            ("  p50, about", _of(tier, lambda latency: _duration(latency.p50_seconds))),
            ("  p99, about", _of(tier, lambda latency: _duration(latency.p99_seconds))),
        ]
    return rows


def _of(tier: str, cell: Callable[[Latency], str]) -> _Cell:
    return lambda done: cell(done.latency[tier]) if tier in done.latency else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _rate(gigabytes_per_second: float | None) -> str:
    if gigabytes_per_second is None:
        return ""
    return _scaled(gigabytes_per_second, (("GB/s", 1.0), ("MB/s", 1e-3), ("kB/s", 1e-6)))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return f"> {BOUNDS[-1]:g} s"
    return _scaled(seconds, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)))


def _scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    unit, size = next((each for each in units if value >= each[1]), units[-1])
    return f"{value / size:.{1 if value < 10 * size else 0}f} {unit}"
