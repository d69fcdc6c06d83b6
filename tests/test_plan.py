"""Plans: what they hold and say, that `attach` carries them out, and that a model grows into a larger one."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import hotslot
from adapters import expected_peft_warnings, make_adapter, random_config
from compiling import WAYS, Backend
from hotslot import errors
from oracle import assert_same_output, assert_unchanged, fresh, fresh_output, snapshot
from zoo import ZOO

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """(entry's name, seed, config) → an adapter on disk."""

    def make(name: str, seed: int, **config: Any) -> Path:
        return make_adapter(tmp_path / f"{name}-{seed}", ZOO[name], seed=seed, **config)

    return make


# --- what a plan holds ----------------------------------------------------------------------------------------------


def test_room_for_blends_is_the_sum_of_the_largest_ranks(make: Make) -> None:
    sources = {
        "a": make("mlp", 0, r=4, target_modules=["up", "down"], rank_pattern={"down": 6}),
        "b": make("mlp", 1, r=3, target_modules=["up", "inner.0"]),
        "c": make("mlp", 2, r=2, target_modules=["up"]),
    }
    model = ZOO["mlp"].build()
    assert hotslot.plan(model, sources).ranks == {"up": 7, "down": 6, "inner.0": 3}
    assert hotslot.plan(model, sources.values(), max_blend=1).ranks == {"up": 4, "down": 6, "inner.0": 3}
    assert hotslot.plan(model, sources, max_blend=3).ranks == {"up": 9, "down": 6, "inner.0": 3}
    assert hotslot.plan(model, sources, max_rank=8).ranks == {"up": 8, "down": 8, "inner.0": 8}
    assert hotslot.plan(model, sources["a"]).ranks == {"up": 4, "down": 6}  # nothing to blend it with
    more = hotslot.plan(model, sources, max_rank=8, target_modules=["inner.2"])
    assert more.ranks == {"up": 8, "down": 8, "inner.0": 8, "inner.2": 8}


def test_plans_add_up(make: Make) -> None:
    a, b, c = (
        make("mlp", i, r=r, target_modules=t) for i, (r, t) in enumerate([(4, ["up"]), (3, ["up"]), (2, "down")])
    )
    model = ZOO["mlp"].build()
    first, second = hotslot.plan(model, [a]), hotslot.plan(model, [b, c])
    assert (first | second) == hotslot.plan(model, [a, b, c])
    assert (first | first) == first, "an adapter is planned for once"
    assert (hotslot.plan(model, [a, b]) | hotslot.plan(model, [b])).ranks == {"up": 7}
    fixed = hotslot.plan(model, target_modules=["up"], max_rank=5)
    assert (fixed | first).ranks == {"up": 5}
    assert (fixed | hotslot.plan(model, [a, b])).ranks == {"up": 7}
    with pytest.raises(errors.ModelError, match="different models"):
        first | hotslot.plan(nn.ModuleDict({"up": nn.Linear(3, 4)}), target_modules=["up"], max_rank=2)


def test_a_plan_cannot_be_changed(make: Make) -> None:
    plan = hotslot.plan(ZOO["mlp"].build(), [make("mlp", 0, r=4, target_modules=["up"])])
    with pytest.raises(AttributeError):
        plan.max_blend = 3
    with pytest.raises(TypeError):
        plan.slots["up"] = plan.slots["up"]


def test_a_plan_is_printed_by_patterns() -> None:
    plan = hotslot.plan(ZOO["llama"].build(), target_modules="all-linear", max_rank=16)
    assert repr(plan) == f"<Plan of 21 slots, {plan.nbytes:,} bytes of float32, room for rank 16>"
    head, titles, *rows = str(plan).splitlines()
    assert head == repr(plan)[1:-1]
    assert titles.split() == ["modules", "slots", "rank", "dtype", "bytes"]
    assert len(rows) == 7
    assert "model.layers.*.self_attn.q_proj" in str(plan)
    by_row = [row.split() for row in rows]
    assert all(row[1:4] == ["3", "16", "float32"] for row in by_row)
    assert sum(int(row[4].replace(",", "")) for row in by_row) == plan.nbytes
    assert len({len(line) for line in [titles, *rows]}) == 1


# --- target_modules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_target_modules_match_as_peft_matches_them(name: str) -> None:
    """Drawn as adapters are: what PEFT would wrap is what the plan has."""
    rng, entry = Random(5), ZOO[name]
    for _ in range(12):
        config = random_config(rng, entry)
        config = {"r": 2, "target_modules": config["target_modules"]}
        with expected_peft_warnings():
            wrapped = get_peft_model(entry.build(), LoraConfig(**config))
        expected = set(hotslot.attach(wrapped).plan.slots)
        plan = hotslot.plan(entry.build(), target_modules=config["target_modules"], max_rank=2)
        assert set(plan.slots) == expected
        assert set(hotslot.plan(wrapped, target_modules=config["target_modules"], max_rank=2).slots) == expected


def test_all_linear_leaves_the_head_out() -> None:
    model = ZOO["llama"].build()
    plan = hotslot.plan(model, target_modules="all-linear", max_rank=4)
    assert not [fqn for fqn in plan.slots if "head" in fqn or "embed" in fqn]
    compiled = WAYS["torch.compile(layer) each"](model, Backend())
    assert hotslot.plan(compiled, target_modules="all-linear", max_rank=4) == plan


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"target_modules": ["nowhere"], "max_rank": 4}, errors.UnexpectedTargetError, "matches no module"),
        ({"target_modules": "(", "max_rank": 4}, ValueError, "no regular expression"),
        ({"target_modules": ["up"]}, ValueError, "give max_rank="),
        ({"target_modules": ["inner"], "max_rank": 4}, errors.UnsupportedError, "does not adapt"),
        ({}, errors.ModelError, "nothing to plan"),
        ({"target_modules": ["up"], "max_rank": 0}, ValueError, "max_rank must be"),
        ({"target_modules": ["up"], "max_rank": 4, "max_blend": 0}, ValueError, "max_blend must be"),
        ({"target_modules": ["up"], "max_rank": 4, "dtype": torch.int8}, ValueError, "dtype must be"),
        ({"target_modules": ["up"], "max_rank": 4, "dtype": "float32"}, ValueError, "dtype must be"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        hotslot.plan(ZOO["mlp"].build(), **options)


def test_an_adapter_that_does_not_fit_is_refused_by_the_plan(make: Make) -> None:
    folder = make("mlp", 0, r=4, target_modules=["up"])
    with pytest.raises(errors.RankError):
        hotslot.plan(ZOO["mlp"].build(), folder, max_rank=3)
    with pytest.raises(errors.UnexpectedTargetError):
        hotslot.plan(ZOO["embedding"].build(), folder)
    with pytest.raises(errors.ShapeError):
        hotslot.plan(nn.ModuleDict({"up": nn.Linear(3, 4)}), folder)


def test_ranks_of_a_grouped_convolution_are_multiples_of_its_groups() -> None:
    plan = hotslot.plan(ZOO["conv2d"].build(), target_modules=["grouped", "point"], max_rank=5)
    assert plan.ranks == {"grouped": 6, "point": 5}


# --- attach with a plan ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_adapters_load_into_a_plan_made_without_them(name: str, make: Make) -> None:
    entry = ZOO[name]
    config: dict[str, Any] = {"r": 2, "lora_alpha": 5, "target_modules": list(entry.targets)}
    folder = make(name, 0, **config)
    model = entry.build()
    before = snapshot(model)
    plan = hotslot.plan(model, target_modules=config["target_modules"], max_rank=6)
    assert_unchanged(before, snapshot(model))
    swapper = hotslot.attach(model, plan=plan)
    assert swapper.plan == plan
    swapper.load("a", folder)
    swapper.activate("a")
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, folder))
    swapper.detach()
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("dtype", [None, "base", torch.float32, torch.bfloat16])
def test_the_slots_have_the_planned_dtype(dtype: Any, make: Make) -> None:
    entry = ZOO["llama"]
    folder = make("llama", 0, r=4, target_modules=["q_proj", "embed_tokens", "down_proj"])
    model = entry.build(dtype=torch.bfloat16)
    plan = hotslot.plan(model, [folder], dtype=dtype)
    swapper = hotslot.attach(model, {"a": folder}, plan=plan)
    swapper.activate("a")
    cast = dtype in (None, torch.float32)
    oracle = fresh(entry, folder, dtype=torch.bfloat16, autocast_adapter_dtype=cast)
    expected = {param.dtype for name, param in oracle.named_parameters() if "lora_" in name}
    assert {slot.dtype for slot in plan.slots.values()} == expected
    assert {param.dtype for name, param in model.named_parameters() if "lora_" in name} == expected
    inputs = entry.inputs(dtype=torch.bfloat16)
    assert_same_output(entry.output(model, inputs), entry.output(oracle, inputs), exact=True)


