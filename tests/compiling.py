"""The ways of compiling a model, with a backend that counts: what tests of recompilation share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

# Where the zoo's models keep their layers; the others are cut into their children.
_LAYERS = ("model.layers", "encoder.layer", "transformer.h")


class Backend:
    """Runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        return self  # transformers copies what it hands to torch.compile


def _layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, layer) of what is compiled one by one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    paths = [path for path in _LAYERS if path in dict(base.named_modules())]
    for parent in [base.get_submodule(path) for path in paths] or [base]:
        yield from ((parent, name, layer) for name, layer in list(parent.named_children()))


def _wrapped(model: nn.Module, backend: Any) -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


def _in_place(model: nn.Module, backend: Any) -> Any:
    model.compile(backend=backend, fullgraph=True)
    return model


def _each_layer(model: nn.Module, backend: Any) -> Any:
    for _, _, layer in _layers(model):
        layer.compile(backend=backend, fullgraph=True)
    return model


def _each_layer_wrapped(model: nn.Module, backend: Any) -> Any:
    for parent, name, layer in _layers(model):
        setattr(parent, name, torch.compile(layer, backend=backend, fullgraph=True))
    return model


# (model, backend) → what to call; `fullgraph` because a graph break would leave something to eager in silence
WAYS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "torch.compile(model)": _wrapped,
    "model.compile()": _in_place,
    "layer.compile() each": _each_layer,
    "torch.compile(layer) each": _each_layer_wrapped,
}
