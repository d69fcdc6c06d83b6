"""Contract 3 under torch.compile: a swap compiles nothing, moves nothing, and what was compiled computes the adapter.

Every backend but one runs the graphs as they are: what they compute is what the eager model computes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter as peft_hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor, nn

import hotslot
from adapters import expected_peft_warnings, make_adapter
from compiling import WAYS, Backend
from hotslot.testing import RecompiledError, no_recompile, same_addresses
from oracle import assert_same_output, assert_unchanged, error, fresh, fresh_output, snapshot
from zoo import ZOO, Entry

ENTRIES = ("llama", "bert", "gpt2", "conv2d", "embedding", "attention")


# --- adapters -------------------------------------------------------------------------------------------------------


def _configs(entry: Entry) -> dict[str, dict[str, Any]]:
    """Adapters that differ in all that a swap may change: rank, alpha, scaling kind, bias, dropout, targets."""
    unit, targets = entry.rank_multiple, list(entry.targets)
    half = max(1, len(targets) // 2)
    biased = [target for target in targets if not _names_embedding(entry, target)]  # PEFT gives those no bias
    return {
        "all": {"r": 4, "lora_alpha": 8, "target_modules": targets},
        "subset": {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": targets[:half]},
        "disjoint": {"r": 8, "lora_alpha": 2.5, "lora_dropout": 0.5, "target_modules": targets[half:]},
        "biased": {"r": unit, "lora_alpha": 1, "lora_bias": True, "target_modules": biased},
    }


def _names_embedding(entry: Entry, target: str) -> bool:
    return any(name.endswith(target) and isinstance(module, nn.Embedding) for name, module in entry.modules.items())


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Entry], dict[str, Path]]:
    """Entry → name → folder of `_configs`' adapters."""

    @cache
    def make(entry_name: str) -> dict[str, Path]:
        entry, root = ZOO[entry_name], tmp_path_factory.mktemp(entry_name)
        configs = _configs(entry).items()
        return {name: make_adapter(root / name, entry, seed=i, **config) for i, (name, config) in enumerate(configs)}

    return lambda entry: make(entry.name)


# --- models that carry slots ----------------------------------------------------------------------------------------


def _plain(entry: Entry, folder: Path) -> nn.Module:
    return entry.build()


def _peft_model(entry: Entry, folder: Path) -> nn.Module:
    return fresh(entry, folder)


def _injected(entry: Entry, folder: Path) -> nn.Module:
    """LoRA layers without a PeftModel around, as diffusers and transformers have them."""
    with expected_peft_warnings():
        config, tensors = LoraConfig.from_pretrained(str(folder)), load_file(folder / "adapter_model.safetensors")
        model = inject_adapter_in_model(config, entry.build())
        set_peft_model_state_dict(model, tensors)
    return model.eval().requires_grad_(False)


KINDS = {"plain": _plain, "PeftModel": _peft_model, "injected": _injected}

# Each entry in each way, and each kind of model in each way of compiling it and on each entry: not the whole product.
CASES = [
    (entry, way, list(KINDS)[(i + j) % len(KINDS)]) for i, entry in enumerate(ENTRIES) for j, way in enumerate(WAYS)
]
# Layers that are compiled one by one hold the targets, as a rule; the MLP's children are targets themselves.
WAYS_AND_ENTRIES = [(way, "gpt2" if "each" in way else "mlp") for way in WAYS]


