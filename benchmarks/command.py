"""A benchmark as a command: measures, and prints a table or one JSON document on stdout; progress goes to stderr."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from hotslot import HotslotError

from .report import Goal, describe
from .running import chosen_device

Conditions = dict[str, Any]  # of `describe`


@dataclass(frozen=True)
class Command:
    """What `hotslot bench NAME` and `python -m benchmarks.bench_NAME` do.

    Attributes:
        name: of the benchmark.
        run: measures; takes `rounds`, `device`, `threads` and `progress`, which is told what is being done.
        sizes: names that there are to choose from.
        default_sizes: that are measured if none are chosen.
        rounds: timed repetitions, if no other number is asked for.
        render: prints what `run` gave as a table.
        draw: draws it into an image file. None: there is no plot.
        goals: which of it there are. None: there are none.
        told: what the JSON document says of it.
        columns: that the table needs. Piped, rich takes a terminal of 80, and would cut names.
        packages: whose versions are told, beside those that each benchmark needs.
        keeps_progress: whether what was told of the progress is to stay on the screen.
    """

    name: str
    run: Callable[..., Any]
    sizes: Collection[str]
    default_sizes: Sequence[str]
    rounds: int
    render: Callable[[Any, Conditions, Console], None]
    draw: Callable[[Any, Conditions, Path], None] | None = None
    goals: Callable[[Any], Sequence[Goal]] | None = None
    told: Callable[[Any], dict[str, Any]] = lambda rows: {"rows": list(map(asdict, rows))}
    columns: int = 120
    packages: Sequence[str] = ()
    keeps_progress: bool = False

    def __call__(
        self,
        *,
        sizes: Sequence[str] | None = None,
        rounds: int | None = None,
        device: str | None = None,
        threads: int = 1,
        as_json: bool = False,
        plot: Path | None = None,
    ) -> None:
        """Run, and print.

        Raises:
            HotslotError: there is no such size or device, or nothing can be plotted, or a library is missing; or what
                is compared is not equal.
        """
        if plot is not None:  # asked before minutes are spent on what it is to show
            _refuse_plot(plot, self)
        chosen_device(device)
        options: dict[str, Any] = {"rounds": rounds or self.rounds, "threads": threads}
        console = Console(stderr=True)
        with console.status("") as status:
            conditions = describe(device, **options) | {"benchmark": self.name}
            conditions["versions"] |= {package: _version(package) for package in self.packages}
            progress = console.print if self.keeps_progress else status.update
            found = self.run(sizes or self.default_sizes, device=device, progress=progress, **options)
        if plot is not None and self.draw is not None:
            self.draw(found, conditions, plot)
        if as_json:
            goals = [asdict(goal) | {"met": goal.met} for goal in self.goals(found)] if self.goals else None
            print(json.dumps(conditions | self.told(found) | ({} if goals is None else {"goals": goals}), indent=1))
        else:
            self.render(found, conditions, Console(width=max(self.columns, Console().width)))

    def main(self) -> None:
        """Take the options that were typed."""
        parser = command_line(self.run, self.rounds)
        parser.add_argument("--size", action="append", choices=self.sizes, dest="sizes", help="may be repeated")
        parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
        parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
        parser.add_argument("--plot", type=Path, help="draw the table into this image file")
        self(**vars(parser.parse_args()))


def _refuse_plot(plot: Path, command: Command) -> None:
    if command.draw is None:
        raise HotslotError("This benchmark has no plot.", where="--plot", hint="leave it out, or take --json")
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise _missing("matplotlib") from None
    kinds = FigureCanvasBase.get_supported_filetypes()
    if plot.suffix.removeprefix(".") not in kinds or not plot.absolute().parent.is_dir():
        raise HotslotError(
            "The plot cannot be written there.",
            where=plot,
            expected=f"in a folder that is there, a file that ends in one of {', '.join(kinds)}",
        )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise _missing(package) from None


def _missing(package: str) -> HotslotError:
    return HotslotError(f"This needs {package}, which is not installed.", hint=f"pip install {package}")


def command_line(function: Callable[..., Any], rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have, of the one in whose module the function is."""
    described = inspect.getdoc(inspect.getmodule(function)) or ""
    parser = argparse.ArgumentParser(description=described.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="timed repetitions; default: %(default)s")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print one JSON document")
    return parser
