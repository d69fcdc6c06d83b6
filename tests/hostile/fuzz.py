"""Malformed adapters without end, each grown from a sound one by one to four mutations.

A mutation works on one of the forms that an adapter passes through on its way to the disk, in this order:

    tensors and config  →  header and data  →  bytes of both files  →  the folder

so that a case may have sound JSON around a bad shape, or a sound file behind a link. Some mutations are harmless: most
of what hotslot reads is right, and a fuzzer that only sees refusals does not see what it lets through.

The same entry and number give the same case anywhere. To look at one: `cd tests; python -m hostile.fuzz mlp 1234 DIR`.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load
from torch import Tensor

from adapters import make_adapter, random_config
from hostile.defects import CONFIG, WEIGHTS, Draft, P, join
from zoo import ZOO

BASES = 6  # sound adapters of each entry, their options drawn over all of plain LoRA
MILLION = 1_000_000

_SETS = ("target_modules", "exclude_modules")
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int32: "I32", torch.int8: "I8",
    torch.bool: "BOOL", torch.uint8: "U8", torch.complex64: "C64",
}  # fmt: skip


@dataclass
class File:
    """A safetensors file before it is one. `text` replaces the header's JSON."""

    header: dict[str, Any]
    data: bytes
    text: bytes | None = None

    def entry(self, rng: Random) -> dict[str, Any]:
        """One tensor's entry; an empty one where there is none."""
        entries = [value for value in self.header.values() if isinstance(value, dict) and "shape" in value]
        return rng.choice(entries) if entries else {}


@dataclass
class Case:
    """What to do with an adapter's folder, and how to call for it."""

    entry: str
    number: int
    mutations: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.entry} {self.number}: {', '.join(self.mutations)}"


Mutation = Callable[..., Any]
_STAGES: dict[str, list[tuple[str, Mutation, int]]] = {
    "draft": [],
    "file": [],
    "weights": [],
    "config": [],
    "folder": [],
}


def _mutation(stage: str, weight: int = 2) -> Callable[[Mutation], Mutation]:
    def register(make: Mutation) -> Mutation:
        _STAGES[stage].append((make.__name__.strip("_").replace("_", " "), make, weight))
        return make

    return register


@cache
def bases(entry: str) -> tuple[tuple[bytes, str], ...]:
    """The sound adapters of an entry, as PEFT saved them: weights and config."""
    rng = Random(f"bases of {entry}")
    found = []
    for seed in range(BASES):
        with tempfile.TemporaryDirectory() as folder:
            make_adapter(folder, ZOO[entry], seed=seed, **random_config(rng, ZOO[entry]))
            config = json.loads(Path(folder, CONFIG).read_text())
            # PEFT writes its sets in an order of the moment.
            config = {
                key: sorted(value) if key in _SETS and isinstance(value, list) else value
                for key, value in config.items()
            }
            found.append((Path(folder, WEIGHTS).read_bytes(), json.dumps(config)))
    return tuple(found)


def make_case(entry: str, number: int, folder: Path) -> Case:
    """Write case `number` of an entry into `folder`, which is empty; the adapter is there, or in options' subfolder."""
    rng = Random(f"{entry} {number}")
    case = Case(entry, number)
    chosen: list[tuple[str, str, Mutation]] = []
    everything = [(stage, *mutation) for stage, mutations in _STAGES.items() for mutation in mutations]
    weights = [weight * _STAGE_WEIGHTS[stage] / len(_STAGES[stage]) for stage, _, _, weight in everything]
    for stage, name, make, _ in rng.choices(everything, weights, k=rng.choice((1, 1, 1, 2, 2, 3, 4))):
        chosen.append((stage, name, make))
    chosen.sort(key=lambda mutation: [*_STAGES].index(mutation[0]))
    case.mutations = [name for _, name, _ in chosen]
    of = {stage: [make for found, _, make in chosen if found == stage] for stage in _STAGES}

    weights_then, config_then = rng.choice(bases(entry))
    draft = Draft(load(weights_then), json.loads(config_then))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a complex tensor made real by the next mutation
        for make in of["draft"]:
            make(rng, draft)
    file = _file(draft)
    for make in of["file"]:
        make(rng, file)
    content = join(file.text if file.text is not None else json.dumps(file.header).encode(), file.data)
    for make in of["weights"]:
        content = make(rng, content)
    text = json.dumps(draft.config).encode()
    for make in of["config"]:
        text = make(rng, text)
    (folder / WEIGHTS).write_bytes(content)
    (folder / CONFIG).write_bytes(text)
    for make in of["folder"]:
        make(rng, folder, case)
    return case


