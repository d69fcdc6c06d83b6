"""Any method of PEFT, merged into the base weights: bit for bit what PEFT's own `merge_and_unload` gives."""

from __future__ import annotations

import copy
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, OFTConfig, PeftModel, PeftType, get_peft_model, load_peft_weights
from safetensors.torch import load_file, save_file
from torch import nn

import hotslot
from adapters import make_adapter
from compiling import Backend
from hotslot.errors import ConfigError, HotslotError, MergedError, ModelError, NonFiniteError, UnsupportedError
from hotslot.live.low_rank import LowRank
from hotslot.live.merges import Rotated, Scaled
from hotslot.live.pristine import InFile
from hotslot.testing import no_recompile, same_addresses
from methods import METHODS, Method, fresh_merge, make_method_adapter, tensors_of
from oracle import assert_same_output, assert_unchanged, fresh, fresh_output, snapshot
from zoo import ZOO

DTYPES = [torch.float32, torch.bfloat16]
MERGING = [(name, entry) for name, method in METHODS.items() if method.merges for entry in method.targets]


def assert_same_tensors(model: nn.Module, want: dict[str, torch.Tensor]) -> None:
    got = tensors_of(model)
    assert got.keys() == want.keys()
    for name, values in want.items():
        assert torch.equal(got[name].reshape(-1).view(torch.uint8), values.reshape(-1).view(torch.uint8)), name


def addresses(model: nn.Module) -> dict[str, int]:
    return {name: param.data_ptr() for name, param in model.named_parameters(remove_duplicate=False)}


def needed(name: str) -> Method:
    method = METHODS[name]
    if not method.available:
        pytest.skip(f"PEFT needs {method.needs} for {name}")
    return method


def test_every_method_of_peft_has_a_row() -> None:
    assert sorted(METHODS) == sorted(kind.value for kind in PeftType)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "entry"), MERGING)
def test_merged_weights_are_those_of_peft(name: str, entry: str, dtype: torch.dtype, tmp_path: Path) -> None:
    needed(name)
    folders = [make_method_adapter(tmp_path / str(seed), name, ZOO[entry], seed=seed, dtype=dtype) for seed in (1, 2)]
    model = ZOO[entry].build(dtype=dtype)
    before, places = tensors_of(model), addresses(model)
    swapper = hotslot.attach(model, {str(i): folder for i, folder in enumerate(folders)}, route="merged")
    assert_same_tensors(model, before)
    for number in (0, 1, 0):
        report = swapper.activate(str(number))
        assert report.route == "merged"
        want = fresh_merge(ZOO[entry], folders[number], dtype=dtype)
        assert any(not torch.equal(want[key], before[key]) for key in before)
        assert_same_tensors(model, want)
    swapper.deactivate()
    assert_same_tensors(model, before)
    assert addresses(model) == places
    swapper.activate("1")
    swapper.detach()
    assert_same_tensors(model, before)
    assert addresses(model) == places


