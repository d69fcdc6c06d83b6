"""What `state_dict()` shows of a slot: the adapter that is live, at its own rank, and not the padding around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ModelError
from ..methods import MAGNITUDE, PARTS
from .corner import corner, fill
from .slots import Slot

# Which of the layer's records says that the live adapter has the part.
_FLAGS = {"lora_B.bias": "lora_bias", MAGNITUDE: "use_dora"}


class TrueRank:
    """Hook of one LoRA layer: on saving cut each part to the live rank, on loading put it back among the padding.

    Attributes:
        params: suffix → the Parameter it speaks for. Another one under the same name is not its business: after
            `delete_adapter` PEFT may load anything there. Copies and pickles of the layer keep the two together.
    """

    def __init__(self, slot: Slot, ranks: Mapping[str, int]) -> None:
        """Speak for `slot`; `ranks`, which all hooks of an adapter share, has its live rank under its path."""
        self.fqn = slot.fqn
        self.adapter_name = slot.adapter_name
        self.groups = slot.groups
        self.experts = slot.experts
        self.params = slot.params
        self._ranks = ranks

    @property
    def rank(self) -> int:
        """Of the live adapter; 0 where it does not target this layer, and then nothing of the slot is shown."""
        return self._ranks[self.fqn]

    def __call__(self, layer: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        """Called by `state_dict()`."""
        live = dict(layer.named_parameters())
        for key, suffix in self._keys(prefix).items():
            if key in state_dict and live.get(key.removeprefix(prefix)) is self.params.get(suffix):
                shown = self._shown(layer, state_dict[key], suffix)
                if shown is None:
                    del state_dict[key]
                elif shown.shape != state_dict[key].shape:
                    state_dict[key] = shown.contiguous()

    def on_load(
        self,
        layer: Any,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        errors: list[str],
    ) -> None:
        """Called by `load_state_dict()`, before the parameters are looked up: what fits is what `state_dict` shows."""
        live = dict(layer.named_parameters())
        for key, suffix in self._keys(prefix).items():
            param = live.get(key.removeprefix(prefix))
            own = self.params.get(suffix) is param
            if param is None or not own:
                continue
            given, shown = state_dict.get(key), self._shown(layer, param.detach(), suffix)
            if shown is None:
                self._refuse_load_around_the_slot(state_dict, prefix, suffix)
                if given is not None and strict:
                    unexpected_keys.append(key)
                state_dict[key] = param.detach()
            elif given is not None and given.shape != shown.shape:
                errors.append(
                    f"size mismatch for {key}: copying a param with shape {given.shape} from checkpoint, "
                    f"the shape in current model is {shown.shape}."
                )
                state_dict[key] = param.detach()
            elif given is not None and given.shape != param.shape:
                full = torch.zeros_like(param, device=given.device, dtype=given.dtype)
                fill(full, suffix, given, self.rank, self.groups, self.experts)
                state_dict[key] = full

    def _shown(self, layer: Any, value: torch.Tensor, suffix: str) -> torch.Tensor | None:
        """The live adapter's part of a padded tensor; None if it has none there."""
        if self.rank == 0 or not getattr(layer, _FLAGS.get(suffix, "r")).get(self.adapter_name):
            return None
        return corner(value, suffix, self.rank, self.groups, self.experts)

    def _keys(self, prefix: str) -> dict[str, str]:
        """Key in a state_dict → suffix in a file."""
        return {prefix + part.key(self.adapter_name): suffix for suffix, part in PARTS.items()}

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
