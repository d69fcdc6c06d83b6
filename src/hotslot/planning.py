"""The Plan: which slots a model gets and how much room each has. Made ahead, from adapters or from module names.

Takes a model and what is known of the adapters to come; touches neither. `attach` takes a Plan or makes one, and
`Swapper.grow` takes a larger one later.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from . import live
from .block import Layout, SlotShape, arrange, pack
from .checkpoint import CONFIG_NAME, Checkpoint, Source
from .errors import ModelError, RankError, UnexpectedTargetError
from .methods import Adapter
from .pipelines import listed, whole
from .surveying import survey_all

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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
        """
        if not isinstance(other, Plan):
            return NotImplemented
        max_blend = max(self.max_blend, other.max_blend)
        capped = [plan.max_rank for plan in (self, other) if plan.max_rank is not None]
        largest = _merged(self._largest, other._largest, max_blend)
        slots = {}
        for fqn in [*self.slots, *(fqn for fqn in other.slots if fqn not in self.slots)]:
            shape = _both(self.slots.get(fqn), other.slots.get(fqn))
            rank = max(shape.rank, _room(largest.get(fqn, ()), blended=not capped))
            slots[fqn] = shape.at_rank(rank)
        saved, tied = self.saved | other.saved, MappingProxyType({**self.tied, **other.tied})
        tokens = _most([self.tokens, other.tokens])
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
            slots = {fqn: _with_bias(slot) for fqn, slot in slots.items()}
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


def plan(
    model: Any,
    sources: Source | Iterable[Source] | Mapping[str, Source] | None = None,
    *,
    max_rank: int | None = None,
    target_modules: str | Iterable[str] | None = None,
    max_blend: int = 2,
    dtype: torch.dtype | str | None = None,
    adapter_name: str = "default",
    pristine: str = "device",
    merge: str | None = None,
) -> Plan:
    """Plan slots for adapters, known or to come. Nothing is changed; `attach(model, …, plan=…)` carries it out.

    Every module that one of `sources` targets, that `target_modules` matches, or that carries the adapter already
    gets a slot. Its rank is the sum of the `max_blend` largest that the sources have there, so that any `max_blend` of
    them can be live together: one alone then is copied tensor by tensor into a slot with room to spare, and its
    outputs agree with a fresh load's within rounding. With `max_blend=1`, what `attach` takes without a plan, an
    adapter of the slots' own ranks is one copy and its outputs are the same to the bit.

    Args:
        model: plain, or with PEFT's layers on it, or a diffusers pipeline.
        sources: adapters, by name or without; they are read, and not kept. Or a folder with a folder for each, of which
            headers and configs are read.
        max_rank: the rank of every slot, in place of what the sources have; for one adapter, or for a blend in all.
        target_modules: as `peft.LoraConfig` takes it: endings, a regular expression, or "all-linear". Needs `max_rank`
            where no source says a rank.
        max_blend: how many of the sources may be blended.
        dtype: of the slots: None for what a fresh load gives by PEFT, or of a pipeline by diffusers; "base" for that of
            the base layer; or a torch.dtype.
        adapter_name: PEFT's name of the slots that the model may have already.
        pristine: for what no slot holds, and `route="merged"`: where the base's own values are kept of the weights that
            a loaded adapter is merged into. "device", beside them; "host", in page-locked memory; "file", in the
            model's own safetensors files, which are mapped and compared with what the model holds.
        merge: of LoRA and DoRA on linear layers: "peft" for the bits of PEFT's `merge_and_unload`; "fused" for one pass
            that rounds to the weight's dtype once; None for "fused" where a GPU holds weights of 16 bits, and "peft"
            elsewhere. Blends are fused, other methods PEFT's.

    Raises:
        ValueError: an option that is none of these.
        CheckpointError, UnsupportedError, DoesNotFitError: one of the sources is at fault.
        UnexpectedTargetError: `target_modules` matches nothing.
    """
    model = whole(model)
    gallery = _gallery(model, sources)
    if gallery is None:
        if sources is None or isinstance(sources, (str, os.PathLike, Checkpoint)):
            sources = [sources] if sources is not None else []
        each: Iterable[Any] = sources.values() if isinstance(sources, Mapping) else sources
        gallery = {str(i): source for i, source in enumerate(each)}
        entries = survey_all(model, gallery, "auto").planned
    else:
        entries = survey_all(model, gallery, "auto", lazy=True, of_family=max_blend).planned
    adapters = [entry.adapter for entry in entries if entry.adapter.targets]
    _refuse_bad_choices(pristine, merge)
    merging = bool(entries) or (pristine, merge) != ("device", None)
    if not adapters and target_modules is None and merging:
        return replace(NO_SLOTS, pristine=pristine, merge=merge)
    made = plan_adapters(
        model,
        adapters,
        max_rank=max_rank,
        target_modules=target_modules,
        max_blend=max_blend,
        dtype=dtype,
        adapter_name=adapter_name,
    )
    for adapter in adapters:
        refuse_unfit(model, adapter, made, adapter_name)
    return replace(made, pristine=pristine, merge=merge)


