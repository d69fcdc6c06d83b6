"""Modules that adapters save whole (`modules_to_save`), and PEFT's wrappers around them.

A wrapper holds the module itself, which is the pristine store, and for each adapter a copy, which is what is written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import DoesNotFitError, ShapeError, UnexpectedTargetError, UnsupportedError
from ..methods import Adapter
from .discover import base_prefix, canonical_name, lora_layers, unwrap

if TYPE_CHECKING:
    from peft.utils.other import ModulesToSaveWrapper


def saved_wrappers(model: nn.Module) -> Iterator[tuple[str, ModulesToSaveWrapper]]:
    """(canonical path, wrapper) of every ModulesToSaveWrapper, each once."""
    from peft.utils.other import ModulesToSaveWrapper

    model = unwrap(model)
    prefix = base_prefix(model)
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield canonical_name(name, prefix), module


def saved_modules(model: nn.Module, adapter_name: str) -> set[str]:
    """Paths of the modules of which the model has a copy for this adapter."""
    return {fqn for fqn, wrapper in saved_wrappers(model) if adapter_name in wrapper.modules_to_save}


def whole_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Canonical path → module, under each of its names, with what PEFT has put around or inside looked through."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    model = unwrap(model)
    prefix, found = base_prefix(model), {}
    hidden: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(hidden):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            hidden += (f"{name}.",)
            path, original = canonical_name(name, prefix), module.original_module
            found[path] = original
            found |= {f"{path}.{inner}": m for inner, m in original.named_modules(remove_duplicate=False) if inner}
        else:
            found[canonical_name(name, prefix)] = module
    return found


def base_biases(model: nn.Module) -> dict[str, nn.Module]:
    """Path in the base model → the module, for all that have a bias."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, nn.Module] = {}
    for path, module in whole_modules(model).items():
        if not isinstance(module, BaseTunerLayer) and isinstance(module._parameters.get("bias"), nn.Parameter):
            found.setdefault(path.replace(".base_layer", ""), module)
    return found


def refuse_other_biases(model: nn.Module, adapter: Adapter) -> None:
    """Raise unless each base bias that the adapter carries is one of the model's, of its shape."""
    if not adapter.biases:
        return
    modules, origin = base_biases(model), adapter.checkpoint.origin
    unknown = [specs["bias"].name for fqn, specs in adapter.biases.items() if fqn not in modules]
    if unknown:
        raise UnexpectedTargetError(
            f"{origin} carries biases that the model does not have; unexpected keys found: {', '.join(unknown[:8])}.",
            where=unknown[0],
            found=f"{len(unknown)} of {len(adapter.biases)} biases missing in {type(unwrap(model)).__name__}",
            expected="the biases of the model that the adapter was trained on",
            hint="this adapter belongs to another base model",
        )
    for fqn, specs in adapter.biases.items():
        own: Any = modules[fqn].bias
        spec = specs["bias"]
        if tuple(own.shape) != spec.shape:
            raise ShapeError(
                f"{origin} carries a bias of another size.",
                where=f"{fqn}.bias",
                found=f"shape {spec.shape}",
                expected=f"{tuple(own.shape)}, by the model",
                hint="this adapter belongs to another base model",
            )


def refuse_other_modules(model: nn.Module, adapter: Adapter) -> None:
    """Raise unless each module that the adapter saves whole is one of the model's, with these tensors and shapes."""
    names = tuple(adapter.checkpoint.config.get("modules_to_save") or ())
    if not names:
        return
    modules, origin = whole_modules(model), adapter.checkpoint.origin
    adapted = [fqn for fqn, _ in lora_layers(model)]
    for fqn, specs in adapter.saved.items():
        keys = [spec.name for spec in specs.values()]
        if fqn not in modules:
            raise UnexpectedTargetError(
                f"{origin} saves a module that the model does not have; unexpected keys found: {', '.join(keys[:8])}.",
                where=fqn,
                found=f"no such module in {type(unwrap(model)).__name__}",
                expected="the paths of the model that the adapter was trained on",
                hint="this adapter belongs to another base model, or to a model with another head",
            )
        inside = [layer for layer in adapted if f"{layer}.".startswith(f"{fqn}.")]
        if inside:
            raise UnsupportedError(
                f"{origin} saves a module whole on which the model has a LoRA of another adapter.",
                where=inside[0],
                found=f"{fqn!r} by modules_to_save, and a LoRA layer",
                expected="one or the other",
                hint="use a model of its own for this adapter",
            )
        _refuse_other_tensors(fqn, {name: spec.shape for name, spec in specs.items()}, modules[fqn], origin)
    # PEFT wraps whatever ends with one of the names, and then cannot load a file that lacks it.
    for fqn in modules:
        if fqn.endswith(names) and not any(f"{fqn}.".startswith(f"{saved}.") for saved in adapter.saved):
            raise DoesNotFitError(
                f"{origin} lacks a module that its config says it saves.",
                where=fqn,
                found=f"modules_to_save: {list(names)}, no tensor of {fqn!r} in the file",
                expected="all modules of the model whose path ends with one of these names",
                hint="this adapter belongs to another base model, or its file was cut",
            )


def _refuse_other_tensors(fqn: str, given: Mapping[str, tuple[int, ...]], module: nn.Module, origin: str) -> None:
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if given.keys() != own.keys():
        raise UnexpectedTargetError(
            f"{origin} saves a module whole that has other tensors in the model.",
            where=fqn,
            found=", ".join(sorted(given)),
            expected=f"{', '.join(sorted(own))}, by the model",
            hint="this adapter belongs to another base model, or to a model with another head",
        )
    for name, shape in given.items():
        if shape != own[name]:
            raise ShapeError(
                f"{origin} saves a module whole that has other dimensions in the model.",
                where=f"{fqn}.{name}",
                found=f"shape {shape}",
                expected=f"{own[name]}, by the model",
                hint="build the model as the adapter was trained, with as many labels or tokens",
            )


def refuse_adapted_and_saved(adapted: Collection[str], saved: Collection[str], tokens: Collection[str] = ()) -> None:
    """Raise if a module is to have two of: a LoRA slot, a copy that adapters save whole, places for tokens."""
    _refuse_within(adapted, saved, "a LoRA", "saves whole", "modules_to_save")
    _refuse_within(tokens, saved, "tokens", "saves whole", "modules_to_save")
    _refuse_within(adapted, tokens, "a LoRA", "has tokens of", "trainable_token_indices")


def _refuse_within(inner: Iterable[str], outer: Collection[str], what: str, does: str, option: str) -> None:
    for fqn in inner:
        around = next((path for path in outer if f"{fqn}.".startswith(f"{path}.")), None)
        if around is not None:
            raise UnsupportedError(
                f"One adapter has {what} on a module that another one {does}.",
                where=fqn,
                found=f"{what} on it, and {around!r} by {option}",
                expected="one or the other: PEFT wraps a module once",
                hint="attach them to models of their own",
            )


def named_tensors(module: nn.Module) -> Iterator[tuple[str, dict[str, Any], str, torch.Tensor]]:
    """(name as in state_dict, the dict that has it, name there, tensor) of all that `state_dict` shows."""
    for path, owner in module.named_modules(remove_duplicate=False):
        holders: list[tuple[dict[str, Any], Iterable[str]]] = [
            (owner._parameters, list(owner._parameters)),
            (owner._buffers, [name for name in owner._buffers if name not in owner._non_persistent_buffers_set]),
        ]
        for holder, names in holders:
            for name in names:
                if holder[name] is not None:
                    full = f"{path}.{name}" if path else name
                    yield full.replace("_orig_mod.", ""), holder, name, holder[name]
