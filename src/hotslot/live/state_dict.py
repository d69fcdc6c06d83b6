"""What `state_dict()` shows of a slot: the adapter that is live, at its own rank, and not the padding around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..methods import PARTS
from .corner import corner, fill


class TrueRank:
    """Hook of one LoRA layer: on saving cut each part to the live rank, on loading put it back among the padding.

    Attributes:
        rank: of the live adapter; 0 where it does not target this layer, and then nothing of the slot is shown.
    """

    def __init__(self, adapter_name: str, groups: int, experts: int, rank: int) -> None:
        self.adapter_name = adapter_name
        self.groups = groups
        self.experts = experts
        self.rank = rank

    def __call__(self, layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        """Called by `state_dict()`."""
        for key, suffix in self._keys(prefix).items():
            value = state_dict.get(key)
            if value is None:
                continue
            if self.rank == 0:
                del state_dict[key]
                continue
            cut = corner(value, suffix, self.rank, self.groups, self.experts)
            if cut.shape != value.shape:
                state_dict[key] = cut.contiguous()

    def on_load(self, layer: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
        """Called by `load_state_dict()`, before the parameters are looked up."""
        live = dict(layer.named_parameters())
        for key, suffix in self._keys(prefix).items():
            param = live.get(key.removeprefix(prefix))
            if param is None:
                continue
            given = state_dict.get(key)
            if given is None and self.rank == 0:
                self._refuse_load_around_the_slot(state_dict, prefix, suffix)
                state_dict[key] = param.detach()
            elif given is not None and given.shape != param.shape and self.rank:
                full = torch.zeros_like(param, device=given.device)
                if corner(full, suffix, self.rank, self.groups, self.experts).shape == given.shape:
                    fill(full, suffix, given, self.rank, self.groups, self.experts)
                    state_dict[key] = full

    def _keys(self, prefix: str) -> dict[str, str]:
        """Key in a state_dict → suffix in a file."""
        name = self.adapter_name
        keys = {}
        for suffix in PARTS:
            container, _, tensor = suffix.partition(".")
            keys[f"{prefix}{container}.{name}" + (f".{tensor}" if tensor else "")] = suffix
        return keys

    def _refuse_load_around_the_slot(self, state_dict: dict[str, Any], prefix: str, suffix: str) -> None:
        # PEFT maps a file's keys to the model's by the model's own state_dict, which does not show an unused slot: the
        # tensor would be dropped in silence.
        for key in (prefix + suffix, "base_model.model." + prefix + suffix):
            if key in state_dict:
                raise ModelError(
                    f"PEFT cannot load into the slot {self.adapter_name!r}, which an attached swapper writes.",
                    where=key,
                    hint="load it through the swapper (swapper.load, swapper.activate), or under another adapter_name",
                )
