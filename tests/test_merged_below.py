"""`route="merged"` on a model that carries an adapter of another method than LoRA, which does nothing meanwhile.

All are merged, those of its own method and shapes too: the base's weights are PEFT's `merge_and_unload` to the bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, inject_adapter_in_model
from torch import nn

import hotslot
from compiling import Backend
from hotslot.errors import HotslotError, MergedError
from hotslot.live.skeleton import base_tree
from hotslot.testing import no_recompile, same_addresses
from methods import fresh_merge, make_method_adapter
from oracle import assert_same_output, assert_unchanged, fresh, snapshot
from test_all_or_nothing import Fault, LineFault, OpFault
from test_inplace import outside
from test_inplace_others import adapters, advice_of_peft, made  # noqa: F401  a fixture
from zoo import ZOO, Entry

MLP, LLAMA = ZOO["mlp"], ZOO["llama"]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name → values of all tensors of the base, below whatever stands on it."""
    found = {}
    for path, module in base_tree(model):
        for name, tensor in (module._parameters | module._buffers).items():
            if tensor is not None:
                found[f"{path}.{name}"] = tensor.detach().clone()
    return found


def merged(entry: Entry, folder: Path | None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A base with the weights of PEFT's fresh merge; its own where `folder` is None."""
    plain = entry.build(dtype=dtype)
    if folder is not None:
        plain.load_state_dict(fresh_merge(entry, folder, dtype=dtype), strict=False)  # it has buffers beside
    return plain


def assert_merged(model: nn.Module, entry: Entry, folder: Path | None, dtype: torch.dtype = torch.float32) -> None:
    """Weights and outputs of `merged`, to the bit."""
    plain = merged(entry, folder, dtype)
    wanted = weights(plain)
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, wanted[name]), name
    inputs = entry.inputs(dtype=dtype)
    assert_same_output(entry.output(model, inputs), entry.output(plain, inputs), exact=True)


