"""The base model's own weights change while adapters are loaded: trained, loaded anew, of another dtype."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import hotslot
from adapters import make_adapter
from hotslot.errors import ModelError
from methods import make_method_adapter, tensors_of
from oracle import assert_same_output, fresh
from zoo import ZOO

LLAMA = ZOO["llama"]
# Of which something is computed from the base when they are loaded, and some of which nothing is.
METHODS = ["HIRA", "LN_TUNING", "OSF", "PISSA"]


def make(folder: Path, method: str) -> Path:
    if method == "PISSA":
        return make_adapter(folder, LLAMA, seed=1, r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    return make_method_adapter(folder, method, seed=1)


def merged_into(base: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(base, str(folder)).eval()
        return tensors_of(model.merge_and_unload())


def assert_same_weights(model: nn.Module, want: dict[str, torch.Tensor]) -> None:
    got = tensors_of(model)
    assert got.keys() == want.keys()
    for name, values in want.items():
        assert got[name].dtype == values.dtype, name
        assert torch.equal(got[name], values), name


@pytest.mark.parametrize("method", METHODS)
def test_what_is_merged_is_made_of_the_weights_that_are_there(method: str, tmp_path: Path) -> None:
    model = LLAMA.build()
    other = make_method_adapter(tmp_path / "other", "LOHA", seed=2)
    swapper = hotslot.attach(model, {"a": make(tmp_path / "a", method), "b": other}, route="merged")
    for name in ("b", "a"):
        swapper.activate(name)
    swapper.deactivate()
    model.load_state_dict(LLAMA.build(seed=1).state_dict())
    swapper.activate("a")
    assert_same_weights(model, merged_into(LLAMA.build(seed=1), tmp_path / "a"))
    swapper.check_integrity()
    swapper.activate("b")
    assert_same_weights(model, merged_into(LLAMA.build(seed=1), other))
    swapper.deactivate()
    assert_same_weights(model, tensors_of(LLAMA.build(seed=1)))


@pytest.mark.parametrize("method", ["LN_TUNING", "OFT", "PISSA"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_another_dtype_while_it_is_merged(method: str, dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path) -> None:
    model = LLAMA.build(dtype=dtypes[0])
    folders = {"a": make(tmp_path / "a", method), "b": make_method_adapter(tmp_path / "b", "LOHA", seed=2)}
    swapper = hotslot.attach(model, folders, route="merged", plan=hotslot.plan(model, merge="peft"))
    swapper.activate("a")
    model.to(dtypes[1])
    for name in ("b", "a"):
        swapper.activate(name)
        assert_same_weights(model, merged_into(LLAMA.build(dtype=dtypes[0]).to(dtypes[1]), folders[name]))
    swapper.deactivate()
    assert_same_weights(model, tensors_of(LLAMA.build(dtype=dtypes[0]).to(dtypes[1])))


def test_a_copy_in_the_file_that_equalled_the_base(tmp_path: Path) -> None:
    """PEFT saves the embedding beside a LoRA on it; a fresh load puts that in the place of the base's."""
    folder = make_adapter(tmp_path / "a", LLAMA, seed=1, target_modules=["embed_tokens"])
    model: Any = LLAMA.build()
    swapper = hotslot.attach(model, {"a": folder})
    embedding = model.model.embed_tokens.base_layer.weight
    with torch.no_grad():
        embedding += 1
    swapper.activate("a")
    want = fresh(LLAMA, folder)
    assert_same_output(LLAMA.output(model, LLAMA.inputs()), LLAMA.output(want, LLAMA.inputs()), exact=True)
    swapper.deactivate()
    assert torch.equal(embedding, LLAMA.build().get_parameter("model.embed_tokens.weight") + 1)


def test_a_file_cannot_bring_back_what_was_trained(tmp_path: Path) -> None:
    LLAMA.build().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    model: Any = type(LLAMA.build()).from_pretrained(tmp_path / "base").eval()  # type: ignore[attr-defined]
    plan = hotslot.plan(model, pristine="file")
    swapper = hotslot.attach(model, {"a": make(tmp_path / "a", "LOHA")}, route="merged", plan=plan)
    swapper.activate("a")
    swapper.deactivate()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 1
    trained = tensors_of(model)
    for _ in range(2):
        with pytest.raises(ModelError, match="checkpoint does not have what the model holds"):
            swapper.activate("a")
        assert_same_weights(model, trained)
    model.load_state_dict(LLAMA.build().state_dict())
    swapper.activate("a")
    assert_same_weights(model, merged_into(LLAMA.build(), tmp_path / "a"))


@pytest.mark.parametrize("renamed", [True, False])
def test_a_file_that_is_written_over_while_it_alone_has_the_base(renamed: bool, tmp_path: Path) -> None:
    LLAMA.build().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    LLAMA.build(seed=1).save_pretrained(tmp_path / "other")  # type: ignore[operator]
    model: Any = type(LLAMA.build()).from_pretrained(tmp_path / "base").eval()  # type: ignore[attr-defined]
    for param in model.parameters():
        param.data = param.data.clone()  # transformers maps the file, too
    folder = make(tmp_path / "a", "LOHA")
    swapper = hotslot.attach(model, {"a": folder}, route="merged", plan=hotslot.plan(model, pristine="file"))
    swapper.activate("a")
    mine, other = (tmp_path / name / "model.safetensors" for name in ("base", "other"))
    if renamed:
        other.replace(mine)
        swapper.deactivate()
        assert_same_weights(model, tensors_of(LLAMA.build()))
    else:
        mine.write_bytes(other.read_bytes())
        with pytest.raises(ModelError, match="written over"):
            swapper.deactivate()
        assert_same_weights(model, merged_into(LLAMA.build(), folder))


def test_training_what_is_not_read_makes_nothing_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = LLAMA.build()
    swapper = hotslot.attach(model, {"a": make(tmp_path / "a", "LOHA")}, route="merged")
    made: list[object] = []
    prepare = swapper.engine.binding.merger.prepare
    monkeypatch.setattr(swapper.engine.binding.merger, "prepare", lambda *args: made.append(args) or prepare(*args))
    with torch.no_grad():
        model.lm_head.weight += 1
        swapper.activate("a")
        model.model.layers[0].self_attn.q_proj.weight += 1  # of what is merged, and not of the base
        swapper.activate("a")
    swapper.deactivate()
    assert not made


def test_weights_of_inference_mode_are_refused_by_name(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", "LOHA")
    copies = make_adapter(tmp_path / "copies", LLAMA, seed=1, target_modules=["embed_tokens"])
    with torch.inference_mode():
        model = LLAMA.build()
        with pytest.raises(ModelError, match="inference mode"):
            hotslot.attach(model, {"a": folder}, route="merged")
        swapper = hotslot.attach(model, {"copies": copies})
        swapper.activate("copies")
    want = fresh(LLAMA, copies)
    assert_same_output(LLAMA.output(model, LLAMA.inputs()), LLAMA.output(want, LLAMA.inputs()), exact=True)
