"""What every demo runs under: few threads, one strict compilation, and compiled code that is kept for the next run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...cache import user_folder
from ...errors import HotslotError

# Half of torch's threads, up to four: more read 540 MB of weights little faster, and where something else runs on all
# cores, as many threads as cores wait for one another (measured on two busy cores: one thread 27 s, two 569 s).
_MOST_THREADS = 4


def compiled(model: Any, backend: Any) -> Any:
    """The model, to be compiled at its first call, for the shapes of that alone.

    Raises:
        HotslotError: there is no such backend; or inductor was asked for and finds no C++ compiler.
    """
    import torch
    from torch._dynamo.exc import InvalidBackend

    if backend == "inductor":
        _refuse_missing_compiler()
    try:
        # fullgraph: a graph break or the recompile limit raises instead of falling back to eager in silence.
        return torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    except InvalidBackend as error:
        raise HotslotError(
            "torch.compile has no such backend.",
            where="--backend",
            found=backend,
            expected=f"one of {', '.join(torch._dynamo.list_backends())}, or another that is installed",
        ) from error


def compiled_graphs() -> int:
    """Graphs that dynamo has compiled in this process, recompilations included, whatever the backend."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def backend_name(backend: Any) -> str:
    """What to call a backend of torch.compile."""
    return backend if isinstance(backend, str) else getattr(backend, "__name__", type(backend).__name__)


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Yields a function that gives the seconds from here to the end of the block."""
    started = time.perf_counter()
    ended: list[float] = []
    yield lambda: (ended[0] if ended else time.perf_counter()) - started
    ended.append(time.perf_counter())


@contextmanager
def few_threads() -> Iterator[None]:
    """Run on half of torch's threads, up to four."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, min(threads // 2, _MOST_THREADS)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def kept_code() -> Iterator[None]:
    """Inductor keeps compiled code in a folder of /tmp, which a restart empties; ours stays for the next run."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(user_folder() / "inductor")
    try:
        yield
    finally:
        del os.environ[name]


def _refuse_missing_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise HotslotError(
            "torch.compile finds no C++ compiler.",
            found=str(error).splitlines()[0],
            expected="g++ or clang++, for torch.compile's default backend",
            hint="install one (apt install g++), or run with --backend eager",
        ) from error
