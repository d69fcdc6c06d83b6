"""`hotslot inspect` of a LoRA in one file, as trainers of diffusion models write them: read by its own names.

It has no config: ranks are those of its matrices, alphas are tensors beside them or stand in its metadata. Which module
of which pipeline a name means is known to diffusers alone; `hotslot check PIPELINE FILE` asks it.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .terminal import add_row, new_facts, new_table, printable

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

_SHOWN = 24  # rows of a table; JSON has them all
# The end of a tensor's name → what it is in its module. B has as many columns as A has rows: the rank.
_ENDINGS = {
    "lora_A.weight": "A", "lora_B.weight": "B", "lora.down.weight": "A", "lora.up.weight": "B",
    "lora_down.weight": "A", "lora_up.weight": "B", "down.weight": "A", "up.weight": "B", "alpha": "alpha",
    "lora_A.default.weight": "A", "lora_B.default.weight": "B",
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lora_magnitude_vector.weight": "DoRA",
    "lokr_w1": "LoKr", "lokr_w1_a": "LoKr", "lokr_w1_b": "LoKr", "lokr_w2": "LoKr", "lokr_w2_a": "LoKr",
    "lokr_w2_b": "LoKr", "lokr_t2": "LoKr", "hada_w1_a": "LoHa", "hada_w1_b": "LoHa", "hada_w2_a": "LoHa",
    "hada_w2_b": "LoHa", "hada_t1": "LoHa", "hada_t2": "LoHa", "lora_B.bias": "bias", "lora_up.bias": "bias",
    "diff": "whole weight", "diff_b": "whole bias", "scale": "norm",
}  # fmt: skip
_COMPONENTS = (
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "connectors",
)  # fmt: skip
_KOHYA = {
    "lora_unet_": "unet or transformer", "lora_transformer_": "transformer", "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3",
}  # fmt: skip
_DIALECTS: dict[str, Callable[[str], bool]] = {
    "kohya": lambda name: name.startswith(tuple(_KOHYA)),
    "diffusers, before PEFT": lambda name: name.startswith(_COMPONENTS) and ".down." in name,
    "diffusers": lambda name: name.partition(".")[0] in _COMPONENTS,
    "xlabs": lambda name: ".processor." in name and "_lora" in name,
    "BFL control": lambda name: "query_norm.scale" in name,
    "PEFT": lambda name: name.startswith("base_model.model."),
    "ComfyUI": lambda name: name.startswith("diffusion_model."),
}
_TOLD = ("ss_base_model_version", "ss_network_module", "ss_sd_model_name", "modelspec.architecture", "modelspec.title")


@dataclass(frozen=True, slots=True)
class Component:
    """The part of a file that is for one of a pipeline's components.

    Attributes:
        name: of the component, as diffusers calls it; what the file calls it where that does not tell.
        modules: that it adapts.
        methods: "LoRA", "DoRA", "LoKr", …: how many modules each.
        ranks: rank → modules.
        alphas: alpha → modules; empty where the file states none, and the rank is taken for it.
        endings: what stands behind the last number of a module's name → modules.
    """

    name: str
    modules: int
    methods: dict[str, int]
    ranks: dict[int, int]
    alphas: dict[float, int]
    endings: dict[str, int]


@dataclass(frozen=True, slots=True)
class FileInspection:
    """What a single file says.

    Attributes:
        file: as it was given.
        dialect: who writes files of such names.
        components: in the order of the file.
        tensors, parameters, nbytes: how many, of how many values, in how many bytes.
        dtypes: dtype → tensors.
        version: hotslot's digest of its values and names.
        metadata: those of the file's own that say what it is for.
        strays: names that belong to no module of a LoRA.
    """

    file: str
    dialect: str
    components: list[Component]
    tensors: int
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    version: str
    metadata: dict[str, str]
    strays: list[str]

    @property
    def supported(self) -> bool:
        """Whether it is a LoRA as far as its names tell."""
        return bool(self.components) and not self.strays


def lora_file(path: Path) -> Path | None:
    """The single file that is meant: the path itself, or in a folder the one that `save_lora_weights` writes."""
    if path.suffix == ".safetensors":
        return path
    written = path / "pytorch_lora_weights.safetensors"
    return written if os.path.isfile(written) else None  # False where nobody may look, too


def inspect_file(path: Path) -> FileInspection:
    """Read a single file and tell what is in it.

    Raises:
        CheckpointError: it cannot be read, or holds what is no finite number.
    """
    from ..checkpoint import read_file

    checkpoint, stated = read_file(path)
    modules: dict[str, dict[str, str]] = {}
    strays = []
    for name in checkpoint.tensors:
        module, part = _split(name)
        if part is None:
            strays.append(name)
        else:
            modules.setdefault(module, {})[name] = part
    specs = checkpoint.tensors.values()
    return FileInspection(
        file=str(path),
        dialect=_dialect(list(checkpoint.tensors)),
        components=_components(modules, checkpoint, _stated_alpha(stated)),
        tensors=len(specs),
        parameters=sum((spec.stop - spec.start) // spec.dtype.itemsize for spec in specs),
        nbytes=checkpoint.nbytes,
        dtypes=dict(Counter(str(spec.dtype).removeprefix("torch.") for spec in specs).most_common()),
        version=checkpoint.version,
        metadata={key: stated[key] for key in _TOLD if stated.get(key)},
        strays=strays,
    )


def _split(name: str) -> tuple[str, str | None]:
    """The module's name and what the tensor is in it; None if nothing that is known."""
    parts = name.split(".")
    for length in (3, 2, 1):
        ending = ".".join(parts[-length:])
        if len(parts) > length and ending in _ENDINGS:
            return ".".join(parts[:-length]), _ENDINGS[ending]
    return name, None


