"""Models that accelerate offloads layer by layer, as by diffusers' `enable_sequential_cpu_offload`.

Their slots stay on the execution device, for which the CPU stands here: the hooks are the same. `tests/gpu` has a GPU.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_submodules
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hotslot
from adapters import make_adapter
from compiling import Backend
from hotslot import errors
from hotslot.testing import no_recompile
from methods import make_method_adapter
from oracle import assert_same_output, assert_unchanged, fresh, fresh_output, snapshot
from test_all_or_nothing import Stage, assert_nothing_changed, attempt, chosen, everything, injected
from zoo import ZOO, Entry

CPU = torch.device("cpu")
LLAMA, MLP = ZOO["llama"], ZOO["mlp"]
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "a": {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 6},
        "b": {"r": 2, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        "c": {"r": 7, "target_modules": ["down_proj"], "rank_pattern": {"layers.0.mlp.down_proj": 3}},
    },
    "gpt2": {
        "a": {"r": 4, "target_modules": ["c_attn"], "lora_alpha": 6},
        "b": {"r": 2, "target_modules": ["c_attn", "c_proj"]},
        "c": {"r": 3, "target_modules": ["c_fc"], "lora_alpha": 5},
    },
    "conv2d": {
        "a": {"r": 4, "target_modules": ["grouped", "head"], "lora_alpha": 6},
        "b": {"r": 2, "target_modules": ["grouped", "point"], "lora_alpha": 5},
        "c": {"r": 6, "target_modules": ["point"]},
    },
    "mlp": {
        "a": {"r": 4, "target_modules": ["up", "inner.2"], "lora_alpha": 6, "lora_bias": True},
        "b": {"r": 2, "target_modules": ["inner.0", "inner.2"], "use_rslora": True},
        "c": {"r": 7, "target_modules": ["up", "inner.2"], "lora_bias": True},
    },
}


Folders = dict[str, dict[str, Path]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: {
            key: make_adapter(root / name / key, ZOO[name], seed=i, **config)
            for i, (key, config) in enumerate(configs.items())
        }
        for name, configs in CONFIGS.items()
    }


# -- helpers ---------------------------------------------------------------------------------------------------------


def output(entry: Entry, model: nn.Module) -> Tensor:
    return entry.output(model, entry.inputs())


def hooks(model: nn.Module) -> dict[str, tuple[int, bool]]:
    """Path → hook of accelerate, and whether it offloads."""
    found = {name: vars(module).get("_hf_hook") for name, module in model.named_modules()}
    return {name: (id(hook), getattr(hook, "offload", False)) for name, hook in found.items() if hook is not None}


@contextmanager
def base_left_alone(model: nn.Module) -> Iterator[None]:
    """All hooks, and the Parameters that they have put in the place of the base's, are the same ones afterwards."""
    before, own = hooks(model), {n: p for n, p in model.named_parameters() if "lora_" not in n}
    assert any(offloads for _, offloads in before.values())
    assert all(param.is_meta for param in own.values())
    yield
    assert hooks(model) == before
    found = dict(model.named_parameters())
    assert all(found[name] is param for name, param in own.items())


ORDERS = ("attach, offload", "offload, attach", "load by PEFT, offload, attach")


def attached(order: str, entry: Entry, sources: dict[str, Path], *, offloaded: bool = True) -> Any:
    """(model, its swapper), offloaded in that order or not at all."""
    model = fresh(entry, sources["a"]) if "PEFT" in order else entry.build()
    if offloaded and order != ORDERS[0]:
        cpu_offload(model, CPU)
    swapper = hotslot.attach(model, sources, plan=hotslot.plan(model, sources))
    swapper.activate("b")
    if offloaded and order == ORDERS[0]:
        cpu_offload(model, CPU)
    return model, swapper


