"""`hotslot.attach(pipe)`: one swap for all components of a diffusers pipeline, right against diffusers' own load."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoKrConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("diffusers")

import hotslot
from compiling import Backend
from dialects import DIALECTS, sizes_of_the_tiny_flux
from hotslot.errors import (
    AdapterNotFoundError,
    CorruptFileError,
    HotslotError,
    MergedError,
    ModelError,
    NonFiniteError,
    PickleRefusedError,
    RankError,
    ShapeError,
    TensorError,
    UnexpectedTargetError,
    UnsupportedError,
)
from oracle import Snapshot, assert_same_output, assert_unchanged, snapshot
from pipelines import (
    _WAN,
    ATTENTION,
    CLIP,
    PIPELINES,
    Kind,
    _denoiser,
    _model,
    _wan_inputs,
    load_plain,
    lora_tensors,
    make_lokr,
    make_lora,
)
from test_all_or_nothing import Fault, LineFault, OpFault, chosen

SD, FLUX = PIPELINES["sd"], PIPELINES["flux"]
BOTH = ("unet", "text_encoder")
FILE = "pytorch_lora_weights.safetensors"

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:peft", "ignore:Already found a `peft_config`:UserWarning", "ignore::FutureWarning"
)

Outputs = dict[str, Tensor]


def loaded(kind: Kind, source: Any, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The oracle: a fresh pipeline with the LoRA, by diffusers.

    Frozen, as torch rounds otherwise for what may train; in eval mode, as diffusers leaves a LoRA's dropout on.
    """
    pipe = kind.build(dtype=dtype)
    load_plain(pipe, source, **options)
    for name in kind.components:
        getattr(pipe, name).eval().requires_grad_(False)
    return pipe


def fresh(kind: Kind, source: Any, *, dtype: torch.dtype = torch.float32) -> Outputs:
    return kind.outputs(loaded(kind, source, dtype=dtype))


def assert_same(got: Outputs, want: Outputs, *, exact: bool = False) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert_same_output(got[name], want[name], exact=exact)


def set_scale(model: nn.Module, name: str, scale: float) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale(name, scale)


def components(kind: Kind, pipe: Any) -> nn.ModuleDict:
    return nn.ModuleDict({name: getattr(pipe, name) for name in kind.components})


def state(kind: Kind, pipe: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in components(kind, pipe).state_dict().items()}


def facts(kind: Kind, pipe: Any) -> tuple[Snapshot, dict[str, Any]]:
    """All that a half-done swap could spoil."""
    swapper = hotslot.Swapper.of(pipe)
    rest: dict[str, Any] = {"swapper": swapper and (swapper.active, swapper.version, swapper.adapters)}
    for name in kind.components:
        attributes = vars(getattr(pipe, name))
        configs = attributes.get("peft_config")
        rest[name] = (
            None if configs is None else {key: id(config) for key, config in configs.items()},
            attributes.get("_hf_peft_config_loaded"),
            attributes.keys(),
        )
    saved = components(kind, pipe).state_dict()
    rest["saved"] = {key: value.numpy().tobytes() for key, value in saved.items()}
    found = snapshot(components(kind, pipe))
    del found.facts[": module"]  # of the ModuleDict
    return found, rest


