"""Adapters of other methods than LoRA that carry biases of the base model, on a model that carries their method.

Each option `bias` that PEFT has, from any value to any: what is live is a fresh load, and the base's own come back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from torch import nn

import hotslot
from compiling import Backend
from hotslot.errors import HotslotError, UnsupportedError
from hotslot.testing import no_recompile, same_addresses
from methods import METHODS, fresh_merge, make_method_adapter, method_config, tensors_of
from oracle import assert_same_output, assert_unchanged, error, fresh, fresh_output, snapshot
from test_all_or_nothing import Fault, LineFault, OpFault
from test_inplace import outside
from zoo import CLASSIFIERS, ZOO, Entry

MLP = ZOO["mlp"]
TARGETS = {"target_modules": ["up"]}  # "inner.2" has a bias, too, which "all" takes along
WITH_BIASES = sorted(
    kind.value
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    if "bias" in config.__dataclass_fields__ and kind.value != "LORA" and METHODS[kind.value].available
)


@pytest.fixture(autouse=True)
def advice_of_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def adapters(name: str, root: Path, entry: Entry = MLP, **options: Any) -> dict[str, Path]:
    options = {**TARGETS, **options}
    drawn = {"none": "none", "all": "all", "only": f"{name.lower()}_only"}
    return {
        key: make_method_adapter(root / key, name, entry, seed=seed, bias=bias, **options)
        for seed, (key, bias) in enumerate(drawn.items(), start=1)
    }


def assert_live(model: nn.Module, folder: Path | None, entry: Entry = MLP) -> None:
    base = entry.build().requires_grad_(False)  # torch takes other kernels for weights that may train
    wanted = entry.output(base, entry.inputs()) if folder is None else fresh_output(entry, folder)
    assert_same_output(entry.output(model, entry.inputs()), wanted, exact=True)


@pytest.mark.parametrize("name", WITH_BIASES)
def test_every_transition_is_a_fresh_load(name: str, tmp_path: Path) -> None:
    folders = adapters(name, tmp_path)
    model = fresh(MLP, folders["none"])
    before = snapshot(model), outside(model)
    swapper = hotslot.attach(model, folders)
    with same_addresses(model):
        for key in ("all", "none", "only", "all", "only", "none", "all"):
            swapper.activate(key)
            assert_live(model, folders[key])
    model.save_pretrained(str(tmp_path / "saved"))
    assert_live(model, tmp_path / "saved")
    assert_live(fresh(MLP, tmp_path / "saved"), folders["all"])
    if METHODS[name].deactivates:
        swapper.deactivate()
        assert_live(model, None)
    swapper.activate("all")
    swapper.detach()
    assert_unchanged(before[0], snapshot(model))
    assert before[1] == outside(model)


@pytest.mark.parametrize("name", WITH_BIASES)
def test_control_the_biases_are_a_part_of_the_adapter(name: str, tmp_path: Path) -> None:
    """PEFT trains, saves and loads them; else the test above would say nothing."""
    folder = make_method_adapter(tmp_path, name, MLP, seed=2, bias="all", **TARGETS)
    keys = [key for key in load_file(folder / "adapter_model.safetensors") if key.endswith(".bias")]
    assert sorted(keys) == [f"base_model.model.{path}.bias" for path in ("inner.2", "up.base_layer")]
    model = fresh(MLP, folder)
    loaded = MLP.output(model, MLP.inputs())
    own: Any = MLP.build()
    for biased in (model.base_model.model.up.base_layer, model.base_model.model.inner[2]):
        biased.bias.data.copy_((own.up if biased.out_features == 32 else own.inner[2]).bias)
    assert error(loaded, MLP.output(model, MLP.inputs())) > 1e-3


@pytest.mark.parametrize("name", ["ADALORA", "BOFT", "DELORA", "GLORA", "MISS", "OFT", "VBLORA", "VERA"])
def test_merged_they_are_those_of_merge_and_unload(name: str, tmp_path: Path) -> None:
    folders = adapters(name, tmp_path)
    model = MLP.build()
    swapper = hotslot.attach(model, folders, route="merged")
    for key in ("all", "only", "none"):
        swapper.activate(key)
        wanted = fresh_merge(MLP, folders[key])
        assert all(torch.equal(value, wanted[path]) for path, value in tensors_of(model).items())


@pytest.mark.parametrize("name", ["OFT", "VERA"])
@pytest.mark.parametrize("came_with", ["all", "only"])
def test_biases_that_came_with_the_model_take_others_as_many(name: str, came_with: str, tmp_path: Path) -> None:
    """PEFT has written over the base's own, so that nothing can put those back."""
    folders = adapters(name, tmp_path)
    model = fresh(MLP, folders[came_with])
    before = snapshot(model)
    lacking = ["none"] if came_with == "only" else ["none", "only"]
    for key in lacking:
        with pytest.raises(UnsupportedError, match="lacks biases"):
            hotslot.attach(model, {key: folders[key]})
        assert_unchanged(before, snapshot(model))
    other = make_method_adapter(tmp_path / "other", name, MLP, seed=5, bias="all", **TARGETS)
    swapper = hotslot.attach(model, {"all": folders["all"], "other": other})
    for key, folder in (("other", other), ("all", folders["all"]), ("other", other)):
        swapper.activate(key)
        assert_live(model, folder)
    live = snapshot(model)
    with pytest.raises(UnsupportedError, match="The base model lacks biases"):
        swapper.deactivate()
    assert_unchanged(live, snapshot(model))
    swapper.detach()
    assert_unchanged(before, snapshot(model))
    assert_live(model, folders[came_with])


