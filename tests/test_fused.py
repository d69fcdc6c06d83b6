"""`attach(fused=True)`: what PEFT's layers compute, by another forward, eager and compiled.

Where the fused forward runs it is compared with a fresh load within rounding. Where it must not, with the same model
attached without `fused`, to the bit: whatever a layer was asked for, it is PEFT's own forward that does it.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

import hotslot
from adapters import expected_peft_warnings, make_adapter, random_config
from compiling import Backend
from hotslot.errors import ModelError
from hotslot.live.fused import FusedLinear
from hotslot.testing import RecompiledError, no_recompile, same_addresses
from oracle import TOLERANCE, assert_same_output, assert_unchanged, error, fresh, fresh_output, snapshot
from zoo import ZOO, Entry

LLAMA, MLP = ZOO["llama"], ZOO["mlp"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
CONFIGS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 6, "target_modules": LINEAR},
    "few": {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "wide": {"r": 8, "lora_alpha": 7, "lora_dropout": 0.5, "target_modules": LINEAR},
    "biased": {"r": 2, "lora_bias": True, "target_modules": ["v_proj", "up_proj"]},
    "dora": {"r": 3, "use_dora": True, "target_modules": ["o_proj", "gate_proj"]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("llama")
    return {
        name: make_adapter(root / name, LLAMA, seed=i, **config) for i, (name, config) in enumerate(CONFIGS.items())
    }


def fused_layers(model: nn.Module) -> list[FusedLinear]:
    return [module for module in model.modules() if isinstance(module, FusedLinear)]


def attached(
    folders: dict[str, Path], *names: str, fused: bool = True, model: nn.Module | None = None
) -> tuple[nn.Module, hotslot.Swapper]:
    """A Llama with these adapters, the first of them live."""
    model = LLAMA.build() if model is None else model
    swapper = hotslot.attach(model, {name: folders[name] for name in names}, fused=fused)
    swapper.activate(names[0])
    return model, swapper


def output(model: nn.Module) -> Tensor:
    return LLAMA.output(model, LLAMA.inputs())


# --- against fresh loads --------------------------------------------------------------------------------------------


def _drawn(rng: Random, entry: Entry) -> dict[str, Any]:
    config = random_config(rng, entry)
    if rng.random() < 0.2 and entry.name not in ("attention", "vision"):  # PEFT has no DoRA for attention
        config.update(use_dora=True, lora_bias=False)
    return config


class Case:
    """Three random adapters on one random model: its base's dtype, its slots' dtype and room, compiled or not."""

    def __init__(self, entry: Entry, seed: int, folder: Path) -> None:
        rng = self.rng = Random(f"{entry.name} {seed}")
        self.entry = entry
        self.dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.float16))
        self.slots = rng.choice((None, "base", torch.float32, torch.bfloat16))
        self.folders = {
            name: make_adapter(folder / name, entry, seed=i, **_drawn(rng, entry)) for i, name in enumerate("uvw")
        }
        self.max_blend = rng.choice((1, 2))
        self.inputs = entry.inputs(dtype=self.dtype)
        self.tolerance = max(TOLERANCE[self.dtype], TOLERANCE.get(self.slots, 0.0))

    def attach(self, model: nn.Module) -> hotslot.Swapper:
        room = {"max_blend": self.max_blend, "dtype": self.slots}
        plan = hotslot.plan(model, self.folders, **room)
        return hotslot.attach(model, self.folders, plan=plan, fused=True)

    def fresh(self, name: str) -> nn.Module:
        """PEFT's own, with the slots' dtype."""
        model = fresh(self.entry, self.folders[name], dtype=self.dtype, autocast_adapter_dtype=self.slots is None)
        for key, parameter in model.named_parameters():
            if isinstance(self.slots, torch.dtype) and "lora_" in key:
                parameter.data = parameter.data.to(self.slots)
        return model

    def assert_live(self, call: Any, name: str | None, inputs: dict[str, Tensor]) -> None:
        model = self.fresh(name) if name is not None else self.entry.build(dtype=self.dtype)
        got, want = self.entry.output(call, inputs), self.entry.output(model, inputs)
        found = error(got, want)
        assert found <= self.tolerance, f"{name}: {found} > {self.tolerance}, base {self.dtype}, slots {self.slots}"


@pytest.mark.parametrize(
    ("name", "seed"),
    [("llama", 0), ("llama", 1), ("gpt2", 0), ("gpt2", 1), ("mlp", 0), ("mlp", 1), ("embedding", 1), ("attention", 0)],
)
def test_random_adapters_compute_what_fresh_loads_do(name: str, seed: int, tmp_path: Path) -> None:
    entry = ZOO[name]
    case = Case(entry, seed, tmp_path)
    model = entry.build(dtype=case.dtype)
    before, base = snapshot(model), entry.output(model, case.inputs)
    swapper = case.attach(model)
    assert torch.equal(entry.output(model, case.inputs), base)
    live: str | None = None
    for step in case.rng.choices(("activate", "using", "rollback", "deactivate"), (4, 1, 1, 1), k=6):
        other = case.rng.choice(list(case.folders))
        if step == "activate":
            swapper.activate(other)
            live = other
        elif step == "using":
            with swapper.using(other):
                case.assert_live(model, other, case.inputs)
        elif step == "deactivate":
            swapper.deactivate()
            live = None
        elif swapper.generation:
            swapper.rollback()
            live = swapper.active
        case.assert_live(model, live, case.inputs)
    swapper.deactivate()
    assert torch.equal(entry.output(model, case.inputs), base)
    swapper.detach()
    assert_unchanged(before, snapshot(model))
    assert not fused_layers(model)
    assert all("fused_adapters" not in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("base", "slots"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
    ],
)
def test_slots_of_another_dtype_than_the_base_s(base: torch.dtype, slots: torch.dtype, tmp_path: Path) -> None:
    """Of few tokens, of many and of one; compiled, one token's products are in float32 at least."""
    folder = make_adapter(tmp_path, MLP, seed=1, r=3, lora_alpha=5, target_modules=list(MLP.targets))
    model, x = MLP.build(dtype=base), MLP.inputs(dtype=base)["x"]
    swapper = hotslot.attach(model, {"a": folder}, plan=hotslot.plan(model, folder, dtype=slots), fused=True)
    swapper.activate("a")
    oracle = fresh(MLP, folder, dtype=base)
    for key, parameter in oracle.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.to(slots)
    many = torch.randn(2, 80, 12, generator=torch.Generator().manual_seed(0)).to(base)
    layer, compiled = oracle.get_submodule("base_model.model.up"), torch.compile(model.up, backend="eager")
    for call, want, inputs in (
        (model, oracle, (x, many)),
        (model.up, layer, (x[:1], x[0])),
        (compiled, layer, (x[:1],)),
    ):
        for values in inputs:
            with torch.no_grad():
                assert error(call(values), want(values)) <= max(TOLERANCE[base], TOLERANCE[slots])


