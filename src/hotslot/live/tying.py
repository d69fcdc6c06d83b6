"""`ensure_weight_tying`: layers with the embedding's weight that PEFT adapts together with it when it loads an adapter.

PEFT lets the tied layers share memory. A slot does not: each has its own, and a file has the values of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import ModelError, UnsupportedError
from ..methods import Adapter
from .discover import innermost
from .slots import Slot
from .state import build_config
from .tokens import plain_name, tied_with_embedding

_HINT = "load it with PEFT itself, or train it without ensure_weight_tying"


def refuse_shared(slots: Mapping[str, Slot], *, arena: bool) -> None:
    """Raise if slots share memory, and would go on doing so, or be trained apart."""
    first: dict[int, str] = {}
    for fqn, slot in slots.items():
        for held in slot.held.values():
            other = first.setdefault(held.param.data_ptr(), fqn)
            if other != fqn and held.param.numel() and (not arena or held.param.requires_grad):
                raise ModelError(
                    "The adapter on the model lets two layers share their matrices (ensure_weight_tying).",
                    where=fqn,
                    found=f"the memory of {other!r}" + (", in training" if held.param.requires_grad else ""),
                    expected="matrices of their own: others than those of tied layers may come",
                    hint="hotslot.attach to the base model, or to this one, not compiled and not in training",
                )


class _Tie(NamedTuple):
    """What PEFT ties on loading ("saved" modules, LoRA "targets" or nothing), the embedding, and what is tied to it."""

    kind: str
    embedding: str
    layers: frozenset[str]


def as_loaded(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter with the layers that PEFT, when it loads it onto this model, saves whole beside the embedding."""
    tie = _tie(model, adapter)
    if tie.kind != "saved":
        return adapter
    moved = {fqn: adapter.base_copies[fqn] for fqn in sorted(tie.layers) if fqn in adapter.base_copies}
    copies = {fqn: specs for fqn, specs in adapter.base_copies.items() if fqn not in moved}
    return replace(adapter, saved={**adapter.saved, **moved}, base_copies=copies)


def refuse_torn_ties(model: nn.Module, adapter: Adapter) -> None:
    """Raise unless what a fresh load computes is what the file's tensors say, each where its name puts it."""
    if not adapter.checkpoint.config.get("ensure_weight_tying"):
        return
    tie, loaded = _tie(model, adapter), as_loaded(model, adapter)
    found: Mapping[str, Any] = loaded.saved if tie.kind == "saved" else adapter.targets
    missing = sorted({tie.embedding, *tie.layers} - found.keys()) if tie.kind else []
    dropped = [fqn for fqn in adapter.targets if not _wraps(fqn, tie, adapter)]
    if missing or dropped:
        raise UnsupportedError(
            f"{adapter.checkpoint.origin} uses ensure_weight_tying, and PEFT ties other layers when it loads it here.",
            where=(missing or dropped)[0],
            found="tensors that a fresh load drops" if dropped else "no tensors, where a fresh load ties the layer",
            expected="the model that it was trained on, and a config that names embed_tokens or lm_head",
            hint=_HINT,
        )
    for fqn in sorted(tie.layers) if tie.kind else ():
        if not _equal(adapter, loaded, tie, fqn):
            raise UnsupportedError(
                f"{adapter.checkpoint.origin} has other values for a layer than for the embedding that it is tied to.",
                where=fqn,
                found=f"ensure_weight_tying, and tensors that differ from those of {tie.embedding!r}",
                expected="equal values, which PEFT keeps in one place",
                hint=_HINT,
            )


def _tie(model: nn.Module, adapter: Adapter) -> _Tie:
    """As PEFT's `_check_tied_modules` decides it."""
    from peft.utils.other import EMBEDDING_LAYER_NAMES, match_target_against_key

    inner: Any = innermost(model)
    layers = tied_with_embedding(inner) if adapter.checkpoint.config.get("ensure_weight_tying") else frozenset()
    if not layers:
        return _Tie("", "", frozenset())
    config = build_config(adapter.checkpoint)
    names = {id(module): plain_name(name) for name, module in inner.named_modules()}
    embedding = names[id(inner.get_input_embeddings())]
    targets = config.target_modules
    if _names_one(config.modules_to_save, EMBEDDING_LAYER_NAMES):
        return _Tie("saved", embedding, layers)
    if isinstance(targets, str):
        named = any(match_target_against_key(targets, name) for name in EMBEDDING_LAYER_NAMES)
    else:
        named = _names_one(targets, EMBEDDING_LAYER_NAMES)
    return _Tie("targets" if named else "", embedding, layers)


def _names_one(paths: Iterable[str] | None, names: Iterable[str]) -> bool:
    known = set(names)
    return any(path.rpartition(".")[2] in known for path in paths or ())


def _wraps(fqn: str, tie: _Tie, adapter: Adapter) -> bool:
    """Whether PEFT puts a LoRA on the module when it loads the adapter."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if tie.kind == "targets" and fqn in (tie.embedding, *tie.layers):
        return True
    config = build_config(adapter.checkpoint)
    return config.target_modules == "all-linear" or bool(check_target_module_exists(config, fqn))


def _equal(adapter: Adapter, loaded: Adapter, tie: _Tie, fqn: str) -> bool:
    tensor = adapter.checkpoint.tensor
    if tie.kind == "saved":
        first, second = loaded.saved[tie.embedding], loaded.saved[fqn]
        return torch.equal(tensor(first["weight"].name), tensor(second["weight"].name))
    first, second = adapter.targets[tie.embedding].parts, adapter.targets[fqn].parts
    pairs = (("lora_embedding_B", "lora_A.weight"), ("lora_embedding_A", "lora_B.weight"))
    return all(
        one in first and other in second and torch.equal(tensor(first[one].name).T, tensor(second[other].name))
        for one, other in pairs
    )
