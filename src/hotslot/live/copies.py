"""Weights of the base model's embeddings that adapters carry along: PEFT writes them over the base model's own.

It saves them beside a LoRA on an embedding, where a vocabulary was resized, or where `save_embedding_layers` asks for
it. Nearly always they equal the model's, and say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from ..checkpoint import TensorSpec
from ..errors import UnexpectedTargetError, UnsupportedError
from ..methods import Adapter
from .tokens import tied_modules

_PREFIX = "base_model.model."


class Copy(NamedTuple):
    """A tensor of the base model, and where an adapter has values for it.

    Attributes:
        fqn, name: the module, and the tensor in it.
        holder: the dict that holds the tensor.
        spec: of the values.
        taken: whether PEFT takes them: the tensor's name has to be the one that the model has with this adapter on it.
    """

    fqn: str
    name: str
    holder: dict[str, Any]
    spec: TensorSpec
    taken: bool


def base_copies(model: nn.Module, adapter: Adapter, modules: Mapping[str, nn.Module]) -> Iterator[Copy]:
    """What the adapter carries, in the model's order: of a tied weight PEFT writes the last one over the others.

    Args:
        model: the model.
        adapter: the adapter.
        modules: path → base module.

    Raises:
        UnexpectedTargetError: the model has no such module.
        UnsupportedError: the weight is of another shape, as after resizing the vocabulary.
    """
    tied = tied_modules(model, adapter) if adapter.tokens else {}
    unknown = [fqn for fqn in adapter.base_copies if fqn not in modules]
    if unknown:
        copies = adapter.base_copies[unknown[0]]
        raise UnexpectedTargetError(
            f"{adapter.checkpoint.origin} carries weights of a module that the model does not have.",
            where=unknown[0],
            found=", ".join(f"{name} {tuple(spec.shape)}" for name, spec in copies.items()),
            expected="weights of the model's own embeddings at most",
            hint="this adapter belongs to another base model",
        )
    for fqn in [fqn for fqn in modules if fqn in adapter.base_copies]:
        wrapping = _wrapping(fqn, adapter, tied)
        for name, spec in adapter.base_copies[fqn].items():
            own: Any = getattr(modules[fqn], name, None)
            if own is None or own.shape != spec.shape:
                raise UnsupportedError(
                    f"{adapter.checkpoint.origin} carries weights of the base model, resized.",
                    where=f"{fqn}.{name}",
                    found=f"shape {tuple(spec.shape)}",
                    expected=f"the model's own, shape {tuple(own.shape) if own is not None else None}",
                    hint="resize the model's vocabulary before attaching; if the weights were not trained, "
                    "save the adapter with save_pretrained(…, save_embedding_layers=False)",
                )
            taken = spec.name.removeprefix(_PREFIX) == f"{fqn}.{wrapping}{name}"
            yield Copy(fqn, name, modules[fqn]._parameters, spec, taken)


def _wrapping(fqn: str, adapter: Adapter, tied: Mapping[str, str]) -> str:
    """What stands between the path of a module and its tensor's name when PEFT has put this adapter on the model."""
    if fqn in adapter.targets:
        return "base_layer."
    if fqn in adapter.tokens or fqn in tied:
        return "token_adapter.base_layer."
    return "original_module." if fqn in adapter.saved else ""
