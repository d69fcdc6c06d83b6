"""PEFT's layers for tokens that are trained by themselves, with the indices in a tensor.

PEFT copies the weight of the embedding in each forward and writes the adapter's rows over the copy's. It keeps the
indices in a Python list, which compiled code guards: other indices would be compiled anew.

T: places for tokens, V: tokens of the embedding, D: features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import TrainableTokensWrapper
from torch import nn


def token_places(indices: Sequence[int], room: int) -> torch.Tensor:
    """[room] int64: the indices, and for each place without a token -1 - t, with a t that no other place names.

    Such a place writes the weight's own row t over itself. If two places named one row, neither the result nor the
    gradient would be settled.
    """
    taken = set(indices)
    spare = (token for token in range(room) if token not in taken)
    places = [*indices, *(-1 - next(spare) for _ in range(room - len(indices)))]
    return torch.tensor(places, dtype=torch.int64, device="cpu")


class SlotTokensLayer(TrainableTokensLayer):
    """PEFT's layer, in which an adapter's indices may change under compiled code.

    Attributes:
        token_places: adapter name → [T], as `token_places` makes them. Of the adapters that hotslot swaps; what PEFT
            itself has loaded has none. A layer that is tied to another shares its dict.
    """

    token_places: BufferDict
    trainable_tokens_delta: nn.ParameterDict

    def get_merged_weights(self, active_adapters: Iterable[str]) -> torch.Tensor:
        """[V, D]: the base weight with the adapters' rows, as PEFT makes it."""
        base: Any = self.base_layer
        weight: torch.Tensor = base.weight
        for name in active_adapters:
            rows = self.trainable_tokens_delta[name].to(weight)
            if name in self.token_places:
                places = self.token_places[name]
                used = places >= 0
                index = torch.where(used, places, -1 - places)
                rows = torch.where(used.unsqueeze(1), rows, weight[index])
            else:
                index = torch.tensor(self.token_indices[name]).to(weight.device)
            weight = weight.index_copy(dim=0, index=index, source=rows)
        return weight

    def forward_adapters(self, x: torch.Tensor, active_adapters: Iterable[str], *args: Any, **kwargs: Any) -> Any:
        """PEFT's, for those of the adapters that have tokens here: hotslot's wrapper may be there for another one."""
        here = [name for name in active_adapters if name in self.trainable_tokens_delta]
        return super().forward_adapters(x, here, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's, but of the places that have tokens; and what is there before is kept for `unmerge`."""
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if self.token_indices.get(name)]
        self._check_overlapping_tokens(names)
        base: Any = self.base_layer
        for name in names:
            # Of tied layers the first one sees the base's own rows. Swaps empty it.
            if len(self.trainable_tokens_original[name]) == 0:
                self.trainable_tokens_original[name] = base.weight.detach()[self.token_indices[name]]
        merged = self.get_merged_weights(names).detach()
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapters {names} seem to be broken")
        base.weight.data = merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """PEFT's, which warns where nothing is merged: that may well be, without tokens."""
        if self.merged:
            super().unmerge()

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's; what is loaded under the name later is PEFT's own."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.token_places:
            del self.token_places[adapter_name]


class SlotTokensWrapper(TrainableTokensWrapper):
    """PEFT's wrapper, which saves and loads nothing for an adapter without tokens here. PEFT's own raises KeyError."""

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Key in a file → key in the model."""
        shown = self.token_adapter.token_indices.get(adapter_name)
        return super().adapter_state_dict_load_map(adapter_name) if shown else {}  # type: ignore[no-untyped-call]

    def adapter_state_dict(  # type: ignore[override]  # as PEFT's own subclasses have it
        self, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """What a file of the adapter has of this module."""
        shown = self.token_adapter.token_indices.get(adapter_name)
        return super().adapter_state_dict(adapter_name, state_dict) if shown else {}  # type: ignore[no-untyped-call]


def use_slot_tokens(wrapper: Any, source: Any) -> None:
    """Give PEFT's wrapper and its layer the classes of a slot. May be repeated.

    Args:
        wrapper: a TrainableTokensWrapper.
        source: the layer whose tokens it shows: its own, or the one that it is tied to, which comes first.
    """
    layer: Any = wrapper.token_adapter
    if not isinstance(layer, SlotTokensLayer):
        layer.token_places = BufferDict({}) if layer is source else source.token_places
        layer.__class__, wrapper.__class__ = SlotTokensLayer, SlotTokensWrapper


def leave_slot_tokens(wrapper: Any, adapter_name: str) -> None:
    """Undo `use_slot_tokens`, unless another adapter of hotslot's has tokens there."""
    layer: Any = wrapper.token_adapter
    if hasattr(layer, "token_places"):
        if adapter_name in layer.token_places:
            del layer.token_places[adapter_name]
        if len(layer.token_places) == 0:
            layer.__class__, wrapper.__class__ = TrainableTokensLayer, TrainableTokensWrapper
            del layer._modules["token_places"]
