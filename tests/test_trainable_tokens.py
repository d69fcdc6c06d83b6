"""Adapters that train some tokens by themselves (`trainable_token_indices`): other tokens under each of them, none
under the next, and nothing compiles again.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter as peft_hotswap
from safetensors.torch import load_file
from torch import nn

import hotslot
from adapters import expected_peft_warnings, make_adapter
from compiling import WAYS, Backend
from hotslot.errors import (
    ConfigError,
    HotslotError,
    MergedError,
    ModelError,
    RankError,
    ShapeError,
    TensorError,
    UnexpectedTargetError,
    UnsupportedError,
)
from hotslot.testing import no_recompile, same_addresses
from oracle import assert_same_output, assert_unchanged, error, fresh, fresh_output, snapshot
from zoo import TIED, ZOO, Entry

# entry → its embedding, a module to adapt, one to save whole
MODULES = {
    "llama": ("embed_tokens", "q_proj", "norm"),
    "llama_tied": ("embed_tokens", "q_proj", "norm"),
    "gpt2": ("wte", "c_attn", "ln_f"),
    "embedding": ("word", "mix", "head"),
}
ENTRIES = {name: (ZOO | TIED)[name] for name in MODULES}
TIED_NAMES = ("llama_tied", "gpt2")
Folders = dict[str, Path]


def configs(entry: Entry) -> dict[str, dict[str, Any]]:
    embedding, target, saved = MODULES[entry.name]
    plain = {"r": 4, "lora_alpha": 6, "target_modules": [target]}
    return {
        "three": {**plain, "trainable_token_indices": {embedding: [3, 40, 7]}},
        "one": {**plain, "trainable_token_indices": {embedding: [40]}},
        "others": {**plain, "trainable_token_indices": {embedding: [5, 6]}, "lora_alpha": 3},
        "head": {**plain, "trainable_token_indices": {embedding: [0, 8]}, "modules_to_save": [saved]},
        "none": plain,
    }


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Entry], Folders]:
    known: dict[str, Folders] = {}

    def make(entry: Entry) -> Folders:
        if entry.name not in known:
            root = tmp_path_factory.mktemp(entry.name)
            known[entry.name] = {
                name: make_adapter(root / name, entry, seed=i, **config)
                for i, (name, config) in enumerate(configs(entry).items())
            }
        return known[entry.name]

    return make


@pytest.fixture(params=ENTRIES, ids=list(ENTRIES))
def entry(request: pytest.FixtureRequest) -> Entry:
    return ENTRIES[request.param]


@pytest.fixture
def folders(entry: Entry, made: Callable[[Entry], Folders]) -> Folders:
    return made(entry)


def built(entry: Entry, folders: Folders, came_with: str | None) -> nn.Module:
    return entry.build().requires_grad_(False) if came_with is None else fresh(entry, folders[came_with])


def assert_live(entry: Entry, model: nn.Module, folder: Path | None, *, inputs: int = 0) -> None:
    """Bitwise: with these tokens in the input, with others, and in the logits of a tied output layer."""
    for seed in (inputs, inputs + 1):
        plain = entry.build().requires_grad_(False)
        given = entry.inputs(seed)
        expected = fresh_output(entry, folder, input_seed=seed) if folder else entry.output(plain, given)
        assert_same_output(entry.output(model, given), expected, exact=True)


def tokens_on(model: nn.Module, name: str = "default") -> Any:
    return model.peft_config[name].trainable_token_indices


# --- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("came_with", [None, "three", "one", "none", "head"])
def test_every_transition_is_exact(entry: Entry, folders: Folders, came_with: str | None) -> None:
    model = built(entry, folders, came_with)
    before = snapshot(model)
    swapper = hotslot.attach(model, folders)
    assert_live(entry, model, folders[came_with] if came_with else None)
    for first, second in permutations(folders, 2):
        for name in (first, second):
            swapper.activate(name)
            assert_live(entry, model, folders[name])
    swapper.deactivate()
    assert_live(entry, model, None)
    swapper.activate("three")
    assert swapper.rollback().changed
    assert_live(entry, model, None)
    with swapper.using("others"):
        assert_live(entry, model, folders["others"])
    assert_live(entry, model, None)
    swapper.activate("three")
    swapper.detach()
    assert_unchanged(before, snapshot(model))


def test_control_the_adapters_differ(entry: Entry, folders: Folders) -> None:
    inputs = {"input_ids": torch.tensor([[3, 40, 7, 5, 6, 8]])}
    outputs = [entry.output(built(entry, folders, None), inputs)]
    outputs += [entry.output(fresh(entry, folder), inputs) for folder in folders.values()]
    for one, other in permutations(outputs, 2):
        assert error(one, other) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_cast_as_peft_casts(entry: Entry, folders: Folders, dtype: torch.dtype) -> None:
    model = entry.build(dtype=dtype).requires_grad_(False)
    swapper = hotslot.attach(model, folders)
    for name in ("three", "one", "none"):
        swapper.activate(name)
        expected = fresh_output(entry, folders[name], dtype=dtype)
        assert_same_output(entry.output(model, entry.inputs(dtype=dtype)), expected, exact=True)


def test_a_list_means_the_input_embedding(tmp_path: Path) -> None:
    entry = ENTRIES["llama_tied"]
    first = make_adapter(tmp_path / "a", entry, seed=1, target_modules=["q_proj"], trainable_token_indices=[4, 9])
    second = make_adapter(tmp_path / "b", entry, seed=2, target_modules=["q_proj"], trainable_token_indices=[9, 11, 2])
    model = built(entry, {}, None)
    swapper = hotslot.attach(model, {"first": first, "second": second})
    for name, folder in (("second", second), ("first", first), ("second", second)):
        swapper.activate(name)
        assert_live(entry, model, folder)


@pytest.mark.parametrize("name", TIED_NAMES)
def test_other_tokens_for_the_output_layer(name: str, tmp_path: Path) -> None:
    """PEFT leaves the layers untied then, and a tied adapter on the same model is refused."""
    entry = ENTRIES[name]
    embedding, target, _ = MODULES[name]
    indices = [{embedding: [3, 5], "lm_head": [4]}, {embedding: [7], "lm_head": [4, 9, 11]}]
    apart = {
        str(i): make_adapter(
            tmp_path / str(i), entry, seed=i, r=4, target_modules=[target], trainable_token_indices=tokens
        )
        for i, tokens in enumerate(indices)
    }
    model = built(entry, {}, None)
    before = snapshot(model)
    swapper = hotslot.attach(model, apart)
    for key in ("1", "0", "1"):
        swapper.activate(key)
        assert_live(entry, model, apart[key])
    swapper.deactivate()
    assert_live(entry, model, None)
    tied = make_adapter(
        tmp_path / "tied", entry, seed=9, target_modules=[target], trainable_token_indices={embedding: [3]}
    )
    with pytest.raises(UnsupportedError, match="that it ties to others than the model's slot does"):
        swapper.load("tied", tied)
    swapper.detach()
    assert_unchanged(before, snapshot(model))
    with pytest.raises(UnsupportedError, match="ties to the embedding"):
        hotslot.attach(model, {**apart, "tied": tied})
    assert_unchanged(before, snapshot(model))


def test_layers_that_share_the_embedding(tmp_path: Path) -> None:
    entry = ZOO["t5"]
    adapters = {
        str(i): make_adapter(
            tmp_path / str(i), entry, seed=i, r=4, target_modules=["q"], trainable_token_indices={"shared": tokens}
        )
        for i, tokens in enumerate(([3, 5], [7], [5, 8, 9]))
    }
    model = built(entry, {}, None)
    before = snapshot(model)
    swapper = hotslot.attach(model, adapters)
    for key in ("1", "0", "2", "1"):
        swapper.activate(key)
        assert_live(entry, model, adapters[key])
    swapper.deactivate()
    assert_live(entry, model, None)
    swapper.detach()
    assert_unchanged(before, snapshot(model))


# --- still ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("came_with", [None, "one"])
def test_swaps_compile_nothing(entry: Entry, folders: Folders, came_with: str | None, way: str) -> None:
    if entry.name == "embedding" and way == "layer.compile() each":
        pytest.skip("dynamo has nothing to compile in a bare Embedding")
    model = built(entry, folders, came_with)
    swapper = hotslot.attach(model, folders)
    backend = Backend()
    compiled = WAYS[way](model, backend)
    with torch.no_grad():
        entry.output(compiled, entry.inputs())
        graphs = backend.graphs
        assert graphs
        with no_recompile(), same_addresses(model):
            for name in ("three", "others", "none", "one", "head", "three"):
                swapper.activate(name)
                assert_live(entry, compiled, folders[name])
            swapper.deactivate()
            assert_live(entry, compiled, None)
    assert backend.graphs == graphs


def test_control_peft_compiles_other_tokens_again(entry: Entry, folders: Folders) -> None:
    """What the tests above would count, if the indices were where PEFT keeps them."""
    model = fresh(entry, folders["three"])
    backend = Backend()
    compiled = torch.compile(model, backend=backend)
    entry.output(compiled, entry.inputs())
    graphs = backend.graphs
    layer = next(m for m in model.modules() if type(m).__name__ == "TrainableTokensLayer")
    layer.token_indices["default"] = [3, 41, 7]
    entry.output(compiled, entry.inputs())
    assert backend.graphs > graphs


def test_control_peft_s_hotswap_refuses_or_fails(entry: Entry, folders: Folders) -> None:
    model = fresh(entry, folders["three"])
    with expected_peft_warnings(), pytest.raises((KeyError, ValueError, RuntimeError)):
        peft_hotswap(model, str(folders["others"]), adapter_name="default", torch_device="cpu")


def test_a_model_that_was_compiled_with_peft_s_tokens_is_refused(entry: Entry, folders: Folders) -> None:
    model = fresh(entry, folders["three"])
    before = snapshot(model)
    with pytest.raises(ModelError, match="whose indices compiled code knows"):
        hotslot.attach(torch.compile(model, backend="eager"), folders)
    assert_unchanged(before, snapshot(model))


# --- drop-in --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", [False, True])
def test_drop_in(entry: Entry, folders: Folders, prepared: bool) -> None:
    model = fresh(entry, folders["three"])
    if prepared:
        hotslot.prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    for name in ("one", "others", "none", "three"):
        hotslot.hotswap_adapter(model, folders[name], "default")
        exact = not prepared
        assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, folders[name]), exact=exact)
        assert tokens_on(model) == tokens_on(fresh(entry, folders[name]))
    swapper = hotslot.attach(model, folders)  # after the functions
    swapper.activate("others")
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, folders["others"]))


def test_drop_in_from_a_state_dict(entry: Entry, folders: Folders) -> None:
    donor = fresh(entry, folders["others"])
    state = {k: v for k, v in donor.state_dict().items() if "lora_" in k or "trainable_tokens_delta" in k}
    state = {k: v for k, v in state.items() if not k.startswith("base_model.model.lm_head.")}  # tied: no file has it
    model = fresh(entry, folders["three"])
    hotslot.hotswap_adapter_from_state_dict(model, state, "default", donor.peft_config["default"])
    assert_live(entry, model, folders["others"])


def test_drop_in_refuses_what_has_no_place(entry: Entry, folders: Folders) -> None:
    for came_with, new, refusal in (("one", "three", RankError), ("none", "one", UnexpectedTargetError)):
        model = fresh(entry, folders[came_with])
        before = snapshot(model)
        with pytest.raises(refusal):
            hotslot.hotswap_adapter(model, folders[new], "default")
        assert_unchanged(before, snapshot(model))


# --- PEFT's own calls keep their meaning ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["three", "one", "head", "none", None])
@pytest.mark.parametrize("came_with", ["three", "none"])
def test_what_is_saved_is_the_live_adapter(
    entry: Entry, folders: Folders, name: str | None, came_with: str, tmp_path: Path
) -> None:
    model = fresh(entry, folders[came_with])
    swapper = hotslot.attach(model, folders)
    swapper.activate("others")
    swapper.activate(name) if name else swapper.deactivate()
    if name:
        assert tokens_on(model) == tokens_on(fresh(entry, folders[name]))
    with expected_peft_warnings():
        model.save_pretrained(tmp_path)
    assert_live(entry, model, tmp_path)
    if name:
        theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (folders[name], tmp_path))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


@pytest.mark.parametrize("name", ["three", "none"])
def test_disabling_and_merging(entry: Entry, folders: Folders, name: str) -> None:
    model = fresh(entry, folders["one"])
    swapper = hotslot.attach(model, folders)
    swapper.activate("others")
    swapper.activate(name)
    with model.disable_adapter():
        assert_live(entry, model, None)
    assert_live(entry, model, folders[name])
    own = {key: value.clone() for key, value in model.state_dict().items() if "base_layer" in key}
    model.merge_adapter()
    with pytest.raises(MergedError):
        swapper.activate("one")
    merged = entry.output(model, entry.inputs())
    assert error(merged, fresh_output(entry, folders[name])) < 1e-4
    model.unmerge_adapter()
    embeddings = {key: value for key, value in own.items() if MODULES[entry.name][0] in key}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in embeddings.items())
    swapper.activate("one")
    assert error(entry.output(model, entry.inputs()), fresh_output(entry, folders["one"])) < 1e-4
    swapper.activate(name)
    whole = model.merge_and_unload()
    assert error(entry.output(whole, entry.inputs()), fresh_output(entry, folders[name])) < 1e-4


def test_another_adapter_on_the_model_keeps_its_tokens(entry: Entry, folders: Folders) -> None:
    model = fresh(entry, folders["one"])
    with expected_peft_warnings():
        model.load_adapter(str(folders["others"]), adapter_name="second")
    swapper = hotslot.attach(model, folders)
    swapper.activate("three")
    model.set_adapter("second", inference_mode=True)
    assert_live(entry, model, folders["others"])
    model.set_adapter("default", inference_mode=True)
    assert_live(entry, model, folders["three"])
    swapper.activate("none")
    assert_live(entry, model, folders["none"])
    swapper.detach()
    assert_live(entry, model, folders["one"])
    model.set_adapter("second", inference_mode=True)
    assert_live(entry, model, folders["others"])


def test_adapters_that_come_later_are_peft_s_own(entry: Entry, folders: Folders, tmp_path: Path) -> None:
    """PEFT itself can neither load nor save one without tokens on a model that has another's."""
    model = fresh(entry, folders["none"])
    swapper = hotslot.attach(model, folders)
    swapper.activate("three")
    with expected_peft_warnings():
        model.load_adapter(str(folders["none"]), adapter_name="without")
        model.load_adapter(str(folders["others"]), adapter_name="with")
        model.save_pretrained(tmp_path, selected_adapters=["without", "with"])
    for name, folder in (("without", "none"), ("with", "others"), ("default", "three")):
        model.set_adapter(name, inference_mode=True)
        assert_live(entry, model, folders[folder])
        if name != "default":
            assert_live(entry, model, tmp_path / name)
    swapper.activate("one")
    model.set_adapter("with", inference_mode=True)
    assert_live(entry, model, folders["others"])


