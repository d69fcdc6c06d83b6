"""`hotslot check` of diffusers pipelines, and `hotslot inspect` of LoRA files, on tiny ones of each dialect."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import hotslot
from hotslot.cli.app import app
from hotslot.errors import HotslotError

pytest.importorskip("diffusers")

from dialects import DIALECTS
from pipelines import PIPELINES, make_lora

# What a dialect is called, where that is not its first word: kohya's scripts, or another trainer with kohya's names.
WRITERS = {
    "diffusers_sd": "diffusers, before PEFT", "flux_alphas": "diffusers", "xlabs_flux": "xlabs",
    "bfl_control": "BFL control", "fal_kontext": "PEFT", "comfy_flux": "ComfyUI", "flux2": "ComfyUI", "wan": "ComfyUI",
    "qwen_dotted": "ComfyUI", "ltx": "ComfyUI", "z_image": "ComfyUI", "hunyuan_video": "ComfyUI",
}  # fmt: skip


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ask(*arguments: Any, exit_code: int = 0) -> dict[str, Any]:
    """The JSON answer."""
    result = run(*arguments, "--json")
    assert result.exit_code == exit_code, (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return json.loads(result.stdout[result.stdout.index("{") :])


# --- inspect


@pytest.mark.parametrize("name", DIALECTS)
def test_inspect_knows_dialects(name: str, tmp_path: Path) -> None:
    dialect = DIALECTS[name]
    file = dialect.save(tmp_path / "lora.safetensors", seed=0, rank=3)
    found = ask("inspect", file)
    tensors = load_file(file)
    assert found["dialect"] == WRITERS.get(name.partition(": ")[2], "kohya")
    downs = [key for key in tensors if key.endswith(("lora_A.weight", "down.weight"))]
    assert sum(sum(part["ranks"].values()) for part in found["components"]) == len(downs)
    assert {rank for part in found["components"] for rank in part["ranks"]} == {str(len(tensors[key])) for key in downs}
    alphas = Counter(float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha"))
    told = Counter({float(a): n for part in found["components"] for a, n in part["alphas"].items()})
    assert told.keys() == alphas.keys()
    assert found["strays"] == []
    assert found["tensors"] == len(tensors)
    assert found["nbytes"] == sum(tensor.nbytes for tensor in tensors.values())
    encoders = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
    for encoder, prefixes in encoders.items():
        there = any(key.startswith(prefixes) for key in tensors)
        assert there == any(part["name"] == encoder for part in found["components"])


def test_inspect_reads_what_diffusers_keeps_in_a_file(tmp_path: Path) -> None:
    demo = Path(__file__).parents[1] / "demo" / "image" / "neon.safetensors"
    (unet,) = ask("inspect", demo)["components"]
    assert unet["name"] == "unet"
    assert (unet["methods"], unet["ranks"], unet["alphas"]) == ({"LoRA": 122}, {"8": 122}, {"16.0": 122})
    assert unet["endings"]["attn1.to_out.0"] == 11
    text = run("inspect", demo).stdout
    assert "attn1.to_out.0" in text
    assert "122 " in text


def test_inspect_finds_the_file_that_diffusers_has_written(tmp_path: Path) -> None:
    folder = make_lora(PIPELINES["sd"], tmp_path / "lora" / "style", seed=1, r=3)
    file = ask("inspect", folder / "pytorch_lora_weights.safetensors")
    for found in (ask("inspect", folder), ask("inspect", folder.parent, "--subfolder", "style")):
        assert found == file


def test_inspect_tells_what_is_no_plain_lora(tmp_path: Path) -> None:
    tensors = {
        "transformer.a.lora_A.weight": torch.ones(2, 4),
        "transformer.a.lora_B.weight": torch.ones(4, 2),
        "transformer.a.lora_magnitude_vector": torch.ones(4),
        "transformer.b.lokr_w1": torch.ones(2, 2),
        "transformer.b.lokr_w2": torch.ones(2, 2),
        "transformer.c.weight": torch.ones(4),
    }
    save_file(tensors, tmp_path / "odd.safetensors", {"modelspec.title": "a\x1b[2Jb"})
    found = ask("inspect", tmp_path / "odd.safetensors", exit_code=1)
    assert found["components"][0]["methods"] == {"DoRA": 1, "LoKr": 1}
    assert found["strays"] == ["transformer.c.weight"]
    text = run("inspect", tmp_path / "odd.safetensors").stdout
    assert "transformer.c.weight" in text
    assert "a\\x1b[2Jb" in text


def test_inspect_refuses_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    save_file({"unet.a.lora_A.weight": torch.tensor([[float("nan")]])}, tmp_path / "nan.safetensors")
    for name, kind in (("cut", "CorruptFileError"), ("nan", "NonFiniteError"), ("absent", "AdapterNotFoundError")):
        error = ask("inspect", tmp_path / f"{name}.safetensors", exit_code=1)["error"]
        assert error["type"] == kind
        assert name in error["message"]


# --- check


@pytest.fixture(scope="module", params=["sd", "flux"])
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder without weights: whoever needs them fails."""
    folder = tmp_path_factory.mktemp(request.param)
    PIPELINES[request.param].build().save_pretrained(folder)
    weights = [*folder.rglob("*.safetensors")]
    assert weights
    for file in weights:
        file.unlink()
    return folder