# Of all mutations, by what they work on.
_STAGE_WEIGHTS = {"draft": 60, "file": 14, "weights": 8, "config": 8, "folder": 10}


def _file(draft: Draft) -> File:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data, end = [], 0
    for name, tensor in sorted(draft.tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [end, end + len(raw)]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data.append(raw)
        end += len(raw)
    return File(header, b"".join(data))


def _one(rng: Random, draft: Draft) -> str:
    return rng.choice(sorted(draft.tensors)) if draft.tensors else ""


def _modules(draft: Draft) -> list[str]:
    """Module paths as the patterns see them."""
    found = {re.sub(r"\.lora_(A|B|embedding_[AB]).*$", "", name).removeprefix(P) for name in draft.tensors}
    return sorted(name.removesuffix(".base_layer.out_proj") for name in found) or ["nothing"]


def _change(rng: Random, draft: Draft, change: Callable[[Tensor], Tensor]) -> None:
    name = _one(rng, draft)
    if name:
        draft.tensors[name] = change(draft.tensors[name])


# -- tensors -----------------------------------------------------------------------------------------------------------


@_mutation("draft", 6)
def _scaled_values(rng: Random, draft: Draft) -> None:
    factor = rng.choice((0.5, -1.0, 2.0, 0.0, 1e-3, 1e-30, 10.0))
    draft.tensors = {name: (tensor.double() * factor).to(tensor.dtype) for name, tensor in draft.tensors.items()}


@_mutation("draft", 4)
def _one_value(rng: Random, draft: Draft) -> None:
    value = rng.choice((math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, 1e-45, 3.0))

    def change(tensor: Tensor) -> Tensor:
        if tensor.numel() and tensor.dtype.is_floating_point:
            tensor = tensor.clone().contiguous()
            tensor.view(-1)[rng.randrange(tensor.numel())] = value
        return tensor

    _change(rng, draft, change)


_FLOATS = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_NO_FLOATS = (torch.int32, torch.int8, torch.bool, torch.uint8, torch.complex64)


@_mutation("draft", 4)
def _another_dtype(rng: Random, draft: Draft) -> None:
    dtype = rng.choice(_FLOATS)
    draft.tensors = {name: tensor.to(dtype) for name, tensor in draft.tensors.items()}


@_mutation("draft", 3)
def _one_of_another_dtype(rng: Random, draft: Draft) -> None:
    _change(rng, draft, lambda tensor: tensor.to(rng.choice(_FLOATS)))


@_mutation("draft")
def _one_of_no_float(rng: Random, draft: Draft) -> None:
    _change(rng, draft, lambda tensor: tensor.to(rng.choice(_NO_FLOATS)))


@_mutation("draft", 4)
def _another_size(rng: Random, draft: Draft) -> None:
    def change(tensor: Tensor) -> Tensor:
        sizes = list(tensor.shape) or [1]
        dim = rng.randrange(len(sizes))
        sizes[dim] = max(0, sizes[dim] + rng.choice((-4, -1, 1, 2, 8, 100)))
        return torch.full(sizes, 0.25).to(tensor.dtype)

    _change(rng, draft, change)


@_mutation("draft", 3)
def _another_form(rng: Random, draft: Draft) -> None:
    forms: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.transpose(0, -1) if t.dim() else t,
        lambda t: t.reshape(-1),
        lambda t: t.unsqueeze(rng.choice((0, -1))),
        lambda t: t.reshape([*t.shape, *([1] * 20)]),
        lambda t: torch.zeros([], dtype=t.dtype),
        lambda t: t.reshape(-1)[:0].reshape(0, *t.shape[1:]) if t.dim() else t,
        lambda t: t.reshape(-1, 1),
    ]
    _change(rng, draft, rng.choice(forms))


