"""`hotslot demo --methods` on a tiny model of its own: who answers right, what is counted, and what it shows."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

import hotslot
from adapters import expected_peft_warnings
from compiling import Backend
from hotslot.cli.app import app
from hotslot.cli.demo import MethodsResult, quiz, run_methods, show, smollm2
from methods import make_method_adapter
from zoo import VOCAB, ZOO

LLAMA = ZOO["llama"]
DEMO = Path(__file__).parents[1] / "demo"
METHODS = {"lora": "LORA", "loha": "LOHA", "ia3": "IA3", "oft": "OFT"}
STOP = list(range(1, VOCAB, 3))
_ENDLESS = "…"
QUESTIONS = [f"w{i} w{(5 * i) % 44 + 3} w{7 * i % 44 + 3}"[: None if i % 3 else -3].strip() for i in range(3, 23)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny Llama, whose every third word ends an answer, and a tokenizer of the words w0, w1, …"""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(folder)
    LLAMA.build().save_pretrained(folder)
    GenerationConfig(eos_token_id=STOP).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, method) in enumerate(METHODS.items(), 1):
        make_method_adapter(root / name, method, LLAMA, seed=seed)
    return root


def generated(model: str, adapter: Path | None) -> list[str]:
    """Greedy answers by `generate`, one by one, from a model that PEFT alone has loaded."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    fresh: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    if adapter is not None:
        with expected_peft_warnings():
            fresh = PeftModel.from_pretrained(fresh, str(adapter)).eval()
    answers = []
    for question in QUESTIONS:
        ids = tokenizer(question, return_tensors="pt")
        out = fresh.generate(**ids, do_sample=False, max_new_tokens=6, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
        words = out.tolist()
        answers.append(" ".join(f"w{word}" for word in words[:-1]) if words[-1] in STOP else _ENDLESS)
    return answers


class Asked(NamedTuple):
    index: Path
    said: dict[str, list[str]]
    known: list[str]


@pytest.fixture(scope="module")
def asked(model: str, folders: Path) -> Asked:
    """Questions whose known answers are now one model's, now another's; and what PEFT's models answer to each."""
    said = {name: generated(model, folders / name if name in METHODS else None) for name in ("base", *METHODS)}
    known = [list(said.values())[i % len(said)][i] for i in range(len(QUESTIONS))]
    known = ["w0" if answer in ("", _ENDLESS) else answer for answer in known]
    marks = {
        name: "".join(str(int(one == right)) for one, right in zip(answers, known, strict=True))
        for name, answers in said.items()
    }
    questions = [[question, f" {answer}"] for question, answer in zip(QUESTIONS, known, strict=True)]
    index = folders / "methods.json"
    index.write_text(json.dumps({"questions": questions, "marks": marks}))
    assert len(set(marks.values())) == len(marks)  # or no test below would tell one model from another
    return Asked(index, said, known)


class Ran(NamedTuple):
    result: MethodsResult
    graphs: int
    printed: dict[str, Any]


@pytest.fixture(scope="module")
def ran(model: str, asked: Asked) -> Ran:
    backend = Backend()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as stdout:
        patch.setattr(quiz, "_PAGE_TOKENS", 32)  # so that there are several pages
        result = run_methods(model, index=asked.index, ask_all=True, backend=backend, as_json=True)
    return Ran(result, backend.graphs, json.loads(stdout.getvalue()))


def test_right_is_what_peft_generates(ran: Ran, asked: Asked) -> None:
    assert [method.name for method in ran.result.methods] == ["base", *METHODS]
    for method in ran.result.methods:
        said = asked.said[method.name]
        assert method.right == [one == right for one, right in zip(said, asked.known, strict=True)], method.name
        assert method.right == method.recorded
        assert method.differing == 0
    assert [entry["accuracy"] for entry in ran.printed["methods"]] == [m.accuracy for m in ran.result.methods]


def test_one_graph_for_all_methods_and_pages(ran: Ran) -> None:
    assert ran.graphs == ran.printed["graphs"] == 1
    assert ran.printed["recompilations"] == 0
    assert ran.printed["base_restored"]
    assert ran.printed["ok"] is ran.result.ok is True
    pages = len(ran.result.methods[0].pass_seconds)
    assert pages > 2
    assert ran.result.swaps == (len(METHODS) + 1) * pages  # to the base at first there is nothing to swap


def test_swaps_are_merged_and_counted(ran: Ran) -> None:
    base, *methods = ran.printed["methods"]
    assert base["times_base"] == 1
    for method in methods:
        assert method["route"] == "merged"
        assert min(method["nbytes"], method["seconds"], method["times_base"]) > 0
    assert [method["method"] for method in methods] == ["LoRA", "LoHa", "IA3", "OFT"]


