"""Adapters on quantised bases, against a fresh load on a base that is quantised the same way.

Each library is optional, and what needs it is skipped without it. All of it runs on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import hotswap as peft_hotswap
from torch import Tensor, nn

import hotslot
from adapters import expected_peft_warnings, make_adapter
from compiling import Backend
from hotslot import errors
from hotslot.testing import no_recompile, same_addresses
from methods import make_method_adapter
from oracle import assert_same_output, assert_unchanged, error, snapshot
from zoo import ZOO

LLAMA = ZOO["llama"]
MLP = ZOO["mlp"]
KINDS = ("8bit", "4bit", "4bit nested", "torchao")

# Padding may round otherwise, and bitsandbytes then rounds a layer's input to another of 127 steps.
EIGHT_BIT_TOLERANCE = 5e-2

pytestmark = [
    # dynamo's own, of any autograd.Function
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # PEFT's, of a base that transformers has not quantised itself: it cannot be merged into.
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without"),
    # torchao 0.18's own code
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torchao"),
]


def quantise(model: nn.Module, kind: str) -> nn.Module:
    """Every linear layer but the head, by the libraries' own hands; flagged as transformers would."""
    if kind == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(
            model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda m, name: type(m) is nn.Linear and name != "lm_head"
        )
        return model
    bnb = pytest.importorskip("bitsandbytes")
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            sizes: tuple[Any, ...] = (module.in_features, module.out_features, module.bias is not None)
            layer: nn.Module
            if kind == "8bit":
                layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
                layer.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            else:
                options = {"quant_type": "nf4", "compress_statistics": kind == "4bit nested"}
                layer = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, **options)
                layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, **options)
                layer.support_avx512bf16_for_cpu = False  # its kernel takes no sizes as small as these
            if module.bias is not None:
                layer.bias = module.bias
            model.set_submodule(name, layer.to("cpu"))
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "8bit", kind.startswith("4bit")  # type: ignore[assignment]
    return model.eval()