def assert_nothing_changed(before: tuple[Snapshot, dict[str, Any]], after: tuple[Snapshot, dict[str, Any]]) -> None:
    assert_unchanged(before[0], after[0])
    assert before[1] == after[1]


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of both components, of the unet alone at another rank and alpha, and of the text encoder alone."""
    folder = tmp_path_factory.mktemp("loras")
    return {
        "both": make_lora(SD, folder / "both", seed=1, components=BOTH, r=4, lora_alpha=6),
        "unet": make_lora(SD, folder / "unet", seed=2, targets={"unet": ("to_q", "conv2")}, r=2, lora_alpha=3),
        "text": make_lora(SD, folder / "text", seed=3, targets={"text_encoder": ("fc1", "q_proj")}, r=4, lora_alpha=5),
    }


@pytest.fixture(scope="module")
def wanted(loras: dict[str, Path]) -> dict[str | None, Outputs]:
    base: dict[str | None, Outputs] = {None: SD.outputs(SD.build())}
    return base | {name: fresh(SD, path) for name, path in loras.items()}


# -- exact -----------------------------------------------------------------------------------------------------------


def test_one_swap_for_all_components(loras: dict[str, Path], wanted: dict[str | None, Outputs]) -> None:
    """And a LoRA that lacks one of them leaves nothing of the one before it there."""
    pipe = SD.build()
    before, addresses = state(SD, pipe), None
    swapper = hotslot.attach(pipe, adapters=loras)
    assert_same(SD.outputs(pipe), wanted[None], exact=True)
    for name in ("both", "unet", "text", "both", "text", "unet", "both"):
        assert swapper.activate(name).changed
        assert_same(SD.outputs(pipe), wanted[name], exact=name == "both")
        found = {key: value.data_ptr() for key, value in components(SD, pipe).named_parameters()}
        assert addresses in (None, found)
        addresses = found
    with swapper.using("unet"):
        assert_same(SD.outputs(pipe), wanted["unet"])
    swapper.rollback()
    assert_same(SD.outputs(pipe), wanted["unet"])
    swapper.deactivate()
    assert_same(SD.outputs(pipe), wanted[None], exact=True)
    swapper.activate("both")
    swapper.detach()
    after = state(SD, pipe)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any({"peft_config", "_hotslot_assembly"} & vars(getattr(pipe, name)).keys() for name in BOTH)
    assert hotslot.Swapper.of(pipe) is None


def _random_lora(random: random.Random, folder: Path, seed: int) -> Path:
    choices: dict[str, Any] = {
        "lora_alpha": random.choice([1, 3, 8]),
        "use_rslora": random.random() < 0.3,
        "use_dora": random.random() < 0.3,
        "lora_dropout": random.choice([0.0, 0.5]),
    }
    names = random.choice([BOTH, ("unet",), BOTH])
    every = {"unet": [*ATTENTION, "conv1", "proj_in", "ff.net.2"], "text_encoder": [*CLIP, "fc1"]}
    targets = {name: random.sample(every[name], random.randint(1, 4)) for name in names}
    if random.random() < 0.5:
        choices["rank_pattern"] = {targets["unet"][0]: random.choice([1, 5])}
        choices["alpha_pattern"] = {targets["unet"][0]: 7}
    metadata = random.random() < 0.8 or choices["use_rslora"]
    return make_lora(SD, folder, seed=seed, targets=targets, metadata=metadata, r=random.choice([2, 4]), **choices)


def test_random_swaps_are_fresh_loads(tmp_path: Path) -> None:
    """Over ranks, patterns, alphas, rsLoRA, DoRA, dropout, targets and components; none changes what comes after."""
    chance = random.Random(0)
    sources = {str(i): _random_lora(chance, tmp_path / str(i), i) for i in range(6)}
    want = {name: fresh(SD, source) for name, source in sources.items()}
    pipe = SD.build()
    base = SD.outputs(pipe)
    swapper = hotslot.attach(pipe, adapters=sources)
    for name in chance.choices([*sources, None], k=14):
        if name is None:
            swapper.deactivate()
        else:
            swapper.activate(name)
        assert_same(SD.outputs(pipe), want[name] if name is not None else base)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "wan22", "ltx2", "qwen-image"])
def test_every_kind_of_pipeline(name: str, tmp_path: Path) -> None:
    """Second transformers and connectors too, all of one file."""
    kind = PIPELINES[name]
    every = tuple(kind.components)
    first = make_lora(kind, tmp_path / "first", seed=1, components=every, r=3, lora_alpha=5)
    second = make_lora(kind, tmp_path / "second", seed=2, components=every[:1], r=3)
    pipe = kind.build()
    swapper = hotslot.attach(pipe, adapters={"first": first, "second": second})
    for adapter, source in (("first", first), ("second", second), ("first", first)):
        swapper.activate(adapter)
        assert_same(kind.outputs(pipe), fresh(kind, source), exact=True)


@pytest.mark.parametrize("name", DIALECTS)
def test_files_of_every_trainer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dialect = DIALECTS[name]
    with sizes_of_the_tiny_flux(monkeypatch):
        sources = [dialect.save(tmp_path / f"{seed}.safetensors", seed=seed) for seed in range(2)]
        pipe = dialect.kind.build()
        swapper = hotslot.attach(pipe, adapters={"0": sources[0]})
        swapper.load("1", sources[1])
        for i in (0, 1):
            swapper.activate(str(i))
            assert_same(dialect.kind.outputs(pipe), fresh(dialect.kind, sources[i]), exact=True)


def test_files_like_one_before_are_read_without_the_converter(
    tmp_path: Path, loras: dict[str, Path], wanted: dict[str | None, Outputs]
) -> None:
    """Where it changes no byte and no alpha is among them; what is checked of the first is checked of all."""
    import diffusers

    asked: list[Any] = []

    class Counting(diffusers.StableDiffusionPipeline):  # type: ignore[misc,name-defined]
        @classmethod
        def lora_state_dict(cls, source: Any, **options: Any) -> Any:
            asked.append(source)
            return super().lora_state_dict(source, **options)

    pipe = Counting(**SD.build().components, requires_safety_checker=False)
    swapper = hotslot.attach(pipe, adapters=loras)
    del asked[:]
    both, other = (loras["both"] / FILE).read_bytes(), tmp_path / "other"
    begin = 8 + int.from_bytes(both[:8], "little")
    values = torch.frombuffer(bytearray(both[begin:]), dtype=torch.float32)
    other.mkdir()  # not by save_file, which writes metadata in an order of the moment
    (other / FILE).write_bytes(both[:begin] + (-0.5 * values).numpy().tobytes())
    (tmp_path / "nan.safetensors").write_bytes(both[:begin] + (values / 0).numpy().tobytes())
    (tmp_path / "cut.safetensors").write_bytes(both[:-1])
    for name, source in (("other", other), ("other", other / FILE), ("both", str(loras["both"] / FILE))):
        swapper.load(name, source)
        assert not asked
        swapper.activate(name)
        assert_same(SD.outputs(pipe), wanted[name] if name in wanted else fresh(SD, source), exact=True)
    for name, kind in (("nan", NonFiniteError), ("cut", CorruptFileError)):
        with pytest.raises(kind):
            swapper.load("other", tmp_path / f"{name}.safetensors")
    assert not asked
    for seed in range(2):  # the control: of other alphas each time
        swapper.load("kohya", DIALECTS["sd: kohya_sd"].save(tmp_path / f"{seed}.safetensors", seed=seed))
        assert len(asked) > seed


def test_a_wan_lora_of_text_to_video_on_image_to_video(tmp_path: Path) -> None:
    """diffusers adds pairs of zeros for the layers of images."""
    model = _model("WanTransformer3DModel", **_WAN, added_kv_proj_dim=24, image_dim=16)
    image = {"encoder_hidden_states_image": torch.ones(1, 2, 16)}
    kind = _denoiser("wan-i2v", "WanImageToVideoPipeline", model, lambda: _wan_inputs() | image)
    source = make_lora(PIPELINES["wan"], tmp_path, seed=1, r=3)
    pipe = kind.build()
    hotslot.attach(pipe, adapters={"a": source}).activate("a")
    assert_same(kind.outputs(pipe), fresh(kind, source))
    halves = {key: value for key, value in load_file(source / FILE).items() if "lora_A" in key}
    with pytest.raises(HotslotError):
        hotslot.attach(kind.build(), adapters={"a": halves})


def test_lokr_is_merged_between_loras(tmp_path: Path) -> None:
    kind = PIPELINES["flux2"]
    sources = {"lokr": make_lokr(tmp_path / "lokr", seed=1), "lora": make_lora(kind, tmp_path / "lora", seed=1, r=4)}
    pipe = kind.build()
    base = kind.outputs(pipe)
    swapper = hotslot.attach(pipe, adapters=sources)
    for name, route in (("lokr", "merged"), ("lora", "side"), ("lokr", "merged")):
        assert swapper.activate(name).route == route
        want = fresh(kind, sources[name])
        assert_same(kind.outputs(pipe), want)
        assert float((want["transformer"] - base["transformer"]).abs().max()) > 1e-3
    swapper.deactivate()
    assert_same(kind.outputs(pipe), base, exact=True)


def test_lokr_follows_lokr(tmp_path: Path) -> None:
    """Of other factors, alpha and targets: nothing of the one before stays in the base."""
    kind = PIPELINES["flux2"]
    sources = {
        "first": make_lokr(tmp_path / "first", seed=1, target_modules=["to_q", "to_out.0"]),
        "second": make_lokr(tmp_path / "second", seed=2, r=1, alpha=5, target_modules=["to_q", "to_k"]),
    }
    pipe = kind.build()
    before = state(kind, pipe)
    swapper = hotslot.attach(pipe, adapters=sources)
    for name in ("first", "second", "first"):
        assert swapper.activate(name).route == "merged"
        assert_same(kind.outputs(pipe), fresh(kind, sources[name]))
    swapper.deactivate()
    after = state(kind, pipe)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_half_precision_is_that_of_a_fresh_load(tmp_path: Path) -> None:
    source = make_lora(SD, tmp_path, seed=1, components=BOTH, r=4)
    pipe = SD.build(dtype=torch.bfloat16)
    hotslot.attach(pipe, adapters={"a": source}).activate("a")
    assert_same(SD.outputs(pipe), fresh(SD, source, dtype=torch.bfloat16), exact=True)


def test_dicts_in_memory_are_neither_changed_nor_kept(
    loras: dict[str, Path], wanted: dict[str | None, Outputs]
) -> None:
    tensors = load_file(loras["both"] / FILE)
    given = {key: value.clone() for key, value in tensors.items()}
    pipe = SD.build()
    swapper = hotslot.attach(pipe, adapters={"dict": tensors, "unet": loras["unet"]})
    swapper.activate("dict")
    want = fresh(SD, {key: value.clone() for key, value in given.items()})
    swapper.activate("unet")
    assert list(tensors) == list(given)
    assert all(torch.equal(tensors[key], given[key]) for key in given)
    for value in tensors.values():
        value.zero_()
    swapper.activate("dict")
    assert_same(SD.outputs(pipe), want, exact=True)


def test_tensors_of_a_trainer_with_a_config_for_each_component(tmp_path: Path) -> None:
    states, configs = lora_tensors(SD, seed=4, targets=SD.targets, r=3, lora_alpha=2, use_rslora=True)
    tensors = {f"{name}.{key}": value for name, part in states.items() for key, value in part.items()}
    want = fresh(SD, make_lora(SD, tmp_path, seed=4, components=BOTH, r=3, lora_alpha=2, use_rslora=True))
    pipe = SD.build()
    plan = hotslot.plan(pipe, target_modules="all-linear", max_rank=3)
    room = 8 * sum(value.nbytes for value in tensors.values())
    cache = hotslot.Cache(host_bytes=room, disk_bytes=None, folder=tmp_path / "cache")
    swapper = hotslot.attach(pipe, plan=plan, cache=cache)
    swapper.load("trained", tensors, config=configs)
    assert swapper.evict("trained"), "it is on disk, too"
    swapper.activate("trained")
    assert_same(SD.outputs(pipe), want)
    other = {key: value / 2 for key, value in tensors.items()}
    report = swapper.update("trained", other)
    assert report is not None
    assert report.changed
    swapper.load("other", other, config=configs)
    assert not swapper.activate("trained").changed
    got = SD.outputs(pipe)
    swapper.activate("other")
    assert_same(SD.outputs(pipe), got, exact=True)


# -- blends, growth, routes ------------------------------------------------------------------------------------------


def test_a_blend_is_what_set_adapters_computes(loras: dict[str, Path]) -> None:
    want = loaded(SD, loras["both"], name="both")
    want.load_lora_weights(loras["unet"], adapter_name="unet")
    want.unet.eval().requires_grad_(False)
    want.unet.set_adapters(["both", "unet"], [0.7, 0.4])
    set_scale(want.text_encoder, "both", 0.7)
    pipe = SD.build()
    swapper = hotslot.attach(pipe, adapters=loras, plan=hotslot.plan(pipe, loras, max_blend=2))
    swapper.activate("text")
    swapper.activate({"both": 0.7, "unet": 0.4})
    assert_same(SD.outputs(pipe), SD.outputs(want))
    swapper.activate({"both": 0.7})
    want.unet.set_adapters(["both"], [0.7])
    assert_same(SD.outputs(pipe), SD.outputs(want))


def test_beyond_the_plan_it_is_refused_and_grows(loras: dict[str, Path], wanted: dict[str | None, Outputs]) -> None:
    pipe = SD.build()
    swapper = hotslot.attach(pipe, adapters={"unet": loras["unet"]}, route="side")
    swapper.activate("unet")
    before = facts(SD, pipe)
    with pytest.raises(UnexpectedTargetError) as refusal:
        swapper.load("both", loras["both"])
    fit = swapper.fits(loras["both"])
    assert fit.route == "side" or fit.plan is not None
    assert_nothing_changed(before, facts(SD, pipe))
    assert refusal.value.plan is not None
    swapper.grow(refusal.value.plan)
    assert_same(SD.outputs(pipe), wanted["unet"])
    swapper.load("both", loras["both"])
    swapper.activate("both")
    assert_same(SD.outputs(pipe), wanted["both"])
    swapper.unload("unet")
    assert swapper.adapters == ("both",)


def test_merged_weights_are_those_that_fuse_lora_makes(tmp_path: Path) -> None:
    """With no forward cost, and after many swaps the base's own bits."""
    every = tuple(FLUX.components)
    sources = {
        "both": make_lora(FLUX, tmp_path / "both", seed=1, components=every, r=4, lora_alpha=6),
        "one": make_lora(FLUX, tmp_path / "one", seed=2, targets={"transformer": ("to_q",)}, r=2, use_rslora=True),
    }
    pipe = FLUX.build()
    before = state(FLUX, pipe)
    swapper = hotslot.attach(pipe, adapters=sources, route="merged")
    assert not any("lora_" in name for name, _ in components(FLUX, pipe).named_modules())
    for name in ("both", "one", "both"):
        assert swapper.activate(name).route == "merged"
        want = loaded(FLUX, sources[name])
        want.fuse_lora(components=list(want.get_list_adapters()))
        fused = state(FLUX, want)
        for key, value in state(FLUX, pipe).items():
            module, _, leaf = key.rpartition(".")
            assert torch.equal(value, fused.get(f"{module}.base_layer.{leaf}", fused.get(key)))
    for i in range(1_000):
        swapper.activate(("both", "one")[i % 2])
    swapper.deactivate()
    after = state(FLUX, pipe)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_merged_weights_in_bfloat16_come_back_to_the_bit(tmp_path: Path) -> None:
    """After 1,000 swaps, where `unfuse_lora` leaves what rounding has lost; and merged they are rounded once."""
    kind, dtype = PIPELINES["qwen-image"], torch.bfloat16
    sources = {
        "a": make_lora(kind, tmp_path / "a", seed=1, targets={"transformer": ("to_q", "to_v")}, r=4, lora_alpha=6),
        "b": make_lora(kind, tmp_path / "b", seed=2, targets={"transformer": ("to_q",)}, r=2, use_rslora=True),
    }
    exact, control = kind.build(dtype=dtype), loaded(kind, sources["a"], dtype=dtype)
    exact.transformer.float()  # the same values
    load_plain(exact, sources["a"])
    exact.fuse_lora()
    fused = state(kind, exact)
    own = state(kind, control)
    control.fuse_lora()
    control.unfuse_lora()
    assert not all(torch.equal(value, own[key]) for key, value in state(kind, control).items())
    pipe = kind.build(dtype=dtype)
    before = state(kind, pipe)
    swapper = hotslot.attach(pipe, adapters=sources, route="merged")
    for i in range(1_000):
        swapper.activate(("b", "a")[i % 2])
    merged = state(kind, pipe)
    assert not all(torch.equal(merged[key], before[key]) for key in before)
    for key, value in merged.items():
        module, _, leaf = key.rpartition(".")
        want = fused[key] if key in fused else fused[f"{module}.base_layer.{leaf}"]
        assert torch.equal(value, want.to(dtype))
    swapper.deactivate()
    after = state(kind, pipe)
    assert all(torch.equal(after[key], before[key]) for key in before)