SWAPS = {"llama": 600, "gpt2": 150, "conv2d": 150, "embedding": 100}
ON = {  # on each model, beside the rows that name it
    "gpt2": {"IA3": {"target_modules": ["c_attn", "c_fc"], "feedforward_modules": ["c_fc"]}, "LN_TUNING": {
        "target_modules": ["ln_1"]}, "TRAINABLE_TOKENS": {"token_indices": [4, 7]}},
    "embedding": {"TRAINABLE_TOKENS": {"token_indices": [4, 7], "target_modules": ["word"]}},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("entry", SWAPS)
def test_weights_depend_on_what_is_live_and_on_nothing_before(entry: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A thousand random swaps in all, among more than twenty methods, unloading and loading in between."""
    rows: dict[str, dict[str, Any]] = {
        name: {} for name, method in METHODS.items() if method.merges and method.available and entry in method.targets
    }
    rows |= ON.get(entry, {})
    zoo = ZOO[entry]
    folders = {
        name: make_method_adapter(tmp_path / name, name, zoo, seed=1, dtype=dtype, **options)
        for name, options in rows.items()
    }
    want = {name: fresh_merge(zoo, folder, dtype=dtype) for name, folder in folders.items()}
    model = zoo.build(dtype=dtype)
    base, places = tensors_of(model), addresses(model)
    swapper = hotslot.attach(model, folders, route="merged")
    rng = random.Random(0)
    for _ in range(SWAPS[entry]):
        name = rng.choice([*folders, None])
        if name is None:
            swapper.deactivate()
            assert_same_tensors(model, base)
            continue
        swapper.activate(name)
        assert_same_tensors(model, want[name])
    assert addresses(model) == places
    swapper.detach()
    assert_same_tensors(model, base)


def test_a_plain_lora_is_merged_in_one_pass(tmp_path: Path) -> None:
    """PEFT's bits without PEFT's layer: with a scaling that is a power of two, and with others; [in, out] weights."""
    for entry, targets in (("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_proj"])):
        for alpha in (4, 3, 2.5):
            folder = make_adapter(
                tmp_path / f"{entry}{alpha}", ZOO[entry], seed=0, r=4, lora_alpha=alpha, target_modules=targets
            )
            swapper = hotslot.attach(model := ZOO[entry].build(), {"a": folder}, route="merged")
            merges = merges_of(swapper, "a")
            assert {type(merge) for merge in merges} == {LowRank}
            swapper.activate("a")
            assert_same_tensors(model, fresh_merge(ZOO[entry], folder))


class Wide(nn.Module):
    """Layers as large as those of which torch multiplies matrices by blocks."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(256, 512, dtype=dtype)
        self.down = nn.Linear(512, 256, bias=False, dtype=dtype)


MULTIPLICATIONS: list[tuple[type, Any]] = [
    (Rotated, OFTConfig(r=0, oft_block_size=16, target_modules=["up", "down"])),
    (Rotated, OFTConfig(r=0, oft_block_size=32, block_share=True, target_modules=["up", "down"])),
    (Scaled, IA3Config(target_modules=["up", "down"], feedforward_modules=["down"])),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "config"), MULTIPLICATIONS)
def test_what_is_one_multiplication_is_done_as_one(kind: type, config: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT's bits without PEFT's layer, which multiplies a weight by all the zeros around OFT's blocks."""
    torch.manual_seed(0)
    base = Wide(dtype)
    tuned = get_peft_model(copy.deepcopy(base), config)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(str(tmp_path))
    want: Any = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval().merge_and_unload()
    swapper = hotslot.attach(model := copy.deepcopy(base), {"a": tmp_path}, route="merged")
    assert {type(merge) for merge in merges_of(swapper, "a")} == {kind}
    for _ in range(2):
        swapper.activate("a")
        assert_same_tensors(model, tensors_of(want))
        swapper.deactivate()
        assert_same_tensors(model, tensors_of(base))


def test_what_merges_are_computed_from_is_counted(tmp_path: Path) -> None:
    """A norm's merged values are kept themselves, a LoHa's matrices in PEFT's layers, apart from the file's."""
    entry = ZOO["llama"]
    for name in ("LN_TUNING", "LOHA"):
        folder = make_method_adapter(tmp_path / name, name, entry, seed=1)
        in_file = sum(tensor.nbytes for tensor in load_peft_weights(str(folder)).values())
        swapper = hotslot.attach(entry.build(), {"a": folder}, route="merged")
        assert swapper.host_bytes == 2 * in_file
        swapper.unload("a")
        assert swapper.host_bytes == 0


def merges_of(swapper: hotslot.Swapper, name: str) -> tuple[Any, ...]:
    return swapper._library.peek(name).compile(swapper.engine.binding).merges.all


LORA_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("bert", {"target_modules": ["query"], "bias": "all"}),
    ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
    ("mlp", {"target_modules": ["up"], "use_dora": True}),
    ("mlp", {"target_modules": ["up"], "lora_bias": True}),
    ("conv2d", {"target_modules": ["stem", "head"], "use_dora": True}),
    ("embedding", {"target_modules": ["word", "mix"], "use_rslora": True}),
    ("attention", {"target_modules": ["batch_first", "mix"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("vision", {"target_modules": ["fc1"], "modules_to_save": ["norm"]}),
    ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
    ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "olora"}),
    ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}),
    ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [5, 6]}}),
    ("llama", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
]


