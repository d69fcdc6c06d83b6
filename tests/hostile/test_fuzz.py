"""Ten thousand malformed adapters: refused by name, or taken and right; none crashes, hangs or changes the model."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load, save_file

import hotslot
from hostile.defects import CONFIG, WEIGHTS, P
from hostile.fuzz import Case, bases, make_case
from hotslot import errors
from hotslot.checkpoint.safetensors_file import parse_header, read_header
from oracle import TOLERANCE, assert_unchanged, error, fresh, snapshot
from zoo import ZOO

# Entry → cases. A fresh load of PEFT's for each that is taken costs 11 ms on the first, 77 on the last.
CASES = {"mlp": 5000, "embedding": 2800, "conv2d": 1000, "attention": 800, "llama": 400}
EVERY = int(os.environ.get("HOTSLOT_FUZZ_EVERY", "5"))  # of the many each fifth is tried; 1 tries all
CPU_SECONDS = 2.0  # of one case; the slowest takes a quarter of it
HANG_SECONDS = 15.0
GROWTH_BYTES = 500 << 20
SNAPSHOT_EVERY = 50  # all that can be seen of the model; its bytes are compared after each case
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
UNUSED_IF_FALSE = ("trainable_token_indices", "modules_to_save", "layer_replication", "alora_invocation_tokens")
OF_EVERY_ENTRY = (
    "AdapterNotFoundError", "CorruptFileError", "PickleRefusedError", "ConfigError", "TensorError", "NonFiniteError",
    "UnsupportedError", "UnexpectedTargetError", "ShapeError", "RankError", "taken",
)  # fmt: skip


class Subject:
    """One model with a swapper, on which a sound adapter is live, and one folder, for all cases of an entry."""

    def __init__(self, entry: str, folder: Path) -> None:
        self.entry = ZOO[entry]
        self.model = self.entry.build()
        sound = {}
        for number, (weights, config) in enumerate(bases(entry)):
            path = sound[f"sound {number}"] = folder / f"sound-{number}"
            path.mkdir()
            (path / WEIGHTS).write_bytes(weights)
            (path / CONFIG).write_text(config)
        self.swapper = hotslot.attach(self.model, sound, route="side")
        self.swapper.activate("sound 0")
        self.inputs = self.entry.inputs()
        self.tensors = [*self.model.parameters(), *self.model.buffers()]
        self.folder = folder / "case"
        self.oracle = folder / "oracle"
        self.before = self.bytes(), self.facts()
        self.seen = snapshot(self.model)

    def bytes(self) -> list[torch.Tensor]:
        return [tensor.detach().clone() for tensor in self.tensors]

    def facts(self) -> Any:
        swapper = self.swapper
        addresses = [tensor.data_ptr() for tensor in self.tensors]
        return swapper.active, swapper.version, swapper.adapters, swapper.host_bytes, addresses

    def assert_unchanged(self) -> None:
        values, facts = self.before
        assert self.facts() == facts
        for value, tensor in zip(values, self.tensors, strict=True):
            assert torch.equal(value.view(torch.uint8), tensor.detach().view(torch.uint8)), "the model has changed"


@contextmanager
def _limited(case: Case) -> Iterator[None]:
    """Fails a case that takes more processor time than it may, if need be from within the matcher of `re`."""

    def stop(*args: Any) -> None:
        raise TimeoutError(f"{case}: more than {HANG_SECONDS} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_SECONDS)
    started = time.process_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    taken = time.process_time() - started
    assert taken < CPU_SECONDS, f"{taken:.1f} s of processor time"


def assert_helps(raised: errors.HotslotError) -> None:
    blank = [name for name in ("where", "found", "expected", "hint") if getattr(raised, name) in (None, "")]
    assert not blank, f"{', '.join(blank)} not stated"
    message = str(raised)
    message.encode()
    assert len(message) < 10_000, f"a message of {len(message):,} characters"
    assert all(line.isprintable() for line in message.splitlines())
    assert len(message.splitlines()) == 5


def passes_header(path: Path) -> bool:
    try:
        return bool(path.is_file() and parse_header(read_header(path), path))
    except (errors.HotslotError, OSError):
        return False


def expected_output(subject: Subject, case: Case) -> torch.Tensor:
    """A fresh load by PEFT, of the tensors as the safetensors library reads them.

    PEFT goes by the config where it says which modules have an adapter; hotslot, as PEFT's hotswap, by the tensors.
    And PEFT drops names without its prefix. So the config names the tensors' modules, and they have the prefix.
    """
    folder = subject.folder / case.options.get("subfolder", "")
    tensors = {f"{P}{name.removeprefix(P)}": t for name, t in load((folder / WEIGHTS).read_bytes()).items()}
    config = json.loads((folder / CONFIG).read_text())
    modules = sorted({name.removeprefix(P).partition(".lora_")[0] for name in tensors if ".lora_" in name})
    config = {key: value for key, value in config.items() if key in LoraConfig.__dataclass_fields__}
    config = {key: None if key in UNUSED_IF_FALSE and not value else value for key, value in config.items()}
    config |= dict.fromkeys(SELECTION)
    config |= {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}  # null: PEFT has no None here
    if config.get("init_lora_weights") is False:
        config["init_lora_weights"] = True  # what the file does not have adds nothing, and not what PEFT draws
    config["target_modules"] = [module.removesuffix(".base_layer.out_proj") for module in modules]
    shutil.rmtree(subject.oracle, ignore_errors=True)
    subject.oracle.mkdir()
    save_file(tensors, subject.oracle / WEIGHTS)
    (subject.oracle / CONFIG).write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fresh(subject.entry, subject.oracle)
    return subject.entry.output(model, subject.inputs)


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    if not want.isfinite().all():  # an alpha of 1e300 is sound, and no use
        assert not got.isfinite().all()
        return
    found = error(got, want)
    assert found <= TOLERANCE[want.dtype], f"relative error {found:.3g}"


def judge(subject: Subject, case: Case) -> str:
    """Name of the error, or "taken"; raises if the case is treated wrongly."""
    swapper = subject.swapper
    try:
        with _limited(case):
            swapper.load("case", subject.folder, **case.options)
    except errors.HotslotError as raised:
        refusal = raised
    else:
        refusal = None
    if refusal is not None:
        assert_helps(refusal)
        subject.assert_unchanged()
        if case.number % 10 == 0:
            with _limited(case):
                fit = swapper.fits(subject.folder, **case.options)
            assert not fit
            assert fit.reason == str(refusal)
        return type(refusal).__name__
    with _limited(case):
        swapper.activate("case")
    got = subject.entry.output(subject.model, subject.inputs)
    want = expected_output(subject, case)
    assert_same(got, want)
    for name in ("sound 1", "sound 0"):  # after two swaps rollback needs the case no more
        swapper.activate(name)
    swapper.unload("case")
    subject.assert_unchanged()
    return "taken"


@pytest.mark.slow
@pytest.mark.parametrize("entry", CASES)
def test_ten_thousand_malformed_adapters(
    entry: str, tmp_path: Path, record_property: Callable[[str, object], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)  # an unknown option is warned of; ten thousand lines would be kept
    subject = Subject(entry, tmp_path)
    counts: Counter[str] = Counter()
    passed = 0
    started, memory = time.process_time(), _peak_bytes()
    slowest, slowest_case = 0.0, ""
    numbers = range(0, CASES[entry], EVERY if CASES[entry] > 1000 else 1)
    for number in numbers:
        shutil.rmtree(subject.folder, ignore_errors=True)
        subject.folder.mkdir()
        case = make_case(entry, number, subject.folder)
        began = time.process_time()
        try:
            passed += passes_header(subject.folder / case.options.get("subfolder", "") / WEIGHTS)
            counts[judge(subject, case)] += 1
            if number % SNAPSHOT_EVERY == 0:
                assert_unchanged(subject.seen, snapshot(subject.model))
        except BaseException as raised:
            raised.add_note(f"{case} {case.options}\nlook at it: cd tests; python -m hostile.fuzz {entry} {number} DIR")
            raise
        if time.process_time() - began > slowest:
            slowest, slowest_case = time.process_time() - began, str(case)
    assert_unchanged(subject.seen, snapshot(subject.model))
    grown = _peak_bytes() - memory
    record_property("fuzz", {"cases": len(numbers), "past the header": passed, **counts})
    record_property(
        "fuzz cost",
        f"{entry}: {time.process_time() - started:.0f} s of processor time, memory grew by {grown >> 20} MB; "
        f"slowest {slowest:.2f} s, {slowest_case}",
    )
    assert passed * 3 >= len(numbers)
    assert counts["taken"] * 8 >= len(numbers), "too few that can be right or wrong"
    assert not [name for name in OF_EVERY_ENTRY if not counts[name]], counts
    assert grown < GROWTH_BYTES


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
