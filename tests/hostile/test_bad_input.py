"""Bad adapters: each is refused by name, with where, found, expected and next step, and the model is as it was."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import hotslot
from adapters import make_adapter
from hostile.defects import CONFIG, DEFECTS, WEIGHTS, Defect, Draft, P, join, sound, split
from hotslot import checkpoint, errors
from hotslot.swapper import Swapper
from methods import fresh_merge, tensors_of
from oracle import assert_same_output, assert_unchanged, error, fresh, fresh_output, snapshot
from zoo import ZOO

WAYS = ("load", "attach", "hotswap_adapter", "load_dict", "state_dict")
CASES = [
    pytest.param(way, defect, id=f"{name}-{way}")
    for name, defect in DEFECTS.items()
    for way in WAYS
    if way in defect.ways
]


class Subject:
    """A model with a sound adapter on it, or, for `attach`, without; and the call that brings another."""

    def __init__(self, way: str, entry: str, folder: Path) -> None:
        self.way = way
        self.entry = ZOO[entry]
        self.sound = folder / "sound"
        self.sound.mkdir()
        sound(entry).save(self.sound)
        self.swapper: Swapper | None = None
        if way in ("load", "load_dict"):
            self.model = self.entry.build()
            self.swapper = hotslot.attach(self.model, {"sound": self.sound}, route="side")
            self.swapper.activate("sound")
        else:
            self.model = self.entry.build() if way == "attach" else fresh(self.entry, self.sound)

    def bring(self, folder: Path, draft: Draft) -> None:
        if self.way == "load":
            assert self.swapper is not None
            self.swapper.load("new", folder)
        elif self.way == "load_dict":
            assert self.swapper is not None
            self.swapper.load("new", draft.tensors, config=draft.config)
        elif self.way == "attach":
            self.swapper = hotslot.attach(self.model, {"sound": self.sound, "new": folder}, route="side")
        elif self.way == "hotswap_adapter":
            hotslot.hotswap_adapter(self.model, str(folder), "default", torch_device="cpu")
        else:
            hotslot.hotswap_adapter_from_state_dict(
                self.model, _as_the_model_has_them(draft.tensors), "default", lora_config(draft)
            )

    def facts(self) -> Any:
        """What a swapper says of itself."""
        swapper = self.swapper
        if swapper is None:
            return Swapper.of(self.model)
        return swapper.active, swapper.version, swapper.adapters, swapper.host_bytes


def lora_config(draft: Draft) -> LoraConfig:
    return LoraConfig(**{key: value for key, value in draft.config.items() if key in LoraConfig.__dataclass_fields__})


def _as_the_model_has_them(tensors: dict[str, Any]) -> dict[str, Any]:
    def named(name: str) -> str:
        for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            name = name.replace(f".{part}.", f".{part}.default.")
            name = f"{name}.default" if name.endswith(f".{part}") else name
        return name

    return {named(name): tensor for name, tensor in tensors.items()}


def spoilt(defect: Defect, folder: Path) -> Draft:
    """The adapter with the defect, on disk under `folder` and in memory."""
    draft = sound(defect.entry)
    folder.mkdir()
    if defect.on_disk:
        draft.save(folder)
        defect.make(folder)
    else:
        defect.make(draft)
        if defect.ways & {"load", "attach", "hotswap_adapter"}:
            draft.save(folder)
    return draft


def assert_helps(raised: errors.HotslotError) -> None:
    """Contract 6: where, what was found, what was expected, and what to do next."""
    blank = [name for name in ("where", "found", "expected", "hint") if getattr(raised, name) in (None, "")]
    assert not blank, f"{', '.join(blank)} not stated by {type(raised).__name__}:\n{raised}"
    lines = str(raised).splitlines()
    assert [line.partition(":")[0] for line in lines[1:]] == ["  where", "  found", "  expected", "  next step"]
    assert all(line.isprintable() for line in lines), "a hostile name writes to the terminal"
    assert len(str(raised)) < 3000


@pytest.mark.parametrize(("way", "defect"), CASES)
def test_bad_adapter_is_refused_and_changes_nothing(way: str, defect: Defect, tmp_path: Path) -> None:
    subject = Subject(way, defect.entry, tmp_path)
    draft = spoilt(defect, tmp_path / "bad")
    before, facts = snapshot(subject.model), subject.facts()
    kind, says = defect.expected(way)
    with pytest.raises(errors.HotslotError, match=says) as caught:
        subject.bring(tmp_path / "bad", draft)
    assert_unchanged(before, snapshot(subject.model))
    assert subject.facts() == facts
    assert caught.type is kind
    assert not (tmp_path / "bad" / "exploded").exists(), "the pickle was unpickled"
    if way == "load":
        assert subject.swapper is not None
        fit = subject.swapper.fits(tmp_path / "bad")
        assert not fit
        assert fit.reason is not None
        assert fit.reason.startswith(caught.value.summary)
        assert_unchanged(before, snapshot(subject.model))


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS)
def test_error_says_where_found_expected_and_next_step(defect: Defect, tmp_path: Path) -> None:
    way = next(way for way in WAYS if way in defect.ways)
    subject = Subject(way, defect.entry, tmp_path)
    draft = spoilt(defect, tmp_path / "bad")
    with pytest.raises(errors.HotslotError) as caught:
        subject.bring(tmp_path / "bad", draft)
    assert_helps(caught.value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("entry", ["mlp", "embedding", "conv2d", "conv3d", "attention", "llama"])
def test_sound_adapter_is_taken_the_same_way(way: str, entry: str, tmp_path: Path) -> None:
    """The control: what the makers begin with is sound, comes in by each way, and changes the output."""
    subject = Subject(way, entry, tmp_path)
    draft = sound(entry)
    for tensor in draft.tensors.values():
        tensor.mul_(0.5)
    (tmp_path / "new").mkdir()
    draft.save(tmp_path / "new")
    inputs = subject.entry.inputs()
    before = subject.entry.output(subject.model, inputs)
    subject.bring(tmp_path / "new", draft)
    if subject.swapper is not None:
        assert subject.swapper.fits(draft.tensors, config=draft.config)
        subject.swapper.activate("new")
    after = subject.entry.output(subject.model, inputs)
    assert_same_output(after, fresh_output(subject.entry, tmp_path / "new"))
    assert error(after, before) > 0.01


@pytest.mark.parametrize(
    "name", ["a rank beyond the plan", "one byte short", "3 more input features", "no such folder"]
)
def test_model_takes_a_sound_adapter_after_a_bad_one(name: str, tmp_path: Path) -> None:
    for way in sorted(DEFECTS[name].ways):
        (tmp_path / way).mkdir()
        subject = Subject(way, "mlp", tmp_path / way)
        draft = spoilt(DEFECTS[name], tmp_path / way / "bad")
        with pytest.raises(errors.HotslotError):
            subject.bring(tmp_path / way / "bad", draft)
        subject.bring(subject.sound, sound())
        if subject.swapper is not None:
            subject.swapper.activate("new")
        output = subject.entry.output(subject.model, subject.entry.inputs())
        assert_same_output(output, fresh_output(subject.entry, subject.sound))


# -- what is unusual and still right -----------------------------------------------------------------------------------


def _unaligned(tensors: dict[str, torch.Tensor]) -> bytes:
    """Packed in the order of their names, whatever their dtypes."""
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in sorted(tensors.items()):
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        kind = {torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header)
    return join((text + " " * (1 - len(text) % 2)).encode(), data)  # a header of odd length


@pytest.mark.parametrize("way", ["load", "attach", "hotswap_adapter"])
def test_unaligned_tensors_load_right(way: str, tmp_path: Path) -> None:
    subject = Subject(way, "mlp", tmp_path)
    folder = tmp_path / "odd"
    folder.mkdir()
    make_adapter(folder, subject.entry, seed=1, r=3, target_modules=list(subject.entry.targets))
    draft = Draft(load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text()))
    for name in (f"{P}down.lora_B.weight", f"{P}inner.0.lora_A.weight"):
        draft.tensors[name] = draft.tensors[name].to(torch.float8_e4m3fn)
    draft.save(folder)
    expected = fresh_output(subject.entry, folder)
    (folder / WEIGHTS).write_bytes(_unaligned(draft.tensors))
    offsets = [entry["data_offsets"][0] for entry in split((folder / WEIGHTS).read_bytes())[0].values()]
    assert any(offset % 4 for offset in offsets)
    subject.bring(folder, draft)
    if subject.swapper is not None:
        subject.swapper.activate("new")
    assert_same_output(subject.entry.output(subject.model, subject.entry.inputs()), expected)


# -- configs of a newer PEFT -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, False, [], {}, "", 0], ids=repr)
@pytest.mark.parametrize("way", ["load", "attach", "hotswap_adapter", "load_dict"])
def test_unknown_option_that_is_unused_passes_with_a_warning(
    way: str, value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    subject = Subject(way, "mlp", tmp_path)
    draft = sound()
    option = f"some_new_option_{way}"  # of its own: a family of adapters is read and warned of once
    draft.config[option] = value
    (tmp_path / "new").mkdir()
    draft.save(tmp_path / "new")
    with caplog.at_level(logging.WARNING, logger="hotslot"):
        subject.bring(subject.sound, sound()) if way != "attach" else None
        assert not caplog.records  # the control
        subject.bring(tmp_path / "new", draft)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert option in caplog.text
    assert repr(value) in caplog.text


# What JSON can hold, in each place of the config.
_VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "zero": 0,
    "minus one": -1,
    "fraction": 0.5,
    "NaN": math.nan,
    "infinity": math.inf,
    "400 digits": 10**400,
    "text": "x",
    "empty text": "",
    "broken pattern": "(",
    "empty list": [],
    "numbers": [1, 2],
    "texts": ["up", "down"],
    "list of lists": [["up"], [1]],
    "empty object": {},
    "object": {"up": 2},
    "object of objects": {"up": {"down": [1]}},
}


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


_VALUES |= {f"{depth} deep": _nested(depth) for depth in (50, 100, 200, 400)}


@pytest.mark.parametrize("option", sorted(LoraConfig.__dataclass_fields__))
def test_no_value_of_an_option_raises_anything_else(option: str, tmp_path: Path) -> None:
    """Whatever stands in a config: it is taken, or refused by one of hotslot's errors, and the model is as it was."""
    subject = Subject("load", "mlp", tmp_path)
    before, facts = snapshot(subject.model), subject.facts()
    assert subject.swapper is not None
    draft, folder, other = sound(), tmp_path / "odd", []
    folder.mkdir()
    draft.save(folder)
    for name, value in _VALUES.items():
        (folder / CONFIG).write_text(json.dumps({**draft.config, option: value}))
        try:
            subject.swapper.load("new", folder)
            subject.swapper.unload("new")
        except errors.HotslotError as raised:
            str(raised).encode()
        except Exception as raised:
            other.append(f"{option} = {name}: {type(raised).__name__}: {raised}"[:150])
    assert not other
    assert subject.facts() == facts
    assert_unchanged(before, snapshot(subject.model))


