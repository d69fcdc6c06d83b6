"""LoRA on bare parameters (`target_parameters`), mixtures of experts above all, against a fresh load."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import hotslot
from adapters import expected_peft_warnings, make_adapter
from hotslot import errors
from oracle import assert_same_output, assert_unchanged, error, snapshot
from zoo import ZOO

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
RANKS = {f"layers.0.{name}": 5 for name in EXPERTS}
CONFIGS: dict[str, dict[str, Any]] = {
    "experts": {"r": 4, "target_parameters": EXPERTS, "target_modules": []},
    "both": {"r": 2, "lora_alpha": 3, "target_parameters": EXPERTS, "target_modules": ["q_proj", "v_proj"]},
    "none": {"r": 3, "target_modules": ["q_proj", "o_proj"]},
    "ranks": {
        "r": 3, "use_rslora": True, "target_parameters": EXPERTS, "target_modules": ["k_proj"], "rank_pattern": RANKS
    },
}  # fmt: skip
INPUTS = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(0))


def build() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixtralForCausalLM(config).eval()
        for param in model.parameters():
            param.data.normal_(0, 0.2)
    return model


def output(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=INPUTS).logits
    return logits


def fresh(folder: Path) -> Any:
    with expected_peft_warnings():
        return PeftModel.from_pretrained(build(), folder).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, made = tmp_path_factory.mktemp("experts"), {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        with torch.random.fork_rng(devices=[]), expected_peft_warnings():
            torch.manual_seed(seed)
            model = get_peft_model(build(), LoraConfig(**config))
            for key, param in model.named_parameters():
                if "lora_" in key:
                    param.data.normal_(0, 0.3)
            model.save_pretrained(root / name)
        made[name] = root / name
    return made


@pytest.fixture(scope="module")
def outputs(folders: dict[str, Path]) -> dict[str, Tensor]:
    found = {name: output(fresh(folder)) for name, folder in folders.items()}
    assert all(not torch.allclose(found[name], output(build()), atol=0.01) for name in found)
    return found


def test_any_to_any_on_a_plain_model(folders: dict[str, Path], outputs: dict[str, Tensor]) -> None:
    model, base = build(), output(build())
    before = snapshot(model)
    swapper = hotslot.attach(model, folders)
    assert torch.equal(output(model), base)
    for name in [*folders, *reversed(folders), "both", "experts"]:
        swapper.activate(name)
        assert_same_output(output(model), outputs[name])
    swapper.deactivate()
    assert torch.equal(output(model), base)
    swapper.detach()
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("first", ["experts", "both"])
def test_any_to_any_on_a_model_of_peft(
    first: str, folders: dict[str, Path], outputs: dict[str, Tensor], tmp_path: Path
) -> None:
    model = fresh(folders[first])
    swapper = hotslot.attach(model, {name: folders[name] for name in ("none", "experts", "both", "ranks")})
    for name in swapper.adapters:
        swapper.activate(name)
        assert_same_output(output(model), outputs[name])
        model.save_pretrained(tmp_path)
        assert_same_output(output(fresh(tmp_path)), outputs[name])
    swapper.detach()
    assert_same_output(output(model), outputs[first], exact=True)


def test_experts_beyond_the_plan(folders: dict[str, Path], outputs: dict[str, Tensor]) -> None:
    swapper = hotslot.attach(model := build(), {"none": folders["none"]}, route="side")
    with pytest.raises(errors.UnexpectedTargetError) as caught:
        swapper.load("experts", folders["experts"])
    assert caught.value.plan is not None
    swapper.grow(caught.value.plan)
    swapper.load("experts", folders["experts"])
    swapper.activate("experts")
    assert_same_output(output(model), outputs["experts"])
    swapper.activate("none")
    assert_same_output(output(model), outputs["none"])


def test_other_parameters_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Their tensors would lie under the same names: PEFT wraps in the order of the module's parameters."""
    with expected_peft_warnings():
        other = get_peft_model(build(), LoraConfig(r=4, target_parameters=EXPERTS[:1], target_modules=[]))
        other.save_pretrained(tmp_path)
    swapper = hotslot.attach(model := build(), {"experts": folders["experts"]}, route="side")
    before = snapshot(model)
    with pytest.raises(errors.UnsupportedError, match="another bare parameter"):
        swapper.load("other", tmp_path)
    with pytest.raises(errors.HotslotError):
        hotslot.attach(build(), {"experts": folders["experts"], "other": tmp_path})
    assert_unchanged(before, snapshot(model))


