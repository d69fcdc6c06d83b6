"""Find PEFT's LoRA layers, however they came onto the model and whatever wraps it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .assembly import Assembly

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

_COMPILED = "_orig_mod"


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside of `torch.compile(model)`; any other module itself."""
    while isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        model = model._orig_mod
    return model


def model_of(holder: Any) -> Any:
    """The transformers model in a pipeline of transformers or in a SentenceTransformer; anything else itself."""
    held = getattr(holder, "model" if not isinstance(holder, nn.Module) else "transformers_model", None)
    return held if isinstance(held, nn.Module) else holder


def roots(model: nn.Module) -> dict[str, nn.Module]:
    """What stands before its modules' paths → model, for each model that keeps PEFT's configs: itself, or members."""
    model = unwrap(model)
    if isinstance(model, Assembly):
        return {f"{name}.": unwrap(member) for name, member in model.named_children()}
    return {"": model}


def callable_roots(model: nn.Module) -> list[nn.Module]:
    """The modules that stand for the whole model, outermost first: PeftModel, its tuner, the base model within.

    Of an Assembly those of each member.
    """
    from peft import AdaptionPromptModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if isinstance(unwrap(model), Assembly):
        return [root for member in roots(model).values() for root in callable_roots(member)]
    found = [unwrap(model)]
    while isinstance(found[-1], (PeftModel, BaseTuner, AdaptionPromptModel)):
        outer: Any = found[-1]
        inner = outer.base_model if isinstance(outer, PeftModel) else outer.model
        if not isinstance(inner, nn.Module):
            break
        found.append(unwrap(inner))
    return found


def innermost(model: nn.Module) -> nn.Module:
    """The base model within whatever PEFT and torch.compile have put around it; an Assembly itself."""
    model = unwrap(model)
    return model if isinstance(model, Assembly) else callable_roots(model)[-1]


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or a part of it has been given to torch.compile, in any of the three ways.

    A function compiled around the model (`torch.compile(step)`) cannot be seen from here.
    """
    optimized = torch._dynamo.eval_frame.OptimizedModule
    return any(
        isinstance(module, optimized)
        or module._compiled_call_impl is not None
        or "_compiled_call" in module.__dict__  # transformers' generate, with a static cache
        for module in model.modules()
    )


def is_on_gpu(model: nn.Module) -> bool:
    """Whether any of the model is on a GPU: page-locked memory makes copies there three times as fast."""
    return torch.cuda.is_initialized() and any(param.is_cuda for param in model.parameters())


def base_prefix(model: nn.Module) -> str:
    """What stands before a base module's path in the names of `model`, which PEFT's files never have."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if isinstance(model, PeftModel):
        return "base_model.model."
    return "model." if isinstance(model, BaseTuner) else ""


def canonical_name(name: str, prefix: str) -> str:
    """A module's path as PEFT's files have it: without wrappers of torch.compile and of PEFT."""
    return ".".join(part for part in name.split(".") if part != _COMPILED).removeprefix(prefix)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """(canonical path, layer) of every LoRA layer, each once."""
    for name, _, _, layer in lora_layers_with_parents(model):
        yield name, layer


def lora_layers_with_parents(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, LoraLayer]]:
    """(canonical path, parent, name in the parent, layer) of every LoRA layer below the root, each once."""
    from peft.tuners.lora import LoraLayer

    model = unwrap(model)
    prefix = base_prefix(model)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, LoraLayer) and name:
            parent, _, child = name.rpartition(".")
            yield canonical_name(name, prefix), modules[parent], child, module


def adapted_layers(model: nn.Module) -> Iterator[str]:
    """Canonical path of every layer that PEFT has put around one of the base model's, of whatever method."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = unwrap(model)
    prefix = base_prefix(model)
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield canonical_name(name, prefix)


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all LoRA adapters on the model, in the order of the layers."""
    names: dict[str, Any] = {}
    for _, layer in lora_layers(model):
        names.update(dict.fromkeys([*layer.lora_A, *layer.lora_embedding_A]))
    return list(names)


def count_slots(model: nn.Module, adapter_name: str) -> int:
    """How many LoRA layers of the model have this adapter. Walks the modules without making their names."""
    from peft.tuners.lora import LoraLayer

    count, stack, seen = 0, [unwrap(model)], set()
    is_layer: dict[type, bool] = {}  # LoraLayer is an abstract class, and asking one costs a microsecond
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        children = module._modules
        kind = type(module)
        if kind not in is_layer:
            is_layer[kind] = issubclass(kind, LoraLayer)
        if is_layer[kind]:
            matrices, embedding = children["lora_A"], children["lora_embedding_A"]
            assert matrices is not None
            assert embedding is not None
            count += adapter_name in matrices._modules or adapter_name in embedding._parameters
            children = {"base_layer": children["base_layer"]}  # nothing of interest is in its own matrices
        stack += [child for child in children.values() if child is not None and child._modules]
    return count