def test_a_blend_is_the_sum_of_its_adapters(folders: dict[str, Path]) -> None:
    model = LLAMA.build()
    sources = {name: folders[name] for name in ("a", "few")}
    swapper = hotslot.attach(model, sources, plan=hotslot.plan(model, sources), fused=True)
    swapper.activate({"a": 0.7, "few": -0.5})
    twin = fresh(LLAMA, folders["a"], adapter_name="a")
    twin.load_adapter(str(folders["few"]), "few")
    twin.base_model.set_adapter(["a", "few"])
    for module in twin.modules():
        for name, weight in (("a", 0.7), ("few", -0.5)):
            if isinstance(module, Linear) and name in module.scaling:
                module.scaling[name] *= weight
    assert_same_output(output(model), output(twin.eval()))


def test_a_half_s_range_is_that_of_peft(tmp_path: Path) -> None:
    """In float16 the scaling is applied where PEFT applies it: A's product times it would be infinite."""
    folder = make_adapter(tmp_path, MLP, seed=1, r=1, lora_alpha=4096, target_modules=["up"])
    model, inputs = MLP.build(dtype=torch.float16), MLP.inputs(dtype=torch.float16)
    swapper = hotslot.attach(model, {"a": folder}, plan=hotslot.plan(model, folder, dtype="base"), fused=True)
    swapper.activate("a")
    layer: Any = model.up
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(10)
        layer.lora_B["default"].weight.fill_(1e-4)
    low = layer.lora_A["default"](inputs["x"])
    assert low.isfinite().all()
    assert not (low * 4096).isfinite().all()  # the control
    assert layer(inputs["x"]).isfinite().all()


# --- compiled -------------------------------------------------------------------------------------------------------


