"""Adapters of `ensure_weight_tying`: PEFT adapts the layers that share the embedding's weight together with it. What a
fresh load makes of the file is what a swap makes of it, or it is refused, and PEFT's behaviour that is why is shown.
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
from hotslot.errors import ModelError, UnsupportedError
from hotslot.testing import no_recompile, same_addresses
from oracle import assert_same_output, assert_unchanged, error, fresh, fresh_output, snapshot
from zoo import TIED, ZOO, Entry

ENTRY, GPT2, UNTIED = TIED["llama_tied"], ZOO["gpt2"], ZOO["llama"]
PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
TYING = {**PLAIN, "ensure_weight_tying": True}
TOKENS = {"trainable_token_indices": {"embed_tokens": [3, 5]}}
# Adapters that can be on one model: each beside those that tie nothing.
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {
        "embedding": {**TYING, "target_modules": ["q_proj", "embed_tokens"]},
        "head": {**TYING, "target_modules": ["q_proj", "lm_head"], "r": 2},
        "pattern": {**TYING, "target_modules": ".*(q_proj|embed_tokens)$"},
        "untied": {**PLAIN, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        "none": PLAIN,
    },
    "saved": {
        "embedding": {**TYING, "modules_to_save": ["embed_tokens"]},
        "head": {**TYING, "modules_to_save": ["lm_head"]},
        "untied": {**PLAIN, "modules_to_save": ["embed_tokens", "lm_head"]},
        "none": PLAIN,
    },
    "tokens": {
        "embedding": {**TYING, **TOKENS},
        "other": {**TYING, "trainable_token_indices": {"embed_tokens": [7], "lm_head": [7]}},
        "by itself": {**PLAIN, **TOKENS},
        "none": PLAIN,
    },
}
Folders = dict[str, Path]

pytestmark = pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")  # tokens are tied anyway


@pytest.fixture(scope="module", params=GROUPS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp(request.param)
    drawn = enumerate(GROUPS[request.param].items())
    return {name: make_adapter(root / name, ENTRY, seed=i, **config) for i, (name, config) in drawn}


def assert_live(model: nn.Module, folder: Path | None, entry: Entry = ENTRY) -> None:
    plain = entry.output(entry.build().requires_grad_(False), entry.inputs())
    assert_same_output(
        entry.output(model, entry.inputs()), fresh_output(entry, folder) if folder else plain, exact=folder is None
    )


@pytest.mark.parametrize("came_with", [None, "none"])
def test_every_transition_is_right(folders: Folders, came_with: str | None) -> None:
    model = fresh(ENTRY, folders[came_with]) if came_with else ENTRY.build().requires_grad_(False)
    before = snapshot(model)
    swapper = hotslot.attach(model, folders)
    for first, second in permutations(folders, 2):
        for name in (first, second):
            swapper.activate(name)
            assert_live(model, folders[name])
    swapper.deactivate()
    assert_live(model, None)
    swapper.activate("embedding")
    swapper.detach()
    assert_unchanged(before, snapshot(model))


def test_a_model_that_came_with_one(folders: Folders) -> None:
    """As long as no adapter wants tied copies untied, which PEFT has made one parameter."""
    model = fresh(ENTRY, folders["embedding"])
    before = snapshot(model)
    shares = "untied" in folders and any("modules_to_save" in name for name, _ in model.named_parameters())
    sources = {name: folder for name, folder in folders.items() if not (shares and name == "untied")}
    swapper = hotslot.attach(model, sources)
    for name in sources:
        swapper.activate(name)
        assert_live(model, folders[name])
    if shares:
        with pytest.raises(UnsupportedError, match="the one that it is tied to"):
            swapper.load("untied", folders["untied"])
    swapper.detach()
    assert_unchanged(before, snapshot(model))


def test_nothing_is_compiled_again(folders: Folders) -> None:
    model = ENTRY.build().requires_grad_(False)
    swapper = hotslot.attach(model, folders)
    backend = Backend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    ENTRY.output(compiled, ENTRY.inputs())
    graphs = backend.graphs
    with no_recompile(), same_addresses(model):
        for name in (*folders, "embedding"):
            swapper.activate(name)
            assert_live(compiled, folders[name])
    assert backend.graphs == graphs > 0


def test_what_is_saved_loads_as_the_live_adapter(folders: Folders, tmp_path: Path) -> None:
    model = fresh(ENTRY, folders["none"])
    swapper = hotslot.attach(model, folders)
    for name in folders:
        swapper.activate(name)
        with expected_peft_warnings():
            model.save_pretrained(tmp_path / name)
        assert_live(model, tmp_path / name)


def test_the_option_does_nothing_where_nothing_is_tied(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path, UNTIED, seed=1, **{**TYING, "target_modules": ["q_proj", "embed_tokens"]})
    model = UNTIED.build().requires_grad_(False)
    hotslot.attach(model, {"a": folder}).activate("a")
    assert_live(model, folder, UNTIED)


def test_tied_copies_that_peft_loads_into_the_base(tmp_path: Path) -> None:
    """gpt2's embedding has a name that PEFT does not know on loading: the head's copy goes into the base's weight."""
    entry, config = GPT2, {"r": 4, "ensure_weight_tying": True, "target_modules": ["c_attn"]}
    folder = make_adapter(tmp_path, entry, seed=1, **config, modules_to_save=["lm_head"])
    assert not hasattr(fresh(entry, folder).base_model.model.lm_head, "modules_to_save")
    model = entry.build().requires_grad_(False)
    swapper = hotslot.attach(model, {"a": folder})
    swapper.activate("a")
    assert_live(model, folder, entry)
    swapper.deactivate()
    assert_live(model, None, entry)


