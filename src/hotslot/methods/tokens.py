"""Tokens that an adapter trains by themselves (`trainable_token_indices`): rows in place of an embedding's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint import TensorSpec
from ..errors import ConfigError, TensorError

TOKENS = "token_adapter.trainable_tokens_delta"  # behind the module's path, in a file
_HINT = "the config belongs to another adapter, or the file was edited: save the adapter again with save_pretrained"


@dataclass(frozen=True, slots=True)
class Tokens:
    """Rows that an adapter has for one embedding, or output layer.

    Attributes:
        indices: of the tokens, each once.
        rows: where the checkpoint has their values, [tokens, features].
    """

    indices: tuple[int, ...]
    rows: TensorSpec


def read_tokens(
    config: Mapping[str, Any], found: Mapping[str, Mapping[str, TensorSpec]], origin: str
) -> dict[str, Tokens]:
    """Module path → its tokens.

    Args:
        config: of the adapter.
        found: module path → TOKENS → rows, of the file.
        origin: the adapter's, for messages.

    Raises:
        ConfigError: the indices are none.
        TensorError: the file has other rows than the config says.
    """
    stated = config.get("trainable_token_indices") or {}
    by_name = stated if isinstance(stated, Mapping) else dict.fromkeys(found, stated)
    indices = {str(name): _indices(name, values, origin) for name, values in by_name.items()}
    if stated and not found:
        raise TensorError(
            f"{origin} lacks the tokens that its config says it has.",
            where="trainable_token_indices",
            found=f"{stated!r:.200}, and no tensor that ends in {TOKENS}",
            expected="one for each module with tokens",
            hint=_HINT,
        )
    tokens: dict[str, Tokens] = {}
    named_first = sorted(found, key=lambda fqn: not fqn.endswith(tuple(indices)))
    for fqn, rows in ((fqn, found[fqn][TOKENS]) for fqn in named_first):
        # PEFT takes whatever ends with the name, and of several the first that has come to the module.
        own = next((values for name, values in indices.items() if fqn.endswith(name)), ())
        if not own and rows.shape in [found[other][TOKENS].shape for other in tokens]:
            continue  # save_embedding_layers=True has saved them once more, of a module that is tied to the other
        if len(rows.shape) != 2 or rows.shape[0] != len(own) or not own:
            raise TensorError(
                f"{origin} has rows for other tokens than its config says.",
                where=rows.name,
                found=f"shape {rows.shape}",
                expected=f"{len(own)} rows, by trainable_token_indices {stated!r:.200}",
                hint=_HINT,
            )
        tokens[fqn] = Tokens(own, rows)
    return tokens


def _indices(name: Any, values: Any, origin: str) -> tuple[int, ...]:
    listed = isinstance(values, (list, tuple)) and all(type(value) is int and value >= 0 for value in values)
    if not listed or not values or len(set(values)) < len(values):
        raise ConfigError(
            f"{origin} has an invalid list of tokens.",
            where=f"trainable_token_indices[{name!r:.200}]",
            found=f"{values!r:.200}",
            expected="whole numbers from 0, each once",
            hint=_HINT,
        )
    return tuple(values)