@_mutation("draft", 6)
def _another_rank(rng: Random, draft: Draft) -> None:
    """All of one other rank, in tensors and config alike."""
    rank = rng.choice((1, 2, 2, 3, 4, 4, 6, 8, 8, 9, 64))
    old = {}
    for name, tensor in draft.tensors.items():
        if re.search(r"lora_(embedding_)?A", name) and tensor.dim():
            old[name.partition(".lora_")[0]] = tensor.shape[0] or 1
    for name, tensor in draft.tensors.items():
        match = re.search(r"lora_(?:embedding_)?([AB])(?!.*bias)", name)
        before = old.get(name.partition(".lora_")[0])
        if match and before and tensor.dim() > 1 and tensor.numel():
            sizes = list(tensor.shape)
            dim = "AB".index(match[1])
            sizes[dim] = max(1, sizes[dim] * rank // before)
            flat = tensor.double().reshape(-1)
            count = math.prod(sizes)
            draft.tensors[name] = flat.repeat(count // max(1, len(flat)) + 1)[:count].reshape(sizes).to(tensor.dtype)
    draft.config.update(r=rank, rank_pattern={})


@_mutation("draft", 3)
def _swapped_tensors(rng: Random, draft: Draft) -> None:
    a, b = _one(rng, draft), _one(rng, draft)
    if a:
        draft.tensors[a], draft.tensors[b] = draft.tensors[b], draft.tensors[a]


@_mutation("draft", 3)
def _missing_tensor(rng: Random, draft: Draft) -> None:
    draft.tensors.pop(_one(rng, draft), None)


@_mutation("draft", 5)
def _missing_module(rng: Random, draft: Draft) -> None:
    module = _one(rng, draft).partition(".lora_")[0]
    draft.tensors = {n: t for n, t in draft.tensors.items() if n.partition(".lora_")[0] != module}


@_mutation("draft", 1)
def _no_tensors(rng: Random, draft: Draft) -> None:
    draft.tensors.clear()


_BEYOND = ("a" * MILLION, "a." * 50_000, "é" * 5_000, "x" * 4_096, "a." * 120)


@_mutation("draft", 5)
def _another_name(rng: Random, draft: Draft) -> None:
    old = _one(rng, draft)
    new = rng.choice(
        (
            old.removeprefix(P), P + old, old.upper(), old.replace("lora_A", "lora_a"), f"{old}.weight", f".{old}",
            old.replace(".weight", ".default.weight"), old.replace("lora_", "lora_magnitude_vector_"), "",
            "../../etc/passwd", "\0", "a\nb.lora_A.weight", "\x1b[2J", "\u202e.lora_B.weight", "\ud800.lora_A.weight",
            f"{P}nowhere.lora_A.weight", f"{P}.lora_A.weight", "lora_A.weight", f"{P}up.weight", f"{P}head.weight",
            f"{P}{rng.choice(_BEYOND)}.lora_A.weight", "__metadata__ ", old.replace("base_model.", ""),
        )
    )  # fmt: skip
    if old:
        draft.tensors[new] = draft.tensors.pop(old)


@_mutation("draft", 3)
def _another_module(rng: Random, draft: Draft) -> None:
    """Both matrices of a module under another's path."""
    modules = _modules(draft)
    old, new = rng.choice(modules), rng.choice((*modules, "nowhere", "a\nb", "a+b", "x" * 4000, "up"))
    draft.tensors = {n.replace(f"{P}{old}.lora_", f"{P}{new}.lora_"): t for n, t in draft.tensors.items()}


@_mutation("draft", 3)
def _no_prefix(rng: Random, draft: Draft) -> None:
    draft.tensors = {name.removeprefix(P): tensor for name, tensor in draft.tensors.items()}


@_mutation("draft", 2)
def _one_more_tensor(rng: Random, draft: Draft) -> None:
    module = _one(rng, draft).partition(".lora_")[0]
    suffix = rng.choice(("lora_B.bias", "lora_magnitude_vector", "weight", "bias", "lora_embedding_A", "lora_E", "x"))
    draft.tensors[f"{module}.{suffix}"] = torch.ones(rng.choice((1, 4, 8, 12, 32)))


@_mutation("draft", 1)
def _many_tensors(rng: Random, draft: Draft) -> None:
    suffixes = rng.choice((("lora_A.weight", "lora_B.weight"), ("lora_A.weight",), ("weight",)))
    empty = torch.ones(0) if rng.random() < 0.5 else torch.ones(1, 1)
    draft.tensors.update({f"{P}layers.{i}.{suffix}": empty for i in range(500) for suffix in suffixes})


# -- config ------------------------------------------------------------------------------------------------------------


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value] if depth % 2 else {"a": value}
    return value


_NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 4, 8, 16, 0.5, -2.5, -0.0, 1e-300, 1e300, 1e308, math.inf, -math.inf, math.nan, 10**9, 10**18, 2**63,
    10**400, 10**4299, True, False, None, "4", "", [4], {"a": 4},
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    *_NUMBERS, "x", "(", "\0", "\ud800", "a\nb", "x" * 5000, [], ["up"], [1, None], [["up"], [1]], {}, {"up": 2},
    {"up": {"down": [1]}}, {"": 1}, _nested(10), _nested(33), _nested(100), list(range(5000)), ["é" * 100] * 50,
)  # fmt: skip