def _gallery(model: nn.Module, sources: Any) -> dict[str, Path] | None:
    """The adapters in a folder, if it is no adapter itself. Of a pipeline's LoRA files diffusers chooses one."""
    if not isinstance(sources, (str, os.PathLike)) or isinstance(model, live.Assembly) or not Path(sources).is_dir():
        return None
    return None if (Path(sources) / CONFIG_NAME).is_file() else listed(model, sources) or None


def plan_adapters(
    model: nn.Module,
    adapters: Iterable[Adapter],
    *,
    max_rank: int | None = None,
    target_modules: str | Iterable[str] | None = None,
    max_blend: int = 2,
    dtype: torch.dtype | str | None = None,
    adapter_name: str = "default",
) -> Plan:
    """`plan` for adapters that have been read; whether each fits is for `refuse_unfit` to say."""
    _refuse_bad_options(max_rank, max_blend, dtype)
    if dtype is None and isinstance(model, live.Assembly):
        dtype = "base"  # which is what a fresh load by diffusers gives
    adapters = [live.as_loaded(model, adapter) for adapter in adapters]
    slots = live.find_slots(model, adapter_name)
    matched = _matched(model, target_modules)
    ranked = {fqn for adapter in adapters for fqn in adapter.targets}
    unranked = [fqn for fqn in matched if fqn not in ranked and fqn not in slots]
    if unranked and max_rank is None:
        raise ValueError(f"target_modules matches {unranked[0]!r}, of which no adapter says a rank: give max_rank=")
    if not (ranked or matched or slots):
        raise ModelError(
            "There is nothing to plan slots for.",
            found=f"adapters on the model: {live.adapter_names(model) or 'none'}",
            hint="plan(model, sources), or plan(model, target_modules=…, max_rank=…)",
        )
    shapes = live.slot_shapes(model, adapters, slots, also=dict.fromkeys([*matched, *slots], 1), dtype=dtype)
    largest: Largest = MappingProxyType({})
    for adapter in adapters:
        version = adapter.checkpoint.version
        own = {fqn: ((target.rank, version),) for fqn, target in adapter.targets.items()}
        largest = _merged(largest, own, max_blend)
    planned = {}
    for fqn, shape in shapes.items():
        floor = slots[fqn].rank if fqn in slots else 1
        rank = max_rank if max_rank is not None else _room(largest.get(fqn, ()), blended=True)
        planned[fqn] = shape.at_rank(-(-max(rank, floor) // shape.groups) * shape.groups)
    if max_blend > 1 and len(adapters) > 1 and any(adapter.lora_bias for adapter in adapters):
        # PEFT's config has one lora_bias for all modules: in a blend with one that has biases, all have.
        planned = {fqn: _with_bias(shape) for fqn, shape in planned.items()}
    saved = frozenset(fqn for adapter in adapters for fqn in adapter.saved)
    tokens, tied = _planned_tokens(model, adapters, adapter_name)
    live.refuse_adapted_and_saved(planned, saved, {*tokens, *tied})
    return Plan(MappingProxyType(planned), max_blend, max_rank, dtype, largest, saved, tokens, tied)


def refuse_unfit(model: nn.Module, adapter: Adapter, plan: Plan, adapter_name: str) -> None:
    """Raise unless the adapter can be loaded once the model has the slots of `plan`."""
    live.refuse_other_base(model, adapter)
    adapter = live.as_loaded(model, adapter)
    live.refuse_other_parameters(model, live.find_slots(model, adapter_name), adapter)
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


def _planned_tokens(
    model: nn.Module, adapters: Iterable[Adapter], adapter_name: str
) -> tuple[Mapping[str, int], Mapping[str, str]]:
    """`Plan.tokens` and `Plan.tied` for these adapters, and for the one that the model has already."""
    own = [
        {fqn: len(tokens.indices) for fqn, tokens in live.own_tokens(model, adapter).items()} for adapter in adapters
    ]
    tokens = _most([live.token_rooms(model, adapter_name), *own])
    tied: dict[str, str] = {}
    for adapter in adapters:
        tied |= live.tied_modules(model, adapter)
    live.refuse_untied(tokens, tied)
    return tokens, MappingProxyType(tied)


def _most(counts: Iterable[Mapping[str, int]]) -> Mapping[str, int]:
    most: dict[str, int] = {}
    for counted in counts:
        most.update((fqn, max(count, most.get(fqn, 0))) for fqn, count in counted.items())
    return MappingProxyType(most)


def _refuse_bad_choices(pristine: Any, merge: Any) -> None:
    if pristine not in live.PRISTINE:
        raise ValueError(f"pristine must be one of {', '.join(map(repr, live.PRISTINE))}, got {pristine!r}")
    if merge not in (None, "peft", "fused"):
        raise ValueError(f"merge must be None, 'peft' or 'fused', got {merge!r}")


def _refuse_bad_options(max_rank: Any, max_blend: Any, dtype: Any) -> None:
    for name, value in (("max_rank", max_rank), ("max_blend", max_blend)):
        if value is None and name == "max_rank":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
    if dtype not in (None, "base", *_DTYPES):
        raise ValueError(f"dtype must be None, 'base' or one of {', '.join(map(str, _DTYPES))}, got {dtype!r}")


def _matched(model: nn.Module, target_modules: str | Iterable[str] | None) -> list[str]:
    if target_modules is None:
        return []
    wanted = target_modules if isinstance(target_modules, str) else list(target_modules)
    matched = live.matching_targets(model, wanted)
    if not matched:
        raise UnexpectedTargetError(
            "target_modules matches no module of the model.",
            where="target_modules",
            found=f"{wanted!r:.200}",
            expected=f"endings of {type(live.unwrap(model)).__name__}'s paths, a regular expression, 'all-linear'",
            hint="print([name for name, _ in model.named_modules()]) shows the paths",
        )
    return matched


def _with_bias(slot: SlotShape) -> SlotShape:
    return slot.with_parts([_BIAS])


def _module_of(slot: SlotShape) -> str:
    """The path of the base module that the slot is on."""
    return slot.fqn.removesuffix(live.OUT_PROJ) if slot.parameter is None else slot.fqn.replace(".base_layer", "")


def _merged(first: Largest, second: Largest, count: int) -> Largest:
    """The `count` largest ranks of each module, those of one adapter once."""
    merged = {
        fqn: tuple(sorted({*first.get(fqn, ()), *second.get(fqn, ())}, reverse=True)[:count])
        for fqn in [*first, *(fqn for fqn in second if fqn not in first)]
    }
    return MappingProxyType(merged)


def _room(largest: tuple[tuple[int, str], ...], *, blended: bool) -> int:
    ranks = [rank for rank, _ in largest]
    return sum(ranks) if blended else max(ranks, default=0)


def _both(first: SlotShape | None, second: SlotShape | None) -> SlotShape:
    """The larger of two shapes of one slot, with the parts of both."""
    if first is None or second is None:
        known = first or second
        assert known is not None
        return known
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
