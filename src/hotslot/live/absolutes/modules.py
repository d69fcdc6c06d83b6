"""Modules that adapters save whole: the copy in PEFT's wrapper is written, and the original beside it stays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container
from typing import Any

import torch
from torch import nn

from ...errors import ModelError, UnexpectedTargetError, UnsupportedError
from ...methods import Adapter
from ..discover import lora_layers
from ..inference import make_normal
from ..saved import named_tensors, saved_wrappers
from ..state_dict import SavedModule
from ..training import Mute
from .sites import Key, Site, Sites


class ModuleSites:
    """The copies of one adapter name on one model, and of which of them `state_dict` shows the live adapter's values.

    Args:
        adapter_name: PEFT's name of the slot.
        sites: takes theirs in.
    """

    def __init__(self, adapter_name: str, sites: Sites) -> None:
        self._adapter_name = adapter_name
        self._sites = sites
        self._wrappers: dict[str, Any] = {}
        self._shown: dict[str, bool] = {}  # shared with the hooks
        self._mutes: dict[str, Mute] = {}
        self._uninstall: list[Callable[[], object]] = []

    @property
    def fqns(self) -> Collection[str]:
        """Paths of the modules that have a copy to write."""
        return self._wrappers.keys()

    def find(self, model: nn.Module, wrapped: Collection[str]) -> None:
        """Take in the wrappers that the model has got since the last time.

        Args:
            model: the model.
            wrapped: paths of the modules whose wrapper is hotslot's own, and holds nothing yet.
        """
        adapted = [fqn for fqn, _ in lora_layers(model)]
        for fqn, wrapper in saved_wrappers(model):
            if fqn in self._wrappers or self._adapter_name not in wrapper.modules_to_save:
                continue
            inside = [layer for layer in adapted if layer.startswith(f"{fqn}.")]
            if inside:
                raise UnsupportedError(
                    f"The adapter {self._adapter_name!r} on the model has a LoRA within a module that it saves whole.",
                    where=inside[0],
                    expected="one or the other",
                    hint="load it with PEFT itself",
                )
            self._take_in(fqn, wrapper, fqn not in wrapped)

    def _take_in(self, fqn: str, wrapper: Any, shown: bool) -> None:
        copied = wrapper.modules_to_save[self._adapter_name]
        own = {name: (holder, key) for name, holder, key, _ in named_tensors(wrapper.original_module)}
        self._sites.refuse_others({(fqn, name): place for name, place in own.items()}, copied=True)
        make_normal((f"{fqn}.{name}", tensor) for name, _, _, tensor in named_tensors(copied))
        for name, holder, key, tensor in named_tensors(copied):
            param = tensor if isinstance(tensor, nn.Parameter) else None
            self._sites.by_key[fqn, name] = Site(holder, key, param, _reader(*own[name]))
            if shown:
                self._sites.foreign.add((fqn, name))
        self._wrappers[fqn], self._shown[fqn] = wrapper, shown
        params = list(copied.parameters())
        if params:
            self._mutes[fqn] = Mute(params, in_use=shown)
        SavedModule(fqn, self._adapter_name, self._shown, self._mutes.get(fqn)).install(wrapper, self._uninstall)

    def undo_find(self) -> Callable[[], None]:
        """A function that undoes a `find`, whole or broken off; to be made before. The sites are not its business."""
        tables: list[dict[str, Any]] = [self._wrappers, self._shown, self._mutes]
        before, installed = [dict(table) for table in tables], len(self._uninstall)

        def undo() -> None:
            for uninstall in reversed(self._uninstall[installed:]):
                uninstall()
            del self._uninstall[installed:]
            for table, was in zip(tables, before, strict=True):
                table.clear()
                table.update(was)

        return undo

    def release(self) -> None:
        """Let go of the model; what is written stays."""
        for uninstall in reversed(self._uninstall):
            uninstall()
        self._uninstall.clear()

    def refuse_if_deleted(self) -> None:
        """Raise if PEFT has taken the adapter's copy out of one of the wrappers."""
        for fqn, wrapper in self._wrappers.items():
            if self._adapter_name not in wrapper.modules_to_save:
                raise ModelError(
                    f"The adapter {self._adapter_name!r} was deleted from the model, or loaded anew.",
                    where=fqn,
                    expected="the copy of the module that was there at attach",
                    hint="attach again",
                )

    def refuse_unknown(self, adapter: Adapter) -> None:
        """Raise if the adapter saves a module that has no copy."""
        unknown = [fqn for fqn in adapter.saved if fqn not in self._wrappers]
        if unknown:
            keys = [spec.name for fqn in unknown for spec in adapter.saved[fqn].values()]
            raise UnexpectedTargetError(
                f"{adapter.checkpoint.origin} saves modules whole that the model was not prepared for; "
                f"unexpected keys found: {', '.join(keys[:8])}.",
                where=", ".join(unknown[:8]),
                found=f"{len(unknown)} modules of modules_to_save without a copy to write",
                expected=f"modules among {sorted(self._wrappers) or 'none'}",
                hint="attach with this adapter among adapters=, so that its modules get copies too",
            )

    def values(self, adapter: Adapter) -> dict[Key, torch.Tensor]:
        """What the adapter has for the copies."""
        return {
            (fqn, name): adapter.checkpoint.tensor(spec.name)
            for fqn, specs in adapter.saved.items()
            for name, spec in specs.items()
        }

    @property
    def shown(self) -> frozenset[str]:
        """Paths of the modules that the live adapter saves."""
        return frozenset(fqn for fqn, shown in self._shown.items() if shown)

    def show(self, fqns: Collection[str]) -> None:
        """Let `state_dict` show the values of these, and of the others none."""
        for fqn in self._shown:
            self._shown[fqn] = fqn in fqns
            if fqn in self._mutes:
                self._mutes[fqn].use(fqn in fqns)

    def make_neutral(self, params: Container[int]) -> None:
        """After a step of an optimizer of parameters with these ids: the model's own values where these are unused."""
        sites = self._sites.by_key.items()
        unused = [(key, site.tensor) for key, site in sites if not self._shown.get(key[0], True)]
        trained = [key for key, tensor in unused if id(tensor) in params and tensor.grad is not None]
        if trained:
            self._sites.put_back(trained)


def _reader(holder: dict[str, Any], name: str) -> Callable[[], torch.Tensor]:
    return lambda: holder[name]
