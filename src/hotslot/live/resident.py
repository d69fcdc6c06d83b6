"""An adapter of any PEFT method that is on the model, and others of its method that are to take its place.

Nothing here knows a method. What PEFT keeps of an adapter is whatever a fresh load of it has in the modules that are
not the base model's own. If the model has the same, name by name, type by type, shape by shape, then with the fresh
load's tensors and numbers in them it is that fresh load.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checkpoint import PEFT_PREFIX, Checkpoint, Schema, config_dict, from_tensors
from ..errors import DoesNotFitError, MergedError, ModelError, ShapeError, UnexpectedTargetError, UnsupportedError
from ..methods import NOT_MERGEABLE
from .absolutes import Absolutes, Key, Merge
from .calls import Calls, calls_of
from .discover import callable_roots, innermost, roots, unwrap
from .leaves import Fact, Held, Leaf, Plain, described, leaves_of, same_leaf
from .merges import merge_once
from .padding import at_random, find_placement
from .room import Placement, Room
from .saved import named_tensors
from .skeleton import Unit, base_of, base_tree, input_of, load, outline, units
from .state import Records, peft_config, unused_columns

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


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
        self._model = weakref.ref(unwrap(model))
        self._name = adapter_name
        self._absolutes = absolutes
        self.method = method_of(peft_config(model, adapter_name))
        if self.method == "XLORA":
            found = "XLORA, whose file lacks a layer of its classifier, and whose experts are in files of their own"
            raise _unsupported(self._what, "peft_type", found, "another method")
        self._bare = len(callable_roots(model)) == 1
        self._state = leaves_of(model, adapter_name, bare=self._bare)
        modules = dict(innermost(model).named_modules())
        self._layers: dict[str, Any] = {
            name: module for name, module in modules.items() if hasattr(module, "merged_adapters")
        }
        self._places = [(modules[name.rpartition(".")[0]]._modules, name) for name in self._layers]
        self._plain = Plain(self._state)
        self._keys = self._take_in()
        self._room = Room(unwrap(model), self._state)
        self._settled: weakref.WeakSet[Schema] = weakref.WeakSet()
        self._placements: weakref.WeakKeyDictionary[Schema, Placement] = weakref.WeakKeyDictionary()

    def _take_in(self) -> dict[str, Key]:
        """Path → key of the site of each tensor."""
        keys: dict[str, Key] = {path: ("", path) for path in self._held}
        for path, leaf in self._held.items():
            if not isinstance(leaf.holder, dict):
                raise _unsupported(self._what, path, "a tensor in a list", "tensors that have a name")
        self._absolutes.hold({keys[path]: (leaf.holder, leaf.key) for path, leaf in self._held.items()})
        return keys

    @property
    def _held(self) -> dict[str, Held]:
        return {path: leaf for path, leaf in self._state.items() if isinstance(leaf, Held)}

    @property
    def _what(self) -> str:
        return f"The adapter {self._name!r} on the model"

    @property
    def _elsewhere(self) -> str:
        if self.method in NOT_MERGEABLE:
            return "put such an adapter on the model with PeftModel.from_pretrained, and attach to that"
        return f"{self._calls.unload}, and attach to the base model: there adapters are merged, whatever their shapes"

    @property
    def _calls(self) -> Calls:
        model = self._model()
        assert model is not None
        return calls_of(model)

    @property
    def beside(self) -> frozenset[str]:
        """Names of the other adapters that the model has now."""
        model = self._model()
        return frozenset(residents(model) if model is not None else ()) - {self._name}

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
        for name, layer in self._layers.items():
            if self._name in layer.merged_adapters:
                raise MergedError(
                    f"Cannot hot-swap adapter '{self._name}' because it is currently merged into the base weights.",
                    where=name,
                    hint=f"unmerge it first: {self._calls.unmerge}",
                )

    def refuse_if_taken_out(self) -> None:
        """Raise if a layer of the adapter is no longer in the model: a swap would write where nobody looks."""
        for siblings, name in self._places:
            found = siblings.get(name.rpartition(".")[2])
            layer = self._layers[name]
            if found is not layer and (found is None or unwrap(found) is not layer):
                raise ModelError(
                    f"The layers of adapter {self._name!r} were taken out of the model (unload, merge_and_unload).",
                    where=name,
                    expected=f"the layer of {self.method} that was there at attach",
                    hint="attach again",
                )

    def refuse_to_grow(self) -> None:
        """Raise: what is there has the shapes that it has."""
        raise UnsupportedError(
            f"{self._what} has no slots that could grow.",
            where=self._name,
            found=f"an adapter of {self.method}",
            expected="a LoRA, or a base model without a PEFT adapter on it",
            hint=f"attach to the base model: {self._calls.unload}",
        )

    # -- what is to be live ------------------------------------------------------------------------------------------

    def fit(self, checkpoint: Checkpoint) -> tuple[dict[Key, torch.Tensor], Records]:
        """All that the model has to hold to be a fresh load of the checkpoint: tensors by site, and records.

        Raises:
            MergedError: an adapter is merged into the base weights, which the method may look at.
            ModelError: the adapter's layers were taken out of the model.
            ConfigError, TensorError, DoesNotFitError, UnsupportedError: it cannot, and where.
        """
        model = self._model()
        assert model is not None
        self.refuse_if_taken_out()
        self.refuse_if_merged()
        self._refuse_other_method(checkpoint)
        skeleton = self._load(model, checkpoint)
        new = leaves_of(skeleton, self._name, bare=self._bare)
        fitted = self._fitted(skeleton, new, model, checkpoint)
        self._take_in_biases(skeleton, checkpoint, fitted[0])
        if checkpoint.schema not in self._settled:
            self._refuse_unsettled(new, model, checkpoint)
            self._settled.add(checkpoint.schema)
        self._refuse_beyond(new, model, checkpoint.origin)
        return fitted

    def make_room(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Let each tensor hold what any of these has there; before anything is fitted, and not on a compiled model.

        There is none for what cannot take the adapter's place, of which `fit` says why. If it raises, `release`.

        Raises:
            ModelError: what would be padded is in training.
            ConfigError, TensorError: one of them is no adapter that PEFT loads.
        """
        model = self._model()
        assert model is not None
        room, placement = self._room.shapes, Placement({}, {})
        families = {checkpoint.schema: checkpoint for checkpoint in checkpoints}.values()
        for checkpoint in sorted(families, key=lambda checkpoint: checkpoint.nbytes, reverse=True):
            with contextlib.suppress(DoesNotFitError, UnsupportedError):
                self._refuse_other_method(checkpoint)
                skeleton = outline(model, checkpoint, self._name) or self._load(model, checkpoint)
                leaves = leaves_of(skeleton, self._name, bare=self._bare)
                larger = {path: _larger(shape, leaves[path]) for path, shape in room.items() if path in leaves}
                if larger != room and len(larger) == len(room):
                    room, placement = larger, self._placement_of_own(larger, model)
        if placement.parts:
            self._room.make(room, placement)
            self._absolutes.mark_clean()

    def _shared(self, paths: Iterable[str], model: nn.Module) -> str | None:
        """Which of these tensors another adapter of the model computes with, too."""
        for other in sorted(self.beside):
            leaves = leaves_of(model, other, bare=self._bare).values()
            theirs = {id(leaf.tensor) for leaf in leaves if isinstance(leaf, Held)}
            shared = next((path for path in paths if id(self._held[path].tensor) in theirs), None)
            if shared is not None:
                return f"the adapter {other!r} on the model shares {shared} with it"
        return None

    def release(self) -> None:
        """Give the adapter's tensors their own memory and shapes back, holding what they hold now."""
        self._room.release()

    def fit_neutral(self, merges: Sequence[Merge] = ()) -> tuple[dict[Key, torch.Tensor], Records]:
        """As `fit`, of the adapter as it was before any training, if the base model computes with it what it does.

        Args:
            merges: into the base weights, with which it is to do nothing either.

        Raises:
            UnsupportedError: it does something, or whether it does cannot be seen.
        """
        model = self._model()
        assert model is not None
        self.refuse_if_taken_out()
        self.refuse_if_merged()
        self._absolutes.refuse_without((), "The base model")
        if self.method in NOT_MERGEABLE:
            raise self._does_something(NOT_MERGEABLE[self.method])
        if merges and self.beside:
            raise UnsupportedError(
                "What is merged into the base weights would change what another adapter on the model computes.",
                where=", ".join(sorted(self.beside)),
                found=f"{len(self.beside)} adapters beside {self._name!r}",
                expected="no other adapter on the model",
                hint="delete the other adapters, or use a model of its own",
            )
        checkpoint = self._checkpoint(model)
        skeleton = self._load(model, checkpoint, trained=False)
        new, own = leaves_of(skeleton, self._name, bare=self._bare), self._own(model)
        fitted = self._fitted(skeleton, new, model, checkpoint, trained=False)
        merged = _merged(merges, own)
        for unit in units(skeleton):
            self._try_to_do_nothing(unit)
            self._try_to_do_nothing_above(unit, merged)
            for name, _, _, tensor in named_tensors(merge_once(unit.layer)):
                if not torch.equal(tensor, own[f"{unit.fqn}.{name}"]):
                    raise self._does_something(f"untrained, it changes {unit.fqn}.{name}")
        return fitted

    def _checkpoint(self, model: nn.Module) -> Checkpoint:
        """What is live, as PEFT would save it."""
        config = config_dict(peft_config(model, self._name))
        saved = _saved(model, self._name)
        if self._bare:  # without a PeftModel around the model, whose name PEFT's files have
            saved = {PEFT_PREFIX + name: value for name, value in saved.items()}
        return from_tensors(saved, config, origin=self._what)

    def _try_to_do_nothing(self, unit: Unit) -> None:
        """Raise if the layer's forward is not its base's: some compute what they merge in another way."""
        from peft.utils.other import ModulesToSaveWrapper

        if isinstance(unit.layer, ModulesToSaveWrapper):
            return
        base = base_of(unit.layer)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            values = input_of(base)
            if values is None or not torch.equal(unit.layer(values), base(values)):
                raise self._does_something(f"untrained, {unit.fqn} rounds otherwise than its base layer, or more")

    def _try_to_do_nothing_above(self, unit: Unit, merged: Mapping[str, torch.Tensor]) -> None:
        """The same with other values in its base, which is as before afterwards."""
        from peft.utils.other import ModulesToSaveWrapper

        tensors = {f"{unit.fqn}.{name}": tensor for name, _, _, tensor in named_tensors(base_of(unit.layer))}
        own = {path: tensor.detach().clone() for path, tensor in tensors.items() if path in merged}
        if own and isinstance(unit.layer, ModulesToSaveWrapper):
            raise self._does_something(f"it has a copy of {unit.fqn}, so that nothing that is merged there would show")
        with torch.no_grad():
            for path in own:
                tensors[path].copy_(merged[path])
            if own:
                self._try_to_do_nothing(unit)
            for path, values in own.items():
                tensors[path].copy_(values)

    def _does_something(self, reason: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self._what} cannot be made to do nothing.",
            where=self._name,
            found=f"an adapter of {self.method}: {reason}",
            expected="one that changes no weight as long as it is untrained",
            hint=f"{self._calls.disable}, at the price of a recompilation",
        )

    def _fitted(
        self,
        skeleton: nn.Module,
        new: Mapping[str, Leaf],
        model: nn.Module,
        checkpoint: Checkpoint,
        *,
        trained: bool = True,
    ) -> tuple[dict[Key, torch.Tensor], Records]:
        self._refuse_other_structure(new, checkpoint.origin)
        self._refuse_shared(new, model, checkpoint.origin)
        placement = self._placement(new, model, checkpoint)
        plain = self._plain.read_from(new, placement.numbers), placement.parts
        values = self._values(skeleton, new, checkpoint if trained else None)
        for path, part in placement.parts.items():
            if not part.in_corner:  # where those that are smaller are written
                key = self._keys[path]
                values[key] = part.padded(values[key], _larger(self._room.shapes[path], new[path]))
        return values, Records(unused_columns({}), {"": dict(vars(peft_config(skeleton, self._name)))}, plain)

    def _values(
        self, skeleton: nn.Module, new: Mapping[str, Leaf], given: Checkpoint | None
    ) -> dict[Key, torch.Tensor]:
        """What each tensor is to hold: views of the checkpoint's bytes where PEFT has taken those as they are."""
        tensors = {self._keys[path]: leaf.tensor.detach() for path, leaf in new.items() if isinstance(leaf, Held)}
        names: dict[int, str] = {}
        if given is not None:
            tensors |= {("", path): tensor for path, tensor in self._biases(skeleton, given).items()}
            saved = _saved(skeleton, self._name)
            names = {tensor.data_ptr(): name for name, tensor in saved.items() if name in given.tensors}
        values = {}
        for key, tensor in tensors.items():
            name = names.get(tensor.data_ptr())
            in_file = given.tensor(name) if given is not None and name is not None else None
            taken = in_file is not None and torch.equal(in_file.to(tensor), tensor)
            values[key] = in_file if in_file is not None and taken else tensor.cpu().clone()
        return values

    def _biases(self, skeleton: nn.Module, given: Checkpoint) -> dict[str, torch.Tensor]:
        """Full name → values, of the base's biases that the checkpoint has in the place of the model's own."""
        if not _has_biases(given.config):
            return {}
        # Which those are, PEFT is asked. In the file some have other names, by the layers that PEFT has put around.
        carried = {tensor.data_ptr() for tensor in _saved(skeleton, self._name).values()}
        return {
            path: tensor
            for path, tensor in _base_tensors(skeleton)
            if path.rpartition(".")[2] == "bias" and tensor.data_ptr() in carried
        }

    def _take_in_biases(self, skeleton: nn.Module, given: Checkpoint, values: Mapping[Key, torch.Tensor]) -> None:
        """Make sites of the base's biases that it has values for; those that are live and not its own have to go."""
        biases, origin = self._biases(skeleton, given).keys(), given.origin
        self._absolutes.refuse_without(biases, origin)
        self._absolutes.take_in_biases([path.removesuffix(".bias") for path in biases], origin)
        if biases:
            self._absolutes.refuse_torn(values, origin)

    def _own(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Full name → the base model's own values, of all its tensors; an adapter's may be live in their place."""
        return {path: self._absolutes.own(("", path), tensor) for path, tensor in _base_tensors(model)}

    def _load(self, model: nn.Module, checkpoint: Checkpoint, *, trained: bool = True) -> PeftModel:
        own = self._own(model)
        skeleton = load(model, checkpoint, own.__getitem__, adapter_name=self._name, on_device=True, trained=trained)
        biases = self._biases(skeleton, checkpoint)
        for path, tensor in _base_tensors(skeleton):
            if path in biases or tensor.is_meta or tensor.untyped_storage().nbytes() < tensor.nbytes:
                continue  # they are its own, or PEFT did not look at it
            if path not in own or not torch.equal(tensor, own[path]):
                raise _unsupported(
                    checkpoint.origin, path, "other base weights, which PEFT has made on loading it", "the model's own"
                )
        return skeleton

    def _refuse_other_method(self, checkpoint: Checkpoint) -> None:
        origin = checkpoint.origin
        if checkpoint.config.get("peft_type") != self.method:
            raise UnsupportedError(
                f"{origin} is of another method than the adapter on the model.",
                where="peft_type",
                found=f"{checkpoint.config.get('peft_type')!r:.80}",
                expected=f"{self.method!r}, as {self._name!r} on the model",
                hint="route='auto' merges it below an adapter that can be made to do nothing, if there is no other; or "
                f"{self._calls.unload}, and attach to the base model: a method that merges can follow any other",
            )

    def _refuse_other_structure(self, new: Mapping[str, Leaf], origin: str) -> None:
        lacking = [path for path in new if path not in self._state]
        beyond = [path for path in self._state if path not in new]
        if lacking or beyond:
            raise UnexpectedTargetError(
                f"{origin} has other parts than {self._name!r} on the model.",
                where=(lacking or beyond)[0],
                found=f"{len(lacking)} parts that the model lacks, {len(beyond)} of the model's that it lacks",
                expected=f"targets and options of {self._name!r}, whose parts are the places that are written",
                hint=self._elsewhere,
            )
        for path, leaf in new.items():
            own = self._state[path]
            if type(leaf) is not type(own) or (isinstance(leaf, Fact) and leaf != own):
                raise _unsupported(origin, path, described(leaf), f"{described(own)}, as {self._name!r} on the model")
            if isinstance(leaf, Held) and isinstance(own, Held):
                self._refuse_other_tensor(path, leaf.tensor, own.tensor, origin)

    def _refuse_other_tensor(self, path: str, new: torch.Tensor, own: torch.Tensor, origin: str) -> None:
        if new.ndim != own.ndim:
            raise ShapeError(
                f"{origin} has other dimensions than {self._name!r} on the model.",
                where=path,
                found=f"shape {tuple(new.shape)}",
                expected=f"{tuple(own.shape)}, by the adapter on the model",
                hint=self._elsewhere,
            )
        made_of_nothing = new.is_floating_point() and bool(new.isnan().any())  # of base values that it was not given
        if new.dtype != own.dtype or new.is_meta or own.is_meta or made_of_nothing:
            raise _unsupported(origin, path, described(new), f"{described(own)}, as {self._name!r} on the model")

    def _refuse_shared(self, new: Mapping[str, Leaf], model: nn.Module, origin: str) -> None:
        """Raise if it would change what other adapters of the model have in common with it."""
        for other in sorted(self.beside):
            leaves = leaves_of(model, other, bare=self._bare).values()
            shared = {id(leaf.tensor) for leaf in leaves if isinstance(leaf, Held)}
            for path, leaf in new.items():
                own = self._state[path]
                apart = f"[{self._name!r}]" in path and not (isinstance(own, Held) and id(own.tensor) in shared)
                if not apart and not same_leaf(leaf, own):
                    raise _unsupported(
                        origin, path, "another value", f"what the adapter {other!r} on the model shares with it"
                    )

    def _refuse_unsettled(self, new: Mapping[str, Leaf], model: nn.Module, checkpoint: Checkpoint) -> None:
        """Raise if PEFT draws at random what the file does not have: found out once for a family of adapters."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(torch.default_generator.initial_seed() + 1)
            again = leaves_of(self._load(model, checkpoint), self._name, bare=self._bare)
        for path, leaf in new.items():
            if not same_leaf(leaf, again[path]):
                raise _unsupported(
                    checkpoint.origin, path, "random values: its file does not have them", "the same at each load"
                )

    def _placement(self, new: Mapping[str, Leaf], model: nn.Module, checkpoint: Checkpoint) -> Placement:
        """Where it stands in tensors that are larger than its own: tried once for a family of adapters.

        Raises:
            ShapeError: its layers do not compute the same there.
        """
        room = {path: _larger(shape, new[path]) for path, shape in self._room.shapes.items()}
        where = next((path for path, shape in room.items() if shape != _shape(new[path])), None)
        if where is None:
            return Placement({}, {})
        if checkpoint.schema not in self._placements:
            found = self._find_placement(model, checkpoint, room)
            if isinstance(found, str):
                raise ShapeError(
                    f"{checkpoint.origin} has another rank or size than {self._name!r} on the model, and its layers do "
                    "not compute the same with zeros around it.",
                    where=where,
                    found=f"{self.method} of shape {tuple(_shape(new[where]))}; {found}",
                    expected=f"{tuple(self._room.shapes[where])}, by the adapter on the model",
                    hint=self._elsewhere,
                )
            self._placements[checkpoint.schema] = found
        return self._placements[checkpoint.schema]

    def _refuse_beyond(self, new: Mapping[str, Leaf], model: nn.Module, origin: str) -> None:
        """Raise if it is larger than the model's own tensors."""
        own = self._room.shapes
        room = {path: _larger(shape, new[path]) for path, shape in own.items()}
        where = next((path for path, shape in room.items() if shape != own[path]), None)
        if where is not None:
            self._placement_of_own(room, model)
            raise ShapeError(
                f"{origin} is of a larger rank or size than there is room for.",
                where=where,
                found=f"shape {tuple(_shape(new[where]))}",
                expected=f"at most {tuple(own[where])}, by the adapter {self._name!r} on the model",
                hint="hotslot.attach(model, {…}) with this adapter among them, before torch.compile, makes room for "
                f"it; or {self._elsewhere}",
            )

    def _placement_of_own(self, room: Mapping[str, torch.Size], model: nn.Module) -> Placement:
        """Where the adapter that is live would stand in `room`, part of which is larger than it has.

        Raises:
            ShapeError: its layers would not compute the same there, or others compute with its tensors.
        """
        own = self._room.shapes
        growing = [path for path in room if room[path] != own[path]]
        found = self._shared(growing, model) or self._find_placement(model, self._checkpoint(model), room)
        if isinstance(found, str):
            raise ShapeError(
                f"{self._what} cannot be padded to the rank or size of a larger one.",
                where=growing[0],
                found=f"{self.method} of shape {tuple(own[growing[0]])}; {found}",
                expected=f"layers that compute the same with zeros around it, up to {tuple(room[growing[0]])}",
                hint=self._elsewhere,
            )
        return found

    def _find_placement(
        self, model: nn.Module, checkpoint: Checkpoint, room: Mapping[str, torch.Size]
    ) -> Placement | str:
        """See `find_placement`, of tensors of the checkpoint's shapes."""
        own = {PEFT_PREFIX + path for path, _ in _base_tensors(model)}  # a file may have copies
        skeleton = self._load(model, at_random(checkpoint, own))
        leaves = leaves_of(skeleton, self._name, bare=self._bare)
        shapes = {path: room[path] for path, leaf in leaves.items() if isinstance(leaf, Held) and path in room}
        return find_placement(skeleton, leaves, shapes)


def method_of(config: PeftConfig) -> str:
    """Name of the method, as adapter_config.json has it."""
    kind: Any = config.peft_type
    return str(getattr(kind, "value", kind))


def residents(model: nn.Module) -> dict[str, str]:
    """Name → method of all adapters that are on the model."""
    found: dict[str, str] = {}
    for root in roots(model).values():
        configs = getattr(root, "peft_config", None) or getattr(innermost(root), "peft_config", None)
        for name, config in configs.items() if isinstance(configs, Mapping) else ():
            if found.get(name, "LORA") == "LORA":  # an Assembly's members may have several of one name
                found[name] = method_of(config)
    return found


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


def _has_biases(config: Mapping[str, Any]) -> bool:
    """Whether the adapter carries biases of the base model."""
    return config.get("bias", "none") not in ("none", None)


def _saved(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """Name → tensor, of what PEFT saves of an adapter; mostly the model's own."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(
            model, adapter_name=adapter_name, save_embedding_layers=False
        )
    return tensors


def _shape(leaf: Leaf) -> torch.Size:
    assert isinstance(leaf, Held)
    return leaf.tensor.shape


def _larger(shape: torch.Size, leaf: Leaf) -> torch.Size:
    """The shape that has room for both, where both have as many dimensions."""
    other = leaf.tensor.shape if isinstance(leaf, Held) else shape
    return torch.Size(map(max, shape, other)) if len(shape) == len(other) else shape


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(full name, tensor) of the base model alone, under each of its names."""
    for path, module in base_tree(model):
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is not None:
                    yield f"{path}.{name}" if path else name, tensor.detach()


def _unsupported(what: str, where: str, found: str, expected: str) -> UnsupportedError:
    return UnsupportedError(
        f"{what} cannot be swapped in place.",
        where=where,
        found=found,
        expected=expected,
        hint="load it with PEFT itself; docs/supported.md lists what hotslot swaps",
    )
