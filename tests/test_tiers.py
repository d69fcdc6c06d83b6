"""Of adapters that are known some wait in memory: whatever goes and comes, what is live is right and bytes are kept."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hotslot
from adapters import make_adapter
from compiling import Backend
from hotslot import Cache
from hotslot.cache.packed import PackedFiles
from hotslot.errors import AdapterNotFoundError, CacheFullError, ChangedError, NonFiniteError, UnknownAdapterError
from hotslot.testing import no_recompile, same_addresses
from hotslot.watching import Watch
from methods import make_method_adapter
from oracle import assert_same_output, assert_unchanged, error, fresh_output, snapshot
from zoo import ZOO

MLP = ZOO["mlp"]
INPUTS = MLP.inputs()
WEIGHTS = "adapter_model.safetensors"
COUNT = 12


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve adapters in one folder: eight of one family, two of another, two of a third."""
    folder = tmp_path_factory.mktemp("gallery")
    for i in range(COUNT):
        family: dict[str, Any] = {"r": 4, "target_modules": ["up", "down"]}
        if i in (4, 5):
            family = {"r": 8, "target_modules": ["up"], "use_rslora": True}
        elif i in (8, 9):
            family = {"r": 2, "lora_alpha": 7, "target_modules": ["up", "down"]}
        make_adapter(folder / f"a{i:02}", MLP, seed=i, **family)
    return folder


@pytest.fixture
def own(gallery: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be changed."""
    return Path(shutil.copytree(gallery, tmp_path / "own"))


def size(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS).values())


def largest(gallery: Path) -> int:
    return max(size(path) for path in gallery.iterdir())


def attached(gallery: Path, adapters: float, **options: Any) -> tuple[Any, hotslot.Swapper]:
    """With room for so many of the largest adapters; a file's header is counted until the file is read."""
    model = MLP.build()
    budget = int(adapters * largest(gallery))
    return model, hotslot.attach(model, gallery, cache=Cache(host_bytes=budget), **options)


def assert_live(model: Any, swapper: hotslot.Swapper, gallery: Path) -> None:
    expected = (
        MLP.output(MLP.build(), INPUTS) if swapper.active is None else fresh_output(MLP, gallery / swapper.active)
    )
    assert_same_output(MLP.output(model, INPUTS), expected)
    swapper.check_integrity()


# --- a folder -------------------------------------------------------------------------------------------------------


def test_a_folder_is_known_by_its_headers_and_read_when_needed(gallery: Path) -> None:
    model = MLP.build()
    swapper = hotslot.attach(model, gallery)
    assert swapper.adapters == tuple(f"a{i:02}" for i in range(COUNT))
    assert swapper.metrics().host_adapters == 3, "one of each family, which proves that all fit"
    assert swapper.host_bytes == sum(size(gallery / name) for name in ("a00", "a04", "a08"))
    with same_addresses(model):
        for name in swapper.adapters:
            report = swapper.activate(name)
            assert report.tier == ("host" if name in ("a00", "a04", "a08") else "disk")
            assert_live(model, swapper, gallery)
    assert swapper.activate("a01").tier == "host"
    assert swapper.metrics().misses == COUNT - 3
    assert swapper.metrics().hits == 4


def test_the_working_directory_may_change(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two relative paths one would be another adapter's, and the other nobody's."""
    shutil.copytree(own / "a02", tmp_path / "elsewhere" / "own" / "a01")
    monkeypatch.chdir(tmp_path)
    model = MLP.build()
    swapper = hotslot.attach(model, "own", cache=Cache(disk_bytes=1 << 20, folder="packed"))
    swapper.load("a03", "own/a03", lazy=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("a01", "a03"):
        swapper.activate(name)
        assert_live(model, swapper, own)
    swapper._library.finish_packing()
    assert not (tmp_path / "elsewhere" / "packed").exists()


def test_a_folder_may_be_given_as_text_and_hold_other_things(own: Path) -> None:
    (own / "notes").mkdir()
    (own / "readme.txt").write_text("adapters")
    os.rename(own / "a11", own / ".a11")
    swapper = hotslot.attach(MLP.build(), str(own))
    assert len(swapper.adapters) == COUNT - 1
    with pytest.raises(AdapterNotFoundError, match="No folder of adapters"):
        hotslot.attach(MLP.build(), own / "nowhere")
    with pytest.raises(AdapterNotFoundError, match="a00 is an adapter"):
        hotslot.attach(MLP.build(), own / "a00")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be another user")
def test_a_folder_may_hold_one_that_nobody_may_look_into(gallery: Path) -> None:
    """As the root of a file system does: lost+found."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = Path(shutil.copytree(gallery, Path(place) / "own"))
        os.chmod(folder, 0o755)
        for path in folder.glob(f"*/{WEIGHTS}"):
            path.chmod(0o644)  # safetensors writes for its user alone
        (folder / "lost+found").mkdir(mode=0o700)
        os.seteuid(65534)
        try:
            swapper = hotslot.attach(MLP.build(), folder)
        finally:
            os.seteuid(0)
        assert len(swapper.adapters) == COUNT


def test_what_is_wrong_with_values_shows_when_they_are_read_and_changes_nothing(own: Path) -> None:
    tensors = load_file(own / "a01" / WEIGHTS)
    next(iter(tensors.values()))[0] = torch.nan
    save_file(tensors, own / "a01" / WEIGHTS, {"format": "pt"})
    model = MLP.build()
    swapper = hotslot.attach(model, own)
    swapper.activate("a02")
    before = snapshot(model)
    with pytest.raises(NonFiniteError):
        swapper.activate("a01")
    assert_unchanged(before, snapshot(model))
    assert_live(model, swapper, own)
    swapper.activate("a03")
    assert_live(model, swapper, own)


def test_a_header_that_is_wrong_is_refused_with_nothing_touched(own: Path) -> None:
    weights = own / "a07" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-4])
    model = MLP.build()
    before = snapshot(model)
    with pytest.raises(hotslot.errors.CorruptFileError, match="a07"):
        hotslot.attach(model, own)
    assert_unchanged(before, snapshot(model))
    assert hotslot.Swapper.of(model) is None


