"""`attach(exclusive=True)`: what is done to all slots is found; what is done to single ones may be passed over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hotslot
from adapters import make_adapter
from oracle import assert_same_output, fresh_output
from zoo import ZOO

ENTRY = ZOO["mlp"]
LAYERS, WIDTH = 40, 8
both = pytest.mark.parametrize("exclusive", [True, False])


def _deep(exclusive: bool) -> tuple[nn.Module, hotslot.Swapper]:
    """A model of more slots than a sample, with two adapters."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    targets = [str(i) for i in range(LAYERS)]
    plan = hotslot.plan(model, target_modules=targets, max_rank=2)
    swapper = hotslot.attach(model, plan=plan, exclusive=exclusive)
    for seed, name in enumerate("ab", 1):
        draw = torch.Generator().manual_seed(seed)
        tensors = {
            f"base_model.model.{target}.lora_{part}.weight": torch.randn(shape, generator=draw)
            for target in targets
            for part, shape in {"A": (2, WIDTH), "B": (WIDTH, 2)}.items()
        }
        swapper.load(name, tensors, config={"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": targets})
    return model, swapper


def _params(model: nn.Module) -> list[nn.Parameter]:
    return [param for name, param in model.named_parameters() if "lora_" in name]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    options: dict[str, dict[str, Any]] = {
        "dense": {"r": 4, "target_modules": list(ENTRY.targets)},
        "small": {"r": 1, "lora_alpha": 3, "target_modules": ["up"]},
    }
    return {
        name: make_adapter(tmp_path / name, ENTRY, seed=seed, **option)
        for seed, (name, option) in enumerate(options.items())
    }


def test_swaps_are_those_of_fresh_loads(folders: dict[str, Path]) -> None:
    swapper = hotslot.attach(model := ENTRY.build(), folders, exclusive=True)
    for name in ("dense", "small", "dense", None, "small"):
        if name is None:
            swapper.deactivate()
            want = ENTRY.output(ENTRY.build(), ENTRY.inputs())
        else:
            swapper.activate(name)
            want = fresh_output(ENTRY, folders[name])
        assert_same_output(ENTRY.output(model, ENTRY.inputs()), want)


def _to_double(model: nn.Module) -> None:
    model.double()


def _rebind(model: nn.Module) -> None:
    for param in _params(model):
        param.data = param.data.clone()


def _step(model: nn.Module) -> None:
    with torch.no_grad():
        for param in _params(model):
            param.add_(1.0)


def _load_state_dict(model: nn.Module) -> None:
    model.load_state_dict({key: torch.zeros_like(value) for key, value in model.state_dict().items()})


@pytest.mark.parametrize("change", [_to_double, _rebind, _step, _load_state_dict], ids=lambda change: change.__name__)
def test_what_is_done_to_all_is_found(change: Callable[[nn.Module], None]) -> None:
    model, swapper = _deep(exclusive=True)
    swapper.activate("a")
    change(model)
    changed = [param.detach().clone() for param in _params(model)]
    dtype = next(model.parameters()).dtype
    assert swapper.activate("b").changed
    again, other = _deep(exclusive=False)
    other.activate("b")
    for got, want in zip(_params(model), _params(again), strict=True):
        assert torch.equal(got, want.to(dtype))
    swapper.rollback()
    assert all(map(torch.equal, _params(model), changed)), "what was changed is there again"


def test_an_adapter_that_was_deleted_is_refused() -> None:
    from peft.tuners.lora import LoraLayer

    model, swapper = _deep(exclusive=True)
    swapper.activate("a")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.delete_adapter("default")
    with pytest.raises(hotslot.errors.ModelError, match="was deleted from the model"):
        swapper.activate("b")


@both
def test_only_some_slots_are_looked_at(exclusive: bool) -> None:
    """The control: without it, a single parameter of each that somebody moves is put right."""
    looks = [0, 17, 18, 19, 50]  # of 40 layers every third is looked at, and both its matrices
    missed = []
    for i in looks:
        model, swapper = _deep(exclusive)
        swapper.activate("a")
        param = _params(model)[i]
        param.data = torch.zeros_like(param)
        swapper.activate("b")
        missed.append(not param.any())
    assert missed == ([False, True, False, False, True] if exclusive else [False] * 5)


