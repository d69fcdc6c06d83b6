"""How answers and errors are printed.

The answer goes to stdout; what kept a command from answering goes to stderr, or with --json to stdout as
`{"error": …}`. Text out of an adapter never reaches the terminal with its control characters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from ..errors import HotslotError

REFUSED = 1  # exit code; click's own for wrong usage is 2
_PIPED_WIDTH = 160  # a pipe has no width, and rich's 80 would break paths that somebody greps for


@contextmanager
def errors_reported(*, as_json: bool) -> Iterator[None]:
    """Print a HotslotError of the block as it is, without a traceback, and exit with 1."""
    try:
        yield
    except HotslotError as error:
        if as_json:
            print_json({"error": error})
        else:
            typer.echo(str(error), err=True)
        raise typer.Exit(REFUSED) from None


def print_json(value: Any, *, one_line: bool = False) -> None:
    """Print dicts, lists, dataclasses and HotslotErrors as one JSON document."""
    # JSON has no NaN and no infinity, and Python's json writes and reads them: of a config that has one it is a text.
    plain = json.loads(json.dumps(value, default=_as_json), parse_constant=str)
    typer.echo(json.dumps(plain, indent=None if one_line else 2))


def _as_json(value: Any) -> Any:
    if isinstance(value, HotslotError):
        details = {"where": value.where, "found": value.found, "expected": value.expected, "next_step": value.hint}
        texts = {key: None if text is None else str(text) for key, text in details.items()}
        return {"type": type(value).__name__, "message": str(value), "summary": value.summary, **texts}
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    raise TypeError(f"{type(value).__name__} has no JSON form")


def new_console() -> Console:
    """A console on stdout that takes text as it is: no markup, no emoji codes, no guessed highlights."""
    width = None if sys.stdout.isatty() else _PIPED_WIDTH
    return Console(width=width, markup=False, emoji=False, highlight=False)


def new_table(*headings: str) -> Table:
    """A table without lines; columns of numbers are aligned by their heading's leading '>'."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        justify: Literal["left", "right"] = "right" if heading.startswith(">") else "left"
        # Where a terminal is narrow a digest or a path goes on below, and is not cut.
        table.add_column(heading.removeprefix(">"), justify=justify, overflow="fold")
    return table


def new_facts(facts: Mapping[str, object]) -> Table:
    """A table of what something is called, in bold, and what it is."""
    table = new_table("", "")
    table.show_header = False
    table.columns[0].style = "bold"
    table.columns[0].no_wrap = True
    for name, fact in facts.items():
        add_row(table, (name, f"{fact:.400}" if isinstance(fact, str) else fact))
    return table


def add_row(table: Table, cells: Iterable[object]) -> None:
    """Add a row of anything, printable."""
    table.add_row(*(printable(str(cell)) for cell in cells))


def printable(text: str) -> str:
    """`text` in one line, control characters escaped: a name in a file may try to drive a terminal, or add lines to it.

    A HotslotError's message is so already, line by line.
    """
    return text if text.isprintable() else "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