@pytest.fixture(autouse=True)
def room_for_every_layer() -> Iterator[None]:
    """Layers that are compiled one by one share a code object, and its recompile limit of 8."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=64):
        yield


# --- the swapper ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entry", "way", "kind"), CASES)
def test_swaps_compile_nothing(entry: str, way: str, kind: str, family: Any) -> None:
    entry = ZOO[entry]
    folders, inputs, backend = family(entry), entry.inputs(), Backend()
    model = KINDS[kind](entry, folders["biased"])
    swapper = hotslot.attach(model, adapters=folders)
    compiled = WAYS[way](model, backend)
    first = entry.output(compiled, inputs)
    graphs = backend.graphs
    with no_recompile(), same_addresses(model):
        for name in ("all", "subset", "disjoint", "biased", "subset", "biased", "all"):
            swapper.activate(name)
            assert_same_output(entry.output(compiled, inputs), fresh_output(entry, folders[name]))
        swapper.deactivate()
        neutral = entry.output(compiled, inputs)
        assert_same_output(neutral, entry.output(entry.build(), inputs))
        with swapper.using("disjoint"):
            assert_same_output(entry.output(compiled, inputs), fresh_output(entry, folders["disjoint"]))
        assert torch.equal(entry.output(compiled, inputs), neutral)
        swapper.activate("all")
        with swapper.using(None):
            assert torch.equal(entry.output(compiled, inputs), neutral)
        assert_same_output(entry.output(compiled, inputs), fresh_output(entry, folders["all"]))
        swapper.rollback()
        assert torch.equal(entry.output(compiled, inputs), neutral)
    assert backend.graphs == graphs > 0
    assert_same_output(first, neutral if kind == "plain" else fresh_output(entry, folders["biased"]))
    if kind == "plain":
        assert torch.equal(first, neutral)


@pytest.mark.parametrize(("way", "entry"), WAYS_AND_ENTRIES)
def test_without_hotslot_another_adapter_recompiles(way: str, entry: str, family: Any) -> None:
    """The control: PEFT's own load_adapter and set_adapter."""
    entry = ZOO[entry]
    folders, inputs = family(entry), entry.inputs()
    model = fresh(entry, folders["all"])
    compiled = WAYS[way](model, "eager")
    entry.output(compiled, inputs)
    with no_recompile():
        entry.output(compiled, inputs)
    with expected_peft_warnings():
        model.load_adapter(str(folders["subset"]), adapter_name="second")
    model.set_adapter("second")
    with pytest.raises(RecompiledError), no_recompile():
        entry.output(compiled, inputs)


def test_without_hotslot_disabling_the_adapter_recompiles(family: Any) -> None:
    """The control of `using(None)`."""
    entry = ZOO["mlp"]
    model = fresh(entry, family(entry)["all"])
    compiled = torch.compile(model, backend="eager")
    entry.output(compiled, entry.inputs())
    with pytest.raises(RecompiledError), no_recompile(), model.disable_adapter():
        entry.output(compiled, entry.inputs())


@pytest.mark.parametrize("kind", KINDS)
def test_modules_that_dynamo_does_not_inline_compile_nothing_either(kind: str, family: Any) -> None:
    """torch 2.13 has no such choice any more, and warns."""
    entry, backend = ZOO["mlp"], Backend()
    folders = family(entry)
    swapper = hotslot.attach(model := KINDS[kind](entry, folders["biased"]), adapters=folders)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with torch._dynamo.config.patch(inline_inbuilt_nn_modules=False):
            compiled = torch.compile(model, backend=backend)
            entry.output(compiled, entry.inputs())
            with no_recompile(), same_addresses(model):
                for name in (*folders, "all"):
                    swapper.activate(name)
                    assert_same_output(entry.output(compiled, entry.inputs()), fresh_output(entry, folders[name]))
                swapper.deactivate()
                assert_same_output(entry.output(compiled, entry.inputs()), entry.output(entry.build(), entry.inputs()))
    assert backend.graphs == 1


def test_loading_and_unloading_compile_nothing(family: Any) -> None:
    entry = ZOO["mlp"]
    folders = family(entry)
    swapper = hotslot.attach(model := entry.build(), adapters={name: folders[name] for name in ("all", "disjoint")})
    compiled = torch.compile(model, backend="eager")
    entry.output(compiled, entry.inputs())
    with no_recompile(), same_addresses(model):
        swapper.load("late", folders["subset"])
        swapper.activate("late")
        assert_same_output(entry.output(compiled, entry.inputs()), fresh_output(entry, folders["subset"]))
        swapper.load("late", folders["disjoint"])  # the name taken again
        swapper.activate("late")
        assert_same_output(entry.output(compiled, entry.inputs()), fresh_output(entry, folders["disjoint"]))
        swapper.activate("all")
        swapper.unload("late")
        assert_same_output(entry.output(compiled, entry.inputs()), fresh_output(entry, folders["all"]))


