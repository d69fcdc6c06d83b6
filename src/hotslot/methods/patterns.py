r"""Regular expressions from a stranger's config: matched as PEFT matches them, at a cost that is known beforehand.

PEFT asks `re.match(rf"(.*\.)?({key})$", path)` of each key in turn, and the first that matches wins. No key is run
before its steps on the paths at hand have been bounded (`steps.py`); a sum beyond the limit is refused. Plain module
paths, which is what nearly all keys are, are looked up.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from ..checkpoint.limits import MAX_NAME_PARTS
from ..errors import ConfigError
from .steps import MAX_STEPS, Endless, Paths, most_steps

MAX_PATTERNS = 100_000  # ten thousand modules, each with a key of its own, are real
MAX_PATTERN_LENGTH = 4_096  # as a module's path; the longest known, a target_modules with every name, has 1,000
# Of those that are more than a plain path. To bound and compile one of 20 characters takes 0.6 ms.
MAX_REGEXES = 1_000
MAX_REGEX_CHARACTERS = 200_000

_SAVE_AGAIN = (
    "write module paths in full, or a simpler expression: .* and \\d+ at most a few times, none within a group"
)
# What stands for itself, and the dot, which stands for any character: the keys that need no compiling.
_PLAIN = re.compile(r"(\^?)((?:\w|[./-]|\\[./-])+)(\$?)")
_PLAIN_PIECE = re.compile(r"\\?(.)")


class Rules:
    """The keys of one option, for a known set of paths.

    Args:
        patterns: key → value, in the config's order.
        paths: that will be asked for.
        where: the option.
        origin: the adapter, for messages.

    Raises:
        ConfigError: a key is no regular expression, or none that is sure to be matched in bounded time.
    """

    def __init__(self, patterns: Mapping[str, Any], paths: Collection[str], where: str, origin: str) -> None:
        if len(patterns) > MAX_PATTERNS:
            raise _refusal(f"{len(patterns):,} patterns", f"at most {MAX_PATTERNS:,}", where, origin)
        self._patterns = patterns
        self._values = list(patterns.values())
        # (Length of the key, whether it begins with ^) → what stands there but dots, as slices → that text → number of
        # the key.
        self._plain: dict[tuple[int, bool], dict[tuple[tuple[int, int], ...], dict[str, int]]] = {}
        self._others: list[tuple[int, re.Pattern[str]]] = []
        sizes = Paths(paths)
        others = []
        for number, key in enumerate(patterns):
            if len(key) > MAX_PATTERN_LENGTH:
                found, expected = f"a pattern of {len(key):,} characters", f"at most {MAX_PATTERN_LENGTH:,}"
                raise _refusal(found, expected, where, origin)
            plain = _PLAIN.fullmatch(key)
            if plain is not None and sizes.one_line and key.count(".") < MAX_NAME_PARTS:
                self._add_plain(plain[2], number, anchored=bool(plain[1]))
                continue
            others.append((number, key))
        _refuse_too_many([key for _, key in others], where, origin)
        steps = 0
        for number, key in others:
            pattern, cost = compiled(rf"(.*\.)?({key})$", sizes, key, where, origin)
            self._others.append((number, pattern))
            steps += cost * len(paths)
            if steps > MAX_STEPS:
                break
        if self._plain:
            kinds = ((size, slices) for (size, _), by_slices in self._plain.items() for slices in by_slices)
            look_up = sum(10 * (len(slices) + 1) + size // 16 for size, slices in kinds)
            steps += look_up * len(paths) + 4 * sum(map(len, paths))
        if steps > MAX_STEPS:
            found = f"{len(patterns):,} patterns on {len(paths):,} module paths, up to {steps:,} steps"
            raise _refusal(found, f"at most {MAX_STEPS:,} steps", where, origin)

    def first(self, path: str, default: Any) -> Any:
        """The value of the first key that matches, as PEFT's `get_pattern_key` finds it."""
        best = self._first_plain(path)
        for number, pattern in self._others:
            if number >= best:
                break
            if pattern.match(path):
                best = number
        if best < len(self._values):
            return self._values[best]
        return self._patterns.get(path, default)  # PEFT looks up the path itself: `a+b` does not match "a+b"

    def _add_plain(self, key: str, number: int, *, anchored: bool) -> None:
        spans, start, size, text = [], 0, 0, []
        for piece in _PLAIN_PIECE.finditer(key):
            if piece[0] == ".":
                spans.append((start, size))
                start = size + 1
            else:
                text.append(piece[1])
            size += 1
        slices = (*spans, (start, size))
        self._plain.setdefault((size, anchored), {}).setdefault(slices, {}).setdefault("".join(text), number)

    def _first_plain(self, path: str) -> int:
        """The least number of a plain key that is the path or the end of it behind a dot; else one beyond all."""
        best = len(self._values)
        places, start = [(0, True), (0, False)], path.find(".") + 1
        while start and self._plain:
            places.append((start, False))
            start = path.find(".", start) + 1
        for start, anchored in places:
            by_slices = self._plain.get((len(path) - start, anchored))
            if by_slices is not None:
                end = path[start:]
                for slices, numbers in by_slices.items():
                    best = min(best, numbers.get("".join([end[a:b] for a, b in slices]), best))
        return best


