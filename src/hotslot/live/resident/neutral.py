"""Whether the seat's layers do nothing while they are untrained, whatever their base holds: tried, to the bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ...errors import UnsupportedError
from ...methods import NOT_MERGEABLE
from ..absolutes import Merge
from ..merges import merge_once
from ..saved import named_tensors
from ..skeleton import Unit, base_of, input_of, units
from .seat import Seat

if TYPE_CHECKING:
    from peft import PeftModel


def refuse_never_neutral(seat: Seat, merges: Sequence[Merge]) -> None:
    """Raise if the method always does something, or what is merged into the base would be seen by other adapters."""
    if seat.method in NOT_MERGEABLE:
        raise _does_something(seat, NOT_MERGEABLE[seat.method])
    if merges and seat.beside:
        raise UnsupportedError(
            "What is merged into the base weights would change what another adapter on the model computes.",
            where=", ".join(sorted(seat.beside)),
            found=f"{len(seat.beside)} adapters beside {seat.name!r}",
            expected="no other adapter on the model",
            hint="delete the other adapters, or use a model of its own",
        )


def refuse_if_it_does_something(
    seat: Seat, skeleton: PeftModel, own: Mapping[str, torch.Tensor], merges: Sequence[Merge]
) -> None:
    """Raise unless each layer computes what its base does, and merges into that without a change.

    Args:
        seat: for messages.
        skeleton: a fresh load, untrained; its layers are merged.
        own: full name → the base model's own values.
        merges: into those, with which it is to do nothing either.
    """
    merged = _merged(merges, own)
    for unit in units(skeleton):
        _try(seat, unit)
        _try_above(seat, unit, merged)
        for name, _, _, tensor in named_tensors(merge_once(unit.layer)):
            if not torch.equal(tensor, own[f"{unit.fqn}.{name}"]):
                raise _does_something(seat, f"untrained, it changes {unit.fqn}.{name}")


def _try(seat: Seat, unit: Unit) -> None:
    """Raise if the layer's forward is not its base's: some compute what they merge in another way."""
    if _is_copy(unit):
        return
    base = base_of(unit.layer)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        values = input_of(base)
        if values is None or not torch.equal(unit.layer(values), base(values)):
            raise _does_something(seat, f"untrained, {unit.fqn} rounds otherwise than its base layer, or more")


def _try_above(seat: Seat, unit: Unit, merged: Mapping[str, torch.Tensor]) -> None:
    """The same with other values in its base, which is as before afterwards."""
    tensors = {f"{unit.fqn}.{name}": tensor for name, _, _, tensor in named_tensors(base_of(unit.layer))}
    own = {path: tensor.detach().clone() for path, tensor in tensors.items() if path in merged}
    if own and _is_copy(unit):
        reason = f"it has a copy of {unit.fqn}, so that nothing that is merged there would show"
        raise _does_something(seat, reason)
    with torch.no_grad():
        for path in own:
            tensors[path].copy_(merged[path])
        if own:
            _try(seat, unit)
        for path, values in own.items():
            tensors[path].copy_(values)


def _is_copy(unit: Unit) -> bool:
    from peft.utils.other import ModulesToSaveWrapper

    return isinstance(unit.layer, ModulesToSaveWrapper)


def _merged(merges: Sequence[Merge], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Full name → values of the base's tensors once these are merged into `own`."""
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for merge in merges:
            pristine = [own[path] for _, path in merge.keys]
            targets = [torch.empty_like(values) for values in pristine]
            merge.write(targets, pristine)
            found.update(zip((path for _, path in merge.keys), targets, strict=True))
    return found


def _does_something(seat: Seat, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{seat.what} cannot be made to do nothing.",
        where=seat.name,
        found=f"an adapter of {seat.method}: {reason}",
        expected="one that changes no weight as long as it is untrained",
        hint=f"{seat.calls.disable}, at the price of a recompilation",
    )
