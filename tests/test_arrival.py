"""An adapter's bytes go on while others of them are read: in order, each once, and found only if all were sound."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hotslot import checkpoint as checkpoints
from hotslot.cache.packed import PackedFiles
from hotslot.checkpoint import Files
from hotslot.errors import CorruptFileError, NonFiniteError

PIECE = 64
reading: Any = import_module("hotslot.checkpoint.checkpoint")


class Recorder:
    """A sink that keeps what it is given as it is then, and refuses holes and what comes twice."""

    def __init__(self, on_take: Callable[[int], object] = lambda stop: None) -> None:
        self.bytes = b""
        self.ends: list[int] = []
        self.versions: list[str] = []
        self._on_take = on_take

    def take(self, data: torch.Tensor, start: int, stop: int) -> None:
        if start == 0:
            self.bytes, self.ends, self.size = b"", [], data.numel()
        assert start == len(self.bytes) < stop <= self.size
        self.bytes += data[start:stop].numpy().tobytes()
        self.ends.append(stop)
        self._on_take(stop)

    def prove(self, version: str) -> None:
        self.versions.append(version)


@pytest.fixture(params=[None, 1, 2, 8], ids=lambda count: f"{count or 'no'} threads")
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pieces of 64 bytes, read by so many threads."""
    monkeypatch.setattr(reading, "CHUNK_BYTES", PIECE)
    with ThreadPoolExecutor(request.param or 1) as pool:
        monkeypatch.setattr(reading, "_pool", lambda: pool)
        monkeypatch.setattr(reading, "_THREADS_FROM_BYTES", 1 if request.param else 1 << 30)
        yield


def write(folder: Path, nbytes: int) -> Files:
    folder.mkdir(parents=True, exist_ok=True)
    values = torch.randn(nbytes // 4, generator=torch.Generator().manual_seed(nbytes))
    half = nbytes // 8
    save_file({"a": values[:half].clone(), "b": values[half:].clone()}, folder / checkpoints.WEIGHTS_NAME)
    (folder / checkpoints.CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA"}))
    return checkpoints.locate(folder)


def pack(packed: PackedFiles, files: Files) -> Path:
    assert packed.write(files, files.stamp(), time.time_ns() + 60 * 10**9, checkpoints.read_files(files))
    return packed.path(files)


@pytest.mark.parametrize("nbytes", [0, 4, PIECE - 4, PIECE, PIECE + 4, 7 * PIECE, 40 * PIECE + 24])
def test_each_byte_comes_once_and_in_order(threads: None, nbytes: int, tmp_path: Path) -> None:
    files, packed = write(tmp_path / "adapter", nbytes), PackedFiles(tmp_path / "packed")
    plain = Recorder()
    checkpoint = checkpoints.read_files(files, sink=plain)
    pack(packed, files)
    again = Recorder()
    assert packed.read(files, files.stamp(), sink=again) is not None
    for recorder in (plain, again):
        assert recorder.bytes == checkpoint.data.numpy().tobytes()
        assert recorder.ends == [*range(PIECE, nbytes, PIECE), nbytes][: -(-nbytes // PIECE)]
        assert recorder.versions == [checkpoint.version]


def test_pieces_of_a_file_come_in_the_order_of_memory(threads: None, tmp_path: Path) -> None:
    files = write(tmp_path / "adapter", 10 * PIECE + 8)
    header, half = checkpoints.read_header(files.weights), 5 * PIECE + 4
    first, second = checkpoints.parse_header(header, files.weights)
    schema = checkpoints.Schema({}, [second._replace(start=0, stop=half), first._replace(start=half, stop=2 * half)])
    pieces = checkpoints.Piece(0, half, half), checkpoints.Piece(half, 2 * half, 0)
    recorder = Recorder()
    family = checkpoints.FileFamily(header, 2 * half, schema, pieces)
    checkpoint = family.read(files.weights, origin="a LoRA", sink=recorder)
    content = files.weights.read_bytes()[8 + len(header) :]
    assert recorder.bytes == checkpoint.data.numpy().tobytes() == content[half:] + content[:half]
    assert recorder.versions == [checkpoint.version]


def test_what_is_rearranged_in_memory_comes_so(threads: None, tmp_path: Path) -> None:
    files = write(tmp_path / "adapter", 5 * PIECE)
    parts = {"half": torch.randn(3).half(), "whole": torch.randn(70)}  # 6 bytes, and then 4 at a time
    header = {
        "half": {"dtype": "F16", "shape": [3], "data_offsets": [0, 6]},
        "whole": {"dtype": "F32", "shape": [70], "data_offsets": [6, 286]},
    }
    text = json.dumps(header).encode()
    content = b"".join(part.numpy().tobytes() for part in parts.values())
    files.weights.write_bytes(len(text).to_bytes(8, "little") + text + content)
    recorder = Recorder()
    checkpoint = checkpoints.read_files(files, sink=recorder)
    assert recorder.bytes == checkpoint.data.numpy().tobytes() != content
    assert recorder.versions == [checkpoint.version]


@pytest.mark.parametrize("kind", ["source", "packed"])
def test_the_first_bytes_go_on_before_the_last_are_read(
    threads: None, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, packed = write(tmp_path / "adapter", 40 * PIECE), PackedFiles(tmp_path / "packed")
    end, gone_on, waited = pack(packed, files).stat().st_size, threading.Event(), []
    if kind == "source":
        end = files.weights.stat().st_size
    preadv = os.preadv

    def held_back(descriptor: int, buffers: Any, place: int) -> int:
        if place + len(buffers[0]) == end:
            waited.append(gone_on.wait(timeout=20))
        return preadv(descriptor, buffers, place)

    monkeypatch.setattr(os, "preadv", held_back)
    recorder = Recorder(lambda stop: gone_on.set())
    assert (
        checkpoints.read_files(files, sink=recorder)
        if kind == "source"
        else packed.read(files, files.stamp(), sink=recorder)
    )
    assert waited == [True]


def test_what_is_not_sound_is_not_proved(threads: None, tmp_path: Path) -> None:
    files, packed = write(tmp_path / "adapter", 5 * PIECE), PackedFiles(tmp_path / "packed")
    path, recorder = pack(packed, files), Recorder()
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert packed.read(files, files.stamp(), sink=recorder) is None
    assert len(recorder.bytes) == 5 * PIECE
    assert recorder.versions == []
    checkpoint = checkpoints.read_files(files, sink=recorder)  # as who finds no packed file does
    assert recorder.bytes == checkpoint.data.numpy().tobytes()
    assert recorder.versions == [checkpoint.version]

    recorder, whole = Recorder(), files.weights.read_bytes()
    files.weights.write_bytes(whole[:-4] + torch.tensor(torch.nan).numpy().tobytes())
    with pytest.raises(NonFiniteError):
        checkpoints.read_files(files, sink=recorder)
    assert recorder.versions == []


def test_a_file_that_ends_early_is_not_proved(threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, recorder = write(tmp_path / "adapter", 5 * PIECE), Recorder()
    preadv, end = os.preadv, files.weights.stat().st_size
    monkeypatch.setattr(os, "preadv", lambda file, into, at: 0 if at + len(into[0]) == end else preadv(file, into, at))
    with pytest.raises(CorruptFileError, match="an end after"):
        checkpoints.read_files(files, sink=recorder)
    assert recorder.versions == []
