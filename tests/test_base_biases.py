"""Adapters that carry biases of the base model (`bias="all"`, `"lora_only"`): they take the place of the model's own,
which come back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import hotslot
from adapters import expected_peft_warnings, make_adapter
from compiling import WAYS, Backend
from hotslot.errors import ConfigError, ShapeError, TensorError, UnexpectedTargetError, UnsupportedError
from hotslot.testing import no_recompile, same_addresses
from oracle import assert_same_output, assert_unchanged, error, fresh, fresh_output, snapshot
from zoo import CLASSIFIERS, ZOO, Entry

# entry → a module to adapt, one to save whole
MODULES = {
    "mlp": ("up", "inner"),
    "attention": ("batch_first", "mix"),
    "conv2d": ("grouped", "head"),
    "gpt2": ("c_attn", "ln_f"),
    "bert_classifier": ("query", "classifier"),
    "vision": ("fc1", "classifier"),
    "llama_score": ("q_proj", "score"),  # it has no biases at all
}
ENTRIES = {name: (ZOO | CLASSIFIERS)[name] for name in MODULES}
Folders = dict[str, Path]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Entry], Folders]:
    known: dict[str, Folders] = {}

    def make(entry: Entry) -> Folders:
        if entry.name not in known:
            target, saved = MODULES[entry.name]
            plain = {"r": 4, "target_modules": [target]}
            drawn = {
                "all": {**plain, "bias": "all"},
                "other": {**plain, "bias": "all"},
                "lora_only": {**plain, "bias": "lora_only"},
                "none": plain,
                "head": {**plain, "modules_to_save": [saved]},
                "all and head": {**plain, "bias": "all", "modules_to_save": [saved]},
            }
            root = tmp_path_factory.mktemp(entry.name)
            known[entry.name] = {
                name: make_adapter(root / name, entry, seed=i, **config)
                for i, (name, config) in enumerate(drawn.items())
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


def assert_live(entry: Entry, model: nn.Module, folder: Path | None) -> None:
    frozen = entry.build().requires_grad_(False)
    expected = fresh_output(entry, folder) if folder else entry.output(frozen, entry.inputs())
    assert_same_output(entry.output(model, entry.inputs()), expected, exact=True)


@pytest.mark.parametrize("came_with", [None, "none", "head"])
def test_every_transition_is_exact(entry: Entry, folders: Folders, came_with: str | None) -> None:
    model = built(entry, folders, came_with)
    before = snapshot(model)
    swapper = hotslot.attach(model, folders)
    for first, second in permutations(folders, 2):
        for name in (first, second):
            swapper.activate(name)
            assert_live(entry, model, folders[name])
    swapper.deactivate()
    assert_live(entry, model, None)
    swapper.activate("all")
    swapper.detach()
    assert_unchanged(before, snapshot(model))


def biases(folder: Path) -> set[str]:
    """Names of the base biases in a file, with PEFT's wrappers looked through."""
    keys = load_file(folder / "adapter_model.safetensors").keys()
    plain = {key.replace(".base_layer", "").replace(".original_module", "") for key in keys if "lora_" not in key}
    return {key for key in plain if key.endswith(".bias") and ".modules_to_save" not in key}


@pytest.mark.parametrize("came_with", ["all", "lora_only", "all and head"])
def test_a_model_of_peft_with_biases_takes_who_has_as_many(entry: Entry, folders: Folders, came_with: str) -> None:
    """Whoever covers the biases that PEFT has written over is exact; those beyond come back."""
    model = fresh(entry, folders[came_with])
    before = snapshot(model)
    fitting = {name: folder for name, folder in folders.items() if biases(folders[came_with]) <= biases(folder)}
    assert came_with in fitting
    swapper = hotslot.attach(model, fitting)
    assert_live(entry, model, folders[came_with])
    for first, second in [*permutations(fitting, 2), *((name, name) for name in fitting)]:
        for name in (first, second):
            swapper.activate(name)
            assert_live(entry, model, folders[name])
    with swapper.using(came_with):
        assert_live(entry, model, folders[came_with])
    swapper.detach()
    assert_unchanged(before, snapshot(model))
    assert_live(entry, model, folders[came_with])


def test_drop_in_on_a_model_with_biases(entry: Entry, folders: Folders) -> None:
    model = fresh(entry, folders["all"])
    for name in ("other", "all", "other"):
        hotslot.hotswap_adapter(model, folders[name], "default")
        assert_live(entry, model, folders[name])


def test_control_the_biases_make_a_difference(made: Callable[[Entry], Folders]) -> None:
    for name in ("mlp", "bert_classifier", "conv2d"):
        outputs = [fresh_output(ENTRIES[name], folder) for folder in made(ENTRIES[name]).values()]
        assert all(error(one, other) > 1e-3 for one, other in permutations(outputs, 2))


@pytest.mark.parametrize("name", ["all", "lora_only", "none", "all and head"])
def test_what_is_saved_is_the_live_adapter(entry: Entry, folders: Folders, name: str, tmp_path: Path) -> None:
    model = fresh(entry, folders["none"])
    swapper = hotslot.attach(model, folders)
    for live in ("all", name):
        swapper.activate(live)
    with expected_peft_warnings():
        model.save_pretrained(tmp_path)
    assert_live(entry, model, tmp_path)
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (folders[name], tmp_path))
    assert theirs.keys() <= ours.keys()


