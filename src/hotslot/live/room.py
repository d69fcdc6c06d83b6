"""Room in the tensors of an adapter that no slots hold: zeros beyond what is live, and who is shown what.

An adapter of a lower rank stands in the first rows and columns of each tensor that has a rank. `state_dict()` shows it
in its own shapes, and takes it back in those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .leaves import Held
from .training import refuse_padding_while_training


def cut_to(padded: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The view of `padded`, from its first element on, that has `shape`."""
    return padded[tuple(map(slice, shape))]


def padded_to(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A copy in the corner of zeros of `shape`."""
    padded = tensor.new_zeros(shape)
    cut_to(padded, tensor.shape).copy_(tensor)
    return padded


class Extents:
    """How much of its padded tensors the live adapter fills: a part of the records, shared with the hooks.

    Attributes:
        shapes: path → shape of what is live, of the tensors that have room to spare.
    """

    def __init__(self) -> None:
        self.shapes: Mapping[str, torch.Size] = {}


class Room:
    """The memory of one adapter's tensors.

    Args:
        model: the model, of which modules that hold such tensors get hooks.
        held: path → tensor, all that the adapter has.
    """

    def __init__(self, model: nn.Module, held: Mapping[str, Held]) -> None:
        self.extents = Extents()
        self._held = held
        self._before: list[tuple[Held, torch.Tensor]] = []  # what had another memory, and which
        self._handles: list[Any] = []
        for module, tensors in _by_module(model, held):
            shown = ShownCorner(tensors, self.extents)
            self._handles.append(module.register_state_dict_post_hook(shown))
            self._handles.append(module.register_load_state_dict_pre_hook(shown.on_load))

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Path → shape that there is room for."""
        return {path: leaf.tensor.shape for path, leaf in self._held.items()}

    def make(self, shapes: Mapping[str, torch.Size]) -> None:
        """Make these tensors larger, what they hold in the corner of zeros; the objects stay.

        If it raises, `release`.

        Raises:
            ModelError: one of them has a gradient or an optimizer's state.
        """
        growing = {path: shape for path, shape in shapes.items() if shape != self._held[path].tensor.shape}
        tensors = [self._held[path].tensor for path in growing]
        refuse_padding_while_training(tensor for tensor in tensors if isinstance(tensor, nn.Parameter))
        self.extents.shapes = {path: self._held[path].tensor.shape for path in growing}
        with torch.inference_mode(False), torch.no_grad():
            for path, shape in growing.items():
                tensor = self._held[path].tensor
                self._before.append((self._held[path], tensor.data))
                tensor.data = padded_to(tensor.data, shape)

    def release(self) -> None:
        """Give the tensors their own memory back, at their own shapes, holding what they hold there now."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        with torch.inference_mode(False), torch.no_grad():
            for leaf, original in self._before:
                tensor = leaf.holder.get(leaf.key)
                if tensor is not None and tensor.data_ptr() != original.data_ptr():  # else it was deleted, or undone
                    tensor.data = _like(tensor, original).copy_(cut_to(tensor.data, original.shape))
        self._before.clear()


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
        for name, shape in self._shown(module):
            if prefix + name in state_dict:
                state_dict[prefix + name] = cut_to(state_dict[prefix + name], shape).contiguous()

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
        for name, shape in self._shown(module):
            given, key = state_dict.get(prefix + name), prefix + name
            if given is None:
                continue
            own = self._now(module, name).detach()
            if given.shape == shape:
                state_dict[key] = padded_to(given, own.shape)
            else:
                errors.append(
                    f"size mismatch for {key}: copying a param with shape {given.shape} from checkpoint, "
                    f"the shape in current model is {shape}."
                )
                state_dict[key] = own

    def _shown(self, module: nn.Module) -> Iterator[tuple[str, torch.Size]]:
        """(name, shape of what is live) of its tensors that have room to spare."""
        for name, (path, tensor) in self._tensors.items():
            shape, now = self._extents.shapes.get(path), self._now(module, name)
            if shape is not None and now is not None and (now is tensor or not isinstance(tensor, nn.Parameter)):
                yield name, shape

    def _now(self, module: nn.Module, name: str) -> Any:
        found = module._parameters.get(name)
        return found if found is not None else module._buffers.get(name)
