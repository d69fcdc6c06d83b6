"""What the demos found, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any


@dataclass(frozen=True)
class SwapTimes:
    """One swap, from the adapter before it in the table. Seconds are medians of interleaved repetitions.

    Attributes:
        seconds: `swapper.activate`, the adapter waiting in host memory.
        nbytes: adapter bytes that it brought in.
        copy_seconds: a plain copy of the same bytes.
        copy_kind: "flat", or "per tensor" where a slot is padded to a larger rank and no flat copy would do.
        peft_seconds: PEFT's hotswap of the same adapter, from host memory too; None if it refuses, or answers wrongly.
        peft_file_seconds: PEFT's hotswap from the file.
        peft_refusal: why PEFT cannot do it.
    """

    seconds: float
    nbytes: int
    copy_seconds: float
    copy_kind: str
    peft_seconds: float | None
    peft_file_seconds: float | None
    peft_refusal: str | None

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes over seconds."""
        return self.nbytes / self.seconds / 1e9

    @property
    def share_of_copy(self) -> float:
        """The swap's speed as a share of the copy's: 1.0 is as fast."""
        return self.copy_seconds / self.seconds


@dataclass
class Speaker:
    """The base, or an adapter, and what it said.

    Attributes:
        answers: prompt → answer.
        unexpected: prompts whose answer is not the recorded one; None if none were recorded.
        recompilations: graphs that were compiled while it answered.
    """

    name: str
    answers: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] | None = None
    recompilations: int = 0


@dataclass
class AdapterResult(Speaker):
    """An adapter: what it is, beside what it said, and how it was swapped in.

    Attributes:
        showcase: the prompt that it was made for.
    """

    method: str = ""
    rank: str = ""
    targets: str = ""
    showcase: str = ""
    swap: SwapTimes | None = None


@dataclass
class DemoResult:
    """All of it; `ok` says whether hotslot kept its promises.

    Attributes:
        load_seconds: the first time, the conversion included.
        graphs: that the decode step compiled to.
        base_restored: the base gave the same answers again after all swaps.
        swaps: done in all.
    """

    model: str
    backend: str
    torch: str = ""
    threads: int = 0
    load_seconds: float = 0.0
    attach_seconds: float = 0.0
    compile_seconds: float = 0.0
    graphs: int = 0
    base: Speaker = field(default_factory=lambda: Speaker("base"))
    base_restored: bool = False
    adapters: list[AdapterResult] = field(default_factory=list)
    swaps: int = 0
    seconds: float = 0.0

    @property
    def speakers(self) -> list[Speaker]:
        """The base, then the adapters."""
        return [self.base, *self.adapters]

    @property
    def recompilations(self) -> int:
        """In all, after the one compilation."""
        return sum(speaker.recompilations for speaker in self.speakers)

    @property
    def unexpected(self) -> list[tuple[str, str]]:
        """(base or adapter, prompt) of every answer that differs from the recorded one."""
        return [(speaker.name, prompt) for speaker in self.speakers for prompt in speaker.unexpected or ()]

    @property
    def ok(self) -> bool:
        """One graph, no recompilation, the base as it was, and every recorded answer met."""
        return self.graphs == 1 and self.recompilations == 0 and self.base_restored and not self.unexpected

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every field, and what follows from them."""
        document = asdict(self)
        for entry, adapter in zip(document["adapters"], self.adapters, strict=True):
            if adapter.swap is not None:
                entry["swap"]["gigabytes_per_second"] = adapter.swap.gigabytes_per_second
                entry["swap"]["share_of_copy"] = adapter.swap.share_of_copy
        return {"ok": self.ok, "recompilations": self.recompilations, **document}


# Of 200 questions: an answer that hangs by a near tie may come out otherwise where another machine rounds otherwise.
_MOST_DIFFERING = 0.02


@dataclass
class MethodResult:
    """The base, or one task's adapter in one method: how it answered, and how it was swapped in.

    Attributes:
        recorded: of all questions, whether a model that PEFT alone had loaded answered right.
        right: the same of the questions that were asked now, which are the first of all.
        route, nbytes: see SwapReport.
        swap_seconds: of each swap to it.
        pass_seconds: of each forward pass through the compiled model while it was live.
        recompilations: graphs that were compiled meanwhile.
    """

    name: str
    method: str
    rank: str
    targets: str
    recorded: list[bool]
    right: list[bool] = field(default_factory=list)
    route: str = ""
    nbytes: int = 0
    swap_seconds: list[float] = field(default_factory=list)
    pass_seconds: list[float] = field(default_factory=list)
    recompilations: int = 0

    @property
    def accuracy(self) -> float:
        """Of what was asked now."""
        return fmean(self.right)

    @property
    def recorded_accuracy(self) -> float:
        """Of all questions."""
        return fmean(self.recorded)

    @property
    def differing(self) -> int:
        """Questions answered right where PEFT's model did not, or the other way round."""
        return sum(now != then for now, then in zip(self.right, self.recorded, strict=False))

    @property
    def seconds(self) -> float:
        """A swap's, the median; 0 if there was none."""
        return median(self.swap_seconds or [0.0])


