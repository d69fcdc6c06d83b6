"""An adapter of another method, or of another form, in the place of one: PEFT's layers are exchanged for others."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from ... import live
from ...attaching import attach
from ...checkpoint import Checkpoint
from ...errors import UnsupportedError
from ...planning import plan
from ...swapper import Swapper

logger = logging.getLogger(__name__)

# Those that the calls have made for adapters that diffusers has loaded, and nobody holds: they yield to each other.
# Others belong to whoever called `attach`.
_own: weakref.WeakSet[Swapper] = weakref.WeakSet()


def attach_own(model: Any, adapter_name: str, **options: Any) -> Swapper:
    """`attach`, for the calls: what it takes is in slots, or in layers, that diffusers' other calls reach.

    Another of their own, for one component, for another pipeline that shares some, or for layers that are gone, has to
    go for it.
    """
    Swapper.make_way(model, adapter_name, yielding=_own)
    swapper = attach(model, adapter_name=adapter_name, route="side", **options)
    _own.add(swapper)
    return swapper


def methods_on(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """What stands before a component's paths → method of the adapter of this name there, if there is one."""
    found = {prefix: live.residents(member).get(adapter_name) for prefix, member in live.roots(model).items()}
    return {prefix: method for prefix, method in found.items() if method is not None}


def methods_of(checkpoint: Checkpoint) -> dict[str, str]:
    """What stands before a component's paths → method of what is for it."""
    return {prefix: str(part.config["peft_type"]) for prefix, part in checkpoint.components.items()}


def can_exchange(swapper: Swapper) -> bool:
    """Whether the layers that it writes may be exchanged: not where users hold it."""
    return swapper in _own


def exchange(
    swapper: Swapper, model: nn.Module, checkpoint: Checkpoint, adapter_name: str, target_rank: int | None
) -> None:
    """Put PEFT's layers of the checkpoint in the place of the adapter's: compiled code compiles once more.

    Checked first, on copies without memory. If it raises, the layers, their values, PEFT's records and the swapper are
    what they were.

    Args:
        swapper: of the adapter's layers; it is detached.
        model: the pipeline's components.
        checkpoint: for one or more of them; the others have none then.
        adapter_name: PEFT's name of the adapter that goes, and of the one that comes.
        target_rank: for which to make room in LoRA layers.

    Raises:
        DoesNotFitError, UnsupportedError: it cannot be put there.
        MergedError, ModelError: the layers cannot be taken off as they are now.
    """
    parts, members = checkpoint.components, live.roots(model)
    methods = methods_of(checkpoint)
    _refuse_mixture(methods, checkpoint)
    of_lora = {*methods.values()} == {"LORA"}
    if not of_lora:
        for prefix, part in parts.items():
            live.refuse_put_on(members[prefix], part)
    touched = [member for prefix, member in members.items() if prefix in methods or live.carries(member, adapter_name)]
    with swapper.superseded() as guarded, live.taken_off(touched, adapter_name) as disable_again:
        place = model
        try:
            if of_lora:
                made = attach_own(place, adapter_name, adapters={adapter_name: checkpoint})
            else:
                ((prefix, part),) = parts.items()
                place = members[prefix]
                live.put_on(place, adapter_name, part)
                made = attach_own(place, adapter_name)
            disable_again()
            if guarded:
                made.guard()
            if of_lora:
                widen(made, target_rank)
                made.activate(adapter_name)
            logger.warning(
                "%r: PEFT's layers are others; what was compiled of the model compiles once more", adapter_name
            )
        except BaseException:
            begun = Swapper.of(place, adapter_name)
            if begun is not None:
                begun.abandon()
            raise


def widen(swapper: Swapper, target_rank: int | None) -> None:
    """Give slots that no compiled code knows yet an arena, and this rank, if it is more than theirs."""
    engine = swapper.engine
    if engine.binding.arena and target_rank is None:
        return
    ranks = engine.binding.room
    if target_rank is not None:
        ranks = plan(engine.model, max_rank=target_rank, adapter_name=engine.adapter_name).ranks
    with engine.gate.swap(), engine.lock:
        engine.resize(ranks, arena=True)


def _refuse_mixture(methods: Mapping[str, str], checkpoint: Checkpoint) -> None:
    if len({*methods.values()}) > 1 or (len(methods) > 1 and {*methods.values()} != {"LORA"}):
        raise UnsupportedError(
            f"{checkpoint.origin} would be live beside an adapter of another method in another component.",
            where=", ".join(prefix.removesuffix(".") for prefix in methods),
            found=f"{', '.join(sorted({*methods.values()}))}, under one name",
            expected="one method in all components, or one component",
            hint="pipe.delete_adapters(…), and load without hotswap",
        )
