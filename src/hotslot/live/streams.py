"""Which CUDA streams read a model, so that a swap on one of them is ordered against all.

Work that was given to a GPU goes on after the call that gave it has returned: a lease that has ended on the host says
nothing of the device. A swap therefore waits, on the device, for all that these streams have been given until then,
and they wait for it. The host waits for nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from ..errors import ModelError
from ..leases import Gate

_readers: weakref.WeakKeyDictionary[Gate, set[torch.cuda.Stream]] = weakref.WeakKeyDictionary()


def note_stream(gate: Gate) -> None:
    """Note that who holds a lease on `gate` computes on the current stream."""
    if torch.cuda.is_initialized():
        _readers.setdefault(gate, set()).add(torch.cuda.current_stream())


def refuse_while_capturing() -> None:
    """Raise if a swap would become a part of a CUDA graph, and happen anew with each replay.

    Raises:
        ModelError: the current stream is being captured.
    """
    if torch.cuda.is_current_stream_capturing():
        raise ModelError(
            "A CUDA graph is being captured, of which a swap would become a part.",
            found="torch.cuda.is_current_stream_capturing()",
            hint="swap before the capture or after it: the graph reads what is live when it is replayed",
        )


@contextmanager
def ordered(gate: Gate, devices: Iterable[torch.device]) -> Iterator[None]:
    """For a block that writes on the current streams of `devices`: after all that was given to others until now."""
    streams = [torch.cuda.current_stream(device) for device in devices if device.type == "cuda"]
    if not streams:
        yield
        return
    known = _readers.setdefault(gate, set())
    others = known.difference(streams)
    for stream in streams:
        for other in others:
            stream.wait_stream(other)
    try:
        yield
    finally:
        for stream in streams:
            for other in others:
                other.wait_stream(stream)
        known.update(streams)
