"""Whether a loaded adapter fits a slot and a plan; else by which larger plan it would."""

from __future__ import annotations

import contextlib

from . import live
from .engine import Engine
from .entry import Entry
from .errors import DoesNotFitError, RankError, UnexpectedTargetError, UnsupportedError
from .planning import Plan, plan_adapters, refuse_unfit
from .report import Fit


def prepare(engine: Engine, plan: Plan, entry: Entry) -> None:
    """Make an adapter ready for the engine's memory.

    Raises:
        DoesNotFitError: it is for another model; or beyond the plan, and then with the plan that would take it.
        UnsupportedError: it cannot be merged either.
    """
    live.refuse_other_base(engine.model, entry.adapter)
    live.refuse_other_parameters(engine.model, engine.binding.slots, entry.adapter)
    try:
        entry.compile(engine.binding)
    except (RankError, UnexpectedTargetError) as error:
        if not entry.adapter.targets:
            raise
        raise error.within(larger_plan(engine, plan, entry)) from None


def fit(engine: Engine, plan: Plan, entry: Entry) -> Fit:
    """What activating an adapter takes that `prepare` has found to fit."""
    compiled = entry.compile(engine.binding)
    route, merges = compiled.route, compiled.merges
    if not merges.all:
        return Fit(route, entry.adapter.checkpoint.nbytes, None)
    larger = None
    if entry.adapter.targets:
        with contextlib.suppress(DoesNotFitError, UnsupportedError):  # no slots can be added for it
            larger = larger_plan(engine, plan, entry)
    nbytes = merges.nbytes + compiled.nbytes
    pristine = engine.binding.merger.keeping(merges.steps)
    return Fit(route, nbytes, None, larger, merges.nbytes, merges.seconds, merges.error, pristine)


def larger_plan(engine: Engine, plan: Plan, entry: Entry) -> Plan:
    """`plan` with slots for this adapter too."""
    model, name = engine.model, engine.adapter_name
    more = plan_adapters(model, [entry.adapter], max_blend=plan.max_blend, dtype=plan.dtype, adapter_name=name)
    larger = plan | more
    refuse_unfit(model, entry.adapter, larger, name)
    return larger