def test_each_component_of_a_pipeline_is_looked_at() -> None:
    """Components may be moved one by one, and the last one may have few slots."""
    from hotslot.live.traces import sample

    slots: Any = {**{f"unet.{i}": i for i in range(200)}, **{f"text_encoder.{i}": i for i in range(3)}}
    taken = sample(slots)
    assert len(taken) < 20
    assert {fqn.partition(".")[0] for fqn in taken} == {"unet", "text_encoder"}


@both
def test_a_backward_pass_over_a_swap_raises(exclusive: bool) -> None:
    """Counters are those of all parts, looked at or not."""
    model, swapper = _deep(exclusive)
    swapper.activate("a")
    out = model(torch.randn(2, WIDTH, requires_grad=True)).sum()
    swapper.activate("b")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def _counters(params: list[nn.Parameter]) -> int:
    """How many version counters they have."""
    left, count = list(params), 0
    while left:
        before = [param._version for param in left]
        torch.autograd.graph.increment_version(left[0])
        left = [param for param, version in zip(left, before, strict=True) if param._version == version]
        count += 1
    return count


@both
def test_one_write_counts_for_all(exclusive: bool) -> None:
    """The control: else each parameter has a counter of its own, and a swap counts up each."""
    model, swapper = _deep(exclusive)
    params = _params(model)
    assert _counters(params) == (1 if exclusive else len(params))
    swapper.activate("a")
    assert swapper.activate("b").changed
    assert not swapper.activate("b").changed, "what hotslot has counted is no trace of others"
    with torch.no_grad():
        params[2].add_(1.0)  # a write, to whichever, counts for all
    assert swapper.activate("b").changed


def test_detach_gives_each_its_own_counter_again() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(ENTRY.build(), LoraConfig(r=2, target_modules=["up", "down"], inference_mode=True))
    params = _params(model)
    values = [param.detach().clone() for param in params]
    swapper = hotslot.attach(model, exclusive=True)
    assert _counters(params) == 1
    swapper.detach()
    assert list(map(id, _params(model))) == list(map(id, params))
    assert _counters(params) == len(params)
    assert all(map(torch.equal, params, values))


def test_parameters_in_training_keep_their_counters(folders: dict[str, Path]) -> None:
    """An optimizer that steps within the backward pass goes on working; so does what swaps do."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(ENTRY.build(), LoraConfig(r=4, target_modules=list(ENTRY.targets)))
    swapper = hotslot.attach(model, folders, exclusive=True)
    params = _params(model)
    assert _counters(params) == len(params)
    swapper.activate("dense")
    for param in params:
        optimizer = torch.optim.SGD([param], lr=0.1)
        param.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())  # type: ignore[misc]
    ENTRY.read(model(**ENTRY.inputs())).sum().backward()
    assert swapper.activate("dense").changed
    assert_same_output(ENTRY.output(model, ENTRY.inputs()), fresh_output(ENTRY, folders["dense"]))


def test_compiled_code_stays(folders: dict[str, Path]) -> None:
    swapper = hotslot.attach(model := ENTRY.build(), folders, exclusive=True)
    compiled: Any = torch.compile(model, backend="eager")
    swapper.activate("dense")
    ENTRY.output(compiled, ENTRY.inputs())
    with hotslot.testing.no_recompile(), hotslot.testing.same_addresses(model):
        for name in ("small", "dense"):
            swapper.activate(name)
            assert_same_output(ENTRY.output(compiled, ENTRY.inputs()), fresh_output(ENTRY, folders[name]))
    params = _params(model)
    model.double()
    swapper.activate("small")  # into other memory, beside compiled code's weak references
    inputs = ENTRY.inputs(dtype=torch.float64)
    assert_same_output(ENTRY.output(model, inputs), fresh_output(ENTRY, folders["small"], dtype=torch.float64))
    assert list(map(id, _params(model))) == list(map(id, params))
    before = [param._version for param in params]
    swapper.activate("dense")
    assert all(param._version > version for param, version in zip(params, before, strict=True))
