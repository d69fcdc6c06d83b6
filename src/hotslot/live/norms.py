"""Norms that a LoRA file has in the place of the base model's, and diffusers' own record of them.

Flux's control LoRAs carry some. diffusers writes them over the base model's, keeps what was there in an attribute of
the transformer, and puts that back in `unload_lora_weights` and `unfuse_lora`. It does not keep whose they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from ..errors import ModelError, UnsupportedError
from .assembly import Assembly
from .discover import roots, unwrap

_KEPT = "_transformer_norm_layers"  # diffusers' attribute: name in state_dict → the base model's own values
_ABSENT = object()

# Model → what it has kept, and the adapters of which one has put others there: those that were on it at the time.
_Owners: TypeAlias = "tuple[Mapping[str, torch.Tensor], frozenset[str]]"
_owners: weakref.WeakKeyDictionary[nn.Module, _Owners] = weakref.WeakKeyDictionary()


def note_norms(model: nn.Module, adapter_names: Collection[str] | None = None) -> None:
    """Remember whose norms diffusers has put into the model since the last time: by default any adapter's on it."""
    kept = vars(model).get(_KEPT)
    if kept and (model not in _owners or _owners[model][0] is not kept):
        names = adapter_names if adapter_names is not None else getattr(model, "peft_config", None)
        _owners[model] = kept, frozenset(names or ())


class Norms:
    """Whose norms one adapter name's are, and what diffusers' attribute says of them while it is live.

    Args:
        model: the model; of one that is no Assembly, and so no pipeline's, nothing is said.
        adapter_name: PEFT's name of the slot.
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self._adapter_name = adapter_name
        self.said: frozenset[str] = frozenset()  # paths of the norms that the live adapter has put in place
        self.used: set[str] = set()  # what stands before the paths of members that the adapter has norms for
        self._attributes: dict[str, Any] = {}  # by member, as hotslot has left them
        # The attribute, and whose it is, while this adapter has put none in place.
        self._without: dict[str, tuple[Any, _Owners | None]] = {}
        for prefix, member in _members(model):
            note_norms(member)
            self._attributes[prefix] = vars(member).get(_KEPT, _ABSENT)
            self._without[prefix] = self._attributes[prefix], _owners.get(member)

    def of_resident(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """(path, the base model's own values) of norms that the adapter brought before hotslot came.

        Raises:
            UnsupportedError: nobody knows whether they are its own.
        """
        found: dict[str, torch.Tensor] = {}
        for prefix, member in _members(model):
            kept = vars(member).get(_KEPT) or {}
            owners = _owners[member][1] if kept else frozenset()
            if self._adapter_name not in owners:
                continue
            if len(owners) > 1:
                raise UnsupportedError(
                    "One of several LoRAs has put norms in the place of the model's own, and nobody knows which.",
                    where=f"{prefix}{next(iter(kept))}",
                    found=f"{len(kept)} norms of one of {', '.join(map(repr, sorted(owners)))}",
                    expected="one LoRA, or several that were loaded after hotslot.patch_peft()",
                    hint="hotslot.patch_peft(), pipe.unload_lora_weights(), and load them again",
                )
            self.used.add(prefix)
            self._without[prefix] = _ABSENT, None
            found |= {f"{prefix}{name}": values for name, values in kept.items()}
        self.said = frozenset(found)
        yield from found.items()

    def take_in(self, path: str) -> None:
        """Speak for the norm at this path from now on."""
        self.used.update(prefix for prefix in self._attributes if path.startswith(prefix))

    def refuse_if_others_came(self, model: nn.Module | None) -> None:
        """Raise if another LoRA has put norms of its own in place since."""
        for prefix, member in self._speaking_for(model):
            if vars(member).get(_KEPT, _ABSENT) is not self._attributes[prefix]:
                raise ModelError(
                    "Another LoRA has put norms in the place of the model's own since this one was swapped.",
                    where=prefix.removesuffix("."),
                    found=f"another {_KEPT} than hotslot left there",
                    expected="norms of one LoRA at a time",
                    hint="deactivate the other; or pipe.unload_lora_weights(), and load or attach again",
                )

    def say(self, model: nn.Module | None, own: Mapping[str, torch.Tensor]) -> None:
        """Let diffusers' attribute keep these: path → the base model's own values where the live adapter has others."""
        for prefix, member in self._speaking_for(model):
            kept = {path.removeprefix(prefix): values for path, values in own.items() if path.startswith(prefix)}
            attribute, owners = (kept, (kept, frozenset([self._adapter_name]))) if kept else self._without[prefix]
            self._attributes[prefix] = attribute
            if attribute is _ABSENT:
                vars(member).pop(_KEPT, None)
            else:
                vars(member)[_KEPT] = attribute
            if owners is not None:
                _owners[member] = owners
        self.said = frozenset(own)

    def _speaking_for(self, model: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
        if self.used and model is not None:
            yield from ((prefix, member) for prefix, member in _members(model) if prefix in self.used)


def _members(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(what stands before its modules' paths, model) of each member of an Assembly."""
    if isinstance(unwrap(model), Assembly):
        yield from roots(model).items()
