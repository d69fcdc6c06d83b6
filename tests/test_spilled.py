"""Adapters whose tensors were given leave memory for a place on disk, and come back what they were: none is lost."""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import shutil
import signal
import sys
import threading
import warnings
import weakref
from contextlib import suppress
from linecache import getline
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import hotslot
from adapters import make_adapter
from hotslot import Cache
from hotslot import checkpoint as checkpoints
from hotslot.cache import spilled
from hotslot.cache.spilled import Spilled, SpillFile
from hotslot.errors import CacheError, CacheFullError
from hotslot.testing import same_addresses
from methods import make_method_adapter
from oracle import assert_same_output, assert_unchanged, fresh, fresh_output, snapshot
from zoo import ZOO

MLP = ZOO["mlp"]
INPUTS = MLP.inputs()
COUNT = 8


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight adapters of one family."""
    root = tmp_path_factory.mktemp("gallery")
    return [make_adapter(root / f"a{i}", MLP, seed=i, r=4, target_modules=["up", "down"]) for i in range(COUNT)]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def size_of(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(folder).values())


def give(swapper: hotslot.Swapper, name: str, folder: Path) -> None:
    swapper.load(name, tensors_of(folder), config=json.loads((folder / "adapter_config.json").read_text()))


def attached(
    gallery: list[Path], folder: Path, *, host: float = 3.5, disk: float | None = None
) -> tuple[Any, hotslot.Swapper]:
    """A model with slots for the family, and room for so many of it in memory and on disk."""
    model, nbytes = MLP.build(), size_of(gallery[0])
    limit = None if disk is None else int(disk * nbytes)
    cache = Cache(host_bytes=int(host * nbytes), disk_bytes=limit, folder=folder)
    return model, hotslot.attach(model, plan=hotslot.plan(model, gallery[0], max_blend=1), cache=cache)


def assert_live(model: Any, folder: Path | None) -> None:
    expected = MLP.output(MLP.build(), INPUTS) if folder is None else fresh_output(MLP, folder)
    assert_same_output(MLP.output(model, INPUTS), expected)


def open_files(folder: Path) -> int:
    """How many of its files this process has open, those without a name included."""
    places = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the list itself
            places.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum(place.startswith(str(folder)) for place in places)


# --- beside a plain record ------------------------------------------------------------------------------------------


class Beside:
    """A swapper, and a plain record of what each name stands for, of what is live and of what was before."""

    def __init__(self, gallery: list[Path], folder: Path, *, host: float, disk: float | None) -> None:
        self.gallery = gallery
        self.model, self.swapper = attached(gallery, folder, host=host, disk=disk)
        self.known: dict[str, Path] = {}
        self.live: tuple[str | None, Path | None] = (None, None)
        self.previous: tuple[str | None, Path | None] | None = None
        self.refused = 0

    def became(self, name: str | None, folder: Path | None) -> None:
        if (name, folder) != self.live:
            self.live, self.previous = (name, folder), self.live

    def step(self, rng: Random) -> None:
        names = [*self.known, "new"]
        name, folder = rng.choice(names), rng.choice(self.gallery)
        if name == "new" or rng.random() < 0.15:
            name = rng.choice("abcdefghijkl")
            if rng.random() < 0.75:
                give(self.swapper, name, folder)
            else:
                self.swapper.load(name, folder)
            self.known[name] = folder
            return
        match rng.randrange(10):
            case 0 | 1:
                report = self.swapper.update(name, tensors_of(folder))
                self.known[name] = folder
                assert (report is not None) == (name == self.live[0])
                if report is not None:
                    self.became(name, folder)
            case 2 if name != self.live[0]:
                self.swapper.unload(name)
                del self.known[name]
            case 3:
                self.swapper.evict(name)
            case 4:
                with self.swapper.using(name):
                    assert_live(self.model, self.known[name])
                if (name, self.known[name]) != self.live:
                    self.previous = (name, self.known[name])
            case 5 if self.previous is not None:
                self.swapper.rollback()
                self.became(*self.previous)
            case 6 if self.live[0] is not None:
                self.swapper.deactivate()
                self.became(None, None)
            case 7:
                assert self.swapper.prefetch(name).result() == "host"
            case _:
                self.swapper.activate(name)
                self.became(name, self.known[name])

    def check(self) -> None:
        assert set(self.swapper.adapters) == self.known.keys()
        assert self.swapper.active == self.live[0]
        assert_live(self.model, self.live[1])
        self.swapper.check_integrity()

    def all_are_there(self) -> None:
        """One after the other, each unloaded once it was live, so that those that need room have it in the end."""
        self.swapper.deactivate()
        while self.known:
            before = len(self.known)
            for name, folder in list(self.known.items()):
                try:
                    self.swapper.activate(name)
                except CacheFullError:
                    continue
                assert_live(self.model, folder)
                self.swapper.deactivate()
                self.swapper.unload(name)
                del self.known[name]
            assert len(self.known) < before, f"lost: {self.known}"


@pytest.mark.parametrize("disk", [None, 2])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_done_none_is_lost(gallery: list[Path], tmp_path: Path, seed: int, disk: float | None) -> None:
    """Where there is room on disk for all, nothing is refused but what is in use; else what has not happened."""
    rng = Random(f"{seed} {disk}")
    beside = Beside(gallery, tmp_path, host=4.5 + seed % 2, disk=disk)
    full = 0
    for _ in range(70):
        before = snapshot(beside.model)
        try:
            beside.step(rng)
        except CacheFullError as error:
            full += "does not fit" in str(error)
            assert_unchanged(before, snapshot(beside.model))
        beside.check()
    assert beside.swapper.metrics().evictions
    assert (full > 0) if disk == 2 else (full == 0)
    beside.all_are_there()
    assert os.listdir(tmp_path) == [] or all(name.startswith("hotslot-1-") for name in os.listdir(tmp_path))


def test_more_than_memory_has_room_for(gallery: list[Path], tmp_path: Path) -> None:
    model, swapper = attached(gallery, tmp_path)
    for i in range(30):
        give(swapper, f"t{i}", gallery[i % COUNT])
        swapper.check_integrity()
    assert swapper.metrics().host_adapters == 3
    assert os.listdir(tmp_path) == [], "its file has no name"
    with same_addresses(model):
        for i in (0, 29, 12, 3):
            assert swapper.activate(f"t{i}").tier == ("host" if i == 29 else "disk")
            assert_live(model, gallery[i % COUNT])
    assert swapper.evict("t29")
    assert swapper.activate("t29").tier == "disk"
    assert_live(model, gallery[29 % COUNT])


def test_control_without_disk_they_stay(gallery: list[Path], tmp_path: Path) -> None:
    _, swapper = attached(gallery, tmp_path, disk=0)
    for i in range(3):
        give(swapper, f"t{i}", gallery[i])
    with pytest.raises(CacheFullError, match="does not fit"):
        give(swapper, "t3", gallery[3])
    assert swapper.adapters == ("t0", "t1", "t2")


@pytest.mark.parametrize("disk", [0, None])
def test_the_same_values_have_a_place_if_either_has_one(
    gallery: list[Path], tmp_path: Path, disk: float | None
) -> None:
    """A file's stays where tensors have none, and tensors' own is as good as a file's."""
    model, swapper = attached(gallery, tmp_path / "cache", disk=disk)
    own = Path(shutil.copytree(gallery[0], tmp_path / "own"))
    swapper.load("a", own)
    give(swapper, "a", own)
    swapper._library.finish_packing()
    assert swapper.evict("a")
    if disk is None:
        shutil.rmtree(own)
    assert swapper.activate("a").tier == "disk"
    assert_live(model, gallery[0])


