"""`hotslot bench`: runs a benchmark of the checkout that this package was installed from.

Benchmarks are no part of the package: they need PEFT's and hotslot's source beside each other, and are read as much
as run. So they stay in `benchmarks/` of the repository, and an installed wheel says where to find them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module, util
from pathlib import Path
from types import ModuleType

from ..errors import HotslotError

CASES = {
    "concurrency": "bench_concurrency",
    "diffusers": "bench_diffusers",
    "forward": "bench_forward",
    "merged": "bench_merged",
    "scale": "bench_scale",
    "slots": "bench_slots",
    "soak": "soak",
    "swap": "bench_swap",
}
_PACKAGE = "hotslot_benchmarks"  # not "benchmarks": other projects' are called so too
_FOLDER = Path(__file__).parents[3] / "benchmarks"  # beside src/ of a checkout


def run_bench(
    case: str,
    *,
    as_json: bool = False,
    plot: Path | None = None,
    sizes: Sequence[str] | None = None,
    rounds: int | None = None,
    device: str | None = None,
    threads: int = 1,
) -> None:
    """Run a benchmark and print its table, or with `as_json` one JSON document.

    Args:
        case: one of `CASES`.
        as_json: print JSON.
        plot: an image file to draw the table into.
        sizes: names of the benchmark's sizes; by default those whose figures are told.
        rounds: timed repetitions; by default the benchmark's own choice.
        device: "cpu" or "cuda"; by default a GPU if there is one.
        threads: of torch, on the CPU.

    Raises:
        HotslotError: there is no such benchmark here, or what it compares is not equal.
    """
    options = {} if rounds is None else {"rounds": rounds}
    load(case).command(as_json=as_json, plot=plot, sizes=sizes, device=device, threads=threads, **options)


def load(case: str) -> ModuleType:
    """The module of a benchmark.

    Raises:
        HotslotError: there is no such benchmark here.
    """
    if case not in CASES:
        raise HotslotError("There is no such benchmark.", where=case, expected=f"one of {', '.join(CASES)}")
    if _PACKAGE not in sys.modules:
        spec = util.spec_from_file_location(
            _PACKAGE, _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
        )
        if spec is None or spec.loader is None or not (_FOLDER / f"{CASES[case]}.py").is_file():
            raise HotslotError(
                "Benchmarks are part of hotslot's repository, not of the installed package.",
                found=f"no {CASES[case]}.py in {_FOLDER}",
                expected="a checkout that hotslot is installed from",
                hint=f"clone the repository and run scripts/bench {case} in it",
            )
        package = util.module_from_spec(spec)
        sys.modules[_PACKAGE] = package
        spec.loader.exec_module(package)
    return import_module(f"{_PACKAGE}.{CASES[case]}")
