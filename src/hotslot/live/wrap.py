"""PEFT's wrappers put on a model and taken off: around modules that adapters save whole, and embeddings with tokens."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import nn

from ..errors import ModelError, UnsupportedError
from .activity import Choice
from .discover import base_prefix, canonical_name, lora_layers, unwrap
from .inference import set_requires_grad
from .offloading import refuse_offloaded
from .saved import saved_modules
from .tokens import token_rooms

# Wrappers that are on their models for hotslot's slots alone: the last slot to go puts the module back.
_made: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass(frozen=True, eq=False)
class Wrapping:
    """What `wrap` has done, for `unwrap_saved`.

    Attributes:
        adapter_name: PEFT's name of the slot.
        fqns: the modules that have a wrapper's place now, which holds nothing yet.
        wrappers: (siblings, name there, wrapper, which adapters were active in it and are now).
    """

    adapter_name: str
    fqns: tuple[str, ...]
    wrappers: list[tuple[dict[str, Any], str, Any, Choice]] = field(default_factory=list)


def wrap(
    model: nn.Module,
    adapter_name: str,
    saved: Collection[str] = (),
    tokens: Mapping[str, int] = MappingProxyType({}),
    tied: Mapping[str, str] = MappingProxyType({}),
) -> Wrapping:
    """Give these modules PEFT's wrappers, where `adapter_name` has no place in one yet.

    The base model's own tensors and flags stay as they are. If it raises, the model is as it was.

    Args:
        model: the model.
        adapter_name: PEFT's name of the slot.
        saved: paths of modules that get a copy for this adapter.
        tokens: path of an embedding → for how many tokens it gets places.
        tied: path of a module → path of the one in `tokens` whose tokens it shows.
    """
    model = unwrap(model)
    with_tokens = tokens.keys() - token_rooms(model, adapter_name).keys()
    missing = sorted({*saved} - saved_modules(model, adapter_name) | with_tokens)
    missing += [fqn for fqn, source in tied.items() if source in missing]  # after what they are tied to
    wrapping = Wrapping(adapter_name, tuple(missing))
    slots = [layer for _, layer in lora_layers(model) if adapter_name in layer._get_available_adapters()]
    active = any(adapter_name in layer.active_adapters for layer in slots)
    disabled = any(layer.disable_adapters for layer in slots)
    places = _places(model) if missing else {}
    try:
        for fqn in missing:
            siblings, child = places[fqn]
            module = siblings[child]
            _refuse_compiled(fqn, module)
            _refuse_other_use(fqn, module, saves=fqn in saved)
            original: Any = getattr(module, "original_module", module)
            _refuse_meta(fqn, original)
            before = getattr(module, "_active_adapter", [])
            choice = Choice(before, adapter_name if active else before)
            if original is not module:
                if active:
                    _refuse_another(fqn, module, adapter_name)
                wrapping.wrappers.append((siblings, child, module, choice))
            flags = [param.requires_grad for param in original.parameters()]
            if fqn in saved:
                wrapper = _wrapper_of_copies(adapter_name, module)
                copies = [original, wrapper.modules_to_save[adapter_name]]
            else:
                source_siblings, source_child = places[tied.get(fqn, fqn)]
                source = source_siblings[source_child].token_adapter if fqn in tied else None
                wrapper = _wrapper_of_tokens(adapter_name, fqn, module, tokens.get(fqn, 0), source)
                copies = [original]
            if wrapper is not module:
                _made.add(wrapper)
                wrapping.wrappers.append((siblings, child, wrapper, choice))
                siblings[child] = wrapper
                _set_disabled(wrapper, disabled)
            # The copy as trainable as the original: torch's linear takes a kernel with another rounding for a frozen
            # weight, and the copy is to compute what the original does where no adapter has values for it.
            for copied in copies:
                for param, flag in zip(copied.parameters(), flags, strict=True):
                    set_requires_grad(param, flag)
            _set_active(wrapper, choice.given)
        return wrapping
    except BaseException:
        unwrap_saved(wrapping)
        raise


def unwrap_saved(wrapping: Wrapping) -> None:
    """Undo `wrap`: the modules back in their places, unless other adapters have copies or tokens. May be repeated."""
    name = wrapping.adapter_name
    for siblings, child, wrapper, choice in wrapping.wrappers:
        _forget(wrapper, name)
        there = wrapper._get_available_adapters()
        _set_active(wrapper, choice.without(name, wrapper._active_adapter, there))
        if wrapper in _made and not there and child in siblings and unwrap(siblings[child]) is wrapper:
            siblings[child] = wrapper.original_module


def _wrapper_of_copies(adapter_name: str, module: Any) -> Any:
    """A ModulesToSaveWrapper around the module, or the one that it is, with a copy for the adapter."""
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        module.update(adapter_name)
        return module
    made = ModulesToSaveWrapper(module, adapter_name)
    made.training = module.training
    return made


def _wrapper_of_tokens(name: str, fqn: str, module: Any, room: int, source: Any) -> Any:
    """A TrainableTokensWrapper, likewise: with `room` tokens, whose rows are the module's own; or tied to `source`."""
    from peft.utils.other import TrainableTokensWrapper

    tokens = list(range(room))
    if isinstance(module, TrainableTokensWrapper):
        if module.token_adapter.tied_adapter is not source:
            raise UnsupportedError(
                "An adapter has tokens of a module that another adapter on the model ties to the embedding, or not.",
                where=fqn,
                found=f"tied: {module.token_adapter.tied_adapter is not None}",
                expected=f"tied: {source is not None}",
                hint="use a model of its own for this adapter",
            )
        module.update(name, token_indices=tokens, tied_adapter=source)
        wrapper: Any = module
    else:
        wrapper = TrainableTokensWrapper(module, name, tokens, tied_adapter=source)
        for part in (wrapper, wrapper.token_adapter):
            part.training = module.training
    if source is None:
        wrapper.token_adapter.trainable_tokens_delta[name].requires_grad_(False)
    return wrapper