ENDLESS = (
    "(a+)+$", "(a|a)*b", "(.*)*x", "(a*)*", "((a?){30})", "(.+)+x", "(?:a|aa)+$", r"(\w+\s?)*!", "(x+x+)+y",
    r"([a-z]+)*\d", ".*.*.*.*.*.*.*.*.*x", r"(\w*\w*)*x", "(?:.*a){25}x", r"(a)(\1)+", "(?i:(u+U)*x)", "(?:(?:))*",
    "(?:(?:a?){1000}){1000}", r"(?:\b){4000000000}", "(?=(.+)+x)x", "(?!(.+)+x)x", "(.*?.*?)*?x", "a{4294967295}",
    "(?:(?:u|p|up)+)+$", r"(?:[^.]+\.?)+!", r"((\w+\.?)+\.?)+!", ".*" * 500 + "x", "(" * 2000 + ")" * 2000,
    "(?:" * 90 + "a" + ")*" * 90, "a?" * 40 + "a" * 40, r"(?P<a>\w+)*(?(a)x|y)z", "x" * MILLION, "|".join("ab" * 3000),
)  # fmt: skip


def _harmless_pattern(rng: Random, module: str) -> str:
    """A key that PEFT matches with this module, or some more."""
    last = module.rpartition(".")[2] or "x"
    return rng.choice(
        (
            module, re.escape(module), last, f"^{module}", f".*{last}", f"{module}$", f"({last}|nowhere)",
            f".*{last}.*",
            rf"(?:\w+\.)*{last}", module.replace(last, r"\w+"), re.sub(r"\d+", "[0-9]+", module), f"({module})", ".*",
            re.sub(r"\d+", r"\\d+", module), f"(?!nowhere){last}", f"{last[:1]}.*", f"[{last[0]}].*", f"(?:{last})?",
            f"{last}|{module}", rf"(.*\.)?{last}", f"(?i:{last.upper()})", rf"\b{last}\b", f"{module}{{1}}", "",
            "nowhere",
        )
    )  # fmt: skip


@_mutation("draft", 8)
def _patterns_for_alpha(rng: Random, draft: Draft) -> None:
    modules = _modules(draft)
    keys = [_harmless_pattern(rng, rng.choice(modules)) for _ in range(rng.randint(1, 5))]
    draft.config["alpha_pattern"] = {key: rng.choice((1, 2, 0.5, 3, 16)) for key in keys}


@_mutation("draft", 8)
def _the_ranks_as_patterns(rng: Random, draft: Draft) -> None:
    """The same ranks, said in another way: the keys' order and what they match decide."""
    ranks = {}
    for name, tensor in draft.tensors.items():
        if re.search(r"lora_(embedding_)?A", name) and tensor.dim():
            module = re.sub(r"\.lora_.*$", "", name).removeprefix(P).removesuffix(".base_layer.out_proj")
            ranks[module] = tensor.shape[0]
    patterns = {_harmless_pattern(rng, module): rank for module, rank in ranks.items()}
    rest = {re.escape(module): rank for module, rank in ranks.items()}
    draft.config["rank_pattern"] = rng.choice((rest, rest | patterns, patterns | rest, patterns))


