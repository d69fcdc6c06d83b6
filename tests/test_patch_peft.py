"""PEFT's documented examples run with only the import changed, or, patched, with nothing changed at all."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft.utils.hotswap
import pytest
import torch
from transformers import AutoModelForCausalLM

import hotslot
from adapters import make_adapter
from hotslot import dropin
from hotslot.engine import Engine
from oracle import assert_same_output, assert_unchanged, error, fresh, fresh_output, snapshot
from zoo import ZOO

LLAMA, MLP = ZOO["llama"], ZOO["mlp"]
NAMES = (
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
)
PEFTS = {name: getattr(peft.utils.hotswap, name) for name in NAMES}
OURS = {name: getattr(hotslot, name) for name in NAMES}


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    assert now_in(peft.utils.hotswap) == PEFTS
    yield
    hotslot.unpatch_peft()
    assert now_in(peft.utils.hotswap) == PEFTS


def now_in(module: types.ModuleType) -> dict[str, Any]:
    return {name: getattr(module, name) for name in NAMES}


@pytest.fixture
def user() -> Iterator[types.ModuleType]:
    """A module that has imported PEFT's functions, under their names and another."""
    module = types.ModuleType("someones_module")
    code = f"from peft.utils.hotswap import {', '.join(NAMES)}\nfrom peft.utils.hotswap import hotswap_adapter as swap"
    exec(code, module.__dict__)
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


# -- signatures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_pefts(name: str) -> None:
    def shape(function: Any) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert shape(OURS[name]) == shape(PEFTS[name])
    assert OURS[name] is not PEFTS[name]
    assert OURS[name].__doc__


def test_every_public_function_of_peft_has_its_drop_in() -> None:
    """A new one in PEFT fails this test."""
    own = {
        name
        for name, value in vars(peft.utils.hotswap).items()
        if inspect.isfunction(value) and value.__module__ == "peft.utils.hotswap" and not name.startswith("_")
    }
    assert own == set(NAMES)


# -- patching -----------------------------------------------------------------------------------------------------


def test_patch_puts_ours_in_pefts_place_and_unpatch_takes_them_back(user: types.ModuleType) -> None:
    assert now_in(user) == PEFTS  # the control
    hotslot.patch_peft()
    for module in (peft.utils.hotswap, user):
        assert now_in(module) == OURS
    assert user.swap is hotslot.hotswap_adapter
    from peft.utils.hotswap import hotswap_adapter

    assert hotswap_adapter is hotslot.hotswap_adapter
    hotslot.unpatch_peft()
    for module in (peft.utils.hotswap, user):
        assert now_in(module) == PEFTS
    assert user.swap is PEFTS["hotswap_adapter"]


def test_patching_and_unpatching_twice_is_as_once(user: types.ModuleType) -> None:
    for _ in range(2):
        hotslot.patch_peft()
        assert now_in(user) == OURS
    for _ in range(2):
        hotslot.unpatch_peft()
        assert now_in(user) == now_in(peft.utils.hotswap) == PEFTS
    hotslot.patch_peft()
    assert now_in(user) == now_in(peft.utils.hotswap) == OURS


def test_patching_again_reaches_what_has_pefts_by_now(user: types.ModuleType) -> None:
    hotslot.patch_peft()
    user.swap = PEFTS["hotswap_adapter"]  # as by a reload
    hotslot.patch_peft()
    assert user.swap is hotslot.hotswap_adapter
    hotslot.unpatch_peft()
    assert user.swap is PEFTS["hotswap_adapter"]


def test_unpatch_leaves_what_users_have_put_there_since(user: types.ModuleType) -> None:
    hotslot.patch_peft()
    user.swap = len
    del user.hotswap_adapter_from_state_dict
    hotslot.unpatch_peft()
    assert user.swap is len
    assert not hasattr(user, "hotswap_adapter_from_state_dict")
    assert user.hotswap_adapter is PEFTS["hotswap_adapter"]


def test_patching_leaves_hotslot_and_everything_else_alone(user: types.ModuleType) -> None:
    watched = (hotslot, dropin, peft, peft.utils, user)
    before = [dict(vars(module)) for module in watched]
    hotslot.patch_peft()
    assert now_in(dropin) == OURS
    changed = [
        f"{module.__name__}.{key}"
        for module, was in zip(watched, before, strict=True)
        for key, value in vars(module).items()
        if was.get(key, value) is not value
    ]
    assert sorted(changed) == sorted([*(f"someones_module.{name}" for name in NAMES), "someones_module.swap"])
    hotslot.unpatch_peft()
    assert [dict(vars(module)) for module in watched] == before


