"""On a model that carries an adapter of any method: adapters of other methods, and such of its own as do not fit there.

They are merged into the base weights below it, and its layers do nothing meanwhile.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import hotslot
from compiling import Backend
from hotslot.errors import HotslotError, MergedError, UnsupportedError
from hotslot.testing import no_recompile, same_addresses
from methods import METHODS, make_method_adapter
from oracle import assert_same_output, assert_unchanged, error, fresh, snapshot
from test_all_or_nothing import Fault, LineFault, OpFault
from test_inplace import outside
from zoo import ZOO, Entry

MLP = ZOO["mlp"]
# But for two whose tensors stand in the place of the base's, and one that takes seconds to make.
RESIDENTS = sorted(
    {
        name
        for name, row in METHODS.items()
        if row.deactivates and row.merges and row.available and "llama" in row.targets
    }
    - {"LORA", "LN_TUNING", "TRAINABLE_TOKENS", "ADAMSS"}
)
# Options beside the targets, which are other modules here.
OPTIONS: dict[str, dict[str, Any]] = {"IA3": {"feedforward_modules": []}}


@pytest.fixture(autouse=True)
def advice_of_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def made(root: Path, name: str, *targets: str, seed: int, entry: Entry = MLP, **options: Any) -> Path:
    stated = {**OPTIONS.get(name, {}), **options}
    return make_method_adapter(root, name, entry, seed=seed, target_modules=list(targets), **stated)


def adapters(name: str, root: Path) -> dict[str, Path]:
    """Two of one kind, one of it on fewer modules, and two of other methods, one on a module that it leaves alone."""
    return {
        "own": made(root / "own", name, "up", "inner.2", seed=1),
        "same": made(root / "same", name, "up", "inner.2", seed=2),
        "fewer": made(root / "fewer", name, "up", seed=3),
        "lora": made(root / "lora", "LORA", "up", "down", seed=4),
        "oft": made(root / "oft", "OFT", "up", "inner.2", seed=5, oft_block_size=4),
    }


def wanted(key: str | None, folders: dict[str, Path], entry: Entry = MLP) -> Tensor:
    """In the layers a fresh load, below them what PEFT merges."""
    if key is None:
        return entry.output(entry.build().requires_grad_(False), entry.inputs())
    model: Any = fresh(entry, folders[key])
    if key not in ("own", "same"):
        model = model.merge_and_unload().requires_grad_(False)
    return entry.output(model, entry.inputs())


@pytest.mark.parametrize("name", RESIDENTS)
def test_any_follows_any(name: str, tmp_path: Path) -> None:
    folders = adapters(name, tmp_path)
    del folders["oft"]
    model = fresh(MLP, folders["own"])
    before = snapshot(model), outside(model)
    swapper, fresh_loads = hotslot.attach(model, folders), {key: wanted(key, folders) for key in (None, *folders)}
    with same_addresses(model):
        for key in ("lora", "same", "fewer", None, "lora", "own", "fewer", "lora", "same"):
            report = swapper.deactivate() if key is None else swapper.activate(key)
            assert_same_output(MLP.output(model, MLP.inputs()), fresh_loads[key], exact=True)
            assert report.route == ("side" if key in (None, "own", "same") else "merged")
    swapper.activate("lora")
    swapper.detach()
    assert_unchanged(before[0], snapshot(model))
    assert before[1] == outside(model)


def test_control_they_are_different_adapters(tmp_path: Path) -> None:
    folders = adapters("LOHA", tmp_path)
    outputs = [wanted(key, folders) for key in (None, *folders)]
    assert all(error(one, other) > 1e-3 for one in outputs for other in outputs if one is not other)


def test_nothing_compiles(tmp_path: Path) -> None:
    folders = adapters("VERA", tmp_path)
    model = fresh(MLP, folders["own"])
    swapper = hotslot.attach(model, folders)
    compiled: Any = torch.compile(model, backend=Backend())
    MLP.output(compiled, MLP.inputs())
    with no_recompile():
        for key in ("lora", "same", None, "oft", "own", "fewer"):
            swapper.deactivate() if key is None else swapper.activate(key)
            assert_same_output(MLP.output(compiled, MLP.inputs()), wanted(key, folders), exact=True)


def test_an_adapter_that_is_merged_is_not_saved_as_the_empty_one(tmp_path: Path) -> None:
    folders = adapters("LOHA", tmp_path)
    model = fresh(MLP, folders["own"])
    swapper = hotslot.attach(model, folders)
    assert swapper.fits(folders["lora"]).route == "merged"
    swapper.activate("lora")
    assert swapper.active == "lora"
    with pytest.raises(MergedError, match="merged into the base weights"):
        model.save_pretrained(str(tmp_path / "saved"))
    swapper.activate("same")
    model.save_pretrained(str(tmp_path / "saved"))
    assert_same_output(MLP.output(fresh(MLP, tmp_path / "saved"), MLP.inputs()), wanted("same", folders), exact=True)


def test_biases_go_before_another_is_merged(tmp_path: Path) -> None:
    folders = adapters("VERA", tmp_path)
    folders["same"] = made(tmp_path / "biased", "VERA", "up", "inner.2", seed=2, bias="all")
    model = fresh(MLP, folders["own"])
    swapper = hotslot.attach(model, folders)
    for key in ("same", "lora", "same", "oft", "own"):
        swapper.activate(key)
        assert_same_output(MLP.output(model, MLP.inputs()), wanted(key, folders), exact=True)
    swapper.detach()
    model = fresh(MLP, folders["same"])
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match="another method") as caught:
        hotslot.attach(model, {"lora": folders["lora"]})
    assert "lacks biases" in str(caught.value.__cause__)
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize(
    ("injector", "way"), [("line", ("same", "lora")), ("amid", ("lora", "oft")), ("line", ("lora", "same"))]
)
def test_a_swap_that_is_broken_off_has_not_happened(injector: str, way: tuple[str, str], tmp_path: Path) -> None:
    def fault(k: int) -> Any:
        return LineFault(k, KeyboardInterrupt) if injector == "line" else OpFault(k, Fault, injector)

    folders = adapters("LOHA", tmp_path)
    model = fresh(MLP, folders["own"])
    swapper = hotslot.attach(model, folders)
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
    for k in sorted({*range(1, total + 1, max(1, total // 20)), total}):
        with pytest.raises((KeyboardInterrupt, Fault)), fault(k):
            swapper.activate(second)
        assert_unchanged(before[0], snapshot(model))
        assert before[1] == outside(model)
        assert swapper.active == first
    swapper.activate(second)
    assert_same_output(MLP.output(model, MLP.inputs()), wanted(second, folders), exact=True)


# --- refused ----------------------------------------------------------------------------------------------------------


def assert_refused(model: PeftModel, folder: Path, words: str, why: str, **options: Any) -> None:
    before = snapshot(model), outside(model)
    with pytest.raises(HotslotError, match=words) as caught:
        hotslot.attach(model, {"new": folder}, **options)
    assert why in str(caught.value.__cause__ or "")
    assert_unchanged(before[0], snapshot(model))
    assert before[1] == outside(model)


def test_by_the_side_path_nothing_is_merged(tmp_path: Path) -> None:
    folders = adapters("LOHA", tmp_path)
    model = fresh(MLP, folders["own"])
    assert_refused(model, folders["lora"], "another method", "", route="side")
    assert_refused(model, folders["fewer"], "other parts", "", route="side")


def test_an_adapter_that_always_does_something_is_in_the_way(tmp_path: Path) -> None:
    folders = adapters("FOURIERFT", tmp_path)
    assert_refused(fresh(MLP, folders["own"]), folders["lora"], "another method", "cannot be made to do nothing")


def test_what_another_adapter_would_see_is_refused(tmp_path: Path) -> None:
    folders = adapters("LOHA", tmp_path)
    model = fresh(MLP, folders["own"])
    swapper = hotslot.attach(model, folders)
    model.load_adapter(str(folders["same"]), adapter_name="other")
    model.eval()
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match="another method") as caught:
        swapper.activate("lora")
    assert "another adapter on the model computes" in str(caught.value.__cause__)
    assert_unchanged(before, snapshot(model))
    swapper.activate("same")
    assert_same_output(MLP.output(model, MLP.inputs()), wanted("same", folders), exact=True)


def test_a_method_that_does_not_merge_has_no_place(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    model = fresh(entry, made(tmp_path / "own", "LOHA", "q_proj", seed=1, entry=entry))
    prompt = make_method_adapter(tmp_path / "new", "PROMPT_TUNING", entry, seed=2)
    assert_refused(model, prompt, "another method", "cannot be merged into base weights")


def test_what_the_adapter_on_the_model_would_hide_is_refused(tmp_path: Path) -> None:
    """Its copies of modules, and its rows of an embedding, stand in the place of what would be merged."""
    entry = ZOO["llama"]
    head = made(tmp_path / "head", "LOHA", "q_proj", seed=1, entry=entry, modules_to_save=["lm_head"])
    model = fresh(entry, head)
    on_head = made(tmp_path / "on_head", "LORA", "lm_head", "v_proj", seed=2, entry=entry)
    assert_refused(model, on_head, "another method", "it has a copy of lm_head")
    beside = made(tmp_path / "beside", "LORA", "v_proj", seed=3, entry=entry)
    hotslot.attach(model, {"beside": beside}).activate("beside")
    assert_same_output(entry.output(model, entry.inputs()), wanted("beside", {"beside": beside}, entry), exact=True)
    norms = make_method_adapter(tmp_path / "norms", "LN_TUNING", entry, seed=1)
    on_norms = make_method_adapter(
        tmp_path / "on_norms", "LN_TUNING", entry, seed=2, target_modules=["input_layernorm", "norm"]
    )
    assert_refused(fresh(entry, norms), on_norms, "other parts", "cannot be made to do nothing")
    tokens = make_method_adapter(tmp_path / "tokens", "TRAINABLE_TOKENS", entry, seed=1)
    embedding = made(tmp_path / "embedding", "LORA", "embed_tokens", seed=2, entry=entry)
    assert_refused(fresh(entry, tokens), embedding, "another method", "cannot be made to do nothing")


def test_layers_that_do_something_above_other_weights_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Were a method's neutral element one for the base's own weights alone, it would be found out."""
    from peft.tuners.loha.layer import Linear

    folders = adapters("LOHA", tmp_path)
    model = fresh(MLP, folders["own"])
    norm = model.base_model.model.up.base_layer.weight.norm()
    own = Linear.forward

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
        base: nn.Linear = self.get_base_layer()
        changed = base.out_features == 32 and not torch.equal(base.weight.norm(), norm)
        result: Tensor = own(self, x, *args, **options)
        return result * 2 if changed else result

    monkeypatch.setattr(Linear, "forward", forward)
    assert_refused(model, folders["lora"], "another method", "cannot be made to do nothing")
