"""Host memory for checkpoints, used again once nobody holds it.

To touch 84 MB of fresh memory for the first time takes longer than to read a file into it: 20,000 page faults. The C
library gives large blocks back to the system at once, so that each load would pay anew.
"""

from __future__ import annotations

import threading

import torch

from .. import pages

# A swap in progress needs three: what is live, what was before, what comes. More than this is not kept.
KEPT_BUFFERS = 4
KEPT_BYTES = 512 << 20

_kept: list[torch.Tensor] = []
_lock = threading.Lock()


def host_buffer(nbytes: int, *, pin_memory: bool = False) -> torch.Tensor:
    """A 1-D uint8 tensor of `nbytes`, with anything in it. It is the caller's until all views of it are gone."""
    if pin_memory:  # torch keeps page-locked memory itself
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    with _lock, torch.inference_mode(False):
        for i, buffer in reversed([*enumerate(_kept)]):  # the one that is most likely in a cache yet
            if nbytes <= buffer.numel() <= 2 * nbytes and _only_kept_here(buffer):
                del _kept[i]  # to the end of the list, the last to be let go
                break
        else:
            buffer = pages.empty(nbytes)
        _keep(buffer)
        return buffer[:nbytes]


def keep_buffer(data: torch.Tensor) -> None:
    """Keep memory of `host_buffer` for the next who asks, once all views of it are gone: `data` will be soon."""
    if data.is_pinned() or not data.is_cpu:
        return
    with _lock, torch.inference_mode(False):
        storage = data.untyped_storage()
        if all(kept.untyped_storage().data_ptr() != storage.data_ptr() for kept in _kept):
            _keep(torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage))


def _keep(buffer: torch.Tensor) -> None:
    _kept.append(buffer)
    while len(_kept) > KEPT_BUFFERS or sum(kept.numel() for kept in _kept) > KEPT_BYTES:
        _kept.pop(0)


def _only_kept_here(buffer: torch.Tensor) -> bool:
    """Whether no view of the buffer is left: its storage is held by `buffer` and by the wrapper that asks."""
    storage = buffer.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) == _ALONE


def _alone() -> int:
    storage = torch.empty(1, dtype=torch.uint8, device="cpu")
    return int(torch._C._storage_Use_Count(storage.untyped_storage()._cdata))


_ALONE = _alone()
