"""Several slots of one model: none passes another over, whichever came first, and whichever goes first.

The oracle is PEFT's own model with all of the adapters loaded, and activated by `base_model.set_adapter([…])`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import hotslot
from adapters import expected_peft_warnings, make_adapter
from compiling import Backend
from hotslot.errors import MergedError, UnsupportedError
from hotslot.testing import no_recompile
from oracle import assert_same_output, assert_unchanged, differences, error, fresh, snapshot
from pipelines import PIPELINES, Kind, load_plain, make_lora
from zoo import ZOO, Entry

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
# The second has a layer that the first has not, and the other way round; the third has layers of its own.
TARGETS = {
    "mlp": (["up", "inner.0"], ["up", "down"], ["inner.2", "down"]),
    "llama": (["q_proj", "v_proj"], ["v_proj", "up_proj"], ["o_proj"]),
}
SLOTS = {"a": "default", "b": "second", "c": "third"}
MLP = ZOO["mlp"]
every_model = pytest.mark.parametrize("entry", [ZOO[name] for name in TARGETS], ids=TARGETS.keys())
Folders = dict[str, Path]


@pytest.fixture
def entry() -> Entry:
    return MLP


@pytest.fixture
def folders(entry: Entry, tmp_path: Path) -> Folders:
    return {
        name: make_adapter(tmp_path / name, entry, seed=seed, r=3, lora_alpha=5, target_modules=targets)
        for seed, (name, targets) in enumerate(zip(SLOTS, TARGETS[entry.name], strict=True), 1)
    }


def output(entry: Entry, model: nn.Module) -> Tensor:
    return entry.output(model, entry.inputs())


def together(entry: Entry, folders: Folders, names: Iterable[str] = "ab") -> nn.Module:
    """PEFT's own model with these active."""
    first, *others = names
    model: Any = fresh(entry, folders[first], adapter_name=SLOTS[first])
    for name in others:
        model.load_adapter(str(folders[name]), adapter_name=SLOTS[name])
    model.base_model.set_adapter([SLOTS[name] for name in names], inference_mode=True)
    return model.eval()  # type: ignore[no-any-return]


def assert_live(entry: Entry, model: nn.Module, folders: Folders, names: Iterable[str]) -> None:
    want = together(entry, folders, names) if names else entry.build()
    assert_same_output(output(entry, model), output(entry, want))


def attach_all(model: nn.Module, folders: Folders, names: Iterable[str] = "abc") -> dict[str, hotslot.Swapper]:
    swappers = {name: hotslot.attach(model, {name: folders[name]}, adapter_name=SLOTS[name]) for name in names}
    for name, swapper in swappers.items():
        swapper.activate(name)
    return swappers