def test_patching_imports_nothing_by_the_way() -> None:
    """transformers' lazy modules import what they are asked for."""
    before = set(sys.modules)
    hotslot.patch_peft()
    hotslot.unpatch_peft()
    assert {name for name in set(sys.modules) - before if not name.startswith("hotslot.")} == set()


def test_patched_functions_swap_for_a_module_that_was_imported_before(user: types.ModuleType, tmp_path: Path) -> None:
    """rsLoRA onto plain LoRA, which PEFT refuses."""
    first = make_adapter(tmp_path / "0", MLP, seed=0, r=2, target_modules=["up"])
    second = make_adapter(tmp_path / "1", MLP, seed=1, r=3, target_modules=["up"], use_rslora=True)
    model = fresh(MLP, first)
    with pytest.raises(ValueError, match="use_rslora"):
        user.swap(model, str(second), adapter_name="default", torch_device="cpu")  # the control
    hotslot.patch_peft()
    user.swap(model, str(second), adapter_name="default", torch_device="cpu")
    assert_same_output(MLP.output(model, MLP.inputs()), fresh_output(MLP, second))


def unet() -> Any:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
        ).eval()


def unet_lora(seed: int, rank: int) -> dict[str, torch.Tensor]:
    """As diffusers' files have it: tensors alone; alpha is the rank, which differs between two modules."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, module in unet().named_modules():
        if name.endswith(("to_q", "to_out.0")):
            r = rank if name.endswith("to_q") else rank - 1
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(r, module.in_features, generator=generator) / 2
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, r, generator=generator) / 2
    return tensors


def test_diffusers_swaps_with_ours() -> None:
    """`load_lora_weights(…, hotswap=True)` of a pipeline calls this of its model."""
    pytest.importorskip("diffusers")

    def output(model: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        sample, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
        with torch.no_grad():
            return model(sample, 3, text).sample

    model, expected = unet(), unet()
    model.load_lora_adapter(unet_lora(0, 4), prefix="unet", adapter_name="style")
    expected.load_lora_adapter(unet_lora(1, 3), prefix="unet", adapter_name="style")
    before = output(model)
    hotslot.patch_peft()
    model.load_lora_adapter(unet_lora(1, 3), prefix="unet", adapter_name="style", hotswap=True)
    assert_same_output(output(model), output(expected))
    assert error(output(model), before) > 1e-3
    assert model.peft_config["style"].r == expected.peft_config["style"].r
    assert Engine.of(model, "style") is not None  # the control: that it was ours


def test_checks_that_callers_make_beforehand_pass_what_is_swapped() -> None:
    """diffusers asks `check_hotswap_configs_compatible` before it swaps."""
    from peft import IA3Config, LoraConfig

    plain, other = LoraConfig(r=4), LoraConfig(r=8, use_rslora=True, lora_dropout=0.1, alpha_pattern={"up": 3})
    with pytest.raises(ValueError, match="incompatible"):
        PEFTS["check_hotswap_configs_compatible"](plain, other)  # the control
    assert hotslot.check_hotswap_configs_compatible(plain, other) is None
    for refused in (LoraConfig(init_lora_weights="olora"), IA3Config()):
        for pair in ((plain, refused), (refused, plain)):
            with pytest.raises(ValueError, match=r"rewrites the base|Incompatible PEFT types found"):
                hotslot.check_hotswap_configs_compatible(*pair)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but IA3 was passed"):
        hotslot.check_hotswap_configs_compatible(IA3Config(), IA3Config())


# -- PEFT's examples, from its documentation ----------------------------------------------------------------------

EAGER = """
import torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter

model_id = ...
inputs = ...
device = ...
model = AutoModelForCausalLM.from_pretrained(model_id).to(device)

# load lora 0
model = PeftModel.from_pretrained(model, <path-adapter-0>)
with torch.inference_mode():
    output_adapter_0 = model(inputs)

# replace the "default" lora adapter with the new one
hotswap_adapter(model, <path-adapter-1>, adapter_name="default", torch_device=device)
with torch.inference_mode():
    output_adapter_1 = model(inputs).logits
"""

COMPILED = """
import torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

