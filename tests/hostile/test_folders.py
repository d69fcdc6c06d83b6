"""What stands in an adapter's folder in the place of its files: links are followed, and only to files."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hostile.defects import CONFIG, WEIGHTS, join, sound
from hotslot import checkpoint, errors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    sound().save(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_cache_of_links_is_read(folder: Path) -> None:
    """The Hub's cache: snapshots/<revision>/name → ../../blobs/<digest>."""
    expected = checkpoint.read(folder).version
    snapshot, blobs = folder.parent / "snapshots" / "abc", folder.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate((WEIGHTS, CONFIG)):
        (folder / name).rename(blobs / f"{number:040}")
        (snapshot / name).symlink_to(f"../../blobs/{number:040}")
    assert checkpoint.read(snapshot).version == expected
    (folder.parent / "mine").symlink_to(snapshot)
    assert checkpoint.read(folder.parent / "mine").version == expected


@pytest.mark.parametrize("subfolder", ["sub", "sub/", "./sub", "a/b"])
def test_subfolder_within_is_read(subfolder: str, folder: Path) -> None:
    expected = checkpoint.read(folder).version
    (folder / subfolder).mkdir(parents=True)
    for name in (WEIGHTS, CONFIG):
        (folder / name).rename(folder / subfolder / name)
    assert checkpoint.read(folder, subfolder=subfolder).version == expected


@pytest.mark.parametrize("source", ["folder", "hub"])
@pytest.mark.parametrize("subfolder", ["..", "../adapter", "a/../../adapter", "/", "absolute", "a/.."])
def test_subfolder_that_leads_out_is_refused(source: str, subfolder: str, folder: Path) -> None:
    subfolder = str(folder) if subfolder == "absolute" else subfolder
    with pytest.raises(errors.AdapterNotFoundError, match="leads out"):
        checkpoint.read(folder if source == "folder" else "someone/adapter", subfolder=subfolder)
    checkpoint.read(folder)  # the control: there is an adapter where most of these lead


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as end:  # its name may have 107 bytes
            end.bind(f"/proc/self/fd/{here}/{path.name}")
    finally:
        os.close(here)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize(
    "make",
    [
        _pipe,
        _socket,
        Path.mkdir,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("/dev/tty"),
        lambda path: path.symlink_to(path.name),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to("."),
    ],
    ids=["pipe", "socket", "folder", "device", "terminal", "link to itself", "link to nowhere", "link to the folder"],
)
@pytest.mark.timeout(20)  # to open a pipe waits for a writer
def test_what_is_no_file_is_refused(make: Callable[[Path], None], name: str, folder: Path) -> None:
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(errors.AdapterNotFoundError):
        checkpoint.read(folder)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.timeout(20)
def test_pipe_that_takes_the_place_of_the_file_at_the_last_moment(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the file and its opening."""
    opened = os.open

    def late(path: object, *args: int) -> int:
        if str(path).endswith(name):
            (folder / name).unlink()
            os.mkfifo(folder / name)
        return opened(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", late)
    with pytest.raises(errors.AdapterNotFoundError, match="is no file"):
        checkpoint.read(folder)


@pytest.mark.parametrize("claimed", [True, False], ids=["by its header", "beyond its header"])
def test_terabyte_of_nothing_is_refused_at_once(claimed: bool, folder: Path) -> None:
    nbytes = 1 << 40
    header = {
        "base_model.model.up.lora_A.weight": {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [0, nbytes]}
    }
    content = join(header, b"") if claimed else (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content)
    os.truncate(folder / WEIGHTS, len(content) + nbytes)
    started = time.process_time()
    with pytest.raises(errors.CorruptFileError, match="bytes"):
        checkpoint.read(folder)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "key", ["x" * 1_000_000, "\x1b[2J" * 200_000, "\ud800" * 100_000], ids=["x", "escapes", "no text"]
)
@pytest.mark.parametrize("place", ["name", "option", "value", "pattern", "file"])
def test_message_has_an_end(place: str, key: str, folder: Path) -> None:
    draft = sound()
    if place == "name":
        _, tensor = draft.tensors.popitem()
        header = {key: {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": [0, tensor.nbytes]}}
        (folder / WEIGHTS).write_bytes(join(header, bytes(tensor.nbytes)))
    else:
        draft.config |= {"option": {key: 1}, "value": {"r": key}, "pattern": {"rank_pattern": {key: 4}}, "file": {}}[
            place
        ]
        if place == "file":
            (folder / WEIGHTS).rename(folder / "a\n\x1b[2Jb")
        draft.save(folder) if place != "file" else None
    with pytest.raises(errors.HotslotError) as caught:
        checkpoint_and_meaning(folder)
    assert len(str(caught.value)) < 10_000
    assert all(line.isprintable() for line in str(caught.value).splitlines())
    assert len(str(caught.value).splitlines()) == 5


def checkpoint_and_meaning(folder: Path) -> None:
    from hotslot import methods

    methods.interpret(checkpoint.read(folder))
