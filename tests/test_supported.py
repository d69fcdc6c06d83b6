"""docs/supported.md is whole, and true: its tables are those of tests/supported.py, whose rows are tried one by one."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hotslot
from adapters import make_adapter
from hotslot.errors import HotslotError, UnsupportedError
from hotslot.methods import lora_options as lora
from oracle import assert_same_output, assert_unchanged, error, fresh, fresh_output, snapshot
from supported import EXACT, LAYERS, OPTIONS, PAGE, PEFT_REFUSES, Layer, Option, rendered
from zoo import ZOO, Entry

LINEARS = ["up", "inner.0"]
# Initialisations that configs state otherwise than users do.
SPELLINGS = (None, "true", "false")


def rows(*kinds: str) -> Any:
    """The options of these tables that have an example, as parameters."""
    found = [option for option in OPTIONS if option.kind in kinds and option.example]
    return pytest.mark.parametrize("option", found, ids=lambda option: f"{option.names} {option.values or ''}".strip())


@pytest.fixture(autouse=True)
def expected_warnings() -> Any:
    """PEFT has advice on many of these options."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- the tables are whole -------------------------------------------------------------------------------------------


def test_the_page_is_what_the_rows_say() -> None:
    page = PAGE.read_text()
    assert rendered(page) == page, "run python tests/supported.py"


def test_each_option_of_the_installed_peft_has_one_row() -> None:
    count = Counter(name for option in OPTIONS if not option.values for name in option.names.split())
    assert set(count) | {"init_lora_weights"} == set(LoraConfig.__dataclass_fields__)
    assert set(count.values()) == {1}


@pytest.mark.parametrize(
    ("kind", "in_code"),
    [
        ("exact", lora._READ | lora._TRAINED_OTHERWISE.keys()),
        ("without effect", lora._WITHOUT_EFFECT),
        ("refused", lora._REFUSED.keys()),
    ],
)
def test_each_option_stands_where_the_code_has_it(kind: str, in_code: Any) -> None:
    listed = {name for option in OPTIONS if option.kind == kind and not option.values for name in option.names.split()}
    assert listed == set(in_code)


def test_initialisations_stand_where_the_code_has_them() -> None:
    listed = {kind: [v for o in OPTIONS if o.kind == kind for v in o.values] for kind in ("exact", "refused")}
    assert set(map(repr, listed["exact"])) == {repr(init) for init in lora._BENIGN_INITS if init not in SPELLINGS}
    for init in listed["refused"]:
        with pytest.raises(UnsupportedError, match="init_lora_weights"):
            lora.refuse_unsupported_options({"peft_type": "LORA", "init_lora_weights": init}, "it")


def test_what_is_said_to_be_exact_is_tried_or_proved() -> None:
    assert [row.title for row in OPTIONS if row.kind == "exact" and not (row.example or row.proved_by)] == []
    assert [row.layer for row in LAYERS if EXACT in row.said and not (row.on or row.proved_by)] == []


# --- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "name", "target"), [(row, name, target) for row in LAYERS for name, target in row.on.items()]
)
def test_each_layer_is_as_said(row: Layer, name: str, target: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    base: dict[str, Any] = {"target_modules": [target], "lora_dropout": 0.1}
    configs = {
        "low": {**base, "r": entry.rank_multiple, "lora_alpha": 3},
        "high": {**base, "r": 2 * entry.rank_multiple, "alpha_pattern": {target: 5}, "use_rslora": True},
    }
    biased = {**base, "lora_bias": True, "r": 2 * entry.rank_multiple}
    if row.bias == EXACT:
        configs["biased"] = biased
    elif row.bias == PEFT_REFUSES:
        with pytest.raises(ValueError, match="lora_bias"):
            make_adapter(tmp_path / "biased", entry, seed=9, **biased)
    assert_any_to_any(entry, configs, tmp_path)


def assert_any_to_any(entry: Entry, configs: dict[str, dict[str, Any]], folder: Path) -> None:
    """On a plain model, on one of PEFT's with the first of them, and back."""
    folders = {
        name: make_adapter(folder / name, entry, seed=i, **config) for i, (name, config) in enumerate(configs.items())
    }
    first, inputs = next(iter(folders)), entry.inputs()
    for model in (entry.build(), fresh(entry, folders[first])):
        swapper = hotslot.attach(model, folders)
        for name in [*folders, *reversed(folders)]:
            swapper.activate(name)
            assert_same_output(entry.output(model, inputs), fresh_output(entry, folders[name]))
        swapper.detach()
        before = fresh(entry, folders[first]) if isinstance(model, PeftModel) else entry.build()
        assert_same_output(entry.output(model, inputs), entry.output(before, inputs))
    outputs = [fresh_output(entry, folder) for folder in folders.values()]
    assert all(error(outputs[0], other) > 1e-3 for other in outputs[1:])  # the control


# --- options --------------------------------------------------------------------------------------------------------


def config_of(option: Option) -> dict[str, Any]:
    return {"r": 4, "target_modules": LINEARS, **option.example}


@rows("exact", "without effect")
def test_each_option_is_exact_as_said(option: Option, tmp_path: Path) -> None:
    """To another adapter that uses it, and to one that does not."""
    config = config_of(option)
    configs = {"plain": {"r": 4, "target_modules": config["target_modules"]}, "one": config, "other": config}
    if option.names == "target_parameters":
        del configs["plain"]  # all adapters of a model are to have the same
    assert_any_to_any(ZOO[option.on], configs, tmp_path)


def refused_adapter(option: Option, folder: Path) -> Path:
    """One that uses the option; where PEFT makes none on these models, one whose config says so."""
    config, entry = config_of(option), ZOO[option.on]
    if option.from_peft:
        return make_adapter(folder, entry, seed=1, **config)
    make_adapter(folder, entry, seed=1, r=4, target_modules=config["target_modules"])
    stated = json.loads((folder / "adapter_config.json").read_text()) | dict(option.example)
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    return folder


@rows("refused")
@pytest.mark.parametrize("on_peft", [False, True])
def test_each_refused_option_is_refused_by_slots(option: Option, on_peft: bool, tmp_path: Path) -> None:
    entry, folder = ZOO[option.on], refused_adapter(option, tmp_path / "new")
    targets = config_of(option)["target_modules"]
    plain = make_adapter(tmp_path / "plain", entry, seed=0, r=4, target_modules=targets)
    model = fresh(entry, plain) if on_peft else entry.build()
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=option.names):
        hotslot.attach(model, {"new": folder}, route="side")
    if on_peft:
        with pytest.raises(HotslotError):  # some have names of layers that are not there either
            hotslot.hotswap_adapter(model, str(folder), "default")
    assert_unchanged(before, snapshot(model))