def test_a_saved_module_has_a_bias_of_its_own(tmp_path: Path) -> None:
    """PEFT's file has the head's bias three times: the copy's, the original's, and under the name of neither."""
    entry = CLASSIFIERS["bert_classifier"]
    options = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
    folders = adapters("VERA", tmp_path, entry, **options)
    model = fresh(entry, folders["none"])
    before = snapshot(model)
    swapper = hotslot.attach(model, folders)
    for first, second in pairwise(("all", "only", "none", "all", "none", "only")):
        for key in (first, second):
            swapper.activate(key)
            assert_live(model, folders[key], entry)
    swapper.detach()
    assert_unchanged(before, snapshot(model))


def test_one_adapter_of_a_model_has_biases_as_in_peft(tmp_path: Path) -> None:
    folders = adapters("VERA", tmp_path)
    model = fresh(MLP, folders["none"])
    model.load_adapter(str(folders["only"]), adapter_name="other")
    before = snapshot(model.eval())
    with pytest.raises(UnsupportedError, match="so does another adapter on it"):
        hotslot.attach(model, {"all": folders["all"]})
    assert_unchanged(before, snapshot(model))


def test_nothing_is_compiled_anew(tmp_path: Path) -> None:
    folders = adapters("VERA", tmp_path)
    model = fresh(MLP, folders["none"])
    swapper = hotslot.attach(model, folders)
    compiled: Any = torch.compile(model, backend=Backend())
    MLP.output(compiled, MLP.inputs())
    with no_recompile():
        for key in ("all", "only", "none", "all"):
            swapper.activate(key)
            assert_live(compiled, folders[key])


@pytest.mark.parametrize("injector", ["line", "before", "amid"])
def test_a_swap_that_is_broken_off_has_not_happened(injector: str, tmp_path: Path) -> None:
    def fault(k: int) -> Any:
        return LineFault(k, KeyboardInterrupt) if injector == "line" else OpFault(k, Fault, injector)

    folders = adapters("VERA", tmp_path)
    model = fresh(MLP, folders["none"])
    swapper = hotslot.attach(model, folders)
    swapper.activate("all")
    before = snapshot(model), outside(model)
    counting = fault(-1)
    with counting:
        swapper.activate("only")
    swapper.activate("all")
    total = len(counting.steps)
    assert total
    for k in sorted({*range(1, total + 1, max(1, total // 40)), total}):
        with pytest.raises((KeyboardInterrupt, Fault)), fault(k):
            swapper.activate("only")
        assert_unchanged(before[0], snapshot(model))
        assert before[1] == outside(model)
        assert swapper.active == "all"
    swapper.activate("only")
    assert_live(model, folders["only"])


def test_biases_that_tied_modules_share_have_one_value(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(12, 12), nn.Linear(12, 12)
            self.down.bias = self.up.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.tanh(self.up(x)))

    def saved(seed: int) -> Path:
        model = get_peft_model(Tied(), method_config("VERA", MLP, target_modules=["up"], bias="all"))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(tmp_path / str(seed))
        return tmp_path / str(seed)

    one, other = saved(1), saved(2)
    model = PeftModel.from_pretrained(Tied(), str(one)).eval()
    before, x = snapshot(model), torch.ones(2, 12)
    swapper = hotslot.attach(model, {"other": other})
    swapper.activate("other")
    with torch.no_grad():
        assert_same_output(model(x), PeftModel.from_pretrained(Tied(), str(other)).eval()(x), exact=True)
    assert model.base_model.model.down.bias is model.base_model.model.up.base_layer.bias
    swapper.rollback()
    assert_unchanged(before, snapshot(model))
    tensors = load_file(other / "adapter_model.safetensors")
    torn = {key: value + key.endswith("down.bias") for key, value in tensors.items()}
    with pytest.raises(HotslotError, match="for the one that it is tied to"):
        swapper.load("torn", torn, config=PeftModel.from_pretrained(Tied(), str(other)).peft_config["default"])
    assert_unchanged(before, snapshot(model))