# --- a budget for host memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_done_within_a_budget_what_is_live_is_right(gallery: Path, seed: int) -> None:
    """Beside a plain record of what should be live; the bytes are checked after each step."""
    rng = Random(seed)
    adapters = 3.2 if seed % 2 else 4.5  # three for swaps, and one that is pinned
    model, swapper = attached(gallery, adapters)
    names, pinned = list(swapper.adapters), set[str]()
    for _ in range(60):
        name = rng.choice(names)
        match rng.randrange(10):
            case 0:
                with swapper.using(name), swapper.using(rng.choice([*names, None])):
                    assert_live(model, swapper, gallery)
            case 1:
                swapper.deactivate()
            case 2:
                with pytest.raises(CacheFullError) if name in (swapper.active, *pinned) else suppress(CacheFullError):
                    swapper.evict(name)
            case 3 if adapters > 4 and not pinned:
                swapper.pin(name)
                pinned.add(name)
            case 4 if pinned:
                swapper.unpin(pinned.pop())
            case 5:
                assert swapper.prefetch(name).result() == "host"
            case 6 if name not in (swapper.active, *pinned):
                swapper.unload(name)
                swapper.load(name, gallery / name, lazy=rng.random() < 0.5)
            case 7 if swapper.metrics().changed:
                swapper.rollback()
            case _:
                swapper.activate(name)
                assert swapper.active == name
        assert_live(model, swapper, gallery)
    assert swapper.metrics().evictions
    swapper.detach()
    assert swapper.host_bytes == 0


def test_what_has_gone_from_memory_is_gone(gallery: Path) -> None:
    _, swapper = attached(gallery, 3.2)
    swapper.activate("a01")
    data = weakref.ref(swapper.engine.live.entry.adapter.checkpoint)
    for name in ("a02", "a03"):
        swapper.activate(name)
        gc.collect()
        assert data() is not None, "live before: rollback and the undoing of a swap need it" if name == "a02" else ""
    swapper.activate("a06")
    gc.collect()
    assert data() is None
    assert swapper.host_bytes <= 3.2 * largest(gallery)


@pytest.mark.parametrize("how", ["unload", "evict", "budget"])
def test_what_was_loaded_and_has_gone_from_memory_is_gone(gallery: Path, how: str) -> None:
    _, swapper = attached(gallery, 3.2)
    swapper.load("new", gallery / "a01")
    data = weakref.ref(swapper._library.peek("new").adapter.checkpoint)  # type: ignore[union-attr]
    if how == "budget":
        for name in ("a02", "a03", "a06"):
            swapper.activate(name)
    else:
        getattr(swapper, how)("new")
    gc.collect()
    assert data() is None
    swapper.check_integrity()


