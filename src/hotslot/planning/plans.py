"""The Plan itself: what it says, adding two up, and what it has no room for."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

import torch
from torch import nn

from .. import live
from ..block import Layout, SlotShape, arrange, pack
from ..errors import ModelError, RankError, UnexpectedTargetError, UnsupportedError
from ..methods import Adapter

_BIAS = "lora_B.bias"

# Module path → (rank, version) of the adapters of the largest ranks there, as many as a blend may have.
Largest = Mapping[str, tuple[tuple[int, str], ...]]


@dataclass(frozen=True, repr=False)
class Plan:
    """Slots for a model. Print it to see them; `plan | other` has room for what either of the two was made for.

    Attributes:
        slots: module path → SlotShape: rank, dtype, shapes of the parts.
        max_blend: how many adapters a blend may have of those that were planned for.
        max_rank: the rank that every slot was given; None where the adapters' own ranks decide.
        dtype: as it was asked for: None is what a fresh PEFT load gives, "base" the base layer's.
        saved: paths of the modules that get a copy, because one of the adapters saves them whole.
        tokens: path of an embedding or output layer → for how many tokens that adapters train it has places.
        tied: path of a module → path of the input embedding, whose tokens it shows.
        pristine: where the base's own values are kept of what adapters are merged into.
        merge: how LoRA is merged: "peft", "fused", or None for the faster one.
    """

    slots: Mapping[str, SlotShape]
    max_blend: int = 2
    max_rank: int | None = None
    dtype: torch.dtype | str | None = None
    _largest: Largest = field(default_factory=lambda: MappingProxyType({}))
    saved: frozenset[str] = frozenset()
    tokens: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    tied: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    pristine: str = "device"
    merge: str | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Module path → the rank that its slot has room for."""
        return {fqn: slot.rank for fqn, slot in self.slots.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the slots on the model's device, alignment included."""
        return self.layout.nbytes

    @cached_property
    def layout(self) -> Layout:
        """The slots, one behind the other."""
        return arrange(self.slots.values())

    def __or__(self, other: Plan) -> Plan:
        """The plan that has room for all that either has room for. An adapter that both know is planned for once.

        Raises:
            ModelError: they were made for different models.
            UnsupportedError: their adapters adapt different bare parameters of one module.
        """
        if not isinstance(other, Plan):
            return NotImplemented
        max_blend = max(self.max_blend, other.max_blend)
        capped = [plan.max_rank for plan in (self, other) if plan.max_rank is not None]
        largest = largest_of(self._largest, other._largest, max_blend)
        slots = {}
        for fqn in [*self.slots, *(fqn for fqn in other.slots if fqn not in self.slots)]:
            shape = _both(self.slots.get(fqn), other.slots.get(fqn))
            rank = max(shape.rank, room_for(largest.get(fqn, ()), blended=not capped))
            slots[fqn] = shape.at_rank(rank)
        saved, tied = self.saved | other.saved, MappingProxyType({**self.tied, **other.tied})
        tokens = most([self.tokens, other.tokens])
        live.refuse_adapted_and_saved(slots, saved, {*tokens, *tied})
        live.refuse_untied(tokens, tied)
        max_rank = max(capped, default=None)
        return replace(
            self,
            slots=MappingProxyType(slots),
            max_blend=max_blend,
            max_rank=max_rank,
            _largest=largest,
            saved=saved,
            tokens=tokens,
            tied=tied,
        )

    def with_room(self, ranks: Mapping[str, int], *, biased: bool) -> Plan:
        """The same slots, each with room for at least its rank in `ranks`, and with `biased` for a bias."""
        slots = {fqn: slot.at_rank(max(slot.rank, ranks.get(fqn, 0))) for fqn, slot in self.slots.items()}
        if biased:
            slots = {fqn: with_bias(slot) for fqn, slot in slots.items()}
        return replace(self, slots=MappingProxyType(slots))

    def on(self, slots: Mapping[str, live.Slot], *, resizable: bool = True) -> Plan:
        """The plan for a model that has `slots` already: none gets smaller, and none larger unless `resizable`."""
        planned = dict(self.slots)
        for fqn, slot in slots.items():
            wanted = self.slots.get(fqn)
            if wanted is not None and resizable:
                planned[fqn] = slot.shape(max(slot.rank, wanted.rank), extra=wanted.parts)
            else:
                planned[fqn] = slot.shape()
        return replace(self, slots=MappingProxyType(planned))

    def refuse_other_model(self, model: nn.Module, slots: Mapping[str, live.Slot]) -> None:
        """Raise unless the model has the modules that this plan is for.

        Raises:
            ModelError: a module is not there, or of other dimensions.
        """
        shapes: Mapping[str, SlotShape] = {}
        known, modules = set(slots), live.base_modules(model)
        gone = [fqn for fqn, slot in self.slots.items() if fqn not in known and _module_of(slot) not in modules]
        if not gone:
            bare = {fqn: slot.parameter for fqn, slot in self.slots.items()}
            shapes = live.slot_shapes(model, (), slots, also=self.ranks, bare=bare)
        for fqn in gone or self.slots:
            found = dict(shapes[fqn].parts) if fqn in shapes else None
            expected = dict(self.slots[fqn].parts)
            if found is None or any(found[suffix] != shape for suffix, shape in expected.items() if suffix in found):
                raise ModelError(
                    "The plan was made for another model.",
                    where=fqn,
                    found=found or f"no such module in {type(live.unwrap(model)).__name__}",
                    expected=f"{expected}, by the plan",
                    hint="hotslot.plan(model, …) for this model",
                )

    def __str__(self) -> str:
        groups: dict[tuple[str, int, str], list[SlotShape]] = defaultdict(list)
        for fqn, slot in self.slots.items():
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", fqn)
            groups[pattern, slot.rank, str(slot.dtype).removeprefix("torch.")].append(slot)
        rows = [("modules", "slots", "rank", "dtype", "bytes")]
        for (pattern, rank, dtype), slots in groups.items():
            rows.append((pattern, str(len(slots)), str(rank), dtype, f"{arrange(slots).nbytes:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i in (0, 3) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([self._summary(), *lines])

    def __repr__(self) -> str:
        return f"<{self._summary()}>"

    def _summary(self) -> str:
        dtypes = Counter(str(slot.dtype).removeprefix("torch.") for slot in self.slots.values())
        blends = f"blends of {self.max_blend}" if self.max_blend > 1 else "one adapter at a time"
        room = f"rank {self.max_rank}" if self.max_rank is not None else blends
        return f"Plan of {len(self.slots)} slots, {self.nbytes:,} bytes of {', '.join(dtypes)}, room for {room}"


NO_SLOTS = Plan(MappingProxyType({}), max_blend=1)


def refuse_unfit(model: nn.Module, adapter: Adapter, plan: Plan, adapter_name: str) -> None:
    """Raise unless the adapter can be loaded once the model has the slots of `plan`."""
    live.refuse_other_base(model, adapter)
    adapter = live.as_loaded(model, adapter)
    live.refuse_other_parameters(model, plan.slots, adapter)
    pack(adapter, plan.layout)
    unplanned = sorted(adapter.saved.keys() - plan.saved - live.saved_modules(model, adapter_name))
    if unplanned:
        raise UnexpectedTargetError(
            f"{adapter.checkpoint.origin} saves modules whole that the plan has no copies for.",
            where=", ".join(unplanned[:8]),
            found=f"modules_to_save: {adapter.checkpoint.config['modules_to_save']}",
            expected=f"modules among {sorted(plan.saved) or 'none'}, by the plan",
            hint="plan with this adapter among the sources",
        )
    own = live.own_tokens(model, adapter)
    for fqn, tokens in own.items():
        if len(tokens.indices) > plan.tokens.get(fqn, 0):
            raise RankError(
                f"{adapter.checkpoint.origin} has more tokens than the plan has places for.",
                where=fqn,
                found=f"{len(tokens.indices)} tokens by trainable_token_indices",
                expected=f"at most {plan.tokens.get(fqn, 0)}, by the plan",
                hint="plan with this adapter among the sources",
            )
    live.refuse_untied({*plan.tokens, *own}, {**plan.tied, **live.tied_modules(model, adapter)})


def most(counts: Iterable[Mapping[str, int]]) -> Mapping[str, int]:
    """The largest count of each module."""
    largest: dict[str, int] = {}
    for counted in counts:
        largest.update((fqn, max(count, largest.get(fqn, 0))) for fqn, count in counted.items())
    return MappingProxyType(largest)


def with_bias(slot: SlotShape) -> SlotShape:
    """The same slot with a bias of the up-projection."""
    return slot.with_parts([_BIAS])


def _module_of(slot: SlotShape) -> str:
    """The path of the base module that the slot is on."""
    return slot.fqn.removesuffix(live.OUT_PROJ) if slot.parameter is None else slot.fqn.replace(".base_layer", "")


def largest_of(first: Largest, second: Largest, count: int) -> Largest:
    """The `count` largest ranks of each module, those of one adapter once."""
    merged = {
        fqn: tuple(sorted({*first.get(fqn, ()), *second.get(fqn, ())}, reverse=True)[:count])
        for fqn in [*first, *(fqn for fqn in second if fqn not in first)]
    }
    return MappingProxyType(merged)


def room_for(largest: tuple[tuple[int, str], ...], *, blended: bool) -> int:
    """The rank that holds one after the other of these adapters, or all of them at once."""
    ranks = [rank for rank, _ in largest]
    return sum(ranks) if blended else max(ranks, default=0)


def _both(first: SlotShape | None, second: SlotShape | None) -> SlotShape:
    """The larger of two shapes of one slot, with the parts of both."""
    if first is None or second is None:
        known = first or second
        assert known is not None
        return known
    if first.parameter != second.parameter:
        raise UnsupportedError(
            "The two plans have slots for different bare parameters of a module.",
            where=first.fqn,
            found=second.parameter or "no bare parameter",
            expected=f"{first.parameter or 'no bare parameter'}, by the first plan",
            hint="PEFT wants all adapters of a model to have the same target_parameters",
        )
    rank = max(first.rank, second.rank)
    first, second = first.at_rank(rank), second.at_rank(rank)
    if any(first.parts[suffix] != second.parts[suffix] for suffix in first.parts.keys() & second.parts.keys()):
        raise ModelError(
            "The two plans are of different models.",
            where=first.fqn,
            found=dict(second.parts),
            expected=f"{dict(first.parts)}, by the first plan",
            hint="make both from the same model",
        )
    return replace(first, parts={**second.parts, **first.parts})
