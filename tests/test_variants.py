"""Variants of LoRA that are trained otherwise and run the same: each is taken as the plain LoRA that it is."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import hotslot
from adapters import expected_peft_warnings, make_adapter, random_config
from compiling import WAYS, Backend
from hotslot.errors import TensorError, UnsupportedError
from hotslot.testing import no_recompile, same_addresses
from oracle import assert_same_output, assert_unchanged, error, fresh, fresh_output, snapshot
from zoo import ZOO, Entry

MLP = ZOO["mlp"]
LINEAR = (nn.Linear, Conv1D)
# option → (how it is drawn, the layers that PEFT has it on)
VARIANTS: dict[str, tuple[dict[str, Any], tuple[type[nn.Module], ...]]] = {
    "mica": ({"init_lora_weights": "mica"}, (*LINEAR, nn.Embedding)),
    "velora_config": ({"velora_config": VeloraConfig(num_groups=3)}, LINEAR),
    "monteclora_config": ({"monteclora_config": MontecloraConfig(num_samples=3)}, LINEAR),
    "use_qalora": ({"use_qalora": True, "qalora_group_size": 4}, (nn.Module,)),
}
LEFT_BEHIND = ("velora_config", "monteclora_config")  # PEFT's layer keeps tensors for them


def variant(folder: Path, entry: Entry, option: str, *, seed: int, **config: Any) -> Path:
    """An adapter of random options that uses this one."""
    drawn, kinds = VARIANTS[option]
    fit = [t for t in entry.targets if all(isinstance(entry.modules[m], kinds) for m in _named(entry, t))]
    rng = Random(f"{entry.name} {option} {seed}")
    options = random_config(rng, entry)
    for name in ("exclude_modules", "rank_pattern", "alpha_pattern", "lora_bias", "layers_to_transform"):
        options.pop(name, None)
    if option == "mica":
        options["r"] = entry.rank_multiple  # at most the layer's smaller side
    targets = rng.sample(fit, rng.randint(1, len(fit)))
    return make_adapter(folder, entry, seed=seed, **{**options, "target_modules": targets, **drawn, **config})


def _named(entry: Entry, target: str) -> list[str]:
    return [name for name in entry.modules if f".{name}".endswith(f".{target}")]


def family(folder: Path, entry: Entry, seed: int = 0) -> dict[str, Path]:
    made = {option: variant(folder / option, entry, option, seed=seed + i) for i, option in enumerate(VARIANTS)}
    return made | {"plain": make_adapter(folder / "plain", entry, seed=9, **random_config(Random(seed), entry))}


def assert_live(entry: Entry, model: nn.Module, folder: Path) -> None:
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, folder))


@pytest.mark.parametrize("name", ZOO)
def test_any_to_any_on_a_plain_model(name: str, tmp_path: Path) -> None:
    entry, folders = ZOO[name], family(tmp_path, ZOO[name])
    swapper = hotslot.attach(model := entry.build(), folders)
    base = entry.output(model, entry.inputs())
    order = Random(name).choices(list(folders), k=4)
    for adapter in [*folders, *reversed(folders), *order]:
        swapper.activate(adapter)
        assert_live(entry, model, folders[adapter])
    for one, other in pairwise(folders.values()):  # the control
        assert error(fresh_output(entry, one), fresh_output(entry, other)) > 1e-3
    swapper.deactivate()
    assert torch.equal(entry.output(model, entry.inputs()), base)


@pytest.mark.parametrize("came_with", ["plain", "mica", "use_qalora"])
@pytest.mark.parametrize("name", ["mlp", "gpt2", "embedding", "vision"])
def test_any_to_any_on_a_model_of_peft(name: str, came_with: str, tmp_path: Path) -> None:
    """With DoRA among them, for which a layer of MiCA is given another variant. What was there is put back."""
    entry, folders = ZOO[name], family(tmp_path, ZOO[name], seed=5)
    dora = {"r": 2, "target_modules": [t for t in entry.targets if t != "attention"], "use_dora": True}
    folders["dora"] = make_adapter(tmp_path / "dora", entry, seed=6, **dora)
    model = fresh(entry, folders[came_with])
    before = snapshot(model)
    swapper = hotslot.attach(model, folders)
    for adapter in [*folders, *reversed(folders)]:
        swapper.activate(adapter)
        assert_live(entry, model, folders[adapter])
    swapper.detach()
    assert_unchanged(before, snapshot(model))
    assert_live(entry, model, folders[came_with])


@pytest.mark.parametrize("option", VARIANTS)
def test_in_a_slot_of_its_rank_it_is_exact_to_the_bit(option: str, tmp_path: Path) -> None:
    config = {"r": 4, "target_modules": ["up", "inner.2"]}
    if option != "mica":
        config |= {"lora_bias": True, "init_lora_weights": True}
    folder = variant(tmp_path / "variant", MLP, option, seed=1, **config)
    swapper = hotslot.attach(model := MLP.build(), {"variant": folder})
    swapper.activate("variant")
    assert_same_output(MLP.output(model, MLP.inputs()), fresh_output(MLP, folder), exact=True)


@pytest.mark.parametrize("option", VARIANTS)
def test_what_is_live_and_saved_is_plain_lora(option: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It says so once, and what the trainer kept beside A and B is left out."""
    folders = {name: variant(tmp_path / name, MLP, option, seed=i, r=4) for i, name in enumerate(("one", "other"))}
    model = fresh(MLP, make_adapter(tmp_path / "plain", MLP, seed=5, r=2, target_modules=["up"]))
    with caplog.at_level(logging.WARNING, logger="hotslot"):
        swapper = hotslot.attach(model, folders)
    assert ("is taken as plain LoRA" in caplog.text) == (option != "use_qalora")
    for name, folder in folders.items():
        swapper.activate(name)
        config = model.peft_config["default"]
        assert (config.velora_config, config.monteclora_config) == (None, None)
        assert config.init_lora_weights != "mica"
        with expected_peft_warnings():
            model.save_pretrained(tmp_path / "saved")
        assert_same_output(fresh_output(MLP, tmp_path / "saved"), fresh_output(MLP, folder))
        saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
        theirs = load_file(folder / "adapter_model.safetensors")
        assert saved.keys() == {key for key in theirs if "lora_A" in key or "lora_B" in key}


