"""Contract 5: what a swap does to forward passes, and to other swaps, in other threads and tasks."""

from __future__ import annotations

import asyncio
import copy
import gc
import io
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

import hotslot
from adapters import make_adapter
from compiling import WAYS, Backend
from hotslot import leases
from hotslot.errors import InFlightError, ModelError
from hotslot.leases import Gate
from hotslot.testing import no_recompile
from oracle import assert_same_output, assert_unchanged, fresh, fresh_output, snapshot
from zoo import ZOO

SOON = 20  # seconds within which anything that is not held up has come about
MLP, LLAMA = ZOO["mlp"], ZOO["llama"]


@pytest.fixture
def threads() -> Iterator[Callable[..., Future[Any]]]:
    """Runs a function in a thread of its own."""
    with ThreadPoolExecutor(16) as pool:
        yield pool.submit


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.001)


def waiting(gate: Gate) -> int:
    return len(gate._queue)


def is_free(gate: Gate) -> bool:
    return not (gate._open or gate._queue or gate._writer)


class Block:
    """Enters a context manager in a thread of its own; `end` leaves it there."""

    def __init__(self, submit: Callable[..., Future[Any]], manager: Any) -> None:
        self._entered, self._end = threading.Event(), threading.Event()
        self.done = submit(self._run, manager)

    def _run(self, manager: Any) -> None:
        with manager:
            self._entered.set()
            assert self._end.wait(SOON)

    @property
    def entered(self) -> bool:
        return self._entered.is_set()

    def end(self) -> None:
        self._end.set()
        self.done.result(SOON)


# --- the gate -------------------------------------------------------------------------------------------------------


def test_leases_overlap_and_a_swap_is_alone(threads: Any) -> None:
    gate = Gate()
    first, second = Block(threads, gate.lease()), Block(threads, gate.lease())
    wait_until(lambda: first.entered and second.entered)
    swap = Block(threads, gate.swap())
    wait_until(lambda: waiting(gate) == 1)
    first.end()
    time.sleep(0.02)
    assert not swap.entered
    second.end()
    wait_until(lambda: swap.entered)
    late, other = Block(threads, gate.lease()), Block(threads, gate.swap())
    wait_until(lambda: waiting(gate) == 2)
    assert not late.entered
    assert not other.entered
    swap.end()
    wait_until(lambda: late.entered)
    assert not other.entered
    late.end()
    other.end()
    assert is_free(gate)


def test_first_come_first_served(threads: Any) -> None:
    gate, order = Gate(), []

    @contextmanager
    def noting(name: str, manager: Any) -> Iterator[None]:
        with manager:
            order.append(name)
            yield

    holder, blocks = Block(threads, gate.lease()), []
    wait_until(lambda: holder.entered)
    for number, (name, manager) in enumerate(
        [("swap 1", gate.swap()), ("lease 1", gate.lease()), ("swap 2", gate.swap()), ("lease 2", gate.lease())]
    ):
        blocks.append(Block(threads, noting(name, manager)))
        wait_until(lambda: waiting(gate) == number + 1)  # noqa: B023  it is called at once
    holder.end()
    for block in blocks:
        wait_until(lambda: block.entered)  # noqa: B023
        block.end()
    assert order == ["swap 1", "lease 1", "swap 2", "lease 2"]