@_mutation("draft", 5)
def _an_endless_pattern(rng: Random, draft: Draft) -> None:
    key, pattern = rng.choice(("rank_pattern", "alpha_pattern")), rng.choice(ENDLESS)
    patterns = draft.config.get(key) or {}
    if isinstance(patterns, dict):
        value = rng.choice((1, 2, 4, 8))
        draft.config[key] = {**patterns, pattern: value} if rng.random() < 0.5 else {pattern: value, **patterns}


@_mutation("draft", 3)
def _an_endless_target(rng: Random, draft: Draft) -> None:
    draft.config[rng.choice(("target_modules", "exclude_modules", "layers_pattern"))] = rng.choice(ENDLESS)


@_mutation("draft", 1)
def _many_patterns(rng: Random, draft: Draft) -> None:
    # Few enough where they are taken: PEFT, which is the oracle, compiles each key for each module.
    kind, count = rng.choice(
        (
            ("layers.{}.q", 100),
            ("^layers.{}", 100),
            (r"layers\.{}\.q.*", 3_000),
            ("(a|b){}", 3_000),
            (".*{}.*{}.*x", 100),
        )
    )
    draft.config[rng.choice(("rank_pattern", "alpha_pattern"))] = {kind.replace("{}", str(i)): 4 for i in range(count)}


@_mutation("draft", 4)
def _pattern_of_anything(rng: Random, draft: Draft) -> None:
    key = rng.choice(("rank_pattern", "alpha_pattern"))
    draft.config[key] = {rng.choice((*_modules(draft), "(", "", "\0", "[[a]", "(?i)up")): rng.choice(_NUMBERS)}


@_mutation("draft", 5)
def _alpha(rng: Random, draft: Draft) -> None:
    draft.config["lora_alpha"] = rng.choice(_NUMBERS)


@_mutation("draft", 2)
def _r(rng: Random, draft: Draft) -> None:
    draft.config["r"] = rng.choice(_NUMBERS)


@_mutation("draft", 5)
def _option_of_anything(rng: Random, draft: Draft) -> None:
    draft.config[rng.choice(sorted(LoraConfig.__dataclass_fields__))] = rng.choice(_VALUES)


@_mutation("draft", 5)
def _option_that_is_right(rng: Random, draft: Draft) -> None:
    draft.config.update(
        rng.choice(
            (
                {"use_rslora": True}, {"use_rslora": False}, {"lora_dropout": 0.3}, {"lora_alpha": 3},
                {"revision": None},
                {"inference_mode": False}, {"init_lora_weights": "gaussian"}, {"task_type": None}, {"bias": "none"},
                {"some_new_option": None}, {"megatron_core": "x"}, {"peft_version": "0.99"}, {"loftq_config": {}},
            )
        )
    )  # fmt: skip


@_mutation("draft", 2)
def _option_missing(rng: Random, draft: Draft) -> None:
    draft.config.pop(rng.choice(sorted(draft.config) or [""]), None)


@_mutation("draft", 2)
def _option_that_is_unknown(rng: Random, draft: Draft) -> None:
    names = ("some_new_option", "", "__class__", "a" * MILLION, "\x1b[2J", "\ud800", "self", "kwargs")
    draft.config[rng.choice(names)] = rng.choice(_VALUES)


@_mutation("draft", 1)
def _many_options(rng: Random, draft: Draft) -> None:
    value = rng.choice((None, 0, 1))
    draft.config.update({f"option_{i}": value for i in range(1_000)})


@_mutation("draft", 3)
def _unsupported(rng: Random, draft: Draft) -> None:
    draft.config.update(
        rng.choice(
            (
                {"use_dora": True}, {"modules_to_save": ["down"]}, {"bias": "all"}, {"init_lora_weights": "pissa"},
                {"peft_type": "IA3"}, {"peft_type": None}, {"peft_type": {"a": []}}, {"layer_replication": [[0, 1]]},
                {"trainable_token_indices": [1]}, {"use_qalora": True}, {"target_parameters": ["up.weight"]},
                {"target_parameters": ["weight"] * 1000}, {"megatron_config": {"a": 1}}, {"lora_bias": True},
            )
        )
    )  # fmt: skip


@_mutation("draft", 3)
def _targets(rng: Random, draft: Draft) -> None:
    modules = _modules(draft)
    draft.config["target_modules"] = rng.choice(
        (
            "all-linear", ".*", "(", "(?i)UP", [], None, [["up"]], {"up": 1}, modules, modules[:1], ["../../x"],
            "x" * 5000,
            [1, 2], "nowhere", [None], ["("], "|".join(map(re.escape, modules)), ["a"] * 5000,
        )
    )  # fmt: skip