# -- what works ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("order", ORDERS)
def test_random_swaps_are_those_of_a_model_that_is_not_offloaded(order: str, name: str, folders: Folders) -> None:
    """To the bit; and what is live alone is a fresh load's. After detach, and after the hooks, as before them."""
    entry, sources, random = ZOO[name], folders[name], Random(f"{order} {name}")
    model, swapper = attached(order, entry, sources)
    twin, other = attached(order, entry, sources, offloaded=False)
    acts: dict[str, Callable[[hotslot.Swapper], Any]] = {
        "deactivate": lambda swapper: swapper.deactivate(),
        "rollback": lambda swapper: swapper.rollback(),
        "blend": lambda swapper: swapper.activate({"a": 0.7, "c": -0.4}),
        **{key: lambda swapper, key=key: swapper.activate(key) for key in sources},
    }
    assert_same_output(output(entry, model), output(entry, twin), exact=True)
    for act in random.choices(list(acts), k=5):
        acts[act](other)
        with base_left_alone(model):
            acts[act](swapper)
        assert_same_output(output(entry, model), output(entry, twin), exact=True)
        if swapper.active in sources:
            assert_same_output(output(entry, model), fresh_output(entry, sources[swapper.active]))
    swapper.detach()
    other.detach()
    assert all(param.is_meta for param in model.parameters())
    assert_same_output(output(entry, model), output(entry, twin), exact=True)
    remove_hook_from_submodules(model)
    assert not hooks(model)
    assert_same_output(output(entry, model), output(entry, twin), exact=True)


@pytest.mark.parametrize("order", ORDERS)
def test_hooks_may_come_and_go(order: str, folders: Folders) -> None:
    """Each time before a forward pass, or before a swap; a large rank is live, or one for fewer modules."""
    sources = folders["llama"]
    model, swapper = attached(order, LLAMA, sources)
    for key in ("a", "c", "b"):
        swapper.activate(key)
        remove_hook_from_submodules(model)
        assert not any(param.is_meta for param in model.parameters())
        assert_same_output(output(LLAMA, model), fresh_output(LLAMA, sources[key]))
        cpu_offload(model, CPU)
        assert_same_output(output(LLAMA, model), fresh_output(LLAMA, sources[key]))
        remove_hook_from_submodules(model)
        cpu_offload(model, CPU)
        remove_hook_from_submodules(model)
        cpu_offload(model, CPU)
    swapper.activate("a")
    remove_hook_from_submodules(model)
    cpu_offload(model, CPU)
    swapper.detach()
    came_with = fresh_output(LLAMA, sources["a"]) if "PEFT" in order else output(LLAMA, LLAMA.build())
    assert_same_output(output(LLAMA, model), came_with)


@pytest.mark.parametrize("first", [True, False], ids=["attach, offload", "offload, attach"])
def test_weights_on_disk(first: bool, folders: Folders, tmp_path: Path) -> None:
    model = LLAMA.build()
    if not first:
        disk_offload(model, str(tmp_path), CPU)
    swapper = hotslot.attach(model, folders["llama"])
    swapper.activate("b")
    if first:
        disk_offload(model, str(tmp_path), CPU)
    for key in ("b", "a", "c"):
        swapper.activate(key)
        assert_same_output(output(LLAMA, model), fresh_output(LLAMA, folders["llama"][key]))


def test_embeddings(tmp_path: Path) -> None:
    """On which PEFT's own LoRA fails then."""
    entry = ZOO["embedding"]
    source = make_adapter(tmp_path, entry, seed=1, r=3, target_modules=["word", "mix"])
    with_peft = fresh(entry, source)
    cpu_offload(with_peft, CPU)
    with pytest.raises(RuntimeError, match="meta"):
        output(entry, with_peft)
    model = entry.build()
    cpu_offload(model, CPU)
    base = output(entry, model)
    swapper = hotslot.attach(model, {"a": source})
    for _ in range(2):
        swapper.activate("a")
        assert_same_output(output(entry, model), fresh_output(entry, source))
        swapper.deactivate()
        assert_same_output(output(entry, model), base, exact=True)


def test_what_is_saved_is_the_live_adapter(folders: Folders) -> None:
    """Before anything has run, too."""
    model, swapper = attached(ORDERS[2], LLAMA, folders["llama"])
    for key in ("c", "a"):
        swapper.activate(key)
        remove_hook_from_submodules(model)
        cpu_offload(model, CPU)
        saved = get_peft_model_state_dict(model)
        want = load_file(folders["llama"][key] / "adapter_model.safetensors")
        assert saved.keys() == want.keys()
        assert all(torch.equal(saved[name], want[name]) for name in want)
        assert_same_output(output(LLAMA, model), fresh_output(LLAMA, folders["llama"][key]))


