"""Adapters that save modules whole (`modules_to_save`, classification heads): what a fresh load computes, and nothing
of it is left where the next adapter saves none.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import hotslot
from adapters import expected_peft_warnings, make_adapter, random_config
from compiling import WAYS, Backend
from hotslot.errors import DoesNotFitError, ShapeError, TensorError, UnexpectedTargetError, UnsupportedError
from hotslot.testing import RecompiledError, no_recompile, same_addresses
from oracle import assert_same_output, assert_unchanged, error, fresh, fresh_output, snapshot
from zoo import CLASSIFIERS, ZOO, Entry

ENTRIES = {name: (ZOO | CLASSIFIERS)[name] for name in ("mlp", "vision", "gpt2", "llama_score", "bert_classifier")}
# Two modules of each that adapters save; a LoRA is on others.
SAVED = {
    "mlp": ("down", "inner"),
    "vision": ("classifier", "place"),
    "gpt2": ("lm_head", "wte"),  # tied: a copy of the one does not change the other
    "llama_score": ("score", "norm"),
    "bert_classifier": ("classifier", "pooler"),
}
TARGET = {"mlp": "up", "vision": "fc1", "gpt2": "c_attn", "llama_score": "q_proj", "bert_classifier": "query"}

Folders = dict[str, Path]


def configs(entry: Entry) -> dict[str, dict[str, Any]]:
    first, second = SAVED[entry.name]
    plain = {"r": 4, "lora_alpha": 6, "target_modules": [TARGET[entry.name]]}
    return {
        "head": {**plain, "modules_to_save": [first]},
        "other head": {**plain, "modules_to_save": [first], "lora_alpha": 3},
        "both": {**plain, "modules_to_save": [first, second]},
        "second": {**plain, "modules_to_save": [second]},
        "none": plain,
    }


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Entry], Folders]:
    known: dict[str, Folders] = {}

    def make(entry: Entry) -> Folders:
        if entry.name not in known:
            root = tmp_path_factory.mktemp(entry.name)
            drawn = configs(entry).items()
            known[entry.name] = {
                name: make_adapter(root / name, entry, seed=i, **config) for i, (name, config) in enumerate(drawn)
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
    """A plain model, or one that PEFT has given an adapter. Frozen, for a frozen weight may take another kernel."""
    return entry.build().requires_grad_(False) if came_with is None else fresh(entry, folders[came_with])


def assert_live(entry: Entry, model: nn.Module, folder: Path | None, *, exact: bool = True) -> None:
    inputs = entry.inputs()
    expected = (
        fresh_output(entry, folder) if folder else entry.output(entry.build().requires_grad_(False), entry.inputs())
    )
    assert_same_output(entry.output(model, inputs), expected, exact=exact)


@pytest.fixture(autouse=True)
def room_for_every_layer() -> Iterator[None]:
    """Layers that are compiled one by one share a code object, and its recompile limit of 8."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=64):
        yield


# --- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("came_with", [None, "head", "both", "none"])
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
    swapper.activate("both")
    assert swapper.rollback().changed
    assert_live(entry, model, None)
    swapper.activate("both")
    swapper.detach()
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [name for name in ZOO if name != "vision"])
def test_random_adapters(name: str, seed: int, tmp_path: Path) -> None:
    """Any LoRA beside any of the modules that can be saved, or is refused before anything is touched."""
    entry, rng = ZOO[name], Random(f"{name} {seed}")
    drawn = [random_config(rng, entry) for _ in range(4)]
    for i, config in enumerate(drawn):
        if i % 2:
            config["modules_to_save"] = rng.sample(entry.extras, 1)
    adapters = {}
    for i, config in enumerate(drawn):
        try:
            adapters[str(i)] = make_adapter(tmp_path / str(i), entry, seed=i, **config)
            fresh(entry, adapters[str(i)])
        except Exception:  # PEFT's own, as where nothing is left to target
            adapters.pop(str(i), None)
    model = entry.build()
    before = snapshot(model)
    try:
        swapper = hotslot.attach(model, adapters)
    except UnsupportedError as refusal:
        assert "saves whole" in str(refusal)  # noqa: PT017 — one has a LoRA where another has a module
        assert_unchanged(before, snapshot(model))
        return
    for key in rng.choices(list(adapters), k=6):
        swapper.activate(key)
        assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, adapters[key]))
    swapper.detach()
    assert_unchanged(before, snapshot(model))


