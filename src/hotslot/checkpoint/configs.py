"""An adapter's config as plain data: from the text of adapter_config.json, or from a peft config."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ..errors import ConfigError, HotslotError
from .limits import MAX_CONFIG_DEPTH, MAX_NUMBER_BITS

SAVE_AGAIN = "the file was edited or is another: save the adapter again with save_pretrained"


def parse_config(text: bytes, path: Path) -> dict[str, Any]:
    """The content of a text like adapter_config.json's; `path` is where it stands.

    Raises:
        ConfigError: it is no such thing.
    """
    try:
        parsed = json.loads(text.decode(), object_pairs_hook=lambda pairs: _unique(pairs, path))
    except HotslotError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is no JSON.", where=path, found=str(error), expected="what save_pretrained wrote", hint=SAVE_AGAIN
        ) from error
    if not isinstance(parsed, dict):
        raise ConfigError(
            f"{path} is no JSON object.",
            where=path,
            found=f"a JSON {type(parsed).__name__}",
            expected="an object",
            hint=SAVE_AGAIN,
        )
    return config_dict(parsed)


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ConfigError(
            f"{path} has a key twice, of which readers see one or the other.",
            where=twice,
            found="the same key twice",
            expected="each key once",
            hint=SAVE_AGAIN,
        )
    return found


def config_dict(config: Any) -> dict[str, Any]:
    """The content that adapter_config.json would have: of a peft config, or of a dict like it."""
    if is_dataclass(config) and not isinstance(config, type):
        # A peft config's own to_dict may have been overridden to describe a padded adapter.
        to_dict = getattr(config, "to_dict", None)
        config = to_dict() if to_dict is not None else asdict(config)
    if not isinstance(config, Mapping):
        raise ConfigError(
            "The config is neither a peft config nor a dict.",
            where="config",
            found=type(config).__name__,
            expected="a peft config or a dict like its JSON",
            hint="pass the LoraConfig that the adapter was trained with",
        )
    plain = _plain(config)
    assert isinstance(plain, dict)
    return plain


def _plain(value: Any, depth: int = 0) -> Any:
    """As JSON would give it back: enums as their values, sets as sorted lists, tuples as lists."""
    if depth > MAX_CONFIG_DEPTH:  # json reads 900 levels, at which PEFT's own code runs out of stack
        raise ConfigError(
            "The config is nested too deeply.",
            where="config",
            found=f"more than {MAX_CONFIG_DEPTH} levels",
            expected="three or four, as PEFT writes it",
            hint=SAVE_AGAIN,
        )
    if isinstance(value, Mapping):
        return {str(_plain(key, depth + 1)): _plain(entry, depth + 1) for key, entry in value.items()}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, int) and value.bit_length() > MAX_NUMBER_BITS:
        raise ConfigError(
            "The config holds a number that is beyond all bounds.",
            where="config",
            found=f"a whole number of {value.bit_length():,} bits",
            expected=f"at most {MAX_NUMBER_BITS:,}",
            hint=SAVE_AGAIN,
        )
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(entry, depth + 1) for entry in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(entry, depth + 1) for entry in value]
    return value