# -- header ------------------------------------------------------------------------------------------------------------

_BAD_NUMBERS: tuple[Any, ...] = (
    -1, 2**31, 2**32, 2**63, 2**64, 10**30, 1.0, 1e400, math.nan, True, None, "4", [1], {}, 10**4000,
)  # fmt: skip


@_mutation("file", 3)
def _offsets(rng: Random, file: File) -> None:
    entry = file.entry(rng)
    by = rng.choice((-8, -4, -1, 1, 4, 8, 64, 2**40))
    start, stop = entry.get("data_offsets", [0, 0])
    entry["data_offsets"] = rng.choice(
        (
            [start + by, stop + by], [start, stop + by], [start + by, stop], [stop, start], [0, 0], [start], [],
            [start, stop, stop], [rng.choice(_BAD_NUMBERS), stop], [start, rng.choice(_BAD_NUMBERS)], None, "0, 4", {},
        )
    )  # fmt: skip


@_mutation("file", 2)
def _overlapping_ranges(rng: Random, file: File) -> None:
    a, b = file.entry(rng), file.entry(rng)
    a["data_offsets"] = list(b.get("data_offsets", [0, 0]))
    if rng.random() < 0.5:
        a["shape"] = list(b.get("shape", []))


@_mutation("file", 3)
def _shape(rng: Random, file: File) -> None:
    entry = file.entry(rng)
    shape = entry.get("shape") or [1]
    entry["shape"] = rng.choice(
        (
            shape[::-1], [math.prod(shape)], [*shape, 1], [*shape, 0], [], [0], [2**40, 2**40], [2**62, 4, *shape],
            [2**63, 0], [0, 2**64], [1] * 5000, [rng.choice(_BAD_NUMBERS), *shape[1:]], None, "x", {}, [shape],
            [10**9] * 30,
        )
    )  # fmt: skip


@_mutation("file", 2)
def _dtype(rng: Random, file: File) -> None:
    names = (*_NAMES.values(), "F4", "F7", "f32", "", "F8_E8M0", 32, None, [], {}, True, "x" * 5000)
    file.entry(rng)["dtype"] = rng.choice(names)


@_mutation("file")
def _fields(rng: Random, file: File) -> None:
    entry = file.entry(rng)
    if rng.random() < 0.5 and entry:
        del entry[rng.choice(sorted(entry))]
    else:
        entry[rng.choice(("strides", "", "dtype ", "x" * 5000))] = rng.choice((1, [], "F32"))


@_mutation("file")
def _entry_of_anything(rng: Random, file: File) -> None:
    file.header[rng.choice((*file.header, "more"))] = rng.choice((*_VALUES[:30], _nested(100)))


@_mutation("file", 3)
def _metadata(rng: Random, file: File) -> None:
    file.header["__metadata__"] = rng.choice(
        (
            {},
            {"format": "pt"},
            {"a": "x" * 5000},
            {"a": 1},
            {"a": {"b": []}},
            [],
            "x",
            1,
            {"a": None},
            {"": "\ud800"},
            None,
        )
    )


@_mutation("file", 3)
def _header_in_another_order(rng: Random, file: File) -> None:
    names = list(file.header)
    rng.shuffle(names)
    file.header = {name: file.header[name] for name in names}


@_mutation("file", 4)
def _data_in_another_order(rng: Random, file: File) -> None:
    """Sound, if it was: the tensors in any order, so that some may not be aligned."""
    entries = [e for e in file.header.values() if isinstance(e, dict) and isinstance(e.get("data_offsets"), list)]
    entries = [e for e in entries if len(e["data_offsets"]) == 2 and all(type(n) is int for n in e["data_offsets"])]
    rng.shuffle(entries)
    pieces, end = [], 0
    for entry in entries:
        start, stop = entry["data_offsets"]
        piece = file.data[max(start, 0) : max(stop, 0)]
        pieces.append(piece)
        entry["data_offsets"] = [end, end + len(piece)]
        end += len(piece)
    file.data = b"".join(pieces)


