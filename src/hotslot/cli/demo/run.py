"""The demo from beginning to end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache import user_folder
from ..terminal import print_json
from . import adapters as casting
from . import show, smollm2
from .conditions import backend_name, compiled_graphs, few_threads, kept_code, timed
from .result import AdapterResult, DemoResult, Speaker

if TYPE_CHECKING:
    from rich.console import Console

    from ... import Swapper
    from ...checkpoint import Checkpoint
    from .decoding import Decoder


def run_demo(
    model: str | None = None,
    adapters: Sequence[str | Path] | None = None,
    *,
    prompts: Sequence[str] | None = None,
    as_json: bool = False,
    backend: Any = "inductor",
    rounds: int = 9,
    console: Console | None = None,
) -> DemoResult:
    """Run the demo and print it.

    Args:
        model: a Hub id or folder; None for SmolLM2-135M-Instruct.
        adapters: Hub ids or folders; None for the repository's own.
        prompts: to ask; None for those that go with the adapters.
        as_json: print one JSON document instead of text. Progress goes to standard error.
        backend: of torch.compile.
        rounds: repetitions of each swap that is timed; the table shows medians.
        console: to print the text on, instead of standard output.

    Raises:
        HotslotError: model, adapters or compiler are not there, or do not go together.
    """
    started = time.perf_counter()
    cast = casting.choose(model, adapters, prompts)
    with show.Stages() as stages, kept_code():
        demo = _Demo(cast, model, backend, stages)
        with few_threads():
            result = demo.run(rounds)
    result.seconds = time.perf_counter() - started
    if as_json:
        print_json(result.as_dict())
    else:
        console = console or show.new_console()
        show.answers(console, result, cast.prompts)
        show.tables(console, result)
        show.summary(console, result, str(user_folder()))
    return result


class _Demo:
    """One run; each method is a stage or a few, in the order of `run`."""

    def __init__(self, cast: casting.Cast, model: str | None, backend: Any, stages: show.Stages) -> None:
        self.cast, self.model, self.backend, self.stages = cast, model, backend, stages
        self.result = DemoResult(model or "SmolLM2-135M-Instruct", backend_name(backend))
        with stages.stage("importing torch and transformers"):
            import torch
            import transformers  # noqa: F401

            self.result.torch = str(torch.__version__)

    def run(self, rounds: int) -> DemoResult:
        import torch

        self.result.threads = torch.get_num_threads()
        self._attach()
        self._compile()
        self._ask()
        self._time(rounds)
        self._ask_base_again()
        return self.result

    def _attach(self) -> None:
        import hotslot
        from hotslot import checkpoint

        result = self.result
        with self.stages.stage("loading the model") as say, timed() as seconds:
            self.loaded = smollm2.load(self.model, lambda: say("converting SmolLM2 from GGUF, once"))
        result.load_seconds = seconds()
        with self.stages.stage(f"attaching {len(self.cast.sources)} adapters"), timed() as seconds:
            self.swapper: Swapper = hotslot.attach(self.loaded.model, adapters=self.cast.sources)
        result.attach_seconds = seconds()
        self.checkpoints: dict[str, Checkpoint] = {}
        for name, source in self.cast.sources.items():
            self.checkpoints[name] = checkpoint.read(source)
            method, rank, targets = casting.describe(self.checkpoints[name].config)
            showcase = self.cast.showcase.get(name, self.cast.prompts[0])
            result.adapters.append(AdapterResult(name, method=method, rank=rank, targets=targets, showcase=showcase))

    def _compile(self) -> None:
        from .decoding import Decoder

        before = compiled_graphs()
        with self.stages.stage("compiling the decode step (a minute the first time, less later)"):
            self.decoder: Decoder = Decoder(self.loaded, self.cast.prompts, backend=self.backend)
            self.result.compile_seconds = self.decoder.compile()
        self.result.graphs = compiled_graphs() - before

    def _ask(self) -> None:
        """Every prompt to the base and to each adapter, with a swap before each answer."""
        result = self.result
        with self.stages.stage("asking, and swapping before each answer", self._questions) as step:
            for prompt in self.cast.prompts:
                for speaker in result.speakers:
                    self._swap_to(speaker)
                    speaker.answers[prompt] = self._answer(speaker, prompt)
                    step(None)
        for speaker in result.speakers:
            speaker.unexpected = self.cast.unexpected(speaker.name, speaker.answers)

    def _time(self, rounds: int) -> None:
        import torch

        from .measure import Copy, PeftTwin, time_swap

        adapters = self.result.adapters
        live = {name: tuple(parameter.shape) for name, parameter in self.loaded.model.named_parameters()}
        with self.stages.stage("timing swaps, copies and PEFT", len(adapters)) as step:
            for adapter, before in zip(adapters, [*adapters[-1:], *adapters[:-1]], strict=True):
                checkpoint = self.checkpoints[adapter.name]
                sources = self.cast.sources[before.name], self.cast.sources[adapter.name]
                twin = PeftTwin(smollm2.load(self.model).model, *sources, max_rank=self._max_rank)
                ids = self.decoder.ids(adapter.showcase)
                self.swapper.activate(adapter.name)
                with torch.no_grad():
                    twin.refuse_other_logits(ids, self.loaded.model(ids).logits)
                copy = Copy(checkpoint, live)
                adapter.swap = time_swap(self.swapper, adapter.name, before.name, copy, twin, rounds=rounds)
                self.result.swaps += 2 * rounds + 1
                step(None)

    def _ask_base_again(self) -> None:
        result = self.result
        with self.stages.stage("asking the base again", len(self.cast.prompts)) as step:
            self._swap_to(result.base)
            again = {}
            for prompt in self.cast.prompts:
                again[prompt] = self._answer(result.base, prompt)
                step(None)
        result.base_restored = again == result.base.answers

    def _swap_to(self, speaker: Speaker) -> None:
        if speaker is self.result.base:
            self.swapper.deactivate()
        else:
            self.swapper.activate(speaker.name)
        self.result.swaps += 1

    def _answer(self, speaker: Speaker, prompt: str) -> str:
        before = compiled_graphs()
        answer = self.decoder.answer(prompt)
        speaker.recompilations += compiled_graphs() - before
        return answer

    @property
    def _questions(self) -> int:
        return len(self.cast.prompts) * len(self.result.speakers)

    @property
    def _max_rank(self) -> int:
        configs = [found.config for found in self.checkpoints.values()]
        return max(rank for c in configs for rank in map(int, (c["r"], *(c.get("rank_pattern") or {}).values())))
