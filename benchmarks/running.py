"""What the benchmarks share: a command line, the machine they run on, and clocks that wait for the device."""

from __future__ import annotations

import argparse
import gc
import inspect
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hotslot import HotslotError


def command_line(command: Callable[..., None], sizes: Collection[str] = ()) -> None:
    """Run a benchmark with what was typed after `python -m benchmarks.…`.

    Args:
        command: takes `rounds`, with a default, and `as_json`; with sizes `sizes`, `device`, `threads` and `plot` too.
        sizes: that there are to choose from.
    """
    rounds = inspect.signature(command).parameters["rounds"].default
    parser = argparse.ArgumentParser(description=(inspect.getdoc(inspect.getmodule(command)) or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="timed repetitions; default: %(default)s")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print one JSON document")
    if sizes:
        parser.add_argument("--size", action="append", choices=sizes, dest="sizes", help="may be repeated")
        parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
        parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
        parser.add_argument("--plot", type=Path, help="draw the table into this image file")
    command(**vars(parser.parse_args()))


def chosen_device(device: str | None) -> torch.device:
    """The one that was asked for; else a GPU, if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def refuse_unknown(sizes: Collection[str], known: Collection[str]) -> None:
    """Raise if there is no such size."""
    unknown = [size for size in sizes if size not in known]
    if unknown:
        raise HotslotError("No such size.", found=", ".join(unknown), expected=f"of {', '.join(known)}")


def refuse_plot(plot: Path | None) -> None:
    """Raise if a plot was asked for, of a benchmark that has none."""
    if plot is not None:
        raise HotslotError("This benchmark has no plot.", where="--plot", hint="leave it out, or take --json")


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def only_own_garbage() -> Iterator[None]:
    """Garbage collection as usual, but not over the objects of all models that wait beside the one being timed."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """(wall, CPU) seconds of a call, the device's work included."""
    _synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    _synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