# --- refused --------------------------------------------------------------------------------------------------------


def assert_refused(entry: Entry, folder: Path, says: str) -> None:
    model = entry.build()
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=says):
        hotslot.attach(model, {"a": folder})
    assert_unchanged(before, snapshot(model))


def test_what_peft_drops_when_it_loads_its_own_file_is_refused(tmp_path: Path) -> None:
    """It ties by the names embed_tokens and lm_head, and saves a config for gpt2 that has neither."""
    config = {"r": 4, "ensure_weight_tying": True, "target_modules": ["c_attn", "lm_head"]}
    trained = random_peft_model(GPT2, seed=1, **config)
    folder = make_adapter(tmp_path, GPT2, seed=1, **config)
    assert error(fresh_output(GPT2, folder), GPT2.output(trained, GPT2.inputs())) > 1e-3
    assert any("lm_head.lora_B" in key for key in load_file(folder / "adapter_model.safetensors"))
    assert_refused(GPT2, folder, "PEFT ties other layers")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_file_of_an_untied_model_is_refused_on_a_tied_one_and_the_other_way(tmp_path: Path) -> None:
    config = {**TYING, "target_modules": ["q_proj", "embed_tokens"]}
    of_untied = make_adapter(tmp_path / "untied", UNTIED, seed=1, **config)
    assert any("lm_head.lora_A" in name for name, _ in fresh(ENTRY, of_untied).named_parameters())  # of no file
    assert_refused(ENTRY, of_untied, "PEFT ties other layers")
    of_tied = make_adapter(tmp_path / "tied", ENTRY, seed=1, **config)
    assert not any("lm_head.lora_A" in name for name, _ in fresh(UNTIED, of_tied).named_parameters())  # it is dropped
    assert_refused(UNTIED, of_tied, "PEFT ties other layers")


def test_torn_values_are_refused(tmp_path: Path) -> None:
    """PEFT has one place for both, where the last that is loaded stays."""
    for kind, key in (("lora", "lm_head.lora_A.weight"), ("saved", "lm_head.weight")):
        folder = make_adapter(tmp_path / kind, ENTRY, seed=1, **GROUPS[kind]["embedding"])
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, f"base_model.model.{key}": tensors[f"base_model.model.{key}"] * 2}, file)
        assert_refused(ENTRY, folder, "has other values for a layer")


def test_shared_matrices_are_not_swapped_where_they_are(tmp_path: Path) -> None:
    """The drop-in moves nothing, and others than tied values would go to one place. Trained apart they must not be."""
    groups = GROUPS["lora"]
    first, second = (make_adapter(tmp_path / n, ENTRY, seed=i, **groups[n]) for i, n in enumerate(("head", "untied")))
    model = fresh(ENTRY, first)
    before = snapshot(model)
    with pytest.raises(ModelError, match="share their matrices"):
        hotslot.hotswap_adapter(model, second, "default")
    assert_unchanged(before, snapshot(model))
    for name, param in model.named_parameters():
        param.requires_grad_("lora_" in name)
    before = snapshot(model)
    with pytest.raises(ModelError, match="share their matrices"):
        hotslot.attach(model, {"second": second})
    assert_unchanged(before, snapshot(model))
