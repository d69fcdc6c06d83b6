"""`attach`: from a model and adapters to a Swapper. Everything is checked first, and undone if it fails."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from . import live
from .cache import Cache
from .checkpoint import Source
from .engine import Engine
from .errors import ModelError, RankError, UnexpectedTargetError, UnsupportedError
from .pipelines import listed, whole
from .planning import NO_SLOTS, Plan, plan_adapters, refuse_unfit
from .surveying import Surveyed, survey_all
from .swapper import Swapper
from .watching import Watch


def attach(
    model: Any,
    adapters: Mapping[str, Source] | str | os.PathLike[str] | None = None,
    *,
    adapter_name: str = "default",
    route: str = "auto",
    plan: Plan | None = None,
    fused: bool = False,
    exclusive: bool = False,
    cache: Cache = Cache(),  # noqa: B008  it is frozen
    watch: bool = False,
) -> Swapper:
    """Make a model ready for swaps, in place; nothing is activated, and the model computes what it did.

    On a plain model every module that one of `adapters` targets gets a neutral slot of the largest rank that any of
    them has there: all of them activate later, in any order, without recompilation. On a model that carries PEFT
    LoRA layers named `adapter_name`, those are the slots; their Parameter objects stay, and are padded if need be.
    Beside adapters of other names the new slots are active with those that are; the live ones add up.

    That is room for one adapter at a time, and no more, for a slot of an adapter's own rank is written in one copy
    and computes to the bit what a fresh load does. Blends, adapters to come and other dtypes are a matter of `plan`.

    Args:
        model: any nn.Module, PeftModel, transformers model, or diffusers pipeline; a pipeline of transformers or a
            SentenceTransformer with a model of transformers; best before torch.compile, which else
            compiles once more. Of an adapter that is on a compiled model no parameter moves, and none can be padded.
        adapters: name → source, planned for together and loaded. Or a folder: each folder in it that has an
            adapter_config.json is an adapter of its name, for a pipeline each safetensors file. Of those, and of all
            once `cache` has a budget for host memory, headers and configs are read now, and the values of one of each
            family (of equal header and config); the others' when they are needed.
        adapter_name: PEFT's name of the slot that is written. A model may have several, each with a Swapper.
        route: "side": slots hold adapters, and what they cannot hold is refused; "merged": adapters of any method are
            merged into the base's weights, in place, and a forward pass costs what the base's does; "auto": in slots
            what they can hold, the rest merged.
        plan: of `hotslot.plan`; the adapters must fit it. By default `hotslot.plan(model, adapters, max_blend=1)`.
        fused: whether slots on linear layers compute with fewer passes than PEFT's forward does, where one plain LoRA
            is active and the model is not in training. Outputs agree with a fresh load's within rounding, and no longer
            to the bit; after `deactivate` they are the base's to the bit in eager mode. Hooks on `lora_B` are
            called by PEFT's forward, which then computes.
        exclusive: whether a swap may take it that nobody else writes, moves or replaces single parameters of the slots,
            and look at 16 slots of each part of the model, not at each of hundreds. What is done to all of them
            (`model.to`, an optimizer's step, `load_state_dict`, `delete_adapter`) it still finds, and keeps or
            refuses; a write to others alone is overwritten, and `rollback` does not bring it back. Parameters
            that are not in training share one version counter, so that an optimizer that steps within the backward
            pass is not for them.
        cache: budgets for adapters, such as `hotslot.Cache(device_bytes=1 << 30, host_bytes=8 << 30)`.
        watch: whether to look into the folder `adapters` each second from now on: what is new or changed there is
            loaded, as by `Swapper.load(lazy=True)`; what has gone is unloaded once it is not live.

    Raises:
        CacheFullError: there is no room for adapters given as tensors within `cache`.
        CheckpointError, UnsupportedError, DoesNotFitError: one of the adapters is at fault; the model is untouched.
        ModelError: the model cannot be prepared.
    """
    if route not in ("auto", "side", "merged"):
        raise ValueError(f"route must be 'auto', 'side' or 'merged', got {route!r}")
    _refuse_impossible_name(adapter_name)
    model = whole(model)
    folder = adapters if isinstance(adapters, (str, os.PathLike)) else None
    if folder is None and not _is_named(adapters):
        raise TypeError(f"adapters must be a folder, or a mapping of names to sources, got {adapters!r:.200}")
    if watch and folder is None:
        raise ValueError("watch=True goes with a folder of adapters: attach(model, 'folder/', watch=True)")
    Swapper.make_way(model, adapter_name)
    watching = Watch(model, folder) if watch and folder is not None else None
    sources: Mapping[str, Any] = listed(model, folder) if folder is not None else adapters or {}  # type: ignore[assignment]
    lazy = folder is not None or cache.host_bytes is not None
    if _is_of_another_method(model, adapter_name):
        swapper = _attach_resident(model, sources, adapter_name, route, plan, cache, lazy=lazy)
    else:
        known = survey_all(model, sources, route, lazy=lazy)
        swapper = _attach(model, known, adapter_name, route, plan, cache, fused=fused, exclusive=exclusive)
    if watching is not None:
        watching.start(swapper)
    return swapper


def _attach(
    model: nn.Module,
    known: Surveyed,
    adapter_name: str,
    route: str,
    plan: Plan | None,
    cache: Cache,
    *,
    fused: bool,
    exclusive: bool,
) -> Swapper:
    """`attach` where slots, or the base's weights, take what is activated."""
    entries = known.planned
    compiled = live.is_compiled(model)
    if fused and compiled:
        raise ModelError(
            "The model is compiled already, with PEFT's forward.",
            where="fused=True",
            expected="a model that is not compiled yet",
            hint="attach before torch.compile; or attach without fused=True",
        )
    slots = live.find_slots(model, adapter_name)
    if slots:
        live.refuse_unsupported_resident(model, adapter_name)
    elif not entries and plan is None and route == "side":
        raise ModelError(
            f"The model has no adapter {adapter_name!r}, and there are no adapters to plan slots for.",
            found=f"adapters on the model: {live.adapter_names(model) or 'none'}",
            hint="attach(model, adapters={name: source, …}), or name one of the model's own with adapter_name=",
        )
    made = plan is None
    if plan is None:
        sided = [entry.adapter for entry in entries if entry.adapter.targets]
        plan = NO_SLOTS
        if sided or slots:
            plan = plan_adapters(model, sided, max_blend=1, adapter_name=adapter_name)
    else:
        plan.refuse_other_model(model, slots)
        if compiled:
            _refuse_moves(plan, slots)
    plan = plan.on(slots, resizable=not compiled)
    for entry in entries:
        try:
            refuse_unfit(model, entry.adapter, plan, adapter_name)  # raises here, before anything is touched
        except (RankError, UnexpectedTargetError):
            if made or route == "side":
                raise
    missing = {fqn: shape for fqn, shape in plan.slots.items() if fqn not in slots}
    dropin = Engine.of(model, adapter_name)  # of PEFT's functions, which need no Swapper
    if dropin is not None:
        dropin.release()
    injection = engine = binding = wrapping = swapper = None
    found: dict[str, live.Slot] = {}
    try:
        if missing:
            injection = live.inject(model, adapter_name, missing)
        wrapping = live.wrap(model, adapter_name, plan.saved, plan.tokens, plan.tied)
        found = live.find_slots(model, adapter_name)
        live.stay_on_device(found)
        ranks = {fqn: plan.slots[fqn].rank for fqn in found}
        extra = [(fqn, suffix) for fqn in found for suffix in plan.slots[fqn].parts]
        empty = missing if slots else ()
        binding = live.Binding(
            model,
            adapter_name,
            found,
            ranks,
            arena=not compiled or not slots,  # layers that are new to compiled code may move
            extra=extra,
            empty=empty,
            wrapped=wrapping.fqns,
            tokens=plan.tokens,
            pristine=plan.pristine,
            fused=None if plan.merge is None else plan.merge == "fused",
            fused_forward=fused,
            exclusive=exclusive,
            device_bytes=cache.device_bytes,
        )
        engine = Engine(model, adapter_name, binding, empty=not slots)
        for entry, _ in known.read:
            entry.compile(binding)
        swapper = Swapper(engine, injection, known.read, plan, wrapping, route, cache)
        for name, asked in known.unread.items():
            swapper.load(name, asked, lazy=True)
        return swapper
    except BaseException:
        if swapper is not None:
            swapper.detach()
            raise
        if engine is not None:
            engine.release()
        elif binding is not None:
            binding.release()
        live.let_be_offloaded(found)
        if wrapping is not None:
            live.unwrap_saved(wrapping)
        if injection is not None:
            live.remove(injection)
        raise


def _is_of_another_method(model: nn.Module, adapter_name: str) -> bool:
    """Whether the adapter on the model is none of LoRA's.

    Raises:
        UnsupportedError: another adapter is, which would go on adding to whatever is put into slots or base weights.
    """
    methods = live.residents(model)
    if methods.get(adapter_name, "LORA") != "LORA":
        return True
    beside = next((name for name, method in methods.items() if method != "LORA"), None)
    if beside is not None:
        raise UnsupportedError(
            f"The model carries an adapter of {methods[beside]}, which would stay active beside what is swapped in.",
            where=beside,
            found=f"adapters on the model: {methods}",
            expected="LoRA adapters, or no adapter",
            hint=f"attach(model, adapter_name={beside!r}) swaps adapters of that method; for any other: "
            f"{live.calls_of(model).unload}",
        )
    return False


def _attach_resident(
    model: nn.Module,
    adapters: Mapping[str, Source],
    adapter_name: str,
    route: str,
    plan: Plan | None,
    cache: Cache,
    *,
    lazy: bool,
) -> Swapper:
    """`attach` where the adapter on the model is of a method without slots: others of that method take its place.

    With "auto" what cannot is merged, with "merged" all are, and the adapter's layers do nothing meanwhile.
    """
    method = live.residents(model)[adapter_name]
    if isinstance(model, live.Assembly):
        raise UnsupportedError(
            f"A component of the pipeline carries an adapter of {method}, which would stay active beside others.",
            where=next(
                name.rstrip(".") for name, part in live.roots(model).items() if live.residents(part).get(adapter_name)
            ),
            found=f"{adapter_name!r}, an adapter of {method}",
            expected="LoRA adapters, or no adapter",
            hint="attach to that component swaps adapters of the method; pipe.delete_adapters(…) first for any other",
        )
    plan = plan or NO_SLOTS
    if plan.slots:
        raise UnsupportedError(
            f"The model carries an adapter of {method}, beside which there are no slots.",
            where=adapter_name,
            found=f"a plan of {len(plan.slots)} slots",
            expected="no plan, or one that says how to merge: hotslot.plan(model, pristine=…, merge=…)",
            hint="attach(model) without a plan; or attach to the base model: " + live.calls_of(model).unload,
        )
    live.refuse_offloaded(model)
    way = {"side": "resident", "auto": "resident+merged", "merged": "merged"}[route]
    known = survey_all(model, adapters, way, lazy=lazy)
    arena = not live.is_compiled(model)
    binding = live.Binding(
        model,
        adapter_name,
        {},
        {},
        arena=arena,
        resident=True,
        pristine=plan.pristine,
        fused=None if plan.merge is None else plan.merge == "fused",
    )
    resident, engine, swapper = binding.resident, None, None
    assert resident is not None
    try:
        if known.planned:
            resident.refuse_if_merged()  # which a load below would find, and `detach` then too
        if arena and route != "merged":
            resident.make_room(entry.adapter.checkpoint for entry in known.planned)
        engine = Engine(model, adapter_name, binding, empty=False)
        for entry, _ in known.read:
            entry.compile(binding)
        swapper = Swapper(engine, None, known.read, plan, None, way, cache)
        for name, asked in known.unread.items():
            swapper.load(name, asked, lazy=True)
        return swapper
    except BaseException:
        if swapper is not None:
            swapper.detach()
            raise
        (engine or binding).release()
        raise


def _is_named(adapters: Any) -> bool:
    return adapters is None or (isinstance(adapters, Mapping) and all(isinstance(name, str) for name in adapters))


def _refuse_impossible_name(adapter_name: str) -> None:
    """PEFT's layers keep adapters in a ModuleDict, which has no place for names with a dot, nor for `keys`."""
    try:
        nn.ModuleDict({adapter_name: nn.Identity()})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"adapter_name must be one that torch.nn.ModuleDict takes, got {adapter_name!r}: {error.args[0]}"
        ) from None


def _refuse_moves(plan: Plan, slots: Mapping[str, live.Slot]) -> None:
    small = [fqn for fqn, slot in slots.items() if fqn in plan.slots and slot.rank < plan.slots[fqn].rank]
    if small:
        raise ModelError(
            "The model is compiled already, and the plan has more room than its slots.",
            where=small[0],
            found=f"rank {slots[small[0]].rank}, and {len(small) - 1} more slots like it",
            expected=f"rank {plan.slots[small[0]].rank} by the plan, without moving a parameter",
            hint="attach before torch.compile; or attach without the plan, and swapper.grow(plan) at one recompilation",
        )