def test_pefts_functions_and_transformers_calls(folders: Folders) -> None:
    sources = folders["llama"]
    for prepared in (False, True):
        model = fresh(LLAMA, sources["b"])
        if prepared:
            hotslot.prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
        cpu_offload(model, CPU)
        assert_same_output(output(LLAMA, model), fresh_output(LLAMA, sources["b"]))
        for key in ("c", "b"):
            hotslot.hotswap_adapter(model, sources[key], "default")
            assert_same_output(output(LLAMA, model), fresh_output(LLAMA, sources[key]))
    hotslot.patch_peft()
    try:
        plain: Any = LLAMA.build()
        plain.load_adapter(str(sources["a"]), adapter_name="style")
        cpu_offload(plain, CPU)
        for key in ("b", "c", "a"):
            plain.load_adapter(str(sources[key]), adapter_name="style", hotswap=True)
            assert_same_output(output(LLAMA, plain), fresh_output(LLAMA, sources[key]))
    finally:
        hotslot.unpatch_peft()


def test_state_dict_leaves_compiled_code_and_copies_alone(folders: Folders) -> None:
    """It is what notes that the slots are to stay."""
    backend = Backend()
    model = MLP.build()
    swapper = hotslot.attach(model, folders["mlp"])
    swapper.activate("a")
    compiled = torch.compile(model, backend=backend)
    output(MLP, compiled)
    with no_recompile():
        model.state_dict()
        assert hooks(model)
        swapper.activate("b")
        assert_same_output(output(MLP, compiled), fresh_output(MLP, folders["mlp"]["b"]))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        cpu_offload(twin, CPU)
        assert_same_output(output(MLP, twin), fresh_output(MLP, folders["mlp"]["b"]))
    swapper.detach()
    assert not hooks(model)


# -- failures --------------------------------------------------------------------------------------------------------


def attaching(order: str, folders: dict[str, Path]) -> Stage:
    model = fresh(MLP, folders["b"]) if "PEFT" in order else MLP.build()
    cpu_offload(model, CPU)
    output(MLP, model)

    def attach() -> hotslot.Swapper:
        return hotslot.attach(model, {"a": folders["a"]})

    return Stage(MLP, model, attach, lambda: attach().activate("a"), folders["a"])


@injected
@pytest.mark.parametrize("order", ORDERS[1:])
def test_an_attach_that_breaks_off_changes_nothing(
    order: str, injector: Callable[[int], Any], folders: Folders
) -> None:
    for _ in range(2):
        dry, stage = injector(0), attaching(order, folders["mlp"])
        assert attempt(stage.act, dry)
    for i, k in enumerate(chosen(dry.steps)[::20]):
        stage = attaching(order, folders["mlp"])
        before, fault = everything(stage), injector(k)
        assert not attempt(stage.act, fault)
        try:
            assert_nothing_changed(before, everything(stage))
        except AssertionError as error:
            raise AssertionError(f"after a fault at step {k}, {fault.where}: {error}") from error
        if i % 3 == 0:
            came_with = output(MLP, stage.model)
            stage.then()
            assert_same_output(output(MLP, stage.model), fresh_output(MLP, folders["mlp"]["a"]))
            swapper = hotslot.Swapper.of(stage.model)
            assert swapper is not None
            swapper.detach()
            assert all(param.is_meta for param in stage.model.parameters())
            assert_same_output(output(MLP, stage.model), came_with)


@injected
def test_the_first_swap_of_all_that_breaks_off_changes_nothing(
    injector: Callable[[int], Any], folders: Folders
) -> None:
    """In which the slots' parameters are put back."""
    sources = folders["mlp"]

    def staged() -> tuple[nn.Module, hotslot.Swapper]:
        return attached(ORDERS[0], MLP, sources)

    for _ in range(2):
        dry, (model, swapper) = injector(0), staged()
        assert attempt(partial(swapper.activate, "a"), dry)
    for k in chosen(dry.steps)[::6]:
        model, swapper = staged()
        assert not attempt(partial(swapper.activate, "a"), injector(k))
        assert_same_output(output(MLP, model), fresh_output(MLP, sources["b"]))
        swapper.activate("a")
        assert_same_output(output(MLP, model), fresh_output(MLP, sources["a"]))