@pytest.mark.parametrize("width", [80, 160])
def test_the_text_shows_all_of_it(width: int, ran: Ran) -> None:
    text = shown(ran.result, width)
    assert text.count("┏") == (1 if width == 160 else 2)
    words = " ".join(text.split())
    for method in ran.result.methods:
        assert f"{method.name} " in words
        assert f"{sum(method.right)} of {len(QUESTIONS)}" in words
        assert f"{method.recorded_accuracy:.1%}" in words
    assert "then 0 recompilations" in words
    assert "the same, bit for bit" in words
    assert "all as it should be" in words
    assert "not all" not in words


def shown(result: MethodsResult, width: int = 160) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    show.methods_tables(console, result)
    show.methods_summary(console, result, "/cache")
    return stream.getvalue()


def test_answers_other_than_the_recorded_ones_are_reported(ran: Ran) -> None:
    result = deepcopy(ran.result)
    result.methods[2].recorded[0] ^= True
    assert result.methods[2].differing == 1
    assert "loha: 1 of 20 not as recorded" in shown(result)
    assert not result.ok
    assert "not all is as it should be" in shown(result)


def test_a_base_that_is_not_as_before_is_reported(ran: Ran) -> None:
    result = deepcopy(ran.result)
    result.base_restored = False
    assert not result.ok
    assert "before and after: others" in shown(result)


def test_a_base_that_changes_is_noticed(model: str, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = smollm2.load(model)
    deactivate = hotslot.Swapper.deactivate

    def careless(self: hotslot.Swapper) -> hotslot.SwapReport:
        report = deactivate(self)
        if report.changed:
            with torch.no_grad():
                loaded.model.get_input_embeddings().weight.mul_(1.5)
        return report

    monkeypatch.setattr(smollm2, "load", lambda *arguments: loaded)
    monkeypatch.setattr(hotslot.Swapper, "deactivate", careless)
    result = run_methods(model, index=asked.index, backend=Backend(), console=Console(file=io.StringIO()))
    assert not result.base_restored
    assert not result.ok


def test_a_recompilation_is_counted(model: str, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    activate = hotslot.Swapper.activate

    def forgetful(self: hotslot.Swapper, name: str) -> hotslot.SwapReport:
        torch._dynamo.reset()
        return activate(self, name)

    monkeypatch.setattr(hotslot.Swapper, "activate", forgetful)
    result = run_methods(model, index=asked.index, backend=Backend(), console=Console(file=io.StringIO()))
    assert result.methods[1].recompilations == 1
    assert not result.ok


# --- pages


def test_questions_of_a_page_do_not_see_each_other(model: str) -> None:
    loaded = smollm2.load(model)
    questions = [quiz.Question(question, " w3 w4") for question in QUESTIONS[:9]]
    together = quiz.Quiz(loaded, questions, backend="eager")
    (page,) = together.pages
    logits = together.ask(page).logits
    for i, question in enumerate(questions):
        alone = quiz.Quiz(loaded, [question], backend="eager")
        apart = alone.ask(alone.pages[0]).logits[:3]
        torch.testing.assert_close(logits[3 * i : 3 * i + 3], apart, rtol=1e-4, atol=1e-5)


def test_a_question_longer_than_a_page(model: str) -> None:
    long = quiz.Question(" ".join(["w5"] * 300), " w3")
    asking = quiz.Quiz(smollm2.load(model), [quiz.Question("w3", " w4"), long], backend="eager")
    assert [page.ids.shape for page in asking.pages] == [(1, 301)] * 2
    assert [len(asking.ask(page).right) for page in asking.pages] == [1, 1]


# --- the repository's own, and the command line


def test_the_repositorys_questions_and_adapters_are_whole() -> None:
    facts = json.loads((DEMO / "methods.json").read_text())
    assert len(facts["questions"]) == len({question for question, _ in facts["questions"]}) == 200
    # as they were measured when the adapters were made (demo/README.md)
    accuracies = {
        "base": 0.0, "topics": 0.85, "topics-dora": 0.855, "topics-loha": 0.86, "topics-ia3": 0.88,
        "topics-oft": 0.875, "topics-lokr": 0.835, "topics-vera": 0.785,
    }  # fmt: skip
    assert {name: marks.count("1") / len(marks) for name, marks in facts["marks"].items()} == accuracies
    for name in accuracies.keys() - {"base"}:
        assert {file.name for file in (DEMO / name).iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    "options", [["--methods", "--adapter", "x"], ["--methods", "--prompt", "x"], ["--all"]], ids=" ".join
)
def test_options_that_do_not_go_together(options: list[str]) -> None:
    assert CliRunner().invoke(app, ["demo", *options]).exit_code == 2
