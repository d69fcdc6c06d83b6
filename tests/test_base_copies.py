"""Weights of the base model's embeddings that adapters carry along: where they differ from the model's they are live
with the adapter, as a fresh load has them, and the model's own come back bit for bit.
"""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hotslot
from adapters import expected_peft_warnings, make_adapter, random_peft_model
from compiling import Backend
from hotslot.errors import ModelError, UnexpectedTargetError, UnsupportedError
from hotslot.testing import no_recompile, same_addresses
from oracle import assert_same_output, assert_unchanged, error, fresh, fresh_output, snapshot
from zoo import TIED, ZOO, Entry

PREFIX = "base_model.model."
# entry → paths of embedding and output layer, a module to adapt
MODULES = {
    "llama": ("model.embed_tokens", "lm_head", "q_proj"),
    "llama_tied": ("model.embed_tokens", "lm_head", "q_proj"),
    "gpt2": ("transformer.wte", "lm_head", "c_attn"),
}
ENTRIES = {name: (ZOO | TIED)[name] for name in MODULES}
WEIGHT = (48, 16)
Folders = dict[str, Path]


def carrying(folder: Path, entry: Entry, *copies: str, seed: int, **config: Any) -> Path:
    """An adapter whose file has other values than the model for these tensors."""
    target = MODULES[entry.name][2]
    make_adapter(folder, entry, seed=seed, **{"r": 4, "target_modules": [target], **config})
    file, generator = folder / "adapter_model.safetensors", torch.Generator().manual_seed(seed)
    tensors = load_file(file)
    tensors.update({PREFIX + name: torch.randn(WEIGHT, generator=generator) for name in copies})
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture(params=ENTRIES, ids=list(ENTRIES))
def entry(request: pytest.FixtureRequest) -> Entry:
    return ENTRIES[request.param]


@pytest.fixture
def folders(entry: Entry, tmp_path: Path) -> Folders:
    """Of every way in which PEFT saves and loads them."""
    embedding, head, target = MODULES[entry.name]
    name = embedding.rpartition(".")[2]
    return {
        "embedding": carrying(tmp_path / "0", entry, f"{embedding}.weight", seed=0),
        "head": carrying(tmp_path / "1", entry, f"{head}.weight", seed=1),
        "both": carrying(tmp_path / "2", entry, f"{embedding}.weight", f"{head}.weight", seed=2),
        "lora on it": carrying(
            tmp_path / "3", entry, f"{embedding}.base_layer.weight", seed=3, target_modules=[target, name]
        ),
        "none": make_adapter(tmp_path / "4", entry, seed=4, r=4, target_modules=[target]),
        "equal": make_adapter(tmp_path / "5", entry, seed=5, r=4, target_modules=[target, name]),
    }


@pytest.fixture
def with_tokens(entry: Entry, tmp_path: Path) -> Folders:
    """They cannot be on one model with a LoRA on the embedding."""
    embedding, head, target = MODULES[entry.name]
    tokens = {"trainable_token_indices": {embedding.rpartition(".")[2]: [3, 5]}}
    copied = f"{embedding}.token_adapter.base_layer.weight"
    return {
        "tokens": carrying(tmp_path / "6", entry, copied, seed=6, **tokens),
        "head": carrying(tmp_path / "7", entry, f"{head}.weight", seed=7),
        "none": make_adapter(tmp_path / "8", entry, seed=8, r=4, target_modules=[target]),
    }


def built(entry: Entry, folder: Path | None = None) -> nn.Module:
    return entry.build().requires_grad_(False) if folder is None else fresh(entry, folder)


def assert_live(entry: Entry, model: nn.Module, folder: Path | None) -> None:
    plain = entry.output(built(entry), entry.inputs())
    assert_same_output(
        entry.output(model, entry.inputs()), fresh_output(entry, folder) if folder else plain, exact=True
    )


