"""The base model behind PEFT's layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..block import SlotShape
from ..errors import UnsupportedError
from ..methods import Adapter
from .copies import base_copies
from .discover import base_prefix, canonical_name, lora_layers, unwrap
from .saved import refuse_other_biases, refuse_other_modules, saved_wrappers, whole_modules
from .slots import Slot
from .tokens import refuse_other_tokens, token_wrappers
from .tying import as_loaded, refuse_torn_ties

_NESTED = ".base_layer"


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Canonical path → base module, PEFT's layers looked through."""
    model = unwrap(model)
    prefix = base_prefix(model)
    wrapped = {name: layer.get_base_layer() for name, layer in lora_layers(model)}
    found = {canonical_name(name, prefix): module for name, module in model.named_modules()}
    for fqn, wrapper in saved_wrappers(model):
        for name in [name for name in found if name.startswith(f"{fqn}.")]:
            del found[name]  # PEFT's own: the module and its copies
        found |= {f"{fqn}.{name}" if name else fqn: m for name, m in wrapper.original_module.named_modules()}
    for fqn, token_wrapper in token_wrappers(model):
        for name in [name for name in found if name.startswith(f"{fqn}.")]:
            del found[name]
        found[fqn] = token_wrapper.original_module
    return found | wrapped


def all_base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """`base_modules`, under each of their names."""
    return {**whole_modules(model), **base_modules(model)}


def parameter_name(fqn: str, adapter: Adapter, modules: Mapping[str, nn.Module]) -> str | None:
    """Which bare parameter of its module the adapter adapts at `fqn`; None if it is the module itself.

    A file does not say. PEFT wraps a module once for each of its parameters that the config names, in the order in
    which the module has them: the last one is outermost.
    """
    root = fqn.replace(_NESTED, "")
    module = modules.get(root)
    if not adapter.target_parameters or module is None:
        return None
    keys = [(f".{root}.{name}", name) for name, _ in module.named_parameters(recurse=False)]
    names = [name for key, name in keys if key.endswith(tuple(f".{target}" for target in adapter.target_parameters))]
    depth = (len(fqn) - len(root)) // len(_NESTED)
    return names[-1 - depth] if depth < len(names) else None


def refuse_other_parameters(model: nn.Module, slots: Mapping[str, Slot | SlotShape], adapter: Adapter) -> None:
    """Raise if a slot that the adapter wants, on the model or planned, is for another bare parameter or the module."""
    if not adapter.target_parameters and not any(slot.parameter for slot in slots.values()):
        return
    modules = base_modules(model)
    for fqn in adapter.targets:
        wanted = parameter_name(fqn, adapter, modules)
        if fqn in slots and slots[fqn].parameter != wanted:
            raise UnsupportedError(
                f"{adapter.checkpoint.origin} adapts another bare parameter than the slot.",
                where=fqn,
                found=f"{wanted or 'no bare parameter'}, by target_parameters {list(adapter.target_parameters)}",
                expected=slots[fqn].parameter or "no bare parameter, by the slot",
                hint="PEFT wants all adapters of a model to have the same target_parameters: attach for these alone",
            )


def refuse_other_base(model: nn.Module, adapter: Adapter) -> None:
    """Raise unless each tensor of the base that the adapter has values for is one of the model's, of its shape."""
    if not adapter.targets:
        return  # not for slots: the skeleton of its merge is compared with the model
    refuse_torn_ties(model, adapter)
    adapter = as_loaded(model, adapter)
    refuse_other_modules(model, adapter)
    refuse_other_biases(model, adapter)
    refuse_other_tokens(model, adapter, whole_modules(model) if adapter.tokens else {})
    if adapter.base_copies:
        list(base_copies(model, adapter, all_base_modules(model)))