def one_token() -> dict[str, Tensor]:
    return {"x": MLP.inputs()["x"][:1, None]}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of the MLP."""
    root, targets = tmp_path_factory.mktemp("mlp"), list(MLP.targets)
    configs: dict[str, dict[str, Any]] = {
        "a": {"r": 4, "lora_alpha": 6},
        "few": {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": targets[:2]},
        "wide": {"r": 6, "rank_pattern": {"down": 40}, "lora_alpha": 7, "lora_dropout": 0.5},
    }
    return {
        name: make_adapter(root / name, MLP, seed=i, **{"target_modules": targets, **config})
        for i, (name, config) in enumerate(configs.items())
    }


def assert_serves(compiled: Any, swapper: hotslot.Swapper, small: dict[str, Path], name: str) -> None:
    """What is compiled computes each adapter, of one token and of many."""
    swapper.activate(name)
    for inputs in (MLP.inputs(), one_token()):
        assert_same_output(MLP.output(compiled, inputs), MLP.output(fresh(MLP, small[name]), inputs))


def test_compiled_code_serves_all_adapters_and_growing_compiles_once_more(small: dict[str, Path]) -> None:
    """One graph for each length, made before anything is live. The control: `grow`."""
    backend, model = Backend(), MLP.build()
    swapper = hotslot.attach(model, {name: small[name] for name in ("a", "few")}, fused=True)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    lengths = MLP.inputs(), one_token()
    base = [MLP.output(compiled, inputs) for inputs in lengths]
    with no_recompile(), same_addresses(model):
        for name in ("a", "few", "a"):
            assert_serves(compiled, swapper, small, name)
        assert_same_output(MLP.output(compiled, MLP.inputs()), fresh_output(MLP, small["a"]), exact=True)  # as PEFT's
        with swapper.using(None):
            assert all(torch.equal(MLP.output(compiled, i), want) for i, want in zip(lengths, base, strict=True))
        swapper.rollback()
        swapper.deactivate()
        assert all(torch.equal(MLP.output(compiled, i), want) for i, want in zip(lengths, base, strict=True))
    assert backend.graphs == 2
    swapper.grow(hotslot.plan(model, small["wide"]))
    swapper.load("wide", small["wide"])
    with pytest.raises(RecompiledError), no_recompile():
        MLP.output(compiled, lengths[0])
    assert_serves(compiled, swapper, small, "wide")
    with no_recompile():
        for name in ("a", "few", "wide"):
            assert_serves(compiled, swapper, small, name)
    assert backend.graphs == 4


def test_what_is_grown_is_fused_and_what_a_bias_or_dora_needs_is_not(folders: dict[str, Path]) -> None:
    model, swapper = attached(folders, "few")
    assert len(fused_layers(model)) == 6
    assert all(layer._one_plain_adapter() for layer in fused_layers(model))
    swapper.grow(hotslot.plan(model, [folders[name] for name in ("a", "biased", "dora")], max_blend=1))
    for name in ("biased", "a", "dora", "few"):
        if name != "few":
            swapper.load(name, folders[name])
        swapper.activate(name)
        assert_same_output(output(model), fresh_output(LLAMA, folders[name]))
    plain = {name for name, m in model.named_modules() if isinstance(m, FusedLinear) and m._one_plain_adapter()}
    assert {name.rpartition(".")[2] for name in plain} == {"q_proj", "k_proj", "down_proj", "lm_head"}


def test_inductors_code_computes_the_adapter_right_after_each_swap(small: dict[str, Path]) -> None:
    """Of one token: the slot of rank 40 is a sum, where the others are written out term by term."""
    swapper = hotslot.attach(model := MLP.build(), small, fused=True)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    neutral = MLP.output(compiled, one_token())
    with no_recompile(), same_addresses(model):
        for name in ("a", "wide", "few"):
            swapper.activate(name)
            assert_same_output(MLP.output(compiled, one_token()), MLP.output(fresh(MLP, small[name]), one_token()))
        swapper.deactivate()
        assert torch.equal(MLP.output(compiled, one_token()), neutral)


class Chosen(nn.Module):
    """Some rows of the input, as many as it says: what compiled experts see."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP.build()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x[x[:, 0] > 0])


def test_compiled_code_need_not_know_how_many_tokens_there_are(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path, MLP, seed=1, r=3, target_modules=["up"])
    model = Chosen()
    hotslot.attach(model.mlp, {"a": folder}, fused=True).activate("a")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for rows in ([1.0, -1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]):
            x = MLP.inputs()["x"].clone()
            x[:, 0] = torch.tensor(rows)
            chosen = x[x[:, 0] > 0]
            got = compiled(x)
            if len(chosen):
                assert_same_output(got, fresh(MLP, folder)(chosen))
            assert got.shape == (len(chosen), 10)


def test_a_model_that_is_compiled_already_is_refused(folders: dict[str, Path]) -> None:
    compiled = torch.compile(LLAMA.build(), backend="eager")
    with pytest.raises(ModelError, match="compiled already"):
        hotslot.attach(compiled, {"a": folders["a"]}, fused=True)


