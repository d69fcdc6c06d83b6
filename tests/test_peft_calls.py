"""PEFT's own calls on an attached model do what they do on a plain PeftModel, or refuse with a reason."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter as peft_hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hotslot
from adapters import expected_peft_warnings, make_adapter
from hotslot.errors import MergedError, ModelError
from oracle import assert_same_output, assert_unchanged, differences, error, fresh, fresh_output, snapshot
from zoo import ZOO, Entry

MLP, LLAMA = ZOO["mlp"], ZOO["llama"]
CONFIGS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "target_modules": ["up", "inner.2"], "lora_alpha": 6},
    "b": {"r": 2, "target_modules": ["up", "inner.2"], "lora_alpha": 3, "use_rslora": True},
    "b2": {"r": 2, "target_modules": ["up", "inner.2"], "lora_alpha": 3, "use_rslora": True},
    "four": {"r": 4, "target_modules": ["up", "inner.2"], "lora_alpha": 3},
    "six": {"r": 6, "target_modules": ["up", "inner.2"], "lora_alpha": 7},
    "extra": {"r": 3, "target_modules": ["up", "down"], "lora_alpha": 5},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {key: make_adapter(root / key, MLP, seed=i, **config) for i, (key, config) in enumerate(CONFIGS.items())}


# --- helpers --------------------------------------------------------------------------------------------------------


def attached(folders: dict[str, Path], live: str = "b", came_with: str = "a") -> tuple[PeftModel, hotslot.Swapper]:
    """A PeftModel whose slot has room for rank 4; by default an adapter of rank 2 is live in it."""
    model = fresh(MLP, folders[came_with])
    swapper = hotslot.attach(model, adapters={"a": folders["a"], "b": folders["b"]})
    swapper.activate(live)
    return model, swapper


def output(model: nn.Module, entry: Entry = MLP) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already unmerged")  # PEFT's MultiheadAttention, of itself
        return entry.output(model, entry.inputs())


def assert_twins(model: nn.Module, twin: nn.Module, *, exact: bool = False) -> None:
    """Both compute the same, and say the same of their adapters."""
    assert_same_output(output(model), output(twin), exact=exact)
    for attribute in ("active_adapters", "active_adapter"):
        assert getattr(model, attribute, None) == getattr(twin, attribute, None)
    assert sorted(getattr(model, "peft_config", {})) == sorted(getattr(twin, "peft_config", {}))
    assert trainable(model) == trainable(twin)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, param in model.named_parameters() if param.requires_grad}


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def make_trainable(model: nn.Module, adapter_name: str = "default") -> list[nn.Parameter]:
    params = [param for name, param in model.named_parameters() if "lora_" in name and f".{adapter_name}" in name]
    return [param.requires_grad_(True) for param in params]


def loss(model: nn.Module, entry: Entry = MLP) -> Tensor:
    return entry.read(model(**entry.inputs())).square().mean()


@contextmanager
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), expected_peft_warnings(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        torch.default_generator.manual_seed(5)
        yield


# --- calls with a twin ----------------------------------------------------------------------------------------------

Call = Callable[[Any, dict[str, Path]], object]
NEW = LoraConfig(r=2, target_modules=["inner.0", "up"], init_lora_weights=False)

# call → what to do to the attached model and to its twin
CALLS: dict[str, Call] = {
    "load_adapter": lambda model, folders: model.load_adapter(str(folders["extra"]), "extra"),
    "load_adapter, trainable": lambda model, folders: model.load_adapter(
        str(folders["extra"]), "extra", is_trainable=True
    ),
    "load_adapter into the slot": lambda model, folders: model.load_adapter(str(folders["b2"]), "default"),
    "add_adapter": lambda model, folders: model.add_adapter("new", NEW),
    "add_adapter, set_adapter": lambda model, folders: (model.add_adapter("new", NEW), model.set_adapter("new")),
    "set_adapter": lambda model, folders: (CALLS["load_adapter"](model, folders), model.set_adapter("extra")),
    "set_adapter there and back": lambda model, folders: (
        CALLS["set_adapter"](model, folders),
        model.set_adapter("default"),
    ),
    "set_adapter, two": lambda model, folders: (
        CALLS["load_adapter"](model, folders),
        model.base_model.set_adapter(["default", "extra"]),
    ),
    "delete_adapter": lambda model, folders: (CALLS["load_adapter"](model, folders), model.delete_adapter("extra")),
    "delete_adapter, the slot's": lambda model, folders: (
        CALLS["load_adapter"](model, folders),
        model.delete_adapter("default"),
    ),
    "delete_adapter, the active": lambda model, folders: (
        CALLS["set_adapter"](model, folders),
        model.delete_adapter("extra"),
    ),
    "disable_adapter_layers": lambda model, folders: model.base_model.disable_adapter_layers(),
    "disable, enable": lambda model, folders: (
        model.base_model.disable_adapter_layers(),
        model.base_model.enable_adapter_layers(),
    ),
    "merge_adapter": lambda model, folders: model.merge_adapter(),
    "merge_adapter safely": lambda model, folders: model.merge_adapter(safe_merge=True),
    "unmerge_adapter": lambda model, folders: (model.merge_adapter(), model.unmerge_adapter()),
    "set_requires_grad": lambda model, folders: model.set_requires_grad("default"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_does_what_it_does_on_a_plain_peft_model(call: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model, _ = attached(folders)
    twin = fresh(MLP, folders["b"])
    for subject in (model, twin):
        with seeded():
            CALLS[call](subject, folders)
    assert_twins(model, twin)
    if "merge_adapter" not in call:  # PEFT saves of a merged model what it saves of any other
        with expected_peft_warnings():
            model.save_pretrained(tmp_path)
        for name in model.peft_config:
            folder = tmp_path if name == "default" else tmp_path / name
            twin.set_adapter(name)
            twin.base_model.enable_adapter_layers()
            assert_same_output(fresh_output(MLP, folder), output(twin))


GOING_ON = [
    call for call in CALLS if call not in ("delete_adapter, the slot's", "merge_adapter", "merge_adapter safely")
]


@pytest.mark.parametrize("call", GOING_ON)
def test_swaps_go_on_after_a_call(call: str, folders: dict[str, Path]) -> None:
    model, swapper = attached(folders)
    with seeded():
        CALLS[call](model, folders)
    others = {name: value.clone() for name, value in model.state_dict().items() if ".default." not in name}
    swapper.activate("a")
    model.set_adapter("default")
    model.base_model.enable_adapter_layers()
    tolerant = "unmerge" in call  # adding and subtracting rounds
    assert_same_output(output(model), fresh_output(MLP, folders["a"]), exact=not tolerant and "disable" not in call)
    assert all(torch.equal(value, others[name]) for name, value in model.state_dict().items() if name in others)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_adapter safely"])
def test_a_merged_adapter_is_not_swapped(call: str, folders: dict[str, Path]) -> None:
    model, swapper = attached(folders)
    CALLS[call](model, folders)
    before = snapshot(model)
    for swap in (
        lambda: swapper.activate("a"),
        swapper.deactivate,
        swapper.rollback,
        lambda: hotslot.hotswap_adapter(model, folders["a"], "default"),
    ):
        with pytest.raises(MergedError, match="merged"):
            swap()
        assert_unchanged(before, snapshot(model))
    model.unmerge_adapter()
    swapper.activate("a")
    assert_same_output(output(model), fresh_output(MLP, folders["a"]))


@pytest.mark.parametrize("call", ["merge_and_unload", "unload"])
def test_after_unload_the_base_is_bare_and_swaps_are_refused(call: str, folders: dict[str, Path]) -> None:
    model, swapper = attached(folders)
    with seeded():
        bare, twin = getattr(model, call)(), getattr(fresh(MLP, folders["b"]), call)()
    assert not lora_layers(bare)
    assert_same_output(output(bare), output(twin), exact=call == "unload")
    before = snapshot(bare)
    for swap in (lambda: swapper.activate("a"), swapper.deactivate):
        with pytest.raises(ModelError):
            swap()
    assert_unchanged(before, snapshot(bare))


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
@pytest.mark.parametrize("live", ["a", "b"], ids=["full-slot", "padded-slot"])
def test_add_weighted_adapter_is_right_or_raises(live: str, combination: str, folders: dict[str, Path]) -> None:
    """PEFT reads the slot's matrices themselves, padding included; where that cannot work, torch says so."""
    model, swapper = attached(folders, live=live)
    twin = fresh(MLP, folders[live])
    with seeded():
        mix(twin, combination, folders["four" if live == "a" else "b2"])
        if live == "b" and combination != "svd":
            with pytest.raises(RuntimeError, match="size"):
                mix(model, combination, folders["b2"])
        else:
            mix(model, combination, folders["four" if live == "a" else "b2"])
            assert_same_output(output(model), output(twin))
    model.set_adapter("default")
    assert_same_output(output(model), fresh_output(MLP, folders[live]))
    swapper.activate("a")
    assert_same_output(output(model), fresh_output(MLP, folders["a"]))


