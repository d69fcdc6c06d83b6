"""Packed files give back what was read, bit for bit, or nothing."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters import make_adapter
from hotslot import checkpoint as checkpoints
from hotslot.cache.packed import PackedFiles
from hotslot.checkpoint import Files
from hotslot.errors import CacheError
from zoo import ZOO


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(folder / str(seed), ZOO["llama"], seed=seed, r=4, target_modules=["q_proj", "v_proj"])
        for seed in range(3)
    ]


@pytest.fixture
def packed(tmp_path: Path) -> PackedFiles:
    return PackedFiles(tmp_path / "packed")


def later() -> int:
    """A moment at which files made just now are settled: reading takes place long after them."""
    return time.time_ns() + 60 * 10**9


def pack(packed: PackedFiles, folder: Path, read_ns: int | None = None) -> Files:
    files = checkpoints.locate(folder)
    stamp = files.stamp()
    assert packed.write(files, stamp, read_ns or later(), checkpoints.read_files(files))
    return files


def test_what_is_read_is_what_was_packed(packed: PackedFiles, adapters: list[Path]) -> None:
    for folder in adapters:
        files = pack(packed, folder)
        source, again = checkpoints.read_files(files), packed.read(files, files.stamp())
        assert again is not None
        assert again.version == source.version
        assert torch.equal(again.data, source.data)
        assert again.config == source.config
        assert again.tensors == source.tensors
    first, second = (packed.read(files, files.stamp()) for files in map(checkpoints.locate, adapters[:2]))
    assert first is not None
    assert second is not None
    assert first.schema is second.schema, "of one family the JSON is read once"


def test_any_safetensors_library_reads_it(packed: PackedFiles, adapters: list[Path]) -> None:
    files = pack(packed, adapters[0])
    path, expected = packed.path(files), load_file(files.weights)
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
    assert json.loads(told["config"])["r"] == 4
    assert told["version"] == checkpoints.read_files(files).version
    assert path.stat().st_mode & 0o777 == 0o600
    assert packed.folder.stat().st_mode & 0o777 == 0o700


def test_a_source_that_has_changed_is_not_found(packed: PackedFiles, adapters: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in adapters[0].iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        files = pack(packed, folder)
        assert packed.read(files, files.stamp()) is not None
        (folder / name).write_bytes((folder / name).read_bytes())  # as many bytes: the times alone tell
        assert packed.read(files, files.stamp()) is None
    stale = files.stamp()
    os.utime(folder / "adapter_config.json")
    assert not packed.write(files, stale, later(), checkpoints.read_files(files)), "it changed while it was read"
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError):
        packed.read(files, files.stamp())


def test_a_source_that_was_changed_just_before_it_was_read_is_not_trusted(
    packed: PackedFiles, adapters: list[Path]
) -> None:
    changed_ns = checkpoints.locate(adapters[0]).stamp().changed_ns
    files = pack(packed, adapters[0], read_ns=changed_ns + 10**9)
    assert packed.read(files, files.stamp()) is None
    assert packed.path(files).exists(), "nothing is wrong with it"
    pack(packed, adapters[0], read_ns=changed_ns + 3 * 10**9)
    assert packed.read(files, files.stamp()) is not None


def test_damage_anywhere_is_noticed(
    packed: PackedFiles, adapters: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    files = pack(packed, adapters[0])
    path, whole = packed.path(files), packed.path(files).read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(16), *range(16, begin, 7), begin - 1, *range(begin, len(whole), 41), len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert packed.read(files, files.stamp()) is None, f"byte {place} of {len(whole)}, data from {begin}"
        assert not path.exists(), "and it is deleted"
    for size in (0, 5, 8, 60, begin - 1, begin, begin + 1, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert packed.read(files, files.stamp()) is None
        assert not path.exists()
    path.write_bytes(whole + b"\0")
    assert packed.read(files, files.stamp()) is None
    path.write_bytes(whole)
    assert packed.read(files, files.stamp()) is not None, "the control"


@pytest.mark.parametrize(
    "put",
    [
        lambda path: save_file({"a": torch.ones(2)}, path),
        lambda path: save_file({"a": torch.ones(2)}, path, {"hotslot_seal": "0" * 32}),
        lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
        lambda path: path.write_bytes((2).to_bytes(8, "little") + b"{}"),
    ],
    ids=["foreign", "foreign-with-a-seal", "a-pickle", "empty"],
)
def test_what_is_no_packed_file_gives_nothing(
    packed: PackedFiles, adapters: list[Path], put: Callable[[Path], object]
) -> None:
    files = checkpoints.locate(adapters[0])
    put(packed.path(files))
    assert packed.read(files, files.stamp()) is None
    pack(packed, adapters[0])
    assert packed.read(files, files.stamp()) is not None


def test_the_limit_deletes_what_was_not_used_for_longest(adapters: list[Path], tmp_path: Path) -> None:
    size = PackedFiles(tmp_path / "measured")
    pack(size, adapters[0])
    packed = PackedFiles(tmp_path / "packed", limit_bytes=int(2.5 * size.nbytes))
    first, second = (pack(packed, folder) for folder in adapters[:2])
    os.utime(packed.path(first), (1, 1))
    os.utime(packed.path(second), (2, 2))
    assert packed.read(first, first.stamp()) is not None  # used now
    foreign = packed.folder / "mine.safetensors"
    foreign.write_bytes(bytes(10))
    abandoned = packed.folder / f".{packed.path(first).name}.1.2.tmp"
    abandoned.touch()
    os.utime(abandoned, (1, 1))
    third = pack(packed, adapters[2])
    assert packed.read(second, second.stamp()) is None
    assert packed.read(first, first.stamp()) is not None
    assert packed.read(third, third.stamp()) is not None
    assert packed.nbytes <= 2.5 * size.nbytes
    pack(PackedFiles(packed.folder, packed.limit_bytes), adapters[2])
    assert foreign.exists()
    assert not abandoned.exists()
    small = PackedFiles(tmp_path / "small", limit_bytes=100)
    files = checkpoints.locate(adapters[0])
    assert not small.write(files, files.stamp(), later(), checkpoints.read_files(files))
    assert small.nbytes == 0


def test_keeping_one_more_looks_at_few_of_those_that_are_kept(
    adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = checkpoints.locate(adapters[0])
    source, looked = checkpoints.read_files(files), 0

    def stat(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        nonlocal looked
        looked += 1
        return os.stat(path, follow_symlinks=follow_symlinks)

    measured = PackedFiles(tmp_path / "measured")
    pack(measured, adapters[0])
    packed = PackedFiles(tmp_path / "packed", limit_bytes=101 * measured.nbytes)
    monkeypatch.setattr(Path, "stat", stat)
    for number in range(200):
        other = Files(files.weights, files.config, files.config.read_bytes() + b" " * number, files.origin)
        assert packed.write(other, other.stamp(), later(), source)
    assert looked < 200 * 10
    assert 90 * measured.nbytes < packed.nbytes <= packed.limit_bytes


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be another user")
def test_a_folder_that_only_its_owner_may_change_is_read(adapters: list[Path]) -> None:
    """root's, say, filled when an image was built."""
    with tempfile.TemporaryDirectory() as folder:
        packed = PackedFiles(Path(folder))
        files = pack(packed, adapters[0])
        packed.folder.chmod(0o755)
        packed.path(files).chmod(0o644)
        stamp = files.stamp()
        os.seteuid(65534)
        try:
            assert packed.read(files, stamp) is not None
        finally:
            os.seteuid(0)


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(CacheError, match="Others may write"):
        PackedFiles(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="cannot be used"):
        PackedFiles(tmp_path / "file")


_RACER = """
import sys, time
from pathlib import Path
from hotslot import checkpoint as checkpoints
from hotslot.cache.packed import PackedFiles

files = checkpoints.locate(sys.argv[2])
source = checkpoints.read_files(files)
packed = PackedFiles(Path(sys.argv[1]))
deadline, found = time.monotonic() + 1.0, 0
while time.monotonic() < deadline:
    packed.write(files, files.stamp(), time.time_ns() + 60 * 10**9, source)
    again = packed.read(files, files.stamp())
    assert again is not None and again.version == source.version, again
    found += 1
print(found)
"""


def test_processes_race_on_one_folder(packed: PackedFiles, adapters: list[Path]) -> None:
    racers = [
        subprocess.Popen([sys.executable, "-c", _RACER, packed.folder, adapters[0]], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    assert all(int(racer.communicate(timeout=120)[0]) > 10 for racer in racers)
    assert [path.name for path in packed.folder.iterdir()] == [packed.path(checkpoints.locate(adapters[0])).name]
