r"""Regular expressions from a stranger's config: matched as PEFT matches them, at a cost that is known beforehand.

PEFT asks `re.match(rf"(.*\.)?({key})$", path)` of each key in turn, and the first that matches wins. Python's matcher
tries every way to match before it gives up, which `(a+)+` makes 2ⁿ ways and `.*.*.*.*x` n⁴. So no key is run before
its steps on the paths at hand have been bounded: a repetition whose turns can be cut in more than one way is refused,
and so is a sum of steps beyond the limit. Plain module paths, which is what nearly all keys are, are looked up.

`n`: characters of the longest path. `exits`: in how many places at most a part can end, such that what follows begins.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from ..checkpoint.limits import MAX_NAME_PARTS
from ..errors import ConfigError

if sys.version_info >= (3, 11):
    from re import _parser as sre  # type: ignore[attr-defined]
else:
    import sre_parse as sre

MAX_PATTERNS = 100_000  # ten thousand modules, each with a key of its own, are real
MAX_PATTERN_LENGTH = 4_096  # as a module's path; the longest known, a target_modules with every name, has 1,000
# Of those that are more than a plain path. To bound and compile one of 20 characters takes 0.6 ms.
MAX_REGEXES = 1_000
MAX_REGEX_CHARACTERS = 200_000
# Of the matcher, a bound and not an estimate; it takes 1 to 20 ns for one. 840 modules under ten keys like
# `.*attn.*proj` take 20 million, a single `.*.*.*.*x` on one path of 4,096 characters 10 ** 13.
MAX_STEPS = 100_000_000

_SAVE_AGAIN = (
    "write module paths in full, or a simpler expression: .* and \\d+ at most a few times, none within a group"
)
_MAX_TEXTS, _MAX_TEXT_LENGTH = 32, 32  # more of them, or longer ones, would tighten a bound by little
# What stands for itself, and the dot, which stands for any character: the keys that need no compiling.
_PLAIN = re.compile(r"(\^?)((?:\w|[./-]|\\[./-])+)(\$?)")
_PLAIN_PIECE = re.compile(r"\\?(.)")

# Characters are told apart up to 127, and small from capital not at all, since (?i:…) does not; all others are one.
# Among the others are forms of i, k and s: the Kelvin sign is a k to (?i:…). END is the end of the path.
_OTHER, _END = 128, 129
_ALL = frozenset(range(_OTHER + 1))
_OTHERS = frozenset({_OTHER, ord("i"), ord("k"), ord("s")})
_CLASSES = {
    sre.CATEGORY_DIGIT: r"\d", sre.CATEGORY_NOT_DIGIT: r"\D", sre.CATEGORY_SPACE: r"\s",
    sre.CATEGORY_NOT_SPACE: r"\S", sre.CATEGORY_WORD: r"\w", sre.CATEGORY_NOT_WORD: r"\W",
}  # fmt: skip
_CATEGORIES = {
    category: frozenset(ord(chr(c).lower()) for c in range(128) if re.match(text, chr(c))) | {_OTHER}
    for category, text in _CLASSES.items()
}
_REPEATS = {sre.MAX_REPEAT, sre.MIN_REPEAT, getattr(sre, "POSSESSIVE_REPEAT", sre.MAX_REPEAT)}
_ONE_CHARACTER = {sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN}


class _Refused(Exception):
    """Why an expression is not run."""


class _Follow(NamedTuple):
    """What may come next: the characters, and, where one of a few texts must come (or the END), those."""

    characters: frozenset[int]
    texts: tuple[str, ...] | None


_AT_END = _Follow(frozenset({_END, ord("\n")}), ("\n",))  # what `$` takes; a line's end too under (?m:…)


class _Cost(NamedTuple):
    """Of a part that is entered once: steps at most, and ways to leave it."""

    steps: int
    exits: int


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
        sizes = _Paths(paths)
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


class _Paths:
    """What a bound needs to know of the paths."""

    def __init__(self, paths: Collection[str]) -> None:
        self._paths = paths
        self._counts: dict[str, int] = {}
        self.longest = max(map(len, paths), default=0)

    @cached_property
    def one_line(self) -> bool:
        """Whether no path has a line break, at which `.` and `$` have rules of their own."""
        return not any("\n" in path for path in self._paths)

    @cached_property
    def _lower(self) -> list[str]:
        return [path.lower() for path in self._paths]

    def most(self, text: str) -> int:
        """In how many places of one path, at most, the text stands, small or capital."""
        if text not in self._counts:
            times = max((path.count(text) for path in self._lower), default=0)
            # "aa" stands in 3 places of "aaaa", where count() says 2.
            overlaps = any(text.startswith(text[k:]) for k in range(1, len(text)))
            self._counts[text] = times * len(text) if overlaps else times
        return self._counts[text]

    def exits(self, follow: _Follow) -> int:
        """In how many places of a path `follow` can begin."""
        if follow.texts is None:
            return self.longest + 1
        return max(1, min(self.longest + 1, sum(map(self.most, follow.texts)) + (_END in follow.characters)))


def compiled(pattern: str, sizes: _Paths, key: str, where: str, origin: str) -> tuple[re.Pattern[str], int]:
    """The compiled pattern, and the steps that it may take on a path.

    Raises:
        ConfigError: it is none, or its steps cannot be bounded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of `[[` and the like: possible set operations of a later Python
            nodes: Any = sre.parse(pattern)
            cost = _Bound(sizes).sequence([*nodes], _AT_END).steps
            if cost > MAX_STEPS:
                raise _Refused(f"up to {cost:,} steps on a path of {sizes.longest:,} characters")
            return re.compile(pattern), cost
    except _Refused as refused:
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
    sizes = _Paths(paths)
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