def _dialect(names: list[str]) -> str:
    """Who writes such names, by what diffusers' converters look for; the first of these that any name has."""
    for dialect, matches in _DIALECTS.items():
        if any(map(matches, names)):
            return dialect
    return "not known"


def _components(
    modules: Mapping[str, Mapping[str, str]], checkpoint: Checkpoint, stated_alpha: Mapping[str, float]
) -> list[Component]:
    groups: dict[str, list[str]] = {}
    for module in modules:
        groups.setdefault(_component(module), []).append(module)
    return [_summary(name, members, modules, checkpoint, stated_alpha) for name, members in groups.items()]


def _component(module: str) -> str:
    for prefix, component in _KOHYA.items():
        if module.startswith(prefix):
            return component
    first = module.partition(".")[0]
    return first if first in _COMPONENTS else "unet or transformer"


def _summary(
    name: str,
    members: list[str],
    modules: Mapping[str, Mapping[str, str]],
    checkpoint: Checkpoint,
    stated_alpha: Mapping[str, float],
) -> Component:
    methods: Counter[str] = Counter()
    ranks: Counter[int] = Counter()
    alphas: Counter[float] = Counter()
    for module in members:
        parts = {part: tensor for tensor, part in modules[module].items()}
        methods[next((kind for kind in ("DoRA", "LoKr", "LoHa", "whole weight") if kind in parts), "LoRA")] += 1
        if "A" in parts:
            ranks[checkpoint.tensors[parts["A"]].shape[0]] += 1
        if "alpha" in parts:
            alphas[float(checkpoint.tensor(parts["alpha"]))] += 1
        elif name in stated_alpha:
            alphas[stated_alpha[name]] += 1
    endings = Counter(re.split(r"[._]\d+[._](?!\d)", module)[-1] for module in members)
    counts = (dict(found.most_common()) for found in (methods, ranks, alphas, endings))
    return Component(name, len(members), *counts)  # type: ignore[arg-type]  # four kinds of keys


def _stated_alpha(metadata: Mapping[str, str]) -> dict[str, float]:
    """Component → `lora_alpha` of the config that diffusers keeps in a file's metadata."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        return {}
    found = {}
    for key, value in config.items() if isinstance(config, dict) else ():
        component, _, option = key.rpartition(".")
        if option == "lora_alpha" and isinstance(value, (int, float)):
            found[component] = float(value)
    return found


# -- as text -----------------------------------------------------------------------------------------------------------


def show_file(console: Console, found: FileInspection) -> None:
    """Print an inspection for people."""
    rows = {
        "file": found.file,
        "dialect": found.dialect,
        "version": found.version,
        "tensors": ", ".join(f"{count} of {dtype}" for dtype, count in found.dtypes.items()) or "none",
        "size": f"{found.nbytes:,} bytes, {found.parameters:,} parameters",
        **found.metadata,
    }
    console.print(new_facts(rows))
    if found.components:
        console.print()
        console.print(_component_table(found.components))
    if found.strays:
        console.print("\nof no LoRA", style="bold red")
        for name in found.strays[:_SHOWN]:
            console.print(f"  {printable(name)}")
        if len(found.strays) > _SHOWN:
            console.print(f"  … and {len(found.strays) - _SHOWN:,} more")
    if found.components:
        console.print("\nhotslot check PIPELINE FILE tells whether it fits on a pipeline", style="dim")


def _component_table(components: list[Component]) -> Any:
    table = new_table("component", ">modules", "method", "rank", "alpha", "targets")
    for part in components:
        counted = (_counted(part.methods), _counted(part.ranks), _counted(part.alphas) or "the rank")
        add_row(table, (part.name, part.modules, *counted, ", ".join(part.endings)))
    return table


def _counted(found: Mapping[Any, int]) -> str:
    """One kind: its name. Several: each with how many there are of it."""
    if len(found) == 1:
        return f"{next(iter(found)):g}" if isinstance(next(iter(found)), (int, float)) else str(next(iter(found)))
    return ", ".join(f"{key} ({count})" for key, count in found.items())
