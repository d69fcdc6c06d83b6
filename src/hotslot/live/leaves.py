"""What PEFT keeps of an adapter on a model: every tensor, number and type, by the path where its code looks it up.

Nothing here knows a method. It is whatever stands in modules that are not the base model's own, under the adapter's
name or under none.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Iterator, Mapping
from itertools import chain
from operator import getitem
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .discover import callable_roots, unwrap
from .skeleton import base_tree

_PLAIN = (
    int, float, complex, str, bytes, bool, type(None), enum.Enum, torch.dtype, torch.device, type, set, frozenset,
)  # fmt: skip
# Who is active, training or merged, and not what an adapter is; and what others put into a module's attributes.
_PASSED_BY = {
    "training", "active_adapter", "_active_adapter", "_adapters_disabled", "_disable_adapters", "_enabled",
    "merged_adapters", "inference_mode", "_hf_hook", "_old_forward", "forward", "_call_impl",
    "rankallocator", "trainable_adapter_name",  # of AdaLoRA in training
    "_seed_shadow_state", "last_shadow_loss",  # of Shadow's last forward
} | set(vars(nn.Module()))  # fmt: skip


class Value:
    """A plain value, where PEFT's code looks it up."""

    def __init__(self, holder: Any, key: Any) -> None:
        self.holder, self.key = holder, key

    def read(self) -> Any:
        """As it is now."""
        return self.holder[self.key]

    def write(self, value: Any) -> None:
        """Who edits the model's copy does not edit the adapter's."""
        self.holder[self.key] = copy.copy(value)


class Rate:
    """The rate of a dropout, which PEFT makes an Identity of where it is 0."""

    def __init__(self, siblings: dict[str, Any], key: str) -> None:
        self._siblings, self._key, self._own = siblings, key, siblings[key]

    def read(self) -> float:
        """As it is now."""
        return float(getattr(self._siblings[self._key], "p", 0.0))

    def write(self, value: float) -> None:
        """Into the Dropout that is there; in the place of an Identity stands one only while it is needed."""
        if isinstance(self._own, nn.Dropout):
            self._own.p = value
        else:
            training = self._siblings[self._key].training
            self._siblings[self._key] = (nn.Dropout(value) if value else self._own).train(training)


class Held(NamedTuple):
    """A tensor, and where PEFT's code looks it up."""

    holder: Any
    key: Any
    tensor: torch.Tensor


class Fact(NamedTuple):
    """What has to be the same on both sides: a type, or that something is shared."""

    kind: str


Leaf: TypeAlias = "Value | Rate | Held | Fact"


class Plain:
    """All plain values of an adapter, read and written at once: a swap does so with thousands of them.

    Args:
        leaves: all that it has.
    """

    def __init__(self, leaves: Mapping[str, Leaf]) -> None:
        self._values = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Value)}
        self._rates = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Rate)}
        self._holders = [leaf.holder for leaf in self._values.values()]
        self._keys = [leaf.key for leaf in self._values.values()]

    def read(self) -> tuple[Any, ...]:
        """As they are now."""
        values = map(getitem, self._holders, self._keys)
        return (*values, *(leaf.read() for leaf in self._rates.values()))

    def read_from(self, leaves: Mapping[str, Leaf], instead: Mapping[str, Any]) -> tuple[Any, ...]:
        """The same of a fresh load; what is equal is the same object as here, so that `write` need not compare.

        Args:
            leaves: of the fresh load.
            instead: path → what to read there in the place of what it has.
        """
        found = [(path, leaves[path]) for path in (*self._values, *self._rates)]
        theirs = [instead.get(path, leaf.read()) for path, leaf in found if isinstance(leaf, (Value, Rate))]
        return tuple(own if same(own, value) else value for own, value in zip(self.read(), theirs, strict=True))

    def write(self, plain: tuple[Any, ...]) -> None:
        """Write them. Those that are there already stay the same objects."""
        leaves: chain[Value | Rate] = chain(self._values.values(), self._rates.values())
        for leaf, old, new in zip(leaves, self.read(), plain, strict=True):
            if old is not new and not same(old, new):
                leaf.write(new)


def leaves_of(model: nn.Module, adapter_name: str, *, bare: bool) -> dict[str, Leaf]:
    """Path → leaf of all that PEFT has put on the model, but for what is of other adapters alone.

    `bare`: of its layers alone, where they stand in the base model without PEFT's model around it.
    """
    return dict(_Walk(unwrap(model), adapter_name, bare).leaves())