class _Bound:
    """Walks a parsed expression and bounds the matcher's steps on the paths."""

    def __init__(self, sizes: _Paths) -> None:
        self._sizes = sizes
        self._n = sizes.longest + 1

    def sequence(self, nodes: list[Any], follow: _Follow) -> _Cost:
        """Of `nodes` one behind the other, and then `follow`."""
        follows = [follow]
        for node in reversed(nodes[1:]):
            follows.append(_before(node, follows[-1]))
        steps, entries = 0, 1
        for node, then in zip(nodes, reversed(follows), strict=False):
            cost = self._node(node, then)
            steps += entries * cost.steps
            entries *= cost.exits
            if steps > MAX_STEPS or entries > MAX_STEPS:
                raise _Refused(f"more steps than that on a path of {self._sizes.longest:,} characters")
        return _Cost(steps + 1, entries)

    def _node(self, node: Any, follow: _Follow) -> _Cost:
        kind, value = node
        if kind in _ONE_CHARACTER or kind is sre.AT:
            return _Cost(len(value) if kind is sre.IN else 1, 1)
        if kind is sre.SUBPATTERN:
            return self.sequence([*value[3]], follow)
        if kind is getattr(sre, "ATOMIC_GROUP", None):
            return self.sequence([*value], follow)
        if kind in (sre.ASSERT, sre.ASSERT_NOT):
            return _Cost(self.sequence([*value[1]], _Follow(_ALL | {_END}, None)).steps, 1)
        if kind is sre.BRANCH:
            return self._branch([[*branch] for branch in value[1]], follow)
        if kind in _REPEATS:
            low, high, body = value
            return self._repeat(low, high, [*body], follow)
        raise _Refused("it refers back to what it has matched")

    def _branch(self, branches: list[list[Any]], follow: _Follow) -> _Cost:
        costs = [self.sequence(branch, follow) for branch in branches]
        exits = sum(cost.exits for cost in costs)
        if _apart(branches):
            exits = max(cost.exits for cost in costs)
        return _Cost(sum(cost.steps for cost in costs) + 1, exits)

    def _repeat(self, low: int, high: int, body: list[Any], follow: _Follow) -> _Cost:
        first = _first(body)
        if high == 1:  # `?` leaves in one more way, unless the next character decides
            cost = self.sequence(body, follow)
            skips = first is None or bool(first & follow.characters)
            return _Cost(cost.steps + 1, cost.exits + (low == 0) if skips or cost.exits > 1 else 1)
        if first is None:
            raise _Refused("it repeats what may be empty")
        again = _before_all(body, follow) if high > 2 or low < high else follow
        turn = self.sequence(body, _Follow(follow.characters | again.characters, None))
        if turn.exits > 1:
            raise _Refused("it repeats what can itself be matched in several ways")
        turns = min(self._n, high) + 1
        # Each character is taken by one part of one turn, and given back once: all turns together see the path twice.
        steps = min(2 * turns * turn.steps, 4 * self._n * _size(body))
        exits = 1
        if low != high and first & follow.characters:
            exits = min(turns, high - low + 1, self._sizes.exits(follow))
        return _Cost(steps, exits)


def _size(nodes: Iterable[Any]) -> int:
    """How many parts these have, to be tried at one character; beyond all bounds if they look ahead."""
    size = 1
    for kind, value in nodes:
        if kind is sre.IN:
            size += len(value)
        elif kind is sre.SUBPATTERN:
            size += _size(value[3])
        elif kind is sre.BRANCH:
            size += sum(map(_size, value[1]))
        elif kind in _REPEATS:
            size += _size(value[2])
        elif kind in _ONE_CHARACTER or kind is sre.AT:
            size += 1
        else:
            return MAX_STEPS
    return size


def _before_all(nodes: list[Any], follow: _Follow) -> _Follow:
    for node in reversed(nodes):
        follow = _before(node, follow)
    return follow


