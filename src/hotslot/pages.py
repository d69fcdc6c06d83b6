"""Host memory in huge pages: copies to and from it spend less time on finding out where each page is.

9 MB are 2,200 pages of 4 KB, about as many as a core can keep the addresses of, or 4 of 2 MB. Linux gives these to who
asks (`madvise`), unless it is told never to; other systems have no such call, and torch's own memory does as well.
"""

from __future__ import annotations

import mmap
import weakref

import torch

HUGE_BYTES = 2 << 20  # of x86-64 and of most arm64

# Each takes two or three of the 65,530 mappings that Linux allows a process, and others need some.
MAX_MAPPINGS = 8192

_mappings: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def empty(nbytes: int) -> torch.Tensor:
    """A 1-D uint8 tensor on the CPU with anything in it, in huge pages as far as it fills them."""
    possible = nbytes >= HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE") and len(_mappings) < MAX_MAPPINGS
    memory = _huge(nbytes) if possible else None
    return memory if memory is not None else torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def _huge(nbytes: int) -> torch.Tensor | None:
    try:
        # One more, for the first of them begins at a multiple of their size. Private: a fork must not share it.
        memory = mmap.mmap(-1, nbytes + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_BYTES
        memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes // HUGE_BYTES * HUGE_BYTES)
    except OSError:  # no room, or a kernel without them
        return None
    _mappings.add(memory)
    return torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=nbytes)
