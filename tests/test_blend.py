"""Blends: the sum of fresh loads, whatever the adapters; written in part where only weights change; honest, undone.

The oracle is the sum of the weighted deltas of fresh PEFT loads, in float64, and for outputs a fresh load of the base
whose deltas are set to it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

import hotslot
from adapters import expected_peft_warnings, make_adapter, random_config
from compiling import WAYS, Backend
from hotslot import errors, live
from oracle import assert_same_output, assert_unchanged, error, fresh, fresh_output, snapshot
from zoo import ZOO, Entry

Make = Callable[..., Path]
WEIGHTS = (0.7, 1.0, -0.5, 0.0, 2.0, 0.31)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """(entry's name, seed, config) → an adapter on disk."""

    def make(name: str, seed: int, **config: Any) -> Path:
        return make_adapter(tmp_path / f"{name}-{seed}", ZOO[name], seed=seed, **config)

    return make


# --- the oracle -----------------------------------------------------------------------------------------------------


def deltas(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Module path → (what the slot adds, as one float64 matrix for all groups and experts, and its bias)."""
    found = {}
    for fqn, slot in live.find_slots(model, adapter_name).items():
        scaling = float(slot.layer.scaling[adapter_name])
        parts = {suffix: param.detach().double() for suffix, param in slot.params.items()}
        (_, down), (_, up) = ((s, parts[s]) for s in sorted(parts.keys() - {"lora_B.bias"}))
        if slot.experts > 1:
            a = down.reshape(slot.experts, -1, down.shape[1])
            b = up.reshape(up.shape[0], -1, slot.experts).permute(2, 0, 1)
        else:
            a = down.reshape(slot.groups, up.shape[1], -1)
            b = up.reshape(slot.groups, -1, up.shape[1])
        found[fqn] = scaling * (b @ a)
        if "lora_B.bias" in parts:
            found[f"{fqn}.bias"] = scaling * parts["lora_B.bias"]
    return found


def summed(models: Mapping[str, nn.Module], weights: Mapping[str, float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for key, delta in deltas(models[name]).items():
            total[key] = total.get(key, torch.zeros_like(delta)) + weight * delta
    return total


def assert_sum(model: nn.Module, want: Mapping[str, Tensor], *, tolerance: float = 1e-6) -> None:
    got = deltas(model)
    assert want.keys() <= got.keys()
    for key, delta in got.items():
        expected = want.get(key, torch.zeros_like(delta))
        scale = max(float(expected.norm()), 1e-12)
        assert float((delta - expected).norm()) <= tolerance * scale + 1e-30, key


def summed_output(entry: Entry, folders: Mapping[str, Path], weights: Mapping[str, float]) -> Tensor:
    """Of a base with every adapter loaded by PEFT beside each other, scalings weighted, all active."""
    names = list(weights)
    model = fresh(entry, folders[names[0]], adapter_name=names[0])
    with expected_peft_warnings():
        for name in names[1:]:
            model.load_adapter(str(folders[name]), adapter_name=name)
        model.base_model.set_adapter(names)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in names:
                if name in module.scaling:
                    module.scaling[name] *= weights[name]
    return entry.output(model.eval(), entry.inputs())


# --- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_a_blend_is_the_sum_of_its_adapters(name: str, tmp_path: Path) -> None:
    """Random adapters, two or three, over all options; random weights, by turns; between them other swaps."""
    rng, entry = Random(3), ZOO[name]
    inputs = entry.inputs()
    for i in range(3):
        count = rng.choice((2, 2, 3))
        configs = [random_config(rng, entry) for _ in range(count)]
        folders = {
            "uvw"[j]: make_adapter(tmp_path / f"{i}-{j}", entry, seed=10 * i + j, **config)
            for j, config in enumerate(configs)
        }
        oracles = {key: fresh(entry, folder) for key, folder in folders.items()}
        model = entry.build()
        swapper = hotslot.attach(model, folders, plan=hotslot.plan(model, folders, max_blend=count))
        before = {param: param.data_ptr() for param in model.parameters()}
        for step in range(6):
            weights = {key: rng.choice(WEIGHTS) for key in rng.sample(sorted(folders), rng.randint(1, count))}
            report = swapper.activate(weights)
            assert report.error is None
            assert_sum(model, summed(oracles, weights))
            if step < 2 and name not in ("attention", "vision"):  # PEFT's own attention cannot run two adapters
                assert_same_output(entry.output(model, inputs), summed_output(entry, folders, weights))
            assert not swapper.activate(dict(reversed(weights.items()))).changed
            if rng.random() < 0.3:
                swapper.activate("u")
                assert_same_output(entry.output(model, inputs), fresh_output(entry, folders["u"]))
        assert before == {param: param.data_ptr() for param in model.parameters()}
        swapper.deactivate()
        assert_same_output(entry.output(model, inputs), entry.output(entry.build(), inputs))


def test_a_blend_is_peft_s_cat(make: Make) -> None:
    entry = ZOO["llama"]
    folders = {
        "a": make("llama", 0, r=4, lora_alpha=7, target_modules=["q_proj", "up_proj"]),
        "b": make("llama", 1, r=4, lora_alpha=3, target_modules=["q_proj", "v_proj"], use_rslora=True),
    }
    peft = fresh(entry, folders["a"], adapter_name="a")
    peft.load_adapter(str(folders["b"]), adapter_name="b")
    peft.add_weighted_adapter(["a", "b"], [0.7, -0.4], "both", combination_type="cat")
    peft.set_adapter("both")
    model = entry.build()
    swapper = hotslot.attach(model, folders, plan=hotslot.plan(model, folders))
    swapper.activate({"a": 0.7, "b": -0.4})
    assert_same_output(entry.output(model, entry.inputs()), entry.output(peft.eval(), entry.inputs()))
    assert_sum(model, deltas(peft, "both"))


class Experts(nn.Module):
    """Three experts' weights as one bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.experts = nn.Module()
        self.experts.weight = nn.Parameter(torch.randn(3, 8, 6, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->beo", x, self.get_submodule("experts").weight).tanh().sum(1)


def test_experts_are_blended_each_by_itself(tmp_path: Path) -> None:
    folders = {}
    for i, rank in enumerate((2, 3)):
        config = LoraConfig(r=rank, lora_alpha=2 * rank + i, target_modules=[], target_parameters=["experts.weight"])
        made = get_peft_model(Experts(), config)
        generator = torch.Generator().manual_seed(i)
        for param in made.parameters():
            if param.requires_grad:
                param.data.copy_(0.3 * torch.randn(param.shape, generator=generator))
        made.save_pretrained(tmp_path / "ab"[i])
        folders["ab"[i]] = tmp_path / "ab"[i]
    oracles = {key: PeftModel.from_pretrained(Experts(), str(folder)).eval() for key, folder in folders.items()}
    model = PeftModel.from_pretrained(Experts(), str(folders["a"])).eval()
    swapper = hotslot.attach(model, folders, plan=hotslot.plan(model, folders))
    for weights in ({"a": 0.7, "b": -1.5}, {"a": 0.7, "b": 0.2}, {"a": 0.0, "b": 0.2}):
        swapper.activate(weights)
        assert_sum(model, summed(oracles, weights))
    small = PeftModel.from_pretrained(Experts(), str(folders["b"])).eval()
    swapper = hotslot.attach(small, folders)
    report = swapper.activate({"a": 0.7, "b": -1.5}, blend="svd")
    assert_cut(small, summed(oracles, {"a": 0.7, "b": -1.5}), {"experts": 3}, report.error)
    swapper.deactivate()
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(Experts(), str(tmp_path / "saved")).eval()
    assert_sum(loaded, summed(oracles, {"a": 0.0, "b": 0.2}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_slots_of_other_dtypes_are_rounded_once(dtype: torch.dtype, make: Make) -> None:
    entry = ZOO["llama"]
    folders = {
        "a": make("llama", 0, r=4, lora_alpha=7, target_modules=["q_proj", "up_proj"]),
        "b": make("llama", 1, r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], file_dtype=torch.bfloat16),
    }
    model = entry.build(dtype=dtype)
    swapper = hotslot.attach(model, folders, plan=hotslot.plan(model, folders, dtype="base"))
    oracles = {key: fresh(entry, folder, dtype=dtype, autocast_adapter_dtype=False) for key, folder in folders.items()}
    weights = {"a": 0.7, "b": -0.31}
    swapper.activate(weights)
    assert_sum(model, summed(oracles, weights), tolerance=2 * torch.finfo(dtype).eps + 1e-6)
    down = model.get_submodule("model.layers.0.self_attn.q_proj").lora_A["default"].weight
    file = fresh(entry, folders["a"], dtype=dtype)  # in float32: what is in the file is rounded once, with its weight
    own = file.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").lora_A["default"].weight
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(down[:4], (own.to(wide) * (0.7 * 7 / 4)).to(dtype))


# --- what is written ------------------------------------------------------------------------------------------------


FOLDERS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "target_modules": ["up", "inner.2"], "lora_alpha": 6, "lora_bias": True},
    "b": {"r": 2, "target_modules": ["inner.0", "inner.2"], "use_rslora": True, "lora_dropout": 0.5},
}


@pytest.fixture
def folders(make: Make) -> dict[str, Path]:
    return {key: make("mlp", i, **config) for i, (key, config) in enumerate(FOLDERS.items())}


def blendable(folders: Mapping[str, Path]) -> tuple[nn.Module, hotslot.Swapper]:
    model = ZOO["mlp"].build()
    return model, hotslot.attach(model, folders, plan=hotslot.plan(model, folders))


def stamped(model: nn.Module) -> dict[str, Tensor]:
    """Fill each slot's parameter with a mark where nobody looks: through `.data`, which leaves no trace."""
    marks = {}
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.data.add_(1000.0)
            marks[name] = param.detach().clone()
    return marks


def test_other_weights_write_only_what_they_scale(folders: dict[str, Path]) -> None:
    model, swapper = blendable(folders)
    swapper.activate({"a": 0.7, "b": 1.0})
    marks = stamped(model)
    report = swapper.activate({"a": 0.7, "b": -2.0})
    assert report.changed
    changed = {name for name, param in model.named_parameters() if "lora_" in name and not param.equal(marks[name])}
    assert changed == {"inner.0.lora_A.default.weight", "inner.2.lora_A.default.weight"}
    shared = model.get_submodule("inner.2").lora_A["default"].weight
    assert shared[:4].equal(marks["inner.2.lora_A.default.weight"][:4]), "a's ranks stay"
    assert report.nbytes == 4 * (2 * 32 + 2 * 8)
    report = swapper.activate({"a": 0.3, "b": -2.0})  # a has biases
    assert report.nbytes == 4 * (4 * 12 + 32 + 4 * 8 + 20)


def test_another_weight_of_one_adapter_writes_its_scaling_alone(folders: dict[str, Path]) -> None:
    model, swapper = blendable(folders)
    swapper.activate("a")
    marks = stamped(model)
    for weight, adapter in ((0.7, {"a": 0.7}), (-1.0, {"a": -1.0}), (1.0, "a"), (0.0, {"a": 0.0})):
        report = swapper.activate(adapter)
        assert report.changed
        assert report.nbytes == 0
        assert all(param.equal(marks[name]) for name, param in model.named_parameters() if name in marks)
        assert float(model.get_submodule("up").scaling["default"]) == pytest.approx(weight * 6 / 4)


def test_after_training_a_blend_is_written_whole(folders: dict[str, Path]) -> None:
    model, swapper = blendable(folders)
    oracles = {key: fresh(ZOO["mlp"], folder) for key, folder in folders.items()}
    swapper.activate({"a": 0.7, "b": 1.0})
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.mul_(1.25)
    swapper.activate({"a": 0.7, "b": 0.5})
    assert_sum(model, summed(oracles, {"a": 0.7, "b": 0.5}))
    swapper.rollback()
    assert_sum(model, {
        key: value * (1.25 if key.endswith("bias") else 1.25**2)
        for key, value in summed(oracles, {"a": 0.7, "b": 1.0}).items()
    })  # fmt: skip


def test_a_reloaded_ingredient_makes_another_blend(folders: dict[str, Path], make: Make) -> None:
    model, swapper = blendable(folders)
    swapper.activate({"a": 0.7, "b": 1.0})
    version = swapper.version
    other = make("mlp", 7, **FOLDERS["a"])
    swapper.load("a", other)
    assert swapper.activate({"a": 0.7, "b": 1.0}).changed
    assert swapper.version != version
    oracles = {"a": fresh(ZOO["mlp"], other), "b": fresh(ZOO["mlp"], folders["b"])}
    assert_sum(model, summed(oracles, {"a": 0.7, "b": 1.0}))


# --- refused --------------------------------------------------------------------------------------------------------


def test_beyond_the_plan_is_refused_with_the_plan_that_takes_it(folders: dict[str, Path]) -> None:
    model = ZOO["mlp"].build()
    swapper = hotslot.attach(model, folders)
    swapper.activate("a")
    before = snapshot(model)
    with pytest.raises(errors.RankError, match=r"4 \+ 2 = 6") as caught:
        swapper.activate({"a": 0.7, "b": 1.0})
    assert caught.value.plan.ranks == {"up": 4, "inner.2": 6, "inner.0": 2}
    assert_unchanged(before, snapshot(model))
    swapper.grow(caught.value.plan)
    swapper.activate({"a": 0.7, "b": 1.0})
    oracles = {key: fresh(ZOO["mlp"], folder) for key, folder in folders.items()}
    assert_sum(model, summed(oracles, {"a": 0.7, "b": 1.0}))


def test_a_missing_bias_is_refused_with_the_plan_that_has_it(make: Make) -> None:
    sources = {
        "a": make("mlp", 0, r=2, target_modules=["up"], lora_bias=True),
        "b": make("mlp", 1, r=3, target_modules=["down"]),
    }
    model = ZOO["mlp"].build()
    swapper = hotslot.attach(model, sources)
    with pytest.raises(errors.UnexpectedTargetError) as caught:
        swapper.activate({"a": 1.0, "b": 1.0})
    swapper.grow(caught.value.plan)
    swapper.activate({"a": 1.0, "b": 1.0})
    assert_sum(model, summed({key: fresh(ZOO["mlp"], f) for key, f in sources.items()}, {"a": 1.0, "b": 1.0}))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"use_dora": True}, "cannot be blended"),
        ({"target_modules": [], "target_parameters": ["up.weight"]}, "lora_bias"),
    ],
)
def test_what_does_not_add_up_has_no_plan_that_takes_it(second: dict[str, Any], message: str, make: Make) -> None:
    """Its ranks are beyond the plan, too: it was refused for that, and grown slots refused it for what it is."""
    sources = {
        "a": make("mlp", 0, r=4, target_modules=["inner.0"], lora_bias=True),
        "b": make("mlp", 1, **{"r": 4, "target_modules": ["inner.0"], **second}),
        "c": make("mlp", 2, r=4, target_modules=["inner.0"]),
    }
    model = ZOO["mlp"].build()
    swapper = hotslot.attach(model, sources)
    before = snapshot(model)
    with pytest.raises(errors.UnsupportedError, match=message):
        swapper.activate(dict.fromkeys(sources, 1.0))
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize(
    ("weights", "options", "kind", "message"),
    [
        ({}, {}, ValueError, "no adapters"),
        ({"a": math.nan}, {}, ValueError, "weight of 'a'"),
        ({"a": 1.0, "b": math.inf}, {}, ValueError, "weight of 'b'"),
        ({"a": 1.0, "b": 10**400}, {}, ValueError, "weight of 'b'"),
        ({"a": 1.0, "b": True}, {}, ValueError, "weight of 'b'"),
        ({"a": 1.0, "b": "1"}, {}, ValueError, "weight of 'b'"),
        ({"a": 1.0, "c": 1.0}, {}, errors.UnknownAdapterError, "'c'"),
        ({"a": 1.0, "b": 1e39}, {}, errors.NonFiniteError, "overflow"),
        ({"b": -1e39}, {}, errors.NonFiniteError, "overflow"),
        ({"a": 1.0, "b": 1.0}, {"blend": "linear"}, ValueError, "blend must be"),
    ],
)
def test_what_cannot_be_blended_changes_nothing(
    weights: Any, options: dict[str, Any], kind: type[Exception], message: str, folders: dict[str, Path]
) -> None:
    model, swapper = blendable(folders)
    swapper.activate({"a": 0.5, "b": 0.5})
    before, held = snapshot(model), (swapper.active, swapper.version, swapper.host_bytes)
    with pytest.raises(kind, match=message):
        swapper.activate(weights, **options)
    assert_unchanged(before, snapshot(model))
    assert held == (swapper.active, swapper.version, swapper.host_bytes)


