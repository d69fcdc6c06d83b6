"""`hotslot demo --images` on a tiny pipeline of its own: what it paints, compares, counts and shows."""

from __future__ import annotations

import io
import json
import warnings
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig
from PIL import Image, ImageChops
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

import hotslot
from compiling import Backend
from hotslot.cli.app import app
from hotslot.cli.demo import ImagesResult, images, run_images, show
from hotslot.errors import HotslotError

pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, UNet2DConditionModel

from hotslot.cli.demo import emoji, sheet

REPOSITORY = Path(__file__).parents[1]
NAMES = ("cat", "pizza", "red heart")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LORAS: dict[str, dict[str, Any]] = {
    "neon": {"r": 4, "lora_alpha": 16, "target_modules": [*ATTENTION, "conv1"]},
    "cyanotype": {"r": 2, "lora_alpha": 4, "target_modules": ATTENTION},
    "gameboy": {"r": 4, "lora_alpha": 8, "target_modules": [*ATTENTION, "conv1", "conv2"]},
}
STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline as in demo/image, of random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D",),
        "mid_block_type": None,
        "up_block_types": ("UpBlock2D",),
        "block_out_channels": (8,),
    }
    unet = UNet2DConditionModel(
        8, 3, 3, layers_per_block=1, norm_num_groups=4, attention_head_dim=4, cross_attention_dim=384, **blocks
    )
    pipe = emoji.EmojiPipeline(unet, DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing"))
    pipe.save_pretrained(folder)
    save_file({name: torch.randn(3 + i, 384) for i, name in enumerate(NAMES)}, folder / "prompt_embeddings.safetensors")
    for style, options in LORAS.items():
        _save_lora(folder, style, options)
    return folder


def _save_lora(folder: Path, style: str, options: dict[str, Any]) -> None:
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    unet.add_adapter(LoraConfig(**options), adapter_name=style)
    tensors = {}
    for name, parameter in unet.named_parameters():
        if f".{style}." in name:
            tensors[name.replace(f".{style}.", ".")] = torch.randn(parameter.shape) * 0.3
    metadata = unet.peft_config[style].to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])
    emoji.EmojiPipeline.save_lora_weights(
        folder, unet_lora_layers=tensors, weight_name=f"{style}.safetensors", unet_lora_adapter_metadata=metadata
    )


class Ran(NamedTuple):
    result: ImagesResult
    graphs: int
    printed: dict[str, Any]
    sheet: Path