# -- honest state ----------------------------------------------------------------------------------------------------


def test_diffusers_own_lists_tell_the_live_adapter(loras: dict[str, Path]) -> None:
    pipe = SD.build()
    swapper = hotslot.attach(pipe, adapters=loras, adapter_name="style")
    for name in ("both", "unet", "text", "unet", "both"):
        swapper.activate(name)
        want = loaded(SD, loras[name])
        assert pipe.get_list_adapters() == want.get_list_adapters()
        assert pipe.get_active_adapters() == ["style"]
        for component in want.get_list_adapters():
            got, config = (getattr(p, component).peft_config["style"] for p in (pipe, want))
            for option in (
                "r",
                "lora_alpha",
                "rank_pattern",
                "alpha_pattern",
                "use_rslora",
                "use_dora",
                "lora_dropout",
            ):
                assert getattr(got, option) == getattr(config, option)
    assert hotslot.Swapper.of(pipe, "style") is swapper is hotslot.Swapper.of(pipe.unet, "style")


@pytest.mark.parametrize("name", ["both", "unet", "text"])
def test_what_is_saved_after_a_swap_loads_as_the_same(
    name: str, loras: dict[str, Path], wanted: dict[str | None, Outputs], tmp_path: Path
) -> None:
    pipe = SD.build()
    swapper = hotslot.attach(pipe, adapters=loras)
    swapper.activate("both")
    swapper.activate(name)
    layers, said = {}, {}
    for component in pipe.get_list_adapters():
        model = getattr(pipe, component)
        layers[component] = get_peft_model_state_dict(model, adapter_name="default")
        said[component] = model.peft_config["default"].to_dict()
    pipe._save_lora_weights(tmp_path, lora_layers=layers, lora_metadata=said)
    assert_same(fresh(SD, tmp_path), wanted[name], exact=True)
    if "unet" in layers:
        pipe.unet.save_lora_adapter(tmp_path / "unet", adapter_name="default")
        again = SD.build()
        again.unet.load_lora_adapter(tmp_path / "unet", prefix=None, use_safetensors=True)
        again.unet.requires_grad_(False)
        assert_same_output(SD.outputs(again)["unet"], wanted[name]["unet"], exact=True)


