"""Adapters of other ranks take each other's place where zeros around them are exact, and are refused where not."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import nn

import hotslot
from compiling import Backend
from hotslot.errors import DoesNotFitError, ModelError, UnsupportedError
from hotslot.testing import no_recompile, same_addresses
from methods import METHODS, make_method_adapter, method_config, tensors_of
from oracle import assert_same_output, assert_unchanged, fresh, snapshot
from test_all_or_nothing import Fault, LineFault, OpFault
from test_inplace import fresh_of, output, outside
from zoo import ZOO, Entry

EXACT = [
    (name, entry)
    for name, row in METHODS.items()
    if row.other_rank and row.available and name != "LORA"
    for entry in row.targets
    if (name, entry) != ("LOKR", "conv2d")  # whose factors are too small for two ranks
]
INJECTORS = ("line", "before", "amid")
INEXACT = [name for name, row in METHODS.items() if row.one_rank and row.available]
# Options that leave room for several ranks in small layers, or say nothing of what is tested.
MORE: dict[str, dict[str, Any]] = {"LOKR": {"decompose_factor": 2}}


@pytest.fixture(autouse=True)
def advice_of_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def of_rank(name: str, entry: Entry, folder: Path, rank: Any, seed: int, **options: Any) -> Path:
    option, _ = METHODS[name].ranks or ("", ())
    return make_method_adapter(folder, name, entry, seed=seed, **{**MORE.get(name, {}), option: rank, **options})


def three_ranks(name: str, entry: Entry, root: Path, **options: Any) -> dict[int, Path]:
    """Rank → adapter, drawn at random but always the same; in random order."""
    _, ranks = METHODS[name].ranks or ("", ())
    drawn = random.Random(f"{name} {entry.name}").sample(list(ranks), 3)
    return {
        rank: of_rank(name, entry, root / str(rank), rank, seed, **options) for seed, rank in enumerate(drawn, start=1)
    }


def ranks_of(model: nn.Module, name: str) -> set[Any]:
    option, _ = METHODS[name].ranks or ("", ())
    config: Any = model.peft_config["default"]  # type: ignore[index]
    return {getattr(config, option)}


def attached(
    name: str, root: Path, entry: Entry = ZOO["llama"]
) -> tuple[Any, hotslot.Swapper, dict[int, Path], list[int]]:
    """A model that carries an adapter of a middle rank, a swapper with one below and one above, and the ranks."""
    folders = three_ranks(name, entry, root)
    model = fresh(entry, folders[sorted(folders)[1]])
    return model, hotslot.attach(model, {str(rank): folders[rank] for rank in folders}), folders, sorted(folders)


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "entry_name"), EXACT)
def test_other_ranks_are_fresh_loads(name: str, entry_name: str, tmp_path: Path) -> None:
    entry = ZOO[entry_name]
    folders = three_ranks(name, entry, tmp_path)
    wanted = {rank: fresh_of(name, entry, folder) for rank, folder in folders.items()}
    first, *others = folders
    model = fresh(entry, folders[first])
    before, parameters = tensors_of(model), {key: id(param) for key, param in model.named_parameters()}
    beside = outside(model)
    swapper = hotslot.attach(model, {str(rank): folder for rank, folder in folders.items()})
    assert {key: id(param) for key, param in model.named_parameters()} == parameters
    assert_same_output(output(name, entry, model), wanted[first])
    with same_addresses(model):
        for rank in [*others, *random.Random(name).choices(list(folders), k=3), others[0]]:
            swapper.activate(str(rank))
            assert_same_output(output(name, entry, model), wanted[rank])
            assert ranks_of(model, name) == {rank}
    model.save_pretrained(str(tmp_path / "saved"))
    saved, given = load_peft_weights(str(tmp_path / "saved")), load_peft_weights(str(folders[others[0]]))
    assert saved.keys() == given.keys()
    assert all(torch.equal(saved[key], given[key]) for key in given), "the file is not the adapter's own"
    assert_same_output(fresh_of(name, entry, tmp_path / "saved"), wanted[others[0]], exact=True)
    swapper.detach()
    after = tensors_of(model)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert beside == outside(model)
    assert_same_output(output(name, entry, model), wanted[first], exact=True)


# What stands elsewhere than in the corner of zeros.
BLOCKS: list[tuple[str, list[dict[str, Any]]]] = [
    ("GRALORA", [{"r": 4, "gralora_k": 4}, {"r": 8, "gralora_k": 4, "hybrid_r": 0}, {"r": 16, "gralora_k": 4}]),
    ("GRALORA", [{"r": 4, "hybrid_r": 2}, {"r": 8, "hybrid_r": 6}, {"r": 6, "hybrid_r": 3}]),
    ("LILY", [{"r": 2, "num_B": 3}, {"r": 5, "num_B": 3}, {"r": 3, "num_B": 3}]),
    ("MISS", [{"r": 3}, {"r": 6}, {"r": 1}]),  # of 16 columns
    ("MISS", [{"r": 2, "init_weights": "mini", "mini_r": 4}, {"r": 8, "init_weights": "mini", "mini_r": 8}]),
]


@pytest.mark.parametrize(("name", "drawn"), BLOCKS)
def test_blocks_are_padded_one_by_one(name: str, drawn: list[dict[str, Any]], tmp_path: Path) -> None:
    entry = ZOO["llama"]
    folders = [make_method_adapter(tmp_path / str(i), name, entry, seed=i, **drawn[i]) for i in range(len(drawn))]
    model = fresh(entry, folders[0])
    before = snapshot(model), outside(model)
    swapper = hotslot.attach(model, {str(i): folder for i, folder in enumerate(folders)})
    for number in (1, 0, *range(len(drawn)), 0):
        swapper.activate(str(number))
        assert_same_output(output(name, entry, model), fresh_of(name, entry, folders[number]))
        shown, given = get_peft_model_state_dict(model), load_peft_weights(str(folders[number]))
        assert all(torch.equal(shown[key], given[key]) for key in given), "it does not show the adapter's own"
        set_peft_model_state_dict(model, given)  # which stands where it is read
        assert_same_output(output(name, entry, model), fresh_of(name, entry, folders[number]))
    swapper.activate("1")
    swapper.detach()
    assert_unchanged(before[0], snapshot(model))
    assert before[1] == outside(model)


def test_rows_that_are_repeated_have_to_fill_the_larger_ones(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    one, other = (of_rank("MISS", entry, tmp_path / str(rank), rank, rank) for rank in (6, 4))
    model = fresh(entry, one)
    before = snapshot(model)
    with pytest.raises(DoesNotFitError, match="with zeros around it"):
        hotslot.attach(model, {"other": other}, route="side")
    assert_unchanged(before, snapshot(model))


def test_ranks_differ_from_module_to_module(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    one = of_rank("LOHA", entry, tmp_path / "one", 3, 1, rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 2})
    two = of_rank("LOHA", entry, tmp_path / "two", 4, 2, rank_pattern={"v_proj": 6, "q_proj": 1})
    model = fresh(entry, one)
    swapper = hotslot.attach(model, {"two": two})
    for name, folder in (("two", two), (None, one)):
        if name is None:
            swapper.rollback()
        else:
            swapper.activate(name)
        assert_same_output(output("LOHA", entry, model), fresh_of("LOHA", entry, folder))
        model.save_pretrained(str(tmp_path / "saved"))
        assert_same_output(fresh_of("LOHA", entry, tmp_path / "saved"), fresh_of("LOHA", entry, folder), exact=True)


def test_lower_ranks_come_later(tmp_path: Path) -> None:
    """Into the room that the adapter on the model has: nothing moves, so they may on a compiled model, too."""
    entry = ZOO["llama"]
    high, low = of_rank("HIRA", entry, tmp_path / "high", 6, 1), of_rank("HIRA", entry, tmp_path / "low", 2, 2)
    model = fresh(entry, high)
    torch.compile(model, backend=Backend())
    swapper = hotslot.attach(model)
    with same_addresses(model):
        swapper.load("low", low)
        swapper.activate("low")
        assert_same_output(output("HIRA", entry, model), fresh_of("HIRA", entry, low))
        swapper.deactivate()
        wanted = output("HIRA", entry, entry.build().requires_grad_(False))
        assert_same_output(output("HIRA", entry, model), wanted, exact=True)
        swapper.rollback()
        assert_same_output(output("HIRA", entry, model), fresh_of("HIRA", entry, low))
    swapper.detach()
    assert_same_output(output("HIRA", entry, model), fresh_of("HIRA", entry, high), exact=True)


# --- what PEFT's calls show -------------------------------------------------------------------------------------------


def test_a_state_dict_has_the_live_rank_and_takes_it_back(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    model, swapper, folders, (low, _, _) = attached("VERA", tmp_path)
    swapper.activate(str(low))
    given = load_peft_weights(str(folders[low]))
    shown = model.state_dict()
    lambdas = [key for key in shown if "vera_lambda_d" in key]
    assert {shown[key].shape for key in lambdas} == {torch.Size([low])}
    twice = {key: value * 2 if "lambda" in key else value for key, value in given.items()}
    set_peft_model_state_dict(model, twice)
    wanted = fresh(entry, folders[low])
    set_peft_model_state_dict(wanted, twice)
    assert_same_output(output("VERA", entry, model), output("VERA", entry, wanted))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({key: torch.zeros(99) if key in lambdas else value for key, value in shown.items()})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_show_what_they_hold(copied: Any, tmp_path: Path) -> None:
    entry = ZOO["conv2d"]
    model, swapper, _, (low, _, high) = attached("LOHA", tmp_path, entry)
    swapper.activate(str(low))
    twin = copied(model)
    swapper.activate(str(high))
    assert {key: value.shape for key, value in twin.state_dict().items()} != {
        key: value.shape for key, value in model.state_dict().items()
    }
    twin.save_pretrained(str(tmp_path / "twin"))
    assert_same_output(fresh_of("LOHA", entry, tmp_path / "twin"), output("LOHA", entry, twin))


def test_it_is_merged_and_taken_off_as_pefts_own(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    model, swapper, folders, (low, *_) = attached("LOHA", tmp_path)
    swapper.activate(str(low))
    merged = model.merge_and_unload()
    assert_same_output(output("LOHA", entry, merged), fresh_of("LOHA", entry, folders[low]))


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LOHA", "HIRA", "VERA", "TINYLORA", "PEANUT", "GRALORA", "LILY", "MISS"])
def test_other_ranks_compile_nothing(name: str, tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    _, ranks = METHODS[name].ranks or ("", ())
    low, middle, high = sorted(random.Random(name).sample(list(ranks), 3))
    alpha = [{"alpha": rank} if name in ("LOHA", "GRALORA") else {} for rank in (low, middle, high)]
    folders = [
        of_rank(name, entry, tmp_path / str(rank), rank, rank, target_modules=["up", "inner.2"], **options)
        for rank, options in zip((low, middle, high), alpha, strict=True)
    ]
    model = fresh(entry, folders[1])
    swapper = hotslot.attach(model, {str(i): folder for i, folder in enumerate(folders)})
    compiled: Any = torch.compile(model, backend=Backend())
    output(name, entry, compiled)
    with no_recompile():
        for number in (2, 0, 1, 0, 2):
            swapper.activate(str(number))
            assert_same_output(output(name, entry, compiled), fresh_of(name, entry, folders[number]))


def test_control_without_padding_it_compiles_anew(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    first, second = (
        of_rank("HIRA", entry, tmp_path / str(rank), rank, rank, target_modules=["up", "inner.2"]) for rank in (2, 4)
    )
    model = fresh(entry, first)
    model.load_adapter(str(second), adapter_name="second")
    compiled: Any = torch.compile(model.eval(), backend=Backend())
    output("HIRA", entry, compiled)
    model.set_adapter("second")
    with pytest.raises(AssertionError), no_recompile():
        output("HIRA", entry, compiled)


# --- all or nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("injector", "name"), [*zip(INJECTORS, ["LOHA"] * 3, strict=True), ("line", "GRALORA")])
def test_a_swap_that_is_broken_off_has_not_happened(injector: str, name: str, tmp_path: Path) -> None:
    def fault(k: int) -> Any:
        return LineFault(k, KeyboardInterrupt) if injector == "line" else OpFault(k, Fault, injector)

    entry = ZOO["conv2d" if name == "LOHA" else "llama"]
    model, swapper, _, (low, _, high) = attached(name, tmp_path, entry)
    swapper.activate(str(high))
    before = snapshot(model), outside(model), {key: value.shape for key, value in model.state_dict().items()}
    counting = fault(-1)
    with counting:
        swapper.activate(str(low))
    swapper.activate(str(high))
    total = len(counting.steps)
    assert total
    for k in sorted({*range(1, total + 1, max(1, total // 40)), total}):
        with pytest.raises((KeyboardInterrupt, Fault)), fault(k):
            swapper.activate(str(low))
        assert_unchanged(before[0], snapshot(model))
        assert before[1] == outside(model)
        assert before[2] == {key: value.shape for key, value in model.state_dict().items()}
    swapper.activate(str(low))


@pytest.mark.parametrize("in_folder", [False, True])
def test_an_attach_that_is_broken_off_has_not_happened(in_folder: bool, tmp_path: Path) -> None:
    entry = ZOO["conv2d"]
    folders = three_ranks("LOHA", entry, tmp_path)
    low, middle, high = (folders[rank] for rank in sorted(folders))
    model = fresh(entry, middle)
    adapters: Any = tmp_path if in_folder else {"low": low, "high": high}
    before = snapshot(model), outside(model)
    counting = OpFault(-1, Fault, "amid")
    with counting:
        hotslot.attach(model, adapters).detach()
    assert_unchanged(before[0], snapshot(model))
    total = len(counting.steps)  # a few more than later: buffers are used again
    for k in range(1, total * 9 // 10, max(1, total // 8)):
        with pytest.raises(Fault), OpFault(k, Fault, "amid"):
            hotslot.attach(model, adapters).detach()
        if hotslot.Swapper.of(model) is not None:  # it broke off in the detach, which may be repeated
            hotslot.Swapper.of(model).detach()  # type: ignore[union-attr]
        assert_unchanged(before[0], snapshot(model))
        assert before[1] == outside(model)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INEXACT)
def test_what_zeros_would_change_is_refused_by_name(name: str, tmp_path: Path) -> None:
    entry = ZOO[next(iter(METHODS[name].targets))]
    _, ranks = METHODS[name].ranks or ("", ())
    one, other = random.Random(name).sample(list(ranks), 2)
    model = fresh(entry, of_rank(name, entry, tmp_path / "one", one, 1))
    before = snapshot(model), outside(model)
    with pytest.raises(DoesNotFitError, match="with zeros around it") as caught:
        hotslot.attach(model, {"other": of_rank(name, entry, tmp_path / "other", other, 2)}, route="side")
    for words in (name, "where: ", "found: ", "expected: ", "next step: "):
        assert words in str(caught.value)
    assert_unchanged(before[0], snapshot(model))
    assert before[1] == outside(model)


def test_room_is_made_before_compiling(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    low, high = (of_rank("LOHA", entry, tmp_path / str(r), r, r, target_modules=["up", "down"]) for r in (2, 4))
    model = fresh(entry, low)
    model.compile(backend=Backend())
    before = snapshot(model)
    with pytest.raises(DoesNotFitError, match=r"at most \(32, 2\)(.|\n)*before torch\.compile"):
        hotslot.attach(model, {"high": high}, route="side")
    swapper = hotslot.attach(model, route="side")
    assert not swapper.fits(high)
    with pytest.raises(DoesNotFitError, match=r"before torch\.compile"):
        swapper.load("high", high)
    assert_unchanged(before, snapshot(model))


def test_what_is_trained_is_not_padded(tmp_path: Path) -> None:
    entry = ZOO["mlp"]
    options = {"target_modules": ["up", "down"]}
    high = of_rank("LOHA", entry, tmp_path / "high", 4, 1, **options)
    model = get_peft_model(entry.build(), method_config("LOHA", entry, r=2, **options))
    model(**entry.inputs(1)).sum().backward()
    before = snapshot(model)
    with pytest.raises(ModelError, match="cannot be padded"):
        hotslot.attach(model, {"high": high})
    assert_unchanged(before, snapshot(model))


def test_what_another_adapter_shares_is_not_padded(tmp_path: Path) -> None:
    """VeRA's projections: one object for all adapters of a model."""
    entry = ZOO["llama"]
    low, high = of_rank("VERA", entry, tmp_path / "low", 2, 1), of_rank("VERA", entry, tmp_path / "high", 4, 2)
    model = fresh(entry, low)
    model.load_adapter(str(low), adapter_name="other")
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match="'other' on the model shares"):
        hotslot.attach(model, {"high": high}, route="side")
    assert_unchanged(before, snapshot(model))