def test_those_of_attach_too(gallery: list[Path], tmp_path: Path) -> None:
    config = json.loads((gallery[0] / "adapter_config.json").read_text())
    given = {f"t{i}": checkpoints.from_tensors(tensors_of(folder), config) for i, folder in enumerate(gallery)}
    model, cache = MLP.build(), Cache(host_bytes=int(3.5 * size_of(gallery[0])), disk_bytes=None, folder=tmp_path)
    swapper = hotslot.attach(model, given, cache=cache)
    assert swapper.metrics().host_adapters == 3
    for i, folder in enumerate(gallery):
        swapper.activate(f"t{i}")
        assert_live(model, folder)
    swapper.check_integrity()


def test_of_methods_without_slots_too(tmp_path: Path) -> None:
    """Whose layers PEFT makes anew: into those of an adapter on the model, and merged below it."""
    folders = [
        make_method_adapter(tmp_path / f"a{i}", "LOHA", MLP, seed=i, target_modules=["up", "inner.2"]) for i in range(6)
    ]
    for route in ("auto", "merged"):
        model: Any = fresh(MLP, folders[0])
        swapper = hotslot.attach(model, {"a0": folders[0]}, route=route)
        nbytes = swapper.host_bytes
        swapper.detach()
        cache = Cache(host_bytes=int(3.5 * nbytes), disk_bytes=None, folder=tmp_path / "cache")
        swapper = hotslot.attach(model, route=route, cache=cache)
        for i, folder in enumerate(folders):
            give(swapper, f"t{i}", folder)
        for i, folder in [*enumerate(folders)] * 2:
            swapper.activate(f"t{i}")
            wanted: Any = fresh(MLP, folder)
            wanted = wanted if route == "auto" else wanted.merge_and_unload().requires_grad_(False)
            assert_same_output(MLP.output(model, INPUTS), MLP.output(wanted, INPUTS), exact=True)
            swapper.check_integrity()
        assert swapper.metrics().evictions
        swapper.detach()


