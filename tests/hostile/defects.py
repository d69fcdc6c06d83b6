"""One maker for each way in which an adapter can be bad: each spoils a sound one, as PEFT saved it.

A maker gets a `Draft` (tensors and config in memory) or the folder with the files, and spoils it in place.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from adapters import make_adapter
from hotslot import errors
from zoo import VOCAB, ZOO

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
P = "base_model.model."
RANK = 4

ALL = frozenset({"load", "attach", "hotswap_adapter", "load_dict", "state_dict"})
FILES = frozenset({"load", "attach", "hotswap_adapter"})
CONFIGS = FILES | {"load_dict"}  # what JSON can say and PEFT's own class may not take
SWAPPER = ALL - {"hotswap_adapter", "state_dict"}  # where PEFT's function is more lenient, so is its drop-in


@dataclass
class Draft:
    """An adapter in memory."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]

    def save(self, folder: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(self.config))


@dataclass(frozen=True)
class Defect:
    """What is wrong, and what is to be said of it.

    Attributes:
        make: takes a Draft, or, where `on_disk`, the folder.
        error: the class, exactly.
        says: regular expression that the message has.
        ways: by which an adapter with this defect can come.
        otherwise: way → (error, says), where PEFT's own function has another name for it.
    """

    name: str
    make: Callable[[Any], None]
    error: type[errors.HotslotError]
    says: str
    ways: frozenset[str] = ALL
    on_disk: bool = False
    entry: str = "mlp"
    otherwise: dict[str, tuple[type[errors.HotslotError], str]] = field(default_factory=dict)

    def expected(self, way: str) -> tuple[type[errors.HotslotError], str]:
        return self.otherwise.get(way, (self.error, self.says))


@cache
def _sound_bytes(entry: str) -> tuple[bytes, str]:
    with TemporaryDirectory() as folder:
        options = {"r": RANK, "lora_alpha": 6, "target_modules": [t for t in ZOO[entry].targets if t not in _EMBEDDED]}
        make_adapter(folder, ZOO[entry], seed=0, **options)
        return Path(folder, WEIGHTS).read_bytes(), Path(folder, CONFIG).read_text()


_EMBEDDED = ("embed_tokens", "lm_head")  # with a LoRA on them PEFT saves copies of their weights


def sound(entry: str = "mlp") -> Draft:
    """A sound adapter of rank 4 on all targets of the entry."""
    weights, config = _sound_bytes(entry)
    return Draft(load(weights), json.loads(config))


# -- tensors -----------------------------------------------------------------------------------------------------------


def _resize(name: str, dim: int, by: int, draft: Draft) -> None:
    sizes = list(draft.tensors[name].shape)
    sizes[dim] += by
    draft.tensors[name] = torch.full(sizes, 0.25)


def _replace(name: str, value: Tensor, draft: Draft) -> None:
    draft.tensors[name] = value


def _drop(name: str, draft: Draft) -> None:
    del draft.tensors[name]


def _poison(name: str, index: int, value: float, draft: Draft) -> None:
    draft.tensors[name].view(-1)[index] = value


def _clear(draft: Draft) -> None:
    draft.tensors.clear()


def _both(*makers: Callable[[Draft], None]) -> Callable[[Draft], None]:
    def make(draft: Draft) -> None:
        for maker in makers:
            maker(draft)

    return make


def _rank(rank: int, draft: Draft) -> None:
    """A sound adapter of another rank."""
    for name, tensor in draft.tensors.items():
        dim = 0 if "lora_A" in name else 1
        sizes = list(tensor.shape)
        sizes[dim] = sizes[dim] * rank // RANK
        draft.tensors[name] = torch.full(sizes, 0.25)
    draft.config["r"] = rank


def _misfit(name: str, entry: str, tensor: str, dim: int, by: int) -> Defect:
    make = partial(_resize, f"{P}{tensor}", dim, by)
    return Defect(name, make, errors.ShapeError, tensor.removesuffix(".weight"), entry=entry)


UP_A, UP_B = f"{P}up.lora_A.weight", f"{P}up.lora_B.weight"