@pytest.mark.parametrize("option", VARIANTS)
def test_after_the_swap_it_trains_as_plain_lora(option: str, tmp_path: Path) -> None:
    """As the config on the model says, and what was saved from it does in PEFT: not as the variant is trained."""
    folder = variant(tmp_path / "variant", MLP, option, seed=3, r=4, lora_dropout=0.0, target_modules=["up", "down"])
    swapper = hotslot.attach(model := fresh(MLP, folder) if option == "use_qalora" else MLP.build(), {"v": folder})
    swapper.activate("v")
    with expected_peft_warnings():
        plain = fresh(MLP, make_adapter(tmp_path / "plain", MLP, seed=4, r=4, target_modules=["up", "down"]))
        hotslot.hotswap_adapter(plain, str(folder), "default")
        plain.save_pretrained(tmp_path / "saved")
    assert _gradients(model) == _gradients(fresh(MLP, tmp_path / "saved"))
    differs = _gradients(fresh(MLP, folder), variants_own=True) != _gradients(model)
    assert differs == (option != "use_qalora")  # the control: PEFT trains the variant otherwise


def _gradients(model: nn.Module, *, variants_own: bool = False) -> dict[str, list[Any]]:
    """Of A and B, by the end of their names; with `variants_own` of those that PEFT trains."""
    params = {name.replace(".default", "").removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    low_rank = {name: p for name, p in params.items() if "lora_A" in name or "lora_B" in name}
    frozen = getattr(next(iter(_lora_layers(model))), "frozen_peft_weight_names", {}) if variants_own else {}
    for name, param in low_rank.items():
        param.requires_grad_(not any(part in name for parts in frozen.values() for part in parts))
    model.zero_grad()
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model(**MLP.inputs()).square().sum().backward()
    model.eval()
    return {name: param.grad.tolist() for name, param in low_rank.items() if param.grad is not None}


def _lora_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_variant")]


@pytest.mark.parametrize("way", WAYS)
def test_swaps_compile_nothing(way: str, tmp_path: Path) -> None:
    import torch._dynamo

    entry, folders = ZOO["gpt2"], family(tmp_path, ZOO["gpt2"], seed=7)
    with torch._dynamo.config.patch(recompile_limit=64):
        swapper = hotslot.attach(model := entry.build(), folders)
        compiled = WAYS[way](model, Backend())
        entry.output(compiled, entry.inputs())
        with no_recompile(), same_addresses(model):
            for name in [*folders, *reversed(folders)]:
                swapper.activate(name)
                assert_live(entry, compiled, folders[name])


@pytest.mark.parametrize("option", VARIANTS)
def test_drop_in(option: str, tmp_path: Path) -> None:
    folders = {name: make_adapter(tmp_path / name, MLP, seed=i, r=3, target_modules=["up", "down"])
               for i, name in enumerate(("first", "last"))}  # fmt: skip
    folders["variant"] = variant(tmp_path / "variant", MLP, option, seed=2, target_modules=["up", "down"])
    model = fresh(MLP, folders["first"])
    for name in ("variant", "last", "variant"):
        hotslot.hotswap_adapter(model, str(folders[name]), "default")
        assert_live(MLP, model, folders[name])
    other = fresh(MLP, folders["variant"])
    state = {name: tensor for name, tensor in other.state_dict().items() if "lora_" in name}
    model = fresh(MLP, folders["first"])
    hotslot.hotswap_adapter_from_state_dict(model, state, "default", other.peft_config["default"])
    assert_live(MLP, model, folders["variant"])


def test_a_blend_of_them_loads_as_the_blend(tmp_path: Path) -> None:
    options = ("monteclora_config", "velora_config", "mica")
    folders = {o: variant(tmp_path / o, MLP, o, seed=i, r=4, target_modules=["up"]) for i, o in enumerate(options)}
    model = fresh(MLP, make_adapter(tmp_path / "plain", MLP, seed=5, r=12, target_modules=["up"]))
    swapper = hotslot.attach(model, folders)
    for first, second in (options[:2], options[1:]):
        swapper.activate({first: 0.5, second: -2.0})
        with expected_peft_warnings():
            model.save_pretrained(tmp_path / "blend")
        assert_same_output(MLP.output(model, MLP.inputs()), fresh_output(MLP, tmp_path / "blend"))
        assert error(fresh_output(MLP, tmp_path / "blend"), fresh_output(MLP, folders[first])) > 1e-3


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", LEFT_BEHIND)
def test_one_that_came_with_the_model_is_refused(option: str, tmp_path: Path) -> None:
    """PEFT's layer has tensors for it, which a swap would leave: in training, and in what is saved."""
    folder = variant(tmp_path / "variant", MLP, option, seed=0)
    model: PeftModel = fresh(MLP, folder)
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match="attach to the base model"):
        hotslot.attach(model, {"variant": folder})
    with pytest.raises(UnsupportedError, match="attach to the base model"):
        hotslot.hotswap_adapter(model, str(folder), "default")
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize(
    ("name", "target", "config"),
    [
        ("conv2d", "stem", {"velora_config": {"num_groups": 2}}),
        ("conv1d", "point", {"init_lora_weights": "mica"}),
        ("embedding", "word", {"monteclora_config": {"num_samples": 2}}),
        ("attention", "batch_first", {"init_lora_weights": "mica"}),
        ("mlp", "up", {"init_lora_weights": "mica", "velora_config": {}}),
        ("mlp", "up", {"use_dora": True, "monteclora_config": {}}),
    ],
)
def test_what_peft_refuses_is_refused(name: str, target: str, config: dict[str, Any], tmp_path: Path) -> None:
    entry, dora = ZOO[name], {"use_dora": config.get("use_dora", False)}
    folder = make_adapter(tmp_path / "a", entry, seed=0, r=2, target_modules=[target], **dora)
    with pytest.raises(ValueError, match=r"variant|VeLoRA"):
        make_adapter(tmp_path / "b", entry, seed=0, r=2, target_modules=[target], **config)
    stated = dict(hotslot.checkpoint.read(folder).config) | config
    with pytest.raises(UnsupportedError, match="a variant of LoRA where PEFT refuses it"):
        hotslot.attach(entry.build(), {"a": hotslot.checkpoint.read(folder, config=stated)})


def test_tensors_of_training_without_the_option_are_refused(tmp_path: Path) -> None:
    folder = variant(tmp_path / "variant", MLP, "monteclora_config", seed=0)
    stated = dict(hotslot.checkpoint.read(folder).config) | {"monteclora_config": None}
    with pytest.raises(TensorError, match="lora_monteclora_sampler"):
        hotslot.attach(MLP.build(), {"a": hotslot.checkpoint.read(folder, config=stated)})