def _before(node: Any, follow: _Follow) -> _Follow:
    """What may come where `node` stands, `follow` being what may come behind it."""
    kind, value = node
    if kind in (sre.LITERAL, sre.IN):
        return _Follow(_characters(kind, value), _texts([node] if kind is sre.LITERAL else value, follow))
    if kind is sre.AT:
        return _AT_END if value in (sre.AT_END, sre.AT_END_STRING) else follow
    if kind is sre.SUBPATTERN and not (value[1] or value[2]):
        return _before_all([*value[3]], follow)
    if kind is sre.BRANCH:
        ways = [_before_all([*branch], follow) for branch in value[1]]
        return _either(ways)
    if kind in _REPEATS:
        low, _, body = value
        entered = _before_all([*body], _Follow(_ALL | {_END}, None))
        return entered if low else _either([entered, follow])
    first = _first([node])
    if first is None:
        return _Follow(_ALL | {_END}, None)
    return _Follow(first, None)


def _texts(choices: Iterable[Any], follow: _Follow) -> tuple[str, ...] | None:
    """The texts that one of these characters and what follows it can begin with, if they are few."""
    choices = list(choices)
    if any(kind is not sre.LITERAL or value >= _OTHER for kind, value in choices):
        return None
    heads = [chr(value).lower() for _, value in choices]
    if follow.texts is None or _END in follow.characters or len(heads) * len(follow.texts) > _MAX_TEXTS:
        return tuple(heads) if len(heads) <= _MAX_TEXTS else None
    return tuple(head + text[: _MAX_TEXT_LENGTH - 1] for head in heads for text in follow.texts)


def _either(ways: Iterable[_Follow]) -> _Follow:
    ways = list(ways)
    characters = frozenset().union(*(way.characters for way in ways))
    texts: list[str] = []
    for way in ways:
        if way.texts is None:
            return _Follow(characters, None)
        texts += way.texts
    return _Follow(characters, tuple(dict.fromkeys(texts)) if len(texts) <= 2 * _MAX_TEXTS else None)


def _apart(branches: list[list[Any]]) -> bool:
    """Whether at most one of these can match at one place."""
    literal = [
        [chr(value).lower() for kind, value in branch if kind is sre.LITERAL and value < _OTHER] for branch in branches
    ]
    texts = ["".join(text) for text in literal]
    if all(len(text) == len(branch) for text, branch in zip(texts, branches, strict=True)):
        ordered = sorted(texts)  # a text that begins with another stands right behind it or behind a third such
        return not any(b.startswith(a) for a, b in pairwise(ordered))
    seen: set[int] = set()
    for branch in branches:
        first = _first(branch)
        if first is None or not seen.isdisjoint(first):
            return False
        seen |= first
    return True


def _first(nodes: Iterable[Any]) -> frozenset[int] | None:
    """The characters that a match can begin with; None if it can be empty."""
    found: frozenset[int] = frozenset()
    for node in nodes:
        kind, value = node
        if kind in _ONE_CHARACTER:
            return found | _characters(kind, value)
        own, optional = _first_of_group(kind, value)
        found |= own
        if not optional:
            return found
    return None


def _first_of_group(kind: Any, value: Any) -> tuple[frozenset[int], bool]:
    """The characters that this node's match can begin with, and whether the match can be empty."""
    bodies: list[Any] = []
    optional = False
    if kind is sre.SUBPATTERN:
        if value[1] or value[2]:  # flags: (?i:…)
            return _ALL, _first(value[3]) is None
        bodies = [value[3]]
    elif kind is getattr(sre, "ATOMIC_GROUP", None):
        bodies = [value]
    elif kind is sre.BRANCH:
        bodies = list(value[1])
    elif kind in _REPEATS:
        bodies, optional = [value[2]], value[0] == 0
    else:
        return frozenset(), True  # AT, assertions: they take nothing
    firsts = [_first(body) for body in bodies]
    if any(first is None for first in firsts):
        return _ALL, True
    return frozenset().union(*(first for first in firsts if first is not None)), optional


def _characters(kind: Any, value: Any) -> frozenset[int]:
    if kind is sre.LITERAL:
        return _folded(value, value)
    if kind is not sre.IN or value[0][0] is sre.NEGATE:
        # `[^.]` is what is told apart from a dot. Of letters, the other case is among the rest.
        left_out = value[1:] if kind is sre.IN else [(sre.LITERAL, value)] if kind is sre.NOT_LITERAL else []
        plain = {content for item, content in left_out if item is sre.LITERAL and not chr(content).isalpha()}
        return _ALL - plain | _OTHERS
    found: frozenset[int] = frozenset()
    for item, content in value:
        if item is sre.RANGE:
            found |= _folded(*content)
        elif item is sre.CATEGORY:
            found |= _CATEGORIES[content]
        else:
            found |= _folded(content, content)
    return found


def _folded(low: int, high: int) -> frozenset[int]:
    characters = frozenset(ord(chr(c).lower()) for c in range(low, min(high, 127) + 1))
    return characters | _OTHERS if high >= _OTHER else characters


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