def test_config_nested_as_deep_as_json_reads(tmp_path: Path) -> None:
    """JSON is read to a depth at which other code that recurses gives up."""
    subject = Subject("load", "mlp", tmp_path)
    folder = tmp_path / "deep"
    folder.mkdir()
    sound().save(folder)
    before = snapshot(subject.model)
    text = (folder / CONFIG).read_text().rstrip()[:-1]
    assert subject.swapper is not None
    other = []
    for option in ("target_modules", "some_new_option", "eva_config", "rank_pattern"):
        for depth in range(50, 1000, 50):
            (folder / CONFIG).write_text(f'{text}, "{option}": {"[" * depth}{"]" * depth}}}')
            try:
                subject.swapper.load("new", folder)
            except errors.HotslotError:
                pass
            except Exception as raised:
                other.append(f"{option}, {depth} deep: {type(raised).__name__}")
    assert not other
    assert_unchanged(before, snapshot(subject.model))


# -- cost --------------------------------------------------------------------------------------------------------------


def test_refusing_a_name_that_comes_twice_takes_no_time_of_its_own(tmp_path: Path) -> None:
    """A header of 100,000 names, the last two equal: read in a tenth of a second, all compared with all in minutes."""
    sound().save(tmp_path)
    entry = '{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
    names = [f'"{i:06}": {entry}' for i in range(100_000)]
    (tmp_path / WEIGHTS).write_bytes(join(f"{{{', '.join([*names, names[-1]])}}}".encode(), b""))
    started = time.perf_counter()
    with pytest.raises(errors.CorruptFileError, match="099999"):
        checkpoint.read(tmp_path)
    assert time.perf_counter() - started < 10


