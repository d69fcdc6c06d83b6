"""What a swap has to read goes to the device meanwhile, in the room that passes through; see `test_scatter`."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs a GPU, or TRITON_INTERPRET=1 from the start of the process",
    ),
]
pytest.importorskip("triton")

import hotslot  # noqa: E402
from gpu.test_scatter import DEVICE, adapters, arena, attached, torchs_copies  # noqa: E402
from hotslot import Cache  # noqa: E402
from hotslot.errors import ChangedError, InFlightError, NonFiniteError  # noqa: E402
from hotslot.live.memory import Memory  # noqa: E402
from hotslot.live.staging import Arrival, Staging  # noqa: E402
from oracle import assert_same_output, assert_unchanged, fresh_output, snapshot  # noqa: E402
from test_all_or_nothing import LineFault  # noqa: E402
from zoo import ZOO  # noqa: E402

MLP = ZOO["mlp"]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters here are of a few kilobytes; each is read in several pieces, by threads."""
    reading = "hotslot.checkpoint.checkpoint."
    monkeypatch.setattr(reading + "CHUNK_BYTES", 256)
    monkeypatch.setattr(reading + "_THREADS_FROM_BYTES", 1)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.setattr("hotslot.checkpoint.files.GRAIN_NS", 0)  # else packed files are not taken so soon
    return adapters(tmp_path, MLP)