# --- where it is PEFT's forward -------------------------------------------------------------------------------------


def _trained(model: PeftModel) -> Tensor:
    """Loss and gradients in training mode, dropout included."""
    model.train()
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    weights = [layer.lora_A["default"].weight.requires_grad_() for layer in layers if "default" in layer.lora_A]
    torch.manual_seed(0)
    loss = model(**LLAMA.inputs()).logits.square().mean()
    return torch.cat([loss.detach()[None], *(g.flatten() for g in torch.autograd.grad(loss, weights))])


def _trained_with_checkpoints(model: PeftModel) -> Tensor:
    model.enable_input_require_grads()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    return _trained(model)


def _with_a_second_one(model: PeftModel, names: list[str] | str) -> Tensor:
    model.load_adapter(str(model.second), "second")
    model.base_model.set_adapter(names)
    return output(model.eval())


def _in_a_mixed_batch(model: PeftModel) -> Tensor:
    model.load_adapter(str(model.second), "second")
    with torch.no_grad():
        return model.eval()(**LLAMA.inputs(), adapter_names=["default", "second"]).logits  # type: ignore[no-any-return]


def _disabled(model: PeftModel) -> Tensor:
    with model.disable_adapter():
        return output(model)


def _merged(model: PeftModel) -> Tensor:
    model.merge_adapter()
    return output(model)


def _with_dropout_alone_in_training(model: PeftModel) -> Tensor:
    """As uncertainty is estimated: https://arxiv.org/abs/1506.02142."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    torch.manual_seed(0)
    return output(model)


def _modules(model: PeftModel, container: str) -> Iterator[Any]:
    return (getattr(m, container)["default"] for m in model.modules() if isinstance(m, Linear))


def _with_hooks(container: str) -> Callable[[PeftModel], Tensor]:
    def run(model: PeftModel) -> Tensor:
        for module in _modules(model, container):
            module.register_forward_hook(lambda module, args, result: 2 * result)
        return output(model)

    return run


def _with_another_forward(model: PeftModel) -> Tensor:
    """As accelerate and diffusers' offloading bring weights just in time."""
    for module in _modules(model, "lora_B"):
        forward = module.forward
        module.forward = lambda x, forward=forward: 3 * forward(x)
    return output(model)


def _with_parametrized_weights(model: PeftModel) -> Tensor:
    for module in _modules(model, "lora_B"):
        torch.nn.utils.parametrizations.weight_norm(module)
    return output(model)