@pytest.mark.parametrize("kind", ["PeftModel", "injected"])
def test_an_adapter_with_bias_goes_onto_a_model_whose_own_has_none(kind: str, family: Any) -> None:
    entry, backend = ZOO["mlp"], Backend()
    folders, inputs = family(entry), entry.inputs()
    model = KINDS[kind](entry, folders["all"])
    swapper = hotslot.attach(model, adapters=folders)
    compiled = torch.compile(model, backend=backend)
    assert_same_output(entry.output(compiled, inputs), fresh_output(entry, folders["all"]))
    with no_recompile(), same_addresses(model):
        for name in ("biased", "all", "biased"):
            swapper.activate(name)
            assert_same_output(entry.output(compiled, inputs), fresh_output(entry, folders[name]))
    swapper.detach()
    assert not any(name.endswith(".bias") for name, _ in model.named_parameters() if "lora_B" in name)


def test_a_second_adapter_on_the_model_stays_as_it_was(family: Any) -> None:
    """Two adapters active at once; only one is swapped."""
    entry = ZOO["mlp"]
    folders, inputs = family(entry), entry.inputs()
    model = fresh(entry, folders["all"])
    with expected_peft_warnings():
        model.load_adapter(str(folders["subset"]), adapter_name="other")
    model.base_model.set_adapter(["default", "other"])
    swapper = hotslot.attach(model, adapters={"disjoint": folders["disjoint"]})
    compiled = torch.compile(model, backend="eager")
    entry.output(compiled, inputs)
    with no_recompile(), same_addresses(model):
        swapper.activate("disjoint")
        together = entry.output(compiled, inputs)
        swapper.deactivate()
        assert_same_output(entry.output(compiled, inputs), fresh_output(entry, folders["subset"]))
    oracle = fresh(entry, folders["disjoint"])
    with expected_peft_warnings():
        oracle.load_adapter(str(folders["subset"]), adapter_name="other")
    oracle.base_model.set_adapter(["default", "other"])
    assert_same_output(together, entry.output(oracle, inputs))


def test_training_through_compiled_code_goes_on_after_swaps(family: Any) -> None:
    """Gradients are those of a fresh load; neither forward nor backward is compiled again."""
    entry = ZOO["mlp"]
    folders, inputs = family(entry), entry.inputs()

    def gradients(call: Any, model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        entry.read(call(**inputs)).square().mean().backward()
        return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}

    model = fresh(entry, folders["all"])
    swapper = hotslot.attach(model, adapters={"all": folders["all"], "other": _retrained(folders["all"])})
    for name, param in model.named_parameters():
        param.requires_grad_("lora_" in name)
    compiled = torch.compile(model, backend="aot_eager")
    gradients(compiled, model)
    with no_recompile(), same_addresses(model):
        for name, folder in (("all", folders["all"]), ("other", _retrained(folders["all"])), ("all", folders["all"])):
            swapper.activate(name)
            oracle = fresh(entry, folder)
            for key, param in oracle.named_parameters():
                param.requires_grad_("lora_" in key)
            want, got = gradients(oracle, oracle), gradients(compiled, model)
            assert want.keys() == got.keys()
            for key in want:
                assert_same_output(got[key], want[key])


@cache
def _retrained(folder: Path) -> Path:
    return make_adapter(folder.with_name("retrained"), ZOO["mlp"], seed=9, **_configs(ZOO["mlp"])["all"])


# --- a model that is compiled already -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["PeftModel", "injected"])
def test_attaching_to_a_compiled_model_moves_no_pointer(way: str, kind: str, family: Any) -> None:
    """Where rank and scaling fit what was compiled, nothing recompiles either."""
    entry, backend = ZOO["embedding"], Backend()
    folders = family(entry)
    same = _with(folders["all"], entry, seed=5)  # same rank and alpha
    smaller = _with(folders["all"], entry, seed=6, r=2, lora_alpha=4)  # same scaling
    model = KINDS[kind](entry, folders["all"])
    compiled = WAYS[way](model, backend)
    before = entry.output(compiled, entry.inputs())
    graphs = backend.graphs
    with no_recompile(), same_addresses(model):
        swapper = hotslot.attach(compiled, adapters={"same": same, "smaller": smaller, "all": folders["all"]})
        assert torch.equal(entry.output(compiled, entry.inputs()), before)
        for name, folder in (("same", same), ("smaller", smaller), ("all", folders["all"]), ("same", same)):
            swapper.activate(name)
            got = entry.output(compiled, entry.inputs())
            assert_same_output(got, fresh_output(entry, folder), exact=name != "smaller")
    assert backend.graphs == graphs


