"""A refusal names a call that its user has, of PEFT, transformers or diffusers; and having called that, one goes on."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoHaConfig, get_peft_model
from torch import nn

import hotslot
from adapters import make_adapter
from hotslot.errors import HotslotError, MergedError, ModelError, UnsupportedError
from hotslot.methods import NOT_MERGEABLE
from oracle import assert_same_output, fresh_output
from zoo import ZOO

LLAMA = ZOO["llama"]
OWNERS = ("peft", "transformers", "diffusers")


@pytest.fixture(autouse=True)
def advice_of_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def plain(owner: str) -> Any:
    """The base model."""
    if owner != "diffusers":
        return LLAMA.build()
    pytest.importorskip("diffusers")
    from pipelines import PIPELINES

    return PIPELINES["flux2"].component("transformer")


def carrying(owner: str, folder: Path) -> tuple[dict[str, Any], nn.Module, nn.Module]:
    """What its user calls things, the model with an adapter that has no slots, and the base model within."""
    config = LoHaConfig(r=2, target_modules=["q_proj"])
    if owner == "peft":
        base = LLAMA.build()
        model: Any = get_peft_model(base, config)
        return {"peft_model": model}, model, base
    if owner == "transformers":
        model = LLAMA.build()
        model.add_adapter(config, "default")
        return {"model": model}, model, model
    pytest.importorskip("diffusers")
    from pipelines import PIPELINES, load_plain, make_lokr

    pipe = PIPELINES["flux2"].build()
    load_plain(pipe, make_lokr(folder, seed=1), "default")
    return {"pipe": pipe}, pipe.transformer, pipe.transformer


def obey(hint: str, names: dict[str, Any]) -> None:
    """Make the first call that is for one of these names."""
    (name,) = names
    found = re.search(rf"\b{name}\.\w+\([^)]*\)", hint)
    assert found, hint
    eval(found[0], names)


def refusal(error: type[HotslotError], act: Any) -> str:
    with pytest.raises(error) as caught:
        act()
    return str(caught.value).rpartition("next step: ")[2]


@pytest.mark.parametrize("owner", OWNERS)
def test_what_only_slots_can_do(owner: str, tmp_path: Path) -> None:
    names, model, base = carrying(owner, tmp_path)
    swapper = hotslot.attach(model)
    planned = hotslot.plan(plain(owner), target_modules=["q_proj", "to_q"], max_rank=2)
    hint = refusal(UnsupportedError, lambda: swapper.grow(planned))
    if owner == "transformers":  # whose delete_adapter leaves PEFT's layers
        assert "from_pretrained without the adapter" in hint
        return
    obey(hint, names)
    with pytest.raises(ModelError, match="taken out"):
        swapper.deactivate()
    hotslot.attach(base, plan=planned)


@pytest.mark.parametrize("owner", OWNERS)
def test_what_cannot_be_made_to_do_nothing(owner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of methods that only add to the input."""
    names, model, _ = carrying(owner, tmp_path)
    swapper = hotslot.attach(model)
    monkeypatch.setitem(NOT_MERGEABLE, "LOHA" if owner != "diffusers" else "LOKR", "so it is said here")
    hint = refusal(UnsupportedError, swapper.deactivate)
    if owner == "peft":
        assert hint.startswith("with peft_model.disable_adapter(): …")
    else:
        obey(hint, names)
        assert all(layer.disable_adapters for layer in model.modules() if hasattr(layer, "merged_adapters"))


@pytest.mark.parametrize("owner", ["peft", "diffusers"])
def test_a_merged_adapter(owner: str, tmp_path: Path) -> None:
    """transformers has no call that merges."""
    names, model, _ = carrying(owner, tmp_path)
    swapper = hotslot.attach(model)
    names["pipe"].fuse_lora() if owner == "diffusers" else names["peft_model"].merge_adapter()
    obey(refusal(MergedError, swapper.deactivate), names)
    swapper.deactivate()


@pytest.mark.parametrize("wrapped", [nn.DataParallel, lambda model: nn.Sequential(nn.ModuleDict({"inner": model}))])
def test_a_wrapper_around_the_model_is_seen_through(wrapped: Any, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path, ZOO["mlp"], seed=1, target_modules=["up", "down"])
    model = wrapped(ZOO["mlp"].build())
    with pytest.raises(HotslotError) as refusal:
        hotslot.attach(model, {"a": folder})
    path = re.search(r"attach to model\.([\w.]+), which has them", str(refusal.value))
    assert path is not None
    inner = model.get_submodule(path[1])
    hotslot.attach(inner, {"a": folder}).activate("a")
    assert_same_output(ZOO["mlp"].output(inner, ZOO["mlp"].inputs()), fresh_output(ZOO["mlp"], folder))