@pytest.mark.parametrize("came_with", [True, False])
@pytest.mark.parametrize("name", ["mlp", "attention", "conv2d"])
def test_biases_of_layers_that_only_other_adapters_target_are_saved(name: str, came_with: bool, tmp_path: Path) -> None:
    """As those of plain layers: under the name of a LoRA layer's base a fresh load would drop them."""
    entry = ZOO[name]
    target, other = {"mlp": ("up", "inner.2"), "attention": ("mix", "batch_first"), "conv2d": ("stem", "head")}[name]
    all_biases = make_adapter(tmp_path / "all", entry, seed=1, r=2, target_modules=[target], bias="all")
    more = make_adapter(tmp_path / "more", entry, seed=2, r=2, target_modules=[target, other], bias="all")
    model = fresh(entry, all_biases if came_with else more)
    swapper = hotslot.attach(model, {"all": all_biases, "more": more})
    if not came_with:
        swapper.activate("all")
    with expected_peft_warnings():
        model.save_pretrained(tmp_path / "saved")
    assert_live(entry, model, tmp_path / "saved")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    swapper.activate("more")
    swapper.activate("all")
    model.load_state_dict(state)
    assert_live(entry, model, all_biases)
    swapper.activate("more")
    assert_live(entry, model, more)


def test_trained_biases_survive_and_the_model_s_own_too(made: Callable[[Entry], Folders]) -> None:
    entry = ENTRIES["mlp"]
    folders = made(entry)
    model = built(entry, folders, None)
    swapper = hotslot.attach(model, {name: folders[name] for name in ("all", "none")})
    swapper.activate("all")
    with torch.no_grad():
        model.inner[2].bias.add_(1)
    trained = entry.output(model, entry.inputs())
    swapper.activate("none")
    assert_live(entry, model, folders["none"])
    swapper.rollback()
    assert torch.equal(entry.output(model, entry.inputs()), trained)
    swapper.deactivate()
    assert_live(entry, model, None)


def test_a_model_that_was_cast_is_put_right(made: Callable[[Entry], Folders]) -> None:
    entry = ENTRIES["bert_classifier"]
    folders = made(entry)
    model = built(entry, folders, None)
    swapper = hotslot.attach(model, folders)
    swapper.activate("all")
    model.double()
    swapper.activate("none")
    swapper.activate("lora_only")
    model.float()
    for name in ("none", "all", "none"):
        swapper.activate(name)
        assert_live(entry, model, folders[name])


@pytest.mark.parametrize("way", WAYS)
def test_swaps_compile_nothing(way: str, made: Callable[[Entry], Folders]) -> None:
    import torch._dynamo

    one = ENTRIES["gpt2" if "each" in way else "bert_classifier"]
    folders = made(one)
    with torch._dynamo.config.patch(recompile_limit=64):
        model = built(one, folders, None)
        swapper = hotslot.attach(model, folders)
        compiled = WAYS[way](model, Backend())
        one.output(compiled, one.inputs())
        with no_recompile(), same_addresses(model):
            for name in ("all", "none", "all and head", "lora_only", "other"):
                swapper.activate(name)
                assert_same_output(one.output(compiled, one.inputs()), fresh_output(one, folders[name]))


# --- PEFT's functions -----------------------------------------------------------------------------------------------


def test_drop_in_swaps_biases_and_restores_them(entry: Entry, folders: Folders) -> None:
    model = fresh(entry, folders["none"])
    for name in ("all", "none", "lora_only", "other", "none"):
        hotslot.hotswap_adapter(model, folders[name], "default")
        assert_live(entry, model, folders[name])


def test_drop_in_from_a_state_dict(entry: Entry, folders: Folders) -> None:
    other = fresh(entry, folders["all"])
    state = {k: v for k, v in other.state_dict().items() if "lora_" in k or k.endswith(".bias")}
    model = fresh(entry, folders["none"])
    hotslot.hotswap_adapter_from_state_dict(model, state, "default", other.peft_config["default"])
    assert_live(entry, model, folders["all"])


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("came_with", ["all", "lora_only", "all and head"])
def test_what_lacks_biases_that_peft_has_written_over_is_refused(
    came_with: str, entry: Entry, folders: Folders
) -> None:
    """What would have to come back there, nobody knows. The others are taken, and refused is what they are next to."""
    model = fresh(entry, folders[came_with])
    needs = biases(folders[came_with])
    lacking = [name for name in ("none", "lora_only", "all") if not needs <= biases(folders[name])]
    before = snapshot(model)
    for name in lacking:
        with pytest.raises(UnsupportedError, match="in the place of the base model's"):
            hotslot.attach(model, {name: folders[name]})
        assert_unchanged(before, snapshot(model))
        with pytest.raises(UnsupportedError, match="in the place of the base model's"):
            hotslot.hotswap_adapter(model, folders[name], "default")
        assert_unchanged(before, snapshot(model))
    swapper = hotslot.attach(model, {came_with: folders[came_with]})
    for name in lacking:
        assert "in the place of the base model's" in str(swapper.fits(folders[name]).reason)
    swapper.activate(came_with)
    state = snapshot(model)
    for ask in (swapper.deactivate, swapper.using(None).__enter__) if needs else ():
        with pytest.raises(UnsupportedError, match="The base model lacks biases"):
            ask()
        assert_unchanged(state, snapshot(model))
    assert lacking or not needs


