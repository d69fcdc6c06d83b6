"""A model's structure as it was, to be put back when preparing the model is broken off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .inference import set_requires_grad

ABSENT = object()
_ACTIVE = ("_active_adapter", "active_adapter")  # of layers and wrappers; of PEFT's models
# Of LoRA layers, and of a ParameterDict.
_RECORDS = ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias", "lora_variant", "_keys")
_MODEL_ATTRIBUTES = ("peft_config", "_hf_peft_config_loaded")


class Photo:
    """Which modules and Parameter objects are where, with which flags, and PEFT's records of them. No values.

    Args:
        model: the model that keeps PEFT's configs.
        around: PEFT's own models around it.
    """

    def __init__(self, model: nn.Module, around: Iterable[nn.Module] = ()) -> None:
        self._model = model
        self._modules = [_ModulePhoto(module) for module in (*around, *model.modules())]
        self._flags = [(param, param.requires_grad) for param in model.parameters()]
        self.attributes = {key: model.__dict__.get(key, ABSENT) for key in _MODEL_ATTRIBUTES}
        configs = self.attributes["peft_config"]
        self.configs: dict[str, Any] = dict(configs) if isinstance(configs, dict) else {}

    def put_back_flags(self) -> None:
        """Each parameter as trainable as it was."""
        for param, flag in self._flags:
            set_requires_grad(param, flag)

    def put_back_active(self) -> None:
        """The adapters that were active, and no others."""
        for photo in self._modules:
            photo.put_back_active()

    def put_back(self) -> None:
        """All of it."""
        for photo in self._modules:
            photo.put_back()
        self.put_back_flags()
        for key, value in self.attributes.items():
            if value is ABSENT:
                self._model.__dict__.pop(key, None)
            else:
                self._model.__dict__[key] = value
        configs = self.attributes["peft_config"]
        if isinstance(configs, dict):
            configs.clear()
            configs.update(self.configs)


class _ModulePhoto:
    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._children = dict(module._modules)
        self._parameters = dict(module._parameters)
        self._training = module.training
        self._active = {key: module.__dict__[key] for key in _ACTIVE if key in module.__dict__}
        adapters = module.__dict__.get("_adapters")
        self._adapters = set(adapters) if isinstance(adapters, set) else None
        records = {key: module.__dict__.get(key) for key in _RECORDS}
        self._records = [(record, dict(record)) for record in records.values() if type(record) is dict]

    def put_back_active(self) -> None:
        self._module.__dict__.update(self._active)

    def put_back(self) -> None:
        module = self._module
        if self._children.keys() != module._modules.keys() or any(
            module._modules[name] is not child for name, child in self._children.items()
        ):
            module._modules.clear()
            module._modules.update(self._children)
        module._parameters.clear()
        module._parameters.update(self._parameters)
        module.training = self._training
        self.put_back_active()
        if self._adapters is not None:
            module.__dict__["_adapters"] = set(self._adapters)
        for record, content in self._records:
            record.clear()
            record.update(content)
