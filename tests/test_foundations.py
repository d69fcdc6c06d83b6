"""The zoo, the adapters, the oracle and the pair run are sound: what the other tests rest on."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

from adapters import (
    EXOTIC_OPTIONS,
    exotic_config,
    make_adapter,
    matched_modules,
    random_config,
    random_peft_model,
)
from oracle import (
    TOLERANCE,
    assert_same_output,
    assert_unchanged,
    differences,
    error,
    fresh,
    fresh_output,
    snapshot,
)
from zoo import ZOO, Entry

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import random_pairs

ENTRIES = pytest.mark.parametrize("entry", ZOO.values(), ids=list(ZOO))


def state(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


# --- zoo


@ENTRIES
def test_seed_settles_the_weights(entry: Entry) -> None:
    torch.manual_seed(1)
    first = state(entry.build(3))
    torch.manual_seed(2)
    untouched = torch.get_rng_state()
    assert state(entry.build(3)) == first
    assert torch.equal(torch.get_rng_state(), untouched)
    assert state(entry.build(4)) != first


@ENTRIES
def test_inputs_and_outputs(entry: Entry) -> None:
    model = entry.build()
    output = entry.output(model, entry.inputs(5))
    assert torch.equal(output, entry.output(model, entry.inputs(5)))
    assert error(entry.output(model, entry.inputs(6)), output) > 0.01
    half = entry.output(entry.build(dtype=torch.bfloat16), entry.inputs(5, torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert error(half.float(), output) < 0.1


@ENTRIES
def test_every_target_names_a_module(entry: Entry) -> None:
    for target in entry.targets:
        assert matched_modules(entry, {"target_modules": [target]}), target


# --- adapters


@ENTRIES
def test_random_adapters_load_as_they_were_made(entry: Entry, tmp_path: Path) -> None:
    """20 configurations of each entry: PEFT accepts them, gives them back exactly, and no two are alike."""
    outputs = []
    for seed in range(20):
        config = random_config(Random(seed), entry)
        folder = make_adapter(tmp_path / str(seed), entry, seed=seed, **config)
        assert {path.name for path in folder.iterdir()} >= {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        output = fresh_output(entry, folder)
        if seed < 5:
            # frozen, as a loaded adapter is: whether a weight wants a gradient changes matmul's rounding
            made = random_peft_model(entry, seed=seed, **config).requires_grad_(False)
            assert_same_output(output, entry.output(made, entry.inputs()), exact=True)
        outputs.append(output)
    base = entry.output(entry.build(), entry.inputs())
    for one, other in zip(outputs, [*outputs[1:], base], strict=True):
        assert error(one, other) > 100 * TOLERANCE[torch.float32]


@ENTRIES
def test_matched_modules_are_those_that_peft_wraps(entry: Entry) -> None:
    for seed in range(5):
        config = random_config(Random(seed), entry)
        model = random_peft_model(entry, seed=0, **config)
        assert set(matched_modules(entry, config)) == set(model.base_model.targeted_module_names)


def test_random_config_draws_every_option() -> None:
    rng = Random(0)
    drawn = {option for entry in ZOO.values() for _ in range(60) for option in random_config(rng, entry)}
    assert drawn == {
        "r", "lora_alpha", "use_rslora", "lora_dropout", "lora_bias", "rank_pattern", "alpha_pattern",
        "task_type", "target_modules", "exclude_modules", "layers_to_transform", "init_lora_weights",
        "fan_in_fan_out",
    }  # fmt: skip


def test_exotic_config_draws_every_option() -> None:
    drawn = set()
    for name in ("llama", "mlp"):
        for seed in range(40):
            drawn |= exotic_config(Random(seed), ZOO[name]).keys()
    assert drawn >= EXOTIC_OPTIONS.keys()


@pytest.mark.parametrize("name", ["llama", "embedding", "conv2d", "attention"])
def test_exotic_adapters_load(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    for seed in range(8):
        config = exotic_config(Random(seed), entry)
        folder = make_adapter(tmp_path / str(seed), entry, seed=seed, **config)
        assert fresh_output(entry, folder).isfinite().all()


def test_file_dtype(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = make_adapter(tmp_path, ZOO["mlp"], seed=0, file_dtype=torch.bfloat16, target_modules=["up"])
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


# --- oracle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    return make_adapter(folder, ZOO["vision"], seed=1, r=4, target_modules=list(ZOO["vision"].targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5", "mlp", "conv2d"])
def test_padding_stays_within_the_tolerance(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT's own padding, on the layers for which it has one."""
    entry = ZOO[name]
    folder = make_adapter(tmp_path, entry, seed=0, r=6, target_modules=list(entry.targets[:3]))
    model = fresh(entry, folder, dtype=dtype)
    inputs = entry.inputs(dtype=dtype)
    assert_same_output(entry.output(model, inputs), fresh_output(entry, folder, dtype=dtype), exact=True)
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    assert_same_output(entry.output(model, inputs), fresh_output(entry, folder, dtype=dtype))


