"""Where adapters of other ranks and sizes stand in the seat's tensors, and how large those are made for them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Mapping

import torch

from ...checkpoint import PEFT_PREFIX, Checkpoint, Schema
from ...errors import DoesNotFitError, ShapeError, UnsupportedError
from ..leaves import Held, Leaf
from ..padding import at_random, find_placement
from ..room import Placement, Room
from ..skeleton import outline
from .comparing import refuse_other_method
from .fresh import FreshLoads, base_tensors
from .seat import Seat, larger, shape_of


class Placing:
    """What is tried once for a family of adapters, and the shapes that it is tried for.

    Args:
        seat: whose tensors they are.
        fresh: makes the loads that it is tried on.
        room: the tensors' memory.
    """

    def __init__(self, seat: Seat, fresh: FreshLoads, room: Room) -> None:
        self._seat = seat
        self._fresh = fresh
        self._room = room
        self._known: weakref.WeakKeyDictionary[Schema, Placement] = weakref.WeakKeyDictionary()

    def of(self, new: Mapping[str, Leaf], checkpoint: Checkpoint) -> Placement:
        """Where it stands in tensors that are larger than its own.

        Args:
            new: all that a fresh load of it has.
            checkpoint: the adapter.

        Raises:
            ShapeError: its layers do not compute the same there.
        """
        room, seat = self._room_with(new), self._seat
        where = next((path for path, shape in room.items() if shape != shape_of(new[path])), None)
        if where is None:
            return Placement({}, {})
        if checkpoint.schema not in self._known:
            found = self._find(checkpoint, room)
            if isinstance(found, str):
                raise ShapeError(
                    f"{checkpoint.origin} has another rank or size than {seat.name!r} on the model, and its layers do "
                    "not compute the same with zeros around it.",
                    where=where,
                    found=f"{seat.method} of shape {tuple(shape_of(new[where]))}; {found}",
                    expected=f"{tuple(self._room.shapes[where])}, by the adapter on the model",
                    hint=seat.elsewhere,
                )
            self._known[checkpoint.schema] = found
        return self._known[checkpoint.schema]

    def refuse_beyond(self, new: Mapping[str, Leaf], origin: str) -> None:
        """Raise if it is larger than the model's own tensors."""
        own, room = self._room.shapes, self._room_with(new)
        where = next((path for path, shape in room.items() if shape != own[path]), None)
        if where is not None:
            self._of_own(room)
            raise ShapeError(
                f"{origin} is of a larger rank or size than there is room for.",
                where=where,
                found=f"shape {tuple(shape_of(new[where]))}",
                expected=f"at most {tuple(own[where])}, by the adapter {self._seat.name!r} on the model",
                hint="hotslot.attach(model, {…}) with this adapter among them, before torch.compile, makes room for "
                f"it; or {self._seat.elsewhere}",
            )

    def make_room(self, checkpoints: Iterable[Checkpoint]) -> bool:
        """Let each tensor hold what any of these has there. Says whether tensors have moved.

        There is none for what cannot take the seat. If it raises, release the room. No values are needed.

        Raises:
            ModelError: what would be padded is in training.
            ConfigError, TensorError: one of them is no adapter that PEFT loads.
        """
        seat, room, placement = self._seat, self._room.shapes, Placement({}, {})
        families = {checkpoint.schema: checkpoint for checkpoint in checkpoints}.values()
        for checkpoint in sorted(families, key=lambda checkpoint: checkpoint.nbytes, reverse=True):
            with contextlib.suppress(DoesNotFitError, UnsupportedError):
                refuse_other_method(seat, checkpoint)
                empty = outline(seat.model, checkpoint, seat.name) or self._fresh.load(checkpoint, trained=False)
                leaves = seat.leaves(empty)
                wanted = {path: larger(shape, leaves[path]) for path, shape in room.items() if path in leaves}
                if wanted != room and len(wanted) == len(room):
                    room, placement = wanted, self._of_own(wanted)
        if placement.parts:
            self._room.make(room, placement)
        return bool(placement.parts)

    def _room_with(self, new: Mapping[str, Leaf]) -> dict[str, torch.Size]:
        """Path → shape that holds both the model's own tensor and this one."""
        return {path: larger(shape, new[path]) for path, shape in self._room.shapes.items()}

    def _of_own(self, room: Mapping[str, torch.Size]) -> Placement:
        """Where the adapter that is live would stand in `room`, part of which is larger than it has.

        Raises:
            ShapeError: its layers would not compute the same there, or others compute with its tensors.
        """
        seat, own = self._seat, self._room.shapes
        growing = [path for path in room if room[path] != own[path]]
        found = self._shared(growing) or self._find(self._fresh.checkpoint(), room)
        if isinstance(found, str):
            raise ShapeError(
                f"{seat.what} cannot be padded to the rank or size of a larger one.",
                where=growing[0],
                found=f"{seat.method} of shape {tuple(own[growing[0]])}; {found}",
                expected=f"layers that compute the same with zeros around it, up to {tuple(room[growing[0]])}",
                hint=seat.elsewhere,
            )
        return found

    def _shared(self, paths: Iterable[str]) -> str | None:
        """Which of these tensors another adapter of the model computes with, too."""
        held = self._seat.held
        for other in sorted(self._seat.beside):
            theirs = self._seat.tensors_of(other)
            shared = next((path for path in paths if id(held[path].tensor) in theirs), None)
            if shared is not None:
                return f"the adapter {other!r} on the model shares {shared} with it"
        return None

    def _find(self, checkpoint: Checkpoint, room: Mapping[str, torch.Size]) -> Placement | str:
        """See `find_placement`, of tensors of the checkpoint's shapes."""
        own = {PEFT_PREFIX + path for path, _ in base_tensors(self._seat.model)}  # a file may have copies
        skeleton = self._fresh.load(at_random(checkpoint, own))
        leaves = self._seat.leaves(skeleton)
        shapes = {path: room[path] for path, leaf in leaves.items() if isinstance(leaf, Held) and path in room}
        return find_placement(skeleton, leaves, shapes)