def test_memory_and_disk_are_given_back(gallery: list[Path], tmp_path: Path) -> None:
    model, swapper = attached(gallery, tmp_path)
    swapper.load("own", gallery[0])
    assert open_files(tmp_path) == 0, "opened when it is needed"
    for i in range(6):
        give(swapper, f"t{i}", gallery[i])
    spilled: Any = swapper._library.known("t0").source
    data, file = weakref.ref(swapper._library.peek("t5").adapter.checkpoint), spilled.file  # type: ignore[union-attr]
    assert open_files(tmp_path) == 1
    size = os.fstat(file.fileno()).st_size
    assert size == file.nbytes == 6 * size_of(gallery[0])
    for i in range(5, 0, -1):
        swapper.unload(f"t{i}")
    gc.collect()
    assert data() is None
    give(swapper, "again", gallery[7])
    assert os.fstat(file.fileno()).st_size == file.nbytes == 2 * size_of(gallery[0]), "the first of the places again"
    for i in range(10):
        swapper.update("again", tensors_of(gallery[i % COUNT]))
    swapper.activate("again")
    assert_live(model, gallery[9 % COUNT])
    assert file.nbytes <= 3 * size_of(gallery[0])
    swapper.detach()
    del spilled, file
    gc.collect()
    assert open_files(tmp_path) == 0


# --- the limit of the disk ------------------------------------------------------------------------------------------


def test_what_the_limit_has_no_room_for_stays_in_memory(gallery: list[Path], tmp_path: Path) -> None:
    model, swapper = attached(gallery, tmp_path, host=4.5, disk=2.5)
    for i in range(6):
        give(swapper, f"t{i}", gallery[i])
    with pytest.raises(CacheFullError, match="does not fit"):
        give(swapper, "t6", gallery[6])
    assert swapper.adapters == tuple(f"t{i}" for i in range(6))
    for i in range(2, 6):
        with pytest.raises(CacheFullError, match="cannot leave"):
            swapper.evict(f"t{i}")
    for i in (2, 3, 4):
        swapper.unload(f"t{i}")
    for i in (0, 5, 1, 0):
        swapper.activate(f"t{i}")
        assert_live(model, gallery[i])
    swapper.check_integrity()