def test_a_plan_for_another_model_is_refused(make: Make) -> None:
    plan = hotslot.plan(ZOO["mlp"].build(), target_modules=["up"], max_rank=4)
    other = nn.ModuleDict({"up": nn.Linear(3, 4)})
    for model in (other, ZOO["embedding"].build(), get_peft_model(other, LoraConfig(target_modules=["up"]))):
        before = snapshot(model)
        with pytest.raises(errors.ModelError, match="another model"):
            hotslot.attach(model, plan=plan)
        assert_unchanged(before, snapshot(model))


def test_an_adapter_beyond_the_plan_is_refused_by_attach(make: Make) -> None:
    model = ZOO["mlp"].build()
    before = snapshot(model)
    plan = hotslot.plan(model, target_modules=["up"], max_rank=3)
    with pytest.raises(errors.RankError):
        hotslot.attach(model, {"a": make("mlp", 0, r=4, target_modules=["up"])}, plan=plan, route="side")
    with pytest.raises(errors.UnexpectedTargetError):
        hotslot.attach(model, {"a": make("mlp", 1, r=2, target_modules=["down"])}, plan=plan, route="side")
    assert_unchanged(before, snapshot(model))


def test_on_a_compiled_peft_model_a_larger_plan_is_refused_and_can_be_grown_into(make: Make) -> None:
    small, large = make("mlp", 0, r=2, target_modules=["up"]), make("mlp", 1, r=5, target_modules=["up"])
    model = fresh(ZOO["mlp"], small)
    compiled = torch.compile(model, backend="eager")
    plan = hotslot.plan(model, [large])
    with pytest.raises(errors.ModelError, match="compiled already"):
        hotslot.attach(compiled, plan=plan)
    swapper = hotslot.attach(compiled)
    swapper.grow(plan)
    swapper.load("large", large)
    swapper.activate("large")
    assert_same_output(ZOO["mlp"].output(compiled, ZOO["mlp"].inputs()), fresh_output(ZOO["mlp"], large))


