"""The memory that slots' parameters and scalings had before hotslot gave them its own, and their return to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..methods import PARTS
from .homes import become_view, note_sizes
from .scaling import ScalingMap
from .slots import Slot


class Originals:
    """Where the parts and scalings of slots were when they were noted.

    `Homes` puts the old memory back as it was; here it takes over what is live.

    Args:
        slots: fqn → slot.
        ranks: fqn → rank of what they hold.
    """

    def __init__(self, slots: Mapping[str, Slot], ranks: Mapping[str, int]) -> None:
        self._ranks = dict(ranks)
        self._params: dict[tuple[str, str], tuple[nn.Parameter, torch.Tensor]] = {}
        self._scalings: dict[str, dict[str, Any]] = {}
        self.note(slots)

    def note(self, slots: Mapping[str, Slot]) -> None:
        """Take in more slots, as they are now."""
        for fqn, slot in slots.items():
            self._scalings[fqn] = slot.layer.scaling
            for suffix, held in slot.held.items():
                self._params[fqn, suffix] = held.param, held.param.data

    def forget(self, fqns: Iterable[str]) -> None:
        """Undo `note`; nothing the second time."""
        for fqn in fqns:
            self._scalings.pop(fqn, None)
            for suffix in PARTS:
                self._params.pop((fqn, suffix), None)

    def take_back(
        self, slots: Mapping[str, Slot], live_ranks: Mapping[str, int], *, exclusive: bool, may_shrink: bool
    ) -> None:
        """Give parameters and scalings their own memory again, holding what they hold now. May be repeated.

        At their old shapes, but where what is live has another rank than what was: PEFT's functions swap without
        coming back to it, and padding that nobody hides would be saved beside the config of a lower rank. Gradients
        get the same shapes.

        Args:
            slots: all that were noted, as they are now.
            live_ranks: fqn → rank up to which the slot holds values.
            exclusive: whether parameters share a version counter, and are to have their own again.
            may_shrink: whether they may have smaller shapes than they had.
        """
        with torch.inference_mode(False), torch.no_grad():
            for (fqn, suffix), (param, original) in self._params.items():
                current = param.data
                rank, found = live_ranks[fqn], self._ranks.get(fqn, 0)
                other = rank > found or (may_shrink and 0 < rank < found)
                if not other and current.data_ptr() == original.data_ptr():
                    continue
                held = _cut(current, suffix, original.shape, slots[fqn], rank=rank if other else None)
                if original.dtype != held.dtype or original.device != held.device or original.shape != held.shape:
                    original = torch.empty_like(held, memory_format=torch.contiguous_format)
                original.copy_(held)
                if exclusive:
                    become_view(param, original)
                else:
                    param.data = original
            for (fqn, suffix), (param, _) in self._params.items():
                gradient = param.grad
                if gradient is not None and gradient.shape != param.shape:  # zero beyond the rank, as the values are
                    param.grad = None
                    param.grad = _cut(gradient, suffix, param.shape, slots[fqn], rank=None).contiguous()
        note_sizes(slots)
        for fqn, slot in slots.items():
            _take_back_scaling(slot, self._scalings[fqn])


def _cut(padded: torch.Tensor, suffix: str, shape: torch.Size, slot: Slot, *, rank: int | None) -> torch.Tensor:
    """The corner of `padded` that has `shape`, or this rank."""
    part = PARTS[suffix]
    if part.rank_dim is None or (rank is None and padded.shape == shape):
        return padded
    if rank is None:
        rank = shape[part.rank_dim] // slot.experts * (1 if part.rank_dim == 0 else slot.groups)
    return slot.corner(padded, suffix, rank)


def _take_back_scaling(slot: Slot, original: Mapping[str, Any]) -> None:
    current = slot.layer.scaling
    if isinstance(current, ScalingMap):
        current.release(slot.adapter_name, like=original.get(slot.adapter_name))
        if not current.bound:
            slot.layer.scaling = dict(current)