@dataclass
class MethodsResult:
    """All of it; `ok` says whether hotslot kept its promises.

    Attributes:
        load_seconds: the first time, the conversion included.
        graphs: that the model compiled to.
        methods: the base, then the adapters.
        base_restored: the base's logits were bit for bit the same after all swaps.
        swaps: done in all.
    """

    model: str
    backend: str
    torch: str = ""
    threads: int = 0
    load_seconds: float = 0.0
    attach_seconds: float = 0.0
    compile_seconds: float = 0.0
    graphs: int = 0
    methods: list[MethodResult] = field(default_factory=list)
    base_restored: bool = False
    swaps: int = 0
    seconds: float = 0.0

    @property
    def recompilations(self) -> int:
        """In all, after the one compilation."""
        return sum(method.recompilations for method in self.methods)

    @property
    def ok(self) -> bool:
        """One graph, no recompilation, the base as it was, and the recorded answers met."""
        as_recorded = all(method.differing <= _MOST_DIFFERING * len(method.right) for method in self.methods)
        return self.graphs == 1 and self.recompilations == 0 and self.base_restored and as_recorded

    def times_base(self, method: MethodResult) -> float:
        """The forward pass in times of the base's: the median over the pages, which base and adapter read in turn."""
        pairs = zip(method.pass_seconds, self.methods[0].pass_seconds, strict=True)
        return median(one / base for one, base in pairs)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every field, and what follows from them."""
        document = asdict(self)
        for entry, method in zip(document["methods"], self.methods, strict=True):
            entry |= {
                "accuracy": method.accuracy,
                "recorded_accuracy": method.recorded_accuracy,
                "differing": method.differing,
                "seconds": method.seconds,
                "times_base": self.times_base(method),
            }
        return {"ok": self.ok, "recompilations": self.recompilations, **document}


# Of a picture's 256 levels: another order of summation in compiled code may move a value across the border of a level.
_MOST_LEVELS_OFF = 1.0


@dataclass
class RowResult:
    """One row of pictures: which styles are live at what strength, and how they were swapped in.

    Attributes:
        weights: style → strength; none for the base.
        recompilations: graphs that were compiled while it was painted.
        levels_off: largest difference to the picture of a fresh pipeline that loads the LoRAs by diffusers alone, in
            levels of 255.
        seconds, nbytes: of `swapper.activate` from host memory, the median; for the base of `deactivate`.
        file_seconds: from the file to live, `load` and `activate`; None where several or part of a style are live.
        diffusers_call: how diffusers does the same; on a pipeline that is not compiled.
        diffusers_seconds: its time; None if it refuses, or computes something else.
        diffusers_refusal: why it cannot.
    """

    weights: dict[str, float]
    recompilations: int = 0
    levels_off: float = 0.0
    seconds: float = 0.0
    nbytes: int = 0
    file_seconds: float | None = None
    diffusers_call: str = ""
    diffusers_seconds: float | None = None
    diffusers_refusal: str | None = None

    @property
    def style(self) -> str | None:
        """The style that is live alone and at full strength, if one is."""
        return next(iter(self.weights)) if list(self.weights.values()) == [1.0] else None

    @property
    def parts(self) -> list[str]:
        """What is live, with its strength where that is not all of it."""
        if self.style or not self.weights:
            return [self.style or "base"]
        return [f"{style} {weight:g}" for style, weight in self.weights.items()]

    @property
    def name(self) -> str:
        """In one line."""
        return " + ".join(self.parts)


@dataclass
class ImagesResult:
    """All of it; `ok` says whether hotslot kept its promises.

    Attributes:
        steps: of the denoising.
        prompts: names of the columns.
        graphs: that the unet compiled to.
        rows: the base, then the combinations.
        base_restored: the base's pictures, a step far, were bit for bit the same after all swaps.
        swaps: done in all.
        sheet: where the contact sheet is.
    """

    backend: str
    steps: int
    prompts: list[str]
    torch: str = ""
    diffusers: str = ""
    threads: int = 0
    load_seconds: float = 0.0
    attach_seconds: float = 0.0
    compile_seconds: float = 0.0
    graphs: int = 0
    rows: list[RowResult] = field(default_factory=list)
    base_restored: bool = False
    swaps: int = 0
    seconds: float = 0.0
    sheet: str = ""

    @property
    def recompilations(self) -> int:
        """In all, after the one compilation."""
        return sum(row.recompilations for row in self.rows)

    @property
    def levels_off(self) -> float:
        """The largest difference of any row."""
        return max(row.levels_off for row in self.rows)

    @property
    def as_fresh(self) -> bool:
        """Whether all rows are what fresh pipelines paint."""
        return self.levels_off <= _MOST_LEVELS_OFF

    @property
    def ok(self) -> bool:
        """One graph, no recompilation, the base as it was, and the pictures of fresh pipelines."""
        return self.graphs == 1 and self.recompilations == 0 and self.base_restored and self.as_fresh

    @property
    def caption(self) -> list[str]:
        """What stands below the sheet."""
        return [
            f"One model, compiled once; {self.swaps} swaps, {self.recompilations} recompilations. "
            f"{self.steps} denoising steps. A column has the same noise in every row.",
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every field, and what follows from them."""
        document = asdict(self)
        for entry, row in zip(document["rows"], self.rows, strict=True):
            entry["name"] = row.name
        return {"ok": self.ok, "recompilations": self.recompilations, "levels_off": self.levels_off, **document}
