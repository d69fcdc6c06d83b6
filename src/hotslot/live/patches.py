"""What hotslot puts on the layers of slots so that they can be written under a running model, and takes off again.

Hooks, by which what is saved or pickled is the live adapter alone; modules and classes in the place of PEFT's, whose
code is the same for any adapter; and parts that a layer lacks.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..methods import PARTS
from .dropout import SlotDropout, leave_slot_dropout
from .slots import Slot
from .state_dict import Shown, TrueRank
from .training import Mute


class Patches:
    """All that is put on the layers of one adapter's slots.

    Each patch notes how it is taken off before it is there, or in the same step: so one that was broken off is taken
    off as well. To take off what is not there, or no longer, does nothing.

    Args:
        slots: fqn → slot; one that is given a part is replaced here.
        ranks: what `state_dict()` shows of the live adapter.
        fused_forward: whether linear layers compute by `FusedLinear`.

    Attributes:
        mutes: (fqn, suffix) → what keeps training away from a part that has no rank; the Ledger says when.
    """

    def __init__(self, slots: dict[str, Slot], ranks: Shown, *, fused_forward: bool) -> None:
        self._slots = slots
        self._ranks = ranks
        self._fused_forward = fused_forward
        self.mutes: dict[tuple[str, str], Mute] = {}
        self._hooks: dict[str, TrueRank] = {}
        self._added: set[tuple[str, str]] = set()
        self._undo: list[Callable[[], object]] = []

    def share_dora(self, slots: Mapping[str, Slot]) -> None:
        """Let layers that PEFT has made for DoRA serve adapters without it, too."""
        for slot in slots.values():
            if slot.dora is not None:
                from .dora import is_peft_dora, put_back_dora, use_slot_dora

                if is_peft_dora(slot.dora):
                    self._undo.append(partial(put_back_dora, slot.layer, slot.adapter_name, slot.dora))
                    with torch.inference_mode(False):
                        use_slot_dora(slot.dora)

    def add_parts(self, extra: Iterable[tuple[str, str]]) -> None:
        """Give slots these parts, (fqn, suffix), if they lack them."""
        for fqn, suffix in extra:
            if suffix not in self._slots[fqn].held:
                self._added.add((fqn, suffix))
                with torch.inference_mode(False):
                    slot = self._slots[fqn] = self._slots[fqn].with_part(suffix)
                if fqn in self._hooks:  # `install` was here before
                    self._hooks[fqn].params = slot.params
                    self._pickle_alone(slot.held[suffix].param)
                    self._mute(slot, suffix)

    def install(self, slots: Mapping[str, Slot], *, compiled: bool) -> None:
        """Put on these layers what all need; nothing that code which is compiled already has guards on."""
        for slot in slots.values():
            self._speak_for(slot)
            for suffix, held in slot.held.items():
                self._pickle_alone(held.param)
                if PARTS[suffix].rank_dim is None:
                    self._mute(slot, suffix)
            if not compiled:
                self._replace_dropout(slot)
                self._replace_attention(slot)
                if self._fused_forward:
                    self._fuse(slot)

    def savepoint(self) -> Callable[[], None]:
        """A function that takes off all that is put on from now on."""
        installed, added = len(self._undo), set(self._added)

        def undo() -> None:
            for fqn, suffix in self._added - added:
                self._slots[fqn].drop_part(suffix)
            self._added = added
            self._undo_from(installed)
            del self._undo[installed:]

        return undo

    def take_off(self) -> None:
        """Leave the layers as PEFT has made them, with the parts of the live adapter, which goes on without hotslot."""
        for fqn, suffix in self._added:
            slot = self._slots[fqn]
            held = slot.held.get(suffix)  # None if it was broken off while the part was made
            if held is None:
                slot.drop_part(suffix)
            elif held.in_place():  # else the adapter was deleted
                if slot.uses(suffix):
                    slot.leave_part(suffix)
                else:
                    slot.drop_part(suffix)
        self._added.clear()
        self._undo_from(0)

    def _undo_from(self, first: int) -> None:
        for undo in reversed(self._undo[first:]):
            undo()

    def _speak_for(self, slot: Slot) -> None:
        layer: Any = slot.layer  # PEFT's mixin, which does not say that it is an nn.Module
        self._undo.append(partial(self._hooks.pop, slot.fqn, None))
        hook = self._hooks[slot.fqn] = TrueRank(slot, self._ranks)
        hook.relieve(layer, self._undo)
        self._undo.append(layer.register_state_dict_post_hook(hook).remove)
        self._undo.append(layer.register_load_state_dict_pre_hook(hook.on_load).remove)

    def _pickle_alone(self, param: nn.Parameter) -> None:
        self._undo.append(partial(_pickle_as_torch_does, param))
        _pickle_alone(param)

    def _mute(self, slot: Slot, suffix: str) -> None:
        key, mutes = (slot.fqn, suffix), self._hooks[slot.fqn].mutes
        self._undo += [partial(self.mutes.pop, key, None), partial(mutes.pop, suffix, None)]
        mute = self.mutes[key] = mutes[suffix] = Mute([slot.held[suffix].param], in_use=slot.uses(suffix))
        mute.install(self._undo)

    def _replace_dropout(self, slot: Slot) -> None:
        dropouts, name = slot.layer.lora_dropout, slot.adapter_name
        found = dropouts[name]
        if type(found) in (nn.Identity, nn.Dropout):
            self._undo.append(partial(leave_slot_dropout, dropouts, name, found))
            dropouts[name] = SlotDropout.like(found)

    def _replace_attention(self, slot: Slot) -> None:
        from peft.tuners.lora.layer import MultiheadAttention

        if type(slot.layer) is MultiheadAttention:
            from .attention import leave_slot_attention, use_slot_attention

            self._undo.append(partial(leave_slot_attention, slot.layer))
            use_slot_attention(slot.layer)

    def _fuse(self, slot: Slot) -> None:
        from peft.tuners.lora.layer import Linear

        from .fused import FusedLinear, fuse, unfuse

        if type(slot.layer) in (Linear, FusedLinear):  # fused for another slot of the layer, maybe
            self._undo.append(partial(unfuse, slot.layer, slot.adapter_name))
            fuse(slot.layer, slot.adapter_name)


def _pickle_alone(param: nn.Parameter) -> None:
    """Let pickle take this parameter's values only: torch pickles a tensor's whole storage, which is the arena."""
    reference = weakref.ref(param)

    def reduce(protocol: Any) -> Any:
        own = reference()
        assert own is not None
        return torch._utils._rebuild_parameter, (own.detach().clone(), own.requires_grad, OrderedDict())

    param.__dict__["__reduce_ex__"] = reduce


def _pickle_as_torch_does(param: nn.Parameter) -> None:
    param.__dict__.pop("__reduce_ex__", None)