SITUATIONS: dict[str, Callable[[PeftModel], Tensor]] = {
    "training": _trained,
    "training with checkpoints": _trained_with_checkpoints,
    "two active": lambda model: _with_a_second_one(model, ["default", "second"]),
    "another active": lambda model: _with_a_second_one(model, "second"),
    "a mixed batch": _in_a_mixed_batch,
    "disabled": _disabled,
    "merged": _merged,
    "dropout alone in training": _with_dropout_alone_in_training,
    "hooks on B": _with_hooks("lora_B"),
    "another forward": _with_another_forward,
    "parametrized B": _with_parametrized_weights,
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_what_is_not_one_plain_adapter_is_pefts_to_the_bit(situation: str, folders: dict[str, Path]) -> None:
    results, plain = [], []
    for fused in (True, False):
        model: Any = fresh(LLAMA, folders["a"])
        attached(folders, "wide", model=model, fused=fused)
        plain.append(output(model))
        model.second = folders["few"]
        with expected_peft_warnings():
            results.append(SITUATIONS[situation](model))
    assert_same_output(*plain)
    assert not torch.equal(*plain)  # the control: it rounds otherwise
    assert_same_output(*results, exact=True)


def test_hooks_of_a_are_called(small: dict[str, Path]) -> None:
    """Eager and compiled, of one token and of many."""
    results = []
    for fused in (True, False):
        model = MLP.build()
        hotslot.attach(model, {"a": small["a"]}, fused=fused).activate("a")
        model.up.lora_A["default"].register_forward_hook(lambda module, args, result: 2 * result)
        for call in (model.up, torch.compile(model.up, backend="eager")):
            with torch.no_grad():
                results.append([call(x) for x in (MLP.inputs()["x"], one_token()["x"])])
    for eager, compiled, *want in zip(*results, strict=True):
        assert_same_output(eager, want[0])
        assert_same_output(compiled, want[0])


# --- beside others, and after ---------------------------------------------------------------------------------------


def test_another_slot_of_the_same_layers_keeps_its_forward(folders: dict[str, Path]) -> None:
    """Fused is what was asked for, under one name: the other swapper's adapters are exact, whoever comes and goes."""

    def two(first: bool, second: bool) -> tuple[nn.Module, dict[str, hotslot.Swapper]]:
        model = LLAMA.build()
        swappers = {
            name: hotslot.attach(model, {"a": folders["a"]}, adapter_name=name, fused=fused)
            for name, fused in (("first", first), ("second", second))
        }
        for swapper in swappers.values():
            swapper.activate("a")
        return model, swappers

    def outputs(model: nn.Module) -> dict[str, Tensor]:
        found = {}
        for name in ("first", "second"):
            for module in model.modules():
                if isinstance(module, Linear):
                    module.set_adapter(name)
            found[name] = output(model)
        return found

    want = outputs(two(False, False)[0])
    model, swappers = two(True, False)
    assert not torch.equal(outputs(model)["first"], want["first"])
    assert_same_output(outputs(model)["second"], want["second"], exact=True)
    swappers["first"].detach()
    assert not fused_layers(model)
    for gone, stays in (("first", "second"), ("second", "first")):
        model, swappers = two(True, True)
        before = outputs(model)[stays]
        swappers[gone].detach()
        for module in model.modules():
            if isinstance(module, Linear):
                module.set_adapter(stays)
        assert_same_output(output(model), before, exact=True)
        assert not torch.equal(before, want[stays])
        swappers[stays].detach()
        assert not fused_layers(model)


def test_gradients_in_eval_mode_are_pefts(small: dict[str, Path]) -> None:
    for inputs, backend in ((MLP.inputs(), None), (one_token(), None), (one_token(), "aot_eager")):
        found = []
        for fused in (True, False):
            model = MLP.build()
            hotslot.attach(model, {"few": small["few"]}, fused=fused).activate("few")
            weights = [p.requires_grad_() for name, p in model.named_parameters() if "lora_" in name]
            call: Any = torch.compile(model, backend=backend, fullgraph=True) if fused and backend else model
            found.append(torch.autograd.grad(call(**inputs).square().mean(), weights))
        for got, want in zip(*found, strict=True):
            assert_same_output(got, want)


def _by_torch_save(model: nn.Module) -> nn.Module:
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _by_torch_save])
def test_a_copy_has_pefts_own_forward(copied: Any, folders: dict[str, Path]) -> None:
    model, swapper = attached(folders, "wide", "a")
    before, twin = output(model), copied(model)
    want = output(attached(folders, "wide", fused=False)[0])
    swapper.activate("a")
    assert not fused_layers(twin)
    assert_same_output(output(twin), want, exact=True)
    swapper.activate("wide")
    assert_same_output(output(model), before, exact=True)
    hotslot.attach(twin, {"wide": folders["wide"]}).activate("wide")
    assert_same_output(output(twin), want, exact=True)


def test_what_is_saved_loads_as_what_is_live(folders: dict[str, Path], tmp_path: Path) -> None:
    model, swapper = attached(folders, "a", "wide", model=fresh(LLAMA, folders["few"]))
    for name in ("wide", "a"):
        swapper.activate(name)
        with expected_peft_warnings():
            model.save_pretrained(tmp_path / name)
        assert_same_output(fresh_output(LLAMA, tmp_path / name), fresh_output(LLAMA, folders[name]), exact=True)
    swapper.detach()
    assert not fused_layers(model)
    assert_same_output(output(model), fresh_output(LLAMA, folders["few"]), exact=True)


# --- other layers and dtypes ----------------------------------------------------------------------------------------


class Upcast(nn.Linear):
    """A layer that gives another dtype than it takes, and counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x).float()


@contextmanager
def autocast(on: bool) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=on):
        yield


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_base_layer_runs_once_whatever_dtypes_meet(dtype: torch.dtype, cast: bool, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Upcast(12, 8, dtype=dtype), nn.Tanh()).eval()

    x = torch.randn(3, 12).to(dtype)
    entry = Entry("upcast", build, lambda generator, dtype: {"input": x}, lambda result: result, ("0",))
    folder = make_adapter(tmp_path, entry, seed=1, r=2, lora_alpha=3, target_modules=["0"])
    model = build()
    hotslot.attach(model, {"a": folder}, plan=hotslot.plan(model, folder, dtype="base"), fused=True).activate("a")
    base: Any = model.get_submodule("0.base_layer")
    oracle = fresh(entry, folder, dtype=dtype, autocast_adapter_dtype=False)
    with torch.no_grad(), autocast(cast):
        got, want = model(x), oracle(x)
    assert base.calls == 1
    assert error(got, want) <= TOLERANCE[torch.bfloat16 if cast else dtype]
