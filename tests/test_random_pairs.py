"""Random adapters over every option and every model of the zoo: a swap gives what a fresh load gives, or is refused
for a reason that is known, with nothing touched.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

import hotslot
from adapters import make_adapter, matched_modules, random_config
from hotslot.swapper import Swapper
from oracle import assert_same_output, assert_unchanged, error, fresh, fresh_output, snapshot
from zoo import ZOO, Entry

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import random_pairs

# A run draws the same pairs wherever it runs: a failure names its seed and pair, which bring it back.
PLAIN_PAIRS, PLAIN_SEED = 60, 20
EXOTIC_PAIRS, EXOTIC_SEED = 25, 21


def shown(pair: random_pairs.Pair, outcome: random_pairs.Outcome, seed: int) -> str:
    first, second = pair.configs
    return (
        f"seed {seed}, pair {pair.index} on {pair.entry.name}: {outcome.verdict}, {outcome.reason} {outcome.where}\n"
        f"  first:  {first}\n  second: {second}"
    )


def run(pairs: int, seed: int, swap: Any, *, exotic: bool) -> list[tuple[random_pairs.Pair, random_pairs.Outcome]]:
    drawn = list(random_pairs.draw(pairs, seed, exotic=exotic))
    counts = random_pairs.run(pairs, seed, swap, exotic=exotic)
    assert len(counts.outcomes) == pairs
    return list(zip(drawn, counts.outcomes, strict=True))


# -- hotswap_adapter: one adapter that PEFT loaded, for another ---------------------------------------------------


def new_targets(pair: random_pairs.Pair) -> set[str]:
    """What the second adapter targets and the first does not: no slot on the model is there for it."""
    first, second = (set(matched_modules(pair.entry, config)) for config in pair.configs)
    return second - first


def test_plain_lora_swaps_right_or_targets_more_than_the_model_has() -> None:
    """Refused if, and only if, the second adapter targets a layer that has no adapter."""
    failures = []
    verdicts = set()
    for pair, outcome in run(PLAIN_PAIRS, PLAIN_SEED, hotslot.hotswap_adapter, exotic=False):
        expected = "refused" if new_targets(pair) else "right"
        named = outcome.verdict == "right" or "unexpected keys found: base_model.model." in outcome.reason
        if outcome.verdict != expected or not named:
            failures.append(shown(pair, outcome, PLAIN_SEED))
        verdicts.add(outcome.verdict)
    assert not failures, "\n".join(failures)
    assert verdicts == {"right", "refused"}  # both are met, or the test says nothing


# Reason (regular expression of the error's first line) → the options of which an adapter must use one, or it is no
# reason. Each is an option beyond plain LoRA; docs/supported.md says why it is not swapped.
REASONS = {
    r"UnexpectedTargetError: .* saves modules whole that the model was not prepared for": ["modules_to_save"],
    r"UnexpectedTargetError: .* has tokens of a module that the model was not": ["trainable_token_indices"],
    r"RankError: .* has more tokens than the slot has places for": ["trainable_token_indices"],
    r"UnsupportedError: .* uses alora_invocation_tokens,": ["alora_invocation_tokens"],
    r"UnsupportedError: .* uses layer_replication,": ["layer_replication"],
    r"UnsupportedError: .* uses use_bdlora,": ["use_bdlora"],
    r"UnsupportedError: .* uses kasa_config,": ["kasa_config"],
    r"UnsupportedError: .* lacks biases that the adapter 'default', which came with the model,": ["bias"],
    r"UnsupportedError: .* is initialised in a way that rewrites the base weights": ["init_lora_weights"],
    r"UnsupportedError: .* adapts another bare parameter": ["target_parameters"],
    r"UnsupportedError: The adapter 'default' on the model is of a kind that hotslot does not swap": [
        "alora_invocation_tokens", "use_bdlora", "kasa_config", "init_lora_weights",
    ],
    r"UnexpectedTargetError: Hot swapping the adapter did not succeed, unexpected keys found": ["target_modules"],
}  # fmt: skip


def is_known(pair: random_pairs.Pair, outcome: random_pairs.Outcome) -> bool:
    """Whether the reason is one of REASONS, and one of the two adapters gives cause for it."""
    causes = [options for reason, options in REASONS.items() if re.search(reason, outcome.reason)]
    plain = {"bias": ("none", None), "init_lora_weights": (True, False, "gaussian", "orthogonal", None)}
    used = {
        option
        for config in pair.configs
        for option, value in config.items()
        if value not in plain.get(option, (None, False))
    }
    return len(causes) == 1 and bool(used & set(causes[0]))


def test_options_beyond_plain_lora_swap_right_or_are_refused_for_a_known_reason() -> None:
    failures = []
    for pair, outcome in run(EXOTIC_PAIRS, EXOTIC_SEED, hotslot.hotswap_adapter, exotic=True):
        if outcome.verdict not in ("right", "refused") or (
            outcome.verdict == "refused" and not is_known(pair, outcome)
        ):
            failures.append(shown(pair, outcome, EXOTIC_SEED))
    assert not failures, "\n".join(failures)


def _refuse_all(model: nn.Module, path: str, adapter_name: str, torch_device: str | None = None) -> None:
    raise hotslot.errors.UnsupportedError("the config uses use_bdlora, which hotslot does not swap.")


def _refuse_oddly(model: nn.Module, path: str, adapter_name: str, torch_device: str | None = None) -> None:
    raise ValueError("not today")


def test_reason_without_cause_is_noticed() -> None:
    """The control: a refusal for an option that neither adapter uses, or of a new kind, is not known."""
    for pair, outcome in run(4, PLAIN_SEED, _refuse_all, exotic=False):
        assert not is_known(pair, outcome)
    for pair, outcome in run(4, EXOTIC_SEED, _refuse_oddly, exotic=True):
        assert not is_known(pair, outcome)


# -- Swapper: three adapters on a plain model, in any order -------------------------------------------------------


def three_adapters(entry: Entry, rng: Random, folder: Path) -> dict[str, Path]:
    configs = [random_config(rng, entry) for _ in range(3)]
    return {f"adapter {i}": make_adapter(folder / str(i), entry, seed=i, **config) for i, config in enumerate(configs)}


def walk(entry: Entry, model: nn.Module, swapper: Swapper, adapters: dict[str, Path], order: Sequence[str]) -> None:
    """Activate in this order, and compare after each step."""
    for name in order:
        swapper.activate(name)
        assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, adapters[name]))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("entry", ZOO.values(), ids=list(ZOO))
def test_plain_model_runs_any_of_its_adapters_in_any_order(entry: Entry, seed: int, tmp_path: Path) -> None:
    rng = Random(f"{entry.name} {seed}")
    adapters = three_adapters(entry, rng, tmp_path)
    model = entry.build()
    before, base = snapshot(model), entry.output(model, entry.inputs())
    swapper = hotslot.attach(model, adapters)
    assert torch.equal(entry.output(model, entry.inputs()), base)  # nothing is active yet
    walk(entry, model, swapper, adapters, [*adapters, *rng.choices(list(adapters), k=3)])
    swapper.deactivate()
    assert torch.equal(entry.output(model, entry.inputs()), base)
    walk(entry, model, swapper, adapters, rng.choices(list(adapters), k=2))
    assert error(entry.output(model, entry.inputs()), base) > 1e-3  # the control: it makes a difference
    with swapper.using(None):
        assert torch.equal(entry.output(model, entry.inputs()), base)
    swapper.activate(rng.choice(list(adapters)))
    swapper.detach()
    assert_unchanged(before, snapshot(model))
    assert torch.equal(entry.output(model, entry.inputs()), base)


@pytest.mark.parametrize("entry", ZOO.values(), ids=list(ZOO))
def test_peft_model_runs_any_adapter_and_gets_its_own_back(entry: Entry, tmp_path: Path) -> None:
    """Attached to a model that has an adapter of PEFT's; the others target what they will."""
    rng = Random(f"{entry.name} on peft")
    adapters = three_adapters(entry, rng, tmp_path)
    own = make_adapter(tmp_path / "own", entry, seed=9, **random_config(rng, entry))
    model = fresh(entry, own)  # not run before: PEFT's attention adds to and subtracts from the base at each call
    before = snapshot(model)
    swapper = hotslot.attach(model, adapters)
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, own))
    walk(entry, model, swapper, adapters, [*adapters, rng.choice(list(adapters))])
    swapper.deactivate()
    frozen = entry.build().requires_grad_(False)  # as PEFT leaves it: a frozen weight may take another kernel
    assert torch.equal(entry.output(model, entry.inputs()), entry.output(frozen, entry.inputs()))
    swapper.activate(rng.choice(list(adapters)))
    swapper.detach()
    assert_unchanged(before, snapshot(model))
    assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, own))