# --- grow -----------------------------------------------------------------------------------------------------------


def test_what_is_beyond_the_plan_is_refused_with_the_plan_that_takes_it(make: Make) -> None:
    a, b = (
        make("mlp", 0, r=2, target_modules=["up"]),
        make("mlp", 1, r=4, target_modules=["up", "down"], lora_bias=True),
    )
    model = ZOO["mlp"].build()
    swapper = hotslot.attach(model, {"a": a}, route="side")
    before = snapshot(model)
    fit = swapper.fits(b)
    assert not fit
    assert fit.plan.ranks == {"up": 4, "down": 4}
    with pytest.raises(errors.UnexpectedTargetError, match=r"swapper\.grow\(error\.plan\)") as caught:
        swapper.load("b", b)
    assert caught.value.plan == fit.plan
    assert_unchanged(before, snapshot(model))
    swapper.grow(caught.value.plan)
    assert swapper.plan == fit.plan
    assert swapper.fits(b)
    swapper.load("b", b)
    for name, folder in (("b", b), ("a", a)):
        swapper.activate(name)
        assert_same_output(ZOO["mlp"].output(model, ZOO["mlp"].inputs()), fresh_output(ZOO["mlp"], folder))


def test_what_no_plan_takes_has_none(make: Make) -> None:
    model = ZOO["mlp"].build()
    swapper = hotslot.attach(model, {"a": make("mlp", 0, r=2, target_modules=["up"])})
    other = make("embedding", 1, r=2, target_modules=["mix"])
    assert swapper.fits(other).plan is None
    with pytest.raises(errors.UnexpectedTargetError, match="does not have") as caught:
        swapper.load("b", other)
    assert caught.value.plan is None