model_id = ...
inputs = ...
device = ...
max_rank = ...  # maximum rank among all LoRA adapters that will be used
model = AutoModelForCausalLM.from_pretrained(model_id).to(device)

# load lora 0
model = PeftModel.from_pretrained(model, <path-adapter-0>)
# Prepare the model to allow hotswapping even if ranks/scalings of 2nd adapter differ.
# You can skip this step if all ranks and scalings are identical.
prepare_model_for_compiled_hotswap(model, target_rank=max_rank)
model = torch.compile(model)
with torch.inference_mode():
    output_adapter_0 = model(inputs)

# replace the "default" lora adapter with the new one
hotswap_adapter(model, <path-adapter-1>, adapter_name="default", torch_device=device)
with torch.inference_mode():
    output_adapter_1 = model(inputs).logits
"""


def filled(example: str, values: dict[str, object]) -> str:
    """The example with its blanks filled in, as its reader would."""
    for blank, value in values.items():
        example = example.replace(f"{blank} = ...", f"{blank} = {value!r}").replace(f"<{blank}>", repr(str(value)))
    return example.replace("inputs = ...", "inputs = INPUTS")


@pytest.fixture(scope="module")
def blanks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("example")
    LLAMA.build().save_pretrained(folder / "model")
    for i, rank in enumerate((4, 7)):
        targets = ["q_proj", "up_proj"][: 2 - i]  # the second leaves a layer out
        make_adapter(folder / str(i), LLAMA, seed=i, r=rank, lora_alpha=5 + 3 * i, target_modules=targets)
    adapters = {f"path-adapter-{i}": folder / str(i) for i in range(2)}
    return {"model_id": str(folder / "model"), "device": "cpu", "max_rank": 8, **adapters}


@pytest.mark.parametrize(
    ("example", "by"),
    [(EAGER, "import"), (EAGER, "patch"), (COMPILED, "import")],
    ids=["eager, import", "eager, patched", "compiled, import"],
)
def test_pefts_examples_run(example: str, by: str, blanks: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """With only the import line changed, or, patched, with none."""
    code = filled(example, blanks)
    assert "..." not in code
    assert "<" not in code
    if by == "import":
        assert code.count("from peft.utils.hotswap import") == 1
        code = code.replace("from peft.utils.hotswap import", "from hotslot import")
    else:
        hotslot.patch_peft()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend="eager"))
    torch._dynamo.reset()
    names: dict[str, Any] = {"INPUTS": LLAMA.inputs()["input_ids"]}
    exec(compile(code, "example", "exec"), names)
    assert names["hotswap_adapter"] is hotslot.hotswap_adapter
    expected = [fresh_output(LLAMA, Path(str(blanks[f"path-adapter-{i}"]))) for i in range(2)]
    assert_same_output(names["output_adapter_0"].logits.clone(), expected[0])
    assert_same_output(names["output_adapter_1"].clone(), expected[1])
    assert error(*expected) > 0.01


def test_saved_model_is_the_one_of_the_zoo(blanks: dict[str, object]) -> None:
    """Or the examples would be compared with another model."""
    loaded = AutoModelForCausalLM.from_pretrained(str(blanks["model_id"])).eval()
    assert_same_output(LLAMA.output(loaded, LLAMA.inputs()), LLAMA.output(LLAMA.build(), LLAMA.inputs()), exact=True)


def test_return_value_and_arguments_are_pefts(blanks: dict[str, object], tmp_path: Path) -> None:
    """By position and by name, with the device or without; each returns None."""
    first, second = (str(blanks[f"path-adapter-{i}"]) for i in range(2))
    model = fresh(LLAMA, first)
    assert hotslot.prepare_model_for_compiled_hotswap(model, target_rank=8, check_compiled="error") is None
    assert hotslot.hotswap_adapter(model, second, "default") is None
    assert hotslot.hotswap_adapter(model, Path(first), "default", "cpu") is None
    assert hotslot.hotswap_adapter(
        model=model, model_name_or_path=second, adapter_name="default", torch_device=None, subfolder=None, token=None
    ) is None  # fmt: skip
    assert_same_output(LLAMA.output(model, LLAMA.inputs()), fresh_output(LLAMA, Path(second)))
    before = snapshot(model)
    with pytest.raises(TypeError):
        hotslot.prepare_model_for_compiled_hotswap(model, 8)  # type: ignore[misc]
    assert_unchanged(before, snapshot(model))
