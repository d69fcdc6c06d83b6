"""A model's slots made ready to be written again and again, and set free without a trace."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
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
from .homes import Homes, bind, note_sizes
from .inference import make_normal
from .ledger import Ledger
from .memory import Image, Memory, Writes
from .merging import Merger
from .offloading import refuse_offloaded
from .originals import Originals
from .patches import Patches
from .resident import Resident
from .slots import Slot, bring_back, compact, let_be_offloaded, undo_compact
from .staging import Stagings
from .state import NEUTRAL_SCALING, Records, adapter_records, neutral_records
from .state_dict import Shown
from .tokens import refuse_compiled_tokens
from .tying import refuse_shared


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
        pristine: where the base's own values are kept of what adapters are merged into; see `Absolutes`.
        fused: whether merges may round less often than PEFT's; see `Merger`.
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
        compiled = is_compiled(model)
        if compiled:
            if any(slot.dora is not None for slot in slots.values()):
                from .dora import refuse_compiled_dora

                refuse_compiled_dora(slots)
            refuse_compiled_tokens(model, adapter_name, wrapped, tokens)
        refuse_shared(slots, arena=arena)
        make_normal((f"{s.fqn}.{key}", held.param) for s in slots.values() for key, held in s.held.items())
        self._model = weakref.ref(unwrap(model))
        self._prefixes = tuple(roots(model))
        self._adapter_name = adapter_name
        self._exclusive = exclusive
        self.slots = slots
        self.arena = arena
        self.merged = [slot.layer.merged_adapters for slot in slots.values()]  # PEFT's own lists
        self.stagings = Stagings(device_bytes)
        self._ranks = Shown({fqn: 0 if fqn in empty else slot.live_rank for fqn, slot in slots.items()})
        self._described: weakref.WeakKeyDictionary[Schema, tuple[Records, Mapping[str, float]]]
        self._described = weakref.WeakKeyDictionary()
        self._columns: dict[tuple[int, tuple[Any, ...]], tuple[Any, ...]] = {}
        self._originals = Originals(slots, self._ranks)
        self._patches = Patches(slots, self._ranks, fused_forward=fused_forward)
        self.absolutes = Absolutes(model, adapter_name, pristine)
        self.merger = Merger(model, self.absolutes, fused=fused)
        self.resident: Resident | None = None
        homes = Homes(slots)
        try:
            if resident:
                self.resident = Resident(model, adapter_name, self.absolutes)
            else:
                self.absolutes.find(model, wrapped, tokens)
            if arena:
                compact(slots)
            self._patches.share_dora(slots)
            self._patches.add_parts(extra)
            self.memory = self._bind(ranks, arena=arena)
            self._patches.install(slots, compiled=compiled and not arena)
            self._ledger = self._make_ledger(watch=arena)
            self._ranks.note(self.capture().configs)
        except BaseException:
            self.absolutes.release()
            if self.resident is not None:
                self.resident.release()
            self._patches.take_off()
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

    # -- what is live ------------------------------------------------------------------------------------------------

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

    def make_neutral(self, params: Container[int], ranks: Mapping[str, int]) -> bool:
        """Make neutral what the live adapter does not have, after a step of an optimizer.

        Args:
            params: ids of the optimizer's parameters.
            ranks: fqn → rank of the live adapter.

        Returns:
            Whether a slot was trained.
        """
        clear: list[torch.Tensor] = []
        ones: list[torch.Tensor] = []
        found = False
        for fqn, slot in self.slots.items():
            rank, room = ranks.get(fqn, 0), slot.rank
            for suffix, held in slot.held.items():
                if id(held.param) not in params or held.param.grad is None:  # no optimizer changes that
                    continue
                found, part = True, PARTS[suffix]
                # Of the Parameter, which `model.to(…)` may have moved.
                if part.rank_dim is not None:
                    if rank < room:
                        clear.append(slot.band(held.param.detach(), suffix, rank, room))
                elif not slot.uses(suffix):
                    (ones if part.neutral else clear).append(held.param.detach())
        self.memory.make_neutral(clear, ones)
        self.absolutes.make_neutral(params)
        return found

    # -- where it lives ----------------------------------------------------------------------------------------------

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
        self._refuse_if_reshaped()
        self.resize(self.room, arena=self.arena)
        self.memory.traces.mark_dirty()  # who moved it may have trained it before
        return True, True

    def _refuse_if_reshaped(self) -> None:
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

    def resize(
        self, ranks: Mapping[str, int], *, arena: bool, extra: Iterable[tuple[str, str]] = ()
    ) -> Callable[[], None]:
        """Give the slots room for `ranks`, and the parts of `extra`; values are kept, parameters move.

        If it raises, all is where it was. Returns a function that puts all where it was.
        """
        undo, (_, dirty) = self._undo(), self.memory.traces.moved_and_dirty()
        try:
            if arena and not self.arena:
                compact(self.slots)
                self._ledger = self._make_ledger(watch=True)
            self._patches.add_parts(extra)
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
        self._originals.note(slots)
        self.slots.update(slots)
        self._patches.install(slots, compiled=False)  # what is new to compiled code is guarded by none
        self._patches.add_parts(extra)
        self.memory = self._bind(ranks, arena=self.arena)
        self.merged = [slot.layer.merged_adapters for slot in self.slots.values()]
        self._ledger = self._make_ledger(watch=self.arena)
        self._described.clear()
        if dirty:
            self.memory.traces.mark_dirty()

    def undo_extend(self, slots: Mapping[str, Slot]) -> Callable[[], None]:
        """A function that undoes an `extend` by `slots`, whole or broken off; to be made before."""
        resized, merged, ledger = self._undo(), self.merged, self._ledger

        def undo() -> None:
            resized()
            self._originals.forget(slots)
            for fqn in slots:
                self.slots.pop(fqn, None)
                self._ranks.pop(fqn, None)
            self.merged, self._ledger = merged, ledger

        return undo

    def release(self) -> None:
        """Give the parameters their own memory back, holding what they hold now. May be repeated."""
        self.absolutes.release()
        if self.resident is not None:
            self.resident.release()
        self._patches.take_off()
        model = self._model()
        may_shrink = model is not None and not is_compiled(model)
        self._originals.take_back(self.slots, self._ranks, exclusive=self._exclusive, may_shrink=may_shrink)
        self._ledger.release()
        let_be_offloaded(self.slots)

    def _make_ledger(self, *, watch: bool) -> Ledger:
        return Ledger(self._adapter_name, self.slots, self._ranks, self._patches.mutes, watch=watch)

    def _bind(self, ranks: Mapping[str, int], *, arena: bool) -> Memory:
        return bind(self.slots, self.live_ranks, ranks, self.stagings, arena=arena, exclusive=self._exclusive)

    def _undo(self) -> Callable[[], None]:
        memory, arena, slots = self.memory, self.arena, dict(self.slots)
        unpatch, homes = self._patches.savepoint(), Homes(self.slots)

        def undo() -> None:
            unpatch()
            undo_compact(slots)
            self.slots.update(slots)
            homes.put_back()
            self.memory, self.arena = memory, arena
            self._described.clear()
            note_sizes(slots)

        return undo