def test_the_scale_of_cross_attention_kwargs_works_on(loras: dict[str, Path]) -> None:
    want, pipe = loaded(SD, loras["both"]), SD.build()
    swapper = hotslot.attach(pipe, adapters=loras)
    swapper.activate("unet")
    swapper.activate("both")
    for scale in (0.3, 1.0, 0.0):
        options = {"cross_attention_kwargs": {"scale": scale}}
        assert_same(SD.outputs(pipe, **options), SD.outputs(want, **options))
    assert_same(SD.outputs(pipe), SD.outputs(want))


# -- pipelines that have LoRAs already -------------------------------------------------------------------------------


def test_a_pipeline_that_carries_the_adapter_already(loras: dict[str, Path], wanted: dict[str | None, Outputs]) -> None:
    """In one of its components; the others get slots. Its own comes back with `rollback`, and with `detach`."""
    pipe = loaded(SD, loras["unet"], name="style")
    before = facts(SD, pipe)
    swapper = hotslot.attach(pipe, adapters={"both": loras["both"]}, adapter_name="style")
    assert pipe.get_list_adapters() == {"unet": ["style"]}
    assert_same(SD.outputs(pipe), wanted["unet"])
    swapper.activate("both")
    assert_same(SD.outputs(pipe), wanted["both"])
    assert pipe.get_list_adapters() == {"unet": ["style"], "text_encoder": ["style"]}
    swapper.rollback()
    assert_same(SD.outputs(pipe), wanted["unet"])
    assert pipe.get_list_adapters() == {"unet": ["style"]}
    swapper.activate("both")
    swapper.detach()
    assert_nothing_changed(before, facts(SD, pipe))