def _with(folder: Path, entry: Entry, *, seed: int, **changes: Any) -> Path:
    """A sibling of the adapter "all"."""
    config = {**_configs(entry)["all"], **changes}
    return make_adapter(folder.with_name(f"sibling{seed}"), entry, seed=seed, **config)


def test_attaching_to_a_model_that_generate_has_compiled_moves_no_pointer(family: Any) -> None:
    """transformers keeps what it has compiled itself; on a GPU it does so unasked."""
    entry, backend = ZOO["llama"], Backend()
    folder = family(entry)["all"]
    other = _with(folder, entry, seed=5)  # same rank and alpha
    model, prompt = fresh(entry, folder), entry.inputs()["input_ids"]
    before, after = _generate(model, prompt, backend), _generate(fresh(entry, other), prompt)
    with no_recompile(), same_addresses(model):
        swapper = hotslot.attach(model, adapters={"other": other})
        assert torch.equal(_generate(model, prompt, backend), before)
        swapper.activate("other")
        assert torch.equal(_generate(model, prompt, backend), after)
    assert not torch.equal(after, before)
    assert backend.graphs == 1


def test_another_scaling_on_a_compiled_model_recompiles_once_and_is_right(family: Any) -> None:
    """The control of the test above; a float that compiled code guards cannot change unnoticed."""
    entry, backend = ZOO["embedding"], Backend()
    folders = family(entry)
    model = fresh(entry, folders["all"])
    compiled = torch.compile(model, backend=backend)
    entry.output(compiled, entry.inputs())
    swapper = hotslot.attach(compiled, adapters={"other": _with(folders["all"], entry, seed=7, lora_alpha=3)})
    swapper.activate("other")
    with pytest.raises(RecompiledError), no_recompile():
        entry.output(compiled, entry.inputs())
    assert_same_output(
        entry.output(compiled, entry.inputs()), fresh_output(entry, _with(folders["all"], entry, seed=7, lora_alpha=3))
    )
    assert backend.graphs == 2


@pytest.mark.parametrize(("way", "entry"), WAYS_AND_ENTRIES)
def test_a_plain_model_may_be_compiled_before_attaching(way: str, entry: str, family: Any) -> None:
    """New layers have to be compiled, once for all adapters; every one is right, and so is the base."""
    entry, backend = ZOO[entry], Backend()
    folders, inputs = family(entry), entry.inputs()
    compiled = WAYS[way](entry.build(), backend)
    base = entry.output(compiled, inputs)
    swapper = hotslot.attach(compiled, adapters=folders)
    assert torch.equal(entry.output(compiled, inputs), base)
    graphs = backend.graphs
    for name in (*folders, "subset"):
        swapper.activate(name)
        assert_same_output(entry.output(compiled, inputs), fresh_output(entry, folders[name]))
    swapper.deactivate()
    assert torch.equal(entry.output(compiled, inputs), base)
    assert backend.graphs == graphs
    swapper.detach()
    assert torch.equal(entry.output(compiled, inputs), base)


def test_a_target_that_was_compiled_by_itself_is_refused(family: Any) -> None:
    """What torch.compile holds is the module without the slot: it would be called past it."""
    entry = ZOO["mlp"]
    model = WAYS["torch.compile(layer) each"](entry.build(), "eager")
    before = snapshot(model)
    with pytest.raises(hotslot.HotslotError, match=r"(?s)where: .*up"):
        hotslot.attach(model, adapters=family(entry))
    assert_unchanged(before, snapshot(model))


