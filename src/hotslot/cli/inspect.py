"""`hotslot inspect`: what is in an adapter, and whether hotslot swaps it. Needs no model, and not peft either."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..errors import CheckpointError, HotslotError, UnsupportedError
from .terminal import add_row, new_facts, new_table, printable

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..methods import Adapter, Target

_UNSET: tuple[object, ...] = (None, False, "", "none", [], {})
_PREFIX = "base_model.model."
_SHOWN = 24  # rows of a table; JSON has them all
# Says nothing of what the adapter computes, or has a row of its own.
_NOT_SETTINGS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_type", "peft_version",
        "qalora_group_size", "revision", "task_type",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RankGroup:
    """Modules of one rank, alpha and scaling."""

    rank: int
    alpha: float
    scaling: float
    modules: int


@dataclass(frozen=True, slots=True)
class TargetGroup:
    """Modules whose paths end alike.

    Attributes:
        ending: what stands behind the last number of the path.
        modules: how many.
        layers: what stands before the first number → the numbers there; empty for a path without a number.
        shapes: "in → out" of the base layers, as the adapter has them.
    """

    ending: str
    modules: int
    layers: dict[str, list[int]]
    shapes: list[str]


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors whose names differ in their numbers only.

    Attributes:
        name: with `*` for each number.
        tensors: how many.
        shapes: all that occur.
    """

    name: str
    tensors: int
    shapes: list[list[int]]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What an adapter's files say.

    Attributes:
        supported: whether hotslot swaps it, on a model that it fits.
        route: "side" if slots can hold it, "merged" if only base weights can stand for it; None if neither.
        adapter: what it was called.
        method: PEFT's name of the method, "LORA".
        base_model: the model that it was trained on.
        peft_version: of the PEFT that saved it.
        version: hotslot's digest of config and values.
        tensors, parameters, nbytes: how many, of how many values, in how many bytes.
        dtypes: dtype → tensors.
        ranks: largest group first; empty where hotslot does not swap the adapter, as are `targets` and `unusual`.
        targets: in the order of the file.
        unusual: sentences.
        settings: the options of the config that are set.
        names: the tensors, grouped.
        refusals: why hotslot does not swap it; `load` raises the first.
    """

    supported: bool
    route: str | None
    adapter: str
    method: str | None
    base_model: str | None
    peft_version: str | None
    version: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    ranks: list[RankGroup]
    targets: list[TargetGroup]
    unusual: list[str]
    settings: dict[str, Any]
    names: list[TensorGroup]
    refusals: list[HotslotError]


def is_of_peft(file: Path) -> bool:
    """Whether it is a file of PEFT's with its config beside it, without which it says little."""
    from ..checkpoint import CONFIG_NAME, WEIGHTS_NAME

    return file.name == WEIGHTS_NAME and os.path.isfile(file.with_name(CONFIG_NAME))