def test_packed_files_go_for_them(gallery: list[Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(gallery[0].parent, tmp_path / "source"))
    packed, limit = tmp_path / "packed", 12 * size_of(gallery[0])
    _, swapper = attached(gallery, packed, host=3.5, disk=12)
    for folder in sorted(source.iterdir()):
        swapper.load(folder.name, folder)
    swapper._library.finish_packing()

    def packed_bytes() -> int:
        return sum(path.stat().st_size for path in packed.iterdir())

    before = packed_bytes()
    assert before > 0
    for i in range(11):
        give(swapper, f"t{i}", gallery[i % COUNT])
        spilled: Any = swapper._library.known(f"t{i}").source
        assert spilled.file.nbytes == (i + 1) * size_of(gallery[0])
        assert packed_bytes() + spilled.file.nbytes <= limit
    assert packed_bytes() < before
    swapper.activate("a0")
    swapper._library.finish_packing()
    assert packed_bytes() + spilled.file.nbytes <= limit


def test_what_a_full_disk_refuses_stays_in_memory(
    gallery: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, swapper = attached(gallery, tmp_path, host=4.5)
    give(swapper, "t0", gallery[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_of(gallery[0]) * 3 // 2, hard))  # amid the second adapter
    try:
        with caplog.at_level(logging.WARNING):
            give(swapper, "t1", gallery[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "stays in memory" in caplog.text
    with pytest.raises(CacheFullError, match="cannot leave"):
        swapper.evict("t1")
    for i in range(2, 6):
        give(swapper, f"t{i}", gallery[i])
    for i in range(6):
        swapper.activate(f"t{i}")
        assert_live(model, gallery[i])
    swapper.check_integrity()


# --- what may go wrong ----------------------------------------------------------------------------------------------


def test_what_is_damaged_on_disk_is_refused_with_nothing_touched(gallery: list[Path], tmp_path: Path) -> None:
    model, swapper = attached(gallery, tmp_path)
    for i in range(6):
        give(swapper, f"t{i}", gallery[i])
    swapper.activate("t5")
    spilled: Any = swapper._library.known("t0").source
    os.pwrite(spilled.file.fileno(), b"\x7f", spilled.start + spilled.nbytes // 2)
    before = snapshot(model)
    with pytest.raises(CacheError, match="kept on disk"):
        swapper.activate("t0")
    assert_unchanged(before, snapshot(model))
    os.ftruncate(spilled.file.fileno(), spilled.start + spilled.nbytes)
    with pytest.raises(CacheError, match="kept on disk"):
        swapper.activate("t1")
    assert_unchanged(before, snapshot(model))
    swapper.check_integrity()
    give(swapper, "t0", gallery[0])
    swapper.activate("t0")
    assert_live(model, gallery[0])


def test_a_fork_writes_nothing_over_its_parents(gallery: list[Path], tmp_path: Path) -> None:
    config = json.loads((gallery[0] / "adapter_config.json").read_text())
    made = [checkpoints.from_tensors(tensors_of(folder), config) for folder in gallery]
    file = SpillFile(tmp_path)
    first, second = file.write(made[0]), file.write(made[1])
    assert first is not None
    assert second is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of any fork beside threads
        child = os.fork()
    if child == 0:
        right = False
        try:
            signal.alarm(30)
            del first
            right = file.write(made[2]) is None and second.read().version == made[1].version
        finally:
            os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert first.read().version == made[0].version
    assert torch.equal(second.read().data, made[1].data)


def test_a_folder_that_is_gone_changes_nothing(gallery: list[Path], tmp_path: Path) -> None:
    """What was written is still there; what has no place there stays in memory."""
    for written in (0, 2):
        model, swapper = attached(gallery, tmp_path / "cache", host=5.5, disk=100)
        for i in range(4):
            if i == written:
                shutil.rmtree(tmp_path / "cache")
            give(swapper, f"t{i}", gallery[i])
        for i in range(4):
            swapper.activate(f"t{i}")
            assert_live(model, gallery[i])
        swapper.check_integrity()


class LineFault:
    """KeyboardInterrupt at the k-th line that runs in the module of the file.

    Not where a `with` begins, which is where it ends, too: there none comes before its lock is given back.
    """

    def __init__(self, k: int) -> None:
        self.k, self.count = k, 0

    def __enter__(self) -> LineFault:
        self.before = sys.gettrace()
        sys.settrace(self.call)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.settrace(self.before)

    def call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self.line if frame.f_code.co_filename == spilled.__file__ else None

    def line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and not getline(spilled.__file__, frame.f_lineno).lstrip().startswith("with "):
            self.count += 1
            if self.count == self.k:
                raise KeyboardInterrupt
        return self.line


@pytest.mark.parametrize("call", ["load", "update", "activate"])
def test_what_is_broken_off_at_any_line_loses_none(gallery: list[Path], tmp_path: Path, call: str) -> None:
    model, swapper = attached(gallery, tmp_path, host=4.5)
    known = {f"t{i}": gallery[i] for i in range(6)}
    for name, folder in known.items():
        give(swapper, name, folder)
    rng, broken = Random(call), 0
    for k in range(1, 60):
        name, folder = rng.choice(sorted(known)), rng.choice(gallery)
        fault = LineFault(k)
        try:
            with fault:
                if call == "load":
                    give(swapper, name, folder)
                elif call == "update":
                    swapper.update(name, tensors_of(folder))
                else:
                    swapper.activate(name)
            if call != "activate":
                known[name] = folder
        except KeyboardInterrupt:
            broken += 1
        swapper.check_integrity()
        for other in {name, rng.choice(sorted(known))}:
            swapper.activate(other)
            assert_live(model, known[other])
    assert broken
    for name, folder in known.items():
        swapper.activate(name)
        assert_live(model, folder)


def test_threads_share_the_file(gallery: list[Path], tmp_path: Path) -> None:
    model, swapper = attached(gallery, tmp_path, host=9)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        rng, holds = Random(number), dict[str, Path]()
        try:
            for _ in range(25):
                name, folder = f"{number}-{rng.randrange(6)}", rng.choice(gallery)
                if name not in holds or rng.random() < 0.3:
                    give(swapper, name, folder)
                    holds[name] = folder
                elif rng.random() < 0.2:
                    swapper.update(name, tensors_of(folder))
                    holds[name] = folder
                with swapper.using(name):
                    assert_live(model, holds[name])
        except BaseException as error:
            failures.append(error)

    for folder in gallery:
        fresh_output(MLP, folder)  # PEFT loads one at a time
    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)
    assert swapper.metrics().evictions
    swapper.check_integrity()


# --- the file by itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_places_are_used_again_and_by_one_at_a_time(seed: int, tmp_path: Path) -> None:
    rng, limit = Random(seed), (None, 6000)[seed % 2]
    file, held = SpillFile(tmp_path, limit), dict[int, tuple[Spilled, checkpoints.Checkpoint]]()
    most = 0
    for number in range(300):
        size = rng.choice([0, 1, 7, 100, 256, 900])
        made = checkpoints.from_tensors({"x": torch.full((size,), number % 251, dtype=torch.uint8)}, {})
        spilled = file.write(made)
        assert spilled is not None or limit is not None
        if spilled is not None:
            held[number] = spilled, made
        del spilled
        while held and (len(held) > 12 or rng.random() < 0.4):
            del held[rng.choice(list(held))]
        file.check_integrity(place for place, _ in held.values())
        most = max(most, file.nbytes)
        assert os.fstat(file.fileno()).st_size <= file.nbytes
    assert most <= 13 * 900, "places are not used again"
    for place, made in held.values():
        assert torch.equal(place.read().data, made.data)
    held.clear()
    del place
    assert file.write(checkpoints.from_tensors({"x": torch.zeros(3)}, {})) is not None
    assert os.fstat(file.fileno()).st_size == 12


class Pieces:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.data, self.proved = b"", ""

    def take(self, data: Tensor, start: int, stop: int) -> None:
        assert start == len(self.data)
        self.data += data[start:stop].numpy().tobytes()

    def prove(self, version: str) -> None:
        self.proved = version


def test_what_is_read_goes_on_while_it_is_read_and_is_proved_at_the_end(tmp_path: Path) -> None:
    values = torch.randn(9 << 20, generator=torch.Generator().manual_seed(0))  # in several pieces, by threads
    made = checkpoints.from_tensors({"x": values}, {})
    place = SpillFile(tmp_path).write(made)
    assert place is not None
    pieces = Pieces()
    assert torch.equal(place.read(sink=pieces).data, made.data)
    assert pieces.data == made.data.numpy().tobytes()
    assert pieces.proved == made.version
    os.pwrite(place.file.fileno(), b"\x7f\x7f", place.nbytes - 2)
    pieces = Pieces()
    with pytest.raises(CacheError):
        place.read(sink=pieces)
    assert not pieces.proved