def active_in_layers(model: nn.Module) -> dict[str, list[str]]:
    return {
        name.removeprefix("base_model.model."): module.active_adapters
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


# --- attach ---------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("plain", [True, False])
def test_a_second_slot_leaves_the_first_one_s_adapter_live(plain: bool, entry: Entry, folders: Folders) -> None:
    model = entry.build() if plain else fresh(entry, folders["a"])
    first = hotslot.attach(model, {"a": folders["a"]})
    first.activate("a")
    before, facts = output(entry, model), snapshot(model)
    second = hotslot.attach(model, {"b": folders["b"]}, adapter_name="second")
    assert_same_output(output(entry, model), before, exact=True)
    second.activate("b")
    assert error(output(entry, model), before) > 1e-3
    assert_live(entry, model, folders, "ab")
    second.detach()
    assert_same_output(output(entry, model), before, exact=True)
    assert_unchanged(facts, snapshot(model))


@every_model
def test_all_layers_name_the_same_adapters_as_peft_has_them_do(entry: Entry, folders: Folders) -> None:
    model = fresh(entry, folders["a"])
    hotslot.attach(model, {"b": folders["b"]}, adapter_name="second")
    want = together(entry, folders)
    assert active_in_layers(model) == active_in_layers(want)
    assert model.active_adapters == want.active_adapters == ["default", "second"]
    assert model.get_model_status().active_adapters == ["default", "second"]
    plain = entry.build()
    attach_all(plain, folders, "ab")
    assert active_in_layers(plain) == active_in_layers(want)


def test_what_peft_loads_beside_leaves_both_active(folders: Folders) -> None:
    """Its load_adapter activates, on all layers, what its own model says is active."""
    model = fresh(MLP, folders["a"])
    hotslot.attach(model, {"b": folders["b"]}, adapter_name="second").activate("b")
    model.load_adapter(str(folders["c"]), adapter_name="third")
    assert_live(MLP, model, folders, "ab")


@pytest.mark.parametrize("targets", [["up"], ["inner.2"]], ids=["on its layers", "on others"])
def test_adapters_that_are_not_active_stay_so(targets: list[str], folders: Folders) -> None:
    """Beside a new slot, and if their own grows onto other layers."""
    model: Any = fresh(MLP, folders["a"])
    with expected_peft_warnings():
        model.add_adapter("other", LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model.set_adapter("other", inference_mode=True)
    start, facts = output(MLP, model.eval()), snapshot(model)
    first = hotslot.attach(model, {"b": folders["b"]})
    first.activate("b")
    assert_same_output(output(MLP, model), start, exact=True)
    second = hotslot.attach(model, {"c": folders["c"]}, adapter_name="third")
    assert_same_output(output(MLP, model), start, exact=True)
    assert {tuple(names) for names in active_in_layers(model).values()} == {("other", "third")}
    second.activate("c")
    assert error(output(MLP, model), start) > 1e-3
    for swapper in (second, first):
        swapper.detach()
    assert_unchanged(facts, snapshot(model))


def test_where_none_is_active_the_new_one_is(folders: Folders) -> None:
    model: Any = fresh(MLP, folders["a"])
    model.base_model.set_adapter([], inference_mode=True)
    facts = snapshot(model)
    swapper = hotslot.attach(model, {"b": folders["b"]}, adapter_name="second")
    assert_same_output(output(MLP, model), output(MLP, MLP.build()), exact=True)
    swapper.activate("b")
    assert_live(MLP, model, folders, "b")
    swapper.detach()
    assert_unchanged(facts, snapshot(model))


def test_adapters_that_are_disabled_stay_so_on_new_layers_too(folders: Folders) -> None:
    model: Any = fresh(MLP, folders["a"])
    base = output(MLP, MLP.build())
    with model.disable_adapter():
        hotslot.attach(model, {"b": folders["b"]}, adapter_name="second").activate("b")
        assert_same_output(output(MLP, model), base, exact=True)
    assert_live(MLP, model, folders, "ab")
    with model.disable_adapter():
        assert_same_output(output(MLP, model), base, exact=True)
    assert_live(MLP, model, folders, "ab")


def test_beside_what_peft_has_merged_there_is_no_slot(folders: Folders) -> None:
    """PEFT's merged layers pass over whatever else they have, and PEFT unmerges them when it makes others."""
    model: Any = fresh(MLP, folders["a"])
    model.merge_adapter()
    facts = snapshot(model)
    with pytest.raises(MergedError, match="unmerge_adapter"):
        hotslot.attach(model, {"b": folders["b"]}, adapter_name="second")
    assert_unchanged(facts, snapshot(model))
    model.unmerge_adapter()
    hotslot.attach(model, {"b": folders["b"]}, adapter_name="second").activate("b")
    assert_live(MLP, model, folders, "ab")


def test_the_drop_in_swaps_beside_a_slot(folders: Folders, tmp_path: Path) -> None:
    other = make_adapter(tmp_path / "other", MLP, seed=9, r=2, target_modules=TARGETS["mlp"][0])
    model = fresh(MLP, folders["a"])
    swapper = hotslot.attach(model, {"b": folders["b"]}, adapter_name="second")
    swapper.activate("b")
    hotslot.hotswap_adapter(model, other, "default")
    assert_live(MLP, model, folders | {"a": other}, "ab")
    swapper.detach()
    assert_live(MLP, model, folders | {"a": other}, "a")


def test_swaps_in_two_slots_compile_nothing(folders: Folders) -> None:
    model, backend = MLP.build(), Backend()
    swappers = attach_all(model, folders, "ab")
    compiled = torch.compile(model, backend=backend)
    output(MLP, compiled)
    with no_recompile():
        for live in ("b", "", "a", "ab"):
            for name, swapper in swappers.items():
                swapper.activate(name) if name in live else swapper.deactivate()
            assert_same_output(
                output(MLP, compiled), output(MLP, together(MLP, folders, live) if live else MLP.build())
            )


# --- detach ---------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("order", [*permutations("abc")], ids="".join)
def test_slots_go_in_any_order(order: tuple[str, ...], entry: Entry, folders: Folders) -> None:
    model = entry.build()
    facts, attributes = snapshot(model), {*vars(model)}
    swappers = attach_all(model, folders)
    assert_live(entry, model, folders, "abc")
    for gone in order:
        swappers.pop(gone).detach()
        assert_live(entry, model, folders, [*swappers])
        names = [SLOTS[name] for name in swappers]
        assert all(active == names for active in active_in_layers(model).values())
        assert not any(param.requires_grad for name, param in model.named_parameters() if "lora_" in name)
    assert_unchanged(facts, snapshot(model))
    assert {*vars(model)} == attributes


@pytest.mark.parametrize("order", [*permutations("bc")], ids="".join)
def test_slots_beside_a_peft_models_own_adapter_go_in_any_order(order: tuple[str, ...], folders: Folders) -> None:
    model = fresh(MLP, folders["a"])
    facts = snapshot(model)
    swappers = attach_all(model, folders, "bc")
    assert_live(MLP, model, folders, "abc")
    for gone in order:
        swappers.pop(gone).detach()
        assert_live(MLP, model, folders, ["a", *swappers])
    assert model.active_adapters == ["default"]
    # PEFT writes one name as a string or as a list, and reads both.
    assert [line for line in differences(facts, snapshot(model)) if "base_model.active_adapter" not in line] == []


@pytest.mark.parametrize("chosen", ["default", "second", ["default"], ["second", "default"]], ids=str)
def test_what_users_have_chosen_since_stays_chosen(chosen: str | list[str], folders: Folders) -> None:
    """With the slot alone chosen, what was active before it is again, as it has to be for PEFT's model to compute."""
    model: Any = fresh(MLP, folders["a"])
    swapper = hotslot.attach(model, {"b": folders["b"]}, adapter_name="second")
    swapper.activate("b")
    (model if isinstance(chosen, str) else model.base_model).set_adapter(chosen, inference_mode=True)
    assert_live(
        MLP, model, folders, ["b"] if chosen == "second" else ["a"] if chosen in ("default", ["default"]) else "ba"
    )
    swapper.detach()
    assert_live(MLP, model, folders, "a")
    with model.disable_adapter():
        assert_same_output(output(MLP, model), output(MLP, MLP.build()), exact=True)


def test_an_adapter_that_users_have_loaded_beside_a_slot_stays_as_it_is(folders: Folders) -> None:
    """Active or not: where the last active one goes PEFT would activate another, and make it trainable."""
    for active in (["default", "third"], ["third"], ["default"]):
        model = MLP.build()
        swapper = hotslot.attach(model, {"b": folders["b"]})
        swapper.activate("b")
        beside = hotslot.attach(model, {"c": folders["c"]}, adapter_name="third")
        beside.activate("c")
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.set_adapter(active, inference_mode=True)
        swapper.detach()
        assert_live(MLP, model, folders, "c" if "third" in active else "")
        beside.detach()
        assert not active_in_layers(model)


def test_a_slot_that_has_grown_goes_alone(folders: Folders) -> None:
    model = MLP.build()
    facts = snapshot(model)
    first, second = attach_all(model, folders, "ab").values()
    first.grow(hotslot.plan(model, [folders["c"]]))
    assert_live(MLP, model, folders, "ab")
    first.load("c", folders["c"])
    first.activate("c")
    assert_live(MLP, model, folders, "cb")
    first.detach()
    assert_live(MLP, model, folders, "b")
    second.detach()
    assert_unchanged(facts, snapshot(model))


def test_what_users_have_chosen_stays_where_a_grown_slot_was(folders: Folders) -> None:
    """The slot that came with the model is left on its own layers, and goes on being active."""
    model: Any = fresh(MLP, folders["a"])
    swapper = hotslot.attach(model, {"b": folders["b"]})
    model.load_adapter(str(folders["c"]), adapter_name="third")
    model.base_model.set_adapter(["third", "default"], inference_mode=True)
    assert_live(MLP, model, folders, "ca")
    swapper.detach()
    assert_live(MLP, model, folders, "ca")
    assert set(map(tuple, active_in_layers(model).values())) == {("third", "default")}


def test_layers_that_differed_in_what_is_active_do_so_again(folders: Folders) -> None:
    model: Any = fresh(MLP, folders["a"])
    with expected_peft_warnings():
        model.add_adapter("other", LoraConfig(r=2, target_modules=["inner.2"], init_lora_weights=False))
    model.eval().base_model.model.inner[2].set_adapter("other", inference_mode=True)
    facts = snapshot(model)
    swapper = hotslot.attach(model, {"c": folders["c"]})
    assert active_in_layers(model)["inner.2"] == ["other", "default"]
    swapper.activate("c")
    swapper.detach()
    assert_unchanged(facts, snapshot(model))


# --- modules that are saved whole -----------------------------------------------------------------------------------

BAG = ZOO["embedding"]


@pytest.fixture
def heads(tmp_path: Path) -> Folders:
    configs: dict[str, dict[str, Any]] = {
        "a": {"modules_to_save": ["head"]},
        "b": {},
        "c": {"modules_to_save": ["head"]},
        "tokens": {"trainable_token_indices": {"word": [3, 5]}},
    }
    return {
        name: make_adapter(tmp_path / name, BAG, seed=seed, r=2, target_modules=["mix"], **config)
        for seed, (name, config) in enumerate(configs.items(), 1)
    }


@pytest.mark.parametrize("own", ["a", "tokens"])
def test_the_head_and_the_tokens_of_another_adapter_stay_live(own: str, heads: Folders) -> None:
    model = fresh(BAG, heads[own])
    before, facts = output(BAG, model), snapshot(model)
    swapper = hotslot.attach(model, {"b": heads["b"]}, adapter_name="second")
    assert_same_output(output(BAG, model), before, exact=True)
    swapper.activate("b")
    assert_live(BAG, model, heads | {"a": heads[own]}, "ba")  # the other way round PEFT's load_adapter raises
    swapper.detach()
    assert_unchanged(facts, snapshot(model))


def test_two_active_adapters_with_a_head_are_refused_as_by_peft(heads: Folders) -> None:
    model = fresh(BAG, heads["a"])
    facts = snapshot(model)
    with pytest.raises(UnsupportedError, match="save the same module whole"):
        hotslot.attach(model, {"c": heads["c"]}, adapter_name="third")
    assert_unchanged(facts, snapshot(model))
    with pytest.raises(ValueError, match="Only one adapter can be set"):
        together(BAG, heads, "ac")


@pytest.mark.parametrize("chosen", [True, False], ids=["chosen before", "chosen after"])
def test_a_head_that_came_later_is_live_when_it_is_chosen(chosen: bool, heads: Folders) -> None:
    """In the wrapper that came with a slot, which goes before or after."""
    model: Any = fresh(BAG, heads["b"], adapter_name="second")
    swapper = hotslot.attach(model, {"c": heads["c"]}, adapter_name="third")
    swapper.activate("c")
    assert_live(BAG, model, heads, "bc")
    model.load_adapter(str(heads["a"]), adapter_name="default")
    if chosen:
        model.set_adapter("default", inference_mode=True)
        assert_live(BAG, model, heads, "a")
    swapper.detach()
    assert_live(BAG, model, heads, "a" if chosen else "b")
    model.set_adapter("default", inference_mode=True)
    assert_live(BAG, model, heads, "a")


# --- of transformers, and of diffusers ------------------------------------------------------------------------------


def test_a_slot_beside_an_adapter_of_transformers(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    folders = {
        name: make_adapter(tmp_path / name, entry, seed=seed, r=3, target_modules=targets)
        for seed, (name, targets) in enumerate(zip(SLOTS, TARGETS["llama"], strict=True), 1)
    }
    model: Any = entry.build()
    model.load_adapter(str(folders["a"]))
    model.eval().requires_grad_(False)
    before, facts = output(entry, model), snapshot(model)
    swapper = hotslot.attach(model, {"b": folders["b"]}, adapter_name="second")
    assert_same_output(output(entry, model), before, exact=True)
    swapper.activate("b")
    assert_live(entry, model, folders, "ab")
    assert model.active_adapters() == ["default", "second"]
    model.disable_adapters()
    assert_same_output(output(entry, model), output(entry, entry.build()), exact=True)
    model.enable_adapters()
    model.requires_grad_(False)
    assert_live(entry, model, folders, "ab")
    swapper.detach()
    assert_unchanged(facts, snapshot(model))


def of_diffusers(kind: Kind, loras: Folders) -> dict[str, Tensor]:
    pipe = kind.build()
    for name, source in loras.items():
        load_plain(pipe, source, name)
    pipe.set_adapters([*loras])
    for name in kind.components:
        getattr(pipe, name).eval().requires_grad_(False)
    return kind.outputs(pipe)


@pytest.mark.parametrize("order", ["forth", "back"])
def test_slots_of_a_pipeline(order: str, tmp_path: Path) -> None:
    """The second LoRA has components that the first has not, and the other way round."""
    kind = PIPELINES["sd"]
    loras = {
        "default": make_lora(kind, tmp_path / "a", seed=1, components=("unet",), r=2),
        "second": make_lora(kind, tmp_path / "b", seed=2, components=("text_encoder", "unet"), r=3),
    }
    both = of_diffusers(kind, loras)
    pipe = kind.build()
    base = kind.outputs(pipe)
    swappers = {}
    for name in loras if order == "forth" else reversed(loras):
        swappers[name] = hotslot.attach(pipe, {name: loras[name]}, adapter_name=name)
        swappers[name].activate(name)
    outputs = kind.outputs(pipe)
    for component, value in both.items():
        assert_same_output(outputs[component], value)
    assert pipe.get_active_adapters() == [*swappers]
    pipe.set_adapters(["default", "second"])
    for component, value in kind.outputs(pipe).items():
        assert_same_output(value, both[component])
    for name, other in (("default", "second"), ("second", None)):
        swappers[name].detach()
        alone = of_diffusers(kind, {other: loras[other]}) if other else base
        for component, value in kind.outputs(pipe).items():
            assert_same_output(value, alone[component])
    assert not [module for module in pipe.unet.modules() if isinstance(module, LoraLayer)]