class _Walk:
    """One walk over a model, everything that is shared visited once."""

    def __init__(self, model: Any, adapter_name: str, bare: bool) -> None:
        self._bare = bare
        configs = getattr(model, "peft_config", None) or {}
        self._model = model
        self._name = adapter_name
        self._others = configs.keys() - {adapter_name}
        self._configs = {id(config) for config in configs.values()}  # they are written as records
        self._base = {id(module): path for path, module in base_tree(model)}
        self._seen: dict[int, str] = {}

    def leaves(self) -> Iterator[tuple[str, Leaf]]:
        """Of what runs: which subclass of PeftModel is around a tuner says nothing of the adapter, but of a prompt."""
        roots = callable_roots(self._model)
        prompt = self._model.peft_config[self._name].is_prompt_learning
        return self._inside("", roots[0 if prompt else -1 if self._bare else -2], {}, "")

    def _visit(self, path: str, holder: Any, key: Any) -> Iterator[tuple[str, Leaf]]:
        value = holder[key]
        if isinstance(value, nn.Module):
            value = unwrap(value)
        if self._is_plain(value):
            yield path, Fact(repr(value)) if isinstance(holder, tuple) else Value(holder, key)
        elif type(value) in (nn.Dropout, nn.Identity) and id(value) not in self._base:
            yield path, Rate(holder, key)
        elif id(value) in self._seen:
            yield path, Fact(f"the same as {self._seen[id(value)]}")
        elif id(value) not in self._configs and not isinstance(value, RemovableHandle):
            self._seen[id(value)] = path
            yield from self._inside(path, value, holder, key)

    def _inside(self, path: str, value: Any, holder: Any, key: Any) -> Iterator[tuple[str, Leaf]]:
        from peft import PeftConfig

        if isinstance(value, torch.Tensor):
            yield path, Held(holder, key, value)
        elif isinstance(value, nn.Module):
            own = id(value) not in self._base
            yield path, Fact(type(value).__qualname__ if own else f"the base model's {self._base[id(value)]!r}")
            yield from self._parts(path, value._modules)
            if own:
                yield from self._parts(path, value._parameters)
                yield from self._parts(path, value._buffers)
                yield from self._attributes(path, vars(value))
        elif isinstance(value, PeftConfig):
            yield from self._attributes(path, vars(value))
        elif isinstance(value, dict):
            for name in value:
                if name not in self._others:
                    yield from self._visit(f"{path}[{name!r}]", value, name)
        elif isinstance(value, (list, tuple)):
            for index in range(len(value)):
                yield from self._visit(f"{path}[{index}]", value, index)
        else:
            known = getattr(value, "__qualname__", None) if callable(value) else f"{type(value).__qualname__} {value!r}"
            yield path, Fact(known or type(value).__qualname__)

    def _parts(self, path: str, parts: dict[str, Any]) -> Iterator[tuple[str, Leaf]]:
        for name, part in parts.items():
            if name not in self._others:
                where = f"{path}[{name!r}]" if name == self._name else f"{path}.{name}".removeprefix(".")
                if part is None:
                    yield where, Fact("nothing")
                else:
                    yield from self._visit(where, parts, name)

    def _attributes(self, path: str, attributes: dict[str, Any]) -> Iterator[tuple[str, Leaf]]:
        for name in attributes:
            if name not in _PASSED_BY:
                yield from self._visit(f"{path}.{name}".removeprefix("."), attributes, name)

    def _is_plain(self, value: Any) -> bool:
        """Whether it is a number or the like, or a container of those that is not by adapter name."""
        if isinstance(value, dict):
            by_adapter = not value or value.keys() & {*self._others, self._name}
            return not by_adapter and all(map(self._is_plain, value.values()))
        if isinstance(value, (list, tuple)):
            return all(map(self._is_plain, value))
        return isinstance(value, _PLAIN)


def same_leaf(first: Leaf, second: Leaf) -> bool:
    """Whether they have the same values."""
    if isinstance(first, Held) and isinstance(second, Held):
        return torch.equal(first.tensor, second.tensor)
    if isinstance(first, (Value, Rate)) and isinstance(second, (Value, Rate)):
        return same(first.read(), second.read())
    return first == second


def same(first: Any, second: Any) -> bool:
    """Whether plain values are of one type and equal."""
    if first is second or isinstance(first, torch.Tensor):
        return first is second
    return type(first) is type(second) and bool(first == second)


def described(value: Any) -> str:
    """A leaf or a tensor, for a message."""
    if isinstance(value, Held):
        value = value.tensor
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype} on {value.device}, shape {tuple(value.shape)}"
    if isinstance(value, (Value, Rate)):
        return f"{value.read()!r:.100}"
    return str(value.kind)