def test_check_tells_fits_from_misfits_on_a_pipeline(pipeline: Path, tmp_path: Path) -> None:
    names = ["sd: kohya_sd", "sd: diffusers_sd", "flux: kohya_flux", "flux: comfy_flux"]
    files = [DIALECTS[name].save(tmp_path / f"{i}.safetensors", seed=i) for i, name in enumerate(names)]
    kind = next(kind for kind in ("sd", "flux") if kind in pipeline.name)
    found = ask("check", pipeline, *files, tmp_path / "absent.safetensors", exit_code=1)
    assert found["model_class"] == PIPELINES[kind].pipeline
    assert [verdict["fits"] for verdict in found["adapters"]] == [name.startswith(f"{kind}:") for name in names] + [
        False
    ]
    for file, verdict in zip(files, found["adapters"], strict=False):
        pipe = PIPELINES[kind].build()
        if verdict["fits"]:
            report = hotslot.attach(pipe, {"it": str(file)}).activate("it")
            assert (verdict["version"], verdict["nbytes"], verdict["route"]) == (
                report.version,
                report.nbytes,
                report.route,
            )
        else:
            with pytest.raises(HotslotError) as refused:
                hotslot.attach(pipe, {"it": str(file)})
            assert verdict["error"]["type"] == type(refused.value).__name__
    fitting = [str(file) for file, name in zip(files, names, strict=True) if name.startswith(f"{kind}:")]
    pipe = PIPELINES[kind].build()
    both = hotslot.plan(pipe, fitting, max_blend=1)
    assert (found["slots"], found["arena_bytes"]) == (len(both.slots), both.nbytes)


def test_check_says_once_that_a_lora_has_norms(tmp_path: Path) -> None:
    PIPELINES["flux"].build().save_pretrained(tmp_path / "pipeline")
    file = make_lora(PIPELINES["flux"], tmp_path / "lora", seed=1, r=2) / "pytorch_lora_weights.safetensors"
    norms = {f"transformer.transformer_blocks.0.attn.norm_{name}.weight": torch.ones(8) for name in "qk"}
    save_file(load_file(file) | norms, file)
    verdict = ask("check", tmp_path / "pipeline", file)["adapters"][0]
    assert verdict["fits"]
    assert verdict["notes"] == ["has 2 norms of its own in the place of the model's"]


def test_check_of_a_pipeline_that_cannot_be_built(tmp_path: Path) -> None:
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "NoPipeline"}))
    assert "no pipeline NoPipeline" in ask("check", tmp_path, "x", exit_code=1)["error"]["message"]
    index.write_text(json.dumps({"_class_name": "FluxPipeline", "transformer": ["diffusers", "logging"]}))
    error = ask("check", tmp_path, "x", exit_code=1)["error"]
    assert "no model class logging" in error["found"]
    index.write_text(json.dumps({"_class_name": "FluxPipeline", "transformer": ["os", "system"]}))
    assert "os.system" in ask("check", tmp_path, "x", exit_code=1)["error"]["message"]


def test_check_takes_the_pipeline_that_the_user_loads() -> None:
    """The demo's is of a class of its own."""
    demo = Path(__file__).parents[1] / "demo" / "image"
    assert run("check", demo, demo / "neon.safetensors").exit_code == 1
    found = ask("check", demo, demo / "neon.safetensors", "--model-class", "StableDiffusionPipeline")
    assert (found["slots"], found["adapters"][0]["ranks"]) == (122, [8])