@_mutation("file")
def _the_same_name_twice(rng: Random, file: File) -> None:
    text = json.dumps(file.header)
    name = rng.choice(list(file.header))
    file.text = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(file.header[name])}}}".encode()


@_mutation("file", 2)
def _header_text(rng: Random, file: File) -> None:
    text = json.dumps(file.header)
    depth = rng.choice((10, 100, 100_000))
    file.text = rng.choice(
        (
            text + " " * rng.randrange(100), " " + text, text[:-1], text + "}", "\ufeff" + text,
            text.replace(":", "=", 1),
            text.replace("shape", "shap\\u0065"), "[" * depth, '{"a":' * depth, "[" * depth + "]" * depth, "", "null",
            "5",
            text.replace("[", "[" + "9" * 5000 + ", ", 1), f"{text[:-1]}, }}", text + "\0" * 8, text.replace('"', "'"),
            '{"a": ' + "[" * depth + "]" * depth + "}", text.upper(), "{}", "{" + '"": {}, ' * 3000 + '"a": 1}',
        )
    ).encode("utf-8", "surrogatepass")  # fmt: skip
    if rng.random() < 0.1:
        file.text = text.encode(rng.choice(("utf-16", "utf-32", "utf-16-le")))


# -- bytes -------------------------------------------------------------------------------------------------------------