@pytest.mark.parametrize("kind", ["folders", "with_tokens"])
@pytest.mark.parametrize("came_with_peft", [False, True])
def test_every_transition_is_exact(
    entry: Entry, kind: str, came_with_peft: bool, request: pytest.FixtureRequest
) -> None:
    folders: Folders = request.getfixturevalue(kind)
    model = built(entry, folders["none"] if came_with_peft else None)
    before = snapshot(model)
    swapper = hotslot.attach(model, folders)
    for first, second in permutations(folders, 2):
        for name in (first, second):
            swapper.activate(name)
            assert_live(entry, model, folders[name])
    swapper.deactivate()
    assert_live(entry, model, None)
    swapper.activate("head")
    swapper.rollback()
    assert_live(entry, model, None)
    swapper.activate("head")
    swapper.detach()
    assert_unchanged(before, snapshot(model))


def test_control_the_weights_make_a_difference(entry: Entry, folders: Folders, tmp_path: Path) -> None:
    for name in ("embedding", "head", "both", "lora on it"):
        bare = tmp_path / f"bare {name}"
        bare.mkdir()
        (bare / "adapter_config.json").write_bytes((folders[name] / "adapter_config.json").read_bytes())
        tensors = load_file(folders[name] / "adapter_model.safetensors")
        save_file({key: value for key, value in tensors.items() if "lora_" in key}, bare / "adapter_model.safetensors")
        assert error(fresh_output(entry, folders[name]), fresh_output(entry, bare)) > 1e-3


def test_nothing_is_compiled_again(entry: Entry, folders: Folders) -> None:
    model = built(entry)
    swapper = hotslot.attach(model, folders)
    backend = Backend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    entry.output(compiled, entry.inputs())
    graphs = backend.graphs
    with no_recompile(), same_addresses(model):
        for name in ("embedding", "none", "both", "lora on it", "head"):
            swapper.activate(name)
            assert_live(entry, compiled, folders[name])
        swapper.deactivate()
        assert_live(entry, compiled, None)
    assert backend.graphs == graphs > 0


@pytest.mark.parametrize("name", ["embedding", "head", "both", "none"])
def test_drop_in(entry: Entry, folders: Folders, name: str) -> None:
    model = built(entry, folders["none"])
    for which in (name, "none", name):
        hotslot.hotswap_adapter(model, folders[which], "default")
        assert_live(entry, model, folders[which])


@pytest.mark.parametrize("names", [("embedding", "none", "head"), ("lora on it",)])
def test_what_is_saved_is_the_live_adapter(
    entry: Entry, names: tuple[str, ...], folders: Folders, tmp_path: Path
) -> None:
    """PEFT saves such weights if it is asked to, and those of a targeted `embed_tokens` by itself."""
    model = built(entry, folders["none"])
    swapper = hotslot.attach(model, {name: folders[name] for name in names})
    for name in names:
        swapper.activate(name)
        with expected_peft_warnings():
            model.save_pretrained(tmp_path / name, save_embedding_layers=True)
        assert_live(entry, model, tmp_path / name)


def test_files_of_save_embedding_layers_are_taken(entry: Entry, tmp_path: Path) -> None:
    """All forms in which PEFT itself writes copies: they equal the model's, and say nothing."""
    embedding, head, target = MODULES[entry.name]
    name = embedding.rpartition(".")[2]
    options: list[dict[str, Any]] = [{}, {"trainable_token_indices": {name: [3, 5]}}, {"modules_to_save": [head]}]
    for i, option in enumerate(options):
        folder = tmp_path / str(i)
        with expected_peft_warnings():
            peft_model = random_peft_model(entry, seed=i, r=4, target_modules=[target], **option)
            peft_model.save_pretrained(folder, save_embedding_layers=True)
        model = built(entry)
        before = snapshot(model)
        swapper = hotslot.attach(model, {"a": folder})
        swapper.activate("a")
        assert_live(entry, model, folder)
        swapper.deactivate()
        assert_live(entry, model, None)
        swapper.detach()
        assert_unchanged(before, snapshot(model))


