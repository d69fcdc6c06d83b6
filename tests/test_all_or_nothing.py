"""Contract 1: a swap that raises, at whatever step, leaves the model bit for bit as it was, and able to swap.

Two injectors break off a swap at its k-th step, for every k until it completes: one raises at the k-th line that runs
in hotslot's engine or live package, the other before, after or in the middle of the k-th ATen operation.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from peft.utils.hotswap import hotswap_adapter_from_state_dict as peft_hotswap_from_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hotslot
from adapters import make_adapter, random_peft_model
from hotslot.checkpoint import buffers
from hotslot.engine import Engine
from methods import make_method_adapter
from oracle import Snapshot, TensorFacts, assert_same_output, assert_unchanged, fresh, fresh_output, snapshot
from zoo import ZOO, Entry

SOURCES = Path(hotslot.__file__).parent
EXHAUSTIVE = 300  # up to so many steps each of them; above, a tenth of the first and last times that each line runs
RENEWED = 7  # after every seventh failure the next swap must succeed


# --- injectors ------------------------------------------------------------------------------------------------------


class Fault(Exception):
    """Raised by an injector."""


class LineFault:
    """Raises at the k-th line that runs in engine.py or live/*.py. `where` says at which."""

    def __init__(self, k: int, kind: type[BaseException]) -> None:
        self.k, self.kind, self.where = k, kind, ""
        self.steps: list[str] = []

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
            self.steps.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}")
            if len(self.steps) == self.k:  # Python stops tracing when a trace function raises: the undoing runs free
                self.where = self.steps[-1]
                raise self.kind(self.where)
        return self._line


@functools.cache
def _is_commit_code(filename: str) -> bool:
    path = Path(filename)
    return path.parent == SOURCES / "live" or path == SOURCES / "engine.py"


class OpFault(TorchDispatchMode):
    """Raises before the k-th ATen operation; or after it, when half of it is done if it is a `_foreach` operation."""

    def __init__(self, k: int, kind: type[BaseException], when: str) -> None:
        super().__init__()
        self.k, self.kind, self.when, self.where = k, kind, when, ""
        self.steps: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.steps.append(f"{self.when} {func}")
        if len(self.steps) != self.k:
            return func(*args, **(kwargs or {}))
        self.where = self.steps[-1]
        if self.when == "amid" and "_foreach" in self.where:
            half = [
                arg[: (len(arg) + 1) // 2] if isinstance(arg, list | tuple) else arg for arg in args
            ]  # one at least
            func(*half, **(kwargs or {}))
        elif self.when == "amid":
            func(*args, **(kwargs or {}))
        raise self.kind(self.where)


Injector = Callable[[int], Any]
INJECTORS: dict[str, Injector] = {
    "interrupted-at-a-line": lambda k: LineFault(k, KeyboardInterrupt),
    "failing-before-an-operation": lambda k: OpFault(k, Fault, "before"),
    "failing-amid-an-operation": lambda k: OpFault(k, Fault, "amid"),
}
injected = pytest.mark.parametrize("injector", INJECTORS.values(), ids=list(INJECTORS))


def chosen(steps: list[str]) -> list[int]:
    """Which steps to break off at: all, if they are few. Half-way through: operations that write."""
    numbers = list(range(1, len(steps) + 1))
    if steps[0].startswith("amid"):
        return [k for k in numbers if "_." in steps[k - 1]]
    if len(steps) <= EXHAUSTIVE:
        return numbers
    first = {steps[k - 1]: k for k in reversed(numbers)}
    last = {steps[k - 1]: k for k in numbers}
    return sorted({*first.values(), *last.values()})[::10]


Folders = dict[str, dict[str, Path]]


# --- what is compared -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Everything:
    """`oracle.snapshot`, and what it does not see: what would be saved, the config objects, the swapper's own word."""

    model: Snapshot
    saved: dict[str, bytes]
    rest: dict[str, Any]


def everything(stage: Stage) -> Everything:
    model = stage.model
    rest: dict[str, Any] = {"hooks": sum(len(m._state_dict_hooks) for m in model.modules())}
    rest["configs"] = {name: id(config) for name, config in (getattr(model, "peft_config", None) or {}).items()}
    swapper = hotslot.Swapper.of(model)
    rest["swapper"] = swapper and (swapper.active, swapper.version, swapper.adapters, swapper.host_bytes)
    hooked = {name: vars(module) for name, module in model.named_modules() if "_old_forward" in vars(module)}
    rest["offloading"] = {name: (id(of["_hf_hook"]), str(vars(of["_hf_hook"]))) for name, of in hooked.items()}
    shown = model.state_dict().items()
    saved = {key: value.detach().numpy().tobytes() for key, value in shown if not value.is_meta}
    facts = snapshot(model)
    if (
        stage.moved
    ):  # whoever moved the parameters gets them back in the slot's memory, whether the swap succeeds or not
        for name, fact in facts.facts.items():
            if isinstance(fact, TensorFacts):
                facts.facts[name] = replace(
                    fact, data_ptr=0, object_id=fact.object_id if "scaling" not in name else None
                )
    return Everything(facts, saved, rest)


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
    moved: bool = False  # whether the user has rebound the parameters' memory


Make = Callable[[Entry, dict[str, Path]], Stage]
Weights = str | dict[str, float]


FOLDERS = {
    "mlp": {
        "a": {"r": 4, "target_modules": ["up", "inner.2"], "lora_alpha": 6, "lora_bias": True},
        "b": {"r": 2, "target_modules": ["inner.0", "inner.2"], "use_rslora": True, "lora_dropout": 0.5},
        "same": {"r": 4, "target_modules": ["up", "inner.2"], "lora_alpha": 5, "lora_bias": True},
        "smaller": {"r": 2, "target_modules": ["up", "inner.2"], "lora_alpha": 5, "lora_bias": True},
        "larger": {"r": 7, "target_modules": ["up", "inner.2"], "rank_pattern": {"up": 3}, "lora_bias": True},
        "wide": {"r": 5, "target_modules": ["up", "inner.2", "down"], "rank_pattern": {"inner.2": 2}},
        "loha": {"method": "LOHA", "target_modules": ["up", "down"]},
        "ia3": {"method": "IA3", "target_modules": ["inner.0", "down"], "feedforward_modules": []},
    },
    "embedding": {
        "a": {"r": 3, "target_modules": ["word", "mix"], "lora_alpha": 5},
        "b": {"r": 2, "target_modules": ["word", "place"], "lora_alpha": 7},
        "head": {"r": 2, "target_modules": ["word"], "modules_to_save": ["head"]},
        "none": {"r": 2, "target_modules": ["word"]},
        "bias": {"r": 2, "target_modules": ["mix"], "bias": "all"},
        "mix": {"r": 2, "target_modules": ["mix"]},
        "tokens": {"r": 2, "target_modules": ["mix"], "trainable_token_indices": {"word": [3, 7, 9]}},
        "fewer": {"r": 2, "target_modules": ["mix"], "trainable_token_indices": {"word": [7]}},
    },
    "llama": {
        "copy": {"r": 2, "target_modules": ["q_proj", "embed_tokens"]},
        "none": {"r": 2, "target_modules": ["q_proj"]},
    },
    "conv2d": {
        "a": {"r": 4, "target_modules": ["grouped", "head"], "lora_alpha": 6},
        "b": {"r": 2, "target_modules": ["grouped", "point"], "lora_alpha": 5},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("adapters")
    made = {
        name: {
            key: (
                make_method_adapter(root / name / key, entry=ZOO[name], seed=i, **config)
                if "method" in config
                else make_adapter(root / name / key, ZOO[name], seed=i, **config)
            )
            for i, (key, config) in enumerate(configs.items())
        }
        for name, configs in FOLDERS.items()
    }
    file = made["llama"]["copy"] / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file({**load_file(file), name: torch.rand(48, 16)}, file)  # another embedding than the model's
    return made


def train(model: nn.Module) -> None:
    """Change every LoRA weight in place, as an optimizer does."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name or ".modules_to_save." in name or ".trainable_tokens_delta." in name:
                param.mul_(1.25)


def attached(entry: Entry, folders: dict[str, Path], model: nn.Module, *, fused: bool = False) -> hotslot.Swapper:
    return hotslot.attach(model, adapters={"a": folders["a"], "b": folders["b"]}, fused=fused)


def staged(entry: Entry, folders: dict[str, Path]) -> tuple[nn.Module, hotslot.Swapper]:
    model = entry.build()
    return model, attached(entry, folders, model)


def live_to_other(entry: Entry, folders: dict[str, Path]) -> Stage:
    """From a live adapter that was trained on to one of other targets and ranks."""
    model, swapper = staged(entry, folders)
    swapper.activate("a")
    train(model)
    return Stage(entry, model, lambda: swapper.activate("b"), lambda: swapper.activate("a"), folders["a"])


def base_to_first(entry: Entry, folders: dict[str, Path]) -> Stage:
    model, swapper = staged(entry, folders)
    return Stage(entry, model, lambda: swapper.activate("a"), lambda: swapper.activate("b"), folders["b"])


def deactivation(entry: Entry, folders: dict[str, Path]) -> Stage:
    model, swapper = staged(entry, folders)
    swapper.activate("a")
    return Stage(entry, model, swapper.deactivate, lambda: swapper.activate("b"), folders["b"])


def blending(first: Weights, second: Weights) -> Make:
    """Between an adapter and a blend, and between blends that differ in their weights alone."""

    def make(entry: Entry, folders: dict[str, Path]) -> Stage:
        model = entry.build()
        sources = {"a": folders["a"], "b": folders["b"]}
        swapper = hotslot.attach(model, sources, plan=hotslot.plan(model, sources))
        swapper.activate("b")
        swapper.activate(first)
        return Stage(entry, model, lambda: swapper.activate(second), lambda: swapper.activate("a"), folders["a"])

    return make


def rollback(entry: Entry, folders: dict[str, Path]) -> Stage:
    """Back to weights that were trained, and so are in no file."""
    model, swapper = staged(entry, folders)
    swapper.activate("a")
    train(model)
    swapper.activate("b")
    return Stage(entry, model, swapper.rollback, swapper.deactivate, None)


def rolled_back(entry: Entry, folders: dict[str, Path]) -> Stage:
    """From trained weights that a rollback has brought back."""
    model, swapper = staged(entry, folders)
    swapper.activate("a")
    train(model)
    swapper.activate("b")
    swapper.rollback()
    return Stage(entry, model, lambda: swapper.activate("b"), lambda: swapper.activate("a"), folders["a"])


def resident_to_other(entry: Entry, folders: dict[str, Path]) -> Stage:
    """From the adapter that came with a PEFT model, trained on, beside another adapter."""
    model = fresh(entry, folders["a"])
    model.load_adapter(str(folders["b"]), adapter_name="default_2")
    swapper = attached(entry, folders, model)
    train(model)
    return Stage(entry, model, lambda: swapper.activate("b"), lambda: swapper.activate("a"), folders["a"])


def saving(first: str, second: str, *, came_with: str | None = None) -> Make:
    """Between adapters of which one saves a whole module, trained on."""

    def make(entry: Entry, folders: dict[str, Path]) -> Stage:
        model = entry.build() if came_with is None else fresh(entry, folders[came_with])
        swapper = hotslot.attach(model, {name: folders[name] for name in (first, second)})
        swapper.activate(first)
        train(model)
        return Stage(entry, model, lambda: swapper.activate(second), lambda: swapper.activate(first), folders[first])

    return make


def merging(first: str, second: str) -> Make:
    """Between adapters of which one, or a part of it, is merged into the base weights."""

    def make(entry: Entry, folders: dict[str, Path]) -> Stage:
        model = entry.build()
        swapper = hotslot.attach(model, {"a": folders["a"]})
        for name in {first, second} - {"a"}:
            swapper.load(name, folders[name])
        swapper.activate(first)
        return Stage(entry, model, lambda: swapper.activate(second), lambda: swapper.activate(first), folders[first])

    return make


def attaching_with_a_head(entry: Entry, folders: dict[str, Path]) -> Stage:
    model = fresh(entry, folders["none"])
    attach = functools.partial(hotslot.attach, model, {"head": folders["head"]})
    return Stage(entry, model, attach, lambda: attach().activate("head"), folders["head"])


def attaching_with_tokens(came_with: str) -> Make:
    """New wrappers, or room for more tokens in that of the adapter which came with the model."""

    def make(entry: Entry, folders: dict[str, Path]) -> Stage:
        model = fresh(entry, folders[came_with])
        attach = functools.partial(hotslot.attach, model, {"tokens": folders["tokens"]})
        return Stage(entry, model, attach, lambda: attach().activate("tokens"), folders["tokens"])

    return make


def growing_by_tokens(planned: str) -> Make:
    def make(entry: Entry, folders: dict[str, Path]) -> Stage:
        model = entry.build()
        swapper = hotslot.attach(model, {planned: folders[planned]})
        swapper.activate(planned)
        train(model)
        plan = hotslot.plan(model, [folders["tokens"]])

        def swap() -> None:
            swapper.grow(plan)
            swapper.load("tokens", folders["tokens"])
            swapper.activate("tokens")

        return Stage(entry, model, lambda: swapper.grow(plan), swap, folders["tokens"])

    return make


def without_arena(entry: Entry, folders: dict[str, Path]) -> Stage:
    """On a model that was compiled before: no parameter may move, each is written where it is."""
    model = fresh(entry, folders["a"])
    swapper = hotslot.attach(
        torch.compile(model, backend="eager"), adapters={"smaller": folders["smaller"], "a": folders["a"]}
    )
    train(model)
    return Stage(entry, model, lambda: swapper.activate("smaller"), lambda: swapper.activate("a"), folders["a"])


def moved_by_the_user(entry: Entry, folders: dict[str, Path]) -> Stage:
    """After `model.double().float()` the parameters have other memory, which a swap puts right."""
    stage = live_to_other(entry, folders)
    stage.model.double().float()
    stage.moved = True
    return stage


def offloaded(entry: Entry, folders: dict[str, Path]) -> Stage:
    """While accelerate takes the base's weights away after each forward pass."""
    stage = live_to_other(entry, folders)
    cpu_offload(stage.model, torch.device("cpu"))
    entry.output(stage.model, entry.inputs())
    return stage


def drop_in(
    new: str, *, earlier: bool = False, target_rank: int | None = None
) -> Callable[[Entry, dict[str, Path]], Stage]:
    """`hotswap_adapter` on a PEFT model: the first call or a later one, prepared or not."""

    def make(entry: Entry, folders: dict[str, Path]) -> Stage:
        model = fresh(entry, folders["a"])
        if target_rank is not None:
            hotslot.prepare_model_for_compiled_hotswap(model, target_rank=target_rank, config=model.peft_config)
        if earlier:
            hotslot.hotswap_adapter(model, folders["same"], "default")
        train(model)
        swap = functools.partial(hotslot.hotswap_adapter, model, adapter_name="default")
        return Stage(entry, model, lambda: swap(folders[new]), lambda: swap(folders["a"]), folders["a"])

    return make


def drop_in_given(new: str, *, trained: bool) -> Make:
    """Between tensors in memory, of which those that are live were written over since."""

    def make(entry: Entry, folders: dict[str, Path]) -> Stage:
        model = fresh(entry, folders["a"])

        def given(name: str) -> dict[str, torch.Tensor]:
            tensors = load_file(folders[name] / "adapter_model.safetensors")
            return {re.sub(r"(lora_[AB])", r"\1.default", key): tensor for key, tensor in tensors.items()}

        def swap(name: str, tensors: dict[str, torch.Tensor]) -> None:
            config = LoraConfig.from_pretrained(str(folders[name]))
            hotslot.hotswap_adapter_from_state_dict(model, tensors, "default", config)

        for name in ("a", "same"):  # the first comes after what PEFT has written, the second after what hotslot has
            earlier = given(name)
            swap(name, earlier)
            for tensor in earlier.values():
                tensor.data.fill_(float("nan"))
        if trained:
            train(model)
        act = functools.partial(swap, new, given(new))
        return Stage(entry, model, act, lambda: swap("a", given("a")), folders["a"])

    return make


def attaching(came_with: str | None) -> Make:
    """`attach` itself, fused to a plain model, or to one that has a smaller adapter, whose parameters get padded."""

    def make(entry: Entry, folders: dict[str, Path]) -> Stage:
        model = entry.build() if came_with is None else fresh(entry, folders[came_with])
        attach = functools.partial(attached, entry, folders, model, fused=came_with is None)
        return Stage(entry, model, attach, lambda: attach().activate("b"), folders["b"])

    return make


def attaching_beside(entry: Entry, folders: dict[str, Path]) -> Stage:
    """Another slot, to a model with an adapter that is active, in PEFT's own models around it and in a head, too."""
    model = fresh(entry, folders["head"])
    attach = functools.partial(hotslot.attach, model, {"a": folders["a"]}, adapter_name="second")

    def swap() -> None:
        attach().activate("a")
        model.set_adapter("second", inference_mode=True)

    return Stage(entry, model, attach, swap, folders["a"])


def growing(came_with: str | None) -> Make:
    """More slots and larger ones, fused, under a live adapter that was trained on; on a PEFT model beside its own."""

    def make(entry: Entry, folders: dict[str, Path]) -> Stage:
        model = entry.build() if came_with is None else fresh(entry, folders[came_with])
        swapper = hotslot.attach(model, adapters={"b": folders["b"]}, fused=came_with is None)
        if came_with is None:
            swapper.activate("b")
        train(model)
        plan = hotslot.plan(model, [folders["a"]])

        def swap() -> None:
            swapper.grow(plan)
            swapper.load("a", folders["a"])
            swapper.activate("a")

        return Stage(entry, model, lambda: swapper.grow(plan), swap, folders["a"])

    return make


def preparing(entry: Entry, folders: dict[str, Path]) -> Stage:
    model = fresh(entry, folders["a"])
    act = functools.partial(hotslot.prepare_model_for_compiled_hotswap, model, target_rank=8, config=model.peft_config)
    return Stage(
        entry, model, act, lambda: hotslot.hotswap_adapter(model, folders["larger"], "default"), folders["larger"]
    )


Scenario = tuple[Make, str]
SWAPS: dict[str, Scenario] = {
    "from a trained adapter to another": (live_to_other, "mlp"),
    "in a grouped convolution": (live_to_other, "conv2d"),
    "from the base": (base_to_first, "embedding"),
    "deactivate": (deactivation, "mlp"),
    "rollback to trained weights": (rollback, "embedding"),
    "from rolled back weights": (rolled_back, "embedding"),
    "from the adapter that came with the model": (resident_to_other, "embedding"),
    "to a saved module": (saving("none", "head"), "embedding"),
    "from a saved module": (saving("head", "none"), "embedding"),
    "between saved modules": (saving("head", "none", came_with="head"), "embedding"),
    "to a merged adapter": (merging("a", "loha"), "mlp"),
    "from a merged adapter": (merging("loha", "a"), "mlp"),
    "between merged adapters": (merging("loha", "ia3"), "mlp"),
    "to an adapter that is merged in part": (merging("a", "wide"), "mlp"),
    "to a base bias": (saving("none", "bias"), "embedding"),
    "from a base bias": (saving("bias", "none"), "embedding"),
    "to another embedding": (saving("none", "copy"), "llama"),
    "from another embedding": (saving("copy", "none"), "llama"),
    "to tokens": (saving("mix", "tokens"), "embedding"),
    "from tokens": (saving("tokens", "mix"), "embedding"),
    "between tokens": (saving("tokens", "fewer", came_with="fewer"), "embedding"),
    "in a compiled model": (without_arena, "mlp"),
    "after the user moved the parameters": (moved_by_the_user, "embedding"),
    "under offloading": (offloaded, "mlp"),
    "to a blend": (blending("a", {"a": 0.7, "b": -1.0}), "mlp"),
    "from a blend": (blending({"a": 0.7, "b": -1.0}, "b"), "embedding"),
    "to other weights of a blend": (blending({"a": 0.7, "b": -1.0}, {"a": 0.7, "b": 0.5}), "conv2d"),
    "to another weight of one adapter": (blending({"a": 0.7}, {"a": -0.5}), "mlp"),
    "drop-in, same rank": (drop_in("same"), "mlp"),
    "drop-in, again": (drop_in("a", earlier=True), "mlp"),
    "drop-in, smaller rank": (drop_in("smaller"), "mlp"),
    "drop-in, growing rank": (drop_in("larger"), "mlp"),
    "drop-in, growing rank, again": (drop_in("larger", earlier=True), "mlp"),
    "drop-in, between tensors": (drop_in_given("a", trained=False), "mlp"),
    "drop-in, between tensors, trained": (drop_in_given("smaller", trained=True), "mlp"),
    "drop-in, prepared": (drop_in("larger", target_rank=8), "mlp"),
    "drop-in, growing beyond what was prepared": (drop_in("larger", target_rank=5), "mlp"),
}
PREPARATIONS: dict[str, Scenario] = {
    "attach to a plain model": (attaching(None), "embedding"),
    "attach to a grouped convolution": (attaching(None), "conv2d"),
    "attach to a PEFT model": (attaching("b"), "embedding"),
    "attach beside an active adapter": (attaching_beside, "embedding"),
    "attach with a head": (attaching_with_a_head, "embedding"),
    "attach beside tokens": (attaching_with_tokens("fewer"), "embedding"),
    "attach and wrap for tokens": (attaching_with_tokens("mix"), "embedding"),
    "prepare_model_for_compiled_hotswap": (preparing, "mlp"),
    "grow": (growing(None), "mlp"),
    "grow beside embeddings": (growing(None), "embedding"),
    "grow a PEFT model": (growing("b"), "conv2d"),
    "grow by a wrapper for tokens": (growing_by_tokens("mix"), "embedding"),
    "grow by places for tokens": (growing_by_tokens("fewer"), "embedding"),
}


# --- the run over all k ---------------------------------------------------------------------------------------------


def run_over_all_steps(make: Make, entry: Entry, folders: dict[str, Path], injector: Injector) -> None:
    """Break off at each step and compare; after every seventh the next swap must succeed."""
    for _ in range(2):  # the first time also imports and fills caches
        dry, stage = injector(0), make(entry, folders)
        assert attempt(stage.act, dry)
    steps = chosen(dry.steps)
    assert steps
    for i, k in enumerate(steps):
        if i % RENEWED == 0:
            stage = make(entry, folders)
            before = everything(stage)
        fault = injector(k)
        completed = attempt(stage.act, fault)
        if not fault.where:  # what an earlier attempt has prepared takes no steps: a new stage has all of them
            stage, fault = make(entry, folders), injector(k)
            before = everything(stage)
            completed = attempt(stage.act, fault)
        try:
            assert fault.where, f"only {len(fault.steps)} steps of {len(dry.steps)}"
            assert not completed, "the swap went on as if nothing had happened"
            assert_nothing_changed(before, everything(stage))
            if i % RENEWED == RENEWED - 1:
                assert_swaps(stage)
        except Exception as error:
            raise AssertionError(f"after a fault at step {k}, {fault.where or dry.steps[k - 1]}: {error}") from error


def attempt(act: Callable[[], object], fault: Any) -> bool:
    """Whether it went through."""
    buffers._kept.clear()  # memory that is at hand takes fewer steps than memory that is not
    try:
        with fault:
            act()
    except (Fault, KeyboardInterrupt):
        return False
    return True


def assert_swaps(stage: Stage) -> None:
    """The next swap succeeds, and what comes out is what a fresh load gives."""
    stage.then()
    inputs = stage.entry.inputs()
    expected = (
        fresh_output(stage.entry, stage.expected) if stage.expected else stage.entry.output(stage.entry.build(), inputs)
    )
    assert_same_output(stage.entry.output(stage.model, inputs), expected)


@injected
@pytest.mark.parametrize("name", SWAPS)
def test_a_swap_that_breaks_off_changes_nothing(name: str, injector: Injector, folders: Folders) -> None:
    make, entry = SWAPS[name]
    run_over_all_steps(make, ZOO[entry], folders[entry], injector)


@injected
@pytest.mark.parametrize("name", PREPARATIONS)
def test_a_preparation_that_breaks_off_changes_nothing(name: str, injector: Injector, folders: Folders) -> None:
    make, entry = PREPARATIONS[name]
    run_over_all_steps(make, ZOO[entry], folders[entry], injector)


@injected
@pytest.mark.parametrize("came_with", [None, "a", "beside"], ids=["plain-model", "peft-model", "beside-another"])
def test_a_detach_that_breaks_off_can_be_repeated(came_with: str | None, injector: Injector, folders: Folders) -> None:
    """It is no swap: what counts is that a second detach() finishes it, and leaves the model as it was."""
    entry, dry = ZOO["embedding"], injector(0)
    swapper, model, _ = attached_to(came_with, entry, folders)
    assert attempt(swapper.detach, dry)
    for k in chosen(dry.steps)[::3]:
        swapper, model, before = attached_to(came_with, entry, folders)
        fault = injector(k)
        assert not attempt(swapper.detach, fault)
        try:
            swapper.detach()
            assert_unchanged(before, snapshot(model))
            assert hotslot.Swapper.of(model) is None
        except Exception as error:
            raise AssertionError(f"after a fault at step {k}, {fault.where}: {error}") from error


def attached_to(came_with: str | None, entry: Entry, folders: Folders) -> tuple[hotslot.Swapper, nn.Module, Snapshot]:
    """A swapper with another adapter live, fused on a plain model; its model, and what that was before."""
    if came_with == "beside":
        model = fresh(entry, folders[entry.name]["head"])
        before = snapshot(model)
        swapper = hotslot.attach(model, {"b": folders[entry.name]["b"]}, adapter_name="second")
        swapper.activate("b")
        return swapper, model, before
    model = entry.build() if came_with is None else fresh(entry, folders[entry.name][came_with])
    before = snapshot(model)
    swapper = attached(entry, folders[entry.name], model, fused=came_with is None)
    swapper.activate("b")
    return swapper, model, before


# --- controls: the tests above notice a writer that breaks off half-way ---------------------------------------------


def test_control_peft_leaves_a_swap_half_done(folders: Folders) -> None:
    tensors = random_peft_model(ZOO["mlp"], seed=2, **FOLDERS["mlp"]["same"]).state_dict()
    tensors = {key: value for key, value in tensors.items() if "lora_" in key}

    def make(entry: Entry, folders: dict[str, Path]) -> Stage:
        model = fresh(entry, folders["a"])
        swap = functools.partial(
            peft_hotswap_from_state_dict,
            model,
            tensors,
            adapter_name="default",
            config=LoraConfig(**FOLDERS["mlp"]["same"]),
        )
        return Stage(entry, model, swap, swap, folders["same"])

    with pytest.raises(AssertionError, match="facts changed"):
        run_over_all_steps(make, ZOO["mlp"], folders["mlp"], INJECTORS["failing-before-an-operation"])


@injected
def test_control_an_engine_that_does_not_undo(
    injector: Injector, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Engine._write
    handled_already = sys.exc_info()[1]  # what ran before in this process may have left one

    def write_unless_undoing(self: Engine, *args: Any, **options: Any) -> int:
        undoing = sys.exc_info()[1] is not handled_already
        return 0 if undoing else write(self, *args, **options)

    monkeypatch.setattr(Engine, "_write", write_unless_undoing)
    with pytest.raises(AssertionError, match="facts changed"):
        run_over_all_steps(live_to_other, ZOO["mlp"], folders["mlp"], injector)


def test_control_faults_come_at_every_step(folders: Folders) -> None:
    """The injectors do reach the code that writes, the code that records, and each write."""
    steps: list[str] = []
    for make in INJECTORS.values():
        fault = make(0)
        assert attempt(live_to_other(ZOO["conv2d"], folders["conv2d"]).act, fault)
        steps += fault.steps
    assert {"engine.py", "memory.py", "state.py"} <= {step.partition(":")[0] for step in steps}
    for op in ("clone.default", "_foreach_zero_.default", "_foreach_copy_.default"):
        assert {f"{when} aten.{op}" for when in ("before", "amid")} <= set(steps)