@pytest.fixture(scope="module")
def ran(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    backend, path = Backend(), tmp_path_factory.mktemp("sheet") / "sheet.png"
    options = {"folder": folder, "sheet": path, "rounds": 1, "steps": STEPS}
    with redirect_stdout(io.StringIO()) as stdout:
        result = run_images(NAMES, backend=backend, as_json=True, **options)
    return Ran(result, backend.graphs, json.loads(stdout.getvalue()), path)


def test_nothing_recompiles(ran: Ran) -> None:
    assert ran.graphs == ran.printed["graphs"] == 1
    assert ran.printed["recompilations"] == 0
    assert ran.printed["base_restored"]
    assert ran.printed["ok"] is ran.result.ok is True


def test_rows_on_the_sheet_are_what_fresh_pipelines_paint(ran: Ran, folder: Path) -> None:
    assert [row["weights"] for row in ran.printed["rows"]] == list(images.ROWS)
    cells = [[cell(ran.sheet, i, j) for j in range(len(NAMES))] for i in range(len(images.ROWS))]
    for row, weights in zip(cells, images.ROWS, strict=True):
        for found, expected in zip(row, fresh_pictures(folder, weights), strict=True):
            assert levels_apart(found, expected) <= 1
    for i, row in enumerate(cells):  # or the comparison above would show nothing
        assert all(levels_apart(row[0], other[0]) > 1 for other in cells[:i])


def fresh_pictures(folder: Path, weights: dict[str, float]) -> list[Image.Image]:
    """By diffusers alone, each picture by itself."""
    pipe = emoji.EmojiPipeline.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # PEFT, of the second LoRA
        for style in weights:
            pipe.load_lora_weights(str(folder / f"{style}.safetensors"), adapter_name=style)
    if weights:
        pipe.set_adapters(list(weights), list(weights.values()))
    embeddings = emoji.embed(NAMES, folder)
    return [
        pipe(embeddings[[j]], generator=torch.Generator().manual_seed(j), num_inference_steps=STEPS).images[0]
        for j in range(len(NAMES))
    ]


def cell(path: Path, i: int, j: int) -> Image.Image:
    """The picture of a row and column of the sheet, in its own size."""
    drawn, pitch = Image.open(path), sheet._CELL + sheet._GAP
    head = sheet._lines(max(len(name.split()) for name in NAMES), sheet._NOTE)
    left, top = sheet._MARGIN + sheet._LABELS + j * pitch, sheet._MARGIN + head + sheet._GAP + i * pitch
    scale = sheet._CELL // 8
    return drawn.crop((left, top, left + sheet._CELL, top + sheet._CELL)).reduce(scale)


def levels_apart(one: Image.Image, other: Image.Image) -> int:
    return max(high for _, high in ImageChops.difference(one, other).getextrema())


def test_swaps_are_timed_beside_diffusers(ran: Ran) -> None:
    rows = {row["name"]: row for row in ran.printed["rows"]}
    assert list(rows) == [
        "base", "neon", "cyanotype", "neon 0.6 + cyanotype 0.6", "gameboy", "gameboy 0.6", "gameboy 0.3",
    ]  # fmt: skip
    assert all(row["seconds"] > 0 for row in rows.values())
    for name, row in rows.items():
        whole = name in LORAS
        assert (row["file_seconds"] is not None) == whole
        assert row["diffusers_call"] == ("hotswap=True" if whole else "set_adapters")
        assert (row["nbytes"] > 0) == (whole or "+" in name)
    assert rows["cyanotype"]["diffusers_seconds"] > 0  # from neon: fewer targets, another rank
    assert rows["cyanotype"]["diffusers_refusal"] is None
    assert rows["gameboy"]["diffusers_seconds"] is None  # from cyanotype: more targets
    assert rows["gameboy"]["diffusers_refusal"].startswith("RuntimeError: Hot swapping")


@pytest.mark.parametrize("width", [80, 160])
def test_the_text_shows_all_of_it(width: int, ran: Ran) -> None:
    words = " ".join(shown(ran.result, width).split())
    for row in ran.result.rows:
        assert f"{row.seconds * 1e3:.2f} ms" in words
    assert width == 80 or "hotswap=True cannot: RuntimeError" in words  # 80 columns break words
    assert "then 0 recompilations" in words
    assert "as fresh pipelines paint them" in words
    assert "all as it should be" in words
    assert "not all" not in words


def shown(result: ImagesResult, width: int = 160) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    show.images_table(console, result)
    show.images_summary(console, result, "/cache")
    return stream.getvalue()


def test_what_is_wrong_is_said(ran: Ran) -> None:
    off, spoilt = deepcopy(ran.result), deepcopy(ran.result)
    off.rows[2].levels_off = 1.5
    spoilt.base_restored = False
    assert not off.ok
    assert not spoilt.ok
    assert "not what fresh pipelines paint" in " ".join(shown(off).split())
    assert "before and after: another one" in " ".join(shown(spoilt).split())


# --- what goes wrong is noticed. Not compiled, where that has no part in it


@pytest.fixture
def options(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(images, "ROWS", ({}, {"neon": 1.0}))
    console = Console(file=io.StringIO())
    return {"folder": folder, "sheet": tmp_path / "sheet.png", "rounds": 1, "steps": 1, "console": console}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "compiled", lambda model, backend: model)


@pytest.mark.usefixtures("uncompiled")
def test_pictures_of_another_style_are_noticed(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right = run_images(NAMES, **options)
    assert right.as_fresh
    activate = hotslot.Swapper.activate
    monkeypatch.setattr(hotslot.Swapper, "activate", lambda self, wanted: activate(self, "gameboy"))
    wrong = run_images(NAMES, **options)
    assert wrong.rows[0].levels_off <= 1 < wrong.rows[1].levels_off
    assert not wrong.as_fresh
    assert wrong.rows[1].diffusers_refusal is not None
    assert wrong.rows[1].diffusers_refusal.startswith("swaps without an error, but the prediction is off by")


@pytest.mark.usefixtures("uncompiled")
def test_a_base_that_changes_is_noticed(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    load, pipes = emoji.load, []
    monkeypatch.setattr(emoji, "load", lambda folder: pipes.append(load(folder)) or pipes[-1])
    deactivate = hotslot.Swapper.deactivate

    def careless(self: hotslot.Swapper) -> hotslot.SwapReport:
        with torch.no_grad():
            pipes[0].unet.conv_in.weight.mul_(1.5)
        return deactivate(self)

    monkeypatch.setattr(hotslot.Swapper, "deactivate", careless)
    assert not run_images(NAMES, **options).base_restored


def test_a_recompilation_is_counted(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    activate = hotslot.Swapper.activate

    def forgetful(self: hotslot.Swapper, wanted: Any) -> hotslot.SwapReport:
        torch._dynamo.reset()
        return activate(self, wanted)

    monkeypatch.setattr(hotslot.Swapper, "activate", forgetful)
    result = run_images(NAMES[:1], backend=Backend(), **options)
    assert [row.recompilations for row in result.rows] == [1, 1]  # the base's is of its second painting
    assert not result.ok


# --- the repository's own, and the command line


@pytest.mark.usefixtures("uncompiled")
def test_the_repositorys_styles_on_its_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(images, "ROWS", (images.ROWS[0], images.ROWS[3]))
    path = tmp_path / "sheet.png"
    result = run_images(["cat"], sheet=path, rounds=1, steps=2, console=Console(file=io.StringIO()))
    assert result.as_fresh
    assert result.base_restored
    left, top = sheet._MARGIN + sheet._LABELS, sheet._MARGIN + sheet._lines(1, sheet._NOTE) + sheet._GAP
    pitch = sheet._CELL + sheet._GAP
    white, blue = (Image.open(path).getpixel((left + 8, top + 8 + i * pitch)) for i in range(2))
    assert min(white) > 240  # an emoji's background; that of neon's and cyanotype's blend is a dark blue
    assert max(blue) == blue[2] < 100


def test_the_repositorys_pipeline_is_whole() -> None:
    folder = REPOSITORY / "demo" / "image"
    assert {file.name for file in folder.iterdir() if file.suffix == ".safetensors"} == {
        "prompt_embeddings.safetensors",
        *(f"{style}.safetensors" for style in images.STYLES),
    }
    assert emoji.embed(images.PROMPTS, folder).shape == (len(images.PROMPTS), 12, 384)
    drawn = REPOSITORY / "docs" / "images.png"
    assert drawn.stat().st_size < 300_000


def test_a_name_that_is_not_known(folder: Path) -> None:
    with pytest.raises(HotslotError, match=r"'pizzas'[\s\S]*one of its 3 names, such as 'pizza'"):
        emoji.embed(["cat", "pizzas"], folder)


@pytest.mark.parametrize("path", ["sheet.jpg", "nowhere/sheet.png"])
def test_a_sheet_that_cannot_be_written_is_refused_at_once(path: str, tmp_path: Path) -> None:
    with pytest.raises(HotslotError, match="cannot be written"):
        run_images(folder=tmp_path, sheet=tmp_path / path)


@pytest.mark.parametrize(
    "options",
    [["--images", "--methods"], ["--images", "--model", "x"], ["--images", "--adapter", "x"], ["--sheet", "x.png"]],
    ids=" ".join,
)
def test_options_that_do_not_go_together(options: list[str]) -> None:
    assert CliRunner().invoke(app, ["demo", *options]).exit_code == 2
