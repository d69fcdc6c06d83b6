"""Two slots of one model: neither passes the other over, whichever came first, and whichever goes first."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

import hotslot
from adapters import make_adapter
from oracle import assert_same_output, error, fresh
from zoo import ZOO, Entry

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
TARGETS = {"mlp": (["up"], ["up", "down"]), "llama": (["q_proj", "v_proj"], ["v_proj", "up_proj"])}
every_model = pytest.mark.parametrize("entry", [ZOO[name] for name in TARGETS], ids=TARGETS.keys())


@pytest.fixture
def folders(entry: Entry, tmp_path: Path) -> dict[str, Path]:
    return {
        name: make_adapter(tmp_path / name, entry, seed=seed, r=3, lora_alpha=5, target_modules=targets)
        for seed, (name, targets) in enumerate(zip("ab", TARGETS[entry.name], strict=True), 1)
    }


def both(entry: Entry, folders: dict[str, Path]) -> Tensor:
    """What PEFT computes with both of them active."""
    model = fresh(entry, folders["a"])
    model.load_adapter(str(folders["b"]), adapter_name="second")
    model.base_model.set_adapter(["default", "second"], inference_mode=True)
    return entry.output(model.eval(), entry.inputs())


@every_model
@pytest.mark.parametrize("plain", [True, False])
def test_a_second_slot_leaves_the_first_one_s_adapter_live(plain: bool, entry: Entry, folders: dict[str, Path]) -> None:
    model = entry.build() if plain else fresh(entry, folders["a"])
    first = hotslot.attach(model, {"a": folders["a"]})
    first.activate("a")
    before = entry.output(model, entry.inputs())
    second = hotslot.attach(model, {"b": folders["b"]}, adapter_name="second")
    assert_same_output(entry.output(model, entry.inputs()), before, exact=True)
    second.activate("b")
    assert error(entry.output(model, entry.inputs()), before) > 1e-3
    assert_same_output(entry.output(model, entry.inputs()), both(entry, folders))
    second.detach()
    assert_same_output(entry.output(model, entry.inputs()), before, exact=True)


@every_model
def test_the_first_slot_goes_and_the_second_one_s_adapter_stays_live(entry: Entry, folders: dict[str, Path]) -> None:
    model = entry.build()
    first = hotslot.attach(model, {"a": folders["a"]})
    second = hotslot.attach(model, {"b": folders["b"]}, adapter_name="second")
    first.activate("a")
    second.activate("b")
    assert_same_output(entry.output(model, entry.inputs()), both(entry, folders))
    first.detach()
    alone = fresh(entry, folders["b"])
    assert_same_output(entry.output(model, entry.inputs()), entry.output(alone, entry.inputs()))
    assert not any(param.requires_grad for name, param in model.named_parameters() if "lora_" in name)
    second.detach()
    assert_same_output(entry.output(model, entry.inputs()), entry.output(entry.build(), entry.inputs()), exact=True)
