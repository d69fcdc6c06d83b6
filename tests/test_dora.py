"""DoRA beside plain LoRA in the same slots, against a fresh load: any to any, of any rank, compiled or not."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import hotslot
from adapters import expected_peft_warnings, make_adapter, random_config
from compiling import Backend
from hotslot import errors
from hotslot.testing import no_recompile, same_addresses
from oracle import assert_same_output, assert_unchanged, fresh, fresh_output, snapshot
from zoo import ZOO, Entry

NAMES = [name for name in ZOO if name != "attention"]  # PEFT has no DoRA there


def family(folder: Path, entry: Entry, seed: int = 0) -> dict[str, Path]:
    """Two adapters with DoRA and two without, of random options."""
    rng, folders = Random(seed), {}
    for i, name in enumerate(("dora", "plain", "other", "last")):
        config = random_config(rng, entry) | {"use_dora": i % 2 == 0}
        if config["use_dora"]:
            config["target_modules"] = [t for t in entry.targets if t not in ("attention", "pool")]
            for option in ("lora_bias", "exclude_modules", "rank_pattern", "alpha_pattern"):
                config.pop(option, None)
        folders[name] = make_adapter(folder / name, entry, seed=10 * seed + i, **config)
    return folders


@pytest.mark.parametrize("name", NAMES)
def test_any_to_any_on_a_plain_model(name: str, tmp_path: Path) -> None:
    entry, folders = ZOO[name], family(tmp_path, ZOO[name])
    inputs, base = entry.inputs(), entry.output(entry.build(), entry.inputs())
    model = entry.build()
    swapper = hotslot.attach(model, folders)
    assert torch.equal(entry.output(model, inputs), base)
    for adapter in [*folders, *reversed(folders), "plain", "other"]:
        swapper.activate(adapter)
        assert_same_output(entry.output(model, inputs), fresh_output(entry, folders[adapter]))
    swapper.deactivate()
    assert torch.equal(entry.output(model, inputs), base)


@pytest.mark.parametrize("first", ["dora", "plain"])
@pytest.mark.parametrize("name", ["mlp", "conv2d", "embedding", "gpt2"])
def test_any_to_any_on_a_model_of_peft(name: str, first: str, tmp_path: Path) -> None:
    """What it came with is put back; what is live is saved, and loads again."""
    entry, folders = ZOO[name], family(tmp_path, ZOO[name], seed=1)
    model, inputs = fresh(entry, folders[first]), entry.inputs()
    before = snapshot(model)
    swapper = hotslot.attach(model, folders)
    for adapter, folder in folders.items():
        swapper.activate(adapter)
        assert_same_output(entry.output(model, inputs), fresh_output(entry, folder))
        with expected_peft_warnings():
            model.save_pretrained(tmp_path / "saved")
        assert_same_output(fresh_output(entry, tmp_path / "saved"), fresh_output(entry, folder))
        assert swapper.engine.model.peft_config["default"].use_dora is (adapter in ("dora", "other"))
    swapper.detach()
    assert_unchanged(before, snapshot(model))


def test_an_adapter_of_the_slots_rank_is_exact_to_the_bit(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    folders = {
        f"{dora}": make_adapter(
            tmp_path / f"{dora}", entry, seed=dora, r=4, target_modules=["up", "down"], use_dora=bool(dora)
        )
        for dora in (1, 0)
    }
    swapper = hotslot.attach(model := entry.build(), folders)
    for name, folder in folders.items():
        swapper.activate(name)
        assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, folder), exact=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_in_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    entry, folders = ZOO["mlp"], family(tmp_path, ZOO["mlp"], seed=2)
    swapper = hotslot.attach(model := entry.build(dtype=dtype), folders)
    base = entry.output(entry.build(dtype=dtype), entry.inputs(dtype=dtype))
    assert torch.equal(entry.output(model, entry.inputs(dtype=dtype)), base)
    for name, folder in folders.items():
        swapper.activate(name)
        assert_same_output(entry.output(model, entry.inputs(dtype=dtype)), fresh_output(entry, folder, dtype=dtype))


def test_compiled_code_is_not_compiled_again(tmp_path: Path) -> None:
    """The control: PEFT's way from plain LoRA to DoRA is to load another adapter, which compiles anew."""
    entry, folders = ZOO["llama"], family(tmp_path, ZOO["llama"], seed=3)
    backend, inputs = Backend(), entry.inputs()
    swapper = hotslot.attach(model := entry.build(), folders)
    compiled = torch.compile(model, backend=backend)
    entry.output(compiled, inputs)
    with no_recompile(), same_addresses(model):
        for adapter in [*folders, *reversed(folders)]:
            swapper.activate(adapter)
            assert_same_output(entry.output(compiled, inputs), fresh_output(entry, folders[adapter]))
    control = fresh(entry, folders["plain"])
    compiled = torch.compile(control, backend=(backend := Backend()))
    entry.output(compiled, inputs)
    graphs = backend.graphs
    with expected_peft_warnings():
        control.load_adapter(folders["dora"], "dora")
        control.set_adapter("dora")
    entry.output(compiled, inputs)
    assert backend.graphs > graphs


