"""One adapter name on one model, of whatever method, as it was found there."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import UnsupportedError
from ...methods import NOT_MERGEABLE
from ..calls import Calls, calls_of
from ..discover import callable_roots, innermost, roots, unwrap
from ..leaves import Held, Leaf, leaves_of
from ..state import peft_config

if TYPE_CHECKING:
    from peft import PeftConfig

_HALVES = (torch.float16, torch.bfloat16)


class Seat:
    """What PEFT keeps of one adapter name on the model: the places that others' values take.

    Args:
        model: the model, which is not kept alive by this.
        adapter_name: PEFT's name.

    Attributes:
        name: PEFT's name.
        method: of the adapter that was found, as adapter_config.json has it.
        state: path → leaf, of all that it has.
        autocast: whether PEFT may have cast its tensors of 16 bits to float32.
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self._model = weakref.ref(unwrap(model))
        self.name = adapter_name
        self.method = method_of(peft_config(model, adapter_name))
        if self.method == "XLORA":
            found = "XLORA, whose file lacks a layer of its classifier, and whose experts are in files of their own"
            raise unsupported(self.what, "peft_type", found, "another method")
        self.bare = len(callable_roots(model)) == 1  # in the base model, without PEFT's model around it
        self.state = leaves_of(model, adapter_name, bare=self.bare)
        for path, leaf in self.held.items():
            if not isinstance(leaf.holder, dict):
                raise unsupported(self.what, path, "a tensor in a list", "tensors that have a name")
        # diffusers leaves an adapter's tensors in the base's dtype.
        self.autocast = not any(leaf.tensor.dtype in _HALVES for leaf in self.held.values())

    @property
    def model(self) -> nn.Module:
        """The model."""
        model = self._model()
        assert model is not None
        return model

    @property
    def held(self) -> dict[str, Held]:
        """Path → leaf, of the tensors."""
        return {path: leaf for path, leaf in self.state.items() if isinstance(leaf, Held)}

    def leaves(self, skeleton: nn.Module) -> dict[str, Leaf]:
        """The same as `state`, of a fresh load."""
        return leaves_of(skeleton, self.name, bare=self.bare)

    @property
    def beside(self) -> frozenset[str]:
        """Names of the other adapters that the model has now."""
        model = self._model()
        return frozenset(residents(model) if model is not None else ()) - {self.name}

    def tensors_of(self, other: str) -> set[int]:
        """The ids of all tensors that another adapter of the model computes with."""
        leaves = leaves_of(self.model, other, bare=self.bare).values()
        return {id(leaf.tensor) for leaf in leaves if isinstance(leaf, Held)}

    # -- in messages -------------------------------------------------------------------------------------------------

    @property
    def what(self) -> str:
        """What was found."""
        return f"The adapter {self.name!r} on the model"

    @property
    def calls(self) -> Calls:
        """How a user takes it off the model."""
        return calls_of(self.model)

    @property
    def elsewhere(self) -> str:
        """Where to go with an adapter that cannot take this seat."""
        if self.method in NOT_MERGEABLE:
            return "put such an adapter on the model with PeftModel.from_pretrained, and attach to that"
        return f"{self.calls.unload}, and attach to the base model: there adapters are merged, whatever their shapes"


def unsupported(what: str, where: str, found: str, expected: str) -> UnsupportedError:
    """The refusal of something that has to be the same, and is not."""
    return UnsupportedError(
        f"{what} cannot be swapped in place.",
        where=where,
        found=found,
        expected=expected,
        hint="load it with PEFT itself; docs/supported.md lists what hotslot swaps",
    )


def method_of(config: PeftConfig) -> str:
    """Name of the method, as adapter_config.json has it."""
    kind: Any = config.peft_type
    return str(getattr(kind, "value", kind))


def residents(model: nn.Module) -> dict[str, str]:
    """Name → method of all adapters that are on the model."""
    found: dict[str, str] = {}
    for root in roots(model).values():
        configs = getattr(root, "peft_config", None) or getattr(innermost(root), "peft_config", None)
        for name, config in configs.items() if isinstance(configs, Mapping) else ():
            if found.get(name, "LORA") == "LORA":  # an Assembly's members may have several of one name
                found[name] = method_of(config)
    return found


def shape_of(leaf: Leaf) -> torch.Size:
    """Of a leaf that is a tensor."""
    assert isinstance(leaf, Held)
    return leaf.tensor.shape


def larger(shape: torch.Size, leaf: Leaf) -> torch.Size:
    """The shape that has room for both, where both have as many dimensions."""
    other = leaf.tensor.shape if isinstance(leaf, Held) else shape
    return torch.Size(map(max, shape, other)) if len(shape) == len(other) else shape
