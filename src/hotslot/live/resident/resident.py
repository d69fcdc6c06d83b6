"""The adapter that came with the model, of whatever method, and what is live in its place."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...checkpoint import Checkpoint, Schema
from ...errors import MergedError, ModelError, UnsupportedError
from ..absolutes import Absolutes, Key, Merge
from ..discover import innermost, unwrap
from ..leaves import Leaf, Plain
from ..room import Room
from ..state import Records, peft_config, unused_columns
from .comparing import refuse_other_method, refuse_other_structure, refuse_shared, refuse_unsettled
from .fresh import FreshLoads
from .neutral import refuse_if_it_does_something, refuse_never_neutral
from .placing import Placing
from .seat import Seat, larger

if TYPE_CHECKING:
    from peft import PeftModel


class Resident:
    """The state of one adapter name on one model, of whatever method.

    Args:
        model: the model.
        adapter_name: PEFT's name.
        absolutes: takes in the adapter's tensors: "the model's own values" are those of the adapter that came with it.

    Raises:
        UnsupportedError: it keeps something that cannot be taken back.
    """

    def __init__(self, model: nn.Module, adapter_name: str, absolutes: Absolutes) -> None:
        self._absolutes = absolutes
        self._seat = Seat(model, adapter_name)
        modules = dict(innermost(model).named_modules())
        self._layers: dict[str, Any] = {
            name: module for name, module in modules.items() if hasattr(module, "merged_adapters")
        }
        self._places = [(modules[name.rpartition(".")[0]]._modules, name) for name in self._layers]
        self._plain = Plain(self._seat.state)
        held = self._seat.held
        self._keys: dict[str, Key] = {path: ("", path) for path in held}
        absolutes.hold({self._keys[path]: (leaf.holder, leaf.key) for path, leaf in held.items()})
        self._room = Room(unwrap(model), self._seat.state)
        self._fresh = FreshLoads(self._seat, absolutes)
        self._placing = Placing(self._seat, self._fresh, self._room)
        self._settled: weakref.WeakSet[Schema] = weakref.WeakSet()

    @property
    def method(self) -> str:
        """Of the adapter that came with the model."""
        return self._seat.method

    @property
    def beside(self) -> frozenset[str]:
        """Names of the other adapters that the model has now."""
        return self._seat.beside

    # -- a swap ------------------------------------------------------------------------------------------------------

    def capture(self) -> tuple[Any, ...]:
        """The plain values as they are now, for `apply`, and how much of its tensors the live adapter fills."""
        return self._plain.read(), self._room.extents.parts

    def apply(self, plain: tuple[Any, ...]) -> None:
        """Write what `capture` or `fit` has given. Plain values that are there already stay the same objects."""
        values, self._room.extents.parts = plain
        self._plain.write(values)

    def refuse_if_merged(self) -> None:
        """Raise if the adapter is merged into the base weights: a swap would leave it there."""
        name = self._seat.name
        for fqn, layer in self._layers.items():
            if name in layer.merged_adapters:
                raise MergedError(
                    f"Cannot hot-swap adapter '{name}' because it is currently merged into the base weights.",
                    where=fqn,
                    hint=f"unmerge it first: {self._seat.calls.unmerge}",
                )

    def refuse_if_taken_out(self) -> None:
        """Raise if a layer of the adapter is no longer in the model: a swap would write where nobody looks."""
        for siblings, name in self._places:
            found = siblings.get(name.rpartition(".")[2])
            layer = self._layers[name]
            if found is not layer and (found is None or unwrap(found) is not layer):
                raise ModelError(
                    f"The layers of adapter {self._seat.name!r} were taken out of the model, or put into others.",
                    where=name,
                    found="nothing" if found is None else f"a {type(found).__name__}",
                    expected=f"the layer of {self.method} that was there at attach",
                    hint="attach again",
                )

    def refuse_to_grow(self) -> None:
        """Raise: what is there has the shapes that it has."""
        raise UnsupportedError(
            f"{self._seat.what} has no slots that could grow.",
            where=self._seat.name,
            found=f"an adapter of {self.method}",
            expected="a LoRA, or a base model without a PEFT adapter on it",
            hint=f"attach to the base model: {self._seat.calls.unload}",
        )

    # -- memory ------------------------------------------------------------------------------------------------------

    def make_room(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Let each tensor hold what any of these has there; before anything is fitted, and not on a compiled model.

        There is none for what cannot take the adapter's place, of which `fit` says why. If it raises, `release`.

        Raises:
            ModelError: what would be padded is in training.
            ConfigError, TensorError: one of them is no adapter that PEFT loads.
        """
        if self._placing.make_room(checkpoints):
            self._absolutes.mark_clean()

    def release(self) -> None:
        """Give the adapter's tensors their own memory and shapes back, holding what they hold now."""
        self._room.release()

    # -- what is to be live ------------------------------------------------------------------------------------------

    def fit(self, checkpoint: Checkpoint) -> tuple[dict[Key, torch.Tensor], Records]:
        """All that the model has to hold to be a fresh load of the checkpoint: tensors by site, and records.

        Raises:
            MergedError: an adapter is merged into the base weights, which the method may look at.
            ModelError: the adapter's layers were taken out of the model.
            ConfigError, TensorError, DoesNotFitError, UnsupportedError: it cannot, and where.
        """
        self.refuse_if_taken_out()
        self.refuse_if_merged()
        refuse_other_method(self._seat, checkpoint)
        skeleton = self._fresh.load(checkpoint)
        new = self._seat.leaves(skeleton)
        fitted = self._fitted(skeleton, new, checkpoint)
        self._take_in_biases(skeleton, checkpoint, fitted[0])
        if checkpoint.schema not in self._settled:
            refuse_unsettled(self._seat, self._fresh, new, checkpoint)
            self._settled.add(checkpoint.schema)
        self._placing.refuse_beyond(new, checkpoint.origin)
        return fitted

    def fit_neutral(self, merges: Sequence[Merge] = ()) -> tuple[dict[Key, torch.Tensor], Records]:
        """As `fit`, of the adapter as it was before any training, if the base model computes with it what it does.

        Args:
            merges: into the base weights, with which it is to do nothing either.

        Raises:
            UnsupportedError: it does something, or whether it does cannot be seen.
        """
        self.refuse_if_taken_out()
        self.refuse_if_merged()
        self._absolutes.refuse_without((), "The base model")
        refuse_never_neutral(self._seat, merges)
        checkpoint = self._fresh.checkpoint()
        skeleton = self._fresh.load(checkpoint, trained=False)
        own = self._fresh.own()
        fitted = self._fitted(skeleton, self._seat.leaves(skeleton), checkpoint, trained=False)
        refuse_if_it_does_something(self._seat, skeleton, own, merges)
        return fitted

    def _fitted(
        self, skeleton: PeftModel, new: Mapping[str, Leaf], checkpoint: Checkpoint, *, trained: bool = True
    ) -> tuple[dict[Key, torch.Tensor], Records]:
        refuse_other_structure(self._seat, new, checkpoint.origin)
        refuse_shared(self._seat, new, checkpoint.origin)
        placement = self._placing.of(new, checkpoint)
        plain = self._plain.read_from(new, placement.numbers), placement.parts
        values = self._fresh.values(skeleton, new, self._keys, checkpoint if trained else None)
        for path, part in placement.parts.items():
            if not part.in_corner:  # where those that are smaller are written
                key = self._keys[path]
                values[key] = part.padded(values[key], larger(self._room.shapes[path], new[path]))
        config = dict(vars(peft_config(skeleton, self._seat.name)))
        return values, Records(unused_columns({}), {"": config}, plain)

    def _take_in_biases(self, skeleton: PeftModel, given: Checkpoint, values: Mapping[Key, torch.Tensor]) -> None:
        """Make sites of the base's biases that it has values for; those that are live and not its own have to go."""
        biases, origin = self._fresh.biases(skeleton, given).keys(), given.origin
        self._absolutes.refuse_without(biases, origin)
        self._absolutes.take_in_biases([path.removesuffix(".bias") for path in biases], origin)
        if biases:
            self._absolutes.refuse_torn(values, origin)
