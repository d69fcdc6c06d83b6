"""Biases of the base model that adapters have others for (`bias`): written over the model's own, as PEFT does."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedError
from ...methods import Adapter
from ..discover import adapted_layers
from ..inference import refuse_inference
from ..offloading import refuse_offloaded_tensor
from ..saved import base_biases
from ..skeleton import base_tree
from ..state import peft_configs
from .sites import Key, Site, Sites


class BiasSites:
    """The base's biases that one adapter name writes, those among them whose own values nobody knows any more.

    Args:
        adapter_name: PEFT's name of the slot.
        sites: takes theirs in.
    """

    def __init__(self, adapter_name: str, sites: Sites) -> None:
        self._adapter_name = adapter_name
        self._sites = sites

    def find_lost(self, model: nn.Module) -> None:
        """Take in all biases that an adapter of PEFT's may have written over before hotslot came."""
        configs = {prefix: found.get(self._adapter_name) for prefix, found in peft_configs(model).items()}
        biased = {prefix: config.bias for prefix, config in configs.items() if config and _has_biases(config)}
        if not biased:
            return
        adapted = {fqn.replace(".base_layer", "") for fqn in adapted_layers(model)}
        for fqn, module in base_tree(model):
            holder, param = module._parameters, module._parameters.get("bias")
            bias = next((bias for prefix, bias in biased.items() if fqn.startswith(prefix)), "none")
            if param is not None and (bias == "all" or (bias.endswith("_only") and fqn in adapted)):
                refuse_offloaded_tensor(model, fqn, param)
                key = "", f"{fqn}.bias"
                self._sites.by_key[key] = Site(holder, "bias", param, lost=True)
                self._sites.foreign.add(key)

    def take_in(self, model: nn.Module, fqns: Collection[str], what: str) -> None:
        """Make sites of the biases of these modules of the base model, for which `what` has values.

        Raises:
            UnsupportedError: another adapter on the model has some, too, or another swapper writes there.
            ModelError: they are offloaded.
        """
        if not fqns:
            return
        configs = [(name, config) for found in peft_configs(model).values() for name, config in found.items()]
        rivals = [one for one in configs if one[0] != self._adapter_name and _has_biases(one[1])]
        if rivals:
            raise UnsupportedError(
                f"{what} carries biases of the base model, and so does another adapter on it.",
                where="bias",
                found=f"bias of {rivals[0][0]!r}: {rivals[0][1].bias!r}",
                expected="one adapter with biases, as in PEFT",
                hint="use a model of its own for this adapter",
            )
        modules = base_biases(model)
        places: dict[Key, Any] = {("", f"{fqn}.bias"): (modules[fqn]._parameters, "bias") for fqn in fqns}
        self._sites.refuse_others(places)
        for fqn in fqns:
            refuse_offloaded_tensor(model, fqn, modules[fqn]._parameters["bias"])
            bias: Any = modules[fqn].bias
            refuse_inference(f"{fqn}.bias", bias, "written over")
        with self._sites.changing():
            for key in places.keys() - self._sites.by_key.keys():
                holder, name = places[key]
                self._sites.by_key[key] = Site(holder, name, holder[name])

    def values(self, adapter: Adapter) -> dict[Key, torch.Tensor]:
        """What the adapter has for them."""
        return {
            ("", f"{fqn}.bias"): adapter.checkpoint.tensor(specs["bias"].name) for fqn, specs in adapter.biases.items()
        }

    def refuse_without(self, biases: Collection[str], what: str) -> None:
        """Raise unless these are all biases whose own values are lost, for nothing can put those back.

        Args:
            biases: their names, of which `what`, something that is to be live, has values.
            what: to call it in the message.
        """
        without = [name for (_, name), site in self._sites.by_key.items() if site.lost and name not in biases]
        if without:
            raise UnsupportedError(
                f"{what} lacks biases that the adapter {self._adapter_name!r}, which came with the model, "
                "has put in the place of the base model's.",
                where=without[0],
                found=f"{len(without)} biases that nobody knows any more, and it has no others for",
                expected="an adapter with a bias for each, of bias='all' or the same targets",
                hint="attach to the base model, with the adapter that came with this one among adapters=",
            )

    def refuse_merges_into_lost(self, places: Mapping[Key, Any]) -> None:
        """Raise if one of these, which are to be computed from the own values, is a bias that has lost them."""
        sites = self._sites.by_key
        lost = [key[1] for key in places if key in sites and sites[key].lost]
        if lost:
            raise UnsupportedError(
                f"The adapter {self._adapter_name!r}, which came with the model, has put its biases in the place of "
                "the base model's, so that nothing can be merged into those.",
                where=lost[0],
                found=f"{len(lost)} biases that nobody knows any more",
                expected="a merge that leaves them alone",
                hint="attach to the base model, with the adapter that came with this one among adapters=",
            )


def _has_biases(config: Any) -> bool:
    return getattr(config, "bias", "none") not in ("none", None)