def mix(model: PeftModel, combination: str, folder: Path) -> None:
    model.load_adapter(str(folder), "extra")
    options = {"svd_rank": 4} if combination == "svd" else {}
    model.add_weighted_adapter(["default", "extra"], [0.5, 2.0], "mix", combination_type=combination, **options)
    model.set_adapter("mix")


@pytest.mark.parametrize("kind", ["peft model", "plain model"])
def test_after_the_slots_adapter_was_deleted_swaps_are_refused_until_one_attaches_again(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model, swapper = attached(folders) if kind == "peft model" else plain(folders)
    if isinstance(model, PeftModel):
        model.delete_adapter("default")
    else:
        for layer in lora_layers(model):
            layer.delete_adapter("default")
        assert_same_output(output(model), output(MLP.build()), exact=True)
    with pytest.raises(ModelError, match="deleted"):
        swapper.activate("a")
    if isinstance(model, PeftModel):
        # loaded anew by PEFT, at another rank, it is PEFT's own: what is saved and computed is what was loaded
        model.load_adapter(str(folders["six"]), "default")
        model.set_adapter("default")
        assert_same_output(output(model), fresh_output(MLP, folders["six"]), exact=True)
        model.save_pretrained(tmp_path)
        assert_same_output(fresh_output(MLP, tmp_path), fresh_output(MLP, folders["six"]))
        with pytest.raises(ModelError, match="deleted"):
            swapper.activate("a")
    again = hotslot.attach(model, adapters={"a": folders["a"]})
    again.activate("a")
    assert_same_output(output(model), fresh_output(MLP, folders["a"]))


def plain(folders: dict[str, Path], live: str = "b") -> tuple[nn.Module, hotslot.Swapper]:
    model = MLP.build()
    swapper = hotslot.attach(model, adapters={"a": folders["a"], "b": folders["b"]})
    swapper.activate(live)
    return model, swapper


def attach_beside(model: nn.Module, folders: dict[str, Path]) -> None:
    hotslot.attach(model, {"b": folders["b"]}, adapter_name="second")


def prepare_while_training(model: nn.Module, folders: dict[str, Path]) -> None:
    for name, param in model.named_parameters():
        param.grad = torch.ones_like(param) if "lora_" in name else None
    before = snapshot(model)
    with pytest.raises(ModelError, match="in training"):
        hotslot.prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("between", [attach_beside, prepare_while_training])
def test_the_drop_in_finds_an_adapter_that_was_loaded_anew(between: Any, folders: dict[str, Path]) -> None:
    """It swaps that, and not the one before, whatever has rearranged the layers' dicts since it looked them up."""
    model: Any = fresh(MLP, folders["a"])
    hotslot.hotswap_adapter(model, folders["b"], "default")
    between(model, folders)
    model.delete_adapter("default")
    model.load_adapter(str(folders["a"]), adapter_name="default")
    model.set_adapter("default")
    hotslot.hotswap_adapter(model, folders["b"], "default")
    assert_same_output(output(model), fresh_output(MLP, folders["b"]))


def test_disable_adapter_is_the_base_for_a_block(folders: dict[str, Path]) -> None:
    model, swapper = attached(folders)
    base = output(MLP.build())
    with model.disable_adapter():
        assert_same_output(output(model), base, exact=True)
        swapper.activate("a")  # a disabled adapter is swapped all the same
        assert_same_output(output(model), base, exact=True)
    assert_same_output(output(model), fresh_output(MLP, folders["a"]))


def test_using_none_is_the_base_for_a_block(folders: dict[str, Path]) -> None:
    for model, swapper in (attached(folders), plain(folders)):
        before, live = output(model), swapper.active
        with hotslot.testing.same_addresses(model), swapper.using(None) as report:
            assert report.adapter is None
            assert_same_output(output(model), output(MLP.build()), exact=True)
        assert_same_output(output(model), before, exact=True)
        assert swapper.active == live
        with pytest.raises(ZeroDivisionError), swapper.using("a"):
            raise ZeroDivisionError
        assert_same_output(output(model), before, exact=True)


def test_using_nests(folders: dict[str, Path]) -> None:
    model, swapper = attached(folders)
    with swapper.using("a"), swapper.using(None):
        with swapper.using("b"):
            assert_same_output(output(model), fresh_output(MLP, folders["b"]))
        assert_same_output(output(model), output(MLP.build()), exact=True)
    assert swapper.active == "b"
    assert_same_output(output(model), fresh_output(MLP, folders["b"]))


def test_rollback_of_an_adapter_that_was_unloaded_since(folders: dict[str, Path]) -> None:
    model, swapper = attached(folders)
    with pytest.raises(ModelError, match="live"):
        swapper.unload("b")
    swapper.activate("a")
    swapper.unload("b")
    assert swapper.adapters == ("a",)
    swapper.rollback()
    assert_same_output(output(model), fresh_output(MLP, folders["b"]))
    swapper.rollback()
    assert_same_output(output(model), fresh_output(MLP, folders["a"]))


@pytest.mark.parametrize("plain", [True, False])
def test_deactivating_after_a_rollback_to_the_base_is_no_swap(plain: bool, folders: dict[str, Path]) -> None:
    model = MLP.build() if plain else fresh(MLP, folders["a"])
    swapper = hotslot.attach(model, {"a": folders["a"]})
    swapper.deactivate()
    swapper.activate("a")
    swapper.rollback()
    generation = swapper.generation
    assert not swapper.deactivate().changed
    assert swapper.generation == generation
    swapper.rollback()
    assert_same_output(output(model), fresh_output(MLP, folders["a"]), exact=True)


def test_peft_cannot_load_into_slots_that_the_live_adapter_leaves_unused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT would drop the tensors in silence: `state_dict()` shows no slot that is not in use."""
    subset = make_adapter(tmp_path, MLP, seed=8, r=2, target_modules=["inner.2"])
    model, swapper = attached(folders)
    swapper.load("subset", subset)
    swapper.activate("subset")
    with pytest.raises(ModelError, match=r"(?s)cannot load into the slot 'default'.*swapper\.load"):
        model.load_adapter(str(folders["b"]), "default")
    swapper.activate("b")
    model.load_adapter(str(folders["b2"]), "default")  # the control: the same shapes as those of the live adapter
    assert_same_output(output(model), fresh_output(MLP, folders["b2"]))


def test_attention_is_merged_and_swapped_like_any_layer(tmp_path: Path) -> None:
    entry = ZOO["attention"]
    configs = {
        "a": {"r": 4, "target_modules": ["batch_first", "mix"]},
        "b": {"r": 2, "target_modules": ["length_first"]},
    }
    made = {
        key: make_adapter(tmp_path / key, entry, seed=i, **config) for i, (key, config) in enumerate(configs.items())
    }
    model = entry.build()
    swapper = hotslot.attach(model, adapters=made)
    swapper.activate("a")
    layers: list[Any] = [model.batch_first, model.mix]
    for layer in layers:
        layer.merge()
    assert_same_output(output(model, entry), fresh_output(entry, made["a"]))
    with pytest.raises(MergedError):
        swapper.activate("b")
    for layer in layers:
        layer.unmerge()
    assert_same_output(output(model, entry), fresh_output(entry, made["a"]))
    swapper.activate("b")
    assert_same_output(output(model, entry), fresh_output(entry, made["b"]))


def test_attention_runs_without_touching_its_base_weights(tmp_path: Path) -> None:
    """PEFT's own adds the delta and takes it away again at each call, which leaves a rounding behind."""
    entry = ZOO["attention"]
    folder = make_adapter(tmp_path, entry, seed=0, r=4, target_modules=["batch_first", "length_first"])
    model, control = fresh(entry, folder), fresh(entry, folder)
    hotslot.attach(model, adapters={"a": folder}).activate("a")
    before = snapshot(model), snapshot(control)
    for _ in range(3):
        assert_same_output(output(model, entry), fresh_output(entry, folder), exact=True)
        output(control, entry)
    assert_unchanged(before[0], snapshot(model))
    assert differences(before[1], snapshot(control))


def test_an_adapter_that_is_not_active_can_be_swapped(folders: dict[str, Path]) -> None:
    model, swapper = attached(folders)
    model.load_adapter(str(folders["extra"]), "extra")
    model.set_adapter("extra")
    before = output(model)
    swapper.activate("a")
    assert model.active_adapters == ["extra"]
    assert_same_output(output(model), before, exact=True)
    model.set_adapter("default")
    assert_same_output(output(model), fresh_output(MLP, folders["a"]))


@pytest.mark.parametrize("call", ["add_adapter, set_adapter", "disable_adapter_layers"])
def test_a_swap_without_effect_is_logged_once(
    call: str, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model, swapper = attached(folders)
    assert not caplog.records
    with seeded():
        CALLS[call](model, folders)
    before = output(model)
    swapper.activate("a")
    swapper.deactivate()
    swapper.activate("b")
    assert_same_output(output(model), before, exact=True)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "which the model does not compute with" in caplog.text
    model.set_adapter("default")
    model.base_model.enable_adapter_layers()
    swapper.activate("a")
    assert_same_output(output(model), fresh_output(MLP, folders["a"]), exact=True)
    assert len(caplog.records) == 1


# --- mixed batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "conv2d", "llama"])
def test_a_mixed_batch_works_beside_the_slot(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    configs = {"a": {"r": 4}, "b": {"r": 2, "lora_alpha": 3}, "extra": {"r": 2, "lora_alpha": 5}}
    made = {
        key: make_adapter(tmp_path / key, entry, seed=i, target_modules=list(entry.targets), **config)
        for i, (key, config) in enumerate(configs.items())
    }
    model, twin = fresh(entry, made["a"]), fresh(entry, made["b"])
    swapper = hotslot.attach(model, adapters={"a": made["a"], "b": made["b"]})
    swapper.activate("b")
    results = []
    for subject in (model, twin):
        subject.load_adapter(str(made["extra"]), "extra")
        inputs = entry.inputs()
        rows = next(iter(inputs.values())).shape[0]
        names = ["default", "extra", "__base__"][:rows]
        with torch.no_grad():
            results.append(entry.read(subject(**inputs, adapter_names=names)))
    assert_same_output(*results)
    alone = entry.output(model, entry.inputs())
    assert_same_output(results[0][:1], alone[:1])
    assert error(results[0][1:2], alone[1:2]) > 0.01, "the control: another adapter gives something else"


# --- copies ---------------------------------------------------------------------------------------------------------


def _by_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _by_torch_save,
}


@pytest.mark.parametrize("kind", ["peft model", "plain model"])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_a_model_of_its_own(way: str, kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model, swapper = attached(folders) if kind == "peft model" else plain(folders)
    copied = COPIES[way](model)
    expected = output(model)
    assert_same_output(output(copied), expected, exact=True)
    swapper.activate("a")
    assert_same_output(output(copied), expected, exact=True)
    assert hotslot.Swapper.of(copied) is None
    before = snapshot(model)
    for layer in lora_layers(copied):
        layer.set_scale("default", 2.0)
    with torch.no_grad():
        for param in copied.parameters():
            param.mul_(1.5)
    assert_unchanged(before, snapshot(model))
    if isinstance(copied, PeftModel):
        copied.save_pretrained(tmp_path / "copied")  # at its own rank
        assert lora_layers(fresh(MLP, tmp_path / "copied"))[0].r["default"] == 2
        copied.delete_adapter("default")
        copied.load_adapter(str(folders["six"]), "default")
        copied.save_pretrained(tmp_path / "six")
        assert_same_output(fresh_output(MLP, tmp_path / "six"), fresh_output(MLP, folders["six"]))


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_can_be_attached_and_swapped(way: str, folders: dict[str, Path]) -> None:
    model, swapper = attached(folders)
    copied = COPIES[way](model)
    again = hotslot.attach(copied, adapters={"a": folders["a"]})
    expected = output(model)
    again.activate("a")
    assert_same_output(output(copied), fresh_output(MLP, folders["a"]))
    assert_same_output(output(model), expected, exact=True)
    again.rollback()
    assert_same_output(output(copied), expected)
    swapper.activate("a")


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("first", ["four", "head"])
def test_a_copy_that_is_attached_saves_what_is_live_in_it(
    way: str, first: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """And not at the rank, or with the modules, of what was live in the original."""
    head = make_adapter(tmp_path / "head", MLP, seed=9, r=3, target_modules=["up"], modules_to_save=["down"])
    adapters = {"b": folders["b"], "four": folders["four"], "six": folders["six"], "head": head}
    model = fresh(MLP, adapters[first])
    swapper = hotslot.attach(model, adapters)
    for live, folder in adapters.items():
        swapper.activate(live)
        copied = COPIES[way](model)
        again = hotslot.attach(copied, adapters)
        for name, other in adapters.items():
            again.activate(name)
            assert_saves(copied, other, tmp_path / live / name)
        again.detach()
        assert_saves(copied, folder, tmp_path / live / "detached")


def assert_saves(model: Any, folder: Path, saved: Path) -> None:
    with expected_peft_warnings():
        model.save_pretrained(saved)
    assert_same_output(fresh_output(MLP, saved), fresh_output(MLP, folder))


def test_a_pickle_is_not_many_times_the_model(tmp_path: Path) -> None:
    """Each parameter is a view of one arena: a pickle must not carry the arena once for each, nor once it has more."""

    def made(**options: Any) -> nn.Module:
        base = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
        return get_peft_model(base, LoraConfig(r=64, target_modules=[str(i) for i in range(6)], **options))

    model = made()
    for name, adapter in {"same": model, "dora": made(use_dora=True)}.items():
        adapter.save_pretrained(tmp_path / name)
    before = len(pickle.dumps(model))
    swapper = hotslot.attach(model, adapters={"same": tmp_path / "same"})
    assert len(pickle.dumps(model)) < 1.5 * before
    swapper.grow(hotslot.plan(model, [tmp_path / "dora"], max_blend=1))
    assert len(pickle.dumps(model)) < 1.5 * before


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_goes_on_after_a_swap_as_on_a_fresh_load(checkpointed: bool, folders: dict[str, Path]) -> None:
    model, swapper = attached(folders, live="a")
    make_trainable(model)
    optimizer = torch.optim.AdamW(make_trainable(model), lr=0.05)
    steps(model, optimizer, checkpointed)
    swapper.activate("b")  # the optimizer holds the same Parameters
    optimizer.state.clear()
    twin = fresh(MLP, folders["b"])
    twins_optimizer = torch.optim.AdamW(make_trainable(twin), lr=0.05)
    losses = steps(model, optimizer, checkpointed), steps(twin, twins_optimizer, checkpointed)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    assert_same_output(output(model), output(twin))
    ours, theirs = model.state_dict(), twin.state_dict()
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in theirs)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, checkpointed: bool) -> list[float]:
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        inputs = MLP.inputs()
        result = checkpoint(model, **inputs, use_reentrant=False) if checkpointed else model(**inputs)
        value = result.square().mean()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("attached_in_training", [False, True])
def test_dropout_is_the_new_adapters(attached_in_training: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    dropout = make_adapter(tmp_path, MLP, seed=9, r=2, target_modules=["up", "inner.2"], lora_dropout=0.5)
    model = fresh(MLP, folders["a"]).train(attached_in_training)
    swapper = hotslot.attach(model, adapters={"dropout": dropout, "b": folders["b"]})
    for name, folder in (("dropout", dropout), ("b", folders["b"]), ("dropout", dropout)):
        swapper.activate(name)
        outputs = []
        for subject in (model, fresh(MLP, folder)):
            subject.train()
            with seeded():
                outputs.append(output(subject))
        assert_same_output(*outputs)
        assert (error(outputs[0], output(model.eval())) > 0.01) == (name == "dropout")
        model.train(attached_in_training)


def test_gradient_checkpointing_of_transformers_works_after_a_swap(tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    a, b = (make_adapter(tmp_path / str(r), LLAMA, seed=r, r=r, **config) for r in (4, 2))
    model, twin = LLAMA.build(), fresh(LLAMA, b)
    hotslot.attach(model, adapters={"a": a, "b": b}).activate("b")
    gradients = []
    for subject in (model, twin):
        subject.train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 has begun to rename it
            subject.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        params = make_trainable(subject)
        loss(subject, LLAMA).backward()
        gradients.append([param.grad for param in params])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours is not None
        assert theirs is not None
        rank_dim = 0 if ours.shape[0] != theirs.shape[0] else 1
        assert torch.allclose(ours.narrow(rank_dim, 0, theirs.shape[rank_dim]), theirs, rtol=1e-3, atol=1e-6)


SWAPS: dict[str, Callable[[PeftModel, hotslot.Swapper | None, dict[str, Path]], object]] = {
    "activate": lambda model, swapper, folders: swapper.activate("a"),
    "deactivate": lambda model, swapper, folders: swapper.deactivate(),
    "rollback": lambda model, swapper, folders: swapper.rollback(),
    "drop-in": lambda model, swapper, folders: hotslot.hotswap_adapter(model, folders["b2"], "default"),
}


@pytest.mark.parametrize("swap", [*SWAPS, None])
def test_backward_over_values_that_a_swap_overwrote_raises(swap: str | None, folders: dict[str, Path]) -> None:
    model, swapper = (fresh(MLP, folders["b"]), None) if swap == "drop-in" else attached(folders)
    params = make_trainable(model)
    value = loss(model)
    if swap is None:  # the control
        value.backward()
        assert all(param.grad is not None for param in params)
        return
    versions = [param._version for param in params]
    SWAPS[swap](model, swapper, folders)
    assert all(param._version > version for param, version in zip(params, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_control_peft_s_hotswap_gives_wrong_gradients_in_silence(folders: dict[str, Path]) -> None:
    model = fresh(MLP, folders["b"])
    params = make_trainable(model)
    (expected,) = torch.autograd.grad(loss(model), params[:1])
    value = loss(model)
    peft_hotswap_adapter(model, str(folders["b2"]), "default")
    assert not torch.allclose(torch.autograd.grad(value, params[:1])[0], expected)


def test_an_optimizer_goes_on_where_no_shape_changes(folders: dict[str, Path]) -> None:
    """Attach moves the parameters into the arena, with gradients and momenta in place: the objects stay."""
    model, twin = fresh(MLP, folders["a"]), fresh(MLP, folders["a"])
    optimizers = [torch.optim.AdamW(make_trainable(subject), lr=0.05) for subject in (model, twin)]
    for subject, optimizer in zip((model, twin), optimizers, strict=True):
        steps(subject, optimizer, False)
        loss(subject).backward()
    swapper = hotslot.attach(model, adapters={"a": folders["a"], "b": folders["b"]})
    for subject, optimizer in zip((model, twin), optimizers, strict=True):
        optimizer.step()
        steps(subject, optimizer, False)
    assert_twins(model, twin, exact=True)
    swapper.activate("b")
    params = optimizers[0].param_groups[0]["params"]
    assert all(held is param for held, param in zip(params, make_trainable(model), strict=True))
    before = output(model)
    losses = steps(model, optimizers[0], False)
    assert losses[-1] < losses[0]
    assert error(output(model), before) > 1e-3


PADDINGS: dict[str, Callable[[PeftModel, dict[str, Path]], object]] = {
    "attach": lambda model, folders: hotslot.attach(model, adapters={"a": folders["a"]}),
    "drop-in": lambda model, folders: hotslot.hotswap_adapter(model, folders["four"], "default"),
    "prepare": lambda model, folders: hotslot.prepare_model_for_compiled_hotswap(model, target_rank=8),
}


@pytest.mark.parametrize("trained", ["gradient", "optimizer", None])
@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_what_is_being_trained_is_refused(padding: str, trained: str | None, folders: dict[str, Path]) -> None:
    model = fresh(MLP, folders["b"])
    optimizer = torch.optim.AdamW(make_trainable(model), lr=0.05)
    if trained == "gradient":
        loss(model).backward()
    elif trained == "optimizer":
        steps(model, optimizer, False)
        optimizer.zero_grad(set_to_none=True)
    before = snapshot(model)
    if trained is None:  # the control: an optimizer without state does not mind
        PADDINGS[padding](model, folders)
        assert next(iter(make_trainable(model))).shape[0] >= 4
        return
    with pytest.raises(ModelError, match=r"(?s)cannot be padded.*next step"):
        PADDINGS[padding](model, folders)
    assert_unchanged(before, snapshot(model))
    assert hotslot.Swapper.of(model) is None
    steps(model, optimizer, False)


# --- several adapters -----------------------------------------------------------------------------------------------

NAMES = ("default_2", "a", "lora", "weight", "layers", "q_proj", "0", "lora_A", "model", "base_layer", "defaul")
LLAMA_CONFIG = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("llamas")
    ranks = {"one": 2, "two": 2, "other": 3}
    return {
        key: make_adapter(root / key, LLAMA, seed=i, r=r, **LLAMA_CONFIG) for i, (key, r) in enumerate(ranks.items())
    }


def state_of(model: PeftModel, name: str) -> dict[str, Any]:
    """All that belongs to one adapter, bytes and words."""
    layers = dict(enumerate(lora_layers(model)))
    facts: dict[str, Any] = {f"config {k}": v for k, v in model.peft_config[name].to_dict().items()}
    facts |= {f"r {i}": (layer.r[name], layer.lora_alpha[name], layer.scaling[name]) for i, layer in layers.items()}
    for i, layer in layers.items():
        for kind in ("lora_A", "lora_B"):
            facts[f"{kind} {i}"] = getattr(layer, kind)[name].weight.detach().clone().numpy().tobytes()
    return facts


@pytest.fixture(scope="module")
def crowded(llamas: dict[str, Path]) -> PeftModel:
    """One model with an adapter under each of the names."""
    model = fresh(LLAMA, llamas["one"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Adapter name .* should not be contained in the prefix")
        for name in NAMES:
            model.load_adapter(str(llamas["other"]), name)
    return model


@pytest.mark.parametrize("slot", ["default", *NAMES])
def test_swapping_one_adapter_changes_no_byte_of_the_others(
    slot: str, crowded: PeftModel, llamas: dict[str, Path]
) -> None:
    model = copy.deepcopy(crowded)
    others = {name: state_of(model, name) for name in ("default", *NAMES) if name != slot}
    swapper = hotslot.attach(model, adapters={"two": llamas["two"]}, adapter_name=slot)
    swapper.activate("two")
    model.set_adapter(slot)
    assert_same_output(output(model, LLAMA), fresh_output(LLAMA, llamas["two"]))
    assert {name: state_of(model, name) for name in others} == others
    swapper.deactivate()
    assert {name: state_of(model, name) for name in others} == others
    swapper.detach()
    hotslot.hotswap_adapter(model, llamas["two"], slot)
    assert_same_output(output(model, LLAMA), fresh_output(LLAMA, llamas["two"]))
    assert {name: state_of(model, name) for name in others} == others
    model.set_adapter(next(name for name in others if name != "default"))
    assert_same_output(output(model, LLAMA), fresh_output(LLAMA, llamas["other"]))


def test_control_peft_s_hotswap_zeroes_an_adapter_of_a_similar_name(llamas: dict[str, Path]) -> None:
    model = fresh(LLAMA, llamas["one"])
    model.load_adapter(str(llamas["one"]), "default_2")
    before = state_of(model, "default_2")
    peft_hotswap_adapter(model, str(llamas["two"]), "default")
    assert state_of(model, "default_2") != before


def test_two_swappers_on_one_model(llamas: dict[str, Path]) -> None:
    model = fresh(LLAMA, llamas["one"])
    model.load_adapter(str(llamas["other"]), "second")
    swappers = {
        name: hotslot.attach(model, adapters={"one": llamas["one"], "two": llamas["two"]}, adapter_name=name)
        for name in ("default", "second")
    }
    swappers["second"].activate("two")
    model.set_adapter("second")
    assert_same_output(output(model, LLAMA), fresh_output(LLAMA, llamas["two"]))
    before = state_of(model, "second")
    swappers["default"].activate("two")
    swappers["default"].activate("one")
    swappers["default"].detach()
    assert state_of(model, "second") == before
    swappers["second"].activate("one")
    assert_same_output(output(model, LLAMA), fresh_output(LLAMA, llamas["one"]))
    swappers["second"].detach()
    assert_same_output(output(model, LLAMA), fresh_output(LLAMA, llamas["other"]))


# --- what a user does to the parameters -----------------------------------------------------------------------------


def move_one(model: nn.Module) -> None:
    param = lora_layers(model)[0].lora_A["default"].weight
    param.data = param.data.clone()


def move_all(model: nn.Module) -> None:
    for param in model.parameters():
        param.data = param.data.clone()


MOVES: dict[str, Callable[[nn.Module], object]] = {
    "one parameter": move_one,
    "all parameters": move_all,
    "to another dtype and back": lambda model: model.double().float(),
    "to another dtype": lambda model: model.double(),
    "to a smaller dtype": lambda model: model.bfloat16(),
}


@pytest.mark.parametrize("kind", ["peft model", "plain model"])
@pytest.mark.parametrize("move", MOVES)
def test_parameters_that_the_user_moved_are_put_right_at_the_next_swap(
    move: str, kind: str, folders: dict[str, Path]
) -> None:
    model, swapper = attached(folders) if kind == "peft model" else plain(folders)
    MOVES[move](model)
    dtype = next(model.parameters()).dtype
    for name in ("a", "b", "a"):
        swapper.activate(name)
        twin = fresh(MLP, folders[name])
        MOVES[move](twin)
        got, want = (MLP.output(subject, MLP.inputs(dtype=dtype)) for subject in (model, twin))
        assert_same_output(got, want)
    swapper.deactivate()
    base = MLP.build()
    MOVES[move](base) if move != "one parameter" else None
    assert_same_output(
        MLP.output(model, MLP.inputs(dtype=dtype)), MLP.output(base, MLP.inputs(dtype=dtype)), exact=True
    )


def test_a_parameter_of_another_shape_is_refused(folders: dict[str, Path]) -> None:
    model, swapper = attached(folders)
    param = lora_layers(model)[0].lora_A["default"].weight
    param.data = torch.zeros(5, 12)
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"(?s)another shape.*up\.lora_A"):
        swapper.activate("a")
    assert_unchanged(before, snapshot(model))


def test_a_parameter_that_was_replaced_is_refused(folders: dict[str, Path]) -> None:
    model, swapper = attached(folders)
    model.load_state_dict({k: v.clone() for k, v in fresh(MLP, folders["b"]).state_dict().items()}, assign=True)
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"(?s)up\.lora_A"):
        swapper.activate("a")
    assert_unchanged(before, snapshot(model))


WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "add noise": lambda weight: weight.add_(1),
    "initialise anew": nn.init.normal_,
    "through data": lambda weight: (weight.data.add_(1), weight.mul_(1)),  # `.data` leaves no trace by itself
}


@pytest.mark.parametrize("then", ["b", "a", None])
@pytest.mark.parametrize("write", WRITES)
def test_nothing_that_was_written_into_the_padding_survives_a_swap(
    write: str, then: str | None, folders: dict[str, Path]
) -> None:
    model, swapper = plain(folders)  # rank 2 in slots of 4
    with torch.no_grad():
        for layer in lora_layers(model):
            for matrices in (layer.lora_A, layer.lora_B):
                WRITES[write](matrices["default"].weight)
    if then is None:
        swapper.deactivate()
        assert_same_output(output(model), output(MLP.build()), exact=True)
    else:
        swapper.activate(then)
        assert_same_output(output(model), fresh_output(MLP, folders[then]))


def test_rescaling_for_a_block_keeps_the_slot_s_scaling(folders: dict[str, Path]) -> None:
    """PEFT's `rescale_adapter_scale` puts another dict in the place of `layer.scaling`, and puts the old one back."""
    from peft.helpers import rescale_adapter_scale

    model, swapper = attached(folders)
    twin = fresh(MLP, folders["b"])
    with rescale_adapter_scale(model, 0.5), rescale_adapter_scale(twin, 0.5):
        assert_same_output(output(model), output(twin))
    assert_same_output(output(model), output(twin))
    for subject in (model, twin):
        for layer in lora_layers(subject):
            layer.set_scale("default", 3.0)
    assert_same_output(output(model), output(twin))
    swapper.activate("a")
    assert_same_output(output(model), fresh_output(MLP, folders["a"]))


# --- inference mode -------------------------------------------------------------------------------------------------


def test_attaching_and_swapping_in_inference_mode_leaves_a_model_that_trains(folders: dict[str, Path]) -> None:
    model = MLP.build()
    with torch.inference_mode():
        swapper = hotslot.attach(model, adapters={"a": folders["a"], "b": folders["b"]})
        swapper.load("again", folders["b"])
        swapper.activate("again")
        model(**MLP.inputs())
    assert not any(param.is_inference() for param in model.parameters())
    optimizer = torch.optim.SGD(make_trainable(model), lr=0.1)
    losses = steps(model, optimizer, False)
    assert losses[-1] < losses[0]
    with torch.inference_mode():
        swapper.rollback()
    swapper.activate("a")
    assert_same_output(output(model), fresh_output(MLP, folders["a"]))


def test_loading_and_swapping_under_another_default_device(folders: dict[str, Path], tmp_path: Path) -> None:
    """As under `torch.set_default_device("cuda")`: what is made in host memory stays there."""
    dora = make_adapter(tmp_path, MLP, seed=9, r=4, target_modules=["up", "inner.2"], use_dora=True)
    model = MLP.build()
    swapper = hotslot.attach(model, {"a": folders["a"], "b": folders["b"], "dora": dora})
    tensors = load_file(folders["b2"] / "adapter_model.safetensors")
    with torch.device("meta"):
        swapper.load("four", folders["four"])
        swapper.activate("four")
    assert_same_output(output(model), fresh_output(MLP, folders["four"]), exact=True)
    with torch.device("meta"):
        swapper.update("b", tensors)
        swapper.activate({"a": 0.5, "b": 0.5}, blend="svd")
        swapper.activate("b")
    assert_same_output(output(model), fresh_output(MLP, folders["b2"]))
    with torch.device("meta"):
        swapper.activate("dora")
    assert_same_output(output(model), fresh_output(MLP, dora), exact=True)
    with torch.device("meta"):
        swapper.deactivate()
        swapper.detach()
    assert_same_output(output(model), output(MLP.build()), exact=True)


@pytest.mark.parametrize("within", [False, True], ids=["outside", "within"])
@pytest.mark.parametrize("way", ["drop-in", "prepared", "attached", "exclusive", "plain"])
def test_a_model_that_was_made_in_inference_mode(
    way: str, within: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    """As where a whole script is: torch counts no versions of such tensors, and lets nobody write them outside."""
    common = {"target_modules": ["up", "inner.2"], "modules_to_save": ["down"]}
    came = make_adapter(tmp_path / "came", MLP, seed=9, r=2, use_dora=True, **common)
    other = make_adapter(tmp_path / "other", MLP, seed=8, r=4, target_modules=["up"], lora_bias=True)
    with torch.inference_mode():
        model = MLP.build() if way == "plain" else fresh(MLP, came)
    start = output(model)
    if way in ("drop-in", "prepared"):
        for name in (other, came):
            with torch.inference_mode(within):
                if way == "prepared":
                    hotslot.prepare_model_for_compiled_hotswap(model, target_rank=8)
                hotslot.hotswap_adapter(model, name, "default")
            assert_same_output(output(model), fresh_output(MLP, name))
        return
    with torch.inference_mode(within):
        swapper = hotslot.attach(model, {"came": came, "other": other}, exclusive=way == "exclusive")
        swapper.activate("other")
    assert_same_output(output(model), fresh_output(MLP, other))
    with torch.inference_mode(not within):
        swapper.activate("came")
    assert_same_output(output(model), fresh_output(MLP, came))
    swapper.detach()
    assert_same_output(output(model), start, exact=True)


def test_control_peft_in_inference_mode_leaves_a_model_that_does_not(folders: dict[str, Path]) -> None:
    base = MLP.build()
    with torch.inference_mode():
        model = PeftModel.from_pretrained(base, str(folders["a"]))
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        steps(model, torch.optim.SGD(make_trainable(model), lr=0.1), False)


# --- detach ---------------------------------------------------------------------------------------------------------

DETACHED = ("llama", "gpt2", "mlp", "embedding", "conv2d", "attention", "vision")


def adapters_of(entry: Entry, root: Path) -> dict[str, Path]:
    """A smaller adapter on some targets, a larger one on others, with and without bias."""
    first, *_, last = entry.targets
    configs = {
        "small": {"r": 2, "target_modules": [first], "lora_alpha": 0.7},
        "large": {"r": 6, "target_modules": [first, last]},
    }
    return {key: make_adapter(root / key, entry, seed=i, **config) for i, (key, config) in enumerate(configs.items())}


@pytest.mark.parametrize("name", DETACHED)
def test_detach_gives_a_plain_model_back_exactly(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    sources = adapters_of(entry, tmp_path)
    model = entry.build()
    next(iter(model.parameters())).requires_grad_(False)
    list(model.children())[-1].train()
    before, attributes = snapshot(model), set(vars(model))
    for activated in ((), ("large",), ("small", "large", "small")):
        swapper = hotslot.attach(model, adapters=sources)
        for key in activated:
            swapper.activate(key)
        swapper.detach()
        assert_unchanged(before, snapshot(model))
        assert set(vars(model)) == attributes
        assert hotslot.Swapper.of(model) is None
        assert hooks(model) == 0
    with pytest.raises(ModelError, match="detached"):
        swapper.activate("large")


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", DETACHED)
def test_detach_gives_a_peft_model_back_exactly(name: str, trained: bool, tmp_path: Path) -> None:
    entry = ZOO[name]
    sources = adapters_of(entry, tmp_path)
    model = fresh(entry, sources["small"])
    model.load_adapter(str(sources["large"]), "other")
    expected = output(model, entry)
    before = snapshot(model)
    for activated in ((), ("large",), ("small", "large")):
        swapper = hotslot.attach(model, adapters=sources)
        if trained:  # its training is kept
            with torch.no_grad():
                for param in make_trainable(model):
                    param.mul_(2)
            model.requires_grad_(False)
        for key in activated:
            swapper.activate(key)
        swapper.detach()
        if trained:
            with torch.no_grad():
                for param in make_trainable(model):
                    param.div_(2)
            model.requires_grad_(False)
        assert_unchanged(before, snapshot(model))
        assert hooks(model) == 0
    assert_same_output(output(model, entry), expected, exact=name not in ("attention", "vision"))  # PEFT's drifts
    with expected_peft_warnings():
        model.save_pretrained(tmp_path / "saved")
    assert_same_output(fresh_output(entry, tmp_path / "saved"), expected)


def hooks(model: nn.Module) -> int:
    return sum(len(m._state_dict_hooks) + len(m._load_state_dict_pre_hooks) for m in model.modules())


def test_a_swapper_takes_over_what_the_drop_in_has_swapped_in(folders: dict[str, Path]) -> None:
    """A larger rank than the model came with: nothing of it may be cut off."""
    model = fresh(MLP, folders["four"])
    hotslot.hotswap_adapter(model, folders["six"], "default")
    swapper = hotslot.attach(model, adapters={"b": folders["b"]})
    assert_same_output(output(model), fresh_output(MLP, folders["six"]))
    swapper.activate("b")
    assert_same_output(output(model), fresh_output(MLP, folders["b"]))
    swapper.detach()
    assert_same_output(output(model), fresh_output(MLP, folders["six"]))


# --- transformers' own calls on a plain model -----------------------------------------------------------------------


def test_transformers_adapter_methods_work_beside_the_slot(llamas: dict[str, Path]) -> None:
    model, twin = LLAMA.build(), LLAMA.build()
    swapper = hotslot.attach(model, adapters={"one": llamas["one"], "two": llamas["two"]})
    swapper.activate("one")
    twin.load_adapter(str(llamas["one"]), adapter_name="default")
    calls: list[Callable[[Any], object]] = [
        lambda m: m.load_adapter(str(llamas["other"]), adapter_name="other"),
        lambda m: m.set_adapter("other"),
        lambda m: m.disable_adapters(),
        lambda m: m.enable_adapters(),
        lambda m: m.set_adapter("default"),
        lambda m: m.set_adapter(["default", "other"]),
        lambda m: m.delete_adapter("other"),
    ]
    for call in calls:
        for subject in (model, twin):
            with seeded():
                call(subject)
        assert_same_output(output(model, LLAMA), output(twin, LLAMA))
        assert model.active_adapters() == twin.active_adapters()
        assert model.get_adapter_state_dict("default").keys() == twin.get_adapter_state_dict("default").keys()
    swapper.activate("two")
    assert_same_output(output(model, LLAMA), fresh_output(LLAMA, llamas["two"]))


def test_attach_after_a_plain_adapter_took_the_place_of_a_dora(folders: dict[str, Path], tmp_path: Path) -> None:
    """Nobody is left who tells PEFT's layer that its magnitude is of no adapter."""
    dora = make_adapter(tmp_path / "dora", MLP, seed=9, r=2, target_modules=["up", "inner.2"], use_dora=True)
    model = fresh(MLP, dora)
    hotslot.hotswap_adapter(model, folders["b"], "default")
    swapper = hotslot.attach(model, {"a": folders["a"], "dora": dora})
    assert_same_output(output(model), fresh_output(MLP, folders["b"]))
    for name in ("a", "dora", "a"):
        swapper.activate(name)
        assert_same_output(output(model), fresh_output(MLP, dora if name == "dora" else folders[name]))
    swapper.detach()
    assert_same_output(output(model), fresh_output(MLP, folders["b"]))
    with expected_peft_warnings():
        model.save_pretrained(tmp_path / "saved")
    assert_same_output(fresh_output(MLP, tmp_path / "saved"), fresh_output(MLP, folders["b"]))


def test_what_a_lower_rank_has_left_of_its_room_is_saved_after_attach_and_detach(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Padding that nobody hides any more would be in the file, beside a config of the lower rank."""
    model = fresh(MLP, folders["four"])
    hotslot.hotswap_adapter(model, folders["b"], "default")
    hotslot.attach(model, {"six": folders["six"]}).detach()
    assert_same_output(output(model), fresh_output(MLP, folders["b"]))
    with expected_peft_warnings():
        model.save_pretrained(tmp_path)
    assert_same_output(fresh_output(MLP, tmp_path), fresh_output(MLP, folders["b"]), exact=True)


@pytest.mark.parametrize("then", ["attached", "detached", "detached twice"])
def test_layers_that_the_drop_in_has_left_empty_are_not_saved(
    then: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """They would be in the file under a config that does not target them, and hotslot itself would not read it."""
    model = fresh(MLP, folders["four"])
    subset = make_adapter(tmp_path / "subset", MLP, seed=8, r=2, target_modules=["up"])
    hotslot.hotswap_adapter(model, str(subset), "default")
    swapper = hotslot.attach(model, {"six": folders["six"]})
    if then != "attached":
        swapper.detach()
    if then == "detached twice":
        hotslot.attach(model, {"six": folders["six"]}).detach()
    with expected_peft_warnings():
        model.save_pretrained(tmp_path / "saved")
    saved, own = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "saved", subset))
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[key], own[key]) for key in own)
    base = MLP.build()
    hotslot.attach(base, {"saved": tmp_path / "saved"}).activate("saved")
    assert_same_output(output(base), fresh_output(MLP, subset), exact=True)
    model.load_state_dict(model.state_dict())
    hotslot.hotswap_adapter(model, folders["four"], "default")
    assert model.state_dict().keys() == fresh(MLP, folders["four"]).state_dict().keys()


def test_a_copy_of_layers_that_were_left_empty_can_be_trained(tmp_path: Path) -> None:
    """What kept training away from parts that nobody used has gone with the swapper, from copies, too."""
    whole, subset = (
        make_adapter(tmp_path / name, MLP, seed=seed, r=2, target_modules=targets, lora_bias=True)
        for seed, (name, targets) in enumerate({"whole": ["up", "down"], "subset": ["up"]}.items())
    )
    model = fresh(MLP, whole)
    hotslot.hotswap_adapter(model, subset, "default")
    hotslot.attach(model, {"whole": whole}).detach()
    for trained in (model, copy.deepcopy(model)):
        params = [param for name, param in trained.named_parameters() if "lora_" in name]
        for param in params:
            torch.nn.init.constant_(param.requires_grad_(True), 0.1)
        MLP.read(trained(**MLP.inputs())).sum().backward()
        assert all(param.grad is not None and param.grad.any() for param in params)


@pytest.mark.parametrize("option", ["use_dora", "lora_bias", "lora_dropout"])
def test_attach_after_pefts_functions_goes_on_with_what_is_live(option: str, tmp_path: Path) -> None:
    """Though the adapter that came with the model had no place for it; and after it was deleted, all begins anew."""
    entry = ZOO["mlp"]
    value = 0.4 if option == "lora_dropout" else True
    plain = make_adapter(tmp_path / "plain", entry, seed=1, r=2, target_modules=["up", "down"])
    other = make_adapter(tmp_path / "other", entry, seed=2, r=2, target_modules=["up"], **{option: value})
    model = fresh(entry, plain)
    hotslot.hotswap_adapter(model, other, "default")
    swapper = hotslot.attach(model, {"plain": plain})
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, other))
    swapper.activate("plain")
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, plain))
    swapper.detach()
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, other))
    assert model.get_submodule("base_model.model.up").lora_dropout["default"].__class__ is (
        nn.Dropout if option == "lora_dropout" else nn.Identity
    )
    swapper = hotslot.attach(model, {"other": other, "plain": plain})
    swapper.activate("other")
    model.delete_adapter("default")
    model.load_adapter(str(plain), adapter_name="default")
    model.set_adapter("default")
    swapper = hotslot.attach(model.eval(), {"other": other})
    swapper.activate("other")
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, other))


def test_a_swap_while_adapters_are_rescaled_is_as_in_peft(tmp_path: Path) -> None:
    """Unscaled within the block; after it with the scaling of the adapter before, until it is activated again."""
    entry = ZOO["mlp"]
    folders = [
        make_adapter(tmp_path / str(i), entry, seed=i, r=4, lora_alpha=alpha, target_modules=["up", "inner.2"])
        for i, alpha in enumerate((8, 20))
    ]
    own, pefts = fresh(entry, folders[0]), fresh(entry, folders[0])
    swapper = hotslot.attach(own, {"new": folders[1]})
    with rescale_adapter_scale(own, 0.5):
        swapper.activate("new")
        assert_same_output(entry.output(own, entry.inputs()), fresh_output(entry, folders[1]), exact=True)
    with rescale_adapter_scale(pefts, 0.5):
        peft_hotswap_adapter(pefts, str(folders[1]), "default")
    assert_same_output(entry.output(own, entry.inputs()), entry.output(pefts, entry.inputs()), exact=True)
    swapper.activate("new")
    assert_same_output(entry.output(own, entry.inputs()), fresh_output(entry, folders[1]), exact=True)