@pytest.mark.parametrize("came_with", ["plain", "peft", "peft, other active"])
@pytest.mark.parametrize("name", ZOO)
def test_grown_models_compute_what_fresh_loads_do(name: str, came_with: str, tmp_path: Path) -> None:
    """Random pairs: attached with the first, grown by the second; live values stay, undone by detach to the bit."""
    if (name, came_with) == ("attention", "peft, other active"):
        pytest.skip("PEFT's own MultiheadAttention cannot run with two adapters")
    rng, entry = Random(11), ZOO[name]
    inputs = entry.inputs()
    for i in range(3):
        first, second = (
            make_adapter(tmp_path / f"{i}-{j}", entry, seed=10 * i + j, **random_config(rng, entry)) for j in range(2)
        )
        model: Any = entry.build() if came_with == "plain" else fresh(entry, first)
        if came_with == "peft, other active":
            with expected_peft_warnings():
                model.add_adapter("other", LoraConfig(r=2, target_modules=[entry.targets[0]], init_lora_weights=False))
                model.base_model.set_adapter(["default", "other"])
            model.eval()
        start = entry.output(model, inputs)
        before = snapshot(model)  # after the first forward: PEFT's own on a MultiheadAttention changes the base weights
        swapper = hotslot.attach(model, {"first": first})
        if came_with == "plain":
            swapper.activate("first")
        swapper.activate("first")
        params = {id(param) for param in model.parameters()}
        swapper.grow(hotslot.plan(model, [second], max_rank=rng.choice((None, 8))))
        assert params <= {id(param) for param in model.parameters()}
        assert swapper.active == "first"
        if came_with != "peft, other active":
            assert_same_output(entry.output(model, inputs), fresh_output(entry, first))
            assert not swapper.activate("first").changed
            swapper.load("second", second)
            swapper.activate("second")
            assert_same_output(entry.output(model, inputs), fresh_output(entry, second))
            swapper.rollback()
            assert_same_output(entry.output(model, inputs), fresh_output(entry, first))
        swapper.detach()
        assert_unchanged(before, snapshot(model))
        assert_same_output(entry.output(model, inputs), start)


def train(model: nn.Module) -> None:
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.mul_(1.25)


def test_trained_weights_survive_growing_and_what_was_before_can_be_rolled_back_to(make: Make) -> None:
    entry = ZOO["mlp"]
    a, b = make("mlp", 0, r=2, target_modules=["up"]), make("mlp", 1, r=4, target_modules=["down", "up"])
    model = entry.build()
    swapper = hotslot.attach(model, {"a": a})
    base = entry.output(model, entry.inputs())
    swapper.activate("a")
    train(model)
    trained = entry.output(model, entry.inputs())
    swapper.deactivate()
    swapper.grow(hotslot.plan(model, [b]))
    assert_same_output(entry.output(model, entry.inputs()), base)
    swapper.rollback()
    assert_same_output(entry.output(model, entry.inputs()), trained)
    swapper.load("b", b)
    swapper.activate("b")
    swapper.rollback()
    assert_same_output(entry.output(model, entry.inputs()), trained)
    swapper.deactivate()
    assert_same_output(entry.output(model, entry.inputs()), base)


def test_a_rollback_to_what_was_merged_before_growing_is_in_the_new_slots_and_said_to_be(make: Make) -> None:
    """The records of before said that nothing was in them: so the next swap left what was beyond its own rank."""
    entry = ZOO["mlp"]
    large, small = make("mlp", 0, r=8, target_modules=["up"]), make("mlp", 1, r=2, target_modules=["up"])
    model = entry.build()
    swapper = hotslot.attach(model, {"small": small})
    swapper.load("large", large)
    assert swapper.activate("large").route == "merged"
    swapper.deactivate()
    swapper.grow(hotslot.plan(model, large))
    assert swapper.rollback().route == "side"
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, large))
    assert model.get_submodule("up").r["default"] == 8
    swapper.activate("small")
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, small))


