"""Regular expressions of a config: those that PEFT's users write are matched as PEFT does, endless ones are refused."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from peft.utils.other import get_pattern_key

from hostile.defects import P, sound
from hostile.fuzz import ENDLESS
from hotslot import checkpoint, errors, methods
from hotslot.methods.patterns import MAX_PATTERNS, MAX_REGEXES, MAX_STEPS, Rules

LINEAR = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
MODULES = [f"model.layers.{layer}.{linear}" for layer in range(120) for linear in LINEAR]

REAL = (
    "q_proj", "model.layers.3.self_attn.q_proj", re.escape("model.layers.3.self_attn.q_proj"), ".*attn.*",
    r"layers\.(0|1|2)\..*proj", "(q|v)_proj", "(q_proj|v_proj)", "[0-9]+", "^model.layers.0.self_attn.q_proj",
    "^q_proj",
    r".*\.\d+\.(mlp|self_attn)\.(q|k|v|up|down)_proj", r"layers.\d+.mlp.(gate|up)_proj", "(?i:.*ATTN.*)", "q_proj$",
    r"model\.layers\.([0-9]|1[0-9])\..*", "(.*)(self_attn).*[qv]_proj", r"(?:\w+\.)*q_proj", r"(\w+\.)+up_proj",
    r"^(?!.*vision).*(q_proj|v_proj)$", ".*language.*attn.*proj", r"[a-z_.]+\d+\.[a-z_]+\.[kqv]_proj", "", ".*",
    "proj", "(?:model|base)?.layers.*", r"\bmlp\b.*",
    "mlp.up.proj", "l.yers.1.mlp.up_proj", r"(?:layers\.\d+\.)+mlp.*", "[^.]+",
    # as Unsloth writes target_modules
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj|"
    r"gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|"
    r"dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))",
)  # fmt: skip


def peft(patterns: dict[str, Any], path: str) -> Any:
    return patterns.get(get_pattern_key(patterns.keys(), path), "default")


def rules(patterns: dict[str, Any], paths: Iterable[str]) -> Rules:
    return Rules(patterns, list(paths), "rank_pattern", "the adapter")


@pytest.mark.parametrize("key", REAL)
def test_real_pattern_is_matched_as_peft_does(key: str) -> None:
    found = rules({key: 1}, MODULES)
    assert [found.first(path, "default") for path in MODULES] == [peft({key: 1}, path) for path in MODULES]


def test_first_of_several_patterns_wins() -> None:
    rng = Random(0)
    paths = [
        *MODULES[:20],
        "a+b",
        "up.proj",
        "x",
        "a.b\n",
        "a\nb.up_proj",
        "mlp.up_proj\n",
        "",
        "é.q_proj",
        "x..y",
        ".",
    ]
    for _ in range(400):
        keys = [
            *rng.sample(REAL[:-1], 3),
            *rng.sample(MODULES[:20], 2),
            "a+b",
            rng.choice(("x.y", "b", "é.q_proj", r"a\nb.*")),
        ]
        patterns = {key: number for number, key in enumerate(rng.sample(keys, len(keys)))}
        some = rng.sample(paths, 8)
        found = rules(patterns, some)
        assert {path: found.first(path, "default") for path in some} == {path: peft(patterns, path) for path in some}


@pytest.mark.parametrize("key", ENDLESS, ids=lambda key: key[:30])
@pytest.mark.parametrize(
    "option", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"]
)
def test_endless_pattern_is_refused_or_quick(option: str, key: str) -> None:
    """On a path that is made for it, on which Python's matcher would need years for most of them."""
    draft = sound()
    path = "uaxy" * 4 + "a" * 200 + "u" * 200 + "aA" * 100 + "_." * 20
    draft.tensors = {name.replace(f"{P}up.", f"{P}{path}."): tensor for name, tensor in draft.tensors.items()}
    draft.config[option] = {key: 4} if option.endswith("_pattern") and option != "layers_pattern" else key
    started = time.process_time()
    try:
        methods.interpret(checkpoint.from_tensors(draft.tensors, draft.config))
    except errors.ConfigError as error:
        refused = error
    else:
        refused = None
    assert refused is None or "pattern" in refused.summary
    assert time.process_time() - started < 2


