"""A slot: the place of one adapter name in one LoRA layer, and its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..block import SlotShape
from ..errors import MergedError, ModelError, UnsupportedError
from ..methods import MAGNITUDE, PARTS
from .calls import UNMERGE
from .corner import all_zero, band, corner, fill
from .discover import lora_layers_with_parents, unwrap
from .offloading import bring_back as bring_slot_back
from .offloading import can_stay, let_go, refuse_offloaded, refuse_reading_offloaded, stay
from .quantised import has_bias, has_dora

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


class Held(NamedTuple):
    """A parameter and the two dicts through which the model's forward finds it."""

    owner: dict[str, Any]
    owner_key: str
    holder: Any
    params: dict[str, Any]
    key: str
    param: nn.Parameter

    def in_place(self) -> bool:
        """Whether the model still has this very Parameter object."""
        return self.owner.get(self.owner_key) is self.holder and self.params.get(self.key) is self.param


@dataclass(frozen=True, eq=False, slots=True)
class Slot:
    """One LoRA layer's place for one adapter name.

    Attributes:
        fqn: the layer's path in the base model, as adapter files spell it.
        siblings, child: the parent's modules, and the layer's name there. (The parent itself may be the model, which
            a slot must not keep alive.)
        layer: PEFT's layer.
        adapter_name: PEFT's name for the slot.
        groups: of a grouped convolution, else 1.
        experts: of a mixture-of-experts parameter, else 1.
        held: suffix → parameter.
    """

    fqn: str
    siblings: Mapping[str, Any]
    child: str
    layer: LoraLayer
    adapter_name: str
    groups: int
    experts: int
    held: Mapping[str, Held]

    @property
    def rank(self) -> int:
        """The rank that the parameters have room for."""
        for suffix, held in self.held.items():
            if PARTS[suffix].rank_dim == 0:
                return held.param.shape[0] // self.experts
        raise AssertionError("a slot has an A matrix")

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """Suffix → parameter."""
        return {suffix: held.param for suffix, held in self.held.items()}

    @property
    def live_rank(self) -> int:
        """The rank that the layer states, if what lies beyond it is empty; else all of it."""
        stated, room = int(self.layer.r[self.adapter_name]), self.rank
        if not 0 < stated < room or stated % self.groups:
            return room
        for suffix, held in self.held.items():
            if PARTS[suffix].rank_dim is not None and self.band(held.param.detach(), suffix, stated, room).any():
                return room
        return stated

    @property
    def holds_nothing(self) -> bool:
        """Whether it is as a swap leaves it that has nothing for this layer: at the smallest rank, and zero."""
        return int(self.layer.r[self.adapter_name]) == self.neutral_rank and all_zero(self.params)

    @property
    def neutral_rank(self) -> int:
        """The smallest rank that this base layer takes."""
        return self.groups

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(iter(self.held.values())).param.dtype

    def shape(self, rank: int | None = None, *, extra: Iterable[str] = ()) -> SlotShape:
        """The shapes of the parts as they are, or as they would be at another rank and with those of `extra`."""
        rank = self.rank if rank is None else rank
        parts = {suffix: self.part_shape(suffix, rank) for suffix in self.held}
        shape = SlotShape(self.fqn, rank, self.groups, self.experts, self.dtype, parts, self.parameter)
        return shape.with_parts(extra)

    def with_part(self, suffix: str) -> Slot:
        """The same slot, whose layer has been given a bias of the up-projection, or DoRA's magnitude; neutral both.

        Raises:
            ModelError: DoRA needs a weight that is offloaded.
        """
        layer: Any = self.layer
        shape = self.shape(extra=[suffix]).parts[suffix]
        if suffix == MAGNITUDE:
            from .dora import add_magnitude

            refuse_reading_offloaded(self.fqn, layer.get_base_layer(), dora=True)
            trained = next(iter(self.held.values())).param.requires_grad
            add_magnitude(layer, self.adapter_name, shape, self.dtype, requires_grad=trained)
        else:
            weight = layer.lora_B[self.adapter_name].weight
            bias = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            layer.lora_B[self.adapter_name].bias = nn.Parameter(bias, requires_grad=weight.requires_grad)
        return replace(self, held=_held(layer, self.adapter_name))

    def drop_part(self, suffix: str) -> None:
        """Undo `with_part`."""
        layer: Any = self.layer
        if suffix == MAGNITUDE:
            from .dora import drop_magnitude

            drop_magnitude(layer, self.adapter_name)
        else:
            layer.lora_B[self.adapter_name].bias = None

    def uses(self, suffix: str) -> bool:
        """Whether the live adapter has a part that `with_part` has given, by PEFT's own records."""
        layer: Any = self.layer
        return bool((layer.use_dora if suffix == MAGNITUDE else layer.lora_bias).get(self.adapter_name))

    def leave_part(self, suffix: str) -> None:
        """Let PEFT have what `with_part` has given, in memory of its own."""
        if suffix == MAGNITUDE:
            from .dora import leave_slot_dora

            leave_slot_dora(self.dora)
        param = self.held[suffix].param
        param.data = param.data.clone()
        param.__dict__.pop("__reduce_ex__", None)

    def can_have(self, suffix: str) -> bool:
        """Whether the layer has this part or can be given it."""
        if suffix == MAGNITUDE and suffix not in self.held:
            return has_dora(self.layer)
        if suffix == "lora_B.bias" and suffix not in self.held:
            return "lora_B.weight" in self.held and has_bias(self.layer.get_base_layer())
        return suffix in self.held

    @property
    def is_active(self) -> bool:
        """Whether the layer computes with the slot, by PEFT's own records."""
        layer: Any = self.layer
        return not layer.disable_adapters and self.adapter_name in layer.active_adapters

    @property
    def parameter(self) -> str | None:
        """The bare parameter of the module that the layer adapts; None if it adapts the module."""
        return vars(self.layer).get("parameter_name")  # a module takes a microsecond to find that it has none

    @property
    def dora(self) -> Any:
        """The module of DoRA's magnitude, or None."""
        return self.layer.lora_magnitude_vector._modules.get(self.adapter_name)

    def part_shape(self, suffix: str, rank: int) -> tuple[int, ...]:
        """The shape that one of the parts would have at another rank."""
        part, sizes = PARTS[suffix], list(self.held[suffix].param.shape)
        if part.rank_dim is not None:
            sizes[part.rank_dim] = self.experts * (rank if part.rank_dim == 0 else rank // self.groups)
        return tuple(sizes)

    def band(self, padded: torch.Tensor, suffix: str, low: int, high: int) -> torch.Tensor:
        """See `corner.band`."""
        return band(padded, suffix, low, high, self.groups, self.experts)

    def corner(self, padded: torch.Tensor, suffix: str, rank: int) -> torch.Tensor:
        """See `corner.corner`."""
        return corner(padded, suffix, rank, self.groups, self.experts)

    def fill(self, padded: torch.Tensor, suffix: str, values: torch.Tensor, rank: int) -> None:
        """See `corner.fill`."""
        fill(padded, suffix, values, rank, self.groups, self.experts)

    def in_place(self) -> bool:
        """Whether the layer is still in the model, compiled by itself or not."""
        found = self.siblings.get(self.child)
        return found is not None and id(unwrap(found)) == id(self.layer)

    def refuse_if_unreadable(self) -> None:
        """Raise if PEFT's layer reads a weight of the base layer that accelerate has taken away by then."""
        base = self.layer.get_base_layer()
        refuse_reading_offloaded(self.fqn, base, dora=self.dora is not None, parameter=self.parameter)

    def refuse_if_merged(self) -> None:
        """Raise if the adapter is merged into the base weights."""
        if self.adapter_name in self.layer.merged_adapters:
            raise MergedError(
                f"Cannot hot-swap adapter '{self.adapter_name}' because it is currently merged into the base weights.",
                where=self.fqn,
                hint=f"unmerge it first: {UNMERGE}",
            )


def find_slots(model: nn.Module, adapter_name: str) -> dict[str, Slot]:
    """The slots of `adapter_name` on the model, by canonical path.

    Raises:
        UnsupportedError: the adapter uses something on this layer that hotslot does not swap.
        ModelError: its parameters have no memory, and no hook of accelerate's that knows where they are.
    """
    slots = {}
    for fqn, parent, child, layer in lora_layers_with_parents(model):
        held = _held(layer, adapter_name)
        if held:
            if any(entry.param.is_meta for entry in held.values()) and not can_stay(layer, adapter_name):
                refuse_offloaded(model)
            _refuse_unsupported(fqn, layer, adapter_name, held)
            groups = getattr(layer.get_base_layer(), "groups", 1)
            experts = getattr(layer, "num_experts", 1)
            slots[fqn] = Slot(fqn, parent._modules, child, layer, adapter_name, groups, experts, held)
    return slots


def stay_on_device(slots: dict[str, Slot]) -> None:
    """Let slots that accelerate offloads stay where they are computed with. If it raises, call `let_be_offloaded`.

    Raises:
        ModelError: PEFT does not compute with such a layer under a base layer that is offloaded.
    """
    for fqn, slot in slots.items():
        if any(held.param.is_meta for held in slot.held.values()):
            slot.refuse_if_unreadable()
            stay(slot.layer, slot.adapter_name)
            slots[fqn] = replace(slot, held=_held(slot.layer, slot.adapter_name))


def bring_back(slots: Mapping[str, Slot]) -> None:
    """Put the Parameters of slots back that accelerate has begun to offload since they were bound.

    Raises:
        ModelError: PEFT does not compute with such a layer under a base layer that is offloaded.
    """
    for slot in slots.values():
        slot.refuse_if_unreadable()
        bring_slot_back(slot.layer, slot.adapter_name)


def let_be_offloaded(slots: Mapping[str, Slot]) -> None:
    """Undo `stay_on_device`, and what `state_dict` has prepared. May be repeated."""
    for slot in slots.values():
        let_go(slot.layer, slot.adapter_name)


def compact(slots: dict[str, Slot]) -> None:
    """Make the small dicts that each swap reads anew, one after the other: same content, side by side in memory.

    They were made while the model was built and lie all over the heap; to fetch 1,000 of them takes a swap of 9 MB half
    as long as its copy. Compiled code may know them by identity: not for a model that is compiled. Those that a layer
    has for several adapters stay, since the others' slots may know them.
    """
    name = next(iter(slots.values())).adapter_name if slots else ""
    layers: list[Any] = [slot.layer for slot in slots.values()]
    for container_name in ("lora_A", "lora_B"):
        containers = [layer._modules[container_name] for layer in layers]
        for container in containers:
            if container._modules.keys() <= {name}:
                container.__dict__["_modules"] = dict(container._modules)
        for module in (container._modules.get(name) for container in containers):
            if module is not None:
                module.__dict__["_parameters"] = dict(module._parameters)
    slots.update({fqn: replace(slot, held=_held(slot.layer, name)) for fqn, slot in slots.items()})


def undo_compact(slots: Mapping[str, Slot]) -> None:
    """Put back the dicts that these slots know, which were looked up before `compact`, whole or broken off."""
    for slot in slots.values():
        for container_name in ("lora_A", "lora_B"):
            held = slot.held.get(f"{container_name}.weight")
            if held is not None:
                container = getattr(slot.layer, container_name)
                container.__dict__["_modules"] = held.owner
                held.holder.__dict__["_parameters"] = held.params


def _held(layer: LoraLayer, name: str) -> dict[str, Held]:
    held: dict[str, Held] = {}
    for container_name in ("lora_A", "lora_B"):
        container = getattr(layer, container_name)
        if name in container:
            module = container[name]
            for key in ("weight", "bias"):
                param = module._parameters.get(key)
                if param is not None:
                    found = Held(container._modules, name, module, module._parameters, key, param)
                    held[f"{container_name}.{key}"] = found
    for container_name in ("lora_embedding_A", "lora_embedding_B"):
        container = getattr(layer, container_name)
        if name in container:
            params = container._parameters
            held[container_name] = Held(params, name, params[name], params, name, params[name])
    magnitudes = layer.lora_magnitude_vector._modules
    if held and name in magnitudes:
        module = magnitudes[name]
        assert module is not None
        param = module._parameters["weight"]
        assert param is not None
        held[MAGNITUDE] = Held(magnitudes, name, module, module._parameters, "weight", param)
    return held


_ALLOWED = ({"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"})


def _refuse_unsupported(fqn: str, layer: LoraLayer, name: str, held: Mapping[str, Held]) -> None:
    from peft.tuners.adalora import AdaLoraLayer

    from .dora import is_plain_or_dora

    variant = layer.lora_variant.get(name)
    if isinstance(layer, AdaLoraLayer) or not is_plain_or_dora(variant):
        raise UnsupportedError(
            f"The adapter {name!r} on the model is of a kind that hotslot does not swap.",
            where=fqn,
            found=type(variant or layer).__name__,
            expected="plain LoRA, MiCA or DoRA: others keep tensors beside A and B, which a swap would leave behind",
            hint="attach to the base model, with this adapter among adapters=, if hotslot takes it from a file: "
            "docs/supported.md",
        )
    if set(held) - {"lora_B.bias", MAGNITUDE} not in _ALLOWED:
        raise UnsupportedError(f"The layer has unknown adapter tensors of {name!r}.", where=fqn, found=sorted(held))
    for suffix, entry in held.items():
        if entry.param.is_meta and not can_stay(layer, name):
            raise ModelError(
                f"The adapter {name!r} has parameters without memory.",
                where=f"{fqn}.{suffix}",
                found="device meta",
                expected="weights that are loaded",
                hint="load the model's weights first, or bring back what is offloaded",
            )
