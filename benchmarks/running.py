"""What the benchmarks share: the machine they run on, and clocks that wait for the device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any, TypeVar

import torch

from hotslot import HotslotError

T = TypeVar("T")


def chosen_device(device: str | None) -> torch.device:
    """The one that was asked for; else a GPU, if there is one.

    Raises:
        HotslotError: a GPU was asked for, and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise HotslotError("There is no GPU.", where="--device", found=f"torch {torch.__version__} sees none")
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def refuse_unknown(sizes: Collection[str], known: Collection[str]) -> None:
    """Raise if there is no such size."""
    unknown = [size for size in sizes if size not in known]
    if unknown:
        raise HotslotError("No such size.", found=", ".join(unknown), expected=f"of {', '.join(known)}")


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


def by_turns(contenders: Iterable[T], rounds: int) -> Iterator[T]:
    """Each of them once a round, in an order that is another each time: none is always timed after the same one."""
    order, shuffled = Random(0), list(contenders)
    for _ in range(rounds):
        order.shuffle(shuffled)
        yield from shuffled


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