def test_layers_that_were_compiled_after_attaching_can_be_detached(family: Any) -> None:
    entry = ZOO["mlp"]
    model = entry.build()
    swapper = hotslot.attach(model, adapters=family(entry))
    for name in ("up", "down"):
        setattr(model, name, torch.compile(getattr(model, name), backend="eager"))
    swapper.activate("all")
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, family(entry)["all"]))
    swapper.detach()
    assert torch.equal(entry.output(model, entry.inputs()), entry.output(entry.build(), entry.inputs()))
    assert not any(hasattr(module, "lora_A") for module in model.modules())


def test_swapping_inside_inference_mode_compiles_nothing(family: Any) -> None:
    entry, backend = ZOO["mlp"], Backend()
    folders = family(entry)
    swapper = hotslot.attach(model := entry.build(), adapters=folders)
    compiled = torch.compile(model, backend=backend)
    with torch.inference_mode():
        compiled(**entry.inputs())
        with no_recompile(), same_addresses(model):
            for name in (*folders, "all"):
                swapper.activate(name)
                assert_same_output(compiled(**entry.inputs()).clone(), fresh_output(entry, folders[name]))
    assert backend.graphs == 1


# --- PEFT's functions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "way"),
    [("llama", "torch.compile(model)"), ("bert", "layer.compile() each"), ("gpt2", "model.compile()"),
     ("conv2d", "torch.compile(layer) each"), ("embedding", "torch.compile(model)"), ("mlp", "layer.compile() each")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["PeftModel", "injected"])
def test_hotswap_on_a_prepared_model_compiles_nothing(name: str, way: str, kind: str, family: Any) -> None:
    if kind == "injected" and name not in ("conv2d", "embedding"):
        pytest.skip("the two smallest will do")
    entry, backend = ZOO[name], Backend()
    folders, inputs = {key: path for key, path in family(entry).items() if key != "biased"}, entry.inputs()
    model = KINDS[kind](entry, folders["all"])
    hotslot.prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = WAYS[way](model, backend)
    assert_same_output(entry.output(compiled, inputs), fresh_output(entry, folders["all"]))
    graphs = backend.graphs
    with no_recompile(), same_addresses(model):
        for adapter in ("subset", "disjoint", "all", "disjoint", "subset"):
            hotslot.hotswap_adapter(compiled, str(folders[adapter]), adapter_name="default")
            assert_same_output(entry.output(compiled, inputs), fresh_output(entry, folders[adapter]))
    assert backend.graphs == graphs


def test_hotswap_from_a_state_dict_on_a_prepared_model_compiles_nothing(family: Any) -> None:
    entry, backend = ZOO["mlp"], Backend()
    folders, inputs = family(entry), entry.inputs()
    model = fresh(entry, folders["all"])
    hotslot.prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = torch.compile(model, backend=backend)
    entry.output(compiled, inputs)
    with no_recompile(), same_addresses(model):
        for name in ("disjoint", "subset", "all"):
            tensors = load_file(folders[name] / "adapter_model.safetensors")
            renamed = {key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}
            config = LoraConfig.from_pretrained(str(folders[name]))
            hotslot.hotswap_adapter_from_state_dict(compiled, renamed, "default", config)
            assert_same_output(entry.output(compiled, inputs), fresh_output(entry, folders[name]))
    assert backend.graphs == 1


def test_pefts_hotswap_to_another_alpha_recompiles(family: Any) -> None:
    """The control: unprepared, as PEFT's documentation allows only for equal ranks and scalings."""
    entry = ZOO["mlp"]
    folders = family(entry)
    model = fresh(entry, folders["all"])
    compiled = torch.compile(model, backend="eager")
    entry.output(compiled, entry.inputs())
    peft_hotswap_adapter(model, str(_with(folders["all"], entry, seed=8, lora_alpha=3)), adapter_name="default")
    with pytest.raises(RecompiledError, match="scaling"), no_recompile():
        entry.output(compiled, entry.inputs())


