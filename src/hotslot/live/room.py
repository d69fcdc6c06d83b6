"""Room in the tensors of an adapter that no slots hold: where a smaller one stands in them, and who is shown what.

`state_dict()` shows what is live in its own shapes, and takes it back in those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .leaves import Held, Leaf, Value
from .training import refuse_padding_while_training


def cut_to(padded: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The view of `padded`, from its first element on, that has `shape`."""
    return padded[tuple(map(slice, shape))]


class Part(NamedTuple):
    """How a tensor stands in a larger one.

    Attributes:
        shape: its own.
        blocks: of how many equal blocks each dimension is, which are padded one by one; none: it is in the corner.
        repeated: whether it is repeated until the larger one is full. Else there are zeros around it.
    """

    shape: torch.Size
    blocks: tuple[int, ...] = ()
    repeated: bool = False

    @property
    def in_corner(self) -> bool:
        """Whether it stands in the corner of zeros."""
        return not self.repeated and set(self.blocks) <= {1}

    def cut_from(self, padded: torch.Tensor) -> torch.Tensor:
        """What stands there; a view where it can be one."""
        return cut_to(padded, self.shape) if not self.blocks else self._places(padded).reshape(self.shape)

    def padded(self, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """A tensor of `shape` in which this one stands."""
        if self.repeated:
            return tensor.repeat([size // own for size, own in zip(shape, self.shape, strict=True)])
        padded = tensor.new_zeros(shape)
        places = self._places(padded)
        places.copy_(tensor.reshape(places.shape))
        return padded

    def _places(self, padded: torch.Tensor) -> torch.Tensor:
        """The view of its places, in which each dimension is two: blocks, and what is in a block."""
        for dim in reversed(range(len(self.shape))):
            count = self.blocks[dim] if self.blocks else 1
            padded = padded.unflatten(dim, (count, -1)).narrow(dim + 1, 0, self.shape[dim] // count)
        return padded


class Placement(NamedTuple):
    """Where an adapter stands in larger tensors so that its layers compute the same.

    Attributes:
        parts: path → part, of the tensors that have room to spare.
        numbers: path → what PEFT's layers are to read there, where they take the tensors' size from a number.
    """

    parts: Mapping[str, Part]
    numbers: Mapping[str, int]


class Extents:
    """How much of its padded tensors the live adapter fills: a part of the records, shared with the hooks.

    Attributes:
        parts: path → how what is live stands there, of the tensors that have room to spare.
    """

    def __init__(self) -> None:
        self.parts: Mapping[str, Part] = {}


class Room:
    """The memory of one adapter's tensors.

    Args:
        model: the model, of which modules that hold such tensors get hooks.
        state: path → leaf, all that the adapter has.
    """

    def __init__(self, model: nn.Module, state: Mapping[str, Leaf]) -> None:
        self.extents = Extents()
        held = {path: leaf for path, leaf in state.items() if isinstance(leaf, Held)}
        self._held, self._values = held, {path: leaf for path, leaf in state.items() if isinstance(leaf, Value)}
        self._before: dict[str, torch.Tensor] = {}  # what had another memory, and which
        self._numbers: dict[str, int] = {}  # and what stated another size, and which
        self._handles: list[Any] = []
        for module, tensors in _by_module(model, held):
            shown = ShownCorner(tensors, self.extents)
            self._handles.append(module.register_state_dict_post_hook(shown))
            self._handles.append(module.register_load_state_dict_pre_hook(shown.on_load))

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Path → shape that there is room for."""
        return {path: leaf.tensor.shape for path, leaf in self._held.items()}

    def make(self, shapes: Mapping[str, torch.Size], placement: Placement) -> None:
        """Make these tensors larger, with what they hold in its places; the objects stay.

        If it raises, `release`.

        Raises:
            ModelError: one of them has a gradient or an optimizer's state.
        """
        tensors = [self._held[path].tensor for path in placement.parts]
        refuse_padding_while_training(tensor for tensor in tensors if isinstance(tensor, nn.Parameter))
        self.extents.parts = placement.parts
        with torch.inference_mode(False), torch.no_grad():
            for path, part in placement.parts.items():
                tensor = self._held[path].tensor
                self._before[path] = tensor.data
                tensor.data = part.padded(tensor.data, shapes[path])
        for path, number in placement.numbers.items():
            self._numbers[path] = self._values[path].read()
            self._values[path].write(number)

    def release(self) -> None:
        """Give the tensors their own memory back, at their own shapes, holding what they hold there now."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for path, number in self._numbers.items():
            self._values[path].write(number)
        with torch.inference_mode(False), torch.no_grad():
            for path, original in self._before.items():
                tensor, part = self._held[path].holder.get(self._held[path].key), self.extents.parts.get(path)
                if tensor is not None and tensor.data_ptr() != original.data_ptr():  # else it was deleted, or undone
                    if part is None or part.shape != original.shape:
                        part = Part(original.shape)
                    tensor.data = _like(tensor, original).copy_(part.cut_from(tensor.data))
        self._before.clear()
        self._numbers.clear()


def _like(tensor: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Memory of the original's shape where the tensor is now: its own, if the model was not moved."""
    if (original.dtype, original.device) == (tensor.dtype, tensor.device):
        return original
    return tensor.new_empty(original.shape)


def _by_module(model: nn.Module, held: Mapping[str, Held]) -> Iterator[tuple[nn.Module, dict[str, tuple[str, Any]]]]:
    """(module, name there → path and tensor) of the modules that hold tensors of the adapter."""
    holders: dict[int, dict[str, tuple[str, Any]]] = {}
    for path, leaf in held.items():
        holders.setdefault(id(leaf.holder), {})[leaf.key] = path, leaf.tensor
    for module in model.modules():
        tensors = holders.get(id(module._parameters), {}) | holders.get(id(module._buffers), {})
        if tensors:
            yield module, tensors


class ShownCorner:
    """Hooks of one module: on saving its tensors have the live adapter's shapes, and on loading they are padded.

    Args:
        tensors: name in the module → path, and the tensor. Another Parameter there, loaded later, is not its business.
        extents: of all modules.
    """

    def __init__(self, tensors: Mapping[str, tuple[str, torch.Tensor]], extents: Extents) -> None:
        self._tensors = tensors
        self._extents = extents

    def __call__(self, module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        """Called by `state_dict()`."""
        for name, part in self._shown(module):
            if prefix + name in state_dict:
                state_dict[prefix + name] = part.cut_from(state_dict[prefix + name]).contiguous()

    def on_load(
        self,
        module: Any,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        errors: list[str],
    ) -> None:
        """Called by `load_state_dict()`: what fits is what `state_dict` shows."""
        for name, part in self._shown(module):
            given, key = state_dict.get(prefix + name), prefix + name
            if given is None:
                continue
            own = self._now(module, name).detach()
            if given.shape == part.shape:
                state_dict[key] = part.padded(given, own.shape)
            else:
                errors.append(
                    f"size mismatch for {key}: copying a param with shape {given.shape} from checkpoint, "
                    f"the shape in current model is {part.shape}."
                )
                state_dict[key] = own

    def _shown(self, module: nn.Module) -> Iterator[tuple[str, Part]]:
        """(name, how what is live stands there) of its tensors that have room to spare."""
        for name, (path, tensor) in self._tensors.items():
            part, now = self._extents.parts.get(path), self._now(module, name)
            if part is not None and now is not None and (now is tensor or not isinstance(tensor, nn.Parameter)):
                yield name, part

    def _now(self, module: nn.Module, name: str) -> Any:
        found = module._parameters.get(name)
        return found if found is not None else module._buffers.get(name)