def test_the_grown_model_is_saved_as_what_is_live(make: Make, tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    a, b = make("mlp", 0, r=2, target_modules=["up"]), make("mlp", 1, r=4, target_modules=["down", "up"])
    model = fresh(entry, a)
    swapper = hotslot.attach(model, {"a": a})
    swapper.activate("a")
    swapper.grow(hotslot.plan(model, [b]))
    model.save_pretrained(tmp_path / "saved-a")
    swapper.load("b", b)
    swapper.activate("b")
    model.save_pretrained(tmp_path / "saved-b")
    for folder, saved in ((a, "saved-a"), (b, "saved-b")):
        assert_same_output(
            entry.output(PeftModel.from_pretrained(entry.build(), tmp_path / saved).eval(), entry.inputs()),
            fresh_output(entry, folder),
            exact=True,
        )


def test_growing_into_what_is_there_does_nothing(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    a = make("mlp", 0, r=2, target_modules=["up"])
    model = ZOO["mlp"].build()
    swapper = hotslot.attach(model, {"a": a})
    swapper.activate("a")
    before = snapshot(model)
    swapper.grow(hotslot.plan(model, [a]))
    swapper.grow(swapper.plan)
    assert_unchanged(before, snapshot(model))
    assert not caplog.records


def test_a_model_in_training_is_not_grown(make: Make) -> None:
    a, b = make("mlp", 0, r=2, target_modules=["up"]), make("mlp", 1, r=4, target_modules=["down", "up"])
    model = fresh(ZOO["mlp"], a)
    model.train()
    for name, param in model.named_parameters():
        param.requires_grad_("lora_" in name)
    swapper = hotslot.attach(model)
    model(**ZOO["mlp"].inputs()).sum().backward()
    before = snapshot(model)
    with pytest.raises(errors.ModelError, match="in training"):
        swapper.grow(hotslot.plan(model, [b]))
    assert_unchanged(before, snapshot(model))
    assert set(swapper.plan.slots) == {"up"}


def test_a_merged_model_is_not_grown(make: Make) -> None:
    a, b = make("mlp", 0, r=2, target_modules=["up"]), make("mlp", 1, r=4, target_modules=["down", "up"])
    model = fresh(ZOO["mlp"], a)
    swapper = hotslot.attach(model)
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(errors.MergedError):
        swapper.grow(hotslot.plan(ZOO["mlp"].build(), [b]))
    assert_unchanged(before, snapshot(model))


def test_a_plan_for_another_model_is_not_grown_into(make: Make) -> None:
    model = ZOO["mlp"].build()
    swapper = hotslot.attach(model, {"a": make("mlp", 0, r=2, target_modules=["up"])})
    before = snapshot(model)
    with pytest.raises(errors.ModelError, match="another model"):
        swapper.grow(hotslot.plan(ZOO["embedding"].build(), target_modules=["mix"], max_rank=2))
    assert_unchanged(before, snapshot(model))


# --- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attached", ["before", "after"])
@pytest.mark.parametrize("way", [way for way in WAYS if "each" not in way])
def test_a_compiled_model_compiles_once_more_and_then_no_more(
    way: str, attached: str, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    entry = ZOO["llama"]
    a = make("llama", 0, r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"])
    b = make("llama", 1, r=4, lora_alpha=7, target_modules=["q_proj", "up_proj"], use_rslora=True)
    model, backend, inputs = entry.build() if attached == "before" else fresh(entry, a), Backend(), entry.inputs()
    if attached == "before":
        swapper = hotslot.attach(model, {"a": a})
        call = WAYS[way](model, backend)
    else:
        call = WAYS[way](model, backend)
        swapper = hotslot.attach(call, {"a": a})
    swapper.activate("a")
    for _ in range(2):
        assert_same_output(entry.output(call, inputs), fresh_output(entry, a))
    compiled_before = backend.graphs
    with caplog.at_level(logging.WARNING):
        swapper.grow(hotslot.plan(model, [a, b], max_blend=1))
    assert re.search(r"3 slots added and \d+ made larger, 9 slots .*compiles once more", caplog.text)
    assert_same_output(entry.output(call, inputs), fresh_output(entry, a))
    swapper.load("b", b)
    swapper.activate("b")
    assert_same_output(entry.output(call, inputs), fresh_output(entry, b))
    once = backend.graphs
    assert once > compiled_before, "the control: growing does recompile"
    if attached == "before":
        assert once == compiled_before + 1
    for name, folder in (("a", a), ("b", b), ("a", a)):
        swapper.activate(name)
        assert_same_output(entry.output(call, inputs), fresh_output(entry, folder))
    swapper.deactivate()
    assert_same_output(entry.output(call, inputs), entry.output(entry.build(), inputs))
    if attached == "before":
        assert backend.graphs == once


def test_swaps_within_a_plan_compile_nothing(make: Make) -> None:
    """Planned without adapters: they come, of other ranks, alphas and targets, after the model was compiled."""
    entry = ZOO["llama"]
    model, backend, inputs = entry.build(), Backend(), entry.inputs()
    swapper = hotslot.attach(model, plan=hotslot.plan(model, target_modules="all-linear", max_rank=8))
    call = torch.compile(model, backend=backend, fullgraph=True)
    entry.output(call, inputs)
    for i, (rank, target) in enumerate([(2, ["q_proj"]), (8, "all-linear"), (3, ["up_proj", "down_proj"])]):
        folder = make("llama", i, r=rank, lora_alpha=i + 1, target_modules=target, task_type="CAUSAL_LM")
        swapper.load(str(i), folder)
        swapper.activate(str(i))
        assert_same_output(entry.output(call, inputs), fresh_output(entry, folder))
    assert backend.graphs == 1