def attached(name: str, root: Path, **options: Any) -> tuple[nn.Module, hotslot.Swapper, dict[str, Path]]:
    folders = adapters(name, root)
    model = fresh(MLP, folders["own"])
    return model, hotslot.attach(model, folders, route="merged", **options), folders


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("IA3", torch.float32),
        ("LOHA", torch.float32),
        ("LOHA", torch.bfloat16),
        ("OFT", torch.float32),
        ("VERA", torch.bfloat16),
    ],
)
def test_any_follows_any(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folders = adapters(name, tmp_path)
    model = fresh(MLP, folders["own"], dtype=dtype)
    before = snapshot(model), outside(model)
    swapper = hotslot.attach(model, folders, route="merged")
    assert_unchanged(before[0], snapshot(model))
    draw = random.Random(name)
    live: str | None = "default"
    with same_addresses(model):
        for key in draw.choices([None, *folders], k=6):
            report = swapper.deactivate() if key is None else swapper.activate(key)
            assert_merged(model, MLP, folders[key] if key else None, dtype)
            assert (report.route, swapper.active) == ("merged" if key else "side", key)
            live = key
        swapper.activate("own" if live != "own" else "same")
        assert swapper.rollback().adapter == live
        assert_merged(model, MLP, folders[live] if live else None, dtype)
    swapper.detach()
    assert_unchanged(before[0], snapshot(model))
    assert before[1] == outside(model)


def test_control_auto_puts_its_own_in_place(tmp_path: Path) -> None:
    folders = adapters("LOHA", tmp_path)
    swapper = hotslot.attach(fresh(MLP, folders["own"]), folders)
    assert swapper.activate("own").route == "side"
    assert swapper.fits(folders["same"]).route == "side"


def test_the_first_swap_is_undone_to_the_adapter_that_came(tmp_path: Path) -> None:
    folders = adapters("LOHA", tmp_path)
    model = fresh(MLP, folders["own"])
    before = snapshot(model), outside(model)
    swapper = hotslot.attach(model, folders, route="merged")
    assert swapper.fits(folders["own"]).route == "merged"
    swapper.activate("own")
    with pytest.raises(MergedError, match="merged into the base weights"):
        model.save_pretrained(str(tmp_path / "saved"))
    with swapper.using("oft"):
        assert_merged(model, MLP, folders["oft"])
    assert_merged(model, MLP, folders["own"])
    swapper.activate("lora")
    swapper.rollback()
    assert_merged(model, MLP, folders["own"])
    swapper.rollback()
    assert_merged(model, MLP, folders["lora"])
    swapper.detach()
    swapper = hotslot.attach(model, folders, route="merged")
    swapper.activate("lora")
    swapper.rollback()
    assert_unchanged(before[0], snapshot(model))
    assert before[1] == outside(model)


def test_heads_and_layers_that_it_leaves_alone(tmp_path: Path) -> None:
    folders = {
        "own": made(tmp_path / "own", "LOHA", "q_proj", seed=1, entry=LLAMA),
        "head": made(tmp_path / "head", "LORA", "v_proj", seed=2, entry=LLAMA, modules_to_save=["lm_head"]),
        "norms": make_method_adapter(tmp_path / "norms", "LN_TUNING", LLAMA, seed=3),
    }
    model = fresh(LLAMA, folders["own"])
    swapper = hotslot.attach(model, folders, route="merged")
    for key in ("head", "norms", None, "own", "head"):
        swapper.activate(key) if key else swapper.deactivate()
        assert_merged(model, LLAMA, folders[key] if key else None)


def test_layers_without_pefts_model_around_them(tmp_path: Path) -> None:
    """As diffusers and transformers put them into their models."""
    folders = adapters("LOHA", tmp_path)
    model = MLP.build()
    inject_adapter_in_model(LoHaConfig(r=4, alpha=3, target_modules=["up", "inner.2"]), model)
    nn.init.normal_(model.get_submodule("up.hada_w2_a").get_parameter("default"))
    before = snapshot(model.eval())
    swapper = hotslot.attach(model, folders, route="merged")
    for key in ("own", "lora", None, "oft"):
        swapper.activate(key) if key else swapper.deactivate()
        assert_merged(model, MLP, folders[key] if key else None)
    swapper.detach()
    assert_unchanged(before, snapshot(model))


def test_blends_of_what_is_merged(tmp_path: Path) -> None:
    model, swapper, folders = attached("LOHA", tmp_path)
    second = made(tmp_path / "second", "LORA", "up", seed=9)
    swapper.load("second", second)
    plain = MLP.build()
    beside = hotslot.attach(plain, {"lora": folders["lora"], "second": second}, route="merged")
    for blend in ({"lora": 0.5, "second": 2.0}, {"lora": -1.0, "second": 1.0}):
        for one in (swapper, beside):
            one.activate(blend)
        wanted = weights(plain)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(model).items())
        assert_same_output(MLP.output(model, MLP.inputs()), MLP.output(plain, MLP.inputs()), exact=True)
    swapper.activate("second")
    assert_merged(model, MLP, second)
    with pytest.raises(HotslotError, match="do not add up"):
        swapper.activate({"second": 0.5, "own": 0.5})
    assert_merged(model, MLP, second)


def test_nothing_compiles(tmp_path: Path) -> None:
    model, swapper, folders = attached("VERA", tmp_path)
    backend = Backend()
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    MLP.output(compiled, MLP.inputs())
    with no_recompile():
        for key in ("own", "lora", None, "oft"):
            swapper.activate(key) if key else swapper.deactivate()
            wanted = MLP.output(merged(MLP, folders[key] if key else None), MLP.inputs())
            assert_same_output(MLP.output(compiled, MLP.inputs()), wanted, exact=True)
    assert backend.graphs == 1