def test_a_scaling_that_is_changed_scales_the_norm_as_well(tmp_path: Path) -> None:
    entry, folders = ZOO["mlp"], family(tmp_path, ZOO["mlp"], seed=4)
    model, oracle = entry.build(), fresh(entry, folders["dora"])
    hotslot.attach(model, folders).activate("dora")
    for each in (model, oracle):
        for module in each.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(0.5)
    assert_same_output(entry.output(model, entry.inputs()), entry.output(oracle, entry.inputs()))


@pytest.mark.parametrize("adapter", ["dora", "plain"])
def test_merged_weights_are_those_of_a_fresh_merge(adapter: str, tmp_path: Path) -> None:
    entry, folders = ZOO["mlp"], family(tmp_path, ZOO["mlp"], seed=5)
    model: Any = fresh(entry, folders["other"])
    hotslot.attach(model, folders).activate(adapter)
    merged, oracle = model.merge_and_unload(), fresh(entry, folders[adapter]).merge_and_unload()
    assert_same_output(entry.output(merged, entry.inputs()), entry.output(oracle, entry.inputs()))


def test_training_moves_the_magnitude_and_rollback_brings_it_back(tmp_path: Path) -> None:
    entry, folders = ZOO["mlp"], family(tmp_path, ZOO["mlp"], seed=6)
    model: Any = fresh(entry, folders["dora"])
    swapper = hotslot.attach(model, folders)
    magnitudes = [p for name, p in model.named_parameters() if "magnitude" in name and ".default" in name]
    assert magnitudes
    with torch.no_grad():
        for magnitude in magnitudes:
            magnitude.mul_(1.5)
    trained = entry.output(model, entry.inputs())
    swapper.activate("plain")
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, folders["plain"]))
    assert all((magnitude == 1).all() for magnitude in magnitudes)
    swapper.rollback()
    assert torch.equal(entry.output(model, entry.inputs()), trained)


def test_copies_and_pickles_keep_what_is_live(tmp_path: Path) -> None:
    entry, folders = ZOO["mlp"], family(tmp_path, ZOO["mlp"], seed=7)
    swapper = hotslot.attach(model := entry.build(), folders)
    for adapter in ("dora", "plain"):
        swapper.activate(adapter)
        expected = entry.output(model, entry.inputs())
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        swapper.deactivate()
        for twin in copies:
            assert torch.equal(entry.output(twin, entry.inputs()), expected)


@pytest.mark.parametrize("new", ["plain", "other"])
@pytest.mark.parametrize("old", ["dora", "last"])
def test_pefts_functions_swap_it_too(old: str, new: str, tmp_path: Path) -> None:
    entry, folders = ZOO["mlp"], family(tmp_path, ZOO["mlp"], seed=8)
    folders = {
        name: make_adapter(
            tmp_path / f"all-{name}",
            entry,
            seed=i,
            r=4 + i,
            target_modules=["up", "down"],
            use_dora=name in ("dora", "other"),
        )
        for i, name in enumerate(folders)
    }
    model = fresh(entry, folders[old])
    hotslot.hotswap_adapter(model, folders[new], "default")
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, folders[new]))
    hotslot.hotswap_adapter(model, folders[old], "default")
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, folders[old]))
    state = {name: p.detach().clone() for name, p in fresh(entry, folders[new]).named_parameters() if "lora_" in name}
    config = PeftModel.from_pretrained(entry.build(), folders[new]).peft_config["default"]
    hotslot.hotswap_adapter_from_state_dict(model, state, "default", config)
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, folders[new]))


def test_a_magnitude_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    folder = make_adapter(tmp_path / "a", entry, seed=0, r=4, target_modules=["up"], use_dora=True)
    swapper = hotslot.attach(model := entry.build(), {"a": folder})
    before, weights = snapshot(model), load_file(folder / "adapter_model.safetensors")
    key = next(name for name in weights if "magnitude" in name)
    for broken, kind in (
        ({key: weights[key][:-1]}, errors.ShapeError),
        ({key: weights[key][None]}, errors.ShapeError),
        ({key: weights[key] * float("nan")}, errors.NonFiniteError),
        ({key: None}, errors.TensorError),
    ):
        changed = {name: tensor for name, tensor in (weights | broken).items() if tensor is not None}
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, folder / "adapter_model.safetensors")
        with pytest.raises(kind):
            swapper.load("b", folder)
    assert_unchanged(before, snapshot(model))
    plain = make_adapter(tmp_path / "p", entry, seed=0, r=4, target_modules=["up"])
    swapper = hotslot.attach(model := entry.build(), {"plain": plain}, route="side")
    with pytest.raises(errors.UnexpectedTargetError) as caught:
        swapper.load("dora", make_adapter(tmp_path / "d", entry, seed=0, r=4, target_modules=["up"], use_dora=True))
    assert caught.value.plan is not None
    swapper.grow(caught.value.plan)
    swapper.load("dora", tmp_path / "d")
    swapper.activate("dora")
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, tmp_path / "d"))


def test_a_model_that_was_compiled_with_pefts_dora_is_refused(tmp_path: Path) -> None:
    entry, folders = ZOO["mlp"], family(tmp_path, ZOO["mlp"])
    model = torch.compile(fresh(entry, folders["dora"]), backend="eager")
    with pytest.raises(errors.ModelError, match="compiled"):
        hotslot.attach(model, {"dora": folders["dora"]})