@_mutation("weights", 3)
@_mutation("config", 2)
def _flipped_bytes(rng: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 10))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@_mutation("weights", 3)
def _flipped_bytes_of_data(rng: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    start = 8 + int.from_bytes(content[:8], "little")
    for _ in range(rng.choice((1, 3))):
        if start < len(changed):
            changed[rng.randrange(start, len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@_mutation("weights", 2)
@_mutation("config", 1)
def _cut(rng: Random, content: bytes) -> bytes:
    return content[: rng.choice((0, 7, 8, 9, len(content) - 1, rng.randrange(len(content) + 1)))]


@_mutation("weights", 1)
@_mutation("config", 1)
def _longer(rng: Random, content: bytes) -> bytes:
    return content + rng.choice((b"\0", b" ", b"\xff" * 9, b"\0" * 4096))


@_mutation("weights", 1)
@_mutation("config", 1)
def _spliced(rng: Random, content: bytes) -> bytes:
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return rng.choice((content[:a] + content[b:], content[:b] + content[a:], content[a:b], content[b:] + content[:a]))


@_mutation("weights", 2)
def _length_of_the_header(rng: Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    length = rng.choice(
        (length - 1, length + 1, 0, 1, 2**63, 2**64 - 1, len(content), len(content) - 8, 10**8, 3 * 10**7, 1 << 40)
    )
    return max(length, 0).to_bytes(8, "little") + content[8:]


@_mutation("weights", 1)
def _something_else(rng: Random, content: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    choices = (b"", b"\0" * 64, rng.randbytes(100), pickle.dumps({"a": 1}), buffer.getvalue(), b"GGUF" + bytes(100))
    return rng.choice(choices)


@_mutation("config", 3)
def _config_text(rng: Random, content: bytes) -> bytes:
    text = content.decode(errors="replace")
    option = rng.choice(sorted(LoraConfig.__dataclass_fields__))
    more = rng.choice(
        (
            f'"{option}": {"[" * 100_000}', f'"{option}": {"[" * 500}{"]" * 500}', f'"r": {"9" * 5000}', '"r": 1e400',
            '"lora_alpha": 1e400', '"lora_alpha": -Infinity', '"lora_alpha": NaN', '"r": 4, "r": 4',
            '"lora_alpha": 1e-400',
            f'"{"k" * MILLION}": 1', f'"{"k" * MILLION}": null', f'"{option}": "{"v" * MILLION}"', '"a": "\\ud800"',
            '"r": 4.0', '"a": 0.0, "a": 0', '"lora_alpha": 8', '"rank_pattern": {"up": 1, "up": 2}', '"x": 01', "x: 1",
        )
    )  # fmt: skip
    if rng.random() < 0.5 and text.startswith("{"):
        return f"{{{more}{',' if len(text) > 2 else ''} {text[1:]}".encode()
    return f"{text[:-1]}, {more}}}".encode()


@_mutation("config", 2)
def _config_encoded(rng: Random, content: bytes) -> bytes:
    text = content.decode(errors="replace")
    return rng.choice(
        (
            text.encode("utf-16"), text.encode("utf-8-sig"), content + b"\0", b"\0" + content, b"\xff\xfe" + content,
            content.replace(b"r", b"\xed\xa0\x80", 1), b" " * 9_000_000 + content, content + b" " * 1000, b"", b"null",
            b"[]", b"5", content * 2, content.replace(b'"', b"'"), b"// x\n" + content, content.replace(b" ", b"\n\t"),
        )
    )  # fmt: skip


# -- folder ------------------------------------------------------------------------------------------------------------


def _which(rng: Random, folder: Path) -> Path:
    return folder / rng.choice((WEIGHTS, WEIGHTS, CONFIG))


def _out_of_the_way(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


@_mutation("folder", 3)
def _link_to_the_file(rng: Random, folder: Path, case: Case) -> None:
    """As the Hub's cache has it: into a folder beside."""
    path = _which(rng, folder)
    if path.exists():
        (folder / "blobs").mkdir(exist_ok=True)
        path.rename(folder / "blobs" / f"of {path.name}")
        path.symlink_to(Path("blobs", f"of {path.name}"))


@_mutation("folder", 2)
def _link_elsewhere(rng: Random, folder: Path, case: Case) -> None:
    path = _which(rng, folder)
    _out_of_the_way(path)
    targets = (
        "/dev/zero",
        "/dev/null",
        "/dev/tty",
        "/proc/self/mem",
        "/proc/self/environ",
        path.name,
        "nowhere",
        "/",
        "..",
    )
    path.symlink_to(rng.choice(targets))


@_mutation("folder", 2)
def _no_regular_file(rng: Random, folder: Path, case: Case) -> None:
    path = _which(rng, folder)
    _out_of_the_way(path)
    kind = rng.choice(("pipe", "folder", "socket", "nothing"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket" and len(os.fsencode(path)) < 100:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(path))


@_mutation("folder", 2)
def _subfolder(rng: Random, folder: Path, case: Case) -> None:
    sub = rng.choice(("sub", "sub", "a\nb", "é", "sub.d"))
    (folder / sub).mkdir(exist_ok=True)
    for name in (WEIGHTS, CONFIG):
        if (folder / name).is_file() and not (folder / name).is_symlink():
            (folder / name).rename(folder / sub / name)
    case.options["subfolder"] = rng.choice(
        (
            sub, sub, f"{sub}/", f"./{sub}", f"../{folder.name}/{sub}", f"{sub}/../{sub}", str(folder / sub), "..", "/",
            "/etc", "nowhere", f"{sub}\0", "x" * 300, f"{sub}/" * 3, "../" * 50,
        )
    )  # fmt: skip


@_mutation("folder", 1)
def _a_terabyte_of_nothing(rng: Random, folder: Path, case: Case) -> None:
    """A sparse file takes no room. Its header may or may not say what it holds."""
    path = folder / WEIGHTS
    if not path.is_file() or path.is_symlink() or path.stat().st_size > 1 << 30:
        return
    nbytes = rng.choice((1 << 37, 1 << 40))
    header = {f"{P}up.lora_A.weight": {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [0, nbytes]}}
    content = join(header, b"") if rng.random() < 0.5 else path.read_bytes()
    path.write_bytes(content)
    os.truncate(path, len(content) + nbytes)


@_mutation("folder", 1)
def _a_pickle_alone(rng: Random, folder: Path, case: Case) -> None:
    _out_of_the_way(folder / WEIGHTS)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))


@_mutation("folder", 2)
def _other_files_too(rng: Random, folder: Path, case: Case) -> None:
    for name in ("README.md", "c\nd", "\x1b[2J", "adapter_model.bin", "é" * 100):
        (folder / name).write_bytes(b"x")


@_mutation("folder", 1)
def _another_file_name(rng: Random, folder: Path, case: Case) -> None:
    path = _which(rng, folder)
    if path.exists():
        path.rename(folder / rng.choice((f"{path.name}\n", path.name.upper(), "model.safetensors", "\x1b[2J")))


if __name__ == "__main__":
    entry_name, case_number, into = sys.argv[1:]
    Path(into).mkdir()
    made = make_case(entry_name, int(case_number), Path(into))
    print(made, made.options)