# -- refusals --------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "DoRA": ("llama", {"target_modules": ["q_proj"], "use_dora": True}),
    "a saved module": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7]}}),
    "a bias of the base": ("mlp", {"target_modules": ["up"], "bias": "all"}),
    "a MultiheadAttention": ("attention", {"target_modules": ["batch_first"]}),
    "a bare parameter": ("mlp", {"target_modules": [], "target_parameters": ["up.weight"]}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_writes_or_reads_base_weights_is_refused_with_nothing_touched(what: str, tmp_path: Path) -> None:
    name, config = REFUSED[what]
    entry = ZOO[name]
    source = make_adapter(tmp_path, entry, seed=1, r=2, **config)
    model = entry.build()
    cpu_offload(model, CPU)
    before = snapshot(model)
    for route in ("side", "auto", "merged"):
        with base_left_alone(model), pytest.raises(errors.ModelError, match="offloaded layer by layer"):
            hotslot.attach(model, {"a": source}, route=route).activate("a")
        assert_unchanged(before, snapshot(model))


def test_an_offloaded_dora_is_refused_and_the_hooks_come_off(tmp_path: Path) -> None:
    """PEFT's own fails in its forward pass."""
    configs: dict[str, dict[str, Any]] = {"dora": {"use_dora": True}, "plain": {}}
    sources = {
        key: make_adapter(tmp_path / key, LLAMA, seed=1, r=2, target_modules=["q_proj"], **config)
        for key, config in configs.items()
    }
    model = LLAMA.build()
    swapper = hotslot.attach(model, sources)
    swapper.activate("plain")
    cpu_offload(model, CPU)
    for key in sources:
        with pytest.raises(errors.ModelError, match="offloaded layer by layer"):
            swapper.activate(key)
    remove_hook_from_submodules(model)
    for key, source in sources.items():
        swapper.activate(key)
        assert_same_output(output(LLAMA, model), fresh_output(LLAMA, source))


def test_another_method_is_refused(tmp_path: Path) -> None:
    loha = make_method_adapter(tmp_path, entry=LLAMA, seed=3, method="LOHA", target_modules=["q_proj"])
    model: nn.Module = fresh(LLAMA, loha)
    cpu_offload(model, CPU)
    with pytest.raises(errors.ModelError, match="offloaded layer by layer"):
        hotslot.attach(model, {"a": loha})
    assert all(param.is_meta for param in model.parameters())


def test_copies_of_embeddings(folders: Folders, tmp_path: Path) -> None:
    """Equal to the model's they say nothing; accelerate has the values to compare them with."""
    model = LLAMA.build()
    own: Any = model.get_submodule("model.embed_tokens").weight
    tensors = load_file(folders["llama"]["a"] / "adapter_model.safetensors")
    key, config = "base_model.model.model.embed_tokens.weight", folders["llama"]["a"] / "adapter_config.json"
    for name, values in (("equal", own.detach().clone()), ("other", torch.rand_like(own))):
        (tmp_path / name).mkdir()
        (tmp_path / name / config.name).write_bytes(config.read_bytes())
        save_file({**tensors, key: values}, tmp_path / name / "adapter_model.safetensors")
    cpu_offload(model, CPU)
    with base_left_alone(model), pytest.raises(errors.ModelError, match="offloaded layer by layer"):
        hotslot.attach(model, {"other": tmp_path / "other"})
    hotslot.attach(model, {"equal": tmp_path / "equal"}).activate("equal")
    assert_same_output(output(LLAMA, model), fresh_output(LLAMA, tmp_path / "equal"))


def test_whole_blocks_that_are_brought_at_once(folders: Folders) -> None:
    """accelerate looks up all that is in them by itself: slots have no hooks of their own there."""
    model = LLAMA.build()
    cpu_offload(model, CPU, preload_module_classes=["LlamaDecoderLayer"])
    before = snapshot(model)
    with pytest.raises(errors.ModelError, match="offloaded layer by layer"):
        hotslot.attach(model, {"a": folders["llama"]["a"]})
    assert_unchanged(before, snapshot(model))
    assert_same_output(output(LLAMA, model), output(LLAMA, LLAMA.build()))
