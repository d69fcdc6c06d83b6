"""Whether a fresh load has what the seat has, but for its values; else it is refused, by the path that differs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...checkpoint import Checkpoint
from ...errors import ShapeError, UnexpectedTargetError, UnsupportedError
from ..leaves import Fact, Held, Leaf, described, same_leaf
from .fresh import FreshLoads
from .seat import Seat, unsupported


def refuse_other_method(seat: Seat, checkpoint: Checkpoint) -> None:
    """Raise unless it is an adapter of the seat's method."""
    origin = checkpoint.origin
    if checkpoint.config.get("peft_type") != seat.method:
        raise UnsupportedError(
            f"{origin} is of another method than the adapter on the model.",
            where="peft_type",
            found=f"{checkpoint.config.get('peft_type')!r:.80}",
            expected=f"{seat.method!r}, as {seat.name!r} on the model",
            hint="route='auto' merges it below an adapter that can be made to do nothing, if there is no other; or "
            f"{seat.calls.unload}, and attach to the base model: a method that merges can follow any other",
        )


def refuse_other_structure(seat: Seat, new: Mapping[str, Leaf], origin: str) -> None:
    """Raise unless both have the same paths, and there the same types and facts, and tensors of as many dimensions."""
    lacking = [path for path in new if path not in seat.state]
    beyond = [path for path in seat.state if path not in new]
    if lacking or beyond:
        raise UnexpectedTargetError(
            f"{origin} has other parts than {seat.name!r} on the model.",
            where=(lacking or beyond)[0],
            found=f"{len(lacking)} parts that the model lacks, {len(beyond)} of the model's that it lacks",
            expected=f"targets and options of {seat.name!r}, whose parts are the places that are written",
            hint=seat.elsewhere,
        )
    for path, leaf in new.items():
        own = seat.state[path]
        if type(leaf) is not type(own) or (isinstance(leaf, Fact) and leaf != own):
            raise unsupported(origin, path, described(leaf), f"{described(own)}, as {seat.name!r} on the model")
        if isinstance(leaf, Held) and isinstance(own, Held):
            _refuse_other_tensor(seat, path, leaf.tensor, own.tensor, origin)


def _refuse_other_tensor(seat: Seat, path: str, new: torch.Tensor, own: torch.Tensor, origin: str) -> None:
    if new.ndim != own.ndim:
        raise ShapeError(
            f"{origin} has other dimensions than {seat.name!r} on the model.",
            where=path,
            found=f"shape {tuple(new.shape)}",
            expected=f"{tuple(own.shape)}, by the adapter on the model",
            hint=seat.elsewhere,
        )
    made_of_nothing = new.is_floating_point() and bool(new.isnan().any())  # of base values that it was not given
    if new.dtype != own.dtype or new.is_meta or own.is_meta or made_of_nothing:
        raise unsupported(origin, path, described(new), f"{described(own)}, as {seat.name!r} on the model")


def refuse_shared(seat: Seat, new: Mapping[str, Leaf], origin: str) -> None:
    """Raise if it would change what other adapters of the model have in common with the seat."""
    for other in sorted(seat.beside):
        shared = seat.tensors_of(other)
        for path, leaf in new.items():
            own = seat.state[path]
            apart = f"[{seat.name!r}]" in path and not (isinstance(own, Held) and id(own.tensor) in shared)
            if not apart and not same_leaf(leaf, own):
                expected = f"what the adapter {other!r} on the model shares with it"
                raise unsupported(origin, path, "another value", expected)


def refuse_unsettled(seat: Seat, fresh: FreshLoads, new: Mapping[str, Leaf], checkpoint: Checkpoint) -> None:
    """Raise if PEFT draws at random what the file does not have: another load has to give the same."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch.default_generator.initial_seed() + 1)
        again = seat.leaves(fresh.load(checkpoint))
    for path, leaf in new.items():
        if not same_leaf(leaf, again[path]):
            raise unsupported(
                checkpoint.origin, path, "random values: its file does not have them", "the same at each load"
            )