def test_control_the_adapters_differ(entry: Entry, folders: Folders) -> None:
    outputs = [entry.output(built(entry, folders, None), entry.inputs())]
    outputs += [fresh_output(entry, folder) for folder in folders.values()]
    for one, other in permutations(outputs, 2):
        assert error(one, other) > 1e-3


def test_low_precision_is_cast_as_peft_casts(tmp_path: Path) -> None:
    entry = CLASSIFIERS["llama_score"]
    folder = make_adapter(tmp_path, entry, seed=1, **configs(entry)["both"])
    model = entry.build(dtype=torch.bfloat16).requires_grad_(False)
    swapper = hotslot.attach(model, {"a": folder})
    swapper.activate("a")
    inputs = entry.inputs(dtype=torch.bfloat16)
    expected = fresh_output(entry, folder, dtype=torch.bfloat16)
    assert_same_output(entry.output(model, inputs), expected, exact=True)


# --- PEFT's own calls keep their meaning ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["head", "both", "none", None])
def test_what_is_saved_is_the_live_adapter(entry: Entry, folders: Folders, name: str | None, tmp_path: Path) -> None:
    model = fresh(entry, folders["both"])
    swapper = hotslot.attach(model, folders)
    swapper.activate("both")
    if name is None:
        swapper.deactivate()
    else:
        swapper.activate(name)
        assert (
            model.peft_config["default"].modules_to_save
            == fresh(entry, folders[name]).peft_config["default"].modules_to_save
        )
    with expected_peft_warnings():
        model.save_pretrained(tmp_path)
    assert_live(entry, model, tmp_path)
    if name is not None:
        theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (folders[name], tmp_path))
        assert theirs.keys() == ours.keys()


@pytest.mark.parametrize("came_with", [None, "head"])
def test_peft_s_switches_keep_their_meaning(entry: Entry, folders: Folders, came_with: str | None) -> None:
    model = built(entry, folders, "none" if came_with is None else came_with)
    swapper = hotslot.attach(model, folders)
    for name in ("head", "none", "both"):
        swapper.activate(name)
        with model.disable_adapter():
            assert_live(entry, model, None)
        assert_live(entry, model, folders[name], exact=False)  # PEFT makes the copies trainable: another kernel
        model.set_adapter("default", inference_mode=True)
        assert_live(entry, model, folders[name])


