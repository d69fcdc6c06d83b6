"""Greedy answers through a compiled decode step.

Takes a causal language model and its tokenizer; knows nothing of adapters. The prefill is eager, so prompts may have
any length; every further token is one call of the compiled model on one token and one static KV cache, always of
the same shapes: one graph, whatever is asked.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .conditions import compiled

if TYPE_CHECKING:
    from .smollm2 import Loaded

MAX_NEW_TOKENS = 20  # at which answers are cut; the recorded ones in demo/demo.json are too
_CACHE_STEP = 64  # cache lengths are rounded up to it, lest a prompt one token longer be another graph on disk


class Decoder:
    """Answers prompts one at a time. All of them share one cache; use it from one thread.

    Args:
        loaded: what to talk with.
        prompts: all that will be asked, to size the cache.
        backend: of torch.compile.

    Raises:
        HotslotError: inductor was asked for and finds no C++ compiler.
    """

    def __init__(self, loaded: Loaded, prompts: Sequence[str], *, backend: Any) -> None:
        from transformers import StaticCache

        self._loaded = loaded
        self._ids: dict[str, Any] = {
            prompt: loaded.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
            for prompt in prompts
        }
        longest = max(ids.shape[1] for ids in self._ids.values()) + MAX_NEW_TOKENS
        self._cache = StaticCache(config=loaded.model.config, max_cache_len=-(-longest // _CACHE_STEP) * _CACHE_STEP)
        self._step = compiled(loaded.model, backend)

    def compile(self) -> float:
        """Compile the decode step, by taking one; seconds it took."""
        started = time.perf_counter()
        self._generate(next(iter(self._ids.values())), 2)
        return time.perf_counter() - started

    def answer(self, prompt: str) -> str:
        """What the model says next, greedily, until a stop token or MAX_NEW_TOKENS."""
        tokens = self._generate(self._ids[prompt], MAX_NEW_TOKENS)
        return str(self._loaded.tokenizer.decode(tokens, skip_special_tokens=True))

    def ids(self, prompt: str) -> Any:
        """The prompt's tokens, as a batch of one."""
        return self._ids[prompt]

    def _generate(self, ids: Any, count: int) -> list[int]:
        import torch

        self._cache.reset()
        tokens: list[int] = []
        model: Any = self._loaded.model
        with torch.no_grad():
            logits = model(ids, past_key_values=self._cache, use_cache=True).logits
            while True:
                token = logits[:, -1:].argmax(-1)
                tokens.append(int(token))
                if len(tokens) == count or tokens[-1] in self._loaded.stop:
                    return tokens
                logits = self._step(token, past_key_values=self._cache, use_cache=True).logits
