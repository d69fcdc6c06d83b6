"""What README and docs say is so: code runs, messages are real, what is named exists, tables are whole."""

from __future__ import annotations

import builtins
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import hotslot
from adapters import expected_peft_warnings, make_adapter
from hotslot import errors
from hotslot.testing import no_recompile, same_addresses
from oracle import assert_same_output, error, fresh_output
from zoo import ZOO

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", ROOT / "demo" / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
README = (ROOT / "README.md").read_text()
SUPPORTED = (ROOT / "docs" / "supported.md").read_text()
LLAMA = ZOO["llama"]

in_every_document = pytest.mark.parametrize("document", DOCS, ids=lambda path: str(path.relative_to(ROOT)))


# --- the README's code ----------------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what the README's code asks for; torch.compile without inductor, which takes a minute."""
    LLAMA.build().save_pretrained(tmp_path / "my-model")
    linear = [target for target in LLAMA.targets if target.endswith("_proj")]
    configs: dict[str, dict[str, Any]] = {
        "sql": {"r": 4, "lora_alpha": 8, "target_modules": linear},
        "chat": {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        "new": {"r": 3, "lora_alpha": 5, "target_modules": ["o_proj", "up_proj"]},
    }
    for i, (name, config) in enumerate(configs.items()):
        make_adapter(tmp_path / "adapters" / name, LLAMA, seed=i, **config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOTSLOT_CACHE", str(tmp_path / "adapters" / "cache"))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield tmp_path / "adapters"
    hotslot.unpatch_peft()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    with expected_peft_warnings():
        exec(compile(code, "README.md", "exec"), names)
    names["model"].eval()
    return names


def test_the_first_code_runs_and_swaps(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(blocks(README, "python")[0])
    model, swapper, inputs = names["model"], names["swapper"], LLAMA.inputs()
    assert capsys.readouterr().out.startswith("SwapReport(adapter='new', previous='sql', ")
    assert_same_output(LLAMA.output(model, inputs), fresh_output(LLAMA, workplace / "new"))
    with no_recompile(), same_addresses(model):
        for name in ("chat", "sql", "new"):
            swapper.activate(name)
            assert_same_output(LLAMA.output(model, inputs), fresh_output(LLAMA, workplace / name))
        with swapper.using(None):
            base = LLAMA.output(model, inputs)
    assert_same_output(base, LLAMA.output(LLAMA.build(), inputs))
    assert error(base, fresh_output(LLAMA, workplace / "new")) > 0.01  # the control


def test_the_drop_in_s_code_runs_and_swaps(workplace: Path) -> None:
    code = blocks(README, "python")[1]
    model = run(code)["model"]
    assert_same_output(LLAMA.output(model, LLAMA.inputs()), fresh_output(LLAMA, workplace / "chat"))
    import peft.utils.hotswap

    original = peft.utils.hotswap.hotswap_adapter
    hotslot.patch_peft()
    names = run(re.sub(r"from hotslot import (.*?)  #.*", r"from peft.utils.hotswap import \1", code))
    assert names["hotswap_adapter"] is hotslot.hotswap_adapter is not original
    assert_same_output(LLAMA.output(names["model"], LLAMA.inputs()), fresh_output(LLAMA, workplace / "chat"))


def test_the_blends_code_runs_and_blends(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(blocks(README, "python")[2])
    model, swapper = names["model"], names["swapper"]
    printed, _, stated = capsys.readouterr().out.strip().rpartition("\n")
    assert printed == str(names["plan"])
    assert 0 < float(stated) < 1
    assert swapper.active == "new:1.0+sql:0.7"
    swapper.activate("new")
    assert_same_output(LLAMA.output(model, LLAMA.inputs()), fresh_output(LLAMA, workplace / "new"))


def test_the_tiers_code_runs_and_swaps(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(blocks(README, "python")[3])
    model, swapper = names["model"], names["swapper"]
    assert capsys.readouterr().out.strip() in ("host", "disk")
    for name in ("chat", "new", "sql"):
        swapper.activate(name)
        assert_same_output(LLAMA.output(model, LLAMA.inputs()), fresh_output(LLAMA, workplace / name))
    swapper.detach()
    assert list((workplace / "cache" / "packed").iterdir())


def test_no_code_is_left_out() -> None:
    assert len(blocks(README, "python")) == 4


def test_the_error_is_verbatim(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(ROOT)
    larger = LlamaConfig(  # SmolLM2-360M
        hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5,
        vocab_size=49152,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(larger)
    with pytest.raises(errors.ShapeError) as caught:
        hotslot.attach(model, adapters={"french": "demo/french"})
    said = f"{caught.type.__module__}.{caught.type.__qualname__}: {caught.value}\n"
    assert said in blocks(README, "text")


# --- docs/training.md -----------------------------------------------------------------------------------------------


def test_the_code_on_training_runs_and_keeps_what_was_trained(
    workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy, turns = blocks((ROOT / "docs" / "training.md").read_text(), "python")
    names = run(policy)
    trainer = names["trainer"].eval()
    assert_same_output(LLAMA.output(names["model"], LLAMA.inputs()), LLAMA.output(trainer, LLAMA.inputs()))
    names = run(turns)
    assert not caplog.records
    for name in ("sql", "chat"):
        names["swapper"].activate(name)
        trained = LLAMA.output(names["model"], LLAMA.inputs())
        assert error(trained, fresh_output(LLAMA, workplace / name)) > 1e-3


# --- docs/diffusers.md ----------------------------------------------------------------------------------------------


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the pipeline and the LoRAs that docs/diffusers.md asks for."""
    diffusers = pytest.importorskip("diffusers")
    from pipelines import PIPELINES, make_lora

    flux = PIPELINES["flux"]
    # A pipeline without a VAE and tokenizers, as this one, can be built and not loaded.
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda name: flux.build())
    for i, name in enumerate(("ink", "neon")):
        saved = make_lora(flux, tmp_path / name, seed=i, components=("transformer", "text_encoder"), r=3 - i)
        (tmp_path / "loras").mkdir(exist_ok=True)
        (saved / "pytorch_lora_weights.safetensors").rename(tmp_path / "loras" / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield tmp_path
    hotslot.unpatch_peft()


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("live", [("neon",), (None,), (None, "ink", "neon", "blend"), (None, "neon")], ids=str)
def test_diffusers_code_runs(live: tuple[str | None, ...], studio: Path) -> None:
    """One for each block, but that the last line of a blend goes with the block before it; with what is live then."""
    from pipelines import PIPELINES, load_plain

    kind = PIPELINES["flux"]
    wanted: dict[str | None, Any] = {}
    for name in (None, "ink", "neon", "blend"):
        pipe = kind.build()
        for adapter in ("ink", "neon") if name == "blend" else [name] * (name is not None):
            load_plain(pipe, studio / "loras" / f"{adapter}.safetensors", adapter)
        if name == "blend":
            pipe.set_adapters(["ink", "neon"], [0.7, 0.4])
        wanted[name] = kind.outputs(pipe)
    patched, plain, held, blend, merged = blocks((ROOT / "docs" / "diffusers.md").read_text(), "python")
    code = {("neon",): patched, (None,): plain, (None, "ink", "neon", "blend"): held, (None, "neon"): merged}[live]
    names: dict[str, Any] = {}
    exec(compile(code, "diffusers.md", "exec"), names)
    for name in live[:1]:
        assert_pipeline(kind, names["pipe"], wanted[name])
    with no_recompile():
        for name in live[1:]:
            if name == "blend":
                exec(compile(blend, "diffusers.md", "exec"), names)
            else:
                names["swapper"].activate(name)
            assert_pipeline(kind, names["pipe"], wanted[name])
    assert len({float(output["transformer"].sum()) for output in wanted.values()}) == 4  # the control


def assert_pipeline(kind: Any, pipe: Any, wanted: dict[str, torch.Tensor]) -> None:
    outputs = kind.outputs(pipe)
    for name, output in wanted.items():
        assert_same_output(outputs[name], output)


# --- what is named exists -------------------------------------------------------------------------------------------


@in_every_document
def test_relative_links_resolve(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@in_every_document
def test_paths_and_tests_that_are_named_exist(document: Path) -> None:
    text = document.read_text()
    paths = re.findall(r"\b((?:tests|benchmarks|scripts|docs|demo|src)/[\w/.-]*\w)", text)
    if document.name != "CONTRIBUTING.md":  # its commands have examples
        assert [path for path in paths if not (ROOT / path).exists()] == []
    for path, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path} has no {name}"
    for entries in re.findall(r"--entries ((?:\w+ ?)+)", text):
        assert set(entries.split()) <= set(ZOO)


@in_every_document
def test_errors_that_are_named_exist(document: Path) -> None:
    named = set(re.findall(r"\b[A-Z]\w*Error\b", document.read_text()))
    assert {name for name in named if not (hasattr(errors, name) or hasattr(builtins, name))} == set()


def test_each_part_of_the_package_is_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    listed = text.partition("## Packages")[2].partition("\n## ")[0]
    parts = {path.stem for path in (ROOT / "src" / "hotslot").iterdir() if path.name not in ("py.typed", "__pycache__")}
    assert {part for part in parts if not re.search(rf"\b{part}\b", listed)} == set()