def test_too_many_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = sound()
    draft.config["revision"] = "of this test alone"  # a family of adapters is read once
    draft.save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("hotslot.checkpoint.safetensors_file.MAX_TENSORS", 7)
        with pytest.raises(errors.CorruptFileError, match="8 tensors"):
            checkpoint.read(tmp_path)
    checkpoint.read(tmp_path)  # the control


# -- sources that are no adapter at all --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "nowhere",
        "no/where",
        "no/where/at all",
        "a//b",
        "",
        ".",
        "./nowhere",
        "~/nowhere",
        "/nowhere",
        "x" * 5000,
        "a\0b",
        "ä/ö",
    ],
    ids=lambda source: repr(source[:20]),
)
@pytest.mark.parametrize("way", ["load", "attach", "hotswap_adapter"])
def test_source_that_is_nowhere(way: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    subject = Subject(way, "mlp", tmp_path)
    before = snapshot(subject.model)
    with pytest.raises(errors.AdapterNotFoundError) as caught:
        subject.bring(source, sound())  # type: ignore[arg-type]
    assert_helps(caught.value)
    assert_unchanged(before, snapshot(subject.model))
    subject.bring(subject.sound, sound())  # the control


def test_file_in_place_of_the_folder(tmp_path: Path) -> None:
    subject = Subject("load", "mlp", tmp_path)
    assert subject.swapper is not None
    with pytest.raises(errors.AdapterNotFoundError, match=WEIGHTS) as caught:
        subject.swapper.load("new", subject.sound / WEIGHTS)
    assert_helps(caught.value)


def test_tensors_without_config(tmp_path: Path) -> None:
    subject = Subject("load", "mlp", tmp_path)
    assert subject.swapper is not None
    with pytest.raises(errors.ConfigError, match="config=") as caught:
        subject.swapper.load("new", sound().tensors)
    assert_helps(caught.value)
    subject.swapper.load("new", sound().tensors, config=sound().config)


def test_adapter_name_that_the_model_does_not_have(tmp_path: Path) -> None:
    subject = Subject("hotswap_adapter", "mlp", tmp_path)
    before = snapshot(subject.model)
    with pytest.raises(errors.ModelError, match="default") as caught:
        hotslot.hotswap_adapter(subject.model, str(subject.sound), "other")
    assert_helps(caught.value)
    assert_unchanged(before, snapshot(subject.model))


def test_plain_model_has_nothing_to_swap_out(tmp_path: Path) -> None:
    subject = Subject("attach", "mlp", tmp_path)
    before = snapshot(subject.model)
    with pytest.raises(errors.ModelError, match="attach") as caught:
        hotslot.hotswap_adapter(subject.model, str(subject.sound), "default")
    assert_helps(caught.value)
    assert_unchanged(before, snapshot(subject.model))


@pytest.mark.parametrize("route", ["auto", "merged"])
@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS)
def test_merging_refuses_it_or_does_what_peft_does(defect: Defect, route: str, tmp_path: Path) -> None:
    """Some of what slots refuse a merge can stand for. Then the weights are those of PEFT's own."""
    entry = ZOO[defect.entry]
    if "load" not in defect.ways:
        pytest.skip("comes in another way")
    sound(defect.entry).save(folder := _made(tmp_path / "sound"))
    spoilt(defect, tmp_path / "bad")
    model = entry.build()
    swapper = hotslot.attach(model, {"sound": folder} if route == "auto" else None, route=route)
    before, base = snapshot(model), tensors_of(model)
    try:
        swapper.load("new", tmp_path / "bad")
    except errors.HotslotError as refused:
        assert_helps(refused)
        assert not swapper.fits(tmp_path / "bad")
        assert_unchanged(before, snapshot(model))
        return
    swapper.activate("new")
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, tmp_path / "bad"))
    if route == "merged":
        want = fresh_merge(entry, tmp_path / "bad")
        assert all(torch.equal(values, want[name]) for name, values in tensors_of(model).items())
    swapper.deactivate()
    assert all(torch.equal(values, base[name]) for name, values in tensors_of(model).items())


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