def test_another_adapter_beside_it_does_not_change(loras: dict[str, Path]) -> None:
    pipe = loaded(SD, loras["unet"], name="other")
    own = {key: value.clone() for key, value in components(SD, pipe).named_parameters() if ".other." in key}
    swapper = hotslot.attach(pipe, adapters={"both": loras["both"]})
    for _ in range(2):
        swapper.activate("both")
        pipe.unet.set_adapters(["other", "default"])
        want = loaded(SD, loras["unet"], name="other")
        want.load_lora_weights(loras["both"], adapter_name="default")
        want.unet.set_adapters(["other", "default"])
        for name in BOTH:
            getattr(want, name).eval().requires_grad_(False)
        assert_same(SD.outputs(pipe), SD.outputs(want))
        swapper.deactivate()
    found = dict(components(SD, pipe).named_parameters())
    assert own
    assert all(torch.equal(value, found[key]) for key, value in own.items())


@pytest.mark.parametrize("call", ["detach", "unload_lora_weights"])
def test_merges_leave_the_base_with_their_swapper(call: str, tmp_path: Path) -> None:
    """Though the slots beside them are gone by then."""
    kind = PIPELINES["flux2"]
    pipe = kind.build()
    before = kind.outputs(pipe)
    loras = {"lora": make_lora(kind, tmp_path / "lora", seed=1, r=2), "lokr": make_lokr(tmp_path / "lokr", seed=2)}
    swapper = hotslot.attach(pipe, loras)
    swapper.activate("lokr")
    hotslot.patch_peft()
    pipe.delete_adapters("default") if call == "detach" else pipe.unload_lora_weights()
    hotslot.unpatch_peft()
    if not swapper.detached:
        swapper.detach()
    assert_same(kind.outputs(pipe), before, exact=True)


def test_fused_then_swapped_is_refused_and_the_base_survives(
    loras: dict[str, Path], wanted: dict[str | None, Outputs]
) -> None:
    pipe = SD.build()
    swapper = hotslot.attach(pipe, adapters=loras)
    swapper.activate("both")
    pipe.fuse_lora(components=["unet", "text_encoder"])
    before = facts(SD, pipe)
    with pytest.raises(MergedError):
        swapper.activate("unet")
    assert_nothing_changed(before, facts(SD, pipe))
    pipe.unfuse_lora(components=["unet", "text_encoder"])
    swapper.activate("unet")
    assert_same(SD.outputs(pipe), wanted["unet"])
    swapper.deactivate()
    assert_same(SD.outputs(pipe), wanted[None])


# -- compiled --------------------------------------------------------------------------------------------------------


def _wrapped(pipe: Any, backend: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend=backend)


def _in_place(pipe: Any, backend: Any) -> None:
    pipe.transformer.compile(backend=backend)
    pipe.text_encoder.compile(backend=backend)


def _repeated_blocks(pipe: Any, backend: Any) -> None:
    pipe.transformer.compile_repeated_blocks(backend=backend)
    pipe.text_encoder.compile(backend=backend)


WAYS: dict[str, Callable[[Any, Any], None]] = {
    "pipe.transformer = torch.compile(pipe.transformer)": _wrapped,
    "pipe.transformer.compile()": _in_place,
    "compile_repeated_blocks": _repeated_blocks,
}


@pytest.fixture(scope="module")
def flux_loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("flux")
    every = tuple(FLUX.components)
    return {
        "both": make_lora(FLUX, folder / "both", seed=1, components=every, r=4, lora_alpha=6),
        "one": make_lora(FLUX, folder / "one", seed=2, targets={"transformer": ("to_q",)}, r=2, use_rslora=True),
    }


def _weighted(loras: dict[str, Path], both: float, one: float) -> Outputs:
    """What diffusers computes with two at a time."""
    pipe = loaded(FLUX, loras["both"], name="both")
    pipe.load_lora_weights(loras["one"], adapter_name="one")
    pipe.transformer.eval().requires_grad_(False)
    pipe.transformer.set_adapters(["both", "one"], [both, one])
    set_scale(pipe.text_encoder, "both", both)
    return FLUX.outputs(pipe)


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_compiled_pipelines_do_not_compile_again(way: Callable[[Any, Any], None], flux_loras: dict[str, Path]) -> None:
    """Over other ranks, alphas, targets, components, blends, and none."""
    pipe, backend = FLUX.build(), Backend()
    base = FLUX.outputs(pipe)
    wanted = {name: fresh(FLUX, source) for name, source in flux_loras.items()}
    weights = [{"both": 0.7, "one": 0.4}, {"both": 0.2, "one": 1.5}]
    blends = [_weighted(flux_loras, both, one) for both, one in (weight.values() for weight in weights)]
    swapper = hotslot.attach(pipe, adapters=flux_loras, plan=hotslot.plan(pipe, flux_loras, max_blend=2))
    way(pipe, backend)
    FLUX.outputs(pipe)
    compiled = backend.graphs
    assert compiled
    for name in ("both", "one", "both"):
        swapper.activate(name)
        assert_same(FLUX.outputs(pipe), wanted[name])
    for blend, want in zip(weights, blends, strict=True):
        swapper.activate(blend)
        assert_same(FLUX.outputs(pipe), want)
    swapper.deactivate()
    assert_same(FLUX.outputs(pipe), base)
    assert backend.graphs == compiled
    assert hotslot.Swapper.of(pipe) is swapper


def test_control_a_load_by_diffusers_compiles_again(flux_loras: dict[str, Path]) -> None:
    pipe, backend = loaded(FLUX, flux_loras["both"]), Backend()
    pipe.transformer.compile_repeated_blocks(backend=backend)
    FLUX.outputs(pipe)
    compiled = backend.graphs
    pipe.load_lora_weights(flux_loras["one"], adapter_name="other")
    pipe.transformer.set_adapters(["other"])
    FLUX.outputs(pipe)
    assert backend.graphs > compiled


# -- offloaded -------------------------------------------------------------------------------------------------------


