"""The demo of methods from beginning to end: one task's adapters in many methods, merged into one compiled model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache import user_folder
from ..terminal import print_json
from . import adapters as casting
from . import show, smollm2
from .conditions import backend_name, compiled_graphs, few_threads, kept_code, timed
from .result import MethodResult, MethodsResult

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from .quiz import Marks, Page, Quiz

_ASKED = 100  # questions, where not all are


def run_methods(
    model: str | None = None,
    *,
    index: Path | None = None,
    ask_all: bool = False,
    as_json: bool = False,
    backend: Any = "inductor",
    console: Console | None = None,
) -> MethodsResult:
    """Run the demo and print it.

    Args:
        model: a Hub id or folder; None for SmolLM2-135M-Instruct.
        index: questions, and what PEFT's own models answered; folders beside it hold the adapters. None for the
            repository's.
        ask_all: all questions, and not the first 100.
        as_json: print one JSON document instead of text. Progress goes to standard error.
        backend: of torch.compile.
        console: to print the text on, instead of standard output.

    Raises:
        HotslotError: model, adapters or compiler are not there, or do not go together.
    """
    started = time.perf_counter()
    index = index or casting.own_index("methods.json")
    with show.Stages() as stages, kept_code():
        demo = _Demo(index, model, backend, stages, ask_all=ask_all)
        with few_threads():
            result = demo.run()
    result.seconds = time.perf_counter() - started
    if as_json:
        print_json(result.as_dict())
    else:
        console = console or show.new_console()
        show.methods_tables(console, result)
        show.methods_summary(console, result, str(user_folder()))
    return result


class _Demo:
    """One run; each method is a stage, in the order of `run`."""

    def __init__(self, index: Path, model: str | None, backend: Any, stages: show.Stages, *, ask_all: bool) -> None:
        from .quiz import Question

        self.index, self.model, self.backend, self.stages = index, model, backend, stages
        facts = json.loads(index.read_text(encoding="utf-8"))
        self.marks: dict[str, str] = facts["marks"]
        self.questions = [Question(*each) for each in facts["questions"]][: None if ask_all else _ASKED]
        self.result = MethodsResult(model or "SmolLM2-135M-Instruct", backend_name(backend))
        with stages.stage("importing torch and transformers"):
            import torch
            import transformers  # noqa: F401

            self.result.torch = str(torch.__version__)

    def run(self) -> MethodsResult:
        import torch

        self.result.threads = torch.get_num_threads()
        self._attach()
        self._compile()
        first = self._ask()
        self._ask_base_again(first)
        return self.result

    def _attach(self) -> None:
        import hotslot
        from hotslot import checkpoint

        result = self.result
        with self.stages.stage("loading the model") as say, timed() as seconds:
            self.loaded = smollm2.load(self.model, lambda: say("converting SmolLM2 from GGUF, once"))
        result.load_seconds = seconds()
        sources = {name: self.index.parent / name for name in self.marks if name != "base"}
        with self.stages.stage(f"attaching {len(sources)} adapters, merged"), timed() as seconds:
            self.swapper = hotslot.attach(self.loaded.model, adapters=sources, route="merged")
        result.attach_seconds = seconds()
        for name, marks in self.marks.items():
            found = casting.describe(checkpoint.read(sources[name]).config) if name in sources else ("", "", "")
            result.methods.append(MethodResult(name, *found, recorded=[mark == "1" for mark in marks]))

    def _compile(self) -> None:
        from .quiz import Quiz

        before = compiled_graphs()
        with self.stages.stage("compiling the model (a minute the first time, less later)"):
            self.quiz: Quiz = Quiz(self.loaded, self.questions, backend=self.backend)
            self.result.compile_seconds = self.quiz.compile()
        self.result.graphs = compiled_graphs() - before

    def _ask(self) -> Tensor:
        """Every page of questions to the base and to each adapter, with a swap before each. The base's first logits.

        Page by page, so that passes which are compared follow each other: a machine does not keep its pace.
        """
        pages, methods = self.quiz.pages, self.result.methods
        first: Tensor | None = None
        with self.stages.stage("asking, and swapping before each page of questions", len(pages) * len(methods)) as step:
            for page in pages:
                for method in methods:
                    logits = self._put(page, method).logits
                    first = logits if first is None else first
                    step(None)
        assert first is not None
        return first

    def _ask_base_again(self, first: Tensor) -> None:
        import torch

        base = self.result.methods[0]
        with self.stages.stage("asking the base again"):
            self._swap_to(base)
            again = self._counted(self.quiz.pages[0], base)
        self.result.base_restored = torch.equal(again.logits, first)

    def _put(self, page: Page, method: MethodResult) -> Marks:
        """A page of questions to an adapter or the base, swapped in before."""
        self._swap_to(method)
        marks = self._counted(page, method)
        method.right += marks.right
        method.pass_seconds.append(marks.seconds)
        return marks

    def _swap_to(self, method: MethodResult) -> None:
        report = self.swapper.deactivate() if method.name == "base" else self.swapper.activate(method.name)
        if report.changed:
            method.route, method.nbytes = report.route, report.nbytes
            method.swap_seconds.append(report.seconds)
            self.result.swaps += 1

    def _counted(self, page: Page, method: MethodResult) -> Marks:
        before = compiled_graphs()
        marks = self.quiz.ask(page)
        method.recompilations += compiled_graphs() - before
        return marks
