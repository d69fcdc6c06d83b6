"""The demo's adapters: where they are, what they are made for, and what their config says in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import HotslotError

_METHODS = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr", "VERA": "VeRA"}  # the others are written as in configs
_PROMPTS = ("Once upon a time",)  # for models and adapters of which the demo knows nothing


@dataclass(frozen=True)
class Cast:
    """What the demo shows.

    Attributes:
        sources: adapter name → folder or Hub id, in the order of the table.
        prompts: asked of the base and of every adapter.
        showcase: adapter → the prompt it was made for; the first one where nothing is said.
        recorded: adapter, or "base" → prompt → answer of a fresh PEFT load; empty for what the demo does not know.
    """

    sources: dict[str, str]
    prompts: tuple[str, ...]
    showcase: Mapping[str, str]
    recorded: Mapping[str, Mapping[str, str]]

    def unexpected(self, name: str, answers: Mapping[str, str]) -> list[str] | None:
        """Prompts whose answer is not the recorded one; None if nothing is recorded for this adapter."""
        recorded = self.recorded.get(name)
        if recorded is None:
            return None
        return [prompt for prompt, answer in answers.items() if recorded.get(prompt, answer) != answer]


def choose(model: str | None, adapters: Sequence[str | Path] | None, prompts: Sequence[str] | None) -> Cast:
    """The repository's own cast, or the caller's adapters under the names of their folders.

    Raises:
        HotslotError: the repository's adapters are wanted and not there.
    """
    if adapters:
        return Cast(_named(adapters), tuple(prompts or _PROMPTS), {}, {})
    index = own_index("demo.json")
    facts: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    sources = {name: str(index.parent / name) for name in facts["showcase"]}
    recorded = facts["answers"] if model is None else {}  # of another model we know nothing
    return Cast(sources, tuple(prompts or facts["prompts"]), {} if prompts else facts["showcase"], recorded)


def describe(config: Mapping[str, Any]) -> tuple[str, str, str]:
    """Method, rank and targets of an adapter_config.json, in few words."""
    method = _METHODS.get(str(config.get("peft_type")), str(config.get("peft_type")))
    for option, word in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")):
        method = word if config.get(option) else method
    # OFT has blocks instead, and says r=0
    ranks = {config.get("r"), *(config.get("rank_pattern") or {}).values()} - {
        None,
        0,
    }
    rank = str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)}–{max(ranks)}" if ranks else ""
    targets = config.get("target_modules") or ()
    if not isinstance(targets, str):
        targets = " ".join(sorted(name.removesuffix("_proj") for name in targets))
    layers = config.get("layers_to_transform")
    if isinstance(layers, list) and layers:
        gapless = len(layers) == max(layers) - min(layers) + 1 > 1
        targets += f", layers {min(layers)}–{max(layers)}" if gapless else f", {len(layers)} layers"
    return method, rank, targets


def own_index(name: str) -> Path:
    """An index in the folder demo/ of the repository, beside the adapters that it is about.

    Raises:
        HotslotError: it is not there.
    """
    index = Path(__file__).parents[4] / "demo" / name
    if not index.is_file():
        raise HotslotError(
            "The demo's adapters are not there.",
            where=index.parent,
            expected="the folder demo/ of a clone of hotslot's repository; an installed wheel has no adapters in it",
            hint="run it in a clone (scripts/demo); or name some of your own: hotslot demo --adapter FOLDER",
        )
    return index


def _named(adapters: Sequence[str | Path]) -> dict[str, str]:
    sources: dict[str, str] = {}
    for adapter in adapters:
        name = base = Path(adapter).resolve().name if Path(adapter).exists() else str(adapter).rpartition("/")[2]
        for number in range(2, len(adapters) + 1):
            if name not in sources and name != "base":
                break
            name = f"{base}-{number}"
        sources[name] = str(adapter)
    return sources