def statistics(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What bitsandbytes keeps beside its parameters, by name and object."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "quant_state")}
    eight = {name: module.state for name, module in model.named_modules() if hasattr(module, "state")}
    found: dict[str, tuple[Any, ...]] = {name: (layer.weight.quant_state,) for name, layer in layers.items()}
    return found | {name: (state.CB, state.SCB) for name, state in eight.items()}


def same_objects(before: dict[str, tuple[Any, ...]], after: dict[str, tuple[Any, ...]]) -> bool:
    return before.keys() == after.keys() and all(
        a is b for name in before for a, b in zip(before[name], after[name], strict=True)
    )


def base(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return quantise(LLAMA.build(dtype=dtype), kind)


def warm(kind: str) -> nn.Module:
    """One that has run: bitsandbytes moves an 8-bit layer's statistics in its first forward pass."""
    model = base(kind)
    output(model)
    return model


def output(model: nn.Module) -> Tensor:
    return LLAMA.output(model, LLAMA.inputs())


def load(folder: Path, model: nn.Module) -> PeftModel:
    with expected_peft_warnings():
        return PeftModel.from_pretrained(model, str(folder)).eval()


@cache
def expected(folder: Path, kind: str) -> Tensor:
    return output(load(folder, base(kind)))


def assert_right(model: nn.Module, folder: Path, kind: str) -> None:
    got, want = output(model), expected(folder, kind)
    if kind == "8bit":
        assert error(got, want) <= EIGHT_BIT_TOLERANCE
    else:
        assert_same_output(got, want)


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 8, "target_modules": LINEAR},
    "same": {"r": 4, "lora_alpha": 3, "target_modules": LINEAR},
    "rslora": {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {"r": 1, "rank_pattern": {"v_proj": 6}, "alpha_pattern": {"up_proj": 5},
                 "target_modules": ["v_proj", "up_proj", "lm_head"]},
    "dora": {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": ["q_proj", "o_proj", "down_proj"]},
}  # fmt: skip
TOUR = ("all", "dora", "rslora", "patterns", "dora", "same", "patterns", "all", "rslora")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(root / name, LLAMA, seed=i, **config) for i, (name, config) in enumerate(CONFIGS.items())
    }


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    pytest.importorskip("torchao" if found == "torchao" else "bitsandbytes")
    return found


WAYS: dict[str, Callable[[dict[str, Path], str], nn.Module]] = {
    "plain": lambda folders, kind: warm(kind),
    "PeftModel": lambda folders, kind: load(folders["all"], warm(kind)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_adapter_after_every_other(folders: dict[str, Path], kind: str, way: str) -> None:
    bare = output(base(kind))
    model = WAYS[way](folders, kind)
    before, at_first, known = snapshot(model), output(model), statistics(model)
    assert bool(known) == (kind != "torchao")
    swapper = hotslot.attach(model, folders)
    with same_addresses(model):
        for name in TOUR:
            swapper.activate(name)
            assert_right(model, folders[name], kind)
            assert error(expected(folders[name], kind), bare) > 0.1  # the control
        swapper.deactivate()
        assert torch.equal(output(model), bare)
    swapper.detach()
    assert_unchanged(before, snapshot(model))
    assert same_objects(known, statistics(model))
    assert torch.equal(output(model), at_first)


@pytest.mark.parametrize("way", WAYS)
def test_bitwise_where_the_ranks_agree(folders: dict[str, Path], kind: str, way: str) -> None:
    model = WAYS[way](folders, kind)
    swapper = hotslot.attach(model, {name: folders[name] for name in ("all", "same")})
    for name, other in (("same", "all"), ("all", "same")):
        swapper.activate(name)
        assert torch.equal(output(model), expected(folders[name], kind))
        assert not torch.equal(output(model), expected(folders[other], kind))  # the control


def test_blends_and_growth(folders: dict[str, Path], kind: str) -> None:
    model = warm(kind)
    swapper = hotslot.attach(model, {"rslora": folders["rslora"]})
    with pytest.raises(errors.DoesNotFitError):
        swapper.load("all", folders["all"])
    swapper.grow(hotslot.plan(model, [folders["all"], folders["rslora"]], max_blend=2))
    swapper.load("all", folders["all"])
    for first, second in (("all", "rslora"), ("rslora", "all")):
        swapper.activate({first: 1.0, second: 0.5})
        assert error(output(model), expected(folders[first], kind)) > 0.1  # the control
        swapper.activate({first: 1.0, second: 0.0})
        assert_right(model, folders[first], kind)


@pytest.mark.parametrize("target_rank", [None, 8])
def test_the_drop_in_functions(folders: dict[str, Path], kind: str, target_rank: int | None) -> None:
    model = load(folders["all"], warm(kind))
    if target_rank is not None:
        hotslot.prepare_model_for_compiled_hotswap(model, target_rank=target_rank)
        shapes = {param.shape[0] for name, param in model.named_parameters() if ".lora_A." in name}
        assert shapes == {target_rank}
    for name in ("rslora", "same", "dora", "all"):
        hotslot.hotswap_adapter(model, str(folders[name]), "default")
        assert_right(model, folders[name], kind)


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_peft_itself_leaves_these_layers_unpadded(folders: dict[str, Path], kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = load(folders["all"], warm(kind))
    peft_hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert {param.shape[0] for name, param in model.named_parameters() if ".lora_A." in name} == {4}


def test_compiled(folders: dict[str, Path], kind: str) -> None:
    model = load(folders["all"], warm(kind))
    swapper = hotslot.attach(model, folders)
    backend = Backend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    output(compiled)
    with no_recompile(), same_addresses(model):
        for name in TOUR:
            swapper.activate(name)
            assert_right(compiled, folders[name], kind)
    assert backend.graphs == 1
    model.set_adapter("default")
    with expected_peft_warnings():
        model.load_adapter(str(folders["rslora"]), "other")
    model.set_adapter("other")
    output(compiled)
    assert backend.graphs > 1  # the control


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_dora_leaves_the_base_weights_where_they_are(folders: dict[str, Path], kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    path = "model.layers.0.self_attn.q_proj"
    model = warm(kind)
    weight = model.get_submodule(path).weight
    swapper = hotslot.attach(model, {"dora": folders["dora"]})
    swapper.activate("dora")
    for _ in range(2):
        assert_right(model, folders["dora"], kind)
    swapper.detach()
    assert model.get_submodule(path).weight is weight
    peft = load(folders["dora"], base(kind))  # the control
    layer = peft.get_base_model().get_submodule(path).get_base_layer()
    weight = layer.weight
    output(peft)
    assert layer.weight is not weight
    if kind == "8bit":
        with pytest.raises(AttributeError, match="NoneType"):
            output(peft)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slots_have_the_dtype_of_a_fresh_load(folders: dict[str, Path], kind: str, dtype: torch.dtype) -> None:
    peft = load(folders["all"], base(kind, dtype))
    model = base(kind, dtype)
    hotslot.attach(model, {"all": folders["all"]})
    dtypes = [{p.dtype for name, p in m.named_parameters() if ".lora_" in name} for m in (model, peft)]
    assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_plain_module_without_flags(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    config = {"r": 3, "lora_bias": True, "target_modules": ["up", "inner.0", "down"]}
    folders = {"biased": make_adapter(tmp_path / "biased", MLP, seed=1, **config)}
    config = {"r": 2, "use_dora": True, "target_modules": ["up", "inner.2"]}
    folders["dora"] = make_adapter(tmp_path / "dora", MLP, seed=2, **config)
    bases = [quantise(MLP.build(), kind) for _ in range(3)]
    for model in bases:
        del model.is_loaded_in_8bit, model.is_loaded_in_4bit
    model, inputs = bases[0], MLP.inputs()
    bare = MLP.output(model, inputs)
    swapper = hotslot.attach(model, folders)
    for (name, folder), fresh in zip(folders.items(), bases[1:], strict=True):
        swapper.activate(name)
        want = MLP.output(load(folder, fresh), inputs)
        assert error(MLP.output(model, inputs), want) <= EIGHT_BIT_TOLERANCE
        assert error(want, bare) > 2 * EIGHT_BIT_TOLERANCE  # the control
    swapper.detach()
    assert torch.equal(MLP.output(model, inputs), bare)


def test_bias_is_swapped_where_peft_takes_it(tmp_path: Path, folders: dict[str, Path], kind: str) -> None:
    folder = make_adapter(tmp_path / "biased", LLAMA, seed=7, r=2, lora_bias=True, target_modules=["q_proj", "up_proj"])
    model = warm(kind)
    before = snapshot(model)
    if kind == "torchao":
        with pytest.raises(ValueError, match="does not support lora_bias"):
            load(folder, base(kind))
        with pytest.raises(errors.UnsupportedError, match="lora_bias"):
            hotslot.attach(model, {"biased": folder})
        assert_unchanged(before, snapshot(model))
        swapper = hotslot.attach(model, {"all": folders["all"]})
        with pytest.raises(errors.HotslotError, match="lora_bias"):
            swapper.load("biased", folder)
    else:
        swapper = hotslot.attach(model, {"all": folders["all"], "biased": folder})
        for name in ("biased", "all"):
            swapper.activate(name)
            assert_right(model, {"biased": folder, **folders}[name], kind)


@pytest.mark.parametrize("way", WAYS)
def test_dora_is_refused_where_the_weight_is_repacked(folders: dict[str, Path], way: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = WAYS[way](folders, "4bit")
    layers = [module for name, module in model.named_modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert layers
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    before = snapshot(model)
    with pytest.raises(errors.UnsupportedError, match="repacks"):
        hotslot.attach(model, {"dora": folders["dora"]})
    assert_unchanged(before, snapshot(model))
    hotslot.attach(model, {"all": folders["all"]})


class Foreign(nn.Module):
    """A linear layer of a kind that hotslot cannot add slots to, such as GPTQ's."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 16
        self.register_buffer("qweight", torch.zeros(2, 16, dtype=torch.int32))


def test_layers_of_other_libraries_are_refused_on_a_plain_model(folders: dict[str, Path]) -> None:
    model = LLAMA.build()
    model.set_submodule("model.layers.0.self_attn.q_proj", Foreign())
    before = snapshot(model)
    with pytest.raises(errors.UnsupportedError, match="load one adapter with PEFT"):
        hotslot.attach(model, {"all": folders["all"]})
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_merged_into_quantised_weights(kind: str, tmp_path: Path) -> None:
    """What a slot cannot hold is refused there; what is merged into the head, which is not quantised, is taken."""
    model = quantise(LLAMA.build(), kind)
    loha = make_method_adapter(tmp_path / "loha", "LOHA", LLAMA, seed=0)
    head = make_method_adapter(tmp_path / "head", "LOHA", LLAMA, seed=0, target_modules=["lm_head"])
    lora = make_adapter(tmp_path / "lora", LLAMA, seed=0, r=2, target_modules=["q_proj"])
    before = snapshot(model)
    for route, folder in (("auto", loha), ("merged", loha), ("merged", lora)):
        with pytest.raises(errors.UnsupportedError, match="quantised weight"):
            hotslot.attach(model, {"a": folder}, route=route)
        assert_unchanged(before, snapshot(model))
    swapper = hotslot.attach(model, {"head": head})
    assert swapper.activate("head").route == "merged"
    swapper.detach()
    assert_unchanged(before, snapshot(model))