class Experts(nn.Module):
    """Three of them in one parameter, and the linear layer behind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Module()
        self.experts.forward = self._mix  # type: ignore[method-assign]
        self.experts.weight = nn.Parameter(0.3 * torch.randn(3, 8, 6))
        self.out = nn.Linear(6, 4)

    def _mix(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->beo", x, self.get_submodule("experts").weight).tanh().sum(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.experts(x))


def by_drop_in(model: nn.Module, folder: Path) -> None:
    hotslot.hotswap_adapter(model, folder, "default")


def by_swapper(model: nn.Module, folder: Path) -> None:
    swapper = hotslot.attach(model, route="side")
    swapper.load("new", folder)
    swapper.activate("new")


@pytest.mark.parametrize(("first", "second"), [(4, 2), (2, 4), (4, 3), (4, 4)])
@pytest.mark.parametrize("swap", [by_drop_in, by_swapper])
def test_experts_stay_apart_when_the_rank_changes(
    swap: Callable[[nn.Module, Path], None], first: int, second: int, tmp_path: Path
) -> None:
    folders = [_expert_adapter(tmp_path / str(i), rank, seed=i) for i, rank in enumerate((first, second))]
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    live, oracle = (PeftModel.from_pretrained(Experts(), str(folder)).eval() for folder in folders)
    assert error(live(x), oracle(x)) > 0.01  # the control
    if swap is by_swapper and second > first:
        with pytest.raises(errors.RankError):
            swap(live, folders[1])
    else:
        swap(live, folders[1])
        assert_same_output(live(x), oracle(x))


def _expert_adapter(folder: Path, rank: int, *, seed: int) -> Path:
    config = LoraConfig(r=rank, lora_alpha=2 * rank + seed, target_modules=[], target_parameters=["experts.weight"])
    model = get_peft_model(Experts(), config)
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        if param.requires_grad:
            param.data.copy_(0.3 * torch.randn(param.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def test_a_parameter_of_a_layer_that_another_adapter_has_wrapped_is_refused(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    folder = make_adapter(tmp_path / "a", entry, seed=1, target_modules=[], target_parameters=["up.weight"])
    model = get_peft_model(entry.build(), LoraConfig(target_modules=["up"]), adapter_name="other").eval()
    before = snapshot(model)
    with pytest.raises(errors.UnsupportedError, match="up"):
        hotslot.attach(model, {"a": folder})
    assert_unchanged(before, snapshot(model))


def test_a_parameter_of_a_layer_that_another_adapter_has_dora_on_is_refused(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    bare = make_adapter(tmp_path / "a", entry, seed=1, target_modules=[], target_parameters=["up.weight"])
    dora = make_adapter(tmp_path / "b", entry, seed=2, target_modules=["up"], use_dora=True)
    model = entry.build()
    before = snapshot(model)
    with pytest.raises(errors.UnsupportedError, match="another bare parameter"):
        hotslot.attach(model, {"a": bare, "b": dora})
    assert_unchanged(before, snapshot(model))
    with expected_peft_warnings():
        carrying = PeftModel.from_pretrained(entry.build(), bare)
    before = snapshot(carrying)
    with pytest.raises(errors.UnsupportedError, match="no DoRA"):
        hotslot.attach(carrying, plan=hotslot.plan(model, dora))
    assert_unchanged(before, snapshot(carrying))


class TwoParameters(nn.Module):
    """Two bare parameters of one shape."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.up, self.gate = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(3, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->beo", x, self.up).tanh() * torch.einsum("bi,eio->beo", x, self.gate)


def two_parameters() -> nn.Module:
    return nn.Sequential(OrderedDict(experts=TwoParameters())).eval()


@pytest.fixture
def of_two(tmp_path: Path) -> dict[str, Path]:
    """Adapters of the first parameter, of the second, and of both."""
    for seed, (name, names) in enumerate({"up": ["up"], "gate": ["gate"], "both": ["up", "gate"]}.items()):
        config = LoraConfig(r=2, target_modules=[], target_parameters=[f"experts.{name}" for name in names])
        made = get_peft_model(two_parameters(), config)
        generator = torch.Generator().manual_seed(seed)
        for param in made.parameters():
            if param.requires_grad:
                param.data.copy_(0.3 * torch.randn(param.shape, generator=generator))
        made.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in ("up", "gate", "both")}


BRING: dict[str, Callable[[nn.Module, dict[str, Path]], object]] = {
    "attach": hotslot.attach,
    "budget": lambda model, sources: hotslot.attach(model, sources, cache=hotslot.Cache(host_bytes=1 << 20)),
    "plan": hotslot.plan,
    "plans": lambda model, sources: operator.or_(*(hotslot.plan(model, source) for source in sources.values())),
    "another's plan": lambda model, sources: hotslot.attach(
        model, sources, plan=hotslot.plan(model, next(iter(sources.values())))
    ),
}


@pytest.mark.parametrize("names", [("up", "gate"), ("gate", "up"), ("up", "both"), ("both", "up")])
@pytest.mark.parametrize("how", BRING)
def test_one_slot_is_not_for_two_parameters(how: str, names: tuple[str, str], of_two: dict[str, Path]) -> None:
    """Of one shape and under one name: the second one's tensors were put to the first one's parameter, in silence."""
    model = two_parameters()
    before = snapshot(model)
    with pytest.raises(errors.UnsupportedError, match=r"bare parameter(?s:.*)experts(?s:.*)same target_parameters"):
        BRING[how](model, {name: of_two[name] for name in names})
    assert_unchanged(before, snapshot(model))


def test_parameters_that_agree_are_swapped_and_blended(of_two: dict[str, Path], tmp_path: Path) -> None:
    """One has the second parameter, the other both: the blend's config names both, so that what is saved loads."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(5))

    def load(folder: Path) -> Any:
        with expected_peft_warnings():  # of patterns for bare parameters, which it does apply
            return PeftModel.from_pretrained(two_parameters(), folder).eval()

    model, sources = load(of_two["both"]), {name: of_two[name] for name in ("gate", "both")}
    swapper = hotslot.attach(model, sources, plan=hotslot.plan(model, sources))
    for name in sources:
        swapper.activate(name)
        assert_same_output(model(x), load(of_two[name])(x))
    report = swapper.activate({"gate": 0.5, "both": -2.0})
    assert report.error is None
    merged = two_parameters()
    for name, weight in (("gate", 0.5), ("both", -2.0)):
        fresh = load(of_two[name]).merge_and_unload()
        for key, param in merged.named_parameters():
            param.data += weight * (fresh.get_parameter(key) - two_parameters().get_parameter(key))
    assert_same_output(model(x), merged(x).detach())
    model.save_pretrained(tmp_path / "saved")
    assert_same_output(load(tmp_path / "saved")(x), merged(x).detach())
