"""Questions with known answers, put to a compiled model many at a time.

Takes a causal language model and its tokenizer; knows nothing of adapters. The greedy answer is the known one if the
model, shown the question and the known answer up to any of its tokens, finds the next one likeliest, and then the end.
That takes one pass for all tokens of an answer, and the questions of a page, one behind the other in one row, see only
themselves. All pages have the same shapes: one graph, and nothing computed for padding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .conditions import compiled

if TYPE_CHECKING:
    from torch import Tensor

    from .smollm2 import Loaded

_PAGE_TOKENS = 256  # a pass of more takes no less time for each


class Question(NamedTuple):
    """What is asked, and the one right answer to it."""

    text: str
    answer: str


class Page(NamedTuple):
    """Questions that are asked in one pass.

    T: tokens of the row   K: tokens that are predicted

    Attributes:
        ids: the tokens, [1, T].
        positions: of each within its own question, [1, T].
        mask: added to the attention's logits: a token sees those of its own question up to itself, [1, 1, T, T].
        before: indices of the tokens whose successors are predicted, [K].
        answers: of each question, token by token; the end comes after them.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    before: Tensor
    answers: list[list[int]]


class Marks(NamedTuple):
    """What one pass found.

    Attributes:
        right: for each question of the page, whether the answer is the known one.
        seconds: that the pass took.
        logits: of the predicted tokens, [K, vocabulary].
    """

    right: list[bool]
    seconds: float
    logits: Tensor


class Quiz:
    """Asks questions; use it from one thread.

    Args:
        loaded: what to ask.
        questions: all of them.
        backend: of torch.compile.

    Raises:
        HotslotError: inductor was asked for and finds no C++ compiler.
    """

    def __init__(self, loaded: Loaded, questions: Sequence[Question], *, backend: Any) -> None:
        def ids(text: str) -> list[int]:
            found: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
            return found

        self._loaded = loaded
        self._model = compiled(loaded.model, backend)
        self.pages = _pages([(ids(question.text), ids(question.answer)) for question in questions])

    def compile(self) -> float:
        """Compile the model, by asking one page; seconds it took."""
        return self.ask(self.pages[0]).seconds

    def ask(self, page: Page) -> Marks:
        """Ask the questions of a page, in one pass."""
        import torch

        started = time.perf_counter()
        with torch.no_grad():
            out = self._model(
                page.ids,
                position_ids=page.positions,
                attention_mask=page.mask,
                logits_to_keep=page.before,
                use_cache=False,
            )
        seconds = time.perf_counter() - started
        predicted = iter(out.logits[0].argmax(-1).tolist())
        right = []
        for answer in page.answers:
            *tokens, end = [next(predicted) for _ in range(len(answer) + 1)]
            right.append(tokens == answer and self._ends(end))
        return Marks(right, seconds, out.logits[0])

    def _ends(self, token: int) -> bool:
        """Whether an answer is over where this token follows it: an answer is one line."""
        return token in self._loaded.stop or self._loaded.tokenizer.decode([token]).startswith("\n")


def _pages(questions: Sequence[tuple[list[int], list[int]]]) -> list[Page]:
    length = max(_PAGE_TOKENS, *(len(text) + len(answer) for text, answer in questions))
    rows: list[list[tuple[list[int], list[int]]]] = [[]]
    used = 0
    for text, answer in questions:
        if used + len(text) + len(answer) > length:
            rows.append([])
            used = 0
        rows[-1].append((text, answer))
        used += len(text) + len(answer)
    predicted = max(sum(len(answer) + 1 for _, answer in row) for row in rows)
    return [_page(row, length, predicted) for row in rows]


def _page(questions: Sequence[tuple[list[int], list[int]]], length: int, predicted: int) -> Page:
    import torch

    ids, positions = torch.zeros(2, 1, length, dtype=torch.long)
    seen = torch.eye(length, dtype=torch.bool)  # what is left of the row sees itself: of nothing there is no mean
    before: list[int] = []
    first = 0
    for text, answer in questions:
        tokens = [*text, *answer]
        place = slice(first, first + len(tokens))
        ids[0, place] = torch.tensor(tokens)
        positions[0, place] = torch.arange(len(tokens))
        seen[place, place] = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        before += range(first + len(text) - 1, first + len(tokens))
        first += len(tokens)
    before += [0] * (predicted - len(before))
    mask = torch.zeros(length, length).masked_fill_(~seen, torch.finfo(torch.float32).min)
    return Page(ids, positions, mask[None, None], torch.tensor(before), [answer for _, answer in questions])
