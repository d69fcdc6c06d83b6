"""How many steps Python's matcher takes for a regular expression at most, on paths that are known.

It tries every way to match before it gives up, which `(a+)+` makes 2ⁿ ways and `.*.*.*.*x` n⁴. A repetition whose
turns can be cut in more than one way is refused; of all else the parsed expression is walked and its steps are counted.

`n`: characters of the longest path. `exits`: in how many places at most a part can end, such that what follows begins.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    from re import _parser as sre  # type: ignore[attr-defined]
else:
    import sre_parse as sre

# Of the matcher, a bound and not an estimate; it takes 1 to 20 ns for one. 840 modules under ten keys like
# `.*attn.*proj` take 20 million, a single `.*.*.*.*x` on one path of 4,096 characters 10 ** 13.
MAX_STEPS = 100_000_000
_MAX_TEXTS, _MAX_TEXT_LENGTH = 32, 32  # more of them, or longer ones, would tighten a bound by little

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


class Endless(Exception):
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


class Paths:
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


def most_steps(pattern: str, paths: Paths) -> int:
    """How many steps it may take to match the pattern with one of the paths, or to find that it does not.

    Raises:
        Endless: they are beyond `MAX_STEPS`, or cannot be bounded.
        re.error, RecursionError, OverflowError, ValueError: Python's re module does not take the pattern.
    """
    nodes: Any = sre.parse(pattern)
    steps = _Bound(paths).sequence([*nodes], _AT_END).steps
    if steps > MAX_STEPS:
        raise Endless(f"up to {steps:,} steps on a path of {paths.longest:,} characters")
    return steps


class _Bound:
    """Walks a parsed expression and bounds the matcher's steps on the paths."""

    def __init__(self, sizes: Paths) -> None:
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
                raise Endless(f"more steps than that on a path of {self._sizes.longest:,} characters")
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
        raise Endless("it refers back to what it has matched")

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
            raise Endless("it repeats what may be empty")
        again = _before_all(body, follow) if high > 2 or low < high else follow
        turn = self.sequence(body, _Follow(follow.characters | again.characters, None))
        if turn.exits > 1:
            raise Endless("it repeats what can itself be matched in several ways")
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
