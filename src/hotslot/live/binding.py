"""A model's slots made ready to be written again and again, and set free without a trace."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..checkpoint import Schema
from ..errors import ModelError
from ..methods import PARTS, Adapter
from .absolutes import Absolutes, Key, Merge
from .assembly import Assembly
from .discover import is_compiled, roots, unwrap
from .dropout import SlotDropout
from .homes import Homes, become_view, bind, note_sizes
from .ledger import Ledger
from .memory import Image, Memory, Writes
from .merging import Merger
from .offloading import refuse_offloaded
from .resident import Resident
from .scaling import ScalingMap
from .slots import Slot, bring_back, compact, let_be_offloaded
from .staging import Stagings
from .state import NEUTRAL_SCALING, Records, adapter_records, neutral_records
from .state_dict import TrueRank
from .tokens import refuse_compiled_tokens


class Binding:
    """All slots of one adapter name on one model: their memory, PEFT's records of them, and what was there before.

    Args:
        model: as the user has it, compiled or not.
        adapter_name: PEFT's name of them.
        slots: of `find_slots`; there may be none, for adapters that are merged.
        ranks: fqn → rank to make room for, at least the slots' own.
        arena: whether all parts move into one allocation per device. Not where compiled code knows them already.
        extra: (fqn, suffix) of parts that slots are to be given, if they lack them.
        empty: slots that hold nothing beside an adapter that came with the model.
        wrapped: modules whose place for this adapter in PEFT's wrapper is hotslot's own, and holds nothing yet.
        tokens: path of a module → for how many tokens it is to have places.
        resident: whether the adapter on the model is of a method that has no slots, and others take its place.
        device_bytes: of each GPU, for adapters that stay there.
        fused_forward: whether linear layers compute by `FusedLinear`.
        exclusive: whether a swap need not look at each slot.

    Raises:
        ModelError: the slots cannot be resized.
        UnsupportedError: the resident adapter cannot be replaced.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter_name: str,
        slots: dict[str, Slot],
        ranks: Mapping[str, int],
        *,
        arena: bool,
        extra: Iterable[tuple[str, str]] = (),
        empty: Container[str] = (),
        wrapped: Collection[str] = (),
        pristine: str = "device",
        fused: bool | None = None,
        tokens: Mapping[str, int] = MappingProxyType({}),
        resident: bool = False,
        device_bytes: int | None = 0,
        fused_forward: bool = False,
        exclusive: bool = False,
    ) -> None:
        self._model = weakref.ref(unwrap(model))
        self._prefixes = tuple(roots(model))
        self.slots = slots
        self.arena = arena
        self.stagings = Stagings(device_bytes)
        self._fused_forward = fused_forward
        self._exclusive = exclusive
        self.hooks: dict[str, TrueRank] = {}
        self._described: weakref.WeakKeyDictionary[Schema, tuple[Records, Mapping[str, float]]]
        self._described = weakref.WeakKeyDictionary()
        self._columns: dict[tuple[int, tuple[Any, ...]], tuple[Any, ...]] = {}
        self._originals = {
            key: (param, param.data) for key, param in ((k, h.param) for s in slots.values() for k, h in _keyed(s))
        }
        self._scalings = {fqn: slot.layer.scaling for fqn, slot in slots.items()}
        self.merged = [slot.layer.merged_adapters for slot in slots.values()]  # PEFT's own lists
        self._added: set[tuple[str, str]] = set()
        self._handles: list[Any] = []
        self._put_backs: list[Callable[[], None]] = []  # of modules and classes in whose places others are
        self._ranks = {fqn: 0 if fqn in empty else _live_rank(slot) for fqn, slot in slots.items()}
        if is_compiled(model):
            _refuse_compiled_dora(slots)
            refuse_compiled_tokens(model, adapter_name, wrapped, tokens)
        _refuse_shared(slots, arena=arena)
        self._adapter_name = adapter_name
        self.absolutes = Absolutes(model, adapter_name, pristine)
        self.merger = Merger(model, self.absolutes, fused=fused)
        homes = Homes(slots)
        self.resident: Resident | None = None
        try:
            self.resident = Resident(model, adapter_name, self.absolutes) if resident else None
            if self.resident is None:
                self.absolutes.find(model, wrapped, tokens)
            if arena and not _bound(slots):
                compact(slots)
            self._install_dora(slots)
            self._add_parts(extra)
            self.memory = self._bind(ranks, arena=arena)
            self._install(slots, compiled=is_compiled(model) and not arena)
            self._ledger = Ledger(adapter_name, slots, self._ranks, watch=arena)
        except BaseException:
            self.absolutes.release()
            if self.resident is not None:
                self.resident.release()
            self._uninstall()
            homes.put_back()
            note_sizes(slots)
            raise

    @property
    def beside(self) -> frozenset[str]:
        """Names of adapters that may share something with the resident one: they decide what can take its place."""
        return self.resident.beside if self.resident is not None else frozenset()

    def neutral_values(self, merges: Sequence[Merge] = ()) -> tuple[Mapping[Key, torch.Tensor], Records]:
        """With which slots, or the adapter that has none, do nothing; with these merges below them, too.

        Raises:
            UnsupportedError: that adapter always does something.
        """
        return self.resident.fit_neutral(merges) if self.resident is not None else ({}, self.neutral_records())

    def neutral_resident(self) -> tuple[Image, Records]:
        """What is to be live for the model to compute what its base does, with an adapter that has no slots.

        Raises:
            UnsupportedError: it always does something.
        """
        values, records = self.neutral_values()
        return self.memory.image()._replace(absolutes=self.absolutes.image()._replace(values=dict(values))), records

    @property
    def on_gpu(self) -> bool:
        """Whether the slots are where copies go on by themselves."""
        return self.memory.on_gpu

    # -- what PEFT's records say -------------------------------------------------------------------------------------

    @property
    def live_ranks(self) -> dict[str, int]:
        """Fqn → rank up to which the slot holds values of the live adapter."""
        return dict(self._ranks)

    @property
    def room(self) -> dict[str, int]:
        """Fqn → rank that the slot has room for."""
        return {fqn: slot.rank for fqn, slot in self.slots.items()}

    def describe(self, adapter: Adapter) -> tuple[Records, Mapping[str, float]]:
        """PEFT's records of `adapter` in the slots, and fqn → scaling of each slot; the same for all of its schema."""
        schema = adapter.checkpoint.schema
        if schema not in self._described:
            records = adapter_records(adapter, self.slots) if adapter.targets else self.neutral_records()
            # Equal columns are the same one, so that a swap sees at once which need no writing.
            columns = tuple(self._columns.setdefault(pair, pair[1]) for pair in enumerate(records.columns))
            scalings = {fqn: target.scaling for fqn, target in adapter.targets.items()}
            scalings = {fqn: scalings.get(fqn, NEUTRAL_SCALING) for fqn in self.slots}
            self._described[schema] = records._replace(columns=columns), scalings
        return self._described[schema]

    def neutral_records(self) -> Records:
        """PEFT's records of slots that add nothing."""
        return neutral_records(self.slots, self._prefixes)

    def hide_unused(self) -> None:
        """Show no config on members of an Assembly that the adapter which came with it is not for."""
        records = self.capture()
        used = [fqn for fqn, rank in self._ranks.items() if rank]
        configs = {
            prefix: config
            for prefix, config in records.configs.items()
            if not prefix or any(fqn.startswith(prefix) for fqn in used)
        }
        if len(configs) < len(records.configs):
            self.apply(records._replace(configs=configs), records)

    def capture(self) -> Records:
        """PEFT's records as they are now."""
        records = self._ledger.capture(self._model())
        return records if self.resident is None else records._replace(plain=self.resident.capture())

    def apply(self, records: Records, current: Records | None = None) -> None:
        """Make PEFT's records say `records`; what `current` says is said already."""
        self._ledger.apply(records, self._model(), current)
        if self.resident is not None:
            self.resident.apply(records.plain)

    # -- memory ------------------------------------------------------------------------------------------------------

    def refuse_if_replaced(self) -> None:
        """Raise if the model no longer has one of the parameters."""
        model = self._model()
        if isinstance(model, Assembly):
            model.refuse_if_replaced()
        try:
            self._refuse_if_replaced()
        except ModelError:
            bring_back(self.slots)
            try:
                self._refuse_if_replaced()
            except ModelError:
                if model is not None:
                    refuse_offloaded(model)
                raise

    def _refuse_if_replaced(self) -> None:
        if self.resident is not None:
            self.resident.refuse_if_taken_out()
        self.memory.traces.refuse_if_replaced()
        self.absolutes.refuse_if_replaced()

    def moved_and_dirty(self) -> tuple[bool, bool]:
        """Whether a part is no longer in the slot's memory, and whether others may have written since hotslot did."""
        moved, dirty = self.memory.traces.moved_and_dirty()
        return moved, dirty or self.absolutes.is_dirty()

    def image(self) -> Image:
        """All values that are live, for `restore`."""
        return self.memory.image()._replace(absolutes=self.absolutes.image())

    def restore(self, image: Image) -> None:
        """Put an image back, bit for bit."""
        self.memory.restore(image)
        if image.absolutes is not None:
            self.absolutes.restore(image.absolutes)

    def write(
        self,
        writes: Writes,
        values: Mapping[Key, torch.Tensor],
        merges: Sequence[Merge],
        occupied: Mapping[str, int],
        *,
        clean: bool,
    ) -> None:
        """See `Memory.write` and `Absolutes.write`."""
        self.absolutes.write(values, merges, clean=clean)
        self.memory.write(writes, occupied, clean=clean)

    def put_right(self) -> tuple[bool, bool]:
        """Bind again if a parameter's memory is no longer ours (`model.to(…)`).

        Returns:
            Whether that was needed, and whether others may have written the slots since hotslot did.

        Raises:
            ModelError: a parameter was deleted, replaced, or given another shape.
        """
        self.refuse_if_replaced()
        moved, dirty = self.moved_and_dirty()
        if dirty:
            self.absolutes.note_changes()
        if not moved:
            return False, dirty
        for (fqn, suffix), place in self.memory.layout.places.items():
            param = self.slots[fqn].held[suffix].param
            if tuple(param.shape) != place.shape:
                raise ModelError(
                    "A slot's parameter was given another shape.",
                    where=f"{fqn}.{suffix}",
                    found=tuple(param.shape),
                    expected=f"{place.shape}, as bound",
                    hint="attach again",
                )
        self.resize(self.room, arena=self.arena)
        self.memory.traces.mark_dirty()  # who moved it may have trained it before
        return True, True

    def resize(
        self, ranks: Mapping[str, int], *, arena: bool, extra: Iterable[tuple[str, str]] = ()
    ) -> Callable[[], None]:
        """Give the slots room for `ranks`, and the parts of `extra`; values are kept, parameters move.

        If it raises, all is where it was. Returns a function that puts all where it was.
        """
        undo, (_, dirty) = self._undo(), self.memory.traces.moved_and_dirty()
        try:
            if arena and not self.arena:
                if not _bound(self.slots):
                    compact(self.slots)
                self._ledger = Ledger(self._adapter_name, self.slots, self._ranks, watch=True)
            self._add_parts(extra)
            self.memory = self._bind(ranks, arena=arena)
            self.arena = arena
            self._described.clear()
            if dirty:
                self.memory.traces.mark_dirty()
            return undo
        except BaseException:
            undo()
            raise

    def extend(self, slots: Mapping[str, Slot], ranks: Mapping[str, int], *, extra: Iterable[tuple[str, str]]) -> None:
        """`resize`, and take in more slots, which hold nothing yet. If it raises, call what `undo_extend` has given."""
        _, dirty = self.memory.traces.moved_and_dirty()
        self._ranks.update(dict.fromkeys(slots, 0))
        self._originals.update((key, (held.param, held.param.data)) for s in slots.values() for key, held in _keyed(s))
        self._scalings.update((fqn, slot.layer.scaling) for fqn, slot in slots.items())
        self.slots.update(slots)
        self._install(slots, compiled=False)  # what is new to compiled code is guarded by none
        self._add_parts(extra)
        self.memory = self._bind(ranks, arena=self.arena)
        self.merged = [slot.layer.merged_adapters for slot in self.slots.values()]
        self._ledger = Ledger(self._adapter_name, self.slots, self._ranks, watch=self.arena)
        self._described.clear()
        if dirty:
            self.memory.traces.mark_dirty()

    def undo_extend(self, slots: Mapping[str, Slot]) -> Callable[[], None]:
        """A function that undoes an `extend` by `slots`, whole or broken off; to be made before."""
        resized, merged, ledger = self._undo(), self.merged, self._ledger
        handles, put_backs = len(self._handles), len(self._put_backs)

        def undo() -> None:
            self._uninstall_from(handles, put_backs)
            del self._handles[handles:], self._put_backs[put_backs:]
            for key in [key for key in self._originals if key[0] in slots]:
                del self._originals[key]
            for fqn in slots:
                for known in (self.slots, self.hooks, self._scalings, self._ranks):
                    known.pop(fqn, None)
            self.merged, self._ledger = merged, ledger
            resized()

        return undo

    def _bind(self, ranks: Mapping[str, int], *, arena: bool) -> Memory:
        return bind(self.slots, self.live_ranks, ranks, self.stagings, arena=arena, exclusive=self._exclusive)

    def _undo(self) -> Callable[[], None]:
        memory, arena, slots, added = self.memory, self.arena, dict(self.slots), set(self._added)
        homes = Homes(self.slots)

        def undo() -> None:
            for fqn, suffix in self._added - added:
                self.slots[fqn].drop_part(suffix)
            self.slots.update(slots)
            self._added = added
            homes.put_back()
            self.memory, self.arena = memory, arena
            self._described.clear()
            note_sizes(self.slots)

        return undo

    def _add_parts(self, extra: Iterable[tuple[str, str]]) -> None:
        for fqn, suffix in extra:
            if suffix not in self.slots[fqn].held:
                self._added.add((fqn, suffix))
                self.slots[fqn] = self.slots[fqn].with_part(suffix)
                if fqn in self.hooks:
                    self.hooks[fqn].params = self.slots[fqn].params

    # -- on and off ----------------------------------------------------------------------------------------------------

    def _install(self, slots: Mapping[str, Slot], *, compiled: bool) -> None:
        for fqn, slot in slots.items():
            hook = self.hooks[fqn] = TrueRank(slot, self._ranks)
            layer: Any = slot.layer  # PEFT's mixin, which does not say that it is an nn.Module
            self._handles.append(layer.register_state_dict_post_hook(hook))
            self._handles.append(layer.register_load_state_dict_pre_hook(hook.on_load))
            for held in slot.held.values():
                _pickle_alone(held.param)
            if not compiled:  # compiled code guards which modules there are, and their types
                self._install_dropout(slot)
                self._install_attention(slot)
                self._install_fused_forward(slot)

    def _install_dropout(self, slot: Slot) -> None:
        dropouts = slot.layer.lora_dropout
        found = dropouts[slot.adapter_name]
        if type(found) in (nn.Identity, nn.Dropout):
            replacement = SlotDropout(getattr(found, "p", 0.0))
            replacement.train(found.training)
            self._put_backs.append(partial(_put_back_dropout, dropouts, slot.adapter_name, found))
            dropouts[slot.adapter_name] = replacement

    def _install_attention(self, slot: Slot) -> None:
        from peft.tuners.lora.layer import MultiheadAttention

        if type(slot.layer) is MultiheadAttention:
            from .attention import use_slot_attention

            self._put_backs.append(partial(_put_back_class, slot.layer, MultiheadAttention))
            use_slot_attention(slot.layer)

    def _install_fused_forward(self, slot: Slot) -> None:
        if not self._fused_forward:
            return
        from peft.tuners.lora.layer import Linear

        from .fused import FusedLinear, fuse, unfuse

        if type(slot.layer) in (Linear, FusedLinear):  # fused for another slot of the layer, maybe
            self._put_backs.append(partial(unfuse, slot.layer, slot.adapter_name))
            fuse(slot.layer, slot.adapter_name)

    def _install_dora(self, slots: Mapping[str, Slot]) -> None:
        for slot in slots.values():
            if slot.dora is not None:
                from .dora import use_slot_dora

                replaced = use_slot_dora(slot.layer, slot.adapter_name)
                if replaced is not None:
                    self._put_backs.append(partial(_put_back_class, *replaced))

    def release(self) -> None:
        """Give the parameters their own memory back, holding what they hold now.

        At their old shapes; larger where what is live has a larger rank: PEFT's functions grow slots.
        """
        self.absolutes.release()
        if self.resident is not None:
            self.resident.release()
        self._uninstall()
        with torch.inference_mode(False), torch.no_grad():
            for (fqn, suffix), (param, original) in self._originals.items():
                current, slot = param.data, self.slots[fqn]
                if current.data_ptr() == original.data_ptr():
                    continue
                held = _cut(current, suffix, original.shape, slot, at_least=self._ranks[fqn])
                if original.dtype != held.dtype or original.device != held.device or original.shape != held.shape:
                    original = torch.empty_like(held, memory_format=torch.contiguous_format)
                original.copy_(held)
                if self._exclusive:
                    become_view(param, original)  # with a version counter of its own again
                else:
                    param.data = original
        note_sizes(self.slots)
        for fqn, slot in self.slots.items():
            self._release_scaling(slot, self._scalings[fqn])
        self._ledger.release()
        let_be_offloaded(self.slots)

    def _uninstall(self) -> None:
        for param, _ in self._originals.values():
            param.__dict__.pop("__reduce_ex__", None)
        for fqn, suffix in self._added:
            slot = self.slots[fqn]
            held = slot.held.get(suffix)  # None if it was broken off while the part was made
            if held is not None and not held.in_place():  # the adapter was deleted
                continue
            if held is not None and slot.uses(suffix):  # of the live adapter, which goes on without hotslot
                slot.leave_part(suffix)
            else:
                slot.drop_part(suffix)
        self._added.clear()
        self._uninstall_from(0, 0)

    def _uninstall_from(self, first_handle: int, first_put_back: int) -> None:
        for handle in self._handles[first_handle:]:
            handle.remove()
        for put_back in reversed(self._put_backs[first_put_back:]):
            put_back()

    def _release_scaling(self, slot: Slot, original: dict[str, Any]) -> None:
        current = slot.layer.scaling
        if isinstance(current, ScalingMap):
            current.release(slot.adapter_name, like=original.get(slot.adapter_name))
            if not current.bound:
                slot.layer.scaling = dict(current)


