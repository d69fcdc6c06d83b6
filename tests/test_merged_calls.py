"""PEFT's, transformers' and diffusers' own calls while the live adapter is merged, and no slot holds it.

They go by the slots' layers, and would leave what is merged where it is: the reference model of `disable_adapter`
would be the adapter's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn

import hotslot
from adapters import make_adapter
from hotslot.errors import MergedError
from oracle import assert_same_output, assert_unchanged, fresh, snapshot
from zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:Adapter .* was active")

MLP, LLAMA = ZOO["mlp"], ZOO["llama"]
TARGETS = {"mlp": ["up", "down"], "llama": ["q_proj", "v_proj"]}
OTHER = LoraConfig(r=2, init_lora_weights=False)


def loha(folder: Path, name: str) -> Path:
    entry = ZOO[name]
    model = get_peft_model(entry.build(), LoHaConfig(r=4, target_modules=TARGETS[name], init_weights=False))
    model.save_pretrained(folder)
    return folder


def on_peft_model(folder: Path) -> nn.Module:
    model = fresh(MLP, make_adapter(folder, MLP, seed=1, r=3, target_modules=TARGETS["mlp"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    model.set_adapter("default")
    return model.eval()


def on_transformers_model(folder: Path) -> nn.Module:
    model: Any = LLAMA.build()
    for name in ("default", "other"):
        model.add_adapter(LoraConfig(r=3, target_modules=TARGETS["llama"], init_lora_weights=False), name)
    model.set_adapter("default")
    return model.eval()


def passed_over(model: Any) -> None:
    with model.disable_adapter():
        pass


PEFT: dict[str, Callable[[Any], object]] = {
    "disable_adapter": passed_over,
    "disable_adapter_layers": lambda model: model.base_model.disable_adapter_layers(),
    "set_adapter": lambda model: model.set_adapter("other"),
    "the tuner's set_adapter": lambda model: model.base_model.set_adapter(["other"]),
    "delete_adapter": lambda model: model.delete_adapter("default"),
    "unload": lambda model: model.unload(),
    "save_pretrained": lambda model: model.save_pretrained("nowhere"),
}
TRANSFORMERS: dict[str, Callable[[Any], object]] = {
    "disable_adapters": lambda model: model.disable_adapters(),
    "set_adapter": lambda model: model.set_adapter("other"),
    "delete_adapter": lambda model: model.delete_adapter(["default"]),
    "add_adapter": lambda model: model.add_adapter(OTHER, "third"),
}
WAYS = [(MLP, on_peft_model, call) for call in PEFT] + [(LLAMA, on_transformers_model, call) for call in TRANSFORMERS]


@pytest.mark.parametrize(("entry", "build", "call"), WAYS, ids=[f"{build.__name__}-{call}" for _, build, call in WAYS])
def test_what_would_leave_it_where_it_is_is_refused(entry: Any, build: Any, call: str, tmp_path: Path) -> None:
    run = (PEFT if build is on_peft_model else TRANSFORMERS)[call]
    model = build(tmp_path / "lora")
    swapper = hotslot.attach(model, {"loha": loha(tmp_path / "loha", entry.name)})
    assert swapper.activate("loha").route == "merged"
    before, output = snapshot(model), entry.output(model, entry.inputs())
    with pytest.raises(MergedError, match="merged"):
        run(model)
    assert_unchanged(before, snapshot(model))
    assert_same_output(entry.output(model, entry.inputs()), output, exact=True)
    swapper.rollback()
    if call != "save_pretrained":
        run(model)  # the control: what is in the slot, it may


def test_what_leaves_the_slot_alone_goes_on(tmp_path: Path) -> None:
    model = on_peft_model(tmp_path / "lora")
    swapper = hotslot.attach(model, {"loha": loha(tmp_path / "loha", "mlp")})
    swapper.activate("loha")
    output = MLP.output(model, MLP.inputs())
    model.set_adapter("default")
    model.delete_adapter("other")
    model.add_adapter("third", LoraConfig(r=2, target_modules=["up"]))
    assert_same_output(MLP.output(model, MLP.inputs()), output, exact=True)
    with swapper.using(None), model.disable_adapter():
        assert_same_output(MLP.output(model, MLP.inputs()), MLP.output(MLP.build(), MLP.inputs()), exact=True)


def test_a_copy_is_a_model_of_its_own(tmp_path: Path) -> None:
    model = on_peft_model(tmp_path / "lora")
    swapper = hotslot.attach(model, {"loha": loha(tmp_path / "loha", "mlp")})
    swapper.activate("loha")
    output = MLP.output(model, MLP.inputs())
    twin = copy.deepcopy(model)
    with twin.disable_adapter():
        assert_same_output(MLP.output(twin, MLP.inputs()), output, exact=True)  # its base has it merged for good
    for one in (twin, model):
        with pytest.raises(MergedError):
            one.save_pretrained(tmp_path / "saved")
    with pytest.raises(MergedError):
        passed_over(model)


@pytest.mark.parametrize("passing", ["disabled", "another active"])
def test_nothing_is_merged_where_the_slot_is_passed_over(passing: str, tmp_path: Path) -> None:
    model = on_peft_model(tmp_path / "lora")
    swapper = hotslot.attach(model, {"loha": loha(tmp_path / "loha", "mlp")})
    if passing == "disabled":
        model.base_model.disable_adapter_layers()
    else:
        model.set_adapter("other")
    before = snapshot(model)
    with pytest.raises(MergedError, match="passes its slot over"):
        swapper.activate("loha")
    assert_unchanged(before, snapshot(model))
    model.base_model.enable_adapter_layers()
    model.set_adapter("default")
    swapper.activate("loha")
    assert not torch.equal(MLP.output(model, MLP.inputs()), MLP.output(MLP.build(), MLP.inputs()))
