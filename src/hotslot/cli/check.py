"""`hotslot check`: would these adapters fit on that model, or pipeline? Its weights are neither downloaded nor read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from ..errors import CheckpointError, DoesNotFitError, HotslotError, ModelError, TensorError, UnsupportedError
from .pipeline import build_pipeline_on_meta, is_pipeline
from .terminal import add_row, new_table, printable

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..entry import Entry
    from ..methods import Adapter


@dataclass(frozen=True, slots=True)
class Verdict:
    """One adapter on the model.

    Attributes:
        adapter: as it was given.
        fits: whether `attach(model, adapters={…: adapter})` would take it.
        route: "side" where slots would hold it, "merged" where base weights have to.
        version: its digest; None if it could not be read.
        nbytes: that a swap brings in, of the adapter or of base weights; 0 if it could not be read.
        slots: modules that it adapts.
        ranks: from its smallest rank to its largest; empty if it could not be interpreted.
        notes: what is known only when it is loaded, or may be why it does not fit.
        error: why it does not fit, what `attach` would raise.
    """

    adapter: str
    fits: bool
    route: str | None = None
    version: str | None = None
    nbytes: int = 0
    slots: int = 0
    ranks: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: HotslotError | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """The answer.

    Attributes:
        model: as it was given.
        model_class: the class of transformers, or the pipeline of diffusers, that it was checked as.
        adapters: one verdict for each, in order.
        slots: that the adapters that fit need together.
        arena_bytes: of device memory that those slots take.
        notes: on the model.
    """

    model: str
    model_class: str
    adapters: list[Verdict]
    slots: int
    arena_bytes: int
    notes: list[str]


def check_adapters(model: str, adapters: Sequence[str], *, model_class: str | None = None) -> Check:
    """Plan each adapter against the model's shapes.

    Args:
        model: a folder or Hub id of a transformers model, or of a diffusers pipeline; only its configs are read.
        adapters: folders or Hub ids; for a pipeline whatever its `load_lora_weights` takes.
        model_class: a model class of transformers, by default the first of the config's `architectures`; or a pipeline
            of diffusers, by default its index's.

    Raises:
        ModelError: there is no such model, or it cannot be built from its config alone.
    """
    from ..planning import plan_adapters

    skeleton = _skeleton(model, model_class)
    verdicts: list[Verdict] = []
    fitting: list[Adapter] = []
    for source in adapters:
        verdict, adapter = _check_one(skeleton, source)
        verdicts.append(verdict)
        if adapter is not None:
            fitting.append(adapter)
    slots, arena_bytes = 0, 0
    if fitting:
        plan = plan_adapters(skeleton.model, fitting, max_blend=1)  # as attach does
        slots, arena_bytes = len(plan.slots), plan.nbytes
    return Check(model, skeleton.name, verdicts, slots, arena_bytes, skeleton.notes)


class _Skeleton(NamedTuple):
    """What adapters are checked on.

    Attributes:
        given: the model or pipeline, all tensors without values.
        model: what slots are planned for: the model, or the pipeline's components as one.
        notes: on it.
        read: of an adapter for it.
    """

    given: Any
    model: Any
    notes: list[str]
    read: Callable[[str], Checkpoint]

    @property
    def name(self) -> str:
        return type(self.given).__name__


def _skeleton(source: str, model_class: str | None) -> _Skeleton:
    from ..checkpoint import read

    if not is_pipeline(source):
        model, notes = _build_on_meta(source, model_class), []
        if getattr(model.config, "quantization_config", None):
            notes.append("the config asks for quantised weights; the layers were checked as if they were not quantised")
        return _Skeleton(model, model, notes, read)
    from .. import pipelines

    pipe = build_pipeline_on_meta(source, model_class)
    components = pipelines.whole(pipe)
    notes = ["slots were counted in float32: a pipeline of 16 bits takes half of it"]
    return _Skeleton(pipe, components, notes, partial(pipelines.read, components))


def _check_one(skeleton: _Skeleton, source: str) -> tuple[Verdict, Adapter | None]:
    from ..entry import Entry
    from ..planning import plan_adapters, refuse_unfit

    known: dict[str, Any] = {"adapter": source}
    notes: list[str] = []
    adapter: Adapter | None = None
    try:
        checkpoint = skeleton.read(source)
        known |= {"version": checkpoint.version, "nbytes": checkpoint.nbytes}
        entry = Entry(source, checkpoint, route="auto")
        adapter = entry.adapter
        if not adapter.targets:
            known["nbytes"] = _merged_bytes(skeleton.model, entry)
            return Verdict(**known, fits=True, route="merged", notes=notes), None
        ranks = sorted({target.rank for target in adapter.targets.values()})
        known |= {"slots": len(adapter.targets), "ranks": ranks}
        notes += _copies(adapter)
        plan = plan_adapters(skeleton.model, [adapter], max_blend=1)
        refuse_unfit(skeleton.model, adapter, plan, "default")
    except (CheckpointError, UnsupportedError, DoesNotFitError) as error:
        if adapter is not None and isinstance(error, DoesNotFitError):
            notes += _other_class(adapter, skeleton.name)
        return Verdict(**known, fits=False, notes=notes, error=error), None
    return Verdict(**known, fits=True, route="side", notes=notes), adapter


def _merged_bytes(model: Any, entry: Entry) -> int:
    from ..live import outline_bytes

    try:
        return outline_bytes(model, entry.adapter.checkpoint)
    except (DoesNotFitError, TensorError, UnsupportedError) as error:
        raise entry.refusal or error from None


def _copies(adapter: Adapter) -> list[str]:
    """Without the model's weights, a copy's values cannot be compared; its shape has been."""
    if own := adapter.checkpoint.schema.base_values:
        return [f"has {len(own)} norms of its own in the place of the model's"]
    copies = [f"{fqn}.{name}" for fqn, names in adapter.base_copies.items() for name in names]
    return [f"carries a copy of {copy}, compared when loaded" for copy in copies]


def _other_class(adapter: Adapter, checked_on: str) -> list[str]:
    """Why paths may not match: BertModel's begin with `encoder`, those of BertForMaskedLM with `bert.encoder`."""
    mapping = adapter.checkpoint.config.get("auto_mapping")
    if not isinstance(mapping, dict):
        return []
    name, library = (str(mapping.get(key, "")) for key in ("base_model_class", "parent_library"))
    if name in ("", checked_on):
        return []
    advice = f"; try --model-class {name}" if library.startswith("transformers.") else ""
    return [f"was trained on {name}, and checked on {checked_on}{advice}"]