def _put_back_dropout(dropouts: Any, adapter_name: str, found: nn.Module) -> None:
    """What was there before; a Dropout of the live adapter's rate, if that has another."""
    live = dropouts._modules.get(adapter_name)
    if type(live) is SlotDropout:  # else the adapter was deleted, or loaded anew
        same = live.p == getattr(found, "p", 0.0)
        dropouts[adapter_name] = found if same else nn.Dropout(live.p).train(live.training)


def _put_back_class(module: nn.Module, found: type[nn.Module]) -> None:
    module.__class__ = found
    module.__dict__.pop("in_use", None)  # of DoRA


def _pickle_alone(param: nn.Parameter) -> None:
    """Let pickle take this parameter's values only: torch pickles a tensor's whole storage, which is the arena."""
    reference = weakref.ref(param)

    def reduce(protocol: Any) -> Any:
        own = reference()
        assert own is not None
        return torch._utils._rebuild_parameter, (own.detach().clone(), own.requires_grad, OrderedDict())

    param.__dict__["__reduce_ex__"] = reduce


def _keyed(slot: Slot) -> list[tuple[tuple[str, str], Any]]:
    return [((slot.fqn, suffix), held) for suffix, held in slot.held.items()]


def _refuse_compiled_dora(slots: Mapping[str, Slot]) -> None:
    from .dora import is_slot_dora

    for fqn, slot in slots.items():
        if slot.dora is not None and not is_slot_dora(slot.dora):
            raise ModelError(
                "The model was compiled with a DoRA on it, which compiled code knows as PEFT computes it.",
                where=fqn,
                found=type(slot.dora).__name__,
                expected="a model that is attached, or prepared for hot-swapping, before it is compiled",
                hint="hotslot.attach(model, …), then torch.compile",
            )


