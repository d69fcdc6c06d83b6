"""Contract 1: a swap that raises, at whatever step, leaves the model bit for bit as it was, and able to swap.

Two injectors break off a swap at its k-th step, for every k until it completes: one raises at the k-th line that runs
in hotslot's engine or live package, the other before, after or in the middle of the k-th ATen operation.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter as peft_hotswap_adapter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hotslot
from adapters import make_adapter
from hotslot.engine import Engine
from oracle import Snapshot, assert_same_output, assert_unchanged, fresh, fresh_output, snapshot
from zoo import ZOO, Entry

SOURCES = Path(hotslot.__file__).parent
EXHAUSTIVE, STRIDE = 300, 7  # every step up to the first, then one in seven: a prime hits every line of a loop


# --- injectors ------------------------------------------------------------------------------------------------------


class Fault(Exception):
    """Raised by an injector."""


class LineFault:
    """Raises at the k-th line that runs in engine.py or live/*.py. `where` says at which."""

    def __init__(self, k: int, kind: type[BaseException]) -> None:
        self.k, self.kind, self.where = k, kind, ""
        self._count = 0

    def __enter__(self) -> LineFault:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.settrace(self._before)
        torch.set_grad_enabled(True)  # raised between a `with` block's last line and its __exit__

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if _is_commit_code(frame.f_code.co_filename) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self._count += 1
            if self._count == self.k:  # Python stops tracing when a trace function raises: the undoing runs free
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
                raise self.kind(self.where)
        return self._line


@functools.cache
def _is_commit_code(filename: str) -> bool:
    path = Path(filename)
    return path.parent == SOURCES / "live" or path == SOURCES / "engine.py"


class OpFault(TorchDispatchMode):
    """Raises before the k-th ATen operation, after it, or when half of a `_foreach` operation is done."""

    def __init__(self, k: int, kind: type[BaseException], when: str) -> None:
        super().__init__()
        self.k, self.kind, self.when, self.where = k, kind, when, ""
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._count += 1
        if self._count != self.k:
            return func(*args, **(kwargs or {}))
        self.where = f"{self.when} {func}"
        if self.when == "after":
            func(*args, **(kwargs or {}))
        elif self.when == "amid" and "_foreach" in str(func):
            half = [arg[: len(arg) // 2] if isinstance(arg, list | tuple) else arg for arg in args]
            func(*half, **(kwargs or {}))
        raise self.kind(self.where)


Injector = Callable[[int], Any]
INJECTORS: dict[str, Injector] = {
    "interrupted at a line": lambda k: LineFault(k, KeyboardInterrupt),
    "failing before an operation": lambda k: OpFault(k, Fault, "before"),
    "failing after an operation": lambda k: OpFault(k, Fault, "after"),
    "failing amid an operation": lambda k: OpFault(k, Fault, "amid"),
}
injected = pytest.mark.parametrize("injector", INJECTORS.values(), ids=[name.replace(" ", "-") for name in INJECTORS])


# --- what is compared -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Everything:
    """`oracle.snapshot`, and what it does not see: what would be saved, the config objects, the swapper's own word."""

    model: Snapshot
    saved: dict[str, bytes]
    rest: dict[str, Any]


def everything(model: nn.Module, swapper: hotslot.Swapper | None) -> Everything:
    rest: dict[str, Any] = {"hooks": sum(len(m._state_dict_hooks) for m in model.modules())}
    rest["configs"] = {name: id(config) for name, config in getattr(model, "peft_config", {}).items()}
    if swapper is not None:
        rest["swapper"] = (swapper.active, swapper.version, swapper.adapters, swapper.host_bytes)
    saved = {key: value.detach().numpy().tobytes() for key, value in model.state_dict().items()}
    return Everything(snapshot(model), saved, rest)


def assert_nothing_changed(before: Everything, after: Everything) -> None:
    assert_unchanged(before.model, after.model)
    assert before.saved == after.saved, "state_dict() shows something else"
    assert before.rest == after.rest


# --- scenarios ------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """A model before a swap, the swap, and what must come out of a swap that follows."""

    entry: Entry
    model: nn.Module
    act: Callable[[], object]
    then: Callable[[], object]  # after a failure: a swap that must succeed …
    expected: Path | None  # … and what is live after it; None: the base
    swapper: hotslot.Swapper | None = None


FOLDERS = {
    "mlp": {
        "a": {"r": 4, "target_modules": ["up", "inner.2"], "lora_alpha": 6, "lora_bias": True},
        "b": {"r": 2, "target_modules": ["inner.0", "inner.2"], "lora_alpha": 3, "use_rslora": True, "lora_dropout": 0.5},
        "same": {"r": 4, "target_modules": ["up", "inner.2"], "lora_alpha": 5, "lora_bias": True},
        "smaller": {"r": 2, "target_modules": ["up", "inner.2"], "lora_alpha": 5, "lora_bias": True},
        "larger": {"r": 7, "target_modules": ["up", "inner.2"], "rank_pattern": {"up": 3}, "lora_bias": True},
    },
    "embedding": {
        "a": {"r": 3, "target_modules": ["word", "mix"], "lora_alpha": 5},
        "b": {"r": 2, "target_modules": ["word", "place"], "lora_alpha": 7},
    },
    "conv2d": {
        "a": {"r": 4, "target_modules": ["grouped", "head"], "lora_alpha": 6},
        "b": {"r": 2, "target_modules": ["grouped", "point"], "lora_alpha": 5},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: {
            key: make_adapter(root / name / key, ZOO[name], seed=i, **config)
            for i, (key, config) in enumerate(configs.items())
        }
        for name, configs in FOLDERS.items()
    }


def train(model: nn.Module) -> None:
    """Change every LoRA weight in place, as an optimizer does."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.mul_(1.25)


def attached(entry: Entry, folders: dict[str, Path], model: nn.Module | None = None) -> tuple[nn.Module, hotslot.Swapper]:
    model = entry.build() if model is None else model
    return model, hotslot.attach(model, adapters={"a": folders["a"], "b": folders["b"]})


def live_to_other(entry: Entry, folders: dict[str, Path]) -> Stage:
    """From a live adapter that was trained on to one of other targets and ranks."""
    model, swapper = attached(entry, folders)
    swapper.activate("a")
    train(model)
    return Stage(entry, model, lambda: swapper.activate("b"), lambda: swapper.activate("a"), folders["a"], swapper)


def base_to_first(entry: Entry, folders: dict[str, Path]) -> Stage:
    model, swapper = attached(entry, folders)
    return Stage(entry, model, lambda: swapper.activate("a"), lambda: swapper.activate("b"), folders["b"], swapper)


def deactivation(entry: Entry, folders: dict[str, Path]) -> Stage:
    model, swapper = attached(entry, folders)
    swapper.activate("a")
    return Stage(entry, model, swapper.deactivate, lambda: swapper.activate("b"), folders["b"], swapper)


def rollback(entry: Entry, folders: dict[str, Path]) -> Stage:
    """Back to weights that were trained, and so are in no file."""
    model, swapper = attached(entry, folders)
    swapper.activate("a")
    train(model)
    swapper.activate("b")
    return Stage(entry, model, swapper.rollback, swapper.deactivate, None, swapper)


def rolled_back(entry: Entry, folders: dict[str, Path]) -> Stage:
    """From trained weights that a rollback has brought back."""
    model, swapper = attached(entry, folders)
    swapper.activate("a")
    train(model)
    swapper.activate("b")
    swapper.rollback()
    return Stage(entry, model, lambda: swapper.activate("b"), lambda: swapper.activate("a"), folders["a"], swapper)


def resident_to_other(entry: Entry, folders: dict[str, Path]) -> Stage:
    """From the adapter that came with a PEFT model, trained on, beside another adapter."""
    model = fresh(entry, folders["a"])
    model.load_adapter(str(folders["b"]), adapter_name="default_2")
    attached(entry, folders, model)
    train(model)
    swapper = hotslot.Swapper.of(model)
    assert swapper is not None
    return Stage(entry, model, lambda: swapper.activate("b"), lambda: swapper.activate("a"), folders["a"], swapper)


def without_arena(entry: Entry, folders: dict[str, Path]) -> Stage:
    """On a model that was compiled before: no parameter may move, each is written where it is."""
    model = fresh(entry, folders["a"])
    model.load_adapter(str(folders["b"]), adapter_name="other")
    swapper = hotslot.attach(torch.compile(model, backend="eager"), adapters={"same": folders["same"]})
    train(model)
    swapper.load("a", folders["a"])
    return Stage(entry, model, lambda: swapper.activate("same"), lambda: swapper.activate("a"), folders["a"], swapper)


def moved_by_the_user(entry: Entry, folders: dict[str, Path]) -> Stage:
    """After `model.to(dtype)` and back the parameters have other memory, which a swap puts right."""
    stage = live_to_other(entry, folders)
    stage.model.double().float()
    return stage


SCENARIOS: dict[str, tuple[Callable[[Entry, dict[str, Path]], Stage], str]] = {
    "live to other, mlp": (live_to_other, "mlp"),
    "live to other, conv2d": (live_to_other, "conv2d"),
    "live to other, embedding": (live_to_other, "embedding"),
    "base to first": (base_to_first, "conv2d"),
    "deactivation": (deactivation, "mlp"),
    "rollback": (rollback, "embedding"),
    "rolled back": (rolled_back, "embedding"),
    "resident to other": (resident_to_other, "mlp"),
    "without arena": (without_arena, "mlp"),
    "moved by the user": (moved_by_the_user, "embedding"),
}


# --- the run over all k ---------------------------------------------------------------------------------------------


def run_over_all_steps(make: Callable[[], Stage], injector: Injector) -> int:
    """Break off at each step, compare; at every seventh on a new stage, which must then swap. How many steps failed."""
    stage, k, failed = make(), 1, 0
    before = everything(stage.model, stage.swapper)
    while True:
        fault = injector(k)
        renewed = k % STRIDE == 1
        if renewed:
            stage = make()
            before = everything(stage.model, stage.swapper)
        try:
            with fault:
                stage.act()
        except (Fault, KeyboardInterrupt):
            pass
        if not fault.where:
            return failed
        failed += 1
        try:
            assert_nothing_changed(before, everything(stage.model, stage.swapper))
            if renewed:
                assert_swaps(stage)
        except Exception as error:
            raise AssertionError(f"after a fault at step {k}, {fault.where}: {error}") from error
        if renewed:
            stage = make()
            before = everything(stage.model, stage.swapper)
        k += 1 if k < EXHAUSTIVE else STRIDE


def assert_swaps(stage: Stage) -> None:
    """The next swap succeeds, and what comes out is what a fresh load gives."""
    stage.then()
    inputs = stage.entry.inputs()
    if stage.expected is None:
        expected = stage.entry.output(stage.entry.build(), inputs)
    else:
        expected = fresh_output(stage.entry, stage.expected)
    assert_same_output(stage.entry.output(stage.model, inputs), expected)


@injected
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_swap_that_breaks_off_changes_nothing(name: str, injector: Injector, folders: dict[str, Any]) -> None:
    make, entry = SCENARIOS[name]
    steps = run_over_all_steps(lambda: make(ZOO[entry], folders[entry]), injector)
    assert steps >= 3