def test_fresh_output_follows_the_file(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    first = fresh_output(entry, make_adapter(tmp_path, entry, seed=0, target_modules=["up"]))
    assert error(fresh_output(entry, make_adapter(tmp_path, entry, seed=1, target_modules=["up"])), first) > 0.01


def test_error_is_infinite_where_nothing_can_be_compared() -> None:
    one = torch.ones(3)
    assert error(one, one) == 0
    assert error(one, torch.ones(4)) == math.inf
    assert error(one, one.double()) == math.inf
    assert error(torch.tensor([1.0, 1.0, math.nan]), one) == math.inf
    with pytest.raises(AssertionError, match="relative error"):
        assert_same_output(one + 1e-3, one)
    with pytest.raises(AssertionError, match="not bitwise"):
        assert_same_output(one + 1e-6, one, exact=True)


def _flip_one_bit(tensor: torch.Tensor) -> None:
    tensor.data.view(-1).view(torch.uint8)[-1] ^= 1


def _module(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(f"base_model.model.{name}")


SPOILERS: dict[str, tuple[Callable[[PeftModel], object], str]] = {
    "base weight": (
        lambda m: _flip_one_bit(_module(m, "patch").base_layer.weight),
        "patch.base_layer.weight: data",
    ),
    "adapter weight": (lambda m: _flip_one_bit(_module(m, "mlp.fc1").lora_A["default"].weight), "fc1.lora_A"),
    "embedding adapter": (
        lambda m: _flip_one_bit(_module(m, "place").lora_embedding_B["default"]),
        "place.lora",
    ),
    "attention weight": (
        lambda m: _flip_one_bit(_module(m, "attention").base_layer.in_proj_weight),
        "in_proj_weight",
    ),
    "buffer": (lambda m: _flip_one_bit(_module(m, "norm").running_var), "norm.running_var"),
    "hidden buffer": (lambda m: _flip_one_bit(m.base_model.model.positions), "positions: data"),
    "address": (
        lambda m: _move(_module(m, "classifier").lora_B["default"].weight),
        "classifier.lora_B.*data_ptr",
    ),
    "identity": (
        lambda m: _replace(_module(m, "classifier").lora_B["default"]),
        "classifier.lora_B.*object_id",
    ),
    "requires_grad": (
        lambda m: _module(m, "patch").lora_A.requires_grad_(True),
        "patch.lora_A.*requires_grad",
    ),
    "gradient": (lambda m: setattr(_leaf(m), "grad", torch.zeros_like(_leaf(m))), "grad"),
    "scaling": (
        lambda m: _module(m, "patch").scaling.update(default=math.nextafter(2.0, 3)),
        "patch.scaling",
    ),
    "scaling's type": (
        lambda m: _module(m, "patch").scaling.update(default=torch.tensor(2.0)),
        "patch.scaling",
    ),
    "rank": (lambda m: _module(m, "patch").r.update(default=5), r"patch.r\['default'\]"),
    "alpha": (lambda m: _module(m, "patch").lora_alpha.update(default=9), "patch.lora_alpha"),
    "rslora": (lambda m: _module(m, "patch").use_rslora.update(default=True), "patch.use_rslora"),
    "adapter's name": (lambda m: _module(m, "patch").scaling.update(other=1.0), "patch.scaling"),
    "merged": (lambda m: _module(m, "patch").merged_adapters.append("default"), "patch.merged_adapters"),
    "disabled": (
        lambda m: setattr(_module(m, "patch"), "_disable_adapters", True),
        "patch._disable_adapters",
    ),
    "active": (lambda m: setattr(_module(m, "patch"), "_active_adapter", ["x"]), "patch._active_adapter"),
    "training": (lambda m: _module(m, "norm").train(), "norm.training"),
    "module": (lambda m: _module(m, "patch").lora_dropout.update({"default": nn.Dropout()}), "lora_dropout"),
    "config": (lambda m: setattr(m.peft_config["default"], "lora_alpha", 8.0), "peft_config.*lora_alpha"),
    "config in place": (lambda m: m.peft_config["default"].target_modules.discard("patch"), "target_modules"),
}


def _move(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.clone()


def _replace(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)


def _leaf(model: nn.Module) -> torch.Tensor:
    return _module(model, "patch").lora_A["default"].weight


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_snapshot_notices(spoiler: str, folder: Path) -> None:
    model = fresh(ZOO["vision"], folder)
    before = snapshot(model)
    assert_unchanged(before, snapshot(model))  # the control
    spoil, named = SPOILERS[spoiler]
    spoil(model)
    with pytest.raises(AssertionError, match=f"(?s)facts changed:.*{named}"):
        assert_unchanged(before, snapshot(model))


def test_snapshot_names_each_change_once(folder: Path) -> None:
    model = fresh(ZOO["vision"], folder)
    before = snapshot(model)
    _flip_one_bit(_module(model, "patch").base_layer.weight)
    (line,) = differences(before, snapshot(model))
    assert line.startswith("base_model.model.patch.base_layer.weight: data differs in 1 of 3072 bytes, first at 30")
    _flip_one_bit(_module(model, "patch").base_layer.weight)
    assert_unchanged(before, snapshot(model))


@ENTRIES
def test_walking_and_running_change_nothing(entry: Entry, tmp_path: Path) -> None:
    """PEFT's attention layers are spared the forward pass: they merge and unmerge at every one."""
    model = fresh(entry, make_adapter(tmp_path, entry, seed=0, r=4, target_modules=list(entry.targets)))
    before = snapshot(model)
    list(model.modules())
    model.state_dict()
    assert_unchanged(before, snapshot(model))
    if not any(isinstance(module, nn.MultiheadAttention) for module in entry.modules.values()):
        entry.output(model, entry.inputs())
        assert_unchanged(before, snapshot(model))


# --- the pair run


PLAIN = {"r": 4, "target_modules": ["up", "inner.0"]}
PAIR = random_pairs.Pair(0, ZOO["mlp"], (PLAIN, {**PLAIN, "r": 3}))


def _do_nothing(model: nn.Module, path: str, adapter_name: str, torch_device: str | None = None) -> None:
    pass


def _refuse(model: nn.Module, path: str, adapter_name: str, torch_device: str | None = None) -> None:
    raise ValueError("no\nmore")


def _break_off(model: nn.Module, path: str, adapter_name: str, torch_device: str | None = None) -> None:
    _flip_one_bit(next(model.parameters()))
    raise ValueError("no")


@pytest.mark.parametrize(
    ("swap", "verdict"),
    [(hotswap_adapter, "right"), (_do_nothing, "wrong"), (_refuse, "refused"), (_break_off, "half_done")],
)
def test_each_verdict_is_reached(swap: random_pairs.Swap, verdict: str, tmp_path: Path) -> None:
    outcome = random_pairs.judge(PAIR, swap, tmp_path)
    assert outcome.verdict == verdict
    if verdict == "refused":
        assert outcome.reason == "ValueError: no"


def test_pairs_depend_on_the_seed_alone() -> None:
    drawn = list(random_pairs.draw(30, 7))
    assert drawn == list(random_pairs.draw(30, 7))
    assert drawn[:10] == list(random_pairs.draw(10, 7))
    assert drawn != list(random_pairs.draw(30, 8))


def test_run_counts_every_pair() -> None:
    counts = random_pairs.run(6, 0, _refuse, entries=("mlp", "conv1d"))
    assert counts.refused == 6
    assert counts.reasons == {"refused: ValueError: no": 6}
    assert (counts.right, counts.wrong, counts.half_done) == (0, 0, 0)