@pytest.mark.parametrize("way", WAYS)
def test_hotswap_without_preparing_keeps_what_is_compiled_for_equal_rank_and_alpha(way: str, family: Any) -> None:
    entry, backend = ZOO["mlp"], Backend()
    folders, inputs = family(entry), entry.inputs()
    model = fresh(entry, folders["all"])
    compiled = WAYS[way](model, backend)
    entry.output(compiled, inputs)
    graphs = backend.graphs
    with no_recompile(), same_addresses(model):
        for folder in (_with(folders["all"], entry, seed=5), folders["all"], _with(folders["all"], entry, seed=6)):
            hotslot.hotswap_adapter(compiled, str(folder), adapter_name="default")
            assert_same_output(entry.output(compiled, inputs), fresh_output(entry, folder), exact=True)
    assert backend.graphs == graphs
    folder = _with(folders["all"], entry, seed=7, lora_alpha=3)
    hotslot.hotswap_adapter(compiled, str(folder), adapter_name="default")
    with pytest.raises(RecompiledError), no_recompile():  # the control
        entry.output(compiled, inputs)
    assert_same_output(entry.output(compiled, inputs), fresh_output(entry, folder), exact=True)


def test_a_rank_above_the_target_rank_is_right_and_says_that_it_recompiles(
    family: Any, caplog: pytest.LogCaptureFixture
) -> None:
    entry = ZOO["mlp"]
    folders, inputs = family(entry), entry.inputs()
    model = fresh(entry, folders["all"])
    hotslot.prepare_model_for_compiled_hotswap(model, target_rank=6)
    compiled = torch.compile(model, backend="eager")
    entry.output(compiled, inputs)
    with no_recompile(), caplog.at_level(logging.WARNING):
        hotslot.hotswap_adapter(compiled, str(folders["subset"]), adapter_name="default")
        entry.output(compiled, inputs)
        assert not caplog.records
        hotslot.hotswap_adapter(compiled, str(folders["disjoint"]), adapter_name="default")
    assert "above what the model was prepared for" in caplog.text
    with pytest.raises(RecompiledError), no_recompile():
        entry.output(compiled, inputs)
    assert_same_output(entry.output(compiled, inputs), fresh_output(entry, folders["disjoint"]))


# --- generation -----------------------------------------------------------------------------------------------------


def test_generate_with_a_static_cache_compiles_its_decode_step_once(tmp_path: Path) -> None:
    """Prefill runs in eager and the decode step compiled, as transformers does it on a GPU."""
    entry, backend = ZOO["llama"], Backend()
    linear = list(entry.targets[:7])
    configs = [
        {"r": 8, "lora_alpha": 16, "target_modules": linear},
        {"r": 3, "lora_alpha": 4, "use_rslora": True, "target_modules": linear[:2]},
        {"r": 5, "lora_alpha": 2.5, "lora_dropout": 0.1, "target_modules": [*linear[3:], "lm_head"]},
    ]
    folders = {str(i): make_adapter(tmp_path / str(i), entry, seed=i, **config) for i, config in enumerate(configs)}
    prompt = entry.inputs()["input_ids"]
    want = {name: _generate(fresh(entry, folder), prompt) for name, folder in folders.items()}
    want[None] = _generate(entry.build(), prompt)
    assert len({tuple(tokens.flatten().tolist()) for tokens in want.values()}) == len(want)  # the control
    model = entry.build()
    swapper = hotslot.attach(model, adapters=folders)
    assert torch.equal(_generate(model, prompt, backend), want[None])
    assert backend.graphs == 1
    with no_recompile(), same_addresses(model):
        for name in ("1", "0", "2", "1", None, "0"):
            swapper.activate(name) if name is not None else swapper.deactivate()
            assert torch.equal(_generate(model, prompt, backend), want[name]), name
        with swapper.using("2"):
            assert torch.equal(_generate(model, prompt, backend), want["2"])
    assert backend.graphs == 1


def test_generate_recompiles_when_peft_changes_the_adapter(tmp_path: Path) -> None:
    """The control."""
    entry, backend = ZOO["llama"], Backend()
    one, two = (make_adapter(tmp_path / str(r), entry, seed=r, r=r, target_modules=["q_proj"]) for r in (2, 4))
    model = fresh(entry, one)
    prompt = entry.inputs()["input_ids"]
    _generate(model, prompt, backend)
    model.load_adapter(str(two), adapter_name="second")
    model.set_adapter("second")
    with pytest.raises(RecompiledError), no_recompile():
        _generate(model, prompt, backend)