def test_what_is_replaced_while_it_is_live_counts_until_rollback_needs_it_no_more(gallery: Path) -> None:
    model = MLP.build()
    swapper = hotslot.attach(model, {"a": gallery / "a00", "b": gallery / "a01"})
    both = swapper.host_bytes
    swapper.activate("a")
    swapper.load("a", gallery / "a02")
    assert swapper.host_bytes == both + size(gallery / "a00")
    swapper.activate("b")
    assert swapper.host_bytes == both + size(gallery / "a00"), "it was live before"
    swapper.activate("a")
    assert swapper.host_bytes == both


def test_less_room_than_for_three_is_refused_with_nothing_touched(gallery: Path) -> None:
    model, swapper = attached(gallery, 2.5)
    swapper.activate("a00")
    swapper.activate("a01")
    before = snapshot(model)
    with pytest.raises(CacheFullError, match="'a02' does not fit into host memory"):
        swapper.activate("a02")
    assert_unchanged(before, snapshot(model))
    assert_live(model, swapper, gallery)
    swapper.rollback()
    assert swapper.active == "a00"
    assert_live(model, swapper, gallery)


def test_room_for_three_is_enough_to_replace_what_is_in_memory(gallery: Path) -> None:
    """What has the name goes for the new one: both had to fit beside what is live and what was before."""
    model = MLP.build()
    each, header = size(gallery / "a00"), 1000  # which counts until the file is read
    names = {name: gallery / name for name in ("a00", "a01", "a02")}
    swapper = hotslot.attach(model, names, cache=Cache(host_bytes=3 * each + header))
    for name in ("a00", "a01"):
        swapper.activate(name)
    swapper.prefetch("a02").result()
    assert swapper.host_bytes == 3 * each
    swapper.load("a02", gallery / "a03")
    swapper.check_integrity()
    swapper.activate("a02")
    assert_same_output(MLP.output(model, INPUTS), fresh_output(MLP, gallery / "a03"))
    with pytest.raises(CacheFullError):  # it is live, and so is what it was before: neither goes
        swapper.load("a02", gallery / "a04")
    assert_same_output(MLP.output(model, INPUTS), fresh_output(MLP, gallery / "a03"))


def test_adapters_given_as_tensors_stay_and_are_refused_beyond_the_budget(gallery: Path) -> None:
    model, swapper = attached(gallery, 4.2)
    config = json.loads((gallery / "a00" / "adapter_config.json").read_text())
    swapper.load("mine", load_file(gallery / "a00" / WEIGHTS), config=config)
    for name in swapper.adapters * 2:
        swapper.activate(name)
        if name != "mine":
            assert_live(model, swapper, gallery)
    with pytest.raises(CacheFullError, match="cannot leave"):
        swapper.evict("mine")
    for name in ("second", "third"):
        swapper.load(name, load_file(gallery / "a01" / WEIGHTS), config=config)
    with pytest.raises(CacheFullError):
        swapper.load("fourth", load_file(gallery / "a02" / WEIGHTS), config=config)
    assert "fourth" not in swapper.adapters
    swapper.check_integrity()
    swapper.unload("second")
    swapper.load("fourth", load_file(gallery / "a02" / WEIGHTS), config=config)
    swapper.activate("fourth")
    assert_same_output(MLP.output(model, INPUTS), fresh_output(MLP, gallery / "a02"))


def test_an_update_within_a_budget(gallery: Path) -> None:
    model, swapper = attached(gallery, 3.2)
    for i, name in enumerate(("a01", "a02", "a03", "a06", "a07")):
        swapper.activate("a00")
        report = swapper.update("a00", load_file(gallery / name / WEIGHTS))
        assert report is not None
        assert report.changed
        assert_same_output(MLP.output(model, INPUTS), fresh_output(MLP, gallery / name))
        swapper.check_integrity()
        assert swapper.metrics().host_adapters <= 3, i
    swapper.activate("a10")
    with pytest.raises(CacheFullError, match="cannot leave"):
        swapper.evict("a00")