# --- svd ------------------------------------------------------------------------------------------------------------


def assert_cut(model: nn.Module, want: Mapping[str, Tensor], room: Mapping[str, int], stated: float | None) -> None:
    """The best approximation of its rank there is, and the error that is stated."""
    assert stated is not None
    largest = 0.0
    for key, delta in deltas(model).items():
        expected = want.get(key, torch.zeros_like(delta))
        if key in room:
            values = torch.linalg.svdvals(expected)
            rank = room[key] // expected.shape[0] if expected.dim() == 3 and key == "grouped" else room[key]
            best = float(values[:, rank:].norm())
            assert abs(float((delta - expected).norm()) - best) <= 1e-5 * float(expected.norm()), key
            largest = max(largest, best / float(expected.norm()))
        else:
            assert float((delta - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-12, key
    assert stated == pytest.approx(largest, rel=1e-6)


@pytest.mark.parametrize("name", ["mlp", "embedding", "conv2d", "attention", "llama"])
def test_a_blend_cut_by_svd_is_the_best_of_its_rank(name: str, tmp_path: Path, caplog: Any) -> None:
    entry = ZOO[name]
    sources = {
        key: make_adapter(tmp_path / key, entry, seed=i, r=r, lora_alpha=3 + i, target_modules=list(entry.targets))
        for i, (key, r) in enumerate({"a": 4, "b": 2}.items())
    }
    oracles = {key: fresh(entry, folder) for key, folder in sources.items()}
    model = entry.build()
    swapper = hotslot.attach(model, sources)
    weights = {"a": 0.7, "b": -1.0}
    report = swapper.activate(weights, blend="svd")
    assert report.changed
    assert_cut(model, summed(oracles, weights), swapper.plan.ranks, report.error)
    assert f"at most {report.error:.3g} of one" in caplog.text
    again = swapper.activate(weights, blend="svd")
    assert not again.changed
    assert again.error == report.error
    swapper.activate({"a": 0.7, "b": 1.0}, blend="svd")
    assert_cut(
        model,
        summed(oracles, {"a": 0.7, "b": 1.0}),
        swapper.plan.ranks,
        swapper.activate({"a": 0.7, "b": 1.0}, blend="svd").error,
    )
    swapper.grow(hotslot.plan(model, sources))
    exact = swapper.activate(weights, blend="svd")
    assert exact.error is None
    assert_sum(model, summed(oracles, weights))


# --- honest state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_a_saved_blend_loads_as_the_blend(name: str, tmp_path: Path) -> None:
    rng, entry = Random(8), ZOO[name]
    for i in range(3):
        sources = {}
        for key in "ab":
            config = random_config(rng, entry)
            config.pop("lora_bias", None)  # PEFT has no config for biases beside an embedding
            sources[key] = make_adapter(tmp_path / f"{i}{key}", entry, seed=10 * i + ord(key), **config)
        model = fresh(entry, sources["a"])
        swapper = hotslot.attach(model, sources, plan=hotslot.plan(model, sources))
        for j, weights in enumerate(({"a": 0.7, "b": -1.5}, {"b": 0.4}, {"a": 0.3, "b": 0.0})):
            swapper.activate(weights)
            saved = tmp_path / f"saved-{i}-{j}"
            with expected_peft_warnings():
                model.save_pretrained(saved)
            assert_sum(model, deltas(loaded := fresh(entry, saved)))
            assert loaded.peft_config["default"].r > 0
            other = hotslot.attach(twin := entry.build(), {"saved": saved})
            other.activate("saved")
            assert_sum(twin, deltas(loaded))


def test_layers_and_config_describe_the_blend(folders: dict[str, Path]) -> None:
    model, swapper = blendable(folders)
    report = swapper.activate({"b": 1, "a": 0.7})
    assert swapper.active == report.adapter == "a:0.7+b:1.0"
    assert report.version == swapper.version
    config = model.peft_config["default"]
    layers = {fqn: layer for fqn, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    assert {fqn: layer.r["default"] for fqn, layer in layers.items()} == {"up": 4, "inner.0": 2, "inner.2": 6}
    assert all(layer.lora_alpha["default"] == layer.r["default"] for layer in layers.values())
    assert all(float(layer.scaling["default"]) == 1.0 for layer in layers.values())
    assert all(layer.lora_bias["default"] for layer in layers.values())
    assert not config.use_rslora
    assert config.target_modules == {"up", "inner.0", "inner.2"}
    swapper.activate({"a": 0.5})
    assert model.peft_config["default"].lora_alpha == 3.0
    assert {fqn: layer.lora_alpha["default"] for fqn, layer in layers.items() if fqn != "inner.0"} == {
        "up": 3.0,
        "inner.2": 3.0,
    }


def test_versions_tell_blends_apart(folders: dict[str, Path]) -> None:
    _, swapper = blendable(folders)
    versions = {}
    for weights in ("a", "b", {"a": 0.5}, {"a": 0.5, "b": 1.0}, {"a": 1.0, "b": 0.5}, {"a": 0.5, "b": 0.5}):
        swapper.activate(weights)
        versions[str(weights)] = swapper.version
    assert len(set(versions.values())) == 6
    swapper.activate({"b": 1.0, "a": 0.5})
    assert swapper.version == versions[str({"a": 0.5, "b": 1.0})]
    assert not swapper.activate({"a": 0.5, "b": 1}).changed
    swapper.activate({"a": 1.0})
    assert swapper.active == "a"
    assert swapper.version == versions["a"]


# --- there and back -------------------------------------------------------------------------------------------------


def test_rollback_and_using(folders: dict[str, Path]) -> None:
    model, swapper = blendable(folders)
    oracles = {key: fresh(ZOO["mlp"], folder) for key, folder in folders.items()}
    first, second = {"a": 0.7, "b": 1.0}, {"a": 0.7, "b": -1.0}
    swapper.activate(first)
    swapper.activate(second)
    swapper.rollback()
    assert_sum(model, summed(oracles, first))
    with swapper.using(second):
        assert_sum(model, summed(oracles, second))
    assert_sum(model, summed(oracles, first))
    with swapper.using("a"):
        assert_sum(model, deltas(oracles["a"]))
    assert_sum(model, summed(oracles, first))
    with swapper.using(None):
        assert_sum(model, {})
    assert swapper.active == "a:0.7+b:1.0"
    assert_sum(model, summed(oracles, first))


def test_detach_from_a_blend(folders: dict[str, Path]) -> None:
    model = ZOO["mlp"].build()
    before = snapshot(model)
    swapper = hotslot.attach(model, folders, plan=hotslot.plan(model, folders))
    swapper.activate({"a": 0.7, "b": 1.0})
    swapper.detach()
    assert_unchanged(before, snapshot(model))


def test_only_the_last_blends_are_held(folders: dict[str, Path]) -> None:
    _, swapper = blendable(folders)
    loaded = swapper.host_bytes
    sizes = []
    for i in range(9):
        swapper.activate({"a": 0.1 * i + 0.05, "b": 1.0})
        sizes.append(swapper.host_bytes - loaded)
    assert sizes[0] > 0
    assert sizes == [sizes[0] * min(i + 1, 2) for i in range(9)]
    swapper.activate({"a": 0.3})
    assert swapper.host_bytes - loaded == sizes[0], "one adapter's bytes are its own"
    with pytest.raises(errors.ModelError, match="live"):
        swapper.unload("a")
    swapper.unload("b")
    own = swapper.engine.live.entry.lenders[0].nbytes
    assert swapper.host_bytes == own + sizes[0], "what it was blended into was live before, and rollback needs it"
    swapper.activate({"a": 0.4})
    assert swapper.host_bytes == own


# --- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_blends_within_the_plan_compile_nothing(way: str, make: Make) -> None:
    entry, backend = ZOO["llama"], Backend()
    sources = {
        "a": make("llama", 0, r=4, lora_alpha=7, target_modules=["q_proj", "up_proj"]),
        "b": make("llama", 1, r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], use_rslora=True),
    }
    model, inputs = entry.build(), entry.inputs()
    swapper = hotslot.attach(model, sources, plan=hotslot.plan(model, sources))
    swapper.activate("a")
    call = WAYS[way](model, backend)
    entry.output(call, inputs)
    once = backend.graphs
    for weights in ({"a": 0.7, "b": 1.0}, {"a": 0.7, "b": -1.0}, {"b": 0.4}, {"a": 0.0, "b": 0.0}):
        swapper.activate(weights)
        want = summed_output(entry, sources, weights)
        assert_same_output(entry.output(call, inputs), want)
    swapper.activate("b")
    assert_same_output(entry.output(call, inputs), fresh_output(entry, sources["b"]))
    assert backend.graphs == once
    peft = copy.deepcopy(fresh(entry, sources["a"], adapter_name="a"))
    peft.load_adapter(str(sources["b"]), adapter_name="b")
    control = Backend()
    compiled = torch.compile(peft, backend=control)
    entry.output(compiled, inputs)
    graphs = control.graphs
    with expected_peft_warnings():
        peft.add_weighted_adapter(["a", "b"], [0.7, 1.0], "both", combination_type="cat")
    peft.set_adapter("both")
    assert error(entry.output(compiled, inputs), summed_output(entry, sources, {"a": 0.7, "b": 1.0})) < 1e-4
    assert control.graphs > graphs, "the control: PEFT's blend recompiles"