def _build_on_meta(source: str, model_class: str | None) -> Any:
    """The model from its config, all tensors without values."""
    import torch
    from transformers import AutoConfig

    try:
        # False and not None, at which transformers asks on the terminal whether to run the repository's code.
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, its validators' own, and more
        raise ModelError(
            f"No transformers model at {source}.",
            where=source,
            found=f"{type(error).__name__}: {str(error).splitlines()[0]:.200}" if str(error) else type(error).__name__,
            expected="a folder with a model's config.json, or a Hub id; without code of its own",
            hint="the model comes first: hotslot check MODEL ADAPTER…",
        ) from error
    cls = _model_class(config, source, model_class)
    try:
        with torch.device("meta"):
            return cls(config)
    except Exception as error:  # any model's constructor
        raise ModelError(
            f"{cls.__name__} cannot be built from its config alone.",
            where=source,
            found=f"{type(error).__name__}: {error!s:.200}",
            hint="attach to the loaded model and ask swapper.fits(adapter)",
        ) from error


def _model_class(config: Any, source: str, wanted: str | None) -> Any:
    import transformers

    names = [wanted] if wanted is not None else getattr(config, "architectures", None) or []
    if not names:
        causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        return (causal if type(config) in causal else transformers.MODEL_MAPPING)[type(config)]
    cls = getattr(transformers, names[0], None)
    # The name may be a stranger's: no other attribute of transformers is called.
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return cls
    raise ModelError(
        f"transformers has no model class {names[0]}.",
        where=source if wanted is None else "--model-class",
        expected="a class such as LlamaForCausalLM, by the config's architectures or --model-class",
    )


# -- as text -----------------------------------------------------------------------------------------------------------


def show_check(console: Console, found: Check) -> None:
    """Print the answer for people."""
    console.print(f"{printable(found.model)}: {found.model_class}, checked without its weights\n", style="bold")
    table = new_table("adapter", "fits", "route", ">bytes", ">slots", ">rank")
    for verdict in found.adapters:
        add_row(table, _cells(verdict))
    console.print(table)
    for note in found.notes:
        console.print(f"note: {printable(note)}")
    if found.slots:
        console.print(f"\nattached together: {found.slots} slots, {found.arena_bytes:,} bytes on the model's device")
    for verdict in found.adapters:
        if verdict.notes or verdict.error:
            console.print(f"\n{printable(verdict.adapter)}", style="bold")
        for note in verdict.notes:
            console.print(printable(note))
        if verdict.error is not None:
            console.print(str(verdict.error), soft_wrap=True)


def _cells(verdict: Verdict) -> tuple[str, ...]:
    ranks = f"{verdict.ranks[0]}–{verdict.ranks[-1]}" if len(verdict.ranks) > 1 else "".join(map(str, verdict.ranks))
    nbytes = f"{verdict.nbytes:,}" if verdict.version else ""
    slots = str(verdict.slots) if verdict.ranks else ""
    return verdict.adapter, "yes" if verdict.fits else "no", verdict.route or "", nbytes, slots, ranks
