"""Arguments of the wrong kind, and names that are odd: refused by what they are, with nothing touched; or they work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import hotslot
from adapters import make_adapter
from oracle import assert_same_output, assert_unchanged, fresh_output, snapshot
from zoo import ZOO

MLP = ZOO["mlp"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(root / name, MLP, seed=i, r=2, target_modules=["up"]) for i, name in enumerate("ab")}


# `keys` is a method of the ModuleDict in which PEFT's layers keep their adapters.
@pytest.mark.parametrize("adapter_name", ["sql.v2", "", "keys", None, 3])
def test_a_slot_of_an_impossible_name_is_refused(adapter_name: Any, folders: dict[str, Path]) -> None:
    model = MLP.build()
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapter_name must be"):
        hotslot.attach(model, folders, adapter_name=adapter_name)
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("adapter_name", ["sql/v2", "ü ☃", "weight", "lora_A", "base_layer", "x" * 300])
def test_a_slot_may_have_an_odd_name(adapter_name: str, folders: dict[str, Path]) -> None:
    model = MLP.build()
    before = snapshot(model)
    swapper = hotslot.attach(model, folders, adapter_name=adapter_name)
    for name in "aba":
        swapper.activate(name)
        assert_same_output(MLP.output(model, MLP.inputs()), fresh_output(MLP, folders[name]))
    swapper.detach()
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("name", ["", "a.b", "../a", "ü ☃", "a:0.5+b:1.0", "None", "\n", "x" * 5000])
def test_an_adapter_may_have_any_name(name: str, folders: dict[str, Path]) -> None:
    model = MLP.build()
    plan = hotslot.plan(model, folders)
    swapper = hotslot.attach(model, folders, plan=plan, cache=hotslot.Cache(host_bytes=1 << 20))
    swapper.activate({"a": 0.5, "b": 1.0})  # which has a name, too
    swapper.load(name, folders["b"])
    assert swapper.activate(name).adapter == name
    assert_same_output(MLP.output(model, MLP.inputs()), fresh_output(MLP, folders["b"]))
    swapper.activate({name: 0.5, "a": 1.0})
    swapper.rollback()
    assert swapper.active == name
    swapper.deactivate()
    swapper.unload(name)
    swapper.check_integrity()
    assert swapper.adapters == ("a", "b")


CALLS: dict[str, tuple[Callable[[hotslot.Swapper], object], str]] = {
    "activate a number": (lambda swapper: swapper.activate(3), "a name, or a mapping"),  # type: ignore[arg-type]
    "activate a list": (lambda swapper: swapper.activate(["a"]), "a name, or a mapping"),  # type: ignore[arg-type]
    "blend numbers": (lambda swapper: swapper.activate({1: 1.0, "a": 1.0}), "a name, or"),  # type: ignore[dict-item]
    "use a number": (lambda swapper: swapper.using(3).__enter__(), "a name, or a mapping"),  # type: ignore[arg-type]
    "load as a number": (lambda swapper: swapper.load(3, "a"), "name must be a string"),  # type: ignore[arg-type]
    "update with a path": (lambda swapper: swapper.update("a", "b"), "mapping of names"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_of_another_kind_is_said_to_be(call: str, folders: dict[str, Path]) -> None:
    model = MLP.build()
    swapper = hotslot.attach(model, folders)
    swapper.activate("a")
    before = snapshot(model)
    do, message = CALLS[call]
    with pytest.raises(TypeError, match=message):
        do(swapper)
    assert_unchanged(before, snapshot(model))
    assert swapper.adapters == ("a", "b")


@pytest.mark.parametrize("adapters", [["a"], {1: "a"}, 3])
def test_adapters_without_names_are_said_to_be(adapters: Any) -> None:
    with pytest.raises(TypeError, match="mapping of names to sources"):
        hotslot.attach(nn.Linear(2, 2), adapters)
