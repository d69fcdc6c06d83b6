"""The tail of an arena, behind the parts: for each slot its scaling, and whether the live adapter is a DoRA there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..block import Layout
from ..block.layout import ALIGNMENT_BYTES
from .slots import Slot

_SCALING_BYTES = 16  # inductor assumes this alignment of what it was compiled with


def arena_bytes(nbytes: int, slots: int) -> int:
    """The size of an arena for parts of `nbytes`, with the tail for the slots' scalings."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES + slots * _SCALING_BYTES


def _scaling_dtype(slots: Mapping[str, Slot]) -> torch.dtype:
    # A kernel takes a Python float in its own accumulation type: float32 for all but float64.
    return torch.float64 if any(slot.dtype == torch.float64 for slot in slots.values()) else torch.float32


def scaling_column(
    arena: torch.Tensor, slots: Mapping[str, Slot], region: int, layout: Layout
) -> tuple[torch.Tensor, list[str]]:
    """The arena's tail as [slots, 2 or 4], 16 bytes a slot: scaling, use of DoRA, nothing; and whose they are."""
    fqns = [
        fqn for fqn, slot in slots.items() if any(layout.places[fqn, suffix].region == region for suffix in slot.held)
    ]
    dtype = _scaling_dtype(slots)
    tail = arena[arena.numel() - len(slots) * _SCALING_BYTES :].view(dtype)
    return tail.view(len(slots), -1)[: len(fqns)], fqns


def column_values(scalings: Sequence[float], dora: Sequence[bool], *, like: torch.Tensor) -> torch.Tensor:
    """As a column holds them; page-locked for a GPU, since a copy of anything else would wait for it."""
    found = torch.zeros(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)
    found[:, 0] = torch.tensor(scalings, dtype=like.dtype, device="cpu")
    if any(dora):
        found[:, 1] = torch.tensor(dora, dtype=like.dtype, device="cpu")
    return found