def test_another_form_of_factors_is_refused(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    first = of_rank("LOKR", entry, tmp_path / "first", 2, 1)
    whole = of_rank("LOKR", entry, tmp_path / "whole", 8, 2)  # of as high a rank PEFT keeps the product itself
    model = fresh(entry, first)
    before = snapshot(model)
    with pytest.raises(DoesNotFitError, match="other parts"):
        hotslot.attach(model, {"whole": whole}, route="side")
    assert_unchanged(before, snapshot(model))


# --- a method of tomorrow ---------------------------------------------------------------------------------------------


def test_a_method_that_zeros_change_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Were LoHa to divide by the square root of its tensors' rank, it would be refused, though no shape says so."""
    from peft.tuners.loha.layer import LoHaLayer

    entry = ZOO["mlp"]
    low, high = (of_rank("LOHA", entry, tmp_path / str(r), r, r, target_modules=["up", "down"]) for r in (2, 4))
    model = fresh(entry, low)
    hotslot.attach(model, {"high": high}).detach()
    own = LoHaLayer.get_delta_weight

    def normalised(self: Any, adapter_name: str, **options: Any) -> torch.Tensor:
        delta: torch.Tensor = own(self, adapter_name, **options)
        return delta / self.hada_w1_b[adapter_name].shape[0] ** 0.5

    monkeypatch.setattr(LoHaLayer, "get_delta_weight", normalised)
    with pytest.raises(DoesNotFitError, match=r"LOHA(.|\n)*wrong by 0\.29"):
        hotslot.attach(model, {"high": high}, route="side")