def _forget(wrapper: Any, adapter_name: str) -> None:
    from .token_layer import leave_slot_tokens

    layer = getattr(wrapper, "token_adapter", None)
    containers = [wrapper.modules_to_save] if layer is None else [
        layer.trainable_tokens_delta, layer.trainable_tokens_original, layer.token_indices,
    ]  # fmt: skip
    for container in containers:
        if adapter_name in container:
            del container[adapter_name]
    wrapper._adapters.discard(adapter_name)
    if layer is not None:
        leave_slot_tokens(wrapper, adapter_name)


def _set_active(wrapper: Any, active: Any) -> None:
    wrapper._active_adapter = active
    if hasattr(wrapper, "token_adapter"):
        wrapper.token_adapter._active_adapter = active


def _set_disabled(wrapper: Any, disabled: bool) -> None:
    wrapper._disable_adapters = disabled
    if hasattr(wrapper, "token_adapter"):
        wrapper.token_adapter._disable_adapters = disabled


def _refuse_another(fqn: str, wrapper: Any, adapter_name: str) -> None:
    """Raise if an adapter is active in the wrapper that would be passed over if this one were."""
    others = {*wrapper.active_adapters} & wrapper._get_available_adapters() - {adapter_name}
    if others:
        raise UnsupportedError(
            "Two adapters that are active at once save the same module whole, or have tokens of it.",
            where=fqn,
            found=f"{adapter_name!r}, and on the model: {', '.join(map(repr, sorted(others)))}",
            expected="one of them: PEFT computes with one copy of a module at a time",
            hint=f"attach(model, adapter_name={min(others)!r}) swaps in the place of the one that is there; or use a "
            "model of its own for this adapter",
        )


def _refuse_other_use(fqn: str, module: Any, *, saves: bool) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    other = isinstance(module, AuxiliaryTrainingWrapper) and isinstance(module, ModulesToSaveWrapper) != saves
    if other or isinstance(module, BaseTunerLayer):
        raise UnsupportedError(
            "An adapter saves a module whole, or has tokens of it, of which another one on the model makes other use.",
            where=fqn,
            found=type(module).__name__,
            expected="one or the other: PEFT wraps a module once",
            hint="use a model of its own for this adapter",
        )


def _refuse_compiled(fqn: str, module: Any) -> None:
    if module is not unwrap(module):
        raise ModelError(
            "A module that an adapter saves whole, or has tokens of, was compiled by itself.",  # it would be passed by
            where=fqn,
            expected="a module that is not wrapped by torch.compile",
            hint="attach before torch.compile",
        )


def _places(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Canonical path → (the parent's modules, name there), for all modules under each of their names."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    prefix = base_prefix(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    hidden: tuple[str, ...] = ()
    places: dict[str, tuple[dict[str, Any], str]] = {}
    for name, module in modules.items():
        if name and not name.startswith(hidden):
            parent, _, child = name.rpartition(".")
            # Outermost first: a module within torch.compile's wrapper has the wrapper's path.
            places.setdefault(canonical_name(name, prefix), (modules[parent]._modules, child))
            if isinstance(module, AuxiliaryTrainingWrapper):
                hidden += (f"{name}.",)
    return places


def _refuse_meta(fqn: str, module: nn.Module) -> None:
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_meta:
            refuse_offloaded(module, fqn)
            raise ModelError(
                "A module that an adapter saves whole, or has tokens of, has parameters without memory.",
                where=f"{fqn}.{name}",
                found="device meta",
                expected="weights that are loaded",
                hint="load the model's weights first, or bring back what is offloaded",
            )