def test_nothing_is_merged_into_biases_that_are_gone(made: Callable[[Entry], Folders], tmp_path: Path) -> None:
    """A merge is computed from the model's own values. Slots need none, so what is planned for is exact."""
    entry = ENTRIES["mlp"]
    folders, wide = made(entry), {"r": 4, "target_modules": ["up", "inner.2"]}
    drawn = {
        "all": {"bias": "all"},
        "none": {},
        "pissa": {"init_lora_weights": "pissa"},
        "lora_bias": {"lora_bias": True},
    }
    wider = {
        name: make_adapter(tmp_path / name, entry, seed=i, **wide, **config)
        for i, (name, config) in enumerate(drawn.items(), 5)
    }
    swapper = hotslot.attach(model := fresh(entry, folders["all"]), {"other": folders["other"]})
    for name, folder in wider.items():
        before = snapshot(model)
        with pytest.raises((UnsupportedError, UnexpectedTargetError)):
            swapper.load(name, folder)
        assert_unchanged(before, snapshot(model))
    swapper.detach()
    swapper = hotslot.attach(model, {"other": folders["other"], "all": wider["all"]})
    for name, folder in (("all", wider["all"]), ("other", folders["other"]), ("all", wider["all"])):
        swapper.activate(name)
        assert_live(entry, model, folder)


def test_two_adapters_with_biases_on_one_model_are_refused(made: Callable[[Entry], Folders]) -> None:
    entry = ENTRIES["mlp"]
    folders = made(entry)
    model = fresh(entry, folders["none"])
    with expected_peft_warnings():
        model.load_adapter(str(folders["none"]), adapter_name="second")
    first, second = (hotslot.attach(model, adapter_name=name) for name in ("default", "second"))
    first.load("all", folders["all"])
    first.activate("all")
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match="another adapter"):
        second.load("all", folders["all"])
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("weights", [{"all": 1.0, "none": 1.0}, {"none": 1.0, "all": 0.5}, {"all": 2.0}])
def test_biases_are_not_blended(weights: dict[str, float], made: Callable[[Entry], Folders]) -> None:
    """They are no deltas, and adding them up would be a choice of ours."""
    folders = made(ENTRIES["mlp"])
    wanted, model = {name: folders[name] for name in ("all", "none")}, ENTRIES["mlp"].build()
    swapper = hotslot.attach(model, wanted, plan=hotslot.plan(model, wanted.values()))
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match="cannot be blended"):
        swapper.activate(weights)
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize(
    ("key", "shape", "kind"),
    [
        ("inner.2.bias", (21,), ShapeError),
        ("inner.0.bias", (8,), UnexpectedTargetError),  # it has none
        ("nowhere.bias", (8,), UnexpectedTargetError),
        ("up.weight", (32, 12), TensorError),
    ],
)
def test_what_does_not_fit_is_refused(
    key: str, shape: tuple[int, ...], kind: type[Exception], made: Callable[[Entry], Folders]
) -> None:
    folder = made(ENTRIES["mlp"])["all"]
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[f"base_model.model.{key}"] = torch.zeros(shape)
    config = dict(hotslot.checkpoint.read(folder).config)
    model = ENTRIES["mlp"].build()
    before = snapshot(model)
    with pytest.raises(kind, match=key.rpartition(".")[0]):
        hotslot.attach(model, {"a": hotslot.checkpoint.from_tensors(tensors, config, origin="mine")})
    assert_unchanged(before, snapshot(model))


def test_biases_that_the_config_denies_are_refused(made: Callable[[Entry], Folders]) -> None:
    folder = made(ENTRIES["mlp"])["all"]
    tensors = load_file(folder / "adapter_model.safetensors")
    config = dict(hotslot.checkpoint.read(folder).config)
    for bias, kind in (("none", TensorError), ("lora_only", TensorError), ("some", ConfigError)):
        source = hotslot.checkpoint.from_tensors(tensors, {**config, "bias": bias}, origin="mine")
        with pytest.raises(kind):
            hotslot.attach(ENTRIES["mlp"].build(), {"a": source})


def test_blends_with_base_biases_are_refused(made: Callable[[Entry], Folders]) -> None:
    entry = ENTRIES["mlp"]
    folders = {name: made(entry)[name] for name in ("all", "none")}
    model = built(entry, folders, None)
    swapper = hotslot.attach(model, folders, plan=hotslot.plan(model, folders))
    for weights in ({"all": 1.0, "none": 1.0}, {"all": 0.5}):
        with pytest.raises(UnsupportedError, match="cannot be blended"):
            swapper.activate(weights)
