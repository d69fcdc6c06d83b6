"""Swap random pairs of LoRA adapters and count what comes of it: PEFT and hotslot beside each other.

    python benchmarks/random_pairs.py --pairs 200 --seed 0 [--exotic] [--json]

Each pair is two adapters drawn over LoRA's options for one small model: the first is loaded, the second
swapped in, and the output compared with that of a fresh load of the second. The pairs depend on the seed
alone: every function meets the same ones.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the models and oracle are the tests' own

from adapters import ALPHAS, exotic_config, make_adapter, random_config
from oracle import TOLERANCE, differences, error, fresh, fresh_output, snapshot
from zoo import ZOO, Entry

Swap = Callable[..., Any]  # (model, path, adapter_name, torch_device=None): the signature of PEFT's `hotswap_adapter`

VERDICTS = {
    "right": "the output is that of a fresh load",
    "refused": "raised, and nothing had changed",
    "wrong": "returned, but the output is another",
    "half_done": "raised, and something had changed",
}


@dataclass(frozen=True)
class Pair:
    """Two adapters of one model; `index` and the run's seed draw it again."""

    index: int
    entry: Entry
    configs: tuple[dict[str, Any], dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What one swap did. `reason`: the exception's class and first line; `where`: what changed."""

    index: int
    entry: str
    verdict: str
    reason: str = ""
    where: str = ""


@dataclass
class Counts:
    """The outcomes of a run; each verdict counted, and why for each but `right`."""

    outcomes: list[Outcome] = field(default_factory=list)

    def of(self, verdict: str) -> int:
        return sum(outcome.verdict == verdict for outcome in self.outcomes)

    right = property(lambda self: self.of("right"))
    refused = property(lambda self: self.of("refused"))
    wrong = property(lambda self: self.of("wrong"))
    half_done = property(lambda self: self.of("half_done"))

    @property
    def reasons(self) -> Counter[str]:
        """Verdict and reason → how often, without the values that differ from pair to pair."""
        failed = [outcome for outcome in self.outcomes if outcome.verdict != "right"]
        return Counter(f"{outcome.verdict}: {_generic(outcome.reason)}" for outcome in failed)

    def as_dict(self) -> dict[str, Any]:
        verdicts = {verdict: self.of(verdict) for verdict in VERDICTS}
        return {**verdicts, "reasons": self.reasons, "outcomes": [vars(outcome) for outcome in self.outcomes]}


def _generic(reason: str) -> str:
    return re.sub(r"\S+\.\S+\.\S+", "…", reason.partition(", ")[0])


def draw(pairs: int, seed: int, *, exotic: bool = False, entries: Sequence[str] = tuple(ZOO)) -> Iterator[Pair]:
    """The pairs of a run. Each has a generator of its own, so that no pair depends on another."""
    for index in range(pairs):
        rng = Random(f"{seed}:{index}")
        entry = ZOO[rng.choice(list(entries))]
        first = (exotic_config if exotic else random_config)(rng, entry)
        yield Pair(index, entry, (first, _second(rng, entry, first, exotic)))


def _second(rng: Random, entry: Entry, first: dict[str, Any], exotic: bool) -> dict[str, Any]:
    """Half of the pairs are drawn apart. The others are near relations, as in most real uses."""
    relation = rng.choice(("apart", "apart", "retrained", "sibling"))
    if relation == "retrained":
        return first
    if relation == "sibling":  # same options; other scaling, and a rank and a subset of targets where all allow it
        second = {**first, "lora_alpha": rng.choice(ALPHAS)}
        if not exotic:
            second["r"] = random_config(rng, entry)["r"]
            second["target_modules"] = _subset(rng, first)
        return second
    return (exotic_config if exotic else random_config)(rng, entry)


def _subset(rng: Random, config: dict[str, Any]) -> list[str] | str:
    targets = config["target_modules"]
    if isinstance(targets, str) or {"exclude_modules", "layers_to_transform"} & config.keys():
        return targets  # a part of these might match nothing
    return rng.sample(targets, rng.randint(1, len(targets)))


def run(pairs: int, seed: int, swap: Swap, exotic: bool = False, entries: Sequence[str] = tuple(ZOO)) -> Counts:
    """Swap each pair with `swap` and count the verdicts."""
    counts = Counts()
    for pair in draw(pairs, seed, exotic=exotic, entries=entries):
        with tempfile.TemporaryDirectory() as folder:
            counts.outcomes.append(judge(pair, swap, Path(folder)))
    return counts


def judge(pair: Pair, swap: Swap, folder: Path) -> Outcome:
    """Load the first adapter of a pair, run the model, swap in the second, and say what came of it."""
    entry, inputs = pair.entry, pair.entry.inputs()
    first, second = (
        make_adapter(folder / str(which), entry, seed=2 * pair.index + which, **config)
        for which, config in enumerate(pair.configs)
    )
    model = fresh(entry, first)
    entry.output(model, inputs)  # a live model has run
    before = snapshot(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning made an error would abort the swap half-way
            swap(model, str(second), adapter_name="default", torch_device="cpu")
    except Exception as raised:
        changed = differences(before, snapshot(model))
        reason = "".join(traceback.format_exception_only(raised)).splitlines()[0]
        verdict = "half_done" if changed else "refused"
        return Outcome(pair.index, entry.name, verdict, reason[:160], "; ".join(changed[:3]))
    try:
        found = error(entry.output(model, inputs), fresh_output(entry, second))
    except Exception as raised:  # the swap returned and the model no longer runs
        return Outcome(pair.index, entry.name, "wrong", f"forward raises {type(raised).__name__}")
    if found <= TOLERANCE[torch.float32]:
        return Outcome(pair.index, entry.name, "right")
    return Outcome(pair.index, entry.name, "wrong", "another output", f"relative error {found:.2g}")


def _available() -> dict[str, Swap]:
    swaps = {}
    for name, module in (("peft", "peft.utils.hotswap"), ("hotslot", "hotslot")):
        try:
            swaps[name] = importlib.import_module(module).hotswap_adapter
        except (ImportError, AttributeError) as absent:
            print(f"{name} is left out: {absent}", file=sys.stderr)
    return swaps


def _print_table(results: dict[str, Counts], shown: int) -> None:
    print(f"{'':10}" + "".join(f"{name:>10}" for name in results))
    for verdict, meaning in VERDICTS.items():
        numbers = "".join(f"{getattr(counts, verdict):>10}" for counts in results.values())
        print(f"{verdict:10}{numbers}   {meaning}")
    for name, counts in results.items():
        print(f"\n{name}:")
        for reason, count in counts.reasons.most_common(shown):
            print(f"  {count:4} × {reason}")
        for outcome in counts.outcomes:
            if outcome.verdict in ("wrong", "half_done"):
                why = (outcome.where or outcome.reason)[:160]
                print(f"  pair {outcome.index} ({outcome.entry}) {outcome.verdict}: {why}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exotic", action="store_true", help="draw options beyond plain LoRA too")
    parser.add_argument("--entries", nargs="+", choices=list(ZOO), default=list(ZOO), help="models to draw from")
    parser.add_argument("--reasons", type=int, default=20, help="how many reasons to print")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are tiny: more threads only wait for each other
    results = {
        name: run(arguments.pairs, arguments.seed, swap, arguments.exotic, arguments.entries)
        for name, swap in _available().items()
    }
    if arguments.json:
        print(json.dumps({name: counts.as_dict() for name, counts in results.items()}, indent=2))
    else:
        _print_table(results, arguments.reasons)


if __name__ == "__main__":
    main()
