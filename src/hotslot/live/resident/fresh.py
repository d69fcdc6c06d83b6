"""What PEFT makes of an adapter that is to take the seat: fresh loads, beside the model, which is only read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...checkpoint import PEFT_PREFIX, Checkpoint, config_dict, from_tensors
from ..absolutes import Absolutes, Key
from ..leaves import Held, Leaf
from ..skeleton import base_tree, load
from ..state import peft_config
from .seat import Seat, unsupported

if TYPE_CHECKING:
    from peft import PeftModel


class FreshLoads:
    """Of adapters, under the seat's name, onto copies of what the seat's model is without any.

    Args:
        seat: whose model it is.
        absolutes: knows the model's own values where an adapter's are live.
    """

    def __init__(self, seat: Seat, absolutes: Absolutes) -> None:
        self._seat = seat
        self._absolutes = absolutes

    def load(self, checkpoint: Checkpoint, *, trained: bool = True) -> PeftModel:
        """See `skeleton.load`.

        Raises:
            UnsupportedError: PEFT changes base weights on loading it.
        """
        own, seat = self.own(), self._seat
        options: dict[str, Any] = {"on_device": True, "trained": trained, "autocast": seat.autocast}
        skeleton = load(seat.model, checkpoint, own.__getitem__, adapter_name=seat.name, **options)
        biases = self.biases(skeleton, checkpoint)
        for path, tensor in base_tensors(skeleton):
            if path in biases or tensor.is_meta or tensor.untyped_storage().nbytes() < tensor.nbytes:
                continue  # they are its own, or PEFT did not look at it
            if path not in own or not torch.equal(tensor, own[path]):
                raise unsupported(
                    checkpoint.origin, path, "other base weights, which PEFT has made on loading it", "the model's own"
                )
        return skeleton

    def own(self) -> dict[str, torch.Tensor]:
        """Full name → the base model's own values, of all its tensors; an adapter's may be live in their place."""
        return {path: self._absolutes.own(("", path), tensor) for path, tensor in base_tensors(self._seat.model)}

    def checkpoint(self) -> Checkpoint:
        """What is live, as PEFT would save it."""
        seat = self._seat
        config = config_dict(peft_config(seat.model, seat.name))
        saved = _saved(seat.model, seat.name)
        if seat.bare:  # without a PeftModel around the model, whose name PEFT's files have
            saved = {PEFT_PREFIX + name: value for name, value in saved.items()}
        return from_tensors(saved, config, origin=seat.what)

    def biases(self, skeleton: nn.Module, given: Checkpoint) -> dict[str, torch.Tensor]:
        """Full name → values, of the base's biases that the checkpoint has in the place of the model's own."""
        if given.config.get("bias", "none") in ("none", None):
            return {}
        # Which those are, PEFT is asked. In the file some have other names, by the layers that PEFT has put around.
        carried = {tensor.data_ptr() for tensor in _saved(skeleton, self._seat.name).values()}
        return {
            path: tensor
            for path, tensor in base_tensors(skeleton)
            if path.rpartition(".")[2] == "bias" and tensor.data_ptr() in carried
        }

    def values(
        self, skeleton: nn.Module, leaves: Mapping[str, Leaf], keys: Mapping[str, Key], given: Checkpoint | None
    ) -> dict[Key, torch.Tensor]:
        """What each tensor is to hold: views of the checkpoint's bytes where PEFT has taken those as they are.

        Args:
            skeleton: a fresh load.
            leaves: of it.
            keys: path → key of the site of each tensor.
            given: what was loaded; None for one that was left untrained.
        """
        tensors = {keys[path]: leaf.tensor.detach() for path, leaf in leaves.items() if isinstance(leaf, Held)}
        names: dict[int, str] = {}
        if given is not None:
            tensors |= {("", path): tensor for path, tensor in self.biases(skeleton, given).items()}
            saved = _saved(skeleton, self._seat.name)
            names = {tensor.data_ptr(): name for name, tensor in saved.items() if name in given.tensors}
        values = {}
        for key, tensor in tensors.items():
            name = names.get(tensor.data_ptr())
            in_file = given.tensor(name) if given is not None and name is not None else None
            taken = in_file is not None and torch.equal(in_file.to(tensor), tensor)
            values[key] = in_file if in_file is not None and taken else tensor.cpu().clone()
        return values


def base_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(full name, tensor) of the base model alone, under each of its names."""
    for path, module in base_tree(model):
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is not None:
                    yield f"{path}.{name}" if path else name, tensor.detach()


def _saved(model: Any, adapter_name: str) -> dict[str, torch.Tensor]:
    """Name → tensor, of what PEFT saves of an adapter; mostly the model's own."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(
            model, adapter_name=adapter_name, save_embedding_layers=False
        )
    return tensors