def _by_groups(model: Any) -> None:
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def _cast_by_layers(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


@pytest.mark.parametrize("first", [True, False], ids=["before attach", "after"])
@pytest.mark.parametrize("offload", [_by_groups, _cast_by_layers])
def test_offloaded_pipelines_swap_and_keep_their_hooks(
    offload: Callable[[Any], None], first: bool, flux_loras: dict[str, Path]
) -> None:
    def outputs(model: nn.Module) -> Outputs:
        with torch.no_grad():
            return {"transformer": model(**FLUX.inputs["transformer"]()).sample.clone()}

    want = loaded(FLUX, flux_loras["both"]).transformer
    offload(want)
    pipe = FLUX.build()
    if first:
        offload(pipe.transformer)
    swapper = hotslot.attach(pipe, adapters=flux_loras)
    if not first:
        offload(pipe.transformer)
    hooks = {name for name, module in pipe.transformer.named_modules() if hasattr(module, "_diffusers_hook")}
    assert hooks
    base = outputs(pipe.transformer)
    for _ in range(2):
        swapper.activate("both")
        assert_same(outputs(pipe.transformer), outputs(want))
        with pytest.raises(HotslotError):
            swapper.load("bad", {"transformer.nothing.lora_A.weight": torch.ones(2, 2)})
        swapper.deactivate()
        assert_same(outputs(pipe.transformer), base, exact=True)
    assert hooks == {name for name, module in pipe.transformer.named_modules() if hasattr(module, "_diffusers_hook")}


@pytest.mark.parametrize("first", [True, False], ids=["before attach", "after"])
def test_pipelines_that_are_offloaded_layer_by_layer(first: bool, flux_loras: dict[str, Path]) -> None:
    """As `enable_sequential_cpu_offload` does it, the CPU in the place of a GPU; blends, and detach, too."""
    from accelerate import cpu_offload

    def offload(pipe: Any) -> None:
        for name in FLUX.components:
            cpu_offload(getattr(pipe, name), torch.device("cpu"))

    wanted = {name: fresh(FLUX, source) for name, source in flux_loras.items()}
    pipe = FLUX.build()
    base = FLUX.outputs(pipe)
    if first:
        offload(pipe)
        with pytest.raises(HotslotError, match="offloaded layer by layer"):
            hotslot.attach(pipe, flux_loras, route="merged")
    swapper = hotslot.attach(pipe, flux_loras, plan=hotslot.plan(pipe, flux_loras))
    swapper.activate("both")
    if not first:
        offload(pipe)
    for name in ("both", "one", "both"):
        swapper.activate(name)
        assert_same(FLUX.outputs(pipe), wanted[name])
    swapper.activate({"both": 0.7, "one": 0.4})
    assert_same(FLUX.outputs(pipe), _weighted(flux_loras, 0.7, 0.4))
    swapper.deactivate()
    assert_same(FLUX.outputs(pipe), base, exact=True)
    swapper.rollback()
    assert_same(FLUX.outputs(pipe), _weighted(flux_loras, 0.7, 0.4))
    for leave in (swapper.detach, pipe.remove_all_hooks):
        leave()
        assert_same(FLUX.outputs(pipe), base, exact=True)


# -- refusals --------------------------------------------------------------------------------------------------------


def _renamed(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): value for key, value in tensors.items()}


def _wider(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: torch.cat([v, v], 1) if key.startswith("unet") and "lora_A" in key else v for key, v in tensors.items()
    }


BAD: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], type[HotslotError]]] = {
    "nothing matches": (
        lambda t: _renamed(_renamed(t, "unet.", "model."), "text_encoder.", "clip."),
        UnexpectedTargetError,
    ),
    "no such modules": (lambda t: _renamed(t, "attentions.0", "attentions.7"), UnexpectedTargetError),
    "another pipeline's component": (lambda t: _renamed(t, "text_encoder.", "text_encoder_2."), UnexpectedTargetError),
    "another width": (_wider, ShapeError),
    "half of a pair": (lambda t: dict(list(t.items())[1:]), TensorError),
    "no numbers": (lambda t: {key: value * float("nan") for key, value in t.items()}, NonFiniteError),
    "empty": (lambda t: {}, UnexpectedTargetError),
}


@pytest.mark.parametrize("how", list(BAD))
def test_what_does_not_belong_is_refused_and_the_running_one_lives(
    how: str, loras: dict[str, Path], wanted: dict[str | None, Outputs]
) -> None:
    change, kind = BAD[how]
    pipe = SD.build()
    swapper = hotslot.attach(pipe, adapters={"both": loras["both"]})
    swapper.activate("both")
    before = facts(SD, pipe)
    tensors = change(
        load_file(loras["unet" if how == "no such modules" else "both"] / "pytorch_lora_weights.safetensors")
    )
    with pytest.raises(HotslotError) as refusal:
        swapper.load("bad", tensors)
    assert isinstance(refusal.value, kind), refusal.value
    assert swapper.fits(tensors).route is None
    assert_nothing_changed(before, facts(SD, pipe))
    assert_same(SD.outputs(pipe), wanted["both"], exact=True)


def test_a_component_that_carries_lokr_is_attached_to_by_itself(tmp_path: Path) -> None:
    kind = PIPELINES["flux2"]
    first, second = make_lokr(tmp_path / "first", seed=1), make_lokr(tmp_path / "second", seed=2)
    pipe = loaded(kind, first, name="style")
    before = facts(kind, pipe)
    for route in ("auto", "merged"):
        with pytest.raises(UnsupportedError, match=r"transformer"):
            hotslot.attach(pipe, adapters={"second": second}, adapter_name="style", route=route)
    assert_nothing_changed(before, facts(kind, pipe))

    own = {name: values.clone() for name, values in kind.build().transformer.state_dict().items()}
    tensors = {
        key.replace("transformer.", "base_model.model."): value
        for key, value in load_file(second / "pytorch_lora_weights.safetensors").items()
    }
    config = LoKrConfig(r=2, alpha=3, target_modules=["to_q"])
    swapper = hotslot.attach(pipe.transformer, adapter_name="style", route="merged")
    swapper.load("second", tensors, config=config)
    swapper.activate("second")
    merged = PeftModel(kind.build().transformer, config)
    set_peft_model_state_dict(merged, tensors)
    wanted = kind.build()
    wanted.transformer = merged.merge_and_unload().eval().requires_grad_(False)
    assert_same(kind.outputs(pipe), kind.outputs(wanted), exact=True)
    swapper.deactivate()
    now = {name.replace(".base_layer", ""): values for name, values in pipe.transformer.state_dict().items()}
    assert all(torch.equal(now[name], values) for name, values in own.items())
    swapper.detach()
    assert_nothing_changed(before, facts(kind, pipe))


