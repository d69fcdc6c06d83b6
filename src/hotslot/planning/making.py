"""Making a plan: from adapters that are read for it, or from module names and a rank."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from .. import live
from ..checkpoint import CONFIG_NAME, Checkpoint, Source
from ..errors import ModelError, UnexpectedTargetError
from ..methods import Adapter
from ..pipelines import listed, whole
from ..surveying import survey_all
from .plans import NO_SLOTS, Largest, Plan, largest_of, most, refuse_unfit, room_for, with_bias

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        largest = largest_of(largest, own, max_blend)
    planned = {}
    for fqn, shape in shapes.items():
        floor = slots[fqn].rank if fqn in slots else 1
        rank = max_rank if max_rank is not None else room_for(largest.get(fqn, ()), blended=True)
        planned[fqn] = shape.at_rank(-(-max(rank, floor) // shape.groups) * shape.groups)
    if max_blend > 1 and len(adapters) > 1 and any(adapter.lora_bias for adapter in adapters):
        # PEFT's config has one lora_bias for all modules: in a blend with one that has biases, all have.
        planned = {fqn: with_bias(shape) for fqn, shape in planned.items()}
    saved = frozenset(fqn for adapter in adapters for fqn in adapter.saved)
    tokens, tied = _planned_tokens(model, adapters, adapter_name)
    live.refuse_adapted_and_saved(planned, saved, {*tokens, *tied})
    return Plan(MappingProxyType(planned), max_blend, max_rank, dtype, largest, saved, tokens, tied)


def _planned_tokens(
    model: nn.Module, adapters: Iterable[Adapter], adapter_name: str
) -> tuple[Mapping[str, int], Mapping[str, str]]:
    """`Plan.tokens` and `Plan.tied` for these adapters, and for the one that the model has already."""
    own = [
        {fqn: len(tokens.indices) for fqn, tokens in live.own_tokens(model, adapter).items()} for adapter in adapters
    ]
    tokens = most([live.token_rooms(model, adapter_name), *own])
    tied: dict[str, str] = {}
    for adapter in adapters:
        tied |= live.tied_modules(model, adapter)
    live.refuse_untied(tokens, tied)
    return tokens, MappingProxyType(tied)


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