def test_state_dict_loads_into_the_model_it_came_from(entry: Entry, folders: Folders) -> None:
    model = fresh(entry, folders["three"])
    swapper = hotslot.attach(model, folders)
    for name in ("three", "one", "none"):
        swapper.activate(name)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        if name != "none":
            assert state.keys() == fresh(entry, folders[name]).state_dict().keys()
        model.load_state_dict(state)
        assert_live(entry, model, folders[name])


def test_a_wrapper_that_is_not_in_use_does_not_show(entry: Entry, folders: Folders) -> None:
    twin, model = fresh(entry, folders["none"]), fresh(entry, folders["none"])
    swapper = hotslot.attach(model, folders)
    swapper.activate("three")
    swapper.activate("none")
    assert model.state_dict().keys() == twin.state_dict().keys()
    model.load_state_dict(twin.state_dict())
    assert_live(entry, model, folders["none"])


# --- state ----------------------------------------------------------------------------------------------------------


def rows_of(model: nn.Module) -> list[nn.Parameter]:
    named = model.named_parameters()
    return [param for name, param in named if "trainable_tokens_delta.default" in name]


def test_trained_rows_survive(entry: Entry, folders: Folders) -> None:
    model = fresh(entry, folders["one"])
    swapper = hotslot.attach(model, folders)
    swapper.activate("three")
    with torch.no_grad():
        for param in rows_of(model):
            param.mul_(1.5)
    trained = [entry.output(model, entry.inputs(seed)) for seed in range(2)]
    assert swapper.activate("three").changed
    assert_live(entry, model, folders["three"])
    swapper.rollback()
    assert all(torch.equal(entry.output(model, entry.inputs(seed)), trained[seed]) for seed in range(2))
    swapper.activate("none")
    assert_live(entry, model, folders["none"])


