"""Where parameters have their memory: gives them a home in an arena, or room where they are, and puts them back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .. import pages
from ..block import Layout, SlotShape, arrange
from .memory import Copy, Memory
from .scaling import ScalingMap
from .slots import Slot
from .staging import Stagings
from .tail import arena_bytes
from .training import refuse_padding_while_training


def note_sizes(slots: Mapping[str, Slot]) -> None:
    """Let the modules that hold the matrices state their shapes; nothing computes with it."""
    for slot in slots.values():
        for container, names in (
            ("lora_A", ("out_features", "out_channels")),
            ("lora_B", ("in_features", "in_channels")),
        ):
            module = getattr(slot.layer, container)._modules.get(slot.adapter_name)
            for name in names:
                if hasattr(module, name):
                    weight = slot.held[f"{container}.weight"].param
                    setattr(module, name, weight.shape[0] if container == "lora_A" else weight.shape[1] * slot.groups)


def become_view(param: torch.Tensor, home: torch.Tensor) -> None:
    """Let the Parameter be a view of its new memory, and share its version counter if that is possible.

    Then one count is that of all who do. Not in training: an optimizer that steps within the backward pass would spoil
    what that has yet to read. Nor where somebody has a weak reference: torch does not exchange such a tensor.
    """
    if not param.requires_grad and param.grad is None:
        view = nn.Parameter(home, requires_grad=False)
        view.__dict__.update(param.__dict__)
        try:
            torch.utils.swap_tensors(param, view)
            param._backward_hooks = param._backward_hooks  # torch leaves behind what calls them
            return
        except RuntimeError:
            pass
    param.data = home


class Homes:
    """Where the parts, sizes and scalings of `slots` are now, to be put back there."""

    def __init__(self, slots: Mapping[str, Slot]) -> None:
        self._data = [(held.param, held.param.data) for slot in slots.values() for held in slot.held.values()]
        self._scalings = [
            (slot.layer, slot.adapter_name, slot.layer.scaling, slot.layer.scaling.get(slot.adapter_name))
            for slot in slots.values()
        ]
        modules = [slot.dora for slot in slots.values() if slot.dora is not None]
        self._uses = [(module, getattr(module, "in_use", None)) for module in modules]

    def put_back(self) -> None:
        """Parameters and scalings at their memory again; what was written there since stays written."""
        with torch.inference_mode(False), torch.no_grad():
            for param, data in self._data:
                param.data = data
            for layer, name, scaling, value in self._scalings:
                layer.scaling = scaling
                if isinstance(scaling, ScalingMap) and isinstance(value, torch.Tensor):
                    scaling.bind(name, value)
            for dora, in_use in self._uses:
                if in_use is not None:
                    dora.in_use = in_use


def bind(
    slots: Mapping[str, Slot],
    live_ranks: Mapping[str, int],
    ranks: Mapping[str, int],
    stagings: Stagings | None = None,
    *,
    arena: bool,
    exclusive: bool = False,
) -> Memory:
    """Give every part of every slot room for `ranks`, its values kept. The Parameter objects stay the same.

    Args:
        slots: all slots of one adapter name.
        live_ranks: fqn → rank up to which the slot holds values.
        ranks: fqn → rank to make room for.
        stagings: through which bytes come to devices; they outlive the memory.
        arena: move all parts into one allocation per device; else a part moves only if its shape changes.
        exclusive: whether a swap need not look at each slot, nor count up the version of each.

    Raises:
        ModelError: a parameter that would change its shape has a gradient or an optimizer's state.
    """
    shapes = {fqn: slot.shape(ranks[fqn]) for fqn, slot in slots.items()}
    keys = [(fqn, suffix) for fqn, slot in slots.items() for suffix in slot.held]
    refuse_padding_while_training(
        slots[fqn].held[suffix].param
        for fqn, suffix in keys
        if tuple(slots[fqn].held[suffix].param.shape) != shapes[fqn].parts[suffix]
    )
    devices = {key: slots[key[0]].held[key[1]].param.device for key in keys}
    order = sorted(set(devices.values()), key=str)
    region_of = {key: order.index(devices[key]) if arena else i for i, key in enumerate(keys)}
    layout = arrange(shapes.values(), region_of)
    with torch.inference_mode(False), torch.no_grad():
        arenas: list[torch.Tensor | None] = [None] * len(layout.region_bytes)
        if arena:
            arenas = [
                _zeros(arena_bytes(size, len(slots)), device)
                for size, device in zip(layout.region_bytes, order, strict=True)
            ]
        homes = _homes(slots, live_ranks, shapes, layout, arenas)
        for param, home in homes:
            if exclusive:
                become_view(param, home)
            else:
                param.data = home
        memory = Memory(slots, layout, arenas, stagings, exclusive=exclusive)
        if arena:
            memory.bind_scalings()
    note_sizes(slots)
    return memory


def _zeros(nbytes: int, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return pages.empty(nbytes).zero_()
    return torch.zeros(nbytes, dtype=torch.uint8, device=device)


def _homes(
    slots: Mapping[str, Slot],
    live_ranks: Mapping[str, int],
    shapes: Mapping[str, SlotShape],
    layout: Layout,
    arenas: Sequence[torch.Tensor | None],
) -> list[Copy]:
    """(parameter, its new memory with its values in it) for each that moves."""
    homes: list[Copy] = []
    for (fqn, suffix), place in layout.places.items():
        slot = slots[fqn]
        param, arena = slot.held[suffix].param, arenas[place.region]
        if arena is None and tuple(param.shape) == place.shape:
            continue
        if arena is None:
            home = torch.zeros(place.shape, dtype=param.dtype, device=param.device)
        else:
            size = place.dtype.itemsize * math.prod(place.shape)
            home = arena[place.offset : place.offset + size].view(place.dtype).view(place.shape)
        old = param.detach()
        if old.shape == home.shape:
            home.copy_(old)
        elif live_ranks.get(fqn, 0):
            rank = live_ranks[fqn]
            slot.fill(home, suffix, slot.corner(old, suffix, rank), rank)
        homes.append((param, home))
    return homes