@pytest.mark.parametrize(("entry", "options"), LORA_OPTIONS, ids=[f"{name}-{o}" for name, o in LORA_OPTIONS])
def test_options_of_lora_are_merged(entry: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder = make_adapter(tmp_path, ZOO[entry], seed=1, r=2, **options)
    model = ZOO[entry].build()
    before = snapshot(model)
    swapper = hotslot.attach(model, {"a": folder}, route="merged")
    swapper.activate("a")
    assert_same_tensors(model, fresh_merge(ZOO[entry], folder))
    assert_same_output(ZOO[entry].output(model, ZOO[entry].inputs()), fresh_output(ZOO[entry], folder))
    swapper.detach()
    assert_unchanged(before, snapshot(model))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"target_modules": ["lm_head"]}, "tied"),
    ("gpt2", {"target_modules": ["wte"]}, "tied"),
    ("conv2d", {"target_modules": ["grouped"]}, "groups > 1"),
    ("llama", {"target_modules": ["q_proj"], "alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}, "aLoRA"),
    ("llama", {"target_modules": ["q_proj"], "layer_replication": [(0, 2), (1, 3)]}, "how many layers"),
]


@pytest.mark.parametrize(("entry", "options", "words"), REFUSED, ids=[f"{name}-{o}" for name, o, _ in REFUSED])
def test_what_cannot_be_merged_is_refused(entry: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path, ZOO[entry], seed=1, r=2, **options)
    model = ZOO[entry].build()
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=words):
        hotslot.attach(model, {"a": folder}, route="merged")
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.merges])
def test_methods_that_do_not_merge_are_refused_by_name(name: str) -> None:
    source = hotslot.checkpoint.from_tensors({"x": torch.zeros(1)}, {"peft_type": name}, origin="mine")
    model = ZOO["llama"].build()
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match="cannot be merged") as refusal:
        hotslot.attach(model, {"a": source})
    assert name in str(refusal.value)
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("name", ["LOHA", "IA3", "VERA", "OFT"])
def test_adapters_of_another_model_are_refused(name: str, tmp_path: Path) -> None:
    folder = make_method_adapter(tmp_path / "a", name, ZOO["llama"], seed=0)
    other = ZOO["llama"].build()
    for layer in other.model.layers[1:]:
        layer.self_attn.q_proj = nn.Linear(20, 20)
    before = snapshot(other)
    swapper = hotslot.attach(other)
    with pytest.raises(HotslotError):
        swapper.load("a", folder)
    assert not swapper.fits(folder)
    assert_unchanged(before, snapshot(other))
    cut = hotslot.checkpoint.read(folder)
    tensors = {key: cut.tensor(key) for key in list(cut.tensors)[1:]}
    swapper = hotslot.attach(model := ZOO["llama"].build())
    with pytest.raises(HotslotError, match="lacks a tensor"):
        swapper.load("a", tensors, config=dict(cut.config))
    assert swapper.adapters == ()
    assert_same_tensors(model, tensors_of(ZOO["llama"].build()))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("VERA", {"r": 10**9}),
        ("LOHA", {"target_modules": "(a+)+$"}),
        ("LOHA", {"rank_pattern": {"(.*.*)*x": 2}}),
        ("OFT", {"target_modules": None}),
        ("IA3", {"unknown_option": 5}),
        ("IA3", {"task_type": "NO_SUCH_TASK"}),
        ("C3A", {"block_size": 7}),
        ("VBLORA", {"num_vectors": -1}),
    ],
)
def test_hostile_configs_are_refused(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = hotslot.checkpoint.read(make_method_adapter(tmp_path, name, ZOO["llama"], seed=0))
    tensors = {key: source.tensor(key) for key in source.tensors}
    model = ZOO["llama"].build()
    before = snapshot(model)
    swapper = hotslot.attach(model)
    with pytest.raises(HotslotError):
        swapper.load("a", tensors, config={**source.config, **changes})
    swapper.detach()
    assert_unchanged(before, snapshot(model))


# --- auto: what slots cannot hold -----------------------------------------------------------------------------------


def test_auto_merges_what_slots_cannot_hold_and_nothing_else(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    small = make_adapter(tmp_path / "small", entry, seed=0, r=2, target_modules=["up", "inner.0"])
    wide = make_adapter(
        tmp_path / "wide", entry, seed=1, r=4, rank_pattern={"inner.0": 2}, target_modules=["up", "inner.0", "down"]
    )
    loha = make_method_adapter(tmp_path / "loha", "LOHA", entry, seed=2, target_modules=["up", "down"])
    model = entry.build()
    swapper = hotslot.attach(model, {"small": small})
    base = model.state_dict()["inner.0.base_layer.weight"].clone()
    for name, folder, route in (("wide", wide, "side+merged"), ("loha", loha, "merged"), ("small", small, "side")):
        assert swapper.fits(folder).route == route
        swapper.load(name, folder)
    rng = random.Random(0)
    for _ in range(30):
        name = rng.choice(["small", "wide", "loha", None])
        if name is None:
            swapper.deactivate()
            want = entry.output(entry.build(), entry.inputs())
        else:
            report = swapper.activate(name)
            assert report.route == {"small": "side", "wide": "side+merged", "loha": "merged"}[name]
            want = fresh_output(entry, tmp_path / name)
        assert_same_output(entry.output(model, entry.inputs()), want, exact=name in ("small", None))
        assert torch.equal(model.state_dict()["inner.0.base_layer.weight"], base)  # a slot holds it


def test_side_merges_nothing(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    model = entry.build()
    swapper = hotslot.attach(model, {"a": make_adapter(tmp_path / "a", entry, seed=0, r=2, target_modules=["up"])},
                             route="side")  # fmt: skip
    loha = make_method_adapter(tmp_path / "loha", "LOHA", entry, seed=2, target_modules=["up"])
    with pytest.raises(UnsupportedError, match="another method"):
        swapper.load("loha", loha)
    assert swapper.fits(loha).route is None


# --- compiled -------------------------------------------------------------------------------------------------------


def test_swaps_between_methods_compile_nothing(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    names = ["LORA", "LOHA", "OFT", "IA3", "LN_TUNING", "TRAINABLE_TOKENS"]
    folders = {name: make_method_adapter(tmp_path / name, name, entry, seed=1) for name in names}
    model = entry.build()
    backend = Backend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    swapper = hotslot.attach(compiled, route="merged")
    base = entry.output(compiled, entry.inputs())
    graphs = backend.graphs
    with no_recompile(), same_addresses(model):
        for name in [*names, *reversed(names)]:
            swapper.load(name, folders[name])
            swapper.activate(name)
            assert_same_output(entry.output(compiled, entry.inputs()), fresh_output(entry, folders[name]))
        swapper.deactivate()
        assert torch.equal(entry.output(compiled, entry.inputs()), base)
    assert backend.graphs == graphs


def test_pefts_way_to_another_method_compiles_anew(tmp_path: Path) -> None:
    """The control of the test above."""
    entry = ZOO["llama"]
    folders = {name: make_method_adapter(tmp_path / name, name, entry, seed=1) for name in ("LORA", "IA3")}
    backend = Backend()
    model: Any = PeftModel.from_pretrained(entry.build(), str(folders["LORA"])).eval()
    torch.compile(model, backend=backend)(**entry.inputs())
    graphs = backend.graphs
    other = PeftModel.from_pretrained(model.unload(), str(folders["IA3"])).eval()
    torch.compile(other, backend=backend)(**entry.inputs())
    assert backend.graphs > graphs


# --- what it costs --------------------------------------------------------------------------------------------------


def test_fits_says_what_a_merge_costs(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    folder = make_method_adapter(tmp_path / "loha", "LOHA", entry, seed=1, target_modules=["q_proj"])
    swapper = hotslot.attach(model := entry.build(), {"a": folder})
    fit, weights = swapper.fits(folder), [layer.self_attn.q_proj.weight for layer in model.model.layers]
    assert fit.route == "merged"
    assert fit.pristine_bytes == fit.nbytes == sum(weight.nbytes for weight in weights)
    assert fit.seconds > 0
    assert fit.pristine.keys() == {"device", "host"}, "a model that was not loaded has no file"
    assert all(cost.nbytes == fit.pristine_bytes and cost.seconds > 0 for cost in fit.pristine.values())
    report = swapper.activate("a")
    assert (report.route, report.nbytes, report.error) == ("merged", fit.nbytes, None)


def test_fits_where_no_larger_plan_would_take_it(tmp_path: Path) -> None:
    entry = ZOO["embedding"]
    tokens = make_adapter(
        tmp_path / "tokens", entry, seed=0, target_modules=["mix"], trainable_token_indices={"word": [4]}
    )
    word = make_adapter(tmp_path / "word", entry, seed=1, target_modules=["word"])
    swapper = hotslot.attach(model := entry.build(), {"tokens": tokens})
    fit = swapper.fits(word)
    assert (fit.route, fit.plan) == ("merged", None), "no slot beside tokens of the same module"
    swapper.load("word", word)
    assert swapper.activate("word").route == "merged"
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, word))


def test_fits_prices_every_place_for_pristine_values(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    folder = make_method_adapter(tmp_path / "loha", "LOHA", entry, seed=1)
    entry.build().save_pretrained(tmp_path / "base")
    model = type(entry.build()).from_pretrained(tmp_path / "base").eval()
    swapper = hotslot.attach(model, {"a": folder}, route="merged")
    for _ in range(2):  # also while it is live
        costs = swapper.fits(folder).pristine
        assert costs.keys() == {"device", "host", "file"}
        assert costs["file"].nbytes == 0
        assert all(cost.seconds > 0 for cost in costs.values())
        swapper.activate("a")
        assert swapper.pristine_bytes == costs["device"].nbytes == costs["host"].nbytes
        assert_same_tensors(model, fresh_merge(entry, folder))


def test_the_rounding_error_of_16_bits_is_told(tmp_path: Path) -> None:
    """As the merged weights themselves show it, beside a merge in 32 bits."""
    entry = ZOO["llama"]
    folder = make_adapter(tmp_path, entry, seed=0, r=4, lora_alpha=3, target_modules=["q_proj"])
    model = entry.build(dtype=torch.bfloat16)
    base, exact = tensors_of(model), PeftModel.from_pretrained(entry.build(dtype=torch.bfloat16).float(), str(folder))
    want = tensors_of(exact.merge_and_unload())
    swapper = hotslot.attach(model, {"a": folder}, route="merged")
    report = swapper.activate("a")
    got, errors = tensors_of(model), []
    for name in base:
        effect = (want[name] - base[name].float()).norm()
        if effect > 0:
            errors.append(float((got[name].float() - want[name]).norm() / effect))
    assert report.error == pytest.approx(max(errors), rel=1e-3)
    assert swapper.fits(folder).error == report.error
    assert 1e-4 < report.error < 0.1


# --- blends ---------------------------------------------------------------------------------------------------------


def blended_by_peft(entry: Any, folders: dict[str, Path], weights: dict[str, float]) -> dict[str, torch.Tensor]:
    first, *others = weights
    model: Any = PeftModel.from_pretrained(entry.build(), str(folders[first]), adapter_name=first)
    for name in others:
        model.load_adapter(str(folders[name]), adapter_name=name)
    model.add_weighted_adapter(list(weights), list(weights.values()), "blend", combination_type="cat")
    model.set_adapter("blend")
    return tensors_of(model.eval().merge_and_unload())


def assert_close(model: nn.Module, want: dict[str, torch.Tensor]) -> None:
    """Within a rounding or two: the sum of a blend's products is not rounded before it is added."""
    for name, values in tensors_of(model).items():
        torch.testing.assert_close(values, want[name], rtol=1e-6, atol=1e-6)


# Two of the mlp's layers are of sizes for which one multiplication that adds to the weight does not give PEFT's bits.
@pytest.mark.parametrize(("entry", "targets"), [("llama", [["q_proj", "v_proj"], ["q_proj", "down_proj"]]),
                                                ("gpt2", [["c_attn"], ["c_attn", "c_proj"]]),
                                                ("mlp", [["up", "inner.2"], ["inner.2", "down"]])])  # fmt: skip
def test_blends_of_merged_adapters_are_those_of_peft(entry: str, targets: list[list[str]], tmp_path: Path) -> None:
    zoo = ZOO[entry]
    folders = {
        name: make_adapter(tmp_path / name, zoo, seed=i, r=2 + i, lora_alpha=4 + i, target_modules=targets[i])
        for i, name in enumerate("ab")
    }
    model = zoo.build()
    before = tensors_of(model)
    swapper = hotslot.attach(model, folders, route="merged")
    for weights in ({"a": 0.7, "b": 1.0}, {"a": -0.5, "b": 0.25}, {"a": 1.0, "b": 0.0}, {"b": 0.3}):
        report = swapper.activate(weights)
        assert report.route == "merged"
        assert_close(model, blended_by_peft(zoo, folders, weights))
        swapper.activate("a")
    assert_same_tensors(model, fresh_merge(zoo, folders["a"]))
    swapper.rollback()
    assert_close(model, blended_by_peft(zoo, folders, {"b": 0.3}))
    swapper.deactivate()
    assert_same_tensors(model, before)


def test_an_adapter_that_does_nothing_is_blended(tmp_path: Path) -> None:
    """One that is not trained yet: nothing of it is merged, and its blends were refused as tensors of another kind."""
    zoo = ZOO["llama"]
    folders = {
        name: make_adapter(tmp_path / name, zoo, seed=i, target_modules=["q_proj"]) for i, name in enumerate("ab")
    }
    weights = folders["b"] / "adapter_model.safetensors"
    save_file({name: tensor * ("lora_A" in name) for name, tensor in load_file(weights).items()}, weights)
    model = zoo.build()
    before = tensors_of(model)
    swapper = hotslot.attach(model, folders, route="merged")
    for blend in ({"b": 0.5}, {"a": 0.5, "b": 2.0}, {"a": 0.5}):
        swapper.activate(blend)
        assert_close(model, blended_by_peft(zoo, folders, blend))
    swapper.activate({"b": 3.0})
    assert_same_tensors(model, before)


def test_what_does_not_add_up_is_not_blended(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    lora = make_adapter(tmp_path / "lora", entry, seed=0, r=2, target_modules=["q_proj"])
    loha = make_method_adapter(tmp_path / "loha", "LOHA", entry, seed=1)
    model = entry.build()
    for swapper, words in (
        (hotslot.attach(model, {"lora": lora, "loha": loha}, route="merged"), "do not add up"),
        (hotslot.attach(entry.build(), {"lora": lora, "loha": loha}), "others that slots hold"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            swapper.activate({"lora": 0.5, "loha": 0.5})
        with pytest.raises(HotslotError):
            swapper.activate({"loha": 0.5})
        assert swapper.active is None
    assert_same_tensors(model, tensors_of(entry.build()))
    swapper = hotslot.attach(entry.build(), {"lora": lora}, route="merged")
    with pytest.raises(NonFiniteError):
        swapper.activate({"lora": 1e300})


# --- where the base's own values wait, and how they are summed up ---------------------------------------------------


def _kept(model: nn.Module, pristine: str) -> Any:
    return hotslot.plan(model, pristine=pristine) if pristine != "device" else None


@pytest.mark.parametrize("pristine", ["device", "host", "file"])
def test_pristine_values_come_back_from_everywhere(pristine: str, tmp_path: Path) -> None:
    entry = ZOO["llama"]
    entry.build().save_pretrained(tmp_path / "base")
    model = type(entry.build()).from_pretrained(tmp_path / "base").eval()
    folders = {
        name: make_method_adapter(tmp_path / name, name, entry, seed=1) for name in ("LORA", "LOHA", "LN_TUNING")
    }
    before = tensors_of(model)
    swapper = hotslot.attach(model, folders, route="merged", plan=_kept(model, pristine))
    for _ in range(2):
        for name, folder in folders.items():
            swapper.activate(name)
            assert_same_tensors(model, fresh_merge(entry, folder))
        swapper.deactivate()
        assert_same_tensors(model, before)
    in_file = [site.store for site in swapper.engine.binding.absolutes.sites.values() if isinstance(site.store, InFile)]
    assert len(in_file) == (12 if pristine == "file" else 0)


def test_a_file_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    entry.build(seed=3).save_pretrained(tmp_path / "other")
    folder = make_method_adapter(tmp_path / "a", "LOHA", entry, seed=1)
    plain = entry.build()
    with pytest.raises(ModelError, match="no checkpoint of safetensors"):
        hotslot.attach(plain, {"a": folder}, plan=hotslot.plan(plain, pristine="file"))
    model = type(plain).from_pretrained(tmp_path / "other").eval()
    model.load_state_dict(plain.state_dict())
    before = snapshot(model)
    with pytest.raises(ModelError, match="does not have what the model holds"):
        hotslot.attach(model, {"a": folder}, plan=hotslot.plan(model, pristine="file"))
    assert_unchanged(before, snapshot(model))
    with pytest.raises(ValueError, match="pristine must be"):
        hotslot.plan(model, pristine="elsewhere")
    with pytest.raises(ValueError, match="merge must be"):
        hotslot.plan(model, merge="twice")


def merged_in_float64(entry: Any, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model: Any = PeftModel.from_pretrained(entry.build(dtype=dtype), str(folder)).eval().double()
    return tensors_of(model.merge_and_unload())


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("entry", ["llama", "gpt2"])
def test_a_fused_merge_is_no_less_exact_than_pefts(entry: str, dora: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    zoo, targets = ZOO[entry], {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}[entry]
    for seed, alpha in enumerate((3, 4, 5, 7, 11)):
        config: dict[str, Any] = {"r": 8, "lora_alpha": alpha, "target_modules": targets, "use_dora": dora}
        folder = make_adapter(tmp_path / str(seed), zoo, seed=seed, **config)
        model = zoo.build(dtype=dtype)
        base = tensors_of(model)
        swapper = hotslot.attach(model, {"a": folder}, route="merged", plan=hotslot.plan(model, merge="fused"))
        swapper.activate("a")
        got, exact, peft = (
            tensors_of(model),
            merged_in_float64(zoo, folder, dtype),
            fresh_merge(zoo, folder, dtype=dtype),
        )
        ours, theirs = (
            sum(float((one[name].double() - exact[name]).norm() ** 2) for name in base) ** 0.5 for one in (got, peft)
        )
        assert 0 < ours <= theirs * (1 + 1e-6)
        swapper.deactivate()
        assert_same_tensors(model, base)
        swapper.activate("a")
        assert_same_tensors(model, got)


def test_pristine_memory_is_that_of_the_weights_that_loaded_adapters_touch(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    folders = {
        name: make_method_adapter(tmp_path / name, "LOHA", entry, seed=1, target_modules=[name])
        for name in ("q_proj", "down_proj")
    }
    model = entry.build()
    before = tensors_of(model)
    swapper = hotslot.attach(model, folders, route="merged")
    assert swapper.pristine_bytes == 0
    sizes = {name: swapper.fits(folder).pristine_bytes for name, folder in folders.items()}
    swapper.activate("q_proj")
    assert swapper.pristine_bytes == sizes["q_proj"]
    swapper.activate("down_proj")
    assert swapper.pristine_bytes == sum(sizes.values())
    swapper.unload("q_proj")  # it was live before: rollback may need it
    assert swapper.pristine_bytes == sum(sizes.values())
    swapper.deactivate()
    swapper.load("other", folders["down_proj"])
    swapper.unload("other")
    assert swapper.pristine_bytes == sizes["down_proj"]
    swapper.activate("down_proj")
    assert_same_tensors(model, fresh_merge(entry, folders["down_proj"]))
    swapper.detach()
    assert_same_tensors(model, before)


def test_unloading_leaves_the_biases_that_another_adapter_has_others_for(tmp_path: Path) -> None:
    entry = ZOO["bert"]
    norms = make_method_adapter(tmp_path / "norms", "LN_TUNING", entry, seed=1)
    biases = make_adapter(tmp_path / "biases", entry, seed=2, target_modules=["query"], bias="all")
    swapper = hotslot.attach(model := entry.build(), {"norms": norms, "biases": biases})
    swapper.unload("norms")
    swapper.activate("biases")
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, biases), exact=True)
    swapper.deactivate()
    assert_same_output(entry.output(model, entry.inputs()), entry.output(entry.build(), entry.inputs()), exact=True)


def test_a_block_swaps_back_to_what_was_unloaded_within_it(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    folders = {name: make_method_adapter(tmp_path / name, name, seed=1) for name in ("LN_TUNING", "LOHA", "IA3")}
    swapper = hotslot.attach(model := entry.build(), folders, route="merged")
    swapper.activate("LN_TUNING")
    with swapper.using("LOHA"):
        with swapper.using("IA3"):
            pass
        swapper.unload("LN_TUNING")
    assert_same_tensors(model, fresh_merge(entry, folders["LN_TUNING"]))


def test_patterns_are_bounded_over_all_modules_that_peft_asks_for(tmp_path: Path) -> None:
    """One path alone it would match in good time."""
    entry = ZOO["llama"]
    source = hotslot.checkpoint.read(make_method_adapter(tmp_path, "LOHA", entry, seed=0))
    tensors = {key: source.tensor(key) for key in source.tensors}
    swapper = hotslot.attach(model := entry.build())
    started = time.process_time()
    with pytest.raises(ConfigError, match="steps on all paths"):
        swapper.load("a", tensors, config={**source.config, "target_modules": ".*.*.*.*(q|v)_proj"})
    assert time.process_time() - started < 2
    assert_same_tensors(model, tensors_of(entry.build()))


@pytest.mark.parametrize(("name", "entry"), [(name, entry) for name, entry in MERGING if name != "LORA"])
def test_from_lora_to_the_method_and_back(name: str, entry: str, tmp_path: Path) -> None:
    """A LoRA in its slots, the method in the base weights, on one model, in any order."""
    needed(name)
    zoo = ZOO[entry]
    folders = {
        "lora": make_adapter(tmp_path / "lora", zoo, seed=0, r=2, target_modules=LORA_TARGETS[entry]),
        "other": make_method_adapter(tmp_path / "other", name, zoo, seed=1),
    }
    model = zoo.build()
    swapper = hotslot.attach(model, folders)
    base = zoo.output(zoo.build(), zoo.inputs())
    want = {"other": merged_output(zoo, folders["other"]), "lora": fresh_output(zoo, folders["lora"]), None: base}
    for live in ("lora", "other", "lora", None, "other", None):
        report = swapper.activate(live) if live else swapper.deactivate()
        assert live is None or report.route == {"lora": "side", "other": "merged"}[live]
        assert_same_output(zoo.output(model, zoo.inputs()), want[live], exact=entry != "conv2d")


LORA_TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "conv2d": ["stem"], "embedding": ["mix"],
                "bert": ["query"]}  # fmt: skip


def merged_output(zoo: Any, folder: Path) -> torch.Tensor:
    """Of a new base that PEFT has merged the adapter into."""
    model = zoo.build()
    with torch.no_grad():
        named = dict(model.named_parameters(remove_duplicate=False))
        for path, values in fresh_merge(zoo, folder).items():
            if path in named:
                named[path].copy_(values)
    return zoo.output(model, zoo.inputs())


def test_a_merged_adapter_is_not_saved_as_empty_slots(tmp_path: Path) -> None:
    """Contract 4: PEFT would write the slots, which hold nothing, and say that this is the adapter."""
    entry = ZOO["llama"]
    targets = list(entry.targets)[:2]
    lora = make_adapter(tmp_path / "lora", entry, seed=1, r=4, target_modules=targets)
    loha = make_method_adapter(tmp_path / "loha", "LOHA", entry, seed=2)
    for model in (fresh(entry, lora), entry.build()):
        swapper = hotslot.attach(model, adapters={"lora": lora, "loha": loha})
        for _ in range(2):
            swapper.activate("loha")
            with pytest.raises(MergedError, match="empty slots"):
                model.save_pretrained(tmp_path / "saved")
            assert not (tmp_path / "saved").exists()
            swapper.activate("lora")
            model.save_pretrained(tmp_path / "right")
            assert_same_output(
                entry.output(fresh(entry, tmp_path / "right"), entry.inputs()), fresh_output(entry, lora)
            )
        swapper.activate("loha")
        swapper.detach()
        model.save_pretrained(tmp_path / "detached")


def test_one_slot_s_merged_adapter_is_not_saved_because_another_slot_is_let_go(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    lora = make_adapter(tmp_path / "lora", entry, seed=1, r=4, target_modules=list(entry.targets)[:2])
    loha = make_method_adapter(tmp_path / "loha", "LOHA", entry, seed=2)
    model = entry.build()
    first = hotslot.attach(model, {"lora": lora, "loha": loha})
    first.activate("loha")
    second = hotslot.attach(model, {"lora": lora}, adapter_name="second")
    second.activate("lora")
    second.detach()
    with pytest.raises(MergedError, match="slot 'default'"):
        model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]


def test_two_swappers_do_not_merge_into_the_same_weight(tmp_path: Path) -> None:
    """Each would keep the other's values as the model's own, and put those back."""
    entry = ZOO["mlp"]
    named = {"x": ("LOHA", ["up"]), "y": ("LORA", ["up", "down"]), "z": ("LORA", ["down"])}
    folders = {
        name: make_method_adapter(tmp_path / name, method, entry, seed=seed, target_modules=targets)
        for seed, (name, (method, targets)) in enumerate(named.items(), 1)
    }
    model = entry.build()
    own = tensors_of(model)
    first = hotslot.attach(model, {"x": folders["x"]}, route="merged", adapter_name="first")
    first.activate("x")
    second = hotslot.attach(model, route="merged", adapter_name="second")
    with pytest.raises(UnsupportedError, match=r"Two swappers[^$]*up\.weight[^$]*'first'"):
        second.load("y", folders["y"])
    second.load("z", folders["z"])
    second.activate("z")
    first.detach()
    second.load("y", folders["y"])
    second.activate("y")
    second.detach()
    assert all(torch.equal(tensor, own[name]) for name, tensor in tensors_of(model).items())


@pytest.mark.parametrize("first", ["merged", "saved"])
def test_one_swapper_does_not_merge_into_what_another_has_a_copy_of(first: str, tmp_path: Path) -> None:
    """The copy would keep what was merged, or hide it."""
    entry = ZOO["embedding"]
    merged = make_method_adapter(tmp_path / "merged", "LORA", entry, seed=1, target_modules=["head"])
    saved = make_adapter(tmp_path / "saved", entry, seed=2, target_modules=["mix"], modules_to_save=["head"])
    model = entry.build()
    own = tensors_of(model)
    ways: dict[str, Any] = {"merged": ({"a": merged}, "one", "merged"), "saved": ({"a": saved}, "two", "auto")}
    adapters, name, route = ways.pop(first)
    swapper = hotslot.attach(model, adapters, adapter_name=name, route=route)
    swapper.activate("a")
    before = snapshot(model)
    (adapters, name, route) = next(iter(ways.values()))
    with pytest.raises(UnsupportedError, match=r"Two swappers[^$]*head\.weight"):
        hotslot.attach(model, adapters, adapter_name=name, route=route)
    assert_unchanged(before, snapshot(model))
    swapper.detach()
    assert_same_tensors(model, own)


def test_unloading_looks_at_no_more_adapters_where_more_are_loaded(tmp_path: Path) -> None:
    zoo = ZOO["mlp"]
    folders = {
        f"{i:02}": make_adapter(tmp_path / str(i), zoo, seed=i, r=2, target_modules=["up", "down"]) for i in range(12)
    }

    def calls(count: int) -> int:
        swapper = hotslot.attach(zoo.build(), dict(list(folders.items())[:count]), route="merged")
        entered: list[str] = []
        sys.setprofile(lambda frame, event, _: entered.append(frame.f_code.co_name) if event == "call" else None)
        try:
            swapper.unload("01")
        finally:
            sys.setprofile(None)
        return entered.count("compile")

    assert calls(12) == calls(4) > 0


def test_slots_that_have_grown_take_what_was_merged(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    small = make_adapter(tmp_path / "small", entry, seed=0, r=2, target_modules=["up"])
    wide = make_adapter(tmp_path / "wide", entry, seed=1, r=4, target_modules=["up", "down"])
    model = entry.build()
    swapper = hotslot.attach(model, {"small": small})
    swapper.load("wide", wide)
    assert swapper.activate("wide").route == "merged"
    plan = swapper.fits(wide).plan
    swapper.grow(plan)
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, wide))
    report = swapper.activate("wide")
    assert (report.route, report.changed) == ("side", True)
    assert torch.equal(model.state_dict()["down.base_layer.weight"], entry.build().state_dict()["down.weight"])
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, wide), exact=True)
    assert not swapper.activate("wide").changed


def test_a_model_without_slots_is_saved_with_what_is_merged(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    model: Any = entry.build()
    swapper = hotslot.attach(model, {"loha": make_method_adapter(tmp_path / "loha", "LOHA", entry, seed=2)})
    swapper.activate("loha")
    model.save_pretrained(tmp_path / "whole")
    again = type(model).from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(entry.output(again, entry.inputs()), entry.output(model, entry.inputs()))