@pytest.mark.parametrize("came_with", ["one", "three"])
def test_what_came_with_the_model_is_trained_in_its_places(entry: Entry, folders: Folders, came_with: str) -> None:
    """Gradients and one step of an optimizer are PEFT's, though the slot has places to spare."""
    twin, model = fresh(entry, folders[came_with]), fresh(entry, folders[came_with])
    swapper = hotslot.attach(model, folders)
    inputs = {"input_ids": torch.tensor([[3, 40, 7, 40, 0, 1]])}
    for subject in (twin, model):
        for param in rows_of(subject):
            param.requires_grad_(True)
        optimizer = torch.optim.SGD(rows_of(subject), lr=0.1)
        entry.read(subject(**inputs)).pow(2).sum().backward()
        optimizer.step()
    assert torch.equal(entry.output(model, inputs), entry.output(twin, inputs))
    swapper.activate("others")
    swapper.detach()
    assert torch.equal(entry.output(model, inputs), entry.output(twin, inputs))


def test_update_gives_other_rows(entry: Entry, folders: Folders) -> None:
    model = built(entry, folders, None)
    swapper = hotslot.attach(model, folders)
    swapper.activate("three")
    tensors = load_file(folders["three"] / "adapter_model.safetensors")
    changed = {key: value * 2 for key, value in tensors.items()}
    before = swapper.version
    swapper.update("three", changed)
    assert swapper.version != before
    doubled = entry.output(model, entry.inputs())
    assert error(doubled, fresh_output(entry, folders["three"])) > 1e-3
    swapper.update("three", tensors)
    assert_live(entry, model, folders["three"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_on_their_own(entry: Entry, folders: Folders, copied: Callable[[nn.Module], nn.Module]) -> None:
    model = fresh(entry, folders["one"])
    swapper = hotslot.attach(model, folders)
    swapper.activate("three")
    other = copied(model)
    swapper.activate("none")
    assert_live(entry, other, folders["three"])


def test_a_model_that_was_cast_is_put_right(entry: Entry, folders: Folders) -> None:
    model = built(entry, folders, None)
    swapper = hotslot.attach(model, folders)
    swapper.activate("three")
    model.double()
    for name in ("none", "one", "others"):
        swapper.activate(name)
    model.float()
    for name in ("three", "none"):
        swapper.activate(name)
        assert_live(entry, model, folders[name])


def test_two_swappers_on_one_model(entry: Entry, folders: Folders) -> None:
    model = fresh(entry, folders["one"])
    first = hotslot.attach(model, folders)
    with expected_peft_warnings():
        model.load_adapter(str(folders["others"]), adapter_name="second")
    second = hotslot.attach(model, folders, adapter_name="second")
    first.activate("three")
    second.activate("one")
    assert_live(entry, model, folders["three"])
    model.set_adapter("second", inference_mode=True)
    assert_live(entry, model, folders["one"])
    first.detach()
    assert_live(entry, model, folders["one"])
    second.detach()
    assert_live(entry, model, folders["others"])
    model.set_adapter("default", inference_mode=True)
    assert_live(entry, model, folders["one"])


# --- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planned", ["none", "one"])
def test_more_tokens_than_planned_are_refused_and_grown_into(entry: Entry, folders: Folders, planned: str) -> None:
    model = built(entry, folders, None)
    clean = snapshot(model)
    swapper = hotslot.attach(model, {planned: folders[planned]})
    swapper.activate(planned)
    before = snapshot(model)
    with pytest.raises((RankError, UnexpectedTargetError), match="tokens") as refusal:
        swapper.load("three", folders["three"])
    assert not swapper.fits(folders["three"])
    assert_unchanged(before, snapshot(model))
    swapper.grow(refusal.value.plan)
    assert_live(entry, model, folders[planned])
    swapper.load("three", folders["three"])
    for name in ("three", planned, "three"):
        swapper.activate(name)
        assert_live(entry, model, folders[name])
    swapper.rollback()
    assert_live(entry, model, folders[planned])
    swapper.detach()
    assert_unchanged(clean, snapshot(model))


def test_a_plan_has_the_largest_number_of_tokens(entry: Entry, folders: Folders) -> None:
    model = entry.build()
    plan = hotslot.plan(model, [folders["one"], folders["others"]])
    assert list(plan.tokens.values()) == [2]
    assert list((plan | hotslot.plan(model, [folders["three"]])).tokens.values()) == [3]
    with pytest.raises(RankError, match="more tokens than"):
        hotslot.attach(model, {"three": folders["three"]}, plan=plan)


# --- refused --------------------------------------------------------------------------------------------------------


def edited(folder: Path, **changes: Any) -> Any:
    tensors = load_file(folder / "adapter_model.safetensors")
    config = {**hotslot.checkpoint.read(folder).config, **changes.pop("config", {})}
    tensors.update(changes.pop("tensors", {}))
    return hotslot.checkpoint.from_tensors(tensors, config, origin="mine")


def test_what_cannot_be_is_refused(made: Callable[[Entry], Folders]) -> None:
    entry = ENTRIES["llama"]
    folders = made(entry)
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    elsewhere = {key.replace("embed_tokens", "other"): torch.zeros(1, 16)}
    elsewhere_too = {"trainable_token_indices": {"other": [3]}}
    cases: list[tuple[type[HotslotError], Any]] = [
        (ConfigError, edited(folders["one"], config={"trainable_token_indices": {"embed_tokens": [-1]}})),
        (ConfigError, edited(folders["others"], config={"trainable_token_indices": {"embed_tokens": [5, 5]}})),
        (ConfigError, edited(folders["one"], config={"trainable_token_indices": {"embed_tokens": [True]}})),
        (ConfigError, edited(folders["one"], config={"trainable_token_indices": 7})),
        (ShapeError, edited(folders["one"], config={"trainable_token_indices": {"embed_tokens": [48]}})),
        (ShapeError, edited(folders["one"], tensors={key: torch.zeros(1, 17)})),
        (TensorError, edited(folders["one"], tensors={key: torch.zeros(2, 16)})),
        (TensorError, edited(folders["one"], config={"trainable_token_indices": None})),
        (TensorError, edited(folders["none"], config={"trainable_token_indices": [3]})),
        (UnexpectedTargetError, edited(folders["none"], tensors=elsewhere, config=elsewhere_too)),
    ]  # fmt: skip
    model = entry.build()
    before = snapshot(model)
    for refusal, source in cases:
        with pytest.raises(refusal):
            hotslot.attach(model, {"a": source})
        assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize(
    "other", [{"target_modules": ["word", "mix"]}, {"target_modules": ["mix"], "modules_to_save": ["word"]}]
)
def test_other_uses_of_the_embedding_are_refused(
    other: dict[str, Any], made: Callable[[Entry], Folders], tmp_path: Path
) -> None:
    entry = ENTRIES["embedding"]
    folders, folder = made(entry), make_adapter(tmp_path, entry, seed=5, r=4, **other)
    model = entry.build()
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=r"tokens|saves whole"):
        hotslot.attach(model, {"one": folders["one"], "other": folder})
    assert_unchanged(before, snapshot(model))
    peft_model = fresh(entry, folder)
    before = snapshot(peft_model)
    with pytest.raises(UnsupportedError, match=r"tokens|saves whole"):
        hotslot.attach(peft_model, {"one": folders["one"]})
    assert_unchanged(before, snapshot(peft_model))


def test_layers_whose_forward_peft_leaves_out_are_refused(tmp_path: Path) -> None:
    """PEFT computes F.linear without the bias: with its tokens live, and it would be so without."""
    entry = ZOO["embedding"]
    folder = make_adapter(tmp_path, entry, seed=5, target_modules=["word"], trainable_token_indices={"mix": [3]})
    model = fresh(entry, folder)
    with torch.no_grad():
        model.base_model.model.mix.token_adapter.base_layer.bias.add_(100)
    assert torch.equal(entry.output(model, entry.inputs()), fresh_output(entry, folder))
    plain = entry.build()
    before = snapshot(plain)
    with pytest.raises(UnsupportedError, match="whose own forward PEFT leaves out"):
        hotslot.attach(plain, {"a": folder})
    assert_unchanged(before, snapshot(plain))


def test_blends_with_tokens_are_refused(entry: Entry, folders: Folders) -> None:
    model = built(entry, folders, None)
    sources = {name: folders[name] for name in ("one", "none")}
    swapper = hotslot.attach(model, sources, plan=hotslot.plan(model, sources))
    for weights in ({"one": 1.0, "none": 1.0}, {"one": 0.5}):
        with pytest.raises(UnsupportedError, match="cannot be blended"):
            swapper.activate(weights)
    swapper.activate({"one": 1.0})
    assert_live(entry, model, folders["one"])


def test_peft_cannot_load_an_adapter_without_tokens_beside_one_with(entry: Entry, folders: Folders) -> None:
    """If this fails, PEFT has learnt it, and SlotTokensWrapper may go."""
    model = fresh(entry, folders["one"])
    assert isinstance(model, PeftModel)
    with expected_peft_warnings(), pytest.raises(KeyError):
        model.load_adapter(str(folders["none"]), adapter_name="second")