def inspect_adapter(
    source: str | os.PathLike[str], *, subfolder: str | None = None, revision: str | None = None
) -> Inspection:
    """Read an adapter and tell what is in it, also of one that hotslot does not swap.

    Args:
        source: a folder or a Hub id.
        subfolder, revision: as in `Swapper.load`.

    Raises:
        CheckpointError: its files cannot be read.
    """
    from ..checkpoint import read

    return inspect_checkpoint(read(source, subfolder=subfolder, revision=revision))


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Tell what is in an adapter that was read."""
    from ..methods import interpret, opaque

    adapter, route, refusals, unusual = None, None, [], []
    try:
        adapter = interpret(checkpoint)
        route, unusual = "side", _unusual(adapter)
    except (CheckpointError, UnsupportedError) as error:
        refusals = _all_refusals(checkpoint, error)
    if adapter is None and isinstance(refusals[0], UnsupportedError):
        try:
            opaque(checkpoint)
            route, refusals, unusual = "merged", [], [f"no slot can hold it ({refusals[0].where}): it is merged"]
        except UnsupportedError as error:
            refusals = refusals if checkpoint.config.get("peft_type") == "LORA" else [error]
    config = checkpoint.config
    method, base, peft = (config.get(key) for key in ("peft_type", "base_model_name_or_path", "peft_version"))
    specs = checkpoint.tensors.values()
    return Inspection(
        supported=route is not None,
        route=route,
        adapter=checkpoint.origin,
        method=_text(method),
        base_model=_text(base),
        peft_version=_text(peft),
        version=checkpoint.version,
        tensors=len(specs),
        parameters=sum((spec.stop - spec.start) // spec.dtype.itemsize for spec in specs),
        nbytes=checkpoint.nbytes,
        dtypes=dict(Counter(str(spec.dtype).removeprefix("torch.") for spec in specs).most_common()),
        ranks=_ranks(adapter.targets.values()) if adapter else [],
        targets=_targets(adapter.targets.values()) if adapter else [],
        unusual=unusual,
        settings={key: value for key, value in config.items() if value not in _UNSET and key not in _NOT_SETTINGS},
        names=_tensor_groups(checkpoint),
        refusals=refusals,
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _all_refusals(checkpoint: Checkpoint, first: HotslotError) -> list[HotslotError]:
    """Every option that is refused and not just the first: who trains again wants to know all of them."""
    from ..methods import refuse_unsupported_options

    if checkpoint.config.get("peft_type") != "LORA":
        return [first]
    options = dict(checkpoint.config)
    found: list[HotslotError] = []
    while True:
        try:
            refuse_unsupported_options(options, checkpoint.origin)
        except (CheckpointError, UnsupportedError) as error:
            found.append(error)
            if options.pop(str(error.where), None) is not None:
                continue
        return found or [first]


def _ranks(targets: Iterable[Target]) -> list[RankGroup]:
    groups = Counter((target.rank, target.alpha, target.scaling) for target in targets)
    return [RankGroup(*key, count) for key, count in sorted(groups.items(), key=lambda item: (-item[1], item[0]))]


def _targets(targets: Iterable[Target]) -> list[TargetGroup]:
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(_ending(target.fqn), []).append(target)
    return [_target_group(ending, members) for ending, members in groups.items()]


def _ending(fqn: str) -> str:
    """What stands behind the last number that is no module's own name (`to_out.0` is one); else all of it."""
    parts = fqn.split(".")
    numbers = [i for i in range(len(parts) - 1) if parts[i].isdecimal() and not parts[i + 1].isdecimal()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else fqn


def _target_group(ending: str, members: list[Target]) -> TargetGroup:
    layers: dict[str, set[int]] = {}
    for target in members:
        parts = target.fqn.split(".")
        first = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), None)
        if first is not None:
            layers.setdefault(".".join(parts[:first]), set()).add(int(parts[first]))
    shapes = dict.fromkeys(_shape(target) for target in members)
    return TargetGroup(ending, len(members), {stem: sorted(found) for stem, found in layers.items()}, list(shapes))


def _shape(target: Target) -> str:
    down, up = (target.parts[suffix].shape for suffix in sorted(target.parts) if suffix != "lora_B.bias")
    return f"{'×'.join(map(str, down[1:]))} → {up[0]}"


def _unusual(adapter: Adapter) -> list[str]:
    config, total = adapter.checkpoint.config, len(adapter.targets)
    notes = []
    if any(target.use_rslora for target in adapter.targets.values()):
        notes.append("rsLoRA: the scaling is alpha / sqrt(rank)")
    for key, default, what in (("rank_pattern", "r", "rank"), ("alpha_pattern", "lora_alpha", "alpha")):
        if patterns := config.get(key):
            usual = config.get(default, 8)
            others = sum(getattr(target, what) != usual for target in adapter.targets.values())
            notes.append(
                f"{key} ({len(patterns)}): {others} of {total} modules have another {what} than {default} = {usual}"
            )
    if adapter.target_parameters:
        notes.append(f"target_parameters: adapts bare parameters, {_shortened(list(adapter.target_parameters))}")
    if adapter.lora_bias:
        notes.append("lora_bias: the up-projections have biases")
    for fqn, copies in adapter.base_copies.items():
        for name, spec in copies.items():
            size = f"{spec.stop - spec.start:,} bytes"
            notes.append(
                f"carries a copy of the base model's {fqn}.{name} ({size}), compared with the model's when loaded"
            )
    notes += _unusual_layers(adapter)
    if dropout := max((target.dropout for target in adapter.targets.values()), default=0.0):
        notes.append(f"lora_dropout {dropout:g}, which acts in training only")
    if idle := sum(_adds_nothing(adapter, target) for target in adapter.targets.values()):
        what = "untrained" if idle == total else "partly untrained"
        notes.append(f"{what}: the up-projections of {idle} of {total} modules are zero, so that they add nothing")
    return notes