def test_sources_that_are_none(tmp_path: Path) -> None:
    pipe = SD.build()
    swapper = hotslot.attach(pipe, plan=hotslot.plan(pipe, target_modules=["to_q"], max_rank=2))
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "lora.bin").write_bytes(b"\x80\x04")
    cases: tuple[tuple[Any, type[Exception]], ...] = (
        (tmp_path / "nothing.safetensors", AdapterNotFoundError),
        (tmp_path / "cut.safetensors", CorruptFileError),
        (tmp_path / "lora.bin", PickleRefusedError),
        ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": [1.0]}, TensorError),
    )
    for source, kind in cases:
        with pytest.raises(kind):
            swapper.load("x", source)
    with pytest.raises(PickleRefusedError):
        swapper.load("x", tmp_path, weight_name="lora.bin")


def test_an_unknown_repository_is_named_with_the_way_out() -> None:
    """diffusers says that one must specify a `weight_name`, and not of what."""
    pipe = SD.build()
    swapper = hotslot.attach(pipe, plan=hotslot.plan(pipe, target_modules=["to_q"], max_rank=2))
    with pytest.raises(AdapterNotFoundError, match=r"(?s)No LoRA at someone/unknown.*weight_name=.*go online"):
        swapper.load("x", "someone/unknown", local_files_only=True)
    with pytest.raises(AdapterNotFoundError, match=r"(?s)no LoRA at someone/unknown.*weight_name="):
        swapper.load("x", "someone/unknown", local_files_only=True, weight_name="pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("option", ["megatron_config", "layer_replication", "alora_invocation_tokens"])
def test_a_files_own_config_cannot_make_peft_do_more(option: str, tmp_path: Path) -> None:
    """diffusers hands the metadata of a file to PEFT, which imports what some of it names."""
    path = make_lora(SD, tmp_path, seed=1, r=2) / FILE
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    said[f"unet.{option}"] = {"megatron_core": "antigravity"} if option == "megatron_config" else [[0, 1]]
    save_file(load_file(path), path, metadata={"lora_adapter_metadata": json.dumps(said)})
    pipe = SD.build()
    with pytest.raises(UnsupportedError, match=option):
        hotslot.attach(pipe, adapters={"a": path})
    assert hotslot.Swapper.of(pipe) is None


def test_pefts_own_folder_is_for_a_component(tmp_path: Path) -> None:
    """diffusers loads nothing of it into a pipeline, in silence; the component takes it as any model does."""
    model = get_peft_model(SD.component("unet"), LoraConfig(r=3, target_modules=["to_q"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    pipe = SD.build()
    before = facts(SD, pipe)
    with pytest.raises(UnexpectedTargetError, match=r"attach\(pipe\.unet"):
        hotslot.attach(pipe, adapters={"a": tmp_path})
    assert_nothing_changed(before, facts(SD, pipe))
    hotslot.attach(pipe.unet, {"a": tmp_path}).activate("a")
    want = SD.build()
    want.unet = PeftModel.from_pretrained(want.unet, tmp_path).eval()
    assert_same(SD.outputs(pipe), SD.outputs(want), exact=True)


def test_a_replaced_component_is_noticed(loras: dict[str, Path]) -> None:
    pipe = SD.build()
    swapper = hotslot.attach(pipe, adapters=loras)
    swapper.activate("both")
    own, pipe.unet = pipe.unet, SD.component("unet")
    with pytest.raises(ModelError, match="replaced"):
        swapper.activate("unet")
    pipe.unet = own
    swapper.activate("unet")


def test_one_slot_has_one_writer(loras: dict[str, Path]) -> None:
    pipe = SD.build()
    swapper = hotslot.attach(pipe, adapters=loras)
    for model in (pipe, pipe.unet):
        with pytest.raises(ModelError, match="attached"):
            hotslot.attach(model, adapters=loras)
    swapper.detach()
    hotslot.attach(pipe.unet, route="merged")
    with pytest.raises(ModelError, match="attached"):
        hotslot.attach(pipe, adapters=loras)


def test_a_plan_of_a_pipeline_that_nobody_holds(loras: dict[str, Path]) -> None:
    planned = hotslot.plan(SD.build(), loras)
    hotslot.attach(SD.build(), loras, plan=planned)


def test_a_model_that_is_none() -> None:
    with pytest.raises(ModelError, match="nothing to attach"):
        hotslot.attach(object())  # type: ignore[arg-type]


# -- all or nothing --------------------------------------------------------------------------------------------------


def _injectors() -> Iterator[Callable[[int], Any]]:
    yield lambda k: LineFault(k, KeyboardInterrupt)
    yield lambda k: OpFault(k, Fault, "amid")


@pytest.mark.parametrize("injector", list(_injectors()), ids=["interrupted-at-a-line", "failing-amid-an-operation"])
def test_a_swap_that_breaks_off_changes_no_component(injector: Callable[[int], Any], loras: dict[str, Path]) -> None:
    pipe = SD.build()
    swapper = hotslot.attach(pipe, adapters=loras)
    swapper.activate("both")
    with injector(0) as dry:
        swapper.activate("text")
    swapper.activate("both")
    before = facts(SD, pipe)
    numbers = chosen(dry.steps)
    for k in numbers[:: max(1, len(numbers) // 12)]:
        with pytest.raises((KeyboardInterrupt, Fault)), injector(k):
            swapper.activate("text")
        assert_nothing_changed(before, facts(SD, pipe))
    swapper.activate("text")
    assert pipe.get_list_adapters() == {"text_encoder": ["default"]}


def test_attach_that_breaks_off_leaves_the_pipeline_as_it_was(loras: dict[str, Path]) -> None:
    sources = {name: load_file(path / FILE) for name, path in loras.items()}
    pipe = SD.build()
    before = facts(SD, pipe)
    for k in range(1, 10_000, 700):
        try:
            with OpFault(k, Fault, "before"):
                hotslot.attach(pipe, adapters=sources)
        except (Fault, HotslotError):
            assert_nothing_changed(before, facts(SD, pipe))
        else:
            break
    swapper = hotslot.Swapper.of(pipe)
    assert swapper is not None
    swapper.detach()
    assert_nothing_changed(before, facts(SD, pipe))


def test_rank_beyond_the_plan(loras: dict[str, Path]) -> None:
    pipe = SD.build()
    small = hotslot.plan(pipe, target_modules=[*ATTENTION, *CLIP], max_rank=2)
    with pytest.raises((RankError, UnexpectedTargetError)):
        hotslot.attach(pipe, adapters={"both": loras["both"]}, plan=small, route="side")
    assert hotslot.Swapper.of(pipe) is None


# --- a gallery ------------------------------------------------------------------------------------------------------


def test_a_relative_path_is_the_same_file_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (1, 2):
        make_lora(SD, tmp_path / str(seed), seed=seed, r=4)
    want = fresh(SD, tmp_path / "2")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    pipe = SD.build()
    swapper = hotslot.attach(pipe, {"1": "1", "2": "2"}, cache=hotslot.Cache(host_bytes=1 << 30))
    swapper.evict("2")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert swapper.activate("2").tier == "disk"
    assert_same(SD.outputs(pipe), want)


def test_a_gallery_in_a_folder_within_a_budget(tmp_path: Path) -> None:
    """Each file by its name; read again by whoever read it first, when it has had to leave memory."""
    gallery = tmp_path / "gallery"
    gallery.mkdir()
    for seed in range(5):
        (make_lora(SD, tmp_path / str(seed), seed=seed) / FILE).rename(gallery / f"style{seed}.safetensors")
    size = max(sum(tensor.nbytes for tensor in load_file(path).values()) for path in gallery.iterdir())
    pipe = SD.build()
    swapper = hotslot.attach(pipe, gallery, cache=hotslot.Cache(host_bytes=int(3.5 * size) + 8_000 * 3))
    assert swapper.adapters == tuple(f"style{seed}" for seed in range(5))
    for name in ("style3", "style0", "style4", "style1", "style3"):
        swapper.activate(name)
        swapper.check_integrity()
        assert_same(SD.outputs(pipe), fresh(SD, gallery / f"{name}.safetensors"))
    assert swapper.metrics().misses


def put_in(gallery: Path, name: str, folder: Path, **records: str) -> Path:
    """A LoRA as a file of a gallery, with a trainer's records of its own in the metadata."""
    gallery.mkdir(exist_ok=True)
    with safe_open(folder / FILE, "pt") as file:
        metadata = {**(file.metadata() or {}), **records}
    save_file(load_file(folder / FILE), gallery / f"{name}.safetensors", metadata)
    return gallery / f"{name}.safetensors"


def test_of_a_gallery_one_of_each_kind_is_read(tmp_path: Path) -> None:
    """The others' headers tell what slots to plan: what is wrong with their values shows when they are needed."""
    gallery = tmp_path / "gallery"
    for seed in range(4):
        put_in(gallery, f"style{seed}", make_lora(SD, tmp_path / str(seed), seed=seed, r=3), ss_seed=str(seed))
    broken = load_file(gallery / "style2.safetensors")
    next(iter(broken.values())).fill_(float("nan"))
    save_file(broken, gallery / "style2.safetensors", {"ss_seed": "2"})
    pipe = SD.build()
    with pytest.raises(NonFiniteError):  # the control: all are read
        hotslot.attach(pipe, {path.stem: path for path in gallery.iterdir()})
    swapper = hotslot.attach(pipe, gallery)
    assert swapper.adapters == tuple(f"style{seed}" for seed in range(4))
    assert swapper.metrics().host_adapters == 1
    swapper.activate("style3")
    with pytest.raises(NonFiniteError):
        swapper.activate("style2")
    assert swapper.active == "style3"
    assert_same(SD.outputs(pipe), fresh(SD, gallery / "style3.safetensors"))


def test_a_gallerys_files_of_equal_tensors_may_have_other_alphas(tmp_path: Path) -> None:
    """Which are among the metadata, and so are the trainers' records that are left out of account until then."""
    gallery = tmp_path / "gallery"
    for name, alpha in (("weak", 1), ("strong", 12)):
        put_in(gallery, name, make_lora(SD, tmp_path / name, seed=1, r=3, lora_alpha=alpha), ss_tag=name)
    pipe = SD.build()
    swapper = hotslot.attach(pipe, gallery)
    assert swapper.metrics().host_adapters == 1
    for name in ("strong", "weak", "strong"):
        swapper.activate(name)
        assert_same(SD.outputs(pipe), fresh(SD, gallery / f"{name}.safetensors"))


def test_a_gallerys_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    gallery = tmp_path / "gallery"
    for seed in range(2):
        path = put_in(gallery, f"style{seed}", make_lora(SD, tmp_path / str(seed), seed=seed), ss_seed=str(seed))
    path.write_bytes(path.read_bytes()[:-8])
    pipe = SD.build()
    with pytest.raises(CorruptFileError, match="style1"):
        hotslot.attach(pipe, gallery)
    assert hotslot.Swapper.of(pipe) is None


def test_what_diffusers_has_made_of_a_file_is_kept_packed(tmp_path: Path) -> None:
    """For the next pipeline of its kind, as long as the file is the same; what its alphas scale, too."""
    gallery, dialect = tmp_path / "gallery", DIALECTS["sd: kohya_sd"]
    files = [dialect.save(gallery / f"style{seed}.safetensors", seed=seed) for seed in range(2)]
    time.sleep(max(0.0, max(path.stat().st_ctime for path in files) + 2.1 - time.time()))  # settled by then
    cache = hotslot.Cache(disk_bytes=1 << 24, folder=tmp_path / "packed")
    wanted = {path: fresh(SD, path) for path in files}

    def activate_all() -> None:
        pipe = SD.build()
        swapper = hotslot.attach(pipe, gallery, cache=cache)
        for path in files:
            swapper.activate(path.stem)
            assert_same(SD.outputs(pipe), wanted[path])
        swapper._library.finish_packing()
        swapper.detach()

    activate_all()
    packed = sorted((tmp_path / "packed").iterdir())
    assert len(packed) == len(files)
    for path in packed:
        os.utime(path, (1, 1))
    activate_all()
    assert all(path.stat().st_mtime > 1 for path in packed), "used"
    dialect.save(files[0], seed=9)
    wanted[files[0]] = fresh(SD, files[0])
    activate_all()