def test_pinned_adapters_stay(gallery: Path) -> None:
    _, swapper = attached(gallery, 4.2)
    swapper.pin("a11")
    swapper.load("a11", gallery / "a11", lazy=True)
    assert swapper.prefetch("a11").result() == "host", "a name is pinned, whatever it stands for"
    for name in swapper.adapters[:11]:
        swapper.activate(name)
    assert swapper.activate("a11").tier == "host"
    swapper.activate("a00")
    swapper.unpin("a11")
    for name in swapper.adapters[1:5]:
        swapper.activate(name)
    assert swapper.activate("a11").tier == "disk"
    for call in (swapper.pin, swapper.unpin, swapper.evict, swapper.prefetch):
        with pytest.raises(UnknownAdapterError):
            call("nobody")


def test_an_eviction_that_is_refused_lets_go_of_no_blend(gallery: Path) -> None:
    model = MLP.build()
    swapper = hotslot.attach(model, gallery, plan=hotslot.plan(model, gallery))
    swapper.activate({"a01": 0.5, "a02": 1.0})
    swapper.activate("a01")
    held = swapper.host_bytes
    with pytest.raises(CacheFullError, match="cannot leave"):
        swapper.evict("a01")
    assert swapper.host_bytes == held
    swapper.activate("a03")
    swapper.activate("a06")
    held = swapper.host_bytes
    assert swapper.evict("a01")
    assert swapper.host_bytes < held - size(gallery / "a01"), "with the blend, which nobody could make anew"


def test_what_is_prefetched_is_not_read_when_it_is_activated(gallery: Path) -> None:
    _, swapper = attached(gallery, 4.2)
    for name in ("a01", "a02"):
        assert swapper.activate(name).tier == "disk"
    assert swapper.prefetch("a03").result(timeout=60) == "host"
    assert swapper.activate("a03").tier == "host"


def test_evicted_adapters_are_read_again(gallery: Path) -> None:
    model, swapper = attached(gallery, 8)
    for name in ("a01", "a02", "a03"):
        swapper.activate(name)
    assert swapper.evict("a01")
    assert not swapper.evict("a01"), "it has gone already"
    for name in ("a02", "a03"):
        with pytest.raises(CacheFullError, match="cannot leave"):
            swapper.evict(name)
    assert swapper.activate("a01").tier == "disk"
    assert_live(model, swapper, gallery)


def test_files_that_have_changed_are_not_taken_for_what_was_loaded(own: Path) -> None:
    model, swapper = attached(own, 8)
    version = swapper.activate("a01").version
    swapper.activate("a02")
    swapper.activate("a03")
    shutil.copy(own / "a02" / WEIGHTS, own / "a01" / WEIGHTS)
    swapper.evict("a01")
    before = snapshot(model)
    with pytest.raises(ChangedError, match="'a01' have changed since") as caught:
        swapper.activate("a01")
    assert version is not None
    assert version in str(caught.value)
    assert_unchanged(before, snapshot(model))
    swapper.load("a01", own / "a01")
    assert swapper.activate("a01").version != version
    assert_live(model, swapper, own)
    shutil.rmtree(own / "a04")
    swapper.evict("a04")
    with pytest.raises(AdapterNotFoundError):
        swapper.activate("a04")
    assert_live(model, swapper, own)


def test_blends_count_and_outlive_what_they_were_made_from(gallery: Path) -> None:
    model = MLP.build()
    plan = hotslot.plan(model, gallery)
    assert plan.slots == hotslot.plan(model, {path.name: path for path in gallery.iterdir()}).slots
    other = MLP.build()
    unlimited = hotslot.attach(other, gallery, plan=plan)
    swapper = hotslot.attach(model, gallery, plan=plan, cache=Cache(host_bytes=int(7.2 * largest(gallery))))
    rng = Random(0)
    for _ in range(25):
        blend = {name: rng.choice([0.5, 0.7, 1.0]) for name in rng.sample(swapper.adapters, rng.choice([1, 2]))}
        swapper.activate(blend)
        unlimited.activate(blend)
        swapper.check_integrity()
        assert torch.equal(MLP.output(model, INPUTS), MLP.output(other, INPUTS)), blend
    assert swapper.metrics().evictions
    swapper.deactivate()
    assert_live(model, swapper, gallery)


def test_threads_share_a_budget(gallery: Path) -> None:
    """Each swaps for itself, and looks while nobody else may swap."""
    model, swapper = attached(gallery, 7)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = Random(seed)
        try:
            for _ in range(25):
                name = rng.choice(swapper.adapters)
                if rng.random() < 0.3:
                    swapper.prefetch(name)
                with swapper.using(name):
                    assert_same_output(MLP.output(model, INPUTS), fresh_output(MLP, gallery / name))
        except BaseException as error:
            failures.append(error)

    for name in swapper.adapters:
        fresh_output(MLP, gallery / name)  # PEFT loads one at a time
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)
    swapper.check_integrity()