_SHAPES = [
    _misfit("3 more output features", "mlp", "up.lora_B.weight", 0, 3),
    _misfit("3 fewer output features", "mlp", "up.lora_B.weight", 0, -3),
    _misfit("3 more input features", "mlp", "up.lora_A.weight", 1, 3),
    _misfit("3 fewer input features", "mlp", "up.lora_A.weight", 1, -3),
    _misfit("a larger vocabulary", "embedding", "word.lora_embedding_A", 1, 8),
    _misfit("a smaller vocabulary", "embedding", "word.lora_embedding_A", 1, -8),
    _misfit("a wider embedding", "embedding", "word.lora_embedding_B", 0, 1),
    _misfit("a narrower embedding", "embedding", "word.lora_embedding_B", 0, -1),
    _misfit("more channels", "conv2d", "stem.lora_A.weight", 1, 1),
    _misfit("fewer channels", "conv2d", "stem.lora_B.weight", 0, -1),
    _misfit("a larger kernel", "conv2d", "stem.lora_A.weight", 2, 2),
    _misfit("a smaller kernel", "conv3d", "stem.lora_A.weight", 4, -1),
    _misfit("a wider attention", "attention", "batch_first.lora_A.weight", 1, 4),
    _misfit("a narrower attention", "attention", "batch_first.base_layer.out_proj.lora_B.weight", 0, -4),
    Defect("a matrix for a convolution", _both(partial(_replace, f"{P}stem.lora_A.weight", torch.ones(4, 3)),
           partial(_replace, f"{P}stem.lora_B.weight", torch.ones(8, 4))), errors.ShapeError, "stem.lora_A",
           entry="conv2d"),
    Defect("a rank that the groups do not divide", partial(_rank, 3), errors.DoesNotFitError, "multiple of 2",
           entry="conv2d"),
]  # fmt: skip

_TENSORS = [
    Defect("no tensors", _clear, errors.TensorError, "no LoRA tensors"),
    Defect("A of rank 4, B of rank 3", partial(_resize, UP_B, 1, -1), errors.TensorError, r"\bup\b(?s:.*)ranks? 4"),
    Defect("A of rank 3, B of rank 4", partial(_resize, UP_A, 0, -1), errors.TensorError, r"\bup\b(?s:.*)rank 4"),
    Defect("A with one dimension", partial(_replace, UP_A, torch.ones(12)), errors.TensorError,
           r"\bup\b(?s:.*)\(12,\)"),
    Defect("B with one dimension", partial(_replace, UP_B, torch.ones(32)), errors.TensorError,
           r"\bup\b(?s:.*)\(32,\)"),
    Defect("A of no dimension", partial(_replace, UP_A, torch.tensor(1.0)), errors.TensorError, r"\bup\b"),
    Defect("both of one dimension",
           _both(partial(_replace, UP_A, torch.ones(12)), partial(_replace, UP_B, torch.ones(32))),
           errors.TensorError, r"\bup\b"),
    Defect("both of rank 0",
           _both(partial(_replace, UP_A, torch.ones(0, 12)), partial(_replace, UP_B, torch.ones(32, 0))),
           errors.TensorError, r"\bup\b"),
    Defect("a hundred dimensions", partial(_replace, UP_A, torch.ones([4, 12] + [1] * 98)), errors.TensorError,
           r"\bup\b"),
    Defect("A without B", partial(_drop, UP_B), errors.TensorError, r"\bup\b(?s:.*)lora_A", ways=SWAPPER),
    Defect("B without A", partial(_drop, UP_A), errors.TensorError, r"\bup\b(?s:.*)lora_B", ways=SWAPPER),
    Defect("a key of no module", partial(_replace, f"{P}up.weight_norm", torch.ones(3)), errors.TensorError,
           "weight_norm",
           otherwise={"state_dict": (errors.UnexpectedTargetError, "unexpected keys found: .*weight_norm")}),
    Defect("an empty name", partial(_replace, "", torch.ones(3)), errors.TensorError, "no LoRA module",
           otherwise={"state_dict": (errors.UnexpectedTargetError, "unexpected keys found")}),
    Defect("a magnitude of DoRA", partial(_replace, f"{P}up.lora_magnitude_vector", torch.ones(32)), errors.TensorError,
           "lora_magnitude_vector",
           otherwise={"state_dict": (errors.UnexpectedTargetError, "unexpected keys found: .*lora_magnitude_vector")}),
    Defect("a module that the model lacks", _both(partial(_replace, f"{P}side.lora_A.weight", torch.ones(4, 12)),
           partial(_replace, f"{P}side.lora_B.weight", torch.ones(32, 4))), errors.UnexpectedTargetError, "side"),
    Defect("a bias that the config denies", partial(_replace, f"{P}up.lora_B.bias", torch.ones(32)), errors.TensorError,
           r"\bup\b(?s:.*)lora_bias", ways=SWAPPER),
    Defect("integers", partial(_replace, UP_A, torch.ones(4, 12, dtype=torch.int32)), errors.TensorError, "lora_A"),
    Defect("booleans", partial(_replace, UP_A, torch.ones(4, 12, dtype=torch.bool)), errors.TensorError, "lora_A"),
    Defect("complex numbers", partial(_replace, UP_A, torch.ones(4, 12, dtype=torch.complex64)), errors.TensorError,
           "lora_A"),
    Defect("a meta tensor", partial(_replace, UP_A, torch.empty(4, 12, device="meta")), errors.TensorError, "lora_A",
           ways=frozenset({"load_dict", "state_dict"})),
    Defect("a sparse tensor", partial(_replace, UP_A, torch.ones(4, 12).to_sparse()), errors.TensorError, "lora_A",
           ways=frozenset({"load_dict", "state_dict"})),
    Defect("no tensor", lambda draft: draft.tensors.update({UP_A: [[1.0]]}), errors.TensorError, "lora_A",
           ways=frozenset({"load_dict", "state_dict"})),
    *(Defect(f"{value} in the {place} value", partial(_poison, name, index, value), errors.NonFiniteError,
             name.removeprefix(P).removesuffix(".weight"))
      for value in (float("nan"), float("inf"), -float("inf"))
      for place, name, index in (("first", f"{P}down.lora_A.weight", 0), ("last", UP_B, -1))),
    Defect("a rank beyond the plan", partial(_rank, 5), errors.RankError, r"rank 5(?s:.*)at most 4",
           ways=frozenset({"load", "load_dict"})),
]  # fmt: skip