def compiled(pattern: str, sizes: Paths, key: str, where: str, origin: str) -> tuple[re.Pattern[str], int]:
    """The compiled pattern, and the steps that it may take on a path.

    Raises:
        ConfigError: it is none, or its steps cannot be bounded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of `[[` and the like: possible set operations of a later Python
            steps = most_steps(pattern, sizes)
            return re.compile(pattern), steps
    except Endless as refused:
        expected = f"a regular expression that takes at most {MAX_STEPS:,} steps"
        raise _refusal(f"{key!r:.200}: {refused}", expected, where, origin) from None
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        # Python says where its stack ended, which is another place for each caller.
        said = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(
            f"{origin} has a pattern that is no regular expression.",
            where=where,
            found=f"{key!r:.200}: {said}",
            expected="what Python's re module compiles, as PEFT does",
            hint="the config was edited or belongs to another adapter: save the adapter again with save_pretrained",
        ) from error


def refuse_endless(config: Mapping[str, Any], paths: Collection[str], origin: str, *, runs: int = 1) -> None:
    """Raise if PEFT could not match the config's patterns for modules in bounded time on paths like these.

    Nothing here runs them: a trained adapter's tensors say which modules it has. But the config goes into the model,
    and from there into what is saved, for PEFT to run.

    Args:
        config: of the adapter.
        paths: the longest counts.
        origin: the adapter, for messages.
        runs: how often PEFT is about to match each pattern.
    """
    sizes = Paths(paths)
    given: list[tuple[str, str, str]] = []
    for where in ("target_modules", "exclude_modules", "feedforward_modules"):
        value = config.get(where)
        if isinstance(value, str):
            given.append((where, value, rf"(?:{value})\Z"))
    layers = config.get("layers_pattern") or ()
    for value in [layers] if isinstance(layers, str) else layers if isinstance(layers, (list, tuple)) else []:
        if isinstance(value, str):
            given.append(("layers_pattern", value, rf"(?:^|.*?\.){value}\.(?P<idx>\d+)\."))
    given = [one for one in given if not re.fullmatch(r"[\w.-]*", one[1])]
    _refuse_too_many([value for _, value, _ in given], "target_modules, exclude_modules, layers_pattern", origin)
    for where, value, pattern in given:
        if len(value) > MAX_PATTERN_LENGTH:
            found, expected = f"a pattern of {len(value):,} characters", f"at most {MAX_PATTERN_LENGTH:,}"
            raise _refusal(found, expected, where, origin)
        _, cost = compiled(pattern, sizes, value, where, origin)
        if cost * runs > MAX_STEPS:
            expected = f"a regular expression that takes at most {MAX_STEPS:,} steps"
            raise _refusal(f"{value!r:.200}: up to {cost * runs:,} steps on all paths", expected, where, origin)


def _refuse_too_many(patterns: list[str], where: str, origin: str) -> None:
    characters = sum(map(len, patterns))
    if characters > MAX_REGEX_CHARACTERS or len(patterns) > MAX_REGEXES:
        found = f"{len(patterns):,} regular expressions, {characters:,} characters together"
        raise _refusal(found, f"at most {MAX_REGEXES:,} of {MAX_REGEX_CHARACTERS:,} characters", where, origin)


def _refusal(found: str, expected: str, where: str, origin: str) -> ConfigError:
    return ConfigError(
        f"{origin} has patterns that could take for ever to match.",
        where=where,
        found=found,
        expected=expected,
        hint=_SAVE_AGAIN,
    )