@rows("refused")
def test_each_refused_option_is_merged_or_refused_as_said(option: Option, tmp_path: Path) -> None:
    entry, folder = ZOO[option.on], refused_adapter(option, tmp_path / "new")
    before = snapshot(model := entry.build())
    if not option.merged:
        with pytest.raises(UnsupportedError, match=option.names):
            hotslot.attach(model, {"new": folder})
    else:
        base = entry.output(model, entry.inputs())
        swapper = hotslot.attach(model, {"new": folder})
        swapper.activate("new")
        assert_same_output(entry.output(model, entry.inputs()), fresh_output(entry, folder))
        assert error(base, fresh_output(entry, folder)) > 1e-3  # the control
        swapper.detach()
    assert_unchanged(before, snapshot(model))


# --- and what is said of PEFT holds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.in_peft], ids=lambda option: option.title)
def test_what_an_option_does_in_peft(option: Option, tmp_path: Path) -> None:
    entry, said, config = ZOO[option.on], option.in_peft, config_of(option)
    assert said is not None
    folder = make_adapter(tmp_path / "new", entry, seed=1, **config)
    model, tensors = fresh(entry, folder), load_file(folder / "adapter_model.safetensors")
    beside = {key.rpartition(".")[2] for key in tensors if "lora_A" not in key and "lora_B" not in key}
    assert beside == said.extra
    assert (_base_weights(model) != _base_weights(entry.build())) == said.changes_base
    plain = {"r": 4, "target_modules": config["target_modules"]}
    if said.is_plain is None:
        with pytest.raises(RuntimeError, match="size mismatch"):
            _load_plain(entry.build(), tensors, plain, tmp_path / "plain")
    else:
        alone = _load_plain(entry.build(), tensors, plain, tmp_path / "plain")
        outputs = [entry.output(subject, entry.inputs()) for subject in (model, alone)]
        assert torch.equal(*outputs) == said.is_plain


def _base_weights(model: nn.Module) -> dict[str, list[Any]]:
    wrapping = r"base_model\.model\.|\.base_layer|\.modules_to_save\.default"
    return {
        re.sub(wrapping, "", key): value.tolist()
        for key, value in model.state_dict().items()
        if "lora_" not in key and "original_module" not in key
    }


def _load_plain(base: nn.Module, tensors: dict[str, Tensor], options: dict[str, Any], folder: Path) -> PeftModel:
    """A and B, read as plain LoRA."""
    LoraConfig(**options).save_pretrained(folder)
    save_file(
        {k: v for k, v in tensors.items() if "lora_A" in k or "lora_B" in k}, folder / "adapter_model.safetensors"
    )
    return PeftModel.from_pretrained(base, str(folder)).eval()


class KeysOfTheirOwn(nn.Module):
    """Attention whose keys and values are narrower, experts as one bare parameter, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
        self.word = nn.Embedding(5, 8)
        self.experts = nn.Module()
        self.experts.weight = nn.Parameter(torch.zeros(3, 8, 6))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"target_modules": ["attention"]}, "Only same embed"),
        ({"target_modules": ["word"], "lora_bias": True}, "lora_bias=True is not supported for Embedding"),
        ({"target_modules": [], "target_parameters": ["experts.weight"], "lora_bias": True}, "lora_bias=True"),
        ({"target_modules": [], "target_parameters": ["experts.weight"], "lora_dropout": 0.5}, "lora_dropout != 0"),
    ],
)
def test_what_peft_itself_does_not_take(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        get_peft_model(KeysOfTheirOwn(), LoraConfig(**config))
