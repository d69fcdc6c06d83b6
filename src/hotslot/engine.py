"""One slot of one live model, and what is live in it: swaps adapters, all of it or none of it.

Below the Swapper, which knows names and sources, and PEFT's functions, which know neither.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from . import live
from .block import SlotShape
from .entry import Entry
from .errors import ModelError
from .leases import Gate
from .live import Binding, Image, Records
from .report import SwapReport

# Model → PEFT's adapter name → the one engine that writes this slot. They go when the model goes.
_engines: weakref.WeakKeyDictionary[nn.Module, dict[str, Engine]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class State:
    """Something that is, was or will be live.

    Attributes:
        entry: a loaded adapter; None for the neutral slot, and for what hotslot did not write.
        image: the values, where no entry has them: what came with the model, or was trained since.
        records: PEFT's records of it; None to take the entry's own.
        empty: whether the slots have no adapter, whatever others may have written there.
    """

    entry: Entry | None
    image: Image | None = None
    records: Records | None = None
    empty: bool = False

    @property
    def name(self) -> str | None:
        """Name of the adapter."""
        return self.entry.name if self.entry is not None else None

    @property
    def version(self) -> str | None:
        """Digest of the adapter."""
        return self.entry.version if self.entry is not None else None


@dataclass(frozen=True, eq=False)
class Growth:
    """What `Engine.grow` has put on a model."""

    injection: live.Injection | None
    wrapping: live.Wrapping
    let_go: Callable[[], None]

    def undo(self) -> None:
        """Make the engine forget it, and take it off the model."""
        self.let_go()
        _take_off(self.injection, self.wrapping)


def _take_off(injection: live.Injection | None, wrapping: live.Wrapping | None) -> None:
    if wrapping is not None:
        live.unwrap_saved(wrapping)
    if injection is not None:
        live.remove(injection)


class Engine:
    """Swaps states in the slots of a Binding. Whoever calls it holds its `lock`, and to swap its `gate` before that.

    Args:
        model: the model, which is not kept alive by this.
        adapter_name: PEFT's name of the slot.
        binding: of all its slots.
        empty: whether the slots are hotslot's own and hold nothing yet, and not an adapter that came with the model.
        keeps_history: whether `previous` and `original` are wanted; they hold memory.
    """

    def __init__(
        self, model: nn.Module, adapter_name: str, binding: Binding, *, empty: bool, keeps_history: bool = True
    ) -> None:
        self.adapter_name = adapter_name
        self.lock = threading.RLock()
        self.binding = binding
        self.keeps_history = keeps_history
        self._model = weakref.ref(live.unwrap(model))
        self.gate = Gate.of(live.innermost(model))  # of all slots of the model, for a forward pass reads all of them
        self._neutral = State(None, records=binding.neutral_records(), empty=True)
        self._neutral_beside: frozenset[str] | None = None
        # An adapter that came with the model has no entry; it is kept as an image once something else is live.
        self._foreign = None if empty else State(None)
        self.original: State | None = self._neutral if empty else None
        self.live: State = self._neutral if empty else self._foreign or self._neutral
        self.previous: State | None = None
        self._merged = self._stepped = False
        if empty:
            self._write(self._neutral, {}, None)  # the model's records are to describe the empty slots
        else:
            binding.hide_unused()

        self.come_back()

    @staticmethod
    def of(model: nn.Module, adapter_name: str) -> Engine | None:
        """The engine of this slot of the model, if there is one."""
        return _engines.get(live.unwrap(model), {}).get(adapter_name)

    def restore_original(self) -> None:
        """Make live again what was there before the first swap, if there was one."""
        if self.original is not None and (self.live is not self.original or self.live is self._neutral):
            self.swap(self.original)
        else:
            self.refuse_if_merged()
            self.binding.put_right()

    def release(self) -> None:
        """Give the parameters their own memory back and let go of the slot."""
        self.binding.release()
        live.allow(self.model, self.adapter_name)
        self.stand_aside()

    def stand_aside(self) -> None:
        """Let another engine have the slot; `come_back` takes it back. The model is not touched."""
        live.leave_steps(self)
        self.binding.absolutes.stand_aside()
        model, others = self.model, _engines.get(self.model, {})
        others.pop(self.adapter_name, None)
        if isinstance(model, live.Assembly) and not others:
            model.dissolve()

    def come_back(self) -> None:
        """Undo `stand_aside`. May be repeated."""
        self.binding.absolutes.come_back()
        if isinstance(self.model, live.Assembly):
            self.model.hold()
        _engines.setdefault(self.model, {})[self.adapter_name] = self
        live.follow_steps(self)

    def forget(self) -> None:
        """Hold nothing of the model, nor of adapters, once it was released or has stood aside for good.

        May be repeated.
        """
        nothing = State(None)
        self.live = self._neutral = nothing
        self.previous = self.original = self._foreign = None
        self.__dict__.pop("binding", None)

    @property
    def neutral(self) -> State:
        """What makes the model compute what its base does.

        Raises:
            UnsupportedError: the adapter that came with the model is of a method that always does something.
        """
        binding = self.binding
        if binding.resident is not None and self._neutral_beside != binding.beside:
            image, records = binding.neutral_resident()
            self._neutral, self._neutral_beside = State(None, image, records, empty=True), binding.beside
        return self._neutral

    @property
    def model(self) -> nn.Module:
        """The model, without torch.compile's wrapper."""
        model = self._model()
        if model is None:
            raise ModelError("The model of this swapper no longer exists.")
        return model

    def swap(self, target: State) -> SwapReport:
        """Plan, check, commit; on any exception the model is as it was.

        Raises:
            MergedError: the slot's adapter is merged into the base weights.
            ModelError: the slot's layers or parameters were taken from the model.
        """
        started = time.perf_counter()
        self.refuse_if_merged()
        if not self.binding.on_gpu:
            return self._swap(target, started)
        live.refuse_while_capturing()
        self._bring(target)
        with live.ordered(self.gate, self.binding.memory.devices):
            return self._swap(target, started)

    def _swap(self, target: State, started: float) -> SwapReport:
        binding, previous = self.binding, self.live
        moved, touched = binding.put_right()
        touched = touched or self._outgrown()
        # What came with the model is live whatever has become of it.
        if self._is_live(target) and (self._is_foreign(target) or not (touched or moved)):
            return self._report(target, previous, 0, started, changed=False)
        if self._is_merged(target):
            live.refuse_passed_over(binding.slots, target.name)
        elif target is self._neutral:
            binding.absolutes.refuse_without((), "The base model")
        history = self.previous, self.original
        before = self._undo_state(touched)
        try:
            # Others may have written anything anywhere, the padding included.
            known = not (touched or moved or before.image is not None)
            occupied = binding.live_ranks if known else binding.room
            since = previous.entry if known else None
            nbytes = self._write(target, occupied, before.records, clean=not touched, since=since)
            self.live, self._stepped = target, False
            if self.keeps_history:
                # What came with the model may have been trained since a swap back to it.
                again = previous is self.original and previous is not self._neutral
                self.previous, self.original = before, before if again else self.original or before
            self.gate.count_change()
            return self._report(target, previous, nbytes, started, changed=True)
        except BaseException:
            self._write(before, binding.room, None)
            self.live = before if before.image is not None else previous
            self.previous, self.original = history
            raise

    def after_step(self, params: Container[int]) -> None:
        """After a step of an optimizer, of parameters with these ids: leave nothing where the live adapter has none."""
        with self.lock:
            ranks = {} if self.live.empty else self.binding.live_ranks
            if self.binding.make_neutral(params, ranks):
                self._stepped = True

    @property
    def trained(self) -> bool:
        """Whether the live adapter has become another than the one that was loaded, by an optimizer's steps."""
        return self._stepped or (self.live.entry is not None and self.live.image is not None)

    def refuse_if_merged(self) -> None:
        """Raise if the slot's adapter is merged into the base weights."""
        if self.binding.resident is not None:
            self.binding.resident.refuse_if_merged()
        if any(self.binding.merged):
            for slot in self.binding.slots.values():
                slot.refuse_if_merged()

    def swap_in(self, entry: Entry, ranks: Mapping[str, int]) -> SwapReport:
        """`swap` to an adapter that may need more room than the slots have: they get `ranks`, and parts that they lack.

        Parameters whose shape changes get other memory, and code compiled for the old shapes is compiled anew.
        """
        slots, targets = self.binding.slots, entry.adapter.targets
        extra = [(fqn, part) for fqn, target in targets.items() for part in target.parts if part not in slots[fqn].held]
        if not extra and all(slots[fqn].rank >= rank for fqn, rank in ranks.items()):
            return self.swap(State(entry))
        self.refuse_if_merged()
        room = {fqn: max(slot.rank, ranks.get(fqn, 0)) for fqn, slot in self.binding.slots.items()}
        undo = self.binding.undo_extend({})  # made before: an interrupt may come between any two lines
        try:
            self.binding.resize(room, arena=self.binding.arena, extra=extra)
            return self.swap(State(entry))
        except BaseException:
            undo()
            raise

    def grow(
        self,
        slots: Mapping[str, SlotShape],
        saved: Collection[str] = (),
        tokens: Mapping[str, int] = MappingProxyType({}),
        tied: Mapping[str, str] = MappingProxyType({}),
    ) -> Growth:
        """Give the model the slots, the room, the copies and the places for tokens that these are more than it has.

        What is live stays live. If it raises, all is as it was.
        """
        model, name, binding = self.model, self.adapter_name, self.binding
        missing = {fqn: shape for fqn, shape in slots.items() if fqn not in binding.slots}
        injection = wrapping = let_go = None
        try:
            if missing:
                injection = live.inject(model, name, missing)
            wrapping = live.wrap(model, name, saved, tokens, tied)
            found = {fqn: slot for fqn, slot in live.find_slots(model, name).items() if fqn in missing}
            let_go = self._take_in(found, slots, tokens, wrapping.fqns)
            return Growth(injection, wrapping, let_go)
        except BaseException:
            if let_go is not None:
                let_go()
            _take_off(injection, wrapping)
            raise

    def _take_in(
        self,
        found: Mapping[str, live.Slot],
        shapes: Mapping[str, SlotShape],
        tokens: Mapping[str, int],
        wrapped: Collection[str],
    ) -> Callable[[], None]:
        """Take in slots and wrappers, which hold nothing yet. Returns a function that lets go of them again."""
        binding, kept = self.binding, (self._neutral, self.live, self.previous, self.original)
        merged = [state for state in kept if state is not None and self._is_merged(state)]
        records, shrink, forget = binding.capture(), binding.undo_extend(found), binding.absolutes.undo_find()

        def undo() -> None:
            forget()
            shrink()
            self._neutral, self.live, self.previous, self.original = kept
            binding.apply(records)

        try:
            ranks = {fqn: shape.rank for fqn, shape in shapes.items()}
            binding.extend(found, ranks, extra=[(fqn, part) for fqn, shape in shapes.items() for part in shape.parts])
            binding.absolutes.find(self.model, wrapped, tokens)
            neutral = State(None, records=binding.neutral_records(), empty=True)
            states = [neutral if state is self._neutral else state for state in kept]
            # What was merged may go into slots now; the records of before would say that nothing is in them.
            states = [State(state.entry) if state and state in merged else state for state in states]
            binding.apply(neutral.records if states[1] is neutral and neutral.records else records)
            self._neutral, self.live, self.previous, self.original = neutral, states[1] or neutral, states[2], states[3]
            return undo
        except BaseException:
            undo()
            raise

    def uses(self, entry: Entry) -> bool:
        """Whether a swap, or its undoing, may need the entry without asking for it by name."""
        return any(entry is other or entry in other.lenders for other in self._used())

    def _used(self) -> Iterator[Entry]:
        """What is or was live, of what was loaded."""
        states = (self.live, self.previous, self.original)
        return (state.entry for state in states if state is not None and state.entry is not None)

    def let_go(self, loaded: Callable[[], Iterable[Entry]]) -> None:
        """Forget the base's own values where neither these have others, nor what is or was live.

        As a rule the first few have others for all of them, and no more are looked at: there may be thousands.
        """
        absolutes = self.binding.absolutes
        unneeded = absolutes.idle
        for entries in (self._used, loaded):
            for entry in entries() if unneeded else ():
                compiled = entry.compile(self.binding)
                unneeded.difference_update(compiled.values, *(merge.keys for merge in compiled.merges.all))
                if not unneeded:
                    return
        absolutes.let_go(unneeded)

    def resize(self, ranks: Mapping[str, int], *, arena: bool) -> None:
        """Give the slots room for `ranks`, values kept. Parameters move."""
        self.binding.put_right()
        self.binding.resize(ranks, arena=arena)

    def is_current(self) -> bool:
        """Whether the model still has just these slots."""
        try:
            self.binding.refuse_if_replaced()
        except ModelError:
            return False
        return live.count_slots(self.model, self.adapter_name) == len(self.binding.slots)

    def finds_live(self, target: State) -> bool:
        """Whether `swap` would have nothing to do. Touches nothing, so it needs no gate."""
        moved, touched = self.binding.moved_and_dirty()
        touched = touched or self._outgrown()
        return self._is_live(target) and not moved and (not touched or self._is_foreign(target))

    def _is_live(self, target: State) -> bool:
        if target is self.live:
            return True
        if target.entry is None or self.live.entry is None or target.image or self.live.image:
            return False
        return (target.name, target.version) == (self.live.name, self.live.version)

    def _outgrown(self) -> bool:
        """Whether what is live is merged where slots have come for it since."""
        state = self.live
        return state.entry is not None and state.image is None and bool(self._merged_beyond(state.entry))

    def _is_merged(self, state: State) -> bool:
        """Whether some of it is merged into the base's weights."""
        return state.entry is not None and state.image is None and bool(state.entry.compile(self.binding).merges.all)

    def _merged_beyond(self, entry: Entry) -> set[tuple[str, str]]:
        """Tensors of the base that something is merged into, and would not be if the entry were written now."""
        merged = self.binding.absolutes.merged_now
        if not merged:
            return merged
        compiled = entry.compile(self.binding)
        return merged - compiled.values.keys() - {key for merge in compiled.merges.all for key in merge.keys}

    def _is_foreign(self, state: State) -> bool:
        """Whether it is what came with the model, which nothing but the model has."""
        return state.entry is None and state.image is None and state is not self._neutral

    def _undo_state(self, touched: bool) -> State:
        """What is live, such that it can be written again."""
        records = self.binding.capture()
        image = self.binding.image() if touched or self._is_foreign(self.live) else self.live.image
        if self.live is self._neutral and image is None and records == self._neutral.records:
            return self._neutral  # by which `_is_live` knows that there is nothing to do
        return State(self.live.entry, image, records, self.live.empty)

    def arrival(self) -> live.Arrival:
        """What takes an adapter to the devices while it is read for a swap that is to come."""
        return self.binding.memory.arrival()

    def refresh(self, entry: Entry) -> bool:
        """Before a swap to the entry: make it anew if others have changed the base's own values. Says whether it was.

        Raises:
            DoesNotFitError, ModelError, UnsupportedError: the base as it is now has no place for it.
        """
        if not entry.reads_base(self.binding):
            return False
        self.binding.refuse_if_replaced()
        self.binding.absolutes.note_changes()
        return entry.refresh(self.binding)

    def prefetch(self, entry: Entry) -> bool:
        """Let the entry's bytes stay on the devices. Says whether there was room, and use, for them on all."""
        return self.binding.memory.prefetch(entry.compile(self.binding).writes)

    def _bring(self, target: State) -> None:
        """Set the bytes of `target` on their way to a GPU, while all is looked at that decides whether they go in."""
        if target.entry is not None and target.image is None and not self._is_live(target):
            since = self.live.entry if self.live.image is None else None
            self.binding.memory.bring(target.entry.writes(self.binding, since)[0])

    def _write(
        self,
        target: State,
        occupied: Mapping[str, int],
        said: Records | None,
        *,
        clean: bool = False,
        since: Entry | None = None,
    ) -> int:
        """Put `target` into the model, whose slots may hold values up to `occupied` and whose records say `said`.

        If `since` is given, they hold that entry and nothing else. Returns the bytes of adapter that were written.
        """
        binding, memory, records, nbytes = self.binding, self.binding.memory, target.records, 0
        if records is None:
            assert target.entry is not None
            records = target.entry.compile(binding).records
        if not binding.on_gpu:
            binding.apply(records, said)  # before the copy, which takes all else out of the cache
        if target.image is not None:
            binding.restore(target.image)
        elif target.entry is not None:
            writes, nbytes = target.entry.writes(binding, since)
            compiled = target.entry.compile(binding)
            nbytes += compiled.merges.nbytes
            binding.write(writes, compiled.values, compiled.merges.steps, occupied, clean=clean)
        else:
            binding.write(memory.neutral, {}, (), occupied, clean=clean)
        if binding.on_gpu:
            binding.apply(records, said)  # while the device copies
        self._note_merged(target)
        return nbytes

    def _note_merged(self, target: State) -> None:
        """Let nobody take empty slots for an adapter that they do not hold."""
        entry = target.entry
        merged = entry is not None and bool(entry.compile(self.binding).merges.all or self._merged_beyond(entry))
        if merged:
            self._merged = True  # before it is done: it may be broken off
            live.forbid(self.model, self.adapter_name, target.name)
        elif self._merged:
            live.allow(self.model, self.adapter_name)
            self._merged = False

    def _report(self, target: State, previous: State, nbytes: int, started: float, *, changed: bool) -> SwapReport:
        tier = self.binding.memory.came_from if nbytes else "none"
        route, error = "side", None
        if target.entry is not None:
            compiled = target.entry.compile(self.binding)
            route, error = compiled.route, target.entry.error or compiled.merges.error
        generation, seconds = self.gate.generation, time.perf_counter() - started
        return SwapReport(
            target.name, previous.name, target.version, generation, route, tier, nbytes, seconds, changed, error
        )