_RESIZED = [
    Defect(f"a resized {module}", partial(_replace, f"{P}{path}", torch.full((VOCAB + by, 16), 0.5)),
           errors.UnsupportedError, f"{module}(?s:.*)save_embedding_layers=False", entry="llama",
           ways=CONFIGS)
    for module, path in (("embed_tokens", "model.embed_tokens.weight"), ("lm_head", "lm_head.weight"))
    for by in (8, -8)
]  # fmt: skip


# -- config ------------------------------------------------------------------------------------------------------------


def _set(key: str, value: Any, draft: Draft) -> None:
    draft.config[key] = value


def _unset(key: str, draft: Draft) -> None:
    draft.config.pop(key)


def _option(key: str, value: Any, error: type[errors.HotslotError], says: str = "", name: str = "") -> Defect:
    return Defect(name or f"{key} = {value!r}", partial(_set, key, value), error, says or key, ways=CONFIGS)


_REFUSED_OPTIONS = {
    "alora_invocation_tokens": [5],
    "layer_replication": [[0, 1]],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1.0},
    "megatron_config": {"tensor_model_parallel_size": 2},
    "init_lora_weights": "pissa",
}
_OTHER_INITS = ("pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "something new")

_METHODS = [
    Defect(f"peft_type = {method!r}", partial(_set, "peft_type", method), errors.UnsupportedError, "(?i)peft.type",
           ways=CONFIGS)
    for method in ("IA3", "LOHA", "PROMPT_TUNING", "lora", "SOMETHING_NEW", "", None, 5, ["LORA"])
] + [
    Defect("no peft_type", partial(_unset, "peft_type"), errors.UnsupportedError, "(?i)peft.type",
           ways=CONFIGS),
]  # fmt: skip

_NUMBERS = [
    *(_option("r", value, errors.ConfigError) for value in (0, -1, 4.5, "4", None, True, [4])),
    *(_option("r", value, errors.ConfigError, name=f"r = {name}") for name, value in (
        ("infinity", float("inf")), ("NaN", float("nan")), ("a number of 400 digits", 10**400))),
    *(_option("lora_alpha", value, errors.ConfigError) for value in ("16", None, True, [16])),
    *(_option("lora_alpha", value, errors.ConfigError, name=f"lora_alpha = {name}") for name, value in (
        ("infinity", float("inf")), ("NaN", float("nan")), ("a number of 400 digits", 10**400),
        ("a number beyond float32", -1e39))),
    *(_option("lora_dropout", value, errors.ConfigError) for value in (-0.1, 1.5, "0.1", [0.1])),
    Defect("r = 64, rank 4 in the file", partial(_set, "r", 64), errors.TensorError, r"rank 64"),
    Defect("no r, rank 4 in the file", partial(_unset, "r"), errors.TensorError, r"rank 8",
           ways=CONFIGS),
    Defect("rank_pattern says 2, rank 4 in the file", partial(_set, "rank_pattern", {"up": 2}), errors.TensorError,
           r"\bup\b(?s:.*)rank 2"),
    Defect("lora_bias without biases", partial(_set, "lora_bias", True), errors.TensorError, r"lora_B\.bias"),
]  # fmt: skip

_PATTERNS = [
    _option(key, value, errors.ConfigError, name=f"{key}: {name}")
    for key in ("rank_pattern", "alpha_pattern")
    for name, value in (
        ("a list", ["up", 4]),
        ("a string", "up"),
        ("no number", {"up": "4"}),
        ("true", {"up": True}),
        ("null", {"up": None}),
        ("infinity", {"up": float("inf")}),
        ("400 digits", {"up": 10**400}),
        ("no regular expression", {"up(": 4}),
        ("a repetition without end", {"up{9999999999999999999999}": 4}),
        ("nested without end", {"(" * 5000 + ")" * 5000: 4}),
    )
]

_CONFIG_VALUES = [
    *(_option(key, value, errors.UnsupportedError) for key, value in _REFUSED_OPTIONS.items()),
    *(_option("init_lora_weights", value, errors.UnsupportedError) for value in _OTHER_INITS),
    *(_option(key, value, errors.ConfigError)
      for key in ("velora_config", "monteclora_config") for value in ("x", [2])),
    _option("monteclora_config", {"nothing": 2}, errors.ConfigError, "nothing"),
    *(_option("some_new_option", value, errors.ConfigError) for value in (True, 1, 0.5, "x", [0], {"a": 0})),
    Defect("options that PEFT does not take together",
           _both(partial(_set, "target_modules", ".*up"), partial(_set, "layers_to_transform", [0])),
           errors.ConfigError, "layers_to_transform", ways=CONFIGS),
]  # fmt: skip


# -- files -------------------------------------------------------------------------------------------------------------


def _bytes_of_file(change: Callable[[bytes], bytes], folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def split(file: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    length = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def join(header: Any, data: bytes) -> bytes:
    """The safetensors file of a header, which may be JSON text already, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _header(change: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    def rewritten(file: bytes) -> bytes:
        header, data = split(file)
        header.pop("__metadata__", None)
        changed = change(header)
        return join(header if changed is None else changed, data)

    _bytes_of_file(rewritten, folder)


def _entry(key: str, value: Any, header: dict[str, Any]) -> None:
    header[UP_A][key] = value


def _on_disk(name: str, change: Callable[[Any], Any], says: str = "", *, header: bool = True) -> Defect:
    make = partial(_header if header else _bytes_of_file, change)
    return Defect(name, make, errors.CorruptFileError, says or WEIGHTS, ways=FILES, on_disk=True)


def _add(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.update({name: {"dtype": "F32", **fields}})


def _same_range(header: dict[str, Any]) -> None:
    header[UP_A]["data_offsets"] = list(header[f"{P}down.lora_A.weight"]["data_offsets"])
    header[UP_A]["shape"] = list(header[f"{P}down.lora_A.weight"]["shape"])


def _shift(by: int) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[UP_B]["data_offsets"] = [offset + by for offset in header[UP_B]["data_offsets"]]

    return change


def _twice(header: dict[str, Any]) -> bytes:
    text = json.dumps(header)
    return f"{text[:-1]}, {json.dumps(UP_A)}: {json.dumps(header[UP_A])}}}".encode()


def _twice_inside(header: dict[str, Any]) -> bytes:
    return json.dumps(header).replace('{"dtype": "F32"', '{"dtype": "F32", "dtype": "F32"', 1).encode()


def _rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.update({new: header.pop(old)})


def _hole(file: bytes) -> bytes:
    header, data = split(file)
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] > 0:
            entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]
    first = min(e["data_offsets"][1] for e in header.values() if "data_offsets" in e)
    return join(header, data[:first] + bytes(4) + data[first:])


def _hole_in_front(file: bytes) -> bytes:
    header, data = split(file)
    for entry in header.values():
        if "data_offsets" in entry:
            entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]
    return join(header, bytes(4) + data)


_FILE_DEFECTS = [
    _on_disk("an empty file", lambda file: b"", header=False),
    _on_disk("7 bytes", lambda file: file[:7], header=False),
    _on_disk("8 bytes", lambda file: file[:8], header=False),
    _on_disk("cut short in the header", lambda file: file[:100], header=False),
    _on_disk("one byte short", lambda file: file[:-1], header=False),
    _on_disk("half of the file", lambda file: file[: len(file) // 2 + 500], header=False),
    _on_disk("one byte more", lambda file: file + b"\0", header=False),
    _on_disk("a header longer than the file", lambda file: len(file).to_bytes(8, "little") + file[8:], header=False),
    _on_disk("a header of 2^64 - 1 bytes", lambda file: b"\xff" * 8 + file[8:], header=False),
    _on_disk("a header of no bytes", lambda file: bytes(8) + file[8:], header=False),
    _on_disk("a hole between two tensors", _hole, header=False),
    _on_disk("a hole before the first tensor", _hole_in_front, header=False),
    _on_disk("a header that is no text", lambda header: b"\xff\xfe\xfd\xfc"),
    _on_disk("a header that is no JSON", lambda header: b'{"a": '),
    _on_disk("a header that is a list", lambda header: b"[1, 2]"),
    _on_disk("a header that is a number", lambda header: b"5"),
    _on_disk("lists nested 100,000 deep", lambda header: b"[" * 100_000),
    _on_disk("objects nested 100,000 deep", lambda header: b'{"a":' * 100_000),
    _on_disk("the same name twice", _twice, UP_A),
    _on_disk("the same field twice", _twice_inside, "dtype"),
    _on_disk("two tensors in one range", _same_range),
    _on_disk("overlapping ranges", _shift(-4)),
    _on_disk("a range behind the end", _shift(4)),
    _on_disk("a name of 5,000 characters", _rename(UP_A, "x" * 5000), "5,000"),
    _on_disk("an entry that is a list", lambda header: header.update({UP_A: [1]}), UP_A),
    _on_disk("an entry with a field too many", partial(_entry, "strides", [1]), UP_A),
    _on_disk("an entry without shape", lambda header: header[UP_A].pop("shape") and None, UP_A),
    _on_disk("a dtype that there is not", partial(_entry, "dtype", "F7"), "F7"),
    _on_disk("a dtype that is a number", partial(_entry, "dtype", 32), UP_A),
    _on_disk("a negative shape", partial(_entry, "shape", [-4, -12]), UP_A),
    _on_disk("a shape of text", partial(_entry, "shape", "4, 12"), UP_A),
    _on_disk("a shape of floats", partial(_entry, "shape", [4.0, 12.0]), UP_A),
    _on_disk("a shape of booleans", partial(_entry, "shape", [True, True]), UP_A),
    _on_disk("a nested shape", partial(_entry, "shape", [[4, 12]]), UP_A),
    _on_disk("a shape larger than its range", partial(_entry, "shape", [4, 13]), UP_A),
    _on_disk("a huge shape", partial(_entry, "shape", [2**40, 2**40]), UP_A),
    _on_disk("a huge shape of no bytes", _add("huge", shape=[0, 2**63], data_offsets=[0, 0]), "huge"),
    _on_disk("a shape that overflows to its range", partial(_entry, "shape", [2**62, 4, 48]), UP_A),
    _on_disk("negative offsets", partial(_entry, "data_offsets", [-192, 0]), UP_A),
    _on_disk("reversed offsets", partial(_entry, "data_offsets", [192, 0]), UP_A),
    _on_disk("offsets of booleans", partial(_entry, "data_offsets", [False, True]), UP_A),
    _on_disk("three offsets", partial(_entry, "data_offsets", [0, 4, 192]), UP_A),
    _on_disk("huge offsets", partial(_entry, "data_offsets", [2**70, 2**70 + 192])),
    Defect("a name that writes to the terminal", partial(_header, _rename(UP_A, "x\n\x1b[2J  next step: run this")),
           errors.TensorError, "no LoRA module", ways=FILES, on_disk=True),
    Defect("a name that is no text", partial(_header, _rename(UP_A, "\ud800")), errors.TensorError, "no LoRA module",
           ways=FILES, on_disk=True),
]  # fmt: skip


def _sparse_header(folder: Path) -> None:
    with open(folder / WEIGHTS, "wb") as file:  # takes no room on the disk
        file.write((150_000_000).to_bytes(8, "little"))
        file.truncate(200_000_000)


def _move(old: str, new: str, folder: Path) -> None:
    (folder / old).rename(folder / new)


def _remove(name: str, folder: Path) -> None:
    (folder / name).unlink()


def _remove_all(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def _make_folder(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


def _make_fifo(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)  # to open it would wait for a writer


def _write(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def _pickled(kind: str, name: str, folder: Path) -> None:
    """A pickle that would leave a mark, `exploded`, beside it."""
    (folder / WEIGHTS).unlink()
    if kind == "bare":
        (folder / name).write_bytes(pickle.dumps(Bomb(folder / "exploded"), protocol=4))
        return
    buffer = io.BytesIO()
    torch.save(Bomb(folder / "exploded"), buffer, _use_new_zipfile_serialization=kind == "zip")
    (folder / name).write_bytes(buffer.getvalue())


def _folder(name: str, make: Callable[[Path], None], error: type[errors.HotslotError], says: str) -> Defect:
    return Defect(name, make, error, says, ways=FILES, on_disk=True)


_NO_JSON = {
    "empty": b"",
    "no JSON": b"{'r': 4}",
    "cut short": b'{"r": 4, ',
    "no text": b"\xff\xfe\xfd\xfc",
    "a list": b"[1]",
    "a number": b"8",
    "null": b"null",
    "lists nested 100,000 deep": b"[" * 100_000,
    "objects nested 100,000 deep": b'{"r":' * 100_000,
    "a number of 5,000 digits": b'{"r": ' + b"9" * 5000 + b"}",
    "too large": b'{"r": 4}' + b" " * 8_000_001,
}

_FOLDERS = [
    _folder("no such folder", _remove_all, errors.AdapterNotFoundError, "No adapter at"),
    _folder("no weights", partial(_remove, WEIGHTS), errors.AdapterNotFoundError, WEIGHTS),
    _folder("no config", partial(_remove, CONFIG), errors.AdapterNotFoundError, CONFIG),
    _folder("weights under another name", partial(_move, WEIGHTS, "model.safetensors"), errors.AdapterNotFoundError,
            "model.safetensors"),
    _folder("weights that are a folder", partial(_make_folder, WEIGHTS), errors.AdapterNotFoundError, WEIGHTS),
    _folder("a config that is a folder", partial(_make_folder, CONFIG), errors.AdapterNotFoundError, CONFIG),
    _folder("weights that are a pipe", partial(_make_fifo, WEIGHTS), errors.AdapterNotFoundError, WEIGHTS),
    _folder("a config that is a pipe", partial(_make_fifo, CONFIG), errors.AdapterNotFoundError, CONFIG),
    _folder("a header above the limit", _sparse_header, errors.CorruptFileError, "150,000,000"),
    *(_folder(f"a {kind} pickle named {name}", partial(_pickled, kind, name), errors.PickleRefusedError,
              r"safetensors\.torch\.save_file\(torch\.load\(.*weights_only=True")
      for kind in ("zip", "legacy", "bare") for name in ("adapter_model.bin", WEIGHTS)),
    *(_folder(f"a config that is {name}", partial(_write, CONFIG, content), errors.ConfigError, CONFIG)
      for name, content in _NO_JSON.items()),
]  # fmt: skip

DEFECTS = {
    defect.name: defect
    for defect in (
        *_SHAPES, *_TENSORS, *_RESIZED, *_METHODS, *_NUMBERS, *_PATTERNS, *_CONFIG_VALUES, *_FILE_DEFECTS, *_FOLDERS
    )
}  # fmt: skip