def test_what_a_plan_says_of_merging_is_heard(tmp_path: Path) -> None:
    folders = adapters("LOHA", tmp_path)
    model = fresh(MLP, folders["own"])
    before = snapshot(model)
    for route in ("merged", "auto"):
        with pytest.raises(HotslotError, match="no checkpoint"):
            hotslot.attach(model, {"lora": folders["lora"]}, route=route, plan=hotslot.plan(model, pristine="file"))
        assert_unchanged(before, snapshot(model))
    plan = hotslot.plan(model, pristine="host", merge="fused")
    swapper = hotslot.attach(model, folders, route="merged", plan=plan)
    swapper.activate("lora")
    assert swapper.plan.pristine == "host"
    for name, tensor in fresh_merge(MLP, folders["lora"]).items():
        assert torch.allclose(dict(weights(model))[name], tensor, rtol=1e-5, atol=1e-6)
    with pytest.raises(HotslotError, match="no slots"):
        hotslot.attach(fresh(MLP, folders["own"]), plan=hotslot.plan(MLP.build(), folders["lora"]), route="merged")


@pytest.mark.parametrize(("injector", "way"), [("line", ("own", "lora")), ("amid", ("lora", "own"))])
def test_a_swap_that_is_broken_off_has_not_happened(injector: str, way: tuple[str, str], tmp_path: Path) -> None:
    def fault(k: int) -> Any:
        return LineFault(k, KeyboardInterrupt) if injector == "line" else OpFault(k, Fault, injector)

    model, swapper, folders = attached("LOHA", tmp_path)
    first, second = way
    swapper.activate(second)
    swapper.activate(first)
    before = snapshot(model), outside(model)
    counting = fault(-1)
    with counting:
        swapper.activate(second)
    swapper.activate(first)
    # Then the swap has happened, and the books are kept.
    books = (i for i, step in enumerate(counting.steps) if step.endswith("in nbytes"))
    total = next(books, len(counting.steps))
    assert total
    for k in sorted({*range(1, total + 1, max(1, total // 15)), total}):
        with pytest.raises((KeyboardInterrupt, Fault)), fault(k):
            swapper.activate(second)
        assert_unchanged(before[0], snapshot(model))
        assert before[1] == outside(model)
        assert swapper.active == first
    swapper.activate(second)
    assert_merged(model, MLP, folders[second])


# --- refused ----------------------------------------------------------------------------------------------------------


def always_active(root: Path) -> tuple[nn.Module, Path]:
    folders = adapters("FOURIERFT", root)
    return fresh(MLP, folders["own"]), folders["same"]


def no_merge(root: Path) -> tuple[nn.Module, Path]:
    own = made(root / "own", "LOHA", "q_proj", seed=1, entry=LLAMA)
    return fresh(LLAMA, own), make_method_adapter(root / "new", "PROMPT_TUNING", LLAMA, seed=2)


def hidden(root: Path) -> tuple[nn.Module, Path]:
    own = made(root / "own", "LOHA", "q_proj", seed=1, entry=LLAMA, modules_to_save=["lm_head"])
    return fresh(LLAMA, own), made(root / "new", "LORA", "lm_head", seed=2, entry=LLAMA)


def seen(root: Path) -> tuple[nn.Module, Path]:
    folders = adapters("LOHA", root)
    model = fresh(MLP, folders["own"])
    model.load_adapter(str(folders["same"]), adapter_name="other")
    return model.eval(), folders["lora"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (always_active, "cannot be made to do nothing"),
        (no_merge, "cannot be merged into base weights"),
        (hidden, "it has a copy of lm_head"),
        (seen, "another adapter on the model computes"),
    ],
)
def test_what_would_be_wrong_is_refused_with_nothing_touched(
    make: Callable[[Path], tuple[nn.Module, Path]], words: str, tmp_path: Path
) -> None:
    model, new = make(tmp_path)
    before = snapshot(model), outside(model)
    with pytest.raises(HotslotError, match=words):
        hotslot.attach(model, {"new": new}, route="merged")
    assert_unchanged(before[0], snapshot(model))
    assert before[1] == outside(model)
