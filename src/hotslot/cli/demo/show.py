"""The demos on a terminal: stages while they work, the answers as they come, a table at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..terminal import printable
from .result import AdapterResult, DemoResult, ImagesResult, MethodsResult, RowResult, SwapTimes

_ONE_TABLE_WIDTH = 125  # of a terminal that holds all columns side by side
_PIPED_WIDTH = 160


def new_console() -> Console:
    """A console on standard output, wide enough for the whole table where that is no terminal."""
    return Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, emoji=False, highlight=False)


class Stages:
    """A progress display on standard error; use as a context. Stages are ticked off with their times."""

    def __init__(self) -> None:
        columns = (SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description}", markup=False))
        self._progress = Progress(
            *columns, BarColumn(bar_width=24), TimeElapsedColumn(), console=Console(file=sys.stderr)
        )

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, text: str, steps: int | None = None) -> Iterator[Callable[[str | None], None]]:
        """One stage of known or unknown length. Yields a function that advances by a step, or says something else."""
        task = self._progress.add_task(text, total=steps)

        def step(description: str | None = None) -> None:
            self._progress.update(task, description=description or text, advance=0 if description else 1)

        yield step
        self._progress.update(task, total=steps or 1, completed=steps or 1)


def answers(console: Console, result: DemoResult, prompts: Sequence[str]) -> None:
    """Print what base and adapters said to each prompt."""
    width = max(len(speaker.name) for speaker in result.speakers)
    for prompt in prompts:
        console.print(f"[bold]{_safe(prompt)}[/]")
        for speaker in result.speakers:
            mark = " [red](not the recorded answer)[/]" if prompt in (speaker.unexpected or ()) else ""
            said = f"[cyan]{_safe(speaker.name.ljust(width))}[/]  {_safe(speaker.answers[prompt].strip())}{mark}"
            console.print(f"  {said}", overflow="ellipsis", no_wrap=True)
        console.print()


class _Column(NamedTuple):
    header: str
    cell: Callable[[Any], str]
    right: bool = False


def _swap(cell: Callable[[SwapTimes], str]) -> Callable[[AdapterResult], str]:
    return lambda adapter: cell(adapter.swap) if adapter.swap is not None else ""


_WHAT = (
    _Column("adapter", lambda a: f"[cyan]{_safe(a.name)}[/]"),
    _Column("method", lambda a: _safe(a.method)),
    _Column("rank", lambda a: a.rank, right=True),
    _Column("targets", lambda a: _safe(a.targets)),
)
_ANSWER = _Column("answer", lambda a: _safe(a.answers[a.showcase].strip()))
_HOW = (
    _Column("swap", _swap(lambda s: _ms(s.seconds)), right=True),
    _Column("bytes", _swap(lambda s: f"{s.nbytes:,}"), right=True),
    _Column("GB/s", _swap(lambda s: f"{s.gigabytes_per_second:.2f}"), right=True),
    _Column("of a copy", _swap(lambda s: f"{s.share_of_copy:.0%}{'' if s.copy_kind == 'flat' else '*'}"), right=True),
    _Column("recompiled", lambda a: _zero(a.recompilations), right=True),
    _Column("PEFT, same swap", _swap(lambda s: _safe(_peft(s)))),
)


def tables(console: Console, result: DemoResult) -> None:
    """Print the table; as two, one below the other, where the terminal is narrow."""
    _tables(console, (*_WHAT, _ANSWER), _HOW, result.adapters)


def methods_tables(console: Console, result: MethodsResult) -> None:
    """Print the table of methods, likewise."""
    recorded = len(result.methods[0].recorded)
    marks = (
        _Column("right", lambda m: f"{sum(m.right)} of {len(m.right)}", right=True),
        _Column("PEFT, the same", lambda m: str(sum(m.recorded[: len(m.right)])), right=True),
        _Column(f"PEFT, all {recorded}", lambda m: f"{m.recorded_accuracy:.1%}", right=True),
    )
    how = (
        _Column("route", lambda m: m.route if m.nbytes else ""),
        _Column("swap", lambda m: _ms(m.seconds), right=True),
        _Column("bytes", lambda m: f"{m.nbytes:,}" if m.nbytes else "", right=True),
        _Column("forward pass", lambda m: f"{result.times_base(m):.2f} × base", right=True),
        _Column("recompiled", lambda m: _zero(m.recompilations), right=True),
    )
    _tables(console, (*_WHAT, *marks), how, result.methods)


_ROW = (_Column("row", lambda r: f"[cyan]{_safe(r.name)}[/]"),)
_ROW_HOW = (
    _Column("swap", lambda r: _ms(r.seconds), right=True),
    _Column("bytes", lambda r: f"{r.nbytes:,}" if r.nbytes else "", right=True),
    _Column("file → live", lambda r: _ms(r.file_seconds) if r.file_seconds is not None else "", right=True),
    _Column("recompiled", lambda r: _zero(r.recompilations), right=True),
    _Column("off by", lambda r: f"{r.levels_off:.2f} / 255", right=True),
    _Column("diffusers, same swap", lambda r: _safe(_diffusers(r))),
)


def images_table(console: Console, result: ImagesResult) -> None:
    """Print the table of the rows of pictures, likewise."""
    _tables(console, _ROW, _ROW_HOW, result.rows)


def _tables(console: Console, what: Sequence[_Column], how: Sequence[_Column], rows: Sequence[Any]) -> None:
    wide = console.width >= _ONE_TABLE_WIDTH
    for columns in [(*what, *how)] if wide else [what, (what[0], *how)]:
        table = Table(show_lines=True)
        for column in columns:
            table.add_column(column.header, justify="right" if column.right else "left")
        for row in rows:
            table.add_row(*(column.cell(row) for column in columns))
        console.print(table)


def summary(console: Console, result: DemoResult, cache: str) -> None:
    """Print the notes below the table, and whether all is well."""
    padded = any(a.swap is not None and a.swap.copy_kind != "flat" for a in result.adapters)
    console.print(
        "swap: from host memory, from the adapter of the row above (the first: of the last row). PEFT: on a model of "
        "its own, from host memory (from its file).\nof a copy: 100% is the speed of a plain copy of the same bytes, "
        "which neither converts them to the model's dtype nor clears what the last adapter leaves"
        + ("; *: copied tensor by tensor, into slots of a larger rank." if padded else "."),
        style="dim",
    )
    restored = "the same answers" if result.base_restored else "[red]other answers[/]"
    console.print(
        f"{result.swaps} swaps. The decode step: {_zero(result.graphs - 1, one=result.graphs)} graph, compiled once in "
        f"{result.compile_seconds:.1f} s, then {_zero(result.recompilations)} recompilations. "
        f"The base before and after: {restored}."
    )
    for name, prompt in result.unexpected:
        console.print(f"[red]not the recorded answer:[/] {_safe(name)} to {_safe(prompt)}")
    _verdict(console, result, cache)


def methods_summary(console: Console, result: MethodsResult, cache: str) -> None:
    """Print the notes below the table of methods, and whether all is well."""
    console.print(
        "right: greedy answers equal to the known one, to questions held out of training. PEFT: what models loaded "
        "by PEFT alone answered.\nswap: the median, from the row above, from host memory; the base's is deactivate(). "
        "bytes: of base weights that were written. forward pass: of the compiled model, in times of the base's.",
        style="dim",
    )
    restored = "the same, bit for bit" if result.base_restored else "[red]others[/]"
    console.print(
        f"{result.swaps} swaps. The model: {_zero(result.graphs - 1, one=result.graphs)} graph, compiled once in "
        f"{result.compile_seconds:.1f} s, then {_zero(result.recompilations)} recompilations. "
        f"The base's logits before and after: {restored}."
    )
    for method in result.methods:
        if method.differing:
            console.print(f"{_safe(method.name)}: {method.differing} of {len(method.right)} not as recorded")
    _verdict(console, result, cache)


def images_summary(console: Console, result: ImagesResult, cache: str) -> None:
    """Print the notes below the table of pictures, where they are, and whether all is well."""
    console.print(
        "swap: the median, from host memory; a style alone from the style above it (the first: from the last), the "
        "others from the row above. off by: the largest difference to\nthe pictures of a fresh pipeline that loads the "
        "LoRAs by diffusers alone, in levels of 255. diffusers: on a pipeline of its own that is not compiled; "
        "hotswap=True is from the file.",
        style="dim",
    )
    restored = "the same, bit for bit" if result.base_restored else "[red]another one[/]"
    fresh = "as fresh pipelines paint them" if result.as_fresh else "[red]not what fresh pipelines paint[/]"
    console.print(
        f"{result.swaps} swaps. The unet: {_zero(result.graphs - 1, one=result.graphs)} graph, compiled once in "
        f"{result.compile_seconds:.1f} s, then {_zero(result.recompilations)} recompilations. The pictures: {fresh}. "
        f"The base before and after: {restored}."
    )
    console.print(f"The pictures are in {_safe(result.sheet)}.")
    _verdict(console, result, cache)


def _verdict(console: Console, result: DemoResult | ImagesResult | MethodsResult, cache: str) -> None:
    verdict = "[green]all as it should be[/]" if result.ok else "[red]not all is as it should be[/]"
    console.print(f"{verdict}, {result.seconds:.0f} s in all. Model and compiled code are kept in {_safe(cache)}.")


def _peft(swap: SwapTimes) -> str:
    if swap.peft_seconds is None or swap.peft_file_seconds is None:
        return f"cannot: {swap.peft_refusal}"
    return f"{_ms(swap.peft_seconds)} ({_ms(swap.peft_file_seconds)})"


def _diffusers(row: RowResult) -> str:
    if row.diffusers_seconds is None:
        return f"{row.diffusers_call} cannot: {row.diffusers_refusal}"
    return f"{row.diffusers_call}: {_ms(row.diffusers_seconds)}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _zero(count: int, one: int | None = None) -> str:
    text = str(count if one is None else one)
    return f"[green]{text}[/]" if count == 0 else f"[red]{text}[/]"


def _safe(text: str) -> str:
    """One line that neither markup nor control characters in `text` can change."""
    return escape(printable(text.replace("\n", "⏎")))
