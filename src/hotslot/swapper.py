"""The object that users hold: it loads adapters into host memory and swaps one of them into the live model.

A swap is planned and checked when the adapter is loaded; `activate` only copies. Whatever raises on the way, the model
is as it was.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from . import checkpoint as checkpoints
from . import live
from .blending import Blend, Ingredient, names_of, needed_ranks
from .cache import Cache
from .checkpoint import Checkpoint, Files, Sink, Source
from .engine import Engine, State
from .entry import Entry
from .errors import (
    CheckpointError,
    DoesNotFitError,
    ModelError,
    RankError,
    UnexpectedTargetError,
    UnsupportedError,
)
from .fitting import fit, prepare
from .leases import InFlight, Visit, check_in_flight
from .library import Library, Loan, background
from .metrics import Metrics
from .observers import Observers
from .pipelines import Request, packed_as, read, request, survey, whole
from .planning import Plan
from .report import Fit, SwapReport

logger = logging.getLogger(__name__)

# Model → PEFT's adapter name → its Swapper: one slot has one writer.
_attached: weakref.WeakKeyDictionary[nn.Module, dict[str, Swapper]] = weakref.WeakKeyDictionary()

_guarding = threading.Lock()  # two slots of a model share its guard


class Swapper:
    """Swaps adapters in one slot of a live model. Made by `hotslot.attach`.

    All methods may be called from any thread; swaps happen one after the other. A swap waits for leases on the model
    to end, and new ones wait for it: a block of `lease()`, and once `guard()` was called each forward pass, sees one
    adapter from start to end. What holds none may see parts of two.

    Methods that swap take `in_flight`: "finish", the default, waits for leases as long as they take; "drain" waits
    `timeout_seconds`; "now" waits for none, and work in flight may mix adapters. Within one's own lease they raise,
    all but `using`. An event loop must not wait: `await asyncio.to_thread(swapper.activate, name)`.
    """

    def __init__(
        self,
        engine: Engine,
        injection: live.Injection | None,
        entries: Iterable[tuple[Entry, Request]],
        plan: Plan,
        wrapping: live.Wrapping | None = None,
        route: str = "auto",
        cache: Cache = Cache(),  # noqa: B008  it is frozen
    ) -> None:
        self._engine = engine
        self._injections = [injection] if injection is not None else []
        self._wrappings = [wrapping] if wrapping is not None else []
        self._plan = plan
        self._route = route
        self._observers = Observers()
        self._stagings = engine.binding.stagings
        self._lock = engine.lock
        self._library = Library(
            cache,
            engine.lock,
            pin_memory=live.is_on_gpu(engine.model),
            open=self._open,
            packed_as=self._packed_as,
            make=self._make,
            is_used=engine.uses,
        )
        self._proven: set[bytes] = set()  # digests of Schemas of which an adapter was found to fit
        self._detaching = self._ending = self._detached = False
        for entry, source in entries:
            self._proven.add(entry.adapter.checkpoint.schema.digest)
            self._library.hold(entry, source)
        _attached.setdefault(engine.model, {})[engine.adapter_name] = self

    @classmethod
    def of(cls, model: Any, adapter_name: str = "default") -> Swapper | None:
        """The swapper that is attached to this slot of the model, or None; of a component that of its pipeline, too."""
        plain = live.unwrap(whole(model))
        holders = [holder for holder in (plain, live.Assembly.of(plain)) if holder is not None]
        return next((by[adapter_name] for by in map(_attached.get, holders) if by and adapter_name in by), None)

    @classmethod
    def make_way(cls, model: nn.Module, adapter_name: str, *, yielding: Container[Swapper] = ()) -> None:
        """Let go of this slot's swappers: of the model, and of those that some of its components have.

        Where the adapter was deleted from the model, there is nothing left to write, and all that a swapper has added
        goes. Those of `yielding` let go in any case, and what they have made live stays on the model.

        Raises:
            ModelError: the slot has a swapper that can write it.
        """
        parts = (model, *live.roots(model).values())
        known = dict.fromkeys(found for part in parts if (found := cls.of(part, adapter_name)))
        if any(swapper not in yielding and swapper._engine.is_current() for swapper in known):
            raise ModelError(
                f"A swapper is attached to the slot {adapter_name!r} of this model already.",
                hint=f"take it with Swapper.of(model, {adapter_name!r}), or detach() it first",
            )
        for swapper in known:
            with swapper._engine.gate.swap(), swapper._lock:
                swapper._let_go(leaving=swapper in yielding)

    def __repr__(self) -> str:
        state = "detached" if self._detached else f"{len(self._engine.binding.slots)} slots, active {self.active!r}"
        return f"<Swapper of slot {self._engine.adapter_name!r}: {state}, {len(self._library)} loaded>"

    @property
    def engine(self) -> Engine:
        """What does the swapping; for hotslot's own integrations."""
        return self._bound()

    @property
    def detached(self) -> bool:
        """Whether `detach` has given the model back."""
        return self._detached

    # -- what there is ----------------------------------------------------------------------------------------------

    @property
    def active(self) -> str | None:
        """Name of the live adapter, of a blend such as "character:1.0+style:0.7", by name.

        None for the base model, or for what was on the model before hotslot.
        """
        return self._engine.live.name

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of all loaded adapters, in memory or not, in the order of loading."""
        return tuple(self._library)

    @property
    def version(self) -> str | None:
        """Digest of the live adapter, as it was loaded; None where `active` is."""
        return self._engine.live.version

    @property
    def plan(self) -> Plan:
        """The slots that the model has now, and what they were planned for."""
        slots = self._bound().binding.slots
        return replace(self._plan, slots=MappingProxyType({fqn: slot.shape() for fqn, slot in slots.items()}))

    @property
    def generation(self) -> int:
        """How many swaps have changed the model's adapters. Only grows, and counts all of the model's swappers."""
        return self._engine.gate.generation

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that adapters hold, and the last few blends of them, within `Cache.host_bytes`.

        What of an adapter is not in its file counts too: what PEFT makes of it, and what merges are computed from. And
        what was replaced or unloaded, as long as `rollback` needs it.
        """
        return self._library.nbytes

    @property
    def device_bytes(self) -> int:
        """Bytes of GPU memory that adapters hold beside the slots, within `Cache.device_bytes`."""
        return self._bound().binding.stagings.nbytes

    @property
    def pristine_bytes(self) -> int:
        """Bytes of the base's own values that are kept beside the weights that adapters are merged into.

        None before the first such swap, nor with `pristine="file"`; let go when no loaded adapter needs them.
        """
        return self._bound().binding.absolutes.pristine_bytes

    def metrics(self) -> Metrics:
        """Counts of swaps, bytes, seconds by tier and recompilations since attach; still there after `detach`.

        It waits for no swap, and no swap for it.
        """
        library = self._library
        return self._observers.recorder.metrics(
            self._engine.adapter_name,
            adapters=len(library),
            host_adapters=library.waiting,
            host_bytes=library.held_bytes,
            device_bytes=self._stagings.nbytes,
            hits=library.hits,
            misses=library.misses,
            evictions=library.evictions,
        )

    # -- loading: off the hot path ----------------------------------------------------------------------------------

    def load(self, name: str, source: Source | Request, *, config: Any = None, lazy: bool = False, **hub: Any) -> None:
        """Read, check and hold an adapter in host memory, ready for `activate(name)`. The model is not touched.

        Args:
            name: yours to choose; a name that is taken gets the new adapter, and what is live stays live.
            source: a folder, a Hub id, or a dict of tensors with `config`.
            config: a peft config or a dict like adapter_config.json.
            lazy: of a folder or a Hub id, or a pipeline's file, read the config and the file's header alone, and the
                values when they are needed, if an adapter of equal header and config has been found to fit and the
                name is not pinned.
            **hub: subfolder, revision, cache_dir, token, as in `huggingface_hub.hf_hub_download`.

        Raises:
            CheckpointError, UnsupportedError, DoesNotFitError: what is wrong with it, and where. What is only beyond
                the plan has as its `plan` the one that would take it, for `grow`.
            CacheFullError: there is no room for it within `Cache.host_bytes`.
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {name!r:.200}")
        asked = self._request(source, config, hub)
        schema = survey(self._bound().model, asked) if lazy else None
        if schema is not None and schema.digest in self._proven and not self._library.pins(name):
            self._library.know(name, asked, schema.nbytes)
        else:
            self._library.load(name, asked)

    def update(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        *,
        in_flight: InFlight | None = None,
        timeout_seconds: float | None = None,
    ) -> SwapReport | None:
        """Give a loaded adapter other values, of a trainer's step as a rule; if it is live, they are live at once.

        That is one swap, as of `activate`, and a new `version`. The tensors are copied, neither kept nor changed. A
        blend that has the adapter in it stays what it is until it is activated anew.

        Args:
            name: of a loaded adapter, whose config goes on to hold.
            tensors: all of its tensors, on any device, as `peft.get_peft_model_state_dict(model)` gives them.
            in_flight: "finish", "drain" or "now"; see the class.
            timeout_seconds: for "drain".

        Returns:
            The report of the swap; None if the adapter is not live.

        Raises:
            UnknownAdapterError: no adapter of that name is loaded.
            CheckpointError, DoesNotFitError: the tensors are not those of this adapter; loaded and live are unchanged.
            InFlightError, MergedError, ModelError: as `activate`; loaded and live are unchanged.
            CacheFullError: there is no room for them beside what is live and what was before.
        """
        self._bound()
        with self._library.lent([name]) as loan:
            config = dict(loan.entries[name].adapter.checkpoint.config)
        origin = f"the update of {name!r}"
        checkpoint = checkpoints.from_tensors(tensors, config, origin=origin, pin_memory=self._pins)
        spilled = self._library.spill(checkpoint)
        with self._library.room(checkpoint.nbytes, name) as room, ExitStack() as loans:
            with self._lock:
                entry = self._make(name, checkpoint)
                loans.enter_context(self._library.kept(entry))  # else nobody would know what of the base it needs
                self._library.enlarge(room, entry.nbytes, name)
                is_live = self.active == name
            try:
                report = self._swap(lambda engine: State(entry), in_flight, timeout_seconds) if is_live else None
                self._library.hold(entry, spilled, room)
                return report
            except BaseException:
                if is_live and self._engine.live.entry is entry:  # broken off between the two
                    self._library.hold(entry, spilled, room)
                raise

    def unload(self, name: str) -> None:
        """Forget a loaded adapter, and let go of its memory and of the base's own values that were kept for it alone.

        If it was live before the last swap, its memory goes once `rollback` needs it no more.

        Raises:
            UnknownAdapterError: no such adapter.
            ModelError: it is live, and a failed swap away from it could not be undone without it.
        """
        with self._lock:
            engine, entry = self._bound(), self._library.peek(name)
            now = engine.live.entry
            if now is not None and (now is entry or (isinstance(now, Blend) and name in now.names)):
                raise ModelError(
                    f"The adapter {name!r} is live.", where=name, hint="activate another one or deactivate() before"
                )
            known = self._library.remove(name)
            engine.let_go(self._library.entries)
            if known.version is not None:
                engine.binding.stagings.forget(known.version)

    # -- where they wait --------------------------------------------------------------------------------------------

    def prefetch(self, name: str) -> Future[str]:
        """Bring a loaded adapter closer ahead of its swap, in the background: into host memory, and onto the GPUs.

        On a GPU on a stream of its own: nothing waits for it. What was not used for longest goes for it, within
        `Cache.host_bytes` and `Cache.device_bytes`.

        Returns:
            Where it waits then: "device", or "host", as all do that are merged or not on a GPU, or have no room there.
            Its `result()` raises what `activate` would.

        Raises:
            UnknownAdapterError: no such adapter.
        """
        self._bound()
        self._library.known(name)
        return background("prefetch").submit(self._prefetch, name)

    def evict(self, name: str) -> bool:
        """Let go of a loaded adapter's host memory: `activate` reads it again. Says whether it was in memory.

        Raises:
            UnknownAdapterError: no such adapter.
            CacheFullError: it is live, was live before, or is pinned; or its tensors were given, and have no place on
                disk.
        """
        with self._lock:
            self._bound()
            return self._library.evict(name)

    def pin(self, name: str) -> None:
        """Bring a loaded adapter into host memory, and keep it there whatever others need.

        Raises:
            UnknownAdapterError: no such adapter.
            CheckpointError, CacheFullError: it cannot be read, or there is no room for it.
        """
        self._bound()
        with self._library.lent([name]):
            self._library.known(name).pinned = True

    def unpin(self, name: str) -> None:
        """Take back `pin`.

        Raises:
            UnknownAdapterError: no such adapter.
        """
        self._library.known(name).pinned = False

    def check_integrity(self) -> None:
        """Raise AssertionError unless the bytes of all tiers are those that are held, and within their budgets."""
        with self._lock:
            self._library.check_integrity()
            self._bound().binding.stagings.check_integrity()

    # -- what would fit ---------------------------------------------------------------------------------------------

    def fits(self, source: Source, *, config: Any = None, **hub: Any) -> Fit:
        """Whether an adapter could be loaded and activated, by which route, at how many bytes; else why not."""
        try:
            entry = Entry("", self._open(self._request(source, config, hub), None), route=self._route)
        except (CheckpointError, DoesNotFitError, UnsupportedError) as error:
            return Fit(None, 0, str(error))
        try:
            with self._lock:
                prepare(self._bound(), self.plan, entry)
        except (DoesNotFitError, UnsupportedError) as error:
            return Fit(None, entry.nbytes, str(error), getattr(error, "plan", None))
        with self._lock:
            return fit(self._bound(), self.plan, entry)

    def grow(self, plan: Plan) -> None:
        """Give the model the slots and the room that `plan` has beyond what there is; nothing gets smaller.

        What is live stays live, and what is loaded stays loaded. Parameters keep being the same objects, but those
        of other shapes move, on a model that was attached before it was compiled all of them: compiled code compiles
        once more, and a CUDA graph has to be captured anew. All of it, or none of it if this raises.

        Raises:
            ModelError: the plan is for another model; a parameter whose shape would change is in training.
            MergedError: the slot's adapter is merged into the base weights.
            UnsupportedError: the adapter that came with the model is of a method that has no slots.
        """
        with self._bound().gate.swap(None, None), self._lock:
            engine = self._bound()
            if engine.binding.resident is not None:
                engine.binding.resident.refuse_to_grow()
            grown = self.plan | plan
            slots, name = engine.binding.slots, engine.adapter_name
            grown.refuse_other_model(engine.model, slots)
            engine.refuse_if_merged()
            engine.binding.put_right()
            missing = {fqn: shape for fqn, shape in grown.slots.items() if fqn not in slots}
            larger = [fqn for fqn, slot in slots.items() if grown.slots[fqn].parts != slot.shape().parts]
            saved = grown.saved - live.saved_modules(engine.model, name)
            rooms = live.token_rooms(engine.model, name)
            more = [fqn for fqn, count in grown.tokens.items() if count > rooms.get(fqn, 0)]
            if missing or larger or saved or more:
                self._grow(engine, grown)
                logger.warning(
                    "slot %r: %d slots added and %d made larger, %d slots of %d bytes now; what was compiled of the "
                    "model compiles once more",
                    name, len(missing), len(larger), len(grown.slots), grown.nbytes,
                )  # fmt: skip
            self._plan = grown

    # -- swapping ---------------------------------------------------------------------------------------------------

    def activate(
        self,
        adapter: str | Mapping[str, float],
        *,
        blend: str | None = None,
        in_flight: InFlight | None = None,
        timeout_seconds: float | None = None,
    ) -> SwapReport:
        """Make a loaded adapter the live one, in place: all of it, or none of it if this raises.

        If it is live already and untouched, this waits for nobody, and the report says `changed=False`.

        A blend, `activate({"style": 0.7, "character": 1.0})`, computes the sum of its adapters, each times its weight,
        as PEFT's `add_weighted_adapter(combination_type="cat")` does. Its ranks add up, and a plan leaves room for
        them: `hotslot.plan(model, sources, max_blend=2)`. Weights may be negative or zero; if nothing but weights
        changes, nothing but what they scale is written.

        Args:
            adapter: a name, or name → weight.
            blend: None for an exact sum; "svd" to cut it to the slots' ranks where it is beyond them, at an error
                that the report states.
            in_flight: "finish", "drain" or "now"; see the class.
            timeout_seconds: for "drain".

        Raises:
            UnknownAdapterError: no adapter of that name is loaded.
            RankError: a blend's rank is beyond the plan; the error's `plan` would take it.
            UnsupportedError: adapters that cannot be blended.
            NonFiniteError: weights that make values overflow.
            CheckpointError: it was not in memory, and its files are gone, damaged, or not those that were loaded.
            CacheError: it was not in memory, and what was kept on disk of its tensors is damaged.
            CacheFullError: it was not in memory, and there is no room for it beside what has to stay.
            InFlightError: work in flight did not end in time.
            MergedError: the slot's adapter is merged into the base weights.
            ModelError: the slot's layers or parameters were taken from the model; or this is within one's own lease.
        """
        with self._lent(adapter, blend) as loan:
            with self._lock:  # a blend is made before anybody waits for it
                target = self._state(adapter, blend, loan)
            with self._abandoning(target):
                return self._swap(lambda engine: target, in_flight, timeout_seconds, read_seconds=loan.seconds)

    def deactivate(self, *, in_flight: InFlight | None = None, timeout_seconds: float | None = None) -> SwapReport:
        """Make the slot neutral: the model computes what its base computes."""
        return self._swap(lambda engine: engine.neutral, in_flight, timeout_seconds)

    def rollback(self, *, in_flight: InFlight | None = None, timeout_seconds: float | None = None) -> SwapReport:
        """Swap back to what was live before the last swap, weights that were trained then included.

        Raises:
            ModelError: there was no swap yet.
        """
        return self._swap(_previous, in_flight, timeout_seconds)

    @contextmanager
    def using(
        self,
        adapter: str | Mapping[str, float] | None,
        *,
        blend: str | None = None,
        in_flight: InFlight | None = None,
        timeout_seconds: float | None = None,
    ) -> Iterator[SwapReport]:
        """Activate an adapter or a blend, or the base model with None, for a block; then swap back to what was live.

        The block holds a lease from the one swap to the other. It may stand within another, and within `lease()`. Two
        threads' blocks overlap only if the second finds live what it wants, else it waits for the first to end. The
        swap back waits for other leases too, but without a timeout, and comes before any other swap that waits.

        Raises:
            ModelError: within a lease, while another thread that holds a lease waits for that one to end.
        """
        engine = self._bound()
        with ExitStack() as loans:
            wanted, read_seconds = None, None
            if adapter is not None:
                loan = loans.enter_context(self._lent(adapter, blend))
                read_seconds = loan.seconds
                with self._lock:
                    wanted = self._state(adapter, blend, loan)
                loans.enter_context(self._abandoning(wanted))

            def choose() -> State:
                return wanted or self._bound().neutral

            with engine.gate.visit(in_flight, timeout_seconds) as visit:
                before: State | None = None  # what was live, once it is not any more
                try:
                    with visit.arriving(lambda: self._finds_live(choose)):
                        with self._lock:
                            was, target = engine.live, choose()
                            try:
                                report = self._recorded_swap(target, read_seconds)
                            except BaseException:
                                if engine.live is target is not was:  # broken off when it was done
                                    before = engine.previous
                                raise
                            before = engine.previous if report.changed else engine.live
                            assert before is not None
                            loans.enter_context(self._library.kept(before.entry))  # blocks within change the previous
                        self._observers.tell(report)
                    live.note_stream(engine.gate)
                    yield report
                finally:
                    if before is not None:
                        try:
                            self._swap_back(visit, before)
                        except Exception:
                            raise
                        except BaseException:  # an interrupt does not leave the adapter live
                            self._swap_back(visit, before)
                            raise

    def detach(self, *, in_flight: InFlight | None = None, timeout_seconds: float | None = None) -> None:
        """Give the model back as it was at attach, unguarded, and forget it.

        Slots that attach made are taken out. On a model that had the adapter before, the parameters get their own
        memory and shapes back; the adapter that came with it is live again, with whatever training it has had.
        """
        if self._ending:  # broken off when the model had been given back
            self._end()
            return
        with self._bound().gate.swap(in_flight, timeout_seconds):
            self.abandon()

    def abandon(self) -> None:
        """As `detach`, for who has seen to it that nothing is in flight: within `superseded` of another swapper."""
        with self._lock:
            engine = self._bound()
            if not self._detaching:
                if engine.is_current():
                    engine.restore_original()
                self._detaching = True  # from here on each step may be repeated, if it is broken off
            self._let_go()

    @contextmanager
    def superseded(self) -> Iterator[bool]:
        """For a block that puts other layers in the place of the slot's, and attaches to those; for integrations.

        Within it no lease is open, the base model has its own values, and the slot has no swapper. If the block raises,
        what was live is so again, in the same slots; else this swapper is detached, and the layers that it has written
        are nobody's any more.

        Yields:
            Whether forward passes were guarded, by `guard`: the new swapper is to.

        Raises:
            MergedError: the slot's adapter is merged into the base weights.
            UnsupportedError: the base model's own values are not known.
        """
        with self._bound().gate.swap(), self._lock:
            engine = self._bound()
            model, name, was = engine.model, engine.adapter_name, (engine.live, engine.previous, engine.original)
            guarded = live.is_guarded(model, name)
            engine.refuse_if_merged()
            try:
                if engine.binding.resident is None:  # else there is nothing but its own layers
                    engine.swap(engine.neutral)
                with _guarding:
                    live.unguard(model, name)
                _attached[model].pop(name)
                engine.stand_aside()
                self._detached = True
                yield guarded
            except BaseException:
                self._detached = False
                engine.come_back()
                _attached.setdefault(model, {})[name] = self
                if guarded:
                    live.guard(model, engine.gate, name)
                if engine.live is not was[0] and engine.previous is not None:
                    engine.swap(engine.previous)
                _, engine.previous, engine.original = was
                raise
            else:
                self._end()

    # -- work in flight ---------------------------------------------------------------------------------------------

    def guard(self) -> None:
        """Let each forward pass of the model hold a lease, until `detach`; outside of what torch.compile traces.

        Before or after torch.compile, which compiles nothing again. Guarded are calls of the model, of the PeftModel
        around it and of the base model within; so each step of `generate`, not the whole of it. Not guarded are a
        direct call of `model.forward`, the backward pass, a function that was compiled around the model, and
        `torch.compile(nn.Sequential(…))`, which is one: hold a `lease()` there. Copies are not guarded.
        """
        with self._lock, _guarding:
            engine = self._bound()
            live.guard(engine.model, engine.gate, engine.adapter_name)

    @contextmanager
    def lease(self) -> Iterator[None]:
        """For a block: no swap begins before it has ended, but with `in_flight="now"`.

            with swapper.lease():
                model.generate(…)

        It goes with the context: tasks and `asyncio.to_thread` calls that the block starts, and waits for, share it.
        Other threads' forward passes do not; if they are guarded, the block must not wait for them. On a GPU swaps
        wait for what the current CUDA stream was given, too, and it for them.
        """
        gate = self._bound().gate
        with gate.lease():
            live.note_stream(gate)
            yield

    def on_swap(self, callback: Callable[[SwapReport], object]) -> Callable[[], None]:
        """Have `callback(report)` called after each swap that changed what is live; returns what takes it back.

        For what is stale then: caches of keys and values, of prefixes, of embeddings. It is called in the thread that
        swaps, before leases that wait for the swap go on, and must neither swap nor wait for a lease; it may load, pin
        and evict. What it raises is logged, since the swap is done. `detach` calls none. Swaps of this slot by PEFT's
        functions count, too, as far as they are hotslot's.
        """
        return self._observers.add(callback)

    def witness(self, report: SwapReport) -> None:
        """Count, log and tell of a swap that others have made with `engine`, and while its gate is theirs."""
        with self._lock:
            self._observers.note(report)
        self._observers.tell(report)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _swap(
        self,
        choose: Callable[[Engine], State],
        in_flight: InFlight | None,
        timeout_seconds: float | None,
        read_seconds: float | None = None,
    ) -> SwapReport:
        check_in_flight(in_flight, timeout_seconds)
        gate = self._bound().gate
        if gate.busy and not gate.holds_lease:
            with self._lock:  # a mistake, or nothing to do: known without waiting
                engine = self._bound()
                target = choose(engine)
                if engine.finds_live(target):
                    return self._recorded_swap(target)
        with gate.swap(in_flight, timeout_seconds):
            with self._lock:
                engine = self._bound()
                target = choose(engine)
                self._observers.warn_if_lost(engine, target)
                report = self._recorded_swap(target, read_seconds)
            self._observers.tell(report)
            return report

    def _swap_back(self, visit: Visit, before: State) -> None:
        """At the end of a block of `using`."""
        with visit.leaving(lambda: self._finds_live(lambda: before)):
            with self._lock:
                report = self._recorded_swap(before)
            self._observers.tell(report)

    def _finds_live(self, choose: Callable[[], State]) -> bool:
        with self._lock:
            return self._bound().finds_live(choose())

    def _let_go(self, *, leaving: bool = False) -> None:
        """Forget the model, which gets all that was put on it taken off; or keeps that, and what is live, if `leaving`.

        What others have taken off already stays off.
        """
        model = self._engine.model  # an Assembly lives no longer than its engines
        with _guarding:
            live.unguard(model, self._engine.adapter_name)
        if not leaving:  # the slots may be gone, and what is merged would have nobody to undo it
            self._engine.binding.absolutes.put_back_merged()
        self._engine.release()
        if not leaving:
            for wrapping in reversed(self._wrappings):
                live.unwrap_saved(wrapping)
            for injection in reversed(self._injections):
                live.remove(injection)
        _attached.get(model, {}).pop(self._engine.adapter_name, None)
        self._end()

    def _end(self) -> None:
        """Hold nothing any more but what was counted: whoever collects metrics may hold this for a long time.

        May be repeated.
        """
        self._ending = True
        self._library.clear()
        self._detached = True
        self._injections, self._wrappings, self._stagings = [], [], live.Stagings()
        self._engine.forget()
        self._ending = False

    def _bound(self) -> Engine:
        if self._detached:
            raise ModelError("This swapper was detached from its model.", hint="hotslot.attach(model, …) again")
        return self._engine

    def _grow(self, engine: Engine, plan: Plan) -> None:
        growth = None
        try:
            growth = engine.grow(plan.slots, plan.saved, plan.tokens, plan.tied)
            for entry in self._library.entries():
                entry.compile(engine.binding)  # now, and not while it is activated
                self._library.weigh(entry)
        except BaseException:
            if growth is not None:
                growth.undo()
            raise
        self._wrappings.append(growth.wrapping)
        if growth.injection is not None:
            self._injections.append(growth.injection)

    @contextmanager
    def _lent(self, adapter: str | Mapping[str, float], blend: str | None) -> Iterator[Loan]:
        """What `activate` asks for, in memory; and room for a blend of it as far as that is a matter of waiting."""
        engine, names, alone = self._bound(), names_of(adapter, blend), isinstance(adapter, str)
        with self._library.lent(names, engine.arrival() if alone else None) as loan:
            if not alone:
                self._library.finish_packing()
            yield loan

    @contextmanager
    def _abandoning(self, target: State) -> Iterator[None]:
        """For a block that is to make a blend live, without which it is not kept."""
        try:
            yield
        except BaseException:
            if isinstance(target.entry, Blend):
                with self._lock:
                    self._library.blender.abandon(target.entry)
            raise

    def _state(self, adapter: str | Mapping[str, float], blend: str | None, loan: Loan) -> State:
        engine = self._bound()
        if isinstance(adapter, str):
            return State(loan.entries[adapter])
        ingredients = [Ingredient(entry, float(adapter[name])) for name, entry in loan.entries.items()]
        if len(ingredients) == 1 and ingredients[0].weight == 1.0:
            return State(ingredients[0].entry)
        try:
            mixed = self._library.blender.blend(ingredients, engine.binding, svd=blend == "svd")
            with self._abandoning(State(mixed)):
                mixed.compile(engine.binding)
            loan.entries[mixed.place] = mixed  # it may wait for its turn, and others need room meanwhile
        except (RankError, UnexpectedTargetError) as error:
            biased = any(ingredient.entry.adapter.lora_bias for ingredient in ingredients)
            raise error.within(self.plan.with_room(needed_ranks(ingredients), biased=biased)) from None
        return State(mixed)

    def _recorded_swap(self, target: State, read_seconds: float | None = None) -> SwapReport:
        """Swap, with the lock held. `read_seconds`: what bringing it into memory took, if it was not there."""
        engine = self._bound()
        try:
            if target.entry is not None and target.image is None and engine.refresh(target.entry):
                self._library.weigh(target.entry)
            self._observers.warn_if_passed_over(engine, target)
            report = engine.swap(target)
        except BaseException:
            self._observers.recorder.add_failure()
            raise
        if read_seconds is not None and report.nbytes:
            report = replace(report, tier="disk", seconds=report.seconds + read_seconds)
        if isinstance(target.entry, Blend):
            self._library.blender.hold(target.entry)
        self._observers.note(report)
        return report

    def _request(self, source: Source | Request, config: Any, hub: Mapping[str, Any]) -> Request:
        """A source, such that it can be read when it is needed; tensors are copied now."""
        return request(self._bound().model, source, config=config, pin_memory=self._pins, **hub)

    def _open(self, asked: Request, sink: Sink | None) -> Checkpoint:
        return read(self._bound().model, asked, pin_memory=self._pins, sink=sink)

    def _packed_as(self, asked: Request) -> Files | None:
        return packed_as(self._bound().model, asked)

    def _make(self, name: str, checkpoint: Checkpoint) -> Entry:
        """With the lock held: an adapter that is ready for the model."""
        entry, family = Entry(name, checkpoint, route=self._route), checkpoint.schema.digest
        if family in self._proven:
            entry.compile(self._bound().binding)
        else:
            prepare(self._bound(), self.plan, entry)
            self._proven.add(family)
        return entry

    def _prefetch(self, name: str) -> str:
        with self._library.lent([name]) as loan, self._lock:
            return "device" if self._bound().prefetch(loan.entries[name]) else "host"

    @property
    def _pins(self) -> bool:
        return live.is_on_gpu(self._bound().model)


def _previous(engine: Engine) -> State:
    if engine.previous is None:
        raise ModelError("There is nothing to roll back to.", hint="activate an adapter first")
    return engine.previous
