"""Weights of the base model that adapters carry others for: of embeddings and output layers, and a pipeline's norms."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...errors import UnsupportedError
from ...methods import Adapter
from ..assembly import Assembly
from ..base import all_base_modules
from ..copies import Copy, base_copies
from ..discover import adapter_names
from ..norms import Norms
from ..offloading import offloaded_value, refuse_offloaded_tensor
from .sites import Key, Site, Sites


class WeightSites:
    """Those of one adapter name on one model, and what diffusers' own record says of the norms among them.

    Args:
        model: the model.
        adapter_name: PEFT's name of the slot.
        sites: takes theirs in.
    """

    def __init__(self, model: nn.Module, adapter_name: str, sites: Sites) -> None:
        self._adapter_name = adapter_name
        self._sites = sites
        self._norms = Norms(model, adapter_name)
        self._take_in_norms(model)

    def _take_in_norms(self, model: nn.Module) -> None:
        """Sites of the norms that an adapter of diffusers' has put in place before hotslot came."""
        found = dict(self._norms.of_resident(model))
        modules = all_base_modules(model) if found else {}
        for path, own in found.items():
            fqn, _, name = path.rpartition(".")
            holder = modules[fqn]._parameters
            refuse_offloaded_tensor(model, fqn, holder[name])
            self._sites.by_key["", path] = Site(holder, name, holder[name], kept=[own])
            self._sites.foreign.add(("", path))

    def values(self, model: nn.Module, adapter: Adapter) -> dict[Key, torch.Tensor]:
        """Those of the base's weights that the adapter carries and that are not the model's own; sites are made.

        Raises:
            UnsupportedError: PEFT drops some of them, or the model's other adapters would see them.
            ModelError: the weights are offloaded.
        """
        if not adapter.base_copies:
            return {}
        modules = all_base_modules(model)
        copies = list(base_copies(model, adapter, modules))
        with self._sites.changing():
            for copy in copies:
                if not copy.holder[copy.name].is_meta:  # offloaded: another one after each forward pass
                    self._sites.read["", f"{copy.fqn}.{copy.name}"] = copy.holder, copy.name
        # Of a tied weight the last one is what PEFT leaves behind.
        last = {id(copy.holder[copy.name]): copy for copy in copies if copy.taken}
        differing = [copy for copy in copies if self._differs(copy, adapter, modules[copy.fqn])]
        stray = next((copy for copy in differing if not copy.taken), None)
        if stray is not None:
            raise UnsupportedError(
                f"{adapter.checkpoint.origin} carries weights under a name that PEFT does not load.",
                where=stray.spec.name,
                found=f"other values than the model's for {stray.fqn}.{stray.name}",
                expected="the name that the tensor has in a model with this adapter on it",
                hint="remove them, or save the adapter again with save_pretrained",
            )
        values = {}
        for copy in differing:
            if last[id(copy.holder[copy.name])] is copy:
                refuse_offloaded_tensor(model, copy.fqn, copy.holder[copy.name])
                if not isinstance(model, Assembly):  # norms of a pipeline are whose they are to all its LoRAs
                    self._refuse_beside_others(model, adapter, f"{copy.fqn}.{copy.name}")
                values[self._take_in(copy)] = adapter.checkpoint.tensor(copy.spec.name)
        return values

    def _differs(self, copy: Copy, adapter: Adapter, module: nn.Module) -> bool:
        own = copy.holder[copy.name]
        own = next((site.own() for site in self._sites.by_key.values() if site.param is own), own)
        if own.is_meta:
            own = offloaded_value(module, copy.name)
        if own is None:  # a plan for a model whose weights are not loaded
            return False
        return not torch.equal(own, adapter.checkpoint.tensor(copy.spec.name).to(own.device, own.dtype))

    def _take_in(self, copy: Copy) -> Key:
        """The key of a base tensor's site, which has one under whichever of its names came first."""
        param = copy.holder[copy.name]
        known = next((key for key, site in self._sites.by_key.items() if site.param is param), None)
        if known is None:
            known = "", f"{copy.fqn}.{copy.name}"
            with self._sites.changing():
                self._sites.by_key[known] = Site(copy.holder, copy.name, param)
            self._norms.take_in(known[1])
        return known

    def _refuse_beside_others(self, model: nn.Module, adapter: Adapter, where: str) -> None:
        rivals = [name for name in adapter_names(model) if name != self._adapter_name]
        if rivals:
            raise UnsupportedError(
                f"{adapter.checkpoint.origin} carries weights of the base model, which another adapter on it uses too.",
                where=where,
                found=f"other values than the model's, beside {', '.join(map(repr, rivals))}",
                expected="no other adapter on the model",
                hint="use a model of its own for this adapter",
            )

    # -- diffusers' record of norms ----------------------------------------------------------------------------------

    def refuse_if_others_came(self, model: nn.Module | None) -> None:
        """Raise if another LoRA has put norms of its own in place since."""
        self._norms.refuse_if_others_came(model)

    @property
    def said(self) -> frozenset[str]:
        """Paths of the norms that the live adapter has put in place."""
        return self._norms.said

    def norms_among(self, values: Mapping[Key, torch.Tensor]) -> frozenset[str]:
        """Paths of the norms of which these are values."""
        return frozenset(path for fqn, path in values if not fqn) if self._norms.used else frozenset()

    def say(self, model: nn.Module | None, norms: frozenset[str]) -> None:
        """Let diffusers' record name these as the live adapter's."""
        self._norms.say(model, {path: self._sites.by_key["", path].own() for path in norms})