@pytest.mark.parametrize("name", ["head", "none"])
def test_merge_and_unload_gives_the_live_modules(entry: Entry, folders: Folders, name: str) -> None:
    model = fresh(entry, folders["head"])
    swapper = hotslot.attach(model, folders)
    swapper.activate("both")
    swapper.activate(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        merged = model.merge_and_unload()
        expected = fresh(entry, folders[name]).merge_and_unload()
    assert merged.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(merged.state_dict()[key], value), key


def test_another_adapter_on_the_model_keeps_its_module(entry: Entry, folders: Folders) -> None:
    model = fresh(entry, folders["head"])
    with expected_peft_warnings():
        model.load_adapter(str(folders["other head"]), adapter_name="second")
    swapper = hotslot.attach(model, folders)
    swapper.activate("both")
    swapper.activate("none")
    model.set_adapter("second", inference_mode=True)  # a matrix that wants a gradient rounds otherwise
    assert_live(entry, model, folders["other head"])
    model.set_adapter("default", inference_mode=True)
    assert_live(entry, model, folders["none"])
    swapper.activate("both")
    swapper.detach()
    assert_live(entry, model, folders["head"])
    model.set_adapter("second", inference_mode=True)
    assert_live(entry, model, folders["other head"])


def test_state_dict_loads_into_the_model_it_came_from(entry: Entry, folders: Folders) -> None:
    model = fresh(entry, folders["both"])
    swapper = hotslot.attach(model, folders)
    for name in ("both", "none"):
        swapper.activate(name)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(state)
        assert_live(entry, model, folders[name])


def test_a_wrapper_that_is_not_in_use_does_not_show(entry: Entry, folders: Folders) -> None:
    """What is saved of the model, or loaded into it, is that of a model that never had one."""
    from peft import set_peft_model_state_dict

    twin, model = fresh(entry, folders["none"]), fresh(entry, folders["none"])
    swapper = hotslot.attach(model, folders)
    swapper.activate("both")
    swapper.activate("none")
    assert model.state_dict().keys() == twin.state_dict().keys()
    for subject in (twin, model):
        set_peft_model_state_dict(subject, load_file(folders["head"] / "adapter_model.safetensors"))
    if entry.name != "gpt2":  # a tied weight that is loaded by one of its names reaches the other's copy at a swap
        assert torch.equal(entry.output(model, entry.inputs()), entry.output(twin, entry.inputs()))
    model.load_state_dict(fresh(entry, folders["none"]).state_dict())
    assert_live(entry, model, folders["none"])


# --- state ----------------------------------------------------------------------------------------------------------


def test_trained_values_survive(entry: Entry, folders: Folders) -> None:
    model = fresh(entry, folders["head"])
    swapper = hotslot.attach(model, folders)
    swapper.activate("both")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "modules_to_save.default" in name:
                param.mul_(1.5)
    trained = entry.output(model, entry.inputs())
    assert swapper.activate("both").changed  # what was trained is no longer the file's
    assert_live(entry, model, folders["both"])
    swapper.rollback()
    assert torch.equal(entry.output(model, entry.inputs()), trained)
    swapper.activate("none")
    assert_live(entry, model, folders["none"])


def test_own_values_come_back_even_if_others_wrote(entry: Entry, folders: Folders) -> None:
    model = built(entry, folders, None)
    swapper = hotslot.attach(model, folders)
    swapper.activate("none")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "modules_to_save.default" in name:
                param.add_(1)
    swapper.activate("none")
    assert_live(entry, model, folders["none"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_on_their_own(entry: Entry, folders: Folders, copied: Callable[[nn.Module], nn.Module]) -> None:
    model = fresh(entry, folders["head"])
    swapper = hotslot.attach(model, folders)
    swapper.activate("both")
    if entry.name != "vision":  # PEFT's MultiheadAttention cannot be copied at all
        other = copied(model)
        swapper.activate("none")
        assert_live(entry, other, folders["both"])
        assert any("modules_to_save" in key for key in other.state_dict())


def test_a_model_that_was_cast_is_put_right(entry: Entry, folders: Folders) -> None:
    model = built(entry, folders, None)
    swapper = hotslot.attach(model, folders)
    swapper.activate("both")
    model.double()
    for name in ("none", "head", "second"):
        swapper.activate(name)
    model.float()
    for name in ("both", "none"):
        swapper.activate(name)
        assert_live(entry, model, folders[name])


# --- refused --------------------------------------------------------------------------------------------------------


def test_a_head_that_was_not_planned_for_is_refused_and_grown_into(entry: Entry, folders: Folders) -> None:
    model = built(entry, folders, None)
    clean = snapshot(model)
    swapper = hotslot.attach(model, {"none": folders["none"]}, route="side")
    swapper.activate("none")
    before = snapshot(model)
    with pytest.raises(UnexpectedTargetError, match="modules_to_save") as refusal:
        swapper.load("both", folders["both"])
    assert_unchanged(before, snapshot(model))
    swapper.grow(refusal.value.plan)
    swapper.load("both", folders["both"])
    for name in ("both", "none", "both"):
        swapper.activate(name)
        assert_live(entry, model, folders[name])
    swapper.detach()
    assert_unchanged(clean, snapshot(model))


def test_another_number_of_labels_is_refused(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    folder = make_adapter(tmp_path, entry, seed=0, **configs(entry)["head"])
    tensors = load_file(folder / "adapter_model.safetensors")
    config = hotslot.checkpoint.read(folder).config
    tensors["base_model.model.down.weight"] = torch.zeros(11, 20)
    model = entry.build()
    before = snapshot(model)
    source = hotslot.checkpoint.from_tensors(tensors, dict(config), origin="mine")
    with pytest.raises(ShapeError, match=r"down\.weight"):
        hotslot.attach(model, {"a": source})
    assert_unchanged(before, snapshot(model))


def edited(folder: Path, **changes: torch.Tensor | None) -> Any:
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, tensor in changes.items():
        tensors.pop(f"base_model.model.{key}", None)
        if tensor is not None:
            tensors[f"base_model.model.{key}"] = tensor
    return hotslot.checkpoint.from_tensors(tensors, dict(hotslot.checkpoint.read(folder).config), origin="mine")


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a module that the model has not": ({"top.down.weight": torch.zeros(1)}, UnexpectedTargetError, "top.down"),
    "a tensor that the module has not": ({"down.scale": torch.zeros(1)}, UnexpectedTargetError, "scale"),
    "a module that is not in the file": ({"down.weight": None}, DoesNotFitError, "lacks a module"),
    "a tensor of no module": ({"inner.0.weight": torch.zeros(8, 32)}, TensorError, "belongs to no"),
    "a LoRA on it too": (
        {"down.lora_A.weight": torch.zeros(4, 20), "down.lora_B.weight": torch.zeros(10, 4)},
        UnsupportedError,
        "also saves whole",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(case: str, made: Callable[[Entry], Folders]) -> None:
    changes, kind, words = BAD[case]
    model = ZOO["mlp"].build()
    before = snapshot(model)
    with pytest.raises(kind, match=words):
        hotslot.attach(model, {"a": edited(made(ZOO["mlp"])["head"], **changes)})
    assert_unchanged(before, snapshot(model))


def test_a_lora_where_another_saves_the_module_is_refused(made: Callable[[Entry], Folders], tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    on_it = make_adapter(tmp_path, entry, seed=1, r=2, target_modules=["up", "inner.0"])
    model = entry.build()
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=r"inner\.0"):
        hotslot.attach(model, {"a": made(entry)["second"], "b": on_it})
    swapper = hotslot.attach(model, {"a": made(entry)["second"]}, route="side")
    with pytest.raises(UnsupportedError, match=r"inner\.0"):
        swapper.load("b", on_it)
    swapper.detach()
    swapper = hotslot.attach(model, {"b": on_it}, route="side")
    with pytest.raises(UnsupportedError, match=r"inner\.0"):
        swapper.load("a", made(entry)["second"])
    swapper.detach()
    assert_unchanged(before, snapshot(model))


# --- integers and booleans ------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Has buffers of each kind that a module may save, and the forward shows them all."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 8)
        self.head = nn.Linear(8, 4)
        self.head.register_buffer("large", torch.tensor(2**53 + 1))  # which no float64 holds
        self.head.register_buffer("small", torch.arange(4, dtype=torch.int8))
        self.head.register_buffer("bytes", torch.arange(4, dtype=torch.uint8))
        self.head.register_buffer("mask", torch.tensor([True, False, True, True]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(x))


def _with_buffers(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Saves an adapter whose head has other buffers, and returns them."""
    torch.manual_seed(seed)
    own = {
        "large": torch.tensor(2**60 + seed),
        "small": torch.randint(-128, 127, (4,), dtype=torch.int8),
        "bytes": torch.randint(0, 255, (4,), dtype=torch.uint8),
        "mask": torch.rand(4) > 0.5,
    }
    model = get_peft_model(Counting(), LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"]))
    model.base_model.model.head.modules_to_save["default"].load_state_dict(own, strict=False)
    model.save_pretrained(folder)
    return own


@pytest.mark.parametrize("from_memory", [False, True])
def test_integer_and_boolean_buffers_are_exact(from_memory: bool, tmp_path: Path) -> None:
    folders = {str(seed): tmp_path / str(seed) for seed in (1, 2)}
    buffers: dict[str | None, dict[str, torch.Tensor]] = {k: _with_buffers(v, int(k)) for k, v in folders.items()}
    model = Counting().eval()
    buffers[None] = {name: buffer.clone() for name, buffer in model.head.named_buffers()}
    swapper = hotslot.attach(model, folders)
    if from_memory:
        for name, folder in folders.items():
            read = hotslot.checkpoint.read(folder)
            swapper.unload(name)
            swapper.load(name, load_file(folder / "adapter_model.safetensors"), config=dict(read.config))
            swapper.activate(name)
            assert swapper.version == read.version
            swapper.deactivate()
    for name in ("1", "2", None, "2", None):
        swapper.activate(name) if name else swapper.deactivate()
        wrapper: Any = model.head
        live = dict((wrapper.modules_to_save["default"] if name else wrapper.original_module).named_buffers())
        assert live.keys() == buffers[name].keys()
        assert all(torch.equal(live[key], value) for key, value in buffers[name].items())
        copied = dict(wrapper.modules_to_save["default"].named_buffers())
        assert all(torch.equal(copied[key], value) for key, value in buffers[name].items())


def test_a_norm_s_count_of_batches_is_swapped(tmp_path: Path) -> None:
    entry = ZOO["vision"]
    options: dict[str, Any] = {"r": 2, "target_modules": ["fc1"], "modules_to_save": ["norm"]}
    folders: Folders = {}
    for name, batches in (("few", 3), ("many", 10**6)):
        folders[name] = make_adapter(tmp_path / name, entry, seed=batches, **options)
        file = folders[name] / "adapter_model.safetensors"
        save_file(load_file(file) | {"base_model.model.norm.num_batches_tracked": torch.tensor(batches)}, file)
    swapper = hotslot.attach(model := entry.build().requires_grad_(False), folders)
    for name, batches in (("few", 3), ("many", 10**6), ("few", 3)):
        swapper.activate(name)
        assert model.norm.modules_to_save["default"].num_batches_tracked.item() == batches
        assert_live(entry, model, folders[name])
    model.train()
    entry.output(model, entry.inputs())  # counts one more
    swapper.rollback()
    swapper.rollback()
    assert model.norm.modules_to_save["default"].num_batches_tracked.item() == 4
    model.eval()
    swapper.deactivate()
    assert model.norm.original_module.num_batches_tracked.item() == 0
    assert_live(entry, model, None)


@pytest.mark.parametrize(
    "name", ["up.lora_B.weight", "up.lora_A.weight", "inner.2.bias", "embed_tokens.weight", "nowhere.weight"]
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_integers_elsewhere_are_refused(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    folder = make_adapter(tmp_path, entry, seed=0, r=2, target_modules=["up"], bias="all", modules_to_save=["down"])
    tensors, key = load_file(folder / "adapter_model.safetensors"), f"base_model.model.{name}"
    tensors[key] = torch.ones(tensors[key].shape if key in tensors else (3, 3), dtype=dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    before = snapshot(model := entry.build())
    with pytest.raises(TensorError, match=name):
        hotslot.attach(model, {"a": folder})
    assert_unchanged(before, snapshot(model))


# --- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("came_with", [None, "both"])
def test_swaps_compile_nothing(way: str, came_with: str | None, entry: Entry, folders: Folders) -> None:
    if entry.name in ("vision", "bert_classifier") and "each" in way:
        pytest.skip("its children are dicts, convolutions or dropouts, which torch.compile does not take one by one")
    model = built(entry, folders, came_with)
    swapper = hotslot.attach(model, folders)
    compiled, inputs = WAYS[way](model, Backend()), entry.inputs()
    entry.output(compiled, inputs)
    with no_recompile(), same_addresses(model):
        for name in ("head", "none", "other head", "both", "second", "none"):
            swapper.activate(name)
            assert_same_output(entry.output(compiled, inputs), fresh_output(entry, folders[name]))
        swapper.deactivate()
        entry.output(compiled, inputs)


def test_a_model_that_was_compiled_before(entry: Entry, folders: Folders) -> None:
    model = fresh(entry, folders["both"])
    compiled, inputs = torch.compile(model, backend=Backend()), entry.inputs()
    entry.output(compiled, inputs)
    swapper = hotslot.attach(compiled, folders)  # another alpha would be another float, there
    with no_recompile(), same_addresses(model):
        for name in ("head", "none", "second", "both"):
            swapper.activate(name)
            assert_same_output(entry.output(compiled, inputs), fresh_output(entry, folders[name]))


def test_control_a_head_that_comes_later_does_recompile(made: Callable[[Entry], Folders]) -> None:
    entry = ENTRIES["mlp"]
    folders = made(entry)
    model = built(entry, folders, None)
    swapper = hotslot.attach(model, {"none": folders["none"]})
    compiled, inputs = torch.compile(model, backend=Backend()), entry.inputs()
    entry.output(compiled, inputs)
    swapper.grow(hotslot.plan(model, folders))
    with pytest.raises(RecompiledError), no_recompile():
        entry.output(compiled, inputs)


# --- PEFT's function ------------------------------------------------------------------------------------------------


def test_drop_in_swaps_heads(entry: Entry, folders: Folders) -> None:
    model = fresh(entry, folders["head"])
    for name in ("other head", "none", "head", "none", "other head"):
        hotslot.hotswap_adapter(model, folders[name], "default")
        assert_live(entry, model, folders[name])


def test_drop_in_names_the_keys_of_a_head_that_the_model_has_not(entry: Entry, folders: Folders) -> None:
    model = fresh(entry, folders["none"])
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"unexpected keys found: base_model\.model\."):
        hotslot.hotswap_adapter(model, folders["head"], "default")
    assert_unchanged(before, snapshot(model))


def test_drop_in_from_a_state_dict(entry: Entry, folders: Folders) -> None:
    other = fresh(entry, folders["both"])
    state = {k: v for k, v in other.state_dict().items() if "lora_" in k or ".modules_to_save." in k}
    model = fresh(entry, folders["both"])
    hotslot.hotswap_adapter(model, folders["none"], "default")
    hotslot.hotswap_adapter_from_state_dict(model, state, "default", other.peft_config["default"])
    assert_live(entry, model, folders["both"])