def _refuse_shared(slots: Mapping[str, Slot], *, arena: bool) -> None:
    """Raise if slots share memory (`ensure_weight_tying`), and would go on doing so, or be trained apart."""
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


def _bound(slots: Mapping[str, Slot]) -> bool:
    """Whether another adapter of these layers is bound: it has looked up their dicts."""
    return any(isinstance(slot.layer.scaling, ScalingMap) for slot in slots.values())


def _live_rank(slot: Slot) -> int:
    """The rank that the layer states, if what lies beyond it is empty; else all of it."""
    stated, room = int(slot.layer.r[slot.adapter_name]), slot.rank
    if not 0 < stated < room or stated % slot.groups:
        return room
    for suffix, held in slot.held.items():
        if PARTS[suffix].rank_dim is not None and slot.band(held.param.detach(), suffix, stated, room).any():
            return room
    return stated


def _cut(padded: torch.Tensor, suffix: str, shape: torch.Size, slot: Slot, *, at_least: int) -> torch.Tensor:
    """The corner of `padded` that has `shape`, or the ranks `at_least`, if these are more."""
    part = PARTS[suffix]
    if part.rank_dim is None or padded.shape == shape:
        return padded
    rank = shape[part.rank_dim] // slot.experts * (1 if part.rank_dim == 0 else slot.groups)
    return slot.corner(padded, suffix, max(rank, at_least))