def test_one_reading_serves_all_who_wait_for_it(gallery: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, swapper = attached(gallery, 8)
    library, read, readings = swapper._library, swapper._library._read, []
    monkeypatch.setattr(library, "_read", lambda *source: [readings.append(source), read(*source)][1])
    threads = [threading.Thread(target=swapper.activate, args=("a01",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(readings) == 1
    assert swapper.metrics().hits + swapper.metrics().misses == 4


def test_who_is_told_of_a_swap_holds_nobody_up(gallery: Path) -> None:
    """A callback that waits for an adapter to be read, in whatever thread: who reads needs the lock of who swaps."""
    _, swapper = attached(gallery, 8)
    late: list[bool] = []

    def load(report: hotslot.SwapReport) -> None:
        thread = threading.Thread(target=swapper.load, args=("more", gallery / "a02"), daemon=True)
        thread.start()
        thread.join(timeout=10)
        late.append(thread.is_alive())

    swapper.on_swap(load)
    swapper.activate("a01")
    with swapper.using("a03"):
        pass
    assert late == [False] * 3


class CallFault:
    """An interrupt at the k-th place where Python looks for one: where a function begins, or one written in C ends."""

    FILES = frozenset(
        str(Path(hotslot.__file__).parent / name)
        for name in ("swapper.py", "library.py", "cache/tier.py", "blending/blend.py")
    )

    def __init__(self, k: int) -> None:
        self.k, self.steps = k, 0

    def __enter__(self) -> CallFault:
        sys.setprofile(self._event)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, arg: Any) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename in self.FILES:
            self.steps += 1
            if self.steps == self.k:
                sys.setprofile(None)
                raise KeyboardInterrupt(f"{frame.f_code.co_name}, line {frame.f_lineno}")


class GateFault(CallFault):
    """The same, where a swap waits for its turn, too."""

    FILES = CallFault.FILES | {str(Path(hotslot.__file__).parent / name) for name in ("leases.py", "engine.py")}


def test_an_interrupt_at_the_end_of_a_block_does_not_leave_its_adapter_live(gallery: Path) -> None:
    """What was live is so again, and nobody waits for ever, wherever it comes (each third place is tried)."""
    model = MLP.build()
    swapper = hotslot.attach(model, {name: gallery / name for name in ("a01", "a06")})
    swapper.activate("a01")
    k, broken_off = 1, True
    while broken_off:
        fault = GateFault(k)
        with suppress(KeyboardInterrupt), swapper.using("a06"):
            sys.setprofile(fault._event)
        sys.setprofile(None)
        assert swapper.active == "a01", k
        assert not swapper.engine.gate.busy, k
        assert_same_output(MLP.output(model, INPUTS), fresh_output(MLP, gallery / "a01"))
        broken_off = fault.steps >= k
        k += 3
    assert k > 60


def updated(gallery: Path) -> dict[str, torch.Tensor]:
    return load_file(gallery / "a07" / WEIGHTS)


def visited(swapper: hotslot.Swapper) -> None:
    with swapper.using("a06"):
        pass


INTERRUPTED: dict[str, Callable[[hotslot.Swapper, Path], object]] = {
    "activate": lambda swapper, gallery: swapper.activate("a06"),
    "blend": lambda swapper, gallery: swapper.activate({"a03": 0.5, "a06": 1.0}),
    "using": lambda swapper, gallery: visited(swapper),
    "load": lambda swapper, gallery: swapper.load("a03", gallery / "a07"),
    "load tensors": lambda swapper, gallery: swapper.load(
        "a03", updated(gallery), config=json.loads((gallery / "a07" / "adapter_config.json").read_text())
    ),
    "update": lambda swapper, gallery: swapper.update("a02", updated(gallery)),
    "unload": lambda swapper, gallery: swapper.unload("a03"),
}


@pytest.mark.parametrize("what", INTERRUPTED)
def test_an_interrupt_loses_neither_an_adapter_nor_bytes(what: str, gallery: Path) -> None:
    """Wherever it comes (each fifth place is tried): the bytes are right, and each adapter is the old or the new."""
    names, changed = ("a01", "a02", "a03", "a06"), {"load": "a03", "load tensors": "a03", "update": "a02"}.get(what)
    k, stride = 1, 5
    while True:
        model = MLP.build()
        sources = {name: gallery / name for name in names}
        plan = hotslot.plan(model, sources, max_blend=2)
        swapper = hotslot.attach(model, sources, plan=plan, cache=Cache(host_bytes=int(7.2 * largest(gallery))))
        for name in ("a01", "a03", "a02"):
            swapper.activate(name)
        fault = CallFault(k)
        with suppress(KeyboardInterrupt), fault:
            INTERRUPTED[what](swapper, gallery)
        swapper.check_integrity()
        live = {name: [fresh_output(MLP, gallery / name)] for name in names}
        if changed is not None:
            live[changed].append(fresh_output(MLP, gallery / "a07"))
        output = MLP.output(model, INPUTS)
        if changed is not None and changed == swapper.active:
            swapper.activate("a01")
            swapper.activate(changed)
            assert_same_output(MLP.output(model, INPUTS), output)  # what is loaded is what was live
        for name in swapper.adapters:
            swapper.activate(name)
            assert any(error(MLP.output(model, INPUTS), wanted) < 1e-4 for wanted in live[name]), (what, k, name)
            swapper.check_integrity()
        for _ in range(2):
            swapper.activate("a01")
            swapper.deactivate()
        for name in swapper.adapters:
            swapper.unload(name)
        assert swapper.host_bytes <= size(gallery / "a01"), f"{what}, {k}: more than a rollback needs"
        assert swapper.metrics().host_adapters == 0
        swapper.detach()
        if fault.steps < k:
            assert k > 5 * stride
            return
        k += stride


def test_a_block_that_is_interrupted_before_it_begins_swaps_back(gallery: Path) -> None:
    k = 1
    while True:
        swapper = hotslot.attach(model := MLP.build(), {name: gallery / name for name in ("a01", "a02", "a03")})
        swapper.activate("a01")
        begun, fault = False, CallFault(k)
        with suppress(KeyboardInterrupt), fault, swapper.using("a02"):
            begun = True
            sys.setprofile(None)
        assert swapper.active == "a01", k
        assert_live(model, swapper, gallery)
        swapper.detach()
        if begun:
            assert k > 20
            return
        k += 1


def test_a_blend_that_waits_for_its_turn_stays_in_memory(gallery: Path) -> None:
    model = MLP.build()
    cache = Cache(host_bytes=int(6.2 * largest(gallery)))
    swapper = hotslot.attach(model, gallery, plan=hotslot.plan(model, gallery), cache=cache)
    thread = threading.Thread(target=swapper.activate, args=({"a01": 0.5, "a02": 1.0},))
    with swapper.lease():
        thread.start()
        deadline = time.monotonic() + 30
        while "1 waiting" not in repr(swapper.engine.gate):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for name in swapper.adapters:
            with suppress(CacheFullError):
                swapper.prefetch(name).result(timeout=60)
    thread.join(timeout=30)
    swapper.check_integrity()
    live = swapper.engine.live.entry
    assert live is not None
    assert swapper._library.blender.holds(live), "its bytes count"


def test_an_update_that_others_do_not_see_yet_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its making and its holding another thread unloads the last that was merged into the same weights."""
    folders = {
        str(seed): make_method_adapter(
            tmp_path / str(seed), "IA3", MLP, seed=seed, target_modules=["up", "down"], feedforward_modules=[]
        )
        for seed in (1, 2, 3)
    }
    model = MLP.build()
    swapper = hotslot.attach(model, {name: folders[name] for name in "12"}, cache=Cache(host_bytes=1 << 20))
    hold = swapper._library.hold

    def meanwhile(*args: Any) -> None:
        swapper.evict("1")
        swapper.unload("2")
        hold(*args)

    monkeypatch.setattr(swapper._library, "hold", meanwhile)
    swapper.update("1", load_file(folders["3"] / WEIGHTS))
    swapper.activate("1")
    assert_same_output(MLP.output(model, INPUTS), fresh_output(MLP, folders["3"]))


def test_a_compiled_model_does_not_notice_where_adapters_come_from(gallery: Path) -> None:
    model, swapper = attached(gallery, 3.2)
    backend = Backend()
    compiled = torch.compile(model, backend=backend)
    MLP.output(compiled, INPUTS)
    graphs = backend.graphs
    with no_recompile(), same_addresses(model):
        for name in swapper.adapters:
            assert swapper.activate(name).tier in ("host", "disk")
            assert_same_output(MLP.output(compiled, INPUTS), fresh_output(MLP, gallery / name))
    assert backend.graphs == graphs


def test_merged_adapters_go_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    methods: dict[str, dict[str, Any]] = {"LOHA": {}, "IA3": {"feedforward_modules": []}, "OFT": {}}
    folders = [
        make_method_adapter(
            tmp_path / "gallery" / f"{method}{seed}", method, MLP, seed=seed, target_modules=["up", "down"], **options
        ).name
        for seed in (1, 2)
        for method, options in methods.items()
    ]
    model, other = MLP.build(), MLP.build()
    unlimited = hotslot.attach(other, tmp_path / "gallery")
    first = hotslot.attach(model, tmp_path / "gallery", cache=Cache(host_bytes=1 << 20))
    sizes = []
    for name in folders:
        first.activate(name)
        sizes.append(first.host_bytes)
    first.detach()
    swapper = hotslot.attach(model, tmp_path / "gallery", cache=Cache(host_bytes=sizes[-1] * 2 // 3))
    base = snapshot(model)
    for name in folders * 3:
        swapper.activate(name)
        unlimited.activate(name)
        mine, theirs = model.state_dict(), other.state_dict()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs), name
        swapper.check_integrity()
    assert swapper.metrics().evictions
    swapper.deactivate()
    assert_unchanged(base, snapshot(model))


# --- packed files ---------------------------------------------------------------------------------------------------


def test_what_was_read_once_is_read_from_its_packed_file(own: Path, tmp_path: Path) -> None:
    time.sleep(max(0.0, max(path.stat().st_ctime for path in own.rglob("*")) + 2.1 - time.time()))  # settled by then
    cache = Cache(host_bytes=int(3.2 * largest(own)), disk_bytes=1 << 20, folder=tmp_path / "packed")
    model = MLP.build()
    swapper = hotslot.attach(model, own, cache=cache)
    for name in swapper.adapters:
        swapper.activate(name)
    swapper._library.finish_packing()
    packed = sorted((tmp_path / "packed").iterdir())
    assert len(packed) == COUNT
    swapper.detach()
    for path in packed:
        os.utime(path, (1, 1))
    swapper = hotslot.attach(model, own, cache=cache)
    for name in swapper.adapters:
        swapper.activate(name)
        assert_live(model, swapper, own)
    assert all(path.stat().st_mtime > 1 for path in packed), "used"
    shutil.copy(own / "a02" / WEIGHTS, own / "a01" / WEIGHTS)
    packed[0].write_bytes(packed[0].read_bytes()[:-1] + b"?")
    swapper.detach()
    swapper = hotslot.attach(model, own, cache=cache)
    for name in swapper.adapters:
        swapper.activate(name)
        assert_live(model, swapper, own)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_waits_for_none_of_its_parents_threads(
    gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server's workers do, that are forked once the model is there, and an adapter is being packed."""
    packing, go_on = threading.Event(), threading.Event()

    def write(self: PackedFiles, *args: Any) -> bool:
        packing.set()
        return go_on.wait(60)

    monkeypatch.setattr(PackedFiles, "write", write)
    model = MLP.build()
    cache = Cache(host_bytes=int(7.2 * largest(gallery)), disk_bytes=1 << 20, folder=tmp_path / "packed")
    swapper = hotslot.attach(model, gallery, plan=hotslot.plan(model, gallery), cache=cache)
    swapper.activate("a01")
    assert packing.wait(60)
    child = os.fork()
    if not child:
        signal.alarm(30)
        go_on.set()
        with suppress(BaseException):
            swapper.activate({"a02": 0.5, "a03": 1.0})  # waits for what is being packed, which needs room
            for name in ("a02", "a03"):
                swapper.activate(name)
            assert swapper.evict("a01")
            assert_live(model, swapper, gallery)
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    go_on.set()
    swapper._library.finish_packing()
    assert status == 0
    swapper.activate("a04")
    assert_live(model, swapper, gallery)


# --- a folder that is watched ---------------------------------------------------------------------------------------


def put(source: Path, folder: Path, name: str) -> None:
    """As one should: written under another name, and renamed."""
    shutil.copytree(source, folder / ".new")
    if (folder / name).exists():
        os.rename(folder / name, folder / ".old")
        os.rename(folder / ".new", folder / name)
        shutil.rmtree(folder / ".old")
    else:
        os.rename(folder / ".new", folder / name)


def test_what_comes_and_goes_in_a_watched_folder(own: Path, gallery: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = MLP.build()
    watch = Watch(model, own)
    swapper = hotslot.attach(model, own)
    put(gallery / "a03", own, "b00")
    watch.look(swapper)
    assert swapper.adapters[-1] == "b00"
    swapper.activate("b00")
    assert_live(model, swapper, own)

    put(gallery / "a06", own, "b00")
    watch.look(swapper)
    assert_same_output(MLP.output(model, INPUTS), fresh_output(MLP, gallery / "a03"))
    assert swapper.activate("b00").changed, "what is live goes on until it is activated anew"
    assert_live(model, swapper, own)

    shutil.rmtree(own / "b00")
    shutil.rmtree(own / "a05")
    watch.look(swapper)
    assert "a05" not in swapper.adapters
    assert "b00" in swapper.adapters, "it is live"
    swapper.activate("a00")
    watch.look(swapper)
    assert "b00" not in swapper.adapters

    time.sleep(max(0.0, max(path.stat().st_ctime for path in own.rglob("*")) + 2.1 - time.time()))
    watch.look(swapper)  # at files that the clock can tell from later ones
    os.rename(own / "a04", own / ".a04")
    watch.look(swapper)
    assert "a04" not in swapper.adapters
    os.rename(own / ".a04", own / "a04")
    watch.look(swapper)
    assert "a04" in swapper.adapters, "the same files, back again"

    make_adapter(own / "c00", MLP, seed=99, r=32, target_modules=["up"])
    (own / "d00").mkdir()
    (own / "d00" / "adapter_config.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        watch.look(swapper)
    told = " ".join(record.getMessage() for record in caplog.records)
    assert "c00 is not loaded" not in told, "what slots cannot hold is merged"
    assert "d00 is not loaded" in told
    assert "d00" not in swapper.adapters
    swapper.activate("c00")
    assert_live(model, swapper, own)


def test_a_look_keeps_what_is_pinned_and_comes_again_for_what_had_no_room(
    own: Path, gallery: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in own.rglob("*"):
        path.touch()  # so late that a change could have the same time
    watch = Watch(MLP.build(), own)
    _, swapper = attached(own, 4)
    for name in ("a05", "a06"):
        swapper.pin(name)
    watch.look(swapper)
    swapper.evict("a00")
    with pytest.raises(CacheFullError, match="cannot leave"):
        swapper.evict("a05")
    swapper.activate("a05")
    swapper.activate("a04")

    large = {"r": 8, "target_modules": ["up", "down"]}
    make_adapter(own / "b00", MLP, seed=99, **large)  # of a family of its own, so that it is read at once
    time.sleep(max(0.0, max(path.stat().st_ctime for path in own.rglob("*")) + 2.1 - time.time()))
    watch.look(swapper)
    assert "b00" not in swapper.adapters
    watch.look(swapper)
    assert caplog.text.count("b00 is not loaded yet") == 1, "said once"
    swapper.deactivate()
    for name in ("a05", "a06"):
        swapper.unpin(name)
    watch.look(swapper)
    assert "b00" in swapper.adapters


def test_nobody_watches_for_a_model_that_is_gone(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    swapper = hotslot.attach(MLP.build(), own, watch=True)
    watcher = next(thread for thread in threading.enumerate() if thread.name == "hotslot-watch")
    watcher.join(timeout=30)
    assert not watcher.is_alive()
    assert not caplog.records
    assert not swapper.detached


def test_a_thread_watches_until_detach(own: Path, gallery: Path) -> None:
    model = MLP.build()
    swapper = hotslot.attach(model, own, watch=True)
    put(gallery / "a03", own, "b00")
    deadline = time.monotonic() + 30
    while "b00" not in swapper.adapters:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    swapper.activate("b00")
    assert_live(model, swapper, own)
    swapper.detach()
    (watcher,) = (thread for thread in threading.enumerate() if thread.name == "hotslot-watch")
    watcher.join(timeout=30)
    assert not watcher.is_alive()
    with pytest.raises(ValueError, match="folder"):
        hotslot.attach(model, {"a": own / "a00"}, watch=True)