def _unusual_layers(adapter: Adapter) -> list[str]:
    kinds: dict[str, Counter[str]] = {}
    for target in adapter.targets.values():
        if "lora_embedding_A" in target.parts:
            kinds.setdefault("embeddings", Counter())[_ending(target.fqn)] += 1
        elif len(target.parts["lora_A.weight"].shape) > 2:
            kinds.setdefault("convolutions", Counter())[_ending(target.fqn)] += 1
    return [f"{kind} ({found.total()}): {_shortened(list(found))}" for kind, found in kinds.items()]


def _adds_nothing(adapter: Adapter, target: Target) -> bool:
    up = [spec for suffix, spec in target.parts.items() if "_B" in suffix]
    return not any(adapter.checkpoint.tensor(spec.name).float().any() for spec in up)  # float8 has no any()


def _tensor_groups(checkpoint: Checkpoint) -> list[TensorGroup]:
    counts: Counter[str] = Counter()
    shapes: dict[str, dict[tuple[int, ...], None]] = {}
    for name, spec in checkpoint.tensors.items():
        parts = name.removeprefix(_PREFIX).split(".")
        pattern = ".".join("*" if part.isdecimal() else part for part in parts)
        counts[pattern] += 1
        shapes.setdefault(pattern, {})[spec.shape] = None
    return [TensorGroup(name, counts[name], [list(shape) for shape in found]) for name, found in shapes.items()]


# -- as text -----------------------------------------------------------------------------------------------------------


def show_inspection(console: Console, found: Inspection) -> None:
    """Print an inspection for people."""
    console.print(_summary(found))
    if found.supported:
        console.print()
        console.print(_rank_table(found.ranks))
        console.print()
        console.print(_target_table(found.targets))
    else:
        console.print()
        console.print(_tensor_table(found.names))
    if found.unusual:
        console.print("\nunusual", style="bold")
        for note in found.unusual:
            console.print(f"  {printable(note)}")
    if found.refusals:
        console.print("\nrefused", style="bold red")
        for error in found.refusals:
            console.print(str(error), soft_wrap=True)


def _summary(found: Inspection) -> Any:
    dtypes = ", ".join(f"{count} of {dtype}" for dtype, count in found.dtypes.items())
    rows: dict[str, Any] = {
        "adapter": found.adapter,
        "method": found.method or "not stated",
        "base model": found.base_model or "not stated",
        "saved by": f"PEFT {found.peft_version}" if found.peft_version else None,
        "version": found.version,
        "tensors": dtypes or "none",
        "size": f"{found.nbytes:,} bytes, {found.parameters:,} parameters",
    }
    if not found.supported:
        rows |= {key: value if isinstance(value, str) else repr(value) for key, value in found.settings.items()}
    return new_facts({key: value for key, value in rows.items() if value is not None})


def _rank_table(groups: list[RankGroup]) -> Any:
    table = new_table(">rank", ">alpha", ">scaling", ">modules")
    for group in groups[:_SHOWN]:
        add_row(table, (group.rank, f"{group.alpha:g}", f"{group.scaling:.6g}", group.modules))
    return _with_rest(table, len(groups))


def _target_table(groups: list[TargetGroup]) -> Any:
    table = new_table("target", ">modules", "in → out", "layers")
    for group in groups[:_SHOWN]:
        layers = "; ".join(f"{stem} {_ranges(numbers)}".strip() for stem, numbers in group.layers.items())
        add_row(table, (group.ending, group.modules, _shortened(group.shapes, 3), layers))
    return _with_rest(table, len(groups))


def _tensor_table(groups: list[TensorGroup]) -> Any:
    table = new_table("tensors (* is a number)", ">count", "shape")
    for group in groups[:_SHOWN]:
        add_row(table, (group.name, group.tensors, _shortened([str(shape) for shape in group.shapes], 3)))
    return _with_rest(table, len(groups))


def _with_rest(table: Any, rows: int) -> Any:
    if rows > _SHOWN:
        add_row(table, (f"… and {rows - _SHOWN} more",))
    return table


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → "0–2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _shortened(names: list[str], shown: int = 4) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