def test_trained_weights_survive_and_the_model_s_own_too(entry: Entry, folders: Folders) -> None:
    model = built(entry)
    swapper = hotslot.attach(model, folders)
    swapper.activate("embedding")
    with torch.no_grad():
        model.get_input_embeddings().get_base_layer().weight.mul_(1.5)  # type: ignore[operator,union-attr]
    trained = entry.output(model, entry.inputs())
    swapper.activate("none")
    assert_live(entry, model, folders["none"])
    swapper.rollback()
    assert torch.equal(entry.output(model, entry.inputs()), trained)
    swapper.deactivate()
    assert_live(entry, model, None)


def test_another_vocabulary_is_refused_as_peft_refuses_it(entry: Entry, tmp_path: Path) -> None:
    embedding, _, target = MODULES[entry.name]
    folder = make_adapter(tmp_path / "a", entry, seed=1, r=4, target_modules=[target])
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), f"{PREFIX}{embedding}.weight": torch.randn(50, 16)}, file)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh(entry, folder)
    for model in (entry.build(), fresh(entry, make_adapter(tmp_path / "b", entry, seed=2, target_modules=[target]))):
        before = snapshot(model)
        with pytest.raises(UnsupportedError, match="resized"):
            hotslot.attach(model, {"a": folder})
        assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize(("on_it", "wrapping"), [(True, ""), (False, "base_layer.")])
def test_names_that_peft_leaves_out_are_refused(entry: Entry, on_it: bool, wrapping: str, tmp_path: Path) -> None:
    embedding, _, target = MODULES[entry.name]
    targets = [target, embedding.rpartition(".")[2]] if on_it else [target]
    folder = make_adapter(tmp_path, entry, seed=1, r=4, target_modules=targets)
    file, key = folder / "adapter_model.safetensors", f"{PREFIX}{embedding}.{wrapping}weight"
    tensors = {name: value for name, value in load_file(file).items() if "lora_" in name}
    save_file(tensors, file)
    without = fresh_output(entry, folder)
    save_file({**tensors, key: torch.randn(WEIGHT)}, file)
    assert torch.equal(fresh_output(entry, folder), without)  # PEFT says nothing
    model = entry.build()
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match="under a name that PEFT does not load"):
        hotslot.attach(model, {"a": folder})
    assert_unchanged(before, snapshot(model))


def test_other_adapters_on_the_model_are_not_changed(entry: Entry, folders: Folders) -> None:
    model = built(entry, folders["none"])
    with expected_peft_warnings():
        model.load_adapter(str(folders["equal"]), adapter_name="second")  # type: ignore[operator]
    swapper = hotslot.attach(model, {"none": folders["none"]})
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match="which another adapter on it uses too"):
        swapper.load("embedding", folders["embedding"])
    assert not swapper.fits(folders["embedding"])
    assert_unchanged(before, snapshot(model))


def test_weights_of_no_module_are_refused(entry: Entry, tmp_path: Path) -> None:
    folder = carrying(tmp_path, entry, "other.embeddings.weight", seed=1)
    model = entry.build()
    before = snapshot(model)
    with pytest.raises(UnexpectedTargetError, match="weights of a module"):
        hotslot.attach(model, {"a": folder})
    assert_unchanged(before, snapshot(model))


def test_a_weight_that_was_replaced_is_refused(entry: Entry, folders: Folders) -> None:
    model = built(entry)
    swapper = hotslot.attach(model, {name: folders[name] for name in ("embedding", "none")})
    layer = model.get_input_embeddings()  # type: ignore[operator]
    layer.weight = nn.Parameter(layer.weight.clone())
    with pytest.raises(ModelError, match="was replaced"):
        swapper.activate("embedding")


def test_blends_with_such_weights_are_refused(entry: Entry, folders: Folders) -> None:
    model = built(entry)
    swapper = hotslot.attach(model, folders, plan=hotslot.plan(model, folders))
    for weights in ({"embedding": 1.0, "none": 1.0}, {"lora on it": 0.5}):
        with pytest.raises(UnsupportedError, match="cannot be blended"):
            swapper.activate(weights)
    swapper.activate({"equal": 0.5, "none": 1.0})