def test_the_classic_ones_are_refused_by_name() -> None:
    for key in ("(a+)+$", "(a|a)*b", "(.*)*x", "(a*)*", "((a?){30})", ".*.*.*.*.*.*x", r"(a)\1"):
        with pytest.raises(errors.ConfigError, match="could take for ever") as refused:
            rules({key: 1}, ["a" * 300])
        assert repr(key) in refused.value.found


@pytest.mark.parametrize("spelling", ["{}", "^{}", "escaped"])
def test_as_many_patterns_as_modules_take_no_time(spelling: str) -> None:
    """840 keys on 840 modules: 9 s with `re`, one by one."""
    keys = [re.escape(path) if spelling == "escaped" else spelling.format(path) for path in MODULES]
    started = time.process_time()
    found = rules({key: number for number, key in enumerate(keys)}, MODULES)
    assert [found.first(path, None) for path in MODULES] == list(range(len(MODULES)))
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize(
    ("patterns", "paths"),
    [
        ({f"x{i}": 1 for i in range(MAX_PATTERNS + 1)}, ["a"]),
        ({f"(a|b){i}": 1 for i in range(MAX_REGEXES + 1)}, ["a"]),
        ({"x" * 5000: 1}, ["a"]),
        ({f".*{i}.*x": 1 for i in range(500)}, [f"{i}" * 30 for i in range(5000)]),
        ({"." * length: 1 for length in range(1, 4000)}, ["a." * 60] * 10_000),
    ],
    ids=["patterns", "regular expressions", "characters", "patterns times modules", "dots times modules"],
)
def test_too_many_are_refused_soon(patterns: dict[str, int], paths: list[str]) -> None:
    started = time.process_time()
    with pytest.raises(errors.ConfigError, match="could take for ever"):
        rules(patterns, paths)
    assert time.process_time() - started < 3


_ATOMS = (
    "a",
    "b",
    "ab",
    "aab",
    ".",
    r"\.",
    r"\w",
    "[ab]",
    "[^b]",
    "[^.]",
    r"\d",
    "_",
    "A",
    "^",
    "$",
    r"\b",
    "",
    "(?i:a)",
)
_REPEATS = ("*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{0,5}", "{3,}")


def _expression(rng: Random, depth: int) -> str:
    text = ""
    for _ in range(rng.randint(1, 3)):
        if depth == 0 or rng.random() < 0.5:
            atom = rng.choice(_ATOMS)
        else:
            ways = "|".join(_expression(rng, depth - 1) for _ in range(rng.choice((1, 1, 2, 3))))
            atom = f"{rng.choice(('(', '(?:', '(?:', '(?=', '(?!'))}{ways})"
        if rng.random() < 0.5:
            atom = (atom if len(atom) == 1 or atom[:1] in ("(", "[", "\\") else f"(?:{atom})") + rng.choice(_REPEATS)
        text += atom
    return text


def test_what_is_not_refused_is_quick_and_right() -> None:
    """Random expressions on paths that are made to be matched in many ways. The bound holds: ten times what is seen."""
    rng = Random(1)
    taken = refused = matched = 0
    for _ in range(3000):
        key = _expression(rng, 3)
        path = rng.choice(("a" * 300, "ab" * 150, "a." * 60, "aab." * 75 + "a", "aA" * 150, "a1_" * 100, "a\n" * 100))
        try:
            found = rules({key: "it"}, [path])
        except errors.ConfigError as error:
            refused += "for ever" in str(error)
            continue
        started = time.process_time()
        got = found.first(path, "default")
        assert time.process_time() - started < 1, key
        assert got == peft({key: "it"}, path), key
        taken += 1
        matched += got == "it"
    assert min(taken, refused, matched) > 100


def test_steps_are_bounded_where_the_matcher_is_slowest(tmp_path: Path) -> None:
    """The control: what stands just above the limit does take long, so that the limit is not idle."""
    key, path = ".*a.*a.*a.*x", "a" * 90
    with pytest.raises(errors.ConfigError, match="steps"):
        rules({key: 1}, [path] * 40)
    started = time.process_time()
    for _ in range(2):
        assert not re.match(rf"(.*\.)?({key})$", path)
    assert time.process_time() - started > 0.001
    assert MAX_STEPS <= 1_000_000_000
