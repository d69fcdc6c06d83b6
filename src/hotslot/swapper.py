"""The object that users hold: it loads adapters into host memory and swaps one of them into the live model.

A swap is planned and checked when the adapter is loaded; `activate` only copies. Whatever raises on the way, the model
is as it was.
"""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from . import checkpoint as checkpoints
from . import live
from .blending import Blend, Blender, Ingredient, needed_ranks
from .cache import HostTier
from .checkpoint import Source
from .engine import Engine, Entry, State
from .errors import (
    CheckpointError,
    DoesNotFitError,
    ModelError,
    RankError,
    UnexpectedTargetError,
    UnknownAdapterError,
    UnsupportedError,
)
from .leases import InFlight, check_in_flight
from .metrics import Metrics, Recorder, log_fields
from .pipelines import read, whole
from .planning import Plan, plan_adapters, refuse_unfit
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
        entries: Iterable[Entry],
        plan: Plan,
        wrapping: live.Wrapping | None = None,
        route: str = "auto",
    ) -> None:
        self._engine = engine
        self._injections = [injection] if injection is not None else []
        self._wrappings = [wrapping] if wrapping is not None else []
        self._plan = plan
        self._route = route
        self._tier: HostTier[Entry] = HostTier()
        self._blender = Blender()
        self._recorder = Recorder()
        self._lock = engine.lock
        self._detaching = self._detached = False
        for entry in entries:
            self._tier.add(entry.name, entry)
        _attached.setdefault(engine.model, {})[engine.adapter_name] = self

    @classmethod
    def of(cls, model: Any, adapter_name: str = "default") -> Swapper | None:
        """The swapper that is attached to this slot of the model, or None; of a component that of its pipeline, too."""
        plain = live.unwrap(whole(model))
        holders = [holder for holder in (plain, live.Assembly.of(plain)) if holder is not None]
        return next((by[adapter_name] for by in map(_attached.get, holders) if by and adapter_name in by), None)

    @classmethod
    def make_way(cls, model: nn.Module, adapter_name: str) -> None:
        """Let go of this slot's swapper if its adapter was deleted from the model, and nothing is left to write.

        Raises:
            ModelError: the slot has a swapper that can write it.
        """
        parts = live.roots(model).values()
        known = next((found for part in (model, *parts) if (found := cls.of(part, adapter_name))), None)
        if known is not None and known._engine.is_current():
            raise ModelError(
                f"A swapper is attached to the slot {adapter_name!r} of this model already.",
                hint=f"take it with Swapper.of(model, {adapter_name!r}), or detach() it first",
            )
        if known is not None:
            known._let_go()

    def __repr__(self) -> str:
        state = "detached" if self._detached else f"{len(self._engine.binding.slots)} slots, active {self.active!r}"
        return f"<Swapper of slot {self._engine.adapter_name!r}: {state}, {len(self._tier)} loaded>"

    @property
    def engine(self) -> Engine:
        """What does the swapping; for hotslot's own integrations."""
        return self._bound()

    # -- what there is ----------------------------------------------------------------------------------------------

    @property
    def active(self) -> str | None:
        """Name of the live adapter, of a blend such as "character:1.0+style:0.7", by name.

        None for the base model, or for what was on the model before hotslot.
        """
        return self._engine.live.name

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of all loaded adapters, in the order of loading."""
        return tuple(self._tier)

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
        """Bytes of host memory that the loaded adapters hold, and the last few blends of them.

        What of an adapter is not in its file counts too: what PEFT makes of it, and what merges are computed from.
        """
        return self._tier.nbytes + self._blender.nbytes

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
        """Counts of swaps, bytes, seconds by tier and recompilations since attach; still there after `detach`."""
        host_bytes = self.host_bytes  # takes long for thousands of adapters: without the lock
        with self._lock:
            slot, adapters = self._engine.adapter_name, len(self._tier)
            return self._recorder.metrics(slot=slot, adapters=adapters, host_bytes=host_bytes)

    # -- loading: off the hot path ----------------------------------------------------------------------------------

    def load(self, name: str, source: Source, *, config: Any = None, **hub: Any) -> None:
        """Read, check and hold an adapter in host memory, ready for `activate(name)`. The model is not touched.

        Args:
            name: yours to choose; a name that is taken gets the new adapter, and what is live stays live.
            source: a folder, a Hub id, or a dict of tensors with `config`.
            config: a peft config or a dict like adapter_config.json.
            **hub: subfolder, revision, cache_dir, token, as in `huggingface_hub.hf_hub_download`.

        Raises:
            CheckpointError, UnsupportedError, DoesNotFitError: what is wrong with it, and where. What is only beyond
                the plan has as its `plan` the one that would take it, for `grow`.
        """
        entry = self._read(name, source, config, hub)
        with self._lock:
            self._compile(entry)
            self._tier.add(name, entry)

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
        """
        with self._lock:
            known = self._entry(name)
        config, origin = dict(known.adapter.checkpoint.config), f"the update of {name!r}"
        checkpoint = checkpoints.from_tensors(tensors, config, origin=origin, pin_memory=self._pins)
        entry = Entry(name, checkpoint, route=self._route)
        with self._lock:
            self._compile(entry)
            is_live = self.active == name
        report = self._swap(lambda engine: State(entry), in_flight, timeout_seconds) if is_live else None
        with self._lock:
            self._blender.forget(name)
            self._tier.add(name, entry)
        return report

    def unload(self, name: str) -> None:
        """Let go of a loaded adapter's memory, and of the base's own values that were kept for it alone.

        Raises:
            UnknownAdapterError: no such adapter.
            ModelError: it is live, and a failed swap away from it could not be undone without it.
        """
        with self._lock:
            entry = self._entry(name)
            now = self._engine.live.entry
            if now is entry or (isinstance(now, Blend) and name in now.names):
                raise ModelError(
                    f"The adapter {name!r} is live.", where=name, hint="activate another one or deactivate() before"
                )
            self._blender.forget(name)
            self._tier.remove(name)
            self._bound().let_go(self._tier.values())
            self._bound().binding.stagings.forget(entry.version)

    def prefetch(self, name: str) -> bool:
        """Bring a loaded adapter to the GPUs ahead of its swap, on a stream of its own: nothing waits for it.

        What was not used for longest goes for it, within `Cache.device_bytes`.

        Returns:
            Whether it is there, or on its way; False where it does not fit, and for what is merged or not on a GPU.

        Raises:
            UnknownAdapterError: no such adapter.
        """
        with self._lock:
            return self._bound().prefetch(self._entry(name))

    def fits(self, source: Source, *, config: Any = None, **hub: Any) -> Fit:
        """Whether an adapter could be loaded and activated, by which route, at how many bytes; else why not."""
        try:
            entry = self._read("", source, config, hub)
        except (CheckpointError, DoesNotFitError, UnsupportedError) as error:
            return Fit(None, 0, str(error))
        try:
            with self._lock:
                self._compile(entry)
        except (DoesNotFitError, UnsupportedError) as error:
            return Fit(None, entry.nbytes, str(error), getattr(error, "plan", None))
        with self._lock:
            return self._fit(entry)

    def _fit(self, entry: Entry) -> Fit:
        compiled, plan = entry.compile(self._bound().binding), None
        route, merges = compiled.route, compiled.merges
        if not merges.all:
            return Fit(route, entry.adapter.checkpoint.nbytes, None)
        if entry.adapter.targets:
            plan = self._larger(entry)
        nbytes = merges.nbytes + compiled.nbytes
        pristine = self._bound().binding.merger.keeping(merges.steps)
        return Fit(route, nbytes, None, plan, merges.nbytes, merges.seconds, merges.error, pristine)

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
            InFlightError: work in flight did not end in time.
            MergedError: the slot's adapter is merged into the base weights.
            ModelError: the slot's layers or parameters were taken from the model; or this is within one's own lease.
        """
        with self._lock:  # a blend is made before anybody waits for it
            target = self._state(adapter, blend)
        return self._swap(lambda engine: target, in_flight, timeout_seconds)

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

        with self._lock:
            wanted = self._state(adapter, blend) if adapter is not None else None

        def choose() -> State:
            return wanted or engine.neutral

        with engine.gate.visit(in_flight, timeout_seconds) as visit:
            with visit.arriving(lambda: self._finds_live(choose)), self._lock:
                report = self._swap_to(choose())
                before = engine.previous if report.changed else engine.live
            assert before is not None
            live.note_stream(engine.gate)
            try:
                yield report
            finally:
                with visit.leaving(lambda: self._finds_live(lambda: before)), self._lock:
                    self._recorded_swap(before)

    def detach(self, *, in_flight: InFlight | None = None, timeout_seconds: float | None = None) -> None:
        """Give the model back as it was at attach, unguarded, and forget it.

        Slots that attach made are taken out. On a model that had the adapter before, the parameters get their own
        memory and shapes back; the adapter that came with it is live again, with whatever training it has had.
        """
        with self._bound().gate.swap(in_flight, timeout_seconds), self._lock:
            engine = self._bound()
            if not self._detaching:
                if engine.is_current():
                    engine.restore_original()
                self._detaching = True  # from here on each step may be repeated, if it is broken off
            self._let_go()

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

    # -- inside -----------------------------------------------------------------------------------------------------

    def _swap(
        self, choose: Callable[[Engine], State], in_flight: InFlight | None, timeout_seconds: float | None
    ) -> SwapReport:
        check_in_flight(in_flight, timeout_seconds)
        gate = self._bound().gate
        if gate.busy and not gate.holds_lease:
            with self._lock:  # a mistake, or nothing to do: known without waiting
                engine = self._bound()
                target = choose(engine)
                if engine.finds_live(target):
                    return self._recorded_swap(target)
        with gate.swap(in_flight, timeout_seconds), self._lock:
            return self._swap_to(choose(self._bound()))

    def _finds_live(self, choose: Callable[[], State]) -> bool:
        with self._lock:
            return self._bound().finds_live(choose())

    def _let_go(self) -> None:
        model = self._engine.model  # an Assembly lives no longer than its engines
        with _guarding:
            live.unguard(model, self._engine.adapter_name)
        self._engine.release()
        for wrapping in reversed(self._wrappings):
            live.unwrap_saved(wrapping)
        for injection in reversed(self._injections):
            live.remove(injection)
        _attached.get(model, {}).pop(self._engine.adapter_name, None)
        self._blender.clear()
        for name in self.adapters:
            self._tier.remove(name)
        self._detached = True

    def _bound(self) -> Engine:
        if self._detached:
            raise ModelError("This swapper was detached from its model.", hint="hotslot.attach(model, …) again")
        return self._engine

    def _grow(self, engine: Engine, plan: Plan) -> None:
        growth = None
        try:
            growth = engine.grow(plan.slots, plan.saved, plan.tokens, plan.tied)
            for entry in self._tier.values():
                entry.compile(engine.binding)  # now, and not while it is activated
        except BaseException:
            if growth is not None:
                growth.undo()
            raise
        self._wrappings.append(growth.wrapping)
        if growth.injection is not None:
            self._injections.append(growth.injection)

    def _compile(self, entry: Entry) -> None:
        engine = self._bound()
        live.refuse_other_base(engine.model, entry.adapter)
        live.refuse_other_parameters(engine.model, engine.binding.slots, entry.adapter)
        try:
            entry.compile(engine.binding)
        except (RankError, UnexpectedTargetError) as error:
            if not entry.adapter.targets:
                raise
            raise self._with_plan(error, entry) from None

    def _with_plan(self, error: DoesNotFitError, entry: Entry) -> DoesNotFitError:
        """The refusal of what is beyond the plan, with the plan that would take it."""
        return error.within(self._larger(entry))

    def _larger(self, entry: Entry) -> Plan:
        """The plan that has slots for it too."""
        model, name, own = self._engine.model, self._engine.adapter_name, self.plan
        options: Any = {"max_blend": own.max_blend, "dtype": own.dtype, "adapter_name": name}
        larger = own | plan_adapters(model, [entry.adapter], **options)
        refuse_unfit(model, entry.adapter, larger, name)
        return larger

    def _ingredients(self, weights: Mapping[str, float]) -> list[Ingredient]:
        """By name, so that the order in which a blend is written makes no other blend of it."""
        if not weights:
            raise ValueError("A blend of no adapters; deactivate() makes the base model live")
        given: Mapping[str, Any] = weights
        for name, weight in given.items():
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not abs(weight) <= sys.float_info.max:  # NaN is not, nor a whole number of 400 digits
                raise ValueError(f"The weight of {name!r} in the blend must be a finite number, got {weight!r}")
        return [Ingredient(self._entry(name), float(weights[name])) for name in sorted(weights)]

    def _state(self, adapter: str | Mapping[str, float], blend: str | None = None) -> State:
        engine = self._bound()
        if blend not in (None, "svd"):
            raise ValueError(f"blend must be None or 'svd', got {blend!r}")
        if isinstance(adapter, str):
            return State(self._entry(adapter))
        ingredients = self._ingredients(adapter)
        if len(ingredients) == 1 and ingredients[0].weight == 1.0:
            return State(ingredients[0].entry)
        try:
            mixed = self._blender.blend(ingredients, engine.binding, svd=blend == "svd")
            mixed.compile(engine.binding)
        except (RankError, UnexpectedTargetError) as error:
            biased = any(ingredient.entry.adapter.lora_bias for ingredient in ingredients)
            raise error.within(self.plan.with_room(needed_ranks(ingredients), biased=biased)) from None
        return State(mixed)

    def _swap_to(self, target: State) -> SwapReport:
        report = self._recorded_swap(target)
        if isinstance(target.entry, Blend):
            self._blender.hold(target.entry)
        return report

    def _recorded_swap(self, target: State) -> SwapReport:
        try:
            report = self._bound().swap(target)
        except BaseException:
            self._recorder.add_failure()
            raise
        self._recorder.add(report)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%r is live", report.adapter, extra=log_fields(report))
        return report

    def _entry(self, name: str) -> Entry:
        try:
            return self._tier[name]
        except KeyError:
            raise UnknownAdapterError(
                f"No adapter {name!r} is loaded.",
                found=f"loaded: {', '.join(map(repr, self._tier)) or 'none'}",
                hint=f"swapper.load({name!r}, source) first",
            ) from None

    def _read(self, name: str, source: Source, config: Any, hub: Mapping[str, Any]) -> Entry:
        model = self._bound().model
        return Entry(name, read(model, source, config=config, pin_memory=self._pins, **hub), route=self._route)

    @property
    def _pins(self) -> bool:
        return live.is_on_gpu(self._bound().model)


def _previous(engine: Engine) -> State:
    if engine.previous is None:
        raise ModelError("There is nothing to roll back to.", hint="activate an adapter first")
    return engine.previous