def hammer(gate: Gate, seconds: float) -> tuple[int, list[int]]:
    """How often a thread swaps, and each of four take a lease, where no moment is without a lease."""
    stop, counts = time.monotonic() + seconds, [0, 0, 0, 0, 0]

    def take(i: int) -> None:
        while time.monotonic() < stop:
            with gate.lease():
                time.sleep(0.001)
                counts[i] += 1

    def swap() -> None:
        while time.monotonic() < stop:
            with gate.swap():
                counts[4] += 1

    running = [threading.Thread(target=take, args=(i,)) for i in range(4)] + [threading.Thread(target=swap)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return counts[4], counts[:4]


def test_neither_swaps_nor_leases_starve() -> None:
    swaps, leases = hammer(Gate(), 1.0)
    assert swaps > 20
    assert min(leases) > 20


def test_without_a_queue_swaps_starve() -> None:
    """The control: leases that do not wait for a swap that waits."""

    class Impolite(Gate):
        def enter(self, timeout_seconds: float | None = None) -> Any:
            held, self._queue = self._queue, type(self._queue)()
            try:
                return super().enter(timeout_seconds)
            finally:
                held.extend(self._queue)
                self._queue = held

    gate = Impolite()
    with ThreadPoolExecutor(5) as pool:
        first = Block(pool.submit, gate.lease())
        wait_until(lambda: first.entered)
        swap = Block(pool.submit, gate.swap())
        wait_until(lambda: waiting(gate) == 1)
        second = Block(pool.submit, gate.lease())
        wait_until(lambda: second.entered)  # past the swap
        first.end()
        time.sleep(0.02)
        assert not swap.entered
        second.end()
        swap.end()


def test_leases_nest_while_a_swap_waits(threads: Any) -> None:
    gate = Gate()
    with gate.lease():
        swap = Block(threads, gate.swap())
        wait_until(lambda: waiting(gate) == 1)
        with gate.lease(), gate.lease():
            assert len(gate._open) == 1
        other = Block(threads, gate.lease())  # the control: another thread's does wait
        wait_until(lambda: waiting(gate) == 2)
        assert not other.entered
        assert not swap.entered
    swap.end()
    other.end()
    assert is_free(gate)


def test_the_writer_may_read_and_not_write_again() -> None:
    """A callback within a swap may run the model."""
    gate = Gate()
    with gate.swap():
        with gate.lease(), gate.lease():
            pass
        with pytest.raises(ModelError, match="within another swap"), gate.swap():
            pass
    assert is_free(gate)


def test_two_gates_do_not_know_each_other(threads: Any) -> None:
    one, two = Gate(), Gate()
    with one.lease(), two.lease(), one.lease():
        assert len(one._open) == len(two._open) == 1
        swap = Block(threads, two.swap())
        wait_until(lambda: waiting(two) == 1)
    with one.lease(), one.lease():
        swap.end()
    with one.lease(), two.swap():
        pass
    assert is_free(one)
    assert is_free(two)


@pytest.mark.parametrize("in_flight", [None, "finish", "drain", "now"])
def test_a_swap_within_one_s_own_lease_raises(in_flight: Any) -> None:
    gate, seconds = Gate(), 1 if in_flight == "drain" else None
    with gate.lease(), pytest.raises(ModelError, match="wait for itself"), gate.swap(in_flight, seconds):
        pass
    with gate.swap(in_flight, seconds):  # the control
        pass
    assert is_free(gate)


def test_draining_ends_at_its_timeout(threads: Any) -> None:
    gate = Gate()
    holders = [Block(threads, gate.lease()) for _ in range(3)]
    wait_until(lambda: all(holder.entered for holder in holders))
    started = time.monotonic()
    with pytest.raises(InFlightError) as caught, gate.swap("drain", 0.1):
        pass
    assert 0.1 <= time.monotonic() - started < SOON
    assert isinstance(caught.value, TimeoutError)
    assert "3 leases open, the oldest for 0." in str(caught.value)
    late = Block(threads, gate.lease())  # which waits for nobody any more
    wait_until(lambda: late.entered)
    drain = Block(threads, gate.swap("drain", SOON))
    wait_until(lambda: waiting(gate) == 1)
    for holder in [*holders, late]:
        holder.end()
    wait_until(lambda: drain.entered)
    drain.end()
    assert is_free(gate)


def test_a_timeout_lets_those_behind_go_on(threads: Any) -> None:
    gate = Gate()
    holder = Block(threads, gate.lease())
    wait_until(lambda: holder.entered)
    drain = Block(threads, gate.swap("drain", 0.3))
    wait_until(lambda: waiting(gate) == 1)
    behind = Block(threads, gate.lease())
    wait_until(lambda: waiting(gate) == 2)
    assert not behind.entered
    wait_until(lambda: behind.entered)
    with pytest.raises(InFlightError):
        drain.done.result(SOON)
    holder.end()
    behind.end()


def test_now_waits_for_nobody(threads: Any) -> None:
    gate = Gate()
    holder = Block(threads, gate.lease())
    wait_until(lambda: holder.entered)
    with gate.swap("now"):
        assert len(gate._open) == 1
    holder.end()


@pytest.mark.parametrize(
    ("in_flight", "seconds"),
    [("later", None), ("drain", None), ("drain", -1), ("drain", float("nan")), ("now", 1), ("finish", 1), (None, 1)],
)
def test_options_that_contradict_each_other(in_flight: Any, seconds: Any) -> None:
    gate = Gate()
    for manager in (gate.swap, gate.visit):
        with pytest.raises(ValueError, match=r"in_flight|timeout_seconds"), manager(in_flight, seconds):
            pass
    assert is_free(gate)


def test_what_raises_gives_back(threads: Any) -> None:
    gate = Gate()
    for manager in (gate.lease, gate.swap, gate.visit):
        with pytest.raises(ZeroDivisionError), manager():
            raise ZeroDivisionError
        assert is_free(gate)
    with pytest.raises(ZeroDivisionError), gate.visit() as visit, visit.arriving(lambda: False):
        raise ZeroDivisionError
    assert is_free(gate)
    with gate.visit() as visit:
        with visit.arriving(lambda: False):
            pass
        with pytest.raises(ZeroDivisionError), visit.leaving(lambda: False):
            raise ZeroDivisionError
    assert is_free(gate)
    threads(gate.enter).result(SOON)
    assert not is_free(gate)  # the control


def test_a_gate_goes_with_its_model() -> None:
    model = nn.Linear(2, 2)
    gate = Gate.of(model)
    assert Gate.of(model) is gate
    with gate.lease():
        pass
    gc.collect()  # of what other tests have left
    count = len(leases._gates)
    del model, gate
    gc.collect()
    assert len(leases._gates) == count - 1


# --- contexts -------------------------------------------------------------------------------------------------------


def test_tasks_are_told_apart_and_copies_of_a_context_share_its_lease(threads: Any) -> None:
    gate = Gate()

    async def holder(held: asyncio.Event, swapped: asyncio.Event) -> None:
        with gate.lease():
            held.set()
            await swapped.wait()
            with gate.lease():
                await asyncio.to_thread(lambda: gate.leave(gate.enter()))  # its own, though a swap waits
            with pytest.raises(ModelError, match="wait for itself"):
                await asyncio.to_thread(lambda: gate.swap().__enter__())

    async def main() -> None:
        held, swapped = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(holder(held, swapped))
        await held.wait()
        assert not gate.holds_lease  # of this task
        swap = Block(threads, gate.swap())
        await asyncio.to_thread(wait_until, lambda: waiting(gate) == 1)
        swapped.set()
        await task
        await asyncio.to_thread(swap.end)

    asyncio.run(main())
    assert is_free(gate)


def test_a_task_that_outlives_the_lease_it_was_born_in_keeps_what_it_has_taken(threads: Any) -> None:
    gate = Gate()

    async def child(taken: asyncio.Event, go: asyncio.Event) -> None:
        with gate.lease():
            taken.set()
            await go.wait()
        with gate.lease():  # the parent's is over: one of its own
            assert len(gate._open) == 1
        with gate.swap():
            pass

    async def main() -> None:
        taken, go = asyncio.Event(), asyncio.Event()
        with gate.lease():
            task = asyncio.create_task(child(taken, go))
            await taken.wait()
        assert len(gate._open) == 1
        go.set()
        await task

    asyncio.run(main())
    assert is_free(gate)


def test_a_lease_in_a_generator_that_is_closed_elsewhere(threads: Any) -> None:
    gate = Gate()

    def stream() -> Iterator[int]:
        with gate.lease():
            yield 1
            yield 2

    tokens = stream()
    next(tokens)
    assert gate.holds_lease  # to swap before it is done would wait for ever
    threads(tokens.close).result(SOON)
    assert not gate.holds_lease
    with gate.swap():
        pass
    for _ in range(50):
        with gate.lease():
            pass
    assert is_free(gate)


# --- visits: swap, lease, swap back ---------------------------------------------------------------------------------


@contextmanager
def visiting(gate: Gate, log: list[str], name: str) -> Iterator[None]:
    with gate.visit() as visit:
        with visit.arriving(lambda: False):
            log.append(f"{name} in")
        yield
        with visit.leaving(lambda: False):
            log.append(f"{name} out")


def test_a_visit_swaps_back_before_a_swap_that_waits(threads: Any) -> None:
    gate, log = Gate(), []
    visit = Block(threads, visiting(gate, log, "visit"))
    wait_until(lambda: visit.entered)
    reader = Block(threads, gate.lease())
    wait_until(lambda: reader.entered)

    @contextmanager
    def swap() -> Iterator[None]:
        with gate.swap():
            log.append("swap")
            yield

    other = Block(threads, swap())
    wait_until(lambda: waiting(gate) == 1)
    visit._end.set()
    wait_until(lambda: waiting(gate) == 2)
    late = Block(threads, gate.lease())
    wait_until(lambda: waiting(gate) == 3)
    reader.end()
    visit.end()
    other.end()
    late.end()
    assert log == ["visit in", "visit out", "swap"]
    assert is_free(gate)


def test_visits_queue(threads: Any) -> None:
    gate, log = Gate(), []
    blocks = [Block(threads, visiting(gate, log, str(i))) for i in range(6)]
    for _ in blocks:
        wait_until(lambda: any(block.entered and not block.done.done() for block in blocks))
        next(block for block in blocks if block.entered and not block.done.done()).end()
    assert [entry.split()[1] for entry in log] == ["in", "out"] * 6
    assert is_free(gate)


def test_visits_nest_while_a_swap_waits(threads: Any) -> None:
    gate, log = Gate(), []
    with visiting(gate, log, "outer"):
        swap = Block(threads, gate.swap())
        wait_until(lambda: waiting(gate) == 1)
        with visiting(gate, log, "inner"), gate.lease():
            pass
        assert not swap.entered
    swap.end()
    assert log == ["outer in", "inner in", "inner out", "outer out"]
    assert is_free(gate)


def test_a_visit_within_a_lease_waits_for_the_others(threads: Any) -> None:
    gate, log = Gate(), []
    reader = Block(threads, gate.lease())
    wait_until(lambda: reader.entered)

    def visit() -> None:
        with gate.lease(), visiting(gate, log, "visit"):
            pass

    done = threads(visit)
    wait_until(lambda: waiting(gate) == 1)
    late = Block(threads, gate.lease())
    wait_until(lambda: waiting(gate) == 2)
    assert log == []
    reader.end()
    wait_until(lambda: late.entered)  # beside the visit, which waits for it in turn before it swaps back
    assert log == ["visit in"]
    late.end()
    done.result(SOON)
    assert log == ["visit in", "visit out"]


def test_of_two_visits_within_leases_the_second_raises(threads: Any) -> None:
    gate, log = Gate(), []
    both = threading.Barrier(2)

    def visit(name: str) -> None:
        with gate.lease():
            both.wait(SOON)
            with visiting(gate, log, name):
                pass

    done = [threads(visit, name) for name in "ab"]
    errors = [future.exception(SOON) for future in done]
    assert sorted(type(error).__name__ for error in errors) == ["ModelError", "NoneType"]
    assert "wait for each other" in str(next(filter(None, errors)))
    assert len(log) == 2
    assert is_free(gate)


def test_a_swap_back_comes_before_a_visit_that_can_still_be_refused(threads: Any) -> None:
    gate, log = Gate(), []
    inside, go = threading.Event(), threading.Event()

    def first() -> None:
        with gate.lease(), visiting(gate, log, "first"):
            inside.set()
            go.wait(SOON)

    def second() -> None:
        with gate.lease(), visiting(gate, log, "second"):
            pass

    one = threads(first)
    assert inside.wait(SOON)
    two = threads(second)
    wait_until(lambda: waiting(gate) == 1)
    go.set()
    with pytest.raises(ModelError, match="wait for each other"):
        two.result(SOON)
    one.result(SOON)
    assert log == ["first in", "first out"]
    assert is_free(gate)


# --- models ---------------------------------------------------------------------------------------------------------


LAYERS = 4


class Tower(nn.Module):
    """Deep and thin: much time between the first adapted layer and the last."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def config() -> LoraConfig:
    """A new one each time: the model that it is given to keeps it."""
    return LoraConfig(r=4, lora_alpha=8, target_modules=r"layers\.\d+")


INPUT = torch.linspace(-1, 1, 16).view(2, 8)


def tower_adapter(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"base_model.model.layers.{i}.lora_{half}.weight": torch.randn(shape, generator=generator)
        for i in range(LAYERS)
        for half, shape in (("A", (4, 8)), ("B", (8, 4)))
    }


def tower(names: str = "ab") -> tuple[nn.Module, hotslot.Swapper]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = get_peft_model(Tower(), config()).eval()
    swapper = hotslot.attach(model)
    for i, name in enumerate(names):
        swapper.load(name, tower_adapter(i), config=config())
    return model, swapper


def expected(model: nn.Module, swapper: hotslot.Swapper) -> dict[str, bytes]:
    found = {}
    for name in swapper.adapters:
        swapper.activate(name)
        found[name] = run(model)
    assert len(set(found.values())) == len(found)
    return found


@torch.no_grad()
def run(model: Any) -> bytes:
    output: bytes = model(INPUT).numpy().tobytes()
    return output


# Not `fullgraph=True`: torch 2.13 then counts compiled frames in a way that threads disturb, guarded or not.
COMPILED: dict[str | None, Callable[[nn.Module, Backend], Any]] = {
    None: lambda model, backend: model,
    "torch.compile(model)": lambda model, backend: torch.compile(model, backend=backend),
    "model.compile()": lambda model, backend: (model.compile(backend=backend), model)[1],
}


@pytest.fixture
def busy_interpreter() -> Iterator[None]:
    """Threads change over as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def torn_outputs(calls: list[Any], whole: set[bytes], swap: Callable[[int], object], swaps: int) -> tuple[int, int]:
    """(outputs that are no adapter's, outputs) of threads that run `calls`, while `swap` is called `swaps` times."""
    stop = threading.Event()

    def forwards(call: Any) -> list[bytes]:
        outputs = []
        while not stop.is_set():
            outputs.append(run(call))
        return outputs

    with ThreadPoolExecutor(len(calls)) as pool:
        running = [pool.submit(forwards, call) for call in calls]
        try:
            for i in range(swaps):
                swap(i)
        finally:
            stop.set()
        outputs = [output for future in running for output in future.result(SOON)]
    return sum(output not in whole for output in outputs), len(outputs)


@pytest.mark.slow
def test_no_guarded_forward_is_torn_by_ten_thousand_swaps() -> None:
    model, swapper = tower()
    backend = Backend()
    compiled = torch.compile(model, backend=backend)
    swapper.guard()
    whole = set(expected(model, swapper).values()) | set(expected(compiled, swapper).values())
    generation = swapper.generation
    with no_recompile():
        torn, total = torn_outputs([model, compiled] * 2, whole, lambda i: swapper.activate("ab"[i % 2]), 10_000)
    assert swapper.generation == generation + 10_000
    assert torn == 0
    assert total > 10_000
    assert backend.graphs == 1


@pytest.mark.parametrize("way", COMPILED)
def test_each_way_of_compiling_is_guarded(way: str | None, busy_interpreter: None) -> None:
    model, swapper = tower()
    if way == "model.compile()":
        swapper.guard()  # before; else after
    call = COMPILED[way](model, backend := Backend())
    swapper.guard()
    whole = set(expected(call, swapper).values())
    torn, total = torn_outputs([call] * 4, whole, lambda i: swapper.activate("ab"[i % 2]), 300)
    assert torn == 0
    assert total > 300
    assert backend.graphs == (way is not None)


@pytest.mark.parametrize("way", COMPILED)
@pytest.mark.parametrize("guarded", [False, True])
def test_without_leases_outputs_are_torn(guarded: bool, way: str | None, busy_interpreter: None) -> None:
    """The control: an unguarded model, and a guarded one that swaps do not wait for."""
    model, swapper = tower()
    call = COMPILED[way](model, Backend())
    whole = set(expected(call, swapper).values())
    if guarded:
        swapper.guard()
    torn = total = 0
    for _ in range(20):
        found = torn_outputs(
            [call] * 4, whole, lambda i: swapper.activate("ab"[i % 2], in_flight="now" if guarded else None), 300
        )
        torn, total = torn + found[0], total + found[1]
        if torn > 20:
            break
    assert torn > 20, total


def test_two_slots_of_a_model_share_a_gate(threads: Any) -> None:
    model, one = tower()
    model.add_adapter("second", config())
    two = hotslot.attach(model, adapter_name="second")
    assert one.engine.gate is two.engine.gate is Gate.of(model.get_base_model())
    one.guard()
    two.guard()
    one.detach()
    with Held(threads, two) as held:
        held.assert_holds_up(lambda: run(model))
    two.detach()
    assert not any("_call_impl" in module.__dict__ for module in model.modules())


class Held:
    """A swap that is under way for as long as the block: what is guarded waits for it."""

    def __init__(self, submit: Callable[..., Future[Any]], swapper: hotslot.Swapper) -> None:
        self._submit, self._gate = submit, swapper.engine.gate
        self._block = Block(submit, self._gate.swap())

    def __enter__(self) -> Held:
        wait_until(lambda: self._block.entered)
        self.held_up: list[Future[Any]] = []
        return self

    def assert_holds_up(self, call: Callable[[], object]) -> None:
        before = waiting(self._gate)
        self.held_up.append(self._submit(call))
        wait_until(lambda: waiting(self._gate) > before or self.held_up[-1].done())
        assert not self.held_up[-1].done(), self.held_up[-1].exception()

    def assert_passes(self, call: Callable[[], object]) -> None:
        self._submit(call).result(SOON)

    def __exit__(self, *exc: object) -> None:
        self._block.end()
        for future in self.held_up:
            future.result(SOON)
        assert is_free(self._gate)


def test_what_is_guarded_and_what_is_not(threads: Any) -> None:
    model, swapper = tower()
    base = model.get_base_model()

    @torch.compile(backend="eager", fullgraph=True)
    def step(x: Tensor) -> Any:
        return model(x)

    with Held(threads, swapper) as held:
        held.assert_passes(lambda: run(model))  # the control
    swapper.guard()
    with Held(threads, swapper) as held:
        for call in (model, base, model.base_model):
            held.assert_holds_up(lambda: run(call))  # noqa: B023
        held.assert_passes(lambda: run(step))  # nor does it break its graph
        held.assert_passes(lambda: run(base.forward))
        held.assert_passes(lambda: run(base.layers[0]))
        held.assert_passes(lambda: run(copy.deepcopy(model)))
        held.assert_passes(lambda: swapper.load("c", tower_adapter(2), config=config()))
        held.assert_passes(lambda: swapper.unload("c"))

    def leased() -> None:
        with swapper.lease():
            run(step)

    with Held(threads, swapper) as held:
        held.assert_holds_up(leased)


@pytest.mark.parametrize("order", ["guard first", "compile first"])
@pytest.mark.parametrize(
    ("way", "entry", "on_peft"),
    [(way, "gpt2" if "each" in way else entry, on_peft) for way in WAYS for entry in ("mlp", "attention")
     for on_peft in (False, True)],
)  # fmt: skip
def test_guards_are_outside_of_what_is_compiled(
    way: str, entry: str, on_peft: bool, order: str, tmp_path: Path, threads: Any
) -> None:
    """`fullgraph=True`; and guarding what is compiled compiles nothing."""
    made, backend = ZOO[entry], Backend()
    folder = make_adapter(tmp_path / "a", made, seed=1, r=4, target_modules=list(made.targets[:2]))
    model = fresh(made, folder) if on_peft else made.build()
    swapper = hotslot.attach(model, adapters={"a": folder})
    if order == "guard first":
        swapper.guard()
    call = WAYS[way](model, backend)
    with torch._dynamo.config.patch(recompile_limit=64):
        made.output(call, made.inputs())
        with no_recompile():
            if order == "compile first":
                swapper.guard()
            swapper.activate("a")
            assert_same_output(made.output(call, made.inputs()), fresh_output(made, folder))
            with Held(threads, swapper) as held:
                held.assert_holds_up(lambda: made.output(call, made.inputs()))
    assert backend.graphs > 0


def test_a_sequential_is_guarded_but_under_torch_compile(threads: Any) -> None:
    """dynamo enters modules of torch.nn from outside: they are within the trace, as in a function around a model."""
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    swapper = hotslot.attach(model)
    swapper.guard()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    run(compiled)
    with Held(threads, swapper) as held:
        held.assert_passes(lambda: run(compiled))
        held.assert_holds_up(lambda: run(model))
    model.compile(backend="eager", fullgraph=True)
    with Held(threads, swapper) as held:
        held.assert_holds_up(lambda: run(model))


def test_copies_and_pickles_of_a_guarded_model_are_whole_and_not_guarded(threads: Any) -> None:
    model, swapper = tower()
    swapper.activate("a")
    want, keys = run(model), list(model.state_dict())
    swapper.guard()
    assert list(model.state_dict()) == keys
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    swapper.activate("b")  # no copy shares anything with the model
    for other in copies:
        assert run(other) == want != run(model)
        assert run(torch.compile(other, backend="eager", fullgraph=True)) == want
    with Held(threads, swapper) as held:
        for other in copies:
            held.assert_passes(lambda: run(other))  # noqa: B023


@pytest.mark.parametrize("way", [None, *list(WAYS)[:2]])
def test_detach_leaves_no_guard(way: str | None, threads: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(Tower(), config()).eval()
    call = WAYS[way](model, Backend()) if way else model
    before, attributes = snapshot(model), {name: dict(vars(module)) for name, module in model.named_modules()}
    swapper = hotslot.attach(model)
    swapper.guard()
    swapper.guard()
    assert "_call_impl" in vars(model)
    run(call)
    swapper.detach()
    assert_unchanged(before, snapshot(model))
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys(), name
        for key in ("_call_impl", "_compiled_call_impl"):
            assert vars(module).get(key) is attributes[name].get(key)


def test_a_guard_does_not_keep_the_model() -> None:
    """Its memory is free when it goes, without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        model, swapper = tower()
        swapper.guard()
        run(model)
        alive = weakref.ref(model), weakref.ref(model.get_base_model())
        del model
        assert [ref() for ref in alive] == [None, None]
        cycle = Tower()
        cycle.__dict__["_call_impl"] = cycle._call_impl
        alive_too = weakref.ref(cycle)
        del cycle
        assert alive_too() is not None  # the control
    finally:
        gc.enable()


def test_what_was_compiled_with_the_guard_in_it_is_not_held_up_after_detach(threads: Any) -> None:
    model, swapper = tower()
    swapper.guard()
    model.compile(backend="eager")
    run(model)
    gate = swapper.engine.gate
    swapper.detach()
    with gate.swap():
        threads(run, model).result(SOON)


def test_a_forward_that_raises_gives_its_lease_back() -> None:
    model, swapper = tower()
    swapper.guard()
    for hook in (model.register_forward_pre_hook, model.register_forward_hook):
        handle = hook(lambda *arguments: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            run(model)
        handle.remove()
    with pytest.raises(RuntimeError), torch.no_grad():
        model(torch.ones(3, 3))
    assert is_free(swapper.engine.gate)
    swapper.activate("a", in_flight="drain", timeout_seconds=0)


def test_hooks_of_users_run_under_the_lease() -> None:
    model, swapper = tower()
    swapper.guard()
    seen = []
    model.register_forward_pre_hook(lambda *arguments: seen.append(swapper.engine.gate.holds_lease))
    model.register_forward_hook(lambda *arguments: seen.append(swapper.engine.gate.holds_lease))
    run(model)
    assert seen == [True, True]
    assert not swapper.engine.gate.holds_lease


def test_every_method_that_swaps_waits_for_leases_or_not(threads: Any) -> None:
    model, swapper = tower("abc")
    outputs = expected(model, swapper)
    swapper.guard()

    def use(**options: Any) -> None:
        with swapper.using("c", **options):
            assert run(model) == outputs["c"]

    for method in (partial(swapper.activate, "a"), swapper.deactivate, swapper.rollback, use):
        swapper.activate("b")
        reader = Block(threads, swapper.lease())
        wait_until(lambda: reader.entered)  # noqa: B023
        generation = swapper.generation
        with pytest.raises(InFlightError, match="1 leases open"):
            method(in_flight="drain", timeout_seconds=0.01)
        assert swapper.generation == generation
        assert swapper.active == "b"
        assert run(model) == outputs["b"]
        method(in_flight="now")
        assert swapper.generation > generation
        swapper.activate("b", in_flight="now")
        done = threads(method)
        wait_until(lambda: waiting(swapper.engine.gate) == 1)
        assert swapper.active == "b"
        reader.end()
        done.result(SOON)
        assert is_free(swapper.engine.gate)
    reader = Block(threads, swapper.lease())
    wait_until(lambda: reader.entered)
    with pytest.raises(InFlightError):
        swapper.detach(in_flight="drain", timeout_seconds=0.01)
    done = threads(swapper.detach)
    wait_until(lambda: waiting(Gate.of(model.get_base_model())) == 1)
    reader.end()
    done.result(SOON)


def test_within_a_lease_nothing_swaps_but_using(tmp_path: Path) -> None:
    model, swapper = tower()
    folder = tmp_path / "adapter"
    with swapper.using("b"):
        model.save_pretrained(folder)
    outputs = expected(model, swapper)
    with swapper.lease():
        for act in (
            lambda: swapper.activate("a"),
            lambda: swapper.activate("b"),  # live already
            lambda: swapper.activate("a", in_flight="now"),
            swapper.deactivate,
            swapper.rollback,
            swapper.detach,
            lambda: hotslot.hotswap_adapter(model, str(folder), "default"),
        ):
            with pytest.raises(ModelError, match="wait for itself"):
                act()
        assert swapper.active == "b"
        with swapper.using("a"):
            assert run(model) == outputs["a"]
            with pytest.raises(ModelError, match="wait for itself"):
                swapper.activate("b")
            with swapper.using("a", in_flight="now"), swapper.using("b"):
                assert run(model) == outputs["b"]
            assert run(model) == outputs["a"]
        assert run(model) == outputs["b"]
    swapper.activate("a")  # the control
    hotslot.hotswap_adapter(model, str(folder), "default")
    assert run(model) == outputs["b"]


def test_the_drop_in_waits_for_guarded_forwards(tmp_path: Path, threads: Any) -> None:
    model, swapper = tower()
    with swapper.using("b"):
        model.save_pretrained(tmp_path / "b")
    swapper.activate("a")
    reader = Block(threads, swapper.lease())
    wait_until(lambda: reader.entered)
    done = threads(hotslot.hotswap_adapter, model, str(tmp_path / "b"), "default")
    wait_until(lambda: waiting(swapper.engine.gate) == 1)
    generation = swapper.generation
    reader.end()
    done.result(SOON)
    assert swapper.generation == generation + 1


def test_using_sees_one_adapter_from_swap_to_swap(threads: Any) -> None:
    """Threads that each use an adapter of their own, and one that swaps besides: nobody sees another's."""
    model, swapper = tower("abc")
    outputs = expected(model, swapper)
    swapper.guard()
    swapper.deactivate()
    stop = threading.Event()

    def use(name: str) -> int:
        wrong = 0
        for _ in range(40):
            with swapper.using(name):
                wrong += any(run(model) != outputs[name] for _ in range(3))
        return wrong

    def swap() -> None:
        while not stop.is_set():
            swapper.activate("c")
            swapper.deactivate()

    other = threads(swap)
    assert sum(future.result(SOON) for future in [threads(use, name) for name in "abcab"]) == 0
    stop.set()
    other.result(SOON)
    assert swapper.active is None
    assert is_free(swapper.engine.gate)


def test_blocks_that_use_the_same_adapter_overlap(threads: Any) -> None:
    _model, swapper = tower()
    one = Block(threads, swapper.using("a"))
    wait_until(lambda: one.entered)
    two = Block(threads, swapper.using("a"))
    wait_until(lambda: two.entered)
    three = Block(threads, swapper.using("b"))  # the control
    wait_until(lambda: waiting(swapper.engine.gate) == 1)
    assert not three.entered
    one._end.set()
    two.end()
    one.end()
    wait_until(lambda: three.entered)
    assert swapper.active == "b"
    three.end()
    assert swapper.active is None


def test_activating_what_is_live_waits_for_nobody_and_says_so(threads: Any) -> None:
    _model, swapper = tower()
    first = swapper.activate("a")
    reader = Block(threads, swapper.lease())
    wait_until(lambda: reader.entered)
    again = swapper.activate("a", in_flight="drain", timeout_seconds=0)
    assert (first.changed, again.changed) == (True, False)
    assert first.generation == again.generation == swapper.generation
    with pytest.raises(InFlightError):
        swapper.activate("b", in_flight="drain", timeout_seconds=0)
    with pytest.raises(hotslot.errors.UnknownAdapterError):  # at once, too
        swapper.activate("nobody's")
    reader.end()


def test_version_and_generation() -> None:
    model, swapper = tower()
    assert (swapper.version, swapper.generation) == (None, 0)
    seen = []
    for act in (
        lambda: swapper.activate("a"),
        lambda: swapper.activate("b"),
        swapper.rollback,
        swapper.deactivate,
        lambda: swapper.activate("a"),
    ):
        report = act()
        assert report.version == swapper.version
        seen.append((swapper.version, report.generation))
        assert report.generation == swapper.generation
    a, b = seen[0][0], seen[1][0]
    assert [version for version, _ in seen] == [a, b, a, None, a]
    assert a != b
    assert [generation for _, generation in seen] == [1, 2, 3, 4, 5]
    with swapper.using("b"):
        assert swapper.generation == 6
    assert swapper.generation == 7
    with pytest.raises(hotslot.errors.UnknownAdapterError):
        swapper.activate("nobody's")
    assert swapper.generation == 7
    swapper.detach()
    assert swapper.generation == 8
    assert hotslot.attach(model).generation == 8


@pytest.mark.parametrize("static", [False, True])
def test_a_whole_generate_sees_one_adapter(static: bool, tmp_path: Path, threads: Any) -> None:
    linear = [target for target in LLAMA.targets if target.endswith("_proj")]
    folders = {
        name: make_adapter(tmp_path / name, LLAMA, seed=i, r=4, target_modules=linear) for i, name in enumerate("ab")
    }
    model = LLAMA.build()
    swapper = hotslot.attach(model, adapters=folders)
    swapper.guard()
    prompt = LLAMA.inputs()["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(prompt)
    backend = Backend()
    if static:
        from transformers import CompileConfig

        compiling = CompileConfig(backend=backend, mode=None, fullgraph=True, dynamic=False)
        compiling._compile_all_devices = True  # as on a GPU
        options |= {"use_cache": True, "cache_implementation": "static", "compile_config": compiling}
    whole = {}
    for name in folders:
        swapper.activate(name)
        whole[name] = model.generate(prompt, **options)
    assert not torch.equal(whole["a"], whole["b"])  # the control
    stop = threading.Event()

    def generate() -> list[Tensor]:
        found = []
        while not stop.is_set():
            with swapper.lease():
                found.append(model.generate(prompt, **options))
        return found

    running = [threads(generate) for _ in range(1 if static else 2)]  # a static cache is the model's own
    for i in range(30):
        swapper.activate("ab"[i % 2])
        time.sleep(0.005)
    stop.set()
    found = [tokens for future in running for tokens in future.result(SOON)]
    assert all(any(torch.equal(tokens, one) for one in whole.values()) for tokens in found)
    assert (backend.graphs > 0) == static
    with Held(threads, swapper) as held:
        held.assert_holds_up(lambda: model.generate(prompt, **options))