@pytest.fixture
def from_host(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets an item for each copy to the device of what is all in host memory."""
    copies: list[str] = []

    def count(name: str) -> None:
        original = getattr(Staging, name)

        def counted(self: Staging, *args: Any, **more: Any) -> Any:
            made = original(self, *args, **more)
            copies.extend([name] * (made is not None))
            return made

        monkeypatch.setattr(Staging, name, counted)

    count("_keep")
    count("_pass")
    return copies


def evict(swapper: hotslot.Swapper, *names: str) -> None:
    """From host memory, in which what is live stays, and what was live before; and from the device."""
    swapper.activate(next(other for other in swapper.adapters if other not in names))
    swapper.deactivate()
    for name in names:
        assert swapper.evict(name)
        staging(swapper).forget(version(swapper, name))


def version(swapper: hotslot.Swapper, name: str) -> str:
    return swapper._library.known(name).version or ""


def staging(swapper: hotslot.Swapper) -> Staging:
    memory = swapper.engine.binding.memory
    (device,) = memory.devices
    return memory.stagings.of(device)


@pytest.mark.parametrize("kind", ["source", "packed"])
@pytest.mark.parametrize("device_bytes", [0, 1 << 20], ids=["passing", "kept"])
def test_what_is_read_for_a_swap_is_on_the_device_by_then(
    device_bytes: int, kind: str, sources: dict[str, Path], tmp_path: Path, from_host: list[str]
) -> None:
    packed = tmp_path / "packed"
    cache = Cache(device_bytes=device_bytes, disk_bytes=None if kind == "packed" else 0, folder=packed)
    _ours, ours = attached(MLP, sources, DEVICE, cache=cache)
    with torchs_copies():
        _theirs, theirs = attached(MLP, sources, "cpu")
    if kind == "packed":
        for name in sources:
            evict(ours, name)
            ours.activate(name)
        ours._library.finish_packing()
        for path in packed.iterdir():
            os.utime(path, (1, 1))
    for name in ("dense", "small", "other", "small", "dense"):
        evict(ours, name)
        from_host.clear()
        assert ours.activate(name).tier == "disk"
        assert not from_host
        theirs.deactivate()
        theirs.activate(name)
        assert torch.equal(arena(ours), arena(theirs)), name
        assert (version(ours, name) in staging(ours).tier) == bool(device_bytes)
        ours.check_integrity()
    assert all(path.stat().st_mtime > 1 for path in packed.iterdir()) if kind == "packed" else not packed.exists()
    ours.deactivate()
    staging(ours).forget(version(ours, "dense"))
    assert ours.activate("dense").tier == "host"
    assert from_host, "the control: nothing is read"


@pytest.mark.parametrize("goes_ahead", [True, False], ids=["goes-ahead", "control"])
def test_copies_are_issued_before_the_file_is_read(
    goes_ahead: bool, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last piece is held back until another has gone to the device; in the control none does."""
    _model, swapper = attached(MLP, sources, DEVICE)
    evict(swapper, "dense")
    if not goes_ahead:
        monkeypatch.setattr(Memory, "arrival", lambda self: Arrival([]))
    end, issued, in_time = (sources["dense"] / WEIGHTS).stat().st_size, threading.Event(), []
    preadv, load = os.preadv, Staging.load

    def held_back(file: int, buffers: Any, place: int) -> int:
        if place + len(buffers[0]) == end:
            in_time.append(issued.wait(timeout=20 if goes_ahead else 0.2))
        return preadv(file, buffers, place)

    def noted(self: Staging, *args: Any) -> None:
        load(self, *args)
        issued.set()

    monkeypatch.setattr(os, "preadv", held_back)
    monkeypatch.setattr(Staging, "load", noted)
    assert swapper.activate("dense").tier == "disk"
    assert in_time == [goes_ahead]


def test_a_packed_file_that_is_damaged_is_made_again(
    sources: dict[str, Path], tmp_path: Path, from_host: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(disk_bytes=None, folder=tmp_path / "packed")
    _ours, ours = attached(MLP, sources, DEVICE, cache=cache)
    with torchs_copies():
        _theirs, theirs = attached(MLP, sources, "cpu")
    theirs.activate("dense")
    evict(ours, "dense")
    ours.activate("dense")
    ours._library.finish_packing()
    (packed,) = (tmp_path / "packed").iterdir()
    sound = packed.read_bytes()
    packed.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    evict(ours, "dense")
    from_host.clear()
    with caplog.at_level(logging.WARNING):
        assert ours.activate("dense").tier == "disk"
    assert "is no sound packed file" in caplog.text
    assert torch.equal(arena(ours), arena(theirs))
    assert not from_host, "the source was read so, too"
    ours._library.finish_packing()
    (again,) = (tmp_path / "packed").iterdir()
    assert again.read_bytes()[-8:] == sound[-8:]


def test_of_a_file_that_is_refused_nothing_is_kept(sources: dict[str, Path]) -> None:
    model, swapper = attached(MLP, sources, DEVICE, cache=Cache(device_bytes=1 << 20))
    evict(swapper, "small")
    before, held, passing = snapshot(model), swapper.device_bytes, staging(swapper)._passing
    weights = sources["small"] / WEIGHTS
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-4] + torch.tensor(torch.nan).numpy().tobytes())
    with pytest.raises(NonFiniteError):
        swapper.activate("small")
    assert staging(swapper)._passing is passing, "no swap finds what was not proved"
    weights.write_bytes(sound[:-4] + torch.tensor(1.0).numpy().tobytes())
    with pytest.raises(ChangedError):
        swapper.activate("small")
    assert_unchanged(before, snapshot(model))
    assert swapper.device_bytes == held
    weights.write_bytes(sound)
    assert swapper.activate("small").changed


def test_of_those_that_wait_for_leases_the_last_has_the_room(sources: dict[str, Path], from_host: list[str]) -> None:
    _model, swapper = attached(MLP, sources, DEVICE)
    with torchs_copies():
        _theirs, theirs = attached(MLP, sources, "cpu")
    leased, over = threading.Event(), threading.Event()

    def hold() -> None:
        with swapper.lease():
            leased.set()
            over.wait(timeout=20)

    holder = threading.Thread(target=hold)
    evict(swapper, "small", "dense")
    from_host.clear()
    holder.start()
    leased.wait(timeout=20)
    for name in ("dense", "small"):
        with pytest.raises(InFlightError):
            swapper.activate(name, in_flight="drain", timeout_seconds=0.01)
    over.set()
    holder.join()
    for name, copies in (("small", 0), ("dense", 1), ("small", 2)):
        swapper.activate(name)
        theirs.activate(name)
        assert torch.equal(arena(swapper), arena(theirs)), name
        assert len(from_host) == copies


