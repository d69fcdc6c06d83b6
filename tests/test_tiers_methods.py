"""Of a folder of adapters of any method one file of each family is read at attach, the others when they are needed."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hotslot
from hotslot import Cache
from hotslot.errors import DoesNotFitError, HotslotError, MergedError, NonFiniteError, UnsupportedError
from hotslot.testing import same_addresses
from methods import make_method_adapter
from oracle import assert_same_output, assert_unchanged, fresh, snapshot
from test_inplace import outside
from test_inplace_others import made
from zoo import ZOO, Entry

WEIGHTS = "adapter_model.safetensors"
MLP = ZOO["mlp"]


@pytest.fixture(autouse=True)
def advice_of_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def gallery(name: str, root: Path) -> dict[str, Path]:
    """Two families of the method, of three and two adapters, and one of LoRA, of two; the first of each has "0"."""
    folders = [made(root / f"one{i}", name, "up", "inner.2", seed=i) for i in range(3)]
    folders += [made(root / f"fewer{i}", name, "up", seed=3 + i) for i in range(2)]
    folders += [made(root / f"lora{i}", "LORA", "up", "down", seed=5 + i) for i in range(2)]
    return {folder.name: folder for folder in folders}


def damage(folders: dict[str, Path]) -> dict[str, bytes]:
    """Let no value be a number in any but the first of each family; what the headers say stays. Returns the files."""
    sound = {}
    for name, folder in folders.items():
        if not name.endswith("0"):
            sound[name] = (folder / WEIGHTS).read_bytes()
            begin = 8 + int.from_bytes(sound[name][:8], "little")
            (folder / WEIGHTS).write_bytes(sound[name][:begin] + b"\xff" * (len(sound[name]) - begin))
    return sound


def wanted(folder: Path | None, *, in_place: bool, entry: Entry = MLP) -> torch.Tensor:
    """Of a fresh load, or of what PEFT merges."""
    model: Any = entry.build().requires_grad_(False) if folder is None else fresh(entry, folder)
    if folder is not None and not in_place:
        model = model.merge_and_unload().requires_grad_(False)
    return entry.output(model, entry.inputs())


def carrying(folder: Path | None, entry: Entry = MLP) -> nn.Module:
    return entry.build().eval() if folder is None else fresh(entry, folder)


# What the model carries, how it is attached, and what of that method's own adapters is then in its layers.
CASES = [
    ("IA3", True, "auto", {"one"}),
    ("LOHA", True, "auto", {"one"}),
    ("OFT", True, "auto", {"one"}),
    ("VERA", True, "auto", {"one"}),
    ("SHIRA", True, "auto", {"one"}),  # whose layers PEFT does not make without values
    ("LOHA", True, "merged", set()),
    ("LOHA", False, "auto", set()),
    ("OFT", False, "merged", set()),
]


@pytest.mark.parametrize(("name", "carried", "route", "in_place"), CASES)
def test_one_file_of_a_family_is_read(name: str, carried: bool, route: str, in_place: set[str], tmp_path: Path) -> None:
    folders = gallery(name, tmp_path)
    sound = damage(folders)
    model = carrying(folders["one0"] if carried else None)
    before = snapshot(model), outside(model)
    with pytest.raises(NonFiniteError):  # control: one by one they are all read, and refused
        hotslot.attach(model, folders, route=route)
    assert_unchanged(before[0], snapshot(model))
    swapper = hotslot.attach(model, tmp_path, route=route)
    if carried:
        assert_unchanged(before[0], snapshot(model))
    assert set(swapper.adapters) == folders.keys()
    assert swapper.metrics().host_adapters == 3
    assert swapper.metrics().misses == 0

    swapper.activate("one0")
    live = snapshot(model), outside(model)
    for damaged in sound:
        with pytest.raises(NonFiniteError, match=damaged):
            swapper.activate(damaged)
        assert_unchanged(live[0], snapshot(model))
        assert live[1] == outside(model)
    for damaged, file in sound.items():
        (folders[damaged] / WEIGHTS).write_bytes(file)
    with same_addresses(model):
        for key in [*folders, *reversed(folders)]:
            report = swapper.activate(key)
            own = key[:-1] in in_place
            lora = key.startswith("lora") and not carried and route == "auto"
            assert report.route == ("side" if own or lora else "merged")
            assert_same_output(
                MLP.output(model, MLP.inputs()), wanted(folders[key], in_place=own or lora), exact=not lora
            )
        assert swapper.metrics().misses == len(sound)
        swapper.deactivate()
        assert_same_output(MLP.output(model, MLP.inputs()), wanted(None, in_place=False), exact=True)
    swapper.detach()
    assert_unchanged(before[0], snapshot(model))
    assert before[1] == outside(model)


def test_room_is_made_for_ranks_of_which_only_the_header_is_known(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    ranks = {f"r{rank}-{seed}": (rank, seed) for rank in (2, 4, 8) for seed in (0, 1)}
    folders = {
        key: make_method_adapter(tmp_path / key, "LOHA", entry, r=rank, seed=10 * rank + seed)
        for key, (rank, seed) in ranks.items()
    }
    model = fresh(entry, folders["r4-0"])
    before = snapshot(model), outside(model)
    swapper = hotslot.attach(model, tmp_path, route="side")
    assert swapper.metrics().host_adapters == 3
    with same_addresses(model):
        for key in ("r8-1", "r2-1", "r4-1", "r8-0"):
            assert swapper.activate(key).tier == ("host" if key.endswith("0") else "disk")
            assert_same_output(entry.output(model, entry.inputs()), wanted(folders[key], in_place=True, entry=entry))
    swapper.detach()
    assert_unchanged(before[0], snapshot(model))
    assert before[1] == outside(model)


def test_a_budget_counts_for_them_too(tmp_path: Path) -> None:
    """Also where adapters are given one by one: with a budget they are known by their headers."""
    folders = {f"a{i}": made(tmp_path / f"a{i}", "LOHA", "up", "inner.2", seed=i) for i in range(6)}
    model = fresh(MLP, folders["a0"])
    first = hotslot.attach(model, folders)
    nbytes = first.host_bytes // 6
    first.detach()
    swapper = hotslot.attach(model, folders, cache=Cache(host_bytes=int(3.2 * nbytes)))
    assert swapper.metrics().host_adapters == 1
    for key in [*folders, *reversed(folders)]:
        swapper.activate(key)
        assert_same_output(MLP.output(model, MLP.inputs()), wanted(folders[key], in_place=True), exact=True)
        swapper.check_integrity()
    assert swapper.metrics().evictions


@pytest.mark.parametrize("wrong", ["method", "values", "rank"])
def test_a_family_that_does_not_fit_is_refused_with_nothing_touched(wrong: str, tmp_path: Path) -> None:
    """Also where room was made already for one that would have fitted."""
    one = made(tmp_path / "own", "HIRA", "up", "inner.2", seed=1, r=4)
    model = fresh(MLP, one)
    before = snapshot(model), outside(model)
    folder = tmp_path / "gallery"
    made(folder / "a", "HIRA", "up", "inner.2", seed=2, r=8)
    kinds: dict[str, tuple[type[HotslotError], str]] = {
        "method": (UnsupportedError, "another method"),
        "values": (NonFiniteError, "not finite"),
        "rank": (DoesNotFitError, "other parts"),
    }
    if wrong == "method":
        made(folder / "b", "LORA", "up", seed=3)
    elif wrong == "values":
        damage({"b": made(folder / "b", "HIRA", "up", "inner.2", seed=3, r=2)})
    else:
        made(folder / "b", "HIRA", "up", seed=3, r=2)
    with pytest.raises(kinds[wrong][0], match=kinds[wrong][1]):
        hotslot.attach(model, folder, route="side")
    assert_unchanged(before[0], snapshot(model))
    assert before[1] == outside(model)
    assert hotslot.Swapper.of(model) is None
    shutil.rmtree(folder / "b")
    hotslot.attach(model, folder, route="side").activate("a")
    assert_same_output(MLP.output(model, MLP.inputs()), wanted(folder / "a", in_place=True))


@pytest.mark.parametrize("route", ["auto", "merged"])
def test_an_adapter_that_pefts_call_has_merged_is_refused_with_nothing_touched(route: str, tmp_path: Path) -> None:
    folders = gallery("LOHA", tmp_path)
    model: Any = fresh(MLP, folders["one0"])
    model.merge_adapter()
    before = snapshot(model), outside(model)
    with pytest.raises(MergedError):
        hotslot.attach(model, tmp_path, route=route)
    assert_unchanged(before[0], snapshot(model))
    assert before[1] == outside(model)
    assert hotslot.Swapper.of(model) is None
    model.unmerge_adapter()
    hotslot.attach(model, tmp_path, route=route).activate("one1")
    assert_same_output(MLP.output(model, MLP.inputs()), wanted(folders["one1"], in_place=route == "auto"))
