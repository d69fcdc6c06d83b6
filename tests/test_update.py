"""A trainer's weights made live without a file, as loops of reinforcement learning sync them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

import hotslot
from adapters import make_adapter
from compiling import Backend
from hotslot import checkpoint, errors
from hotslot.testing import no_recompile, same_addresses
from oracle import assert_same_output, assert_unchanged, fresh_output, snapshot
from zoo import ZOO

MLP = ZOO["mlp"]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("dora", [False, True])
def test_a_trainer_syncs_into_a_compiled_copy(dora: bool) -> None:
    """Every few steps, with the trainer's tensors as they are; the copy computes what the trainer does."""
    entry, inputs = ZOO["llama"], ZOO["llama"].inputs()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", use_dora=dora)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trainer: Any = get_peft_model(entry.build(), config)
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=0.05)
    policy, backend = entry.build(), Backend()
    start = get_peft_model_state_dict(trainer)
    source = checkpoint.from_tensors(start, trainer.peft_config["default"])
    swapper = hotslot.attach(policy, {"policy": source})
    swapper.activate("policy")
    compiled = torch.compile(policy, backend=backend)
    entry.output(compiled, inputs)
    versions, outputs = [swapper.version], [entry.output(compiled, inputs)]
    with no_recompile(), same_addresses(policy):
        for _ in range(3):
            trainer.train()
            for _ in range(2):
                optimizer.zero_grad()
                logits = trainer(**inputs).logits
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["input_ids"].flatten()).backward()
                optimizer.step()
            trainer.eval()
            before = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(trainer).items()}
            report = swapper.update("policy", get_peft_model_state_dict(trainer))
            assert report is not None
            assert report.changed
            after = get_peft_model_state_dict(trainer)
            assert all(torch.equal(before[name], after[name]) for name in before)
            outputs.append(entry.output(compiled, inputs))
            assert_same_output(outputs[-1], entry.output(trainer, inputs))
            versions.append(swapper.version)
    assert len(set(versions)) == len(versions)
    assert all(not torch.equal(a, b) for a, b in pairwise(outputs))  # the control: it learns


def test_what_is_not_live_is_only_loaded(tmp_path: Path) -> None:
    folders = {
        name: make_adapter(tmp_path / name, MLP, seed=i, r=4, target_modules=["up"]) for i, name in enumerate("abc")
    }
    swapper = hotslot.attach(model := MLP.build(), {name: folders[name] for name in "ab"})
    swapper.activate("a")
    before = snapshot(model)
    assert swapper.update("b", tensors_of(folders["c"])) is None
    assert_unchanged(before, snapshot(model))
    swapper.activate("b")
    assert_same_output(MLP.output(model, MLP.inputs()), fresh_output(MLP, folders["c"]), exact=True)


def test_the_tensors_are_not_kept(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", MLP, seed=0, r=4, target_modules=["up"])
    other = tensors_of(make_adapter(tmp_path / "b", MLP, seed=1, r=4, target_modules=["up"]))
    swapper = hotslot.attach(model := MLP.build(), {"a": folder})
    swapper.activate("a")
    swapper.update("a", other)
    expected = MLP.output(model, MLP.inputs())
    for tensor in other.values():
        tensor.zero_()
    swapper.deactivate()
    swapper.activate("a")
    assert torch.equal(MLP.output(model, MLP.inputs()), expected)


def test_the_same_values_again_are_no_swap(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", MLP, seed=0, r=4, target_modules=["up"])
    swapper = hotslot.attach(model := MLP.build(), {"a": folder})
    swapper.activate("a")
    before, generation = snapshot(model), swapper.generation
    report = swapper.update("a", tensors_of(folder))
    assert report is not None
    assert not report.changed
    assert swapper.generation == generation
    assert_unchanged(before, snapshot(model))


def test_an_update_can_be_rolled_back(tmp_path: Path) -> None:
    folders = [make_adapter(tmp_path / str(i), MLP, seed=i, r=4, target_modules=["up"]) for i in range(2)]
    swapper = hotslot.attach(model := MLP.build(), {"a": folders[0]})
    swapper.activate("a")
    swapper.update("a", tensors_of(folders[1]))
    assert_same_output(MLP.output(model, MLP.inputs()), fresh_output(MLP, folders[1]), exact=True)
    swapper.rollback()
    assert_same_output(MLP.output(model, MLP.inputs()), fresh_output(MLP, folders[0]), exact=True)


@pytest.mark.parametrize("live", [True, False])
def test_other_tensors_are_refused(live: bool, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", MLP, seed=0, r=4, target_modules=["up"])
    swapper = hotslot.attach(model := MLP.build(), {"a": folder})
    if live:
        swapper.activate("a")
    good, before, version = tensors_of(folder), snapshot(model), swapper.version
    key = next(iter(good))
    refused = (
        ({**good, key: good[key].double().fill_(float("nan"))}, errors.NonFiniteError),
        ({name: tensor for name, tensor in good.items() if name != key}, errors.TensorError),
        (
            {**good, "nowhere.lora_A.weight": good[key], "nowhere.lora_B.weight": good[key].T},
            errors.UnexpectedTargetError,
        ),
        ({**good, key: good[key][:2]}, errors.TensorError),
        ({name: tensor[..., :2] for name, tensor in good.items()}, errors.TensorError),
        ({**good, key: "a string"}, errors.TensorError),
    )
    for tensors, kind in refused:
        with pytest.raises(kind):
            swapper.update("a", tensors)
        assert_unchanged(before, snapshot(model))
        assert swapper.version == version
    swapper.activate("a")
    assert_same_output(MLP.output(model, MLP.inputs()), fresh_output(MLP, folder), exact=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_tensors_of_any_layout_and_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """Not contiguous, expanded, mixed dtypes; as a file of the same values."""
    folder = make_adapter(tmp_path / "a", MLP, seed=0, r=4, target_modules=["up", "down"])
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(folder).items()}
    first = next(iter(tensors))
    tensors[first] = tensors[first].float().T.contiguous().T
    swapper = hotslot.attach(model := MLP.build(), {"a": folder})
    swapper.update("a", tensors)
    swapper.activate("a")
    oracle = PeftModel.from_pretrained(MLP.build(), folder).eval()
    with torch.no_grad():
        for name, param in oracle.named_parameters():
            if "lora_" in name:
                param.copy_(tensors[name.replace(".default", "")])
    assert_same_output(MLP.output(model, MLP.inputs()), MLP.output(oracle, MLP.inputs()), exact=True)