def test_what_passed_last_need_not_come_again(sources: dict[str, Path], from_host: list[str]) -> None:
    _model, swapper = attached(MLP, sources, DEVICE)
    tiers = []
    for name in ("dense", None, "dense", "small", None, "dense", "small"):
        tiers.append(swapper.activate(name).tier if name else swapper.deactivate().tier)
    assert tiers == ["host", "none", "device", "host", "none", "host", "host"]
    swapper.unload("dense")
    swapper.deactivate()
    swapper.unload("small")
    assert staging(swapper)._passing is None


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_what_is_still_coming_does_not_end_up_over_the_next() -> None:
    here = Staging(torch.device("cuda", 0), 0)
    first, second = (torch.full((64 << 20,), value, dtype=torch.uint8).pin_memory() for value in (1, 2))
    for _ in range(5):
        target = here.expect(first.numel())
        assert target is not None
        for _ in range(8):
            here.load(target, first, 0, first.numel())
        here.arrive(target, "first")
        found, _ = here.bring(second, "second")
        assert bool((found == 2).all())


@pytest.mark.parametrize("kind", ["read", "from the host"])
def test_an_interrupt_leaves_what_is_live_and_nothing_wrong_on_the_device(kind: str, sources: dict[str, Path]) -> None:
    _model, swapper = attached(MLP, sources, DEVICE, cache=Cache(device_bytes=(1 << 20) * (kind == "read")))
    arenas = {}
    for name in sources:
        swapper.activate(name)
        arenas[name] = arena(swapper).clone()

    def before_a_swap_to_other() -> None:
        """Whose bytes will lie over those of dense."""
        if kind == "read":
            evict(swapper, "other")
        swapper.activate("dense")
        swapper.deactivate()

    before_a_swap_to_other()
    with LineFault(0, KeyboardInterrupt) as dry:
        swapper.activate("other")
    lines = {step: k for k, step in enumerate(dry.steps, 1) if step.startswith("staging.py")}  # the last time of each
    assert len(lines) > 15
    for step, k in lines.items():
        before_a_swap_to_other()
        before = arena(swapper).clone()
        with pytest.raises(KeyboardInterrupt), LineFault(k, KeyboardInterrupt):
            swapper.activate("other")
        assert torch.equal(arena(swapper), before)
        for name in ("dense", "other", "dense"):
            swapper.activate(name)
            assert torch.equal(arena(swapper), arenas[name]), step
        swapper.check_integrity()


def test_another_swap_does_not_take_it(sources: dict[str, Path], from_host: list[str]) -> None:
    _ours, ours = attached(MLP, sources, DEVICE)
    with torchs_copies():
        _theirs, theirs = attached(MLP, sources, "cpu")
    hotslot.checkpoint.read(sources["dense"], pin_memory=DEVICE == "cuda", sink=ours.engine.arrival())
    for name in ("other", "dense", "small"):
        ours.activate(name)
        theirs.activate(name)
        assert torch.equal(arena(ours), arena(theirs)), name
    assert len(from_host) == 3


def test_the_drop_in_reads_so(sources: dict[str, Path], from_host: list[str]) -> None:
    from peft import LoraConfig, PeftModel

    model = PeftModel.from_pretrained(MLP.build(), sources["dense"]).to(DEVICE)
    hotslot.prepare_model_for_compiled_hotswap(model, target_rank=8)
    for name in ("other", "dense"):
        hotslot.hotswap_adapter(model, str(sources[name]), "default")
        if DEVICE == "cpu":
            assert_same_output(MLP.output(model, MLP.inputs()), fresh_output(MLP, sources[name]))
    assert not from_host
    tensors, config = load_file(sources["other"] / WEIGHTS), LoraConfig.from_pretrained(str(sources["other"]))
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    hotslot.hotswap_adapter_from_state_dict(model, named, "default", config)
    assert from_host, "the control: nothing is read"