def _generate(model: nn.Module, prompt: Tensor, backend: Backend | None = None) -> Tensor:
    from transformers import CompileConfig

    options: dict[str, Any] = {"disable_compile": True}
    if backend is not None:
        config = _compile_config(backend, CompileConfig)
        options = {"compile_config": config}
    mask = torch.ones_like(prompt)
    with torch.no_grad():
        return model.generate(
            input_ids=prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None,
            use_cache=True, cache_implementation="static", **options,
        )  # fmt: skip


@cache
def _compile_config(backend: Backend, kind: Any) -> Any:
    config = kind(backend=backend, fullgraph=True, dynamic=False, mode=None)
    config._compile_all_devices = True
    return config


# --- inductor -------------------------------------------------------------------------------------------------------


def test_inductors_code_computes_the_adapter_right_after_each_swap(family: Any) -> None:
    entry = ZOO["mlp"]
    folders, inputs = family(entry), entry.inputs()
    base = entry.output(torch.compile(entry.build()), inputs)
    swapper = hotslot.attach(model := entry.build(), adapters=folders)
    compiled = torch.compile(model)
    neutral = entry.output(compiled, inputs)
    assert_same_output(neutral, base)
    with no_recompile(), same_addresses(model):
        for name in ("subset", "all", "disjoint", "biased", "subset"):
            swapper.activate(name)
            assert_same_output(entry.output(compiled, inputs), fresh_output(entry, folders[name]))
        swapper.deactivate()
        assert torch.equal(entry.output(compiled, inputs), neutral)


# --- rounding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "scaling",
    [{"r": 10, "lora_alpha": 3}, {"r": 3, "lora_alpha": 7, "use_rslora": True}, {"r": 7, "lora_alpha": 2.5}],
    ids=["0.3", "rsLoRA", "2.5/7"],
)
def test_a_scaling_in_the_arena_rounds_as_pefts_float(
    dtype: torch.dtype, scaling: dict[str, Any], tmp_path: Path
) -> None:
    """Bit for bit through whole layers, eager and compiled, with adapters in the base's own low precision."""
    entry = ZOO["mlp"]
    targets = list(entry.targets)
    folder = make_adapter(tmp_path / "new", entry, seed=1, file_dtype=dtype, target_modules=targets, **scaling)
    first = make_adapter(tmp_path / "first", entry, seed=2, file_dtype=dtype, target_modules=targets, r=scaling["r"])
    inputs = entry.inputs(dtype=dtype)
    want = entry.output(fresh(entry, folder, dtype=dtype, autocast_adapter_dtype=False), inputs)
    model = fresh(entry, first, dtype=dtype, autocast_adapter_dtype=False)
    swapper = hotslot.attach(model, adapters={"new": folder})
    layer = model.get_submodule("base_model.model.up")
    assert layer.lora_A["default"].weight.dtype == dtype
    compiled = torch.compile(model, backend="eager")
    entry.output(compiled, inputs)
    with no_recompile():
        swapper.activate("new")
        assert isinstance(layer.scaling["default"], Tensor)
        assert_same_output(entry.output(model, inputs), want, exact=True)
        assert_same_output(entry.output(compiled, inputs), want, exact=True)


def test_a_scaling_in_the_activations_own_precision_would_round_otherwise(tmp_path: Path) -> None:
    """The control: 0.3 is no bfloat16."""
    entry = ZOO["mlp"]
    folder = make_adapter(
        tmp_path, entry, seed=1, r=10, lora_alpha=3, file_dtype=torch.bfloat16, target_modules=list(entry.targets)
    )
    model = fresh(entry, folder, dtype=torch.bfloat16, autocast_adapter_dtype=False)
    inputs = entry.inputs(dtype=torch.bfloat16)
    want = entry.output(model, inputs)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] = torch.tensor(0.3, dtype=torch.bfloat16)
    assert error(entry.output(model, inputs), want) > 0
