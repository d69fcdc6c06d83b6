"""What a swap must amount to, and what a swap that raised must not have touched.

The oracle is PEFT: a fresh base with `PeftModel.from_pretrained`. `snapshot` and `assert_unchanged` compare a
model with its earlier self, bit for bit. The tolerances of the project stand here and nowhere else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention
from torch import Tensor, nn

from adapters import expected_peft_warnings
from zoo import CLASSIFIERS, TIED, ZOO, Entry

# What padding the low-rank matmuls may change in an output, relative to its largest magnitude (see `error`): some
# times the worst seen over the zoo, which is another on each CPU. Where the shapes agree, outputs agree bitwise:
# `exact=True`.
TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 5e-6,  # transformers computes its norms in float32 even here
    torch.float32: 2e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 1e-1,
}


def fresh(
    entry: Entry,
    folder: Path | str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
) -> PeftModel:
    """A new base of `seed` with the adapter loaded by PEFT, in eval mode. It shares nothing."""
    base = entry.build(seed, dtype)
    with torch.random.fork_rng(devices=[]), expected_peft_warnings():
        torch.default_generator.manual_seed(seed)  # an initialisation may rewrite the base at random
        model = PeftModel.from_pretrained(
            base, str(folder), adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype
        )
    return model.eval()


def fresh_output(
    entry: Entry,
    folder: Path | str,
    *,
    input_seed: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A fresh load's output on `entry.inputs(input_seed, dtype)`. Cached by the file's bytes: read only."""
    return _fresh_output(entry.name, str(folder), _digest(Path(folder)), input_seed, seed, dtype)


@cache
def _fresh_output(name: str, folder: str, digest: str, input_seed: int, seed: int, dtype: torch.dtype) -> Tensor:
    entry = (ZOO | CLASSIFIERS | TIED)[name]
    return entry.output(fresh(entry, folder, seed=seed, dtype=dtype), entry.inputs(input_seed, dtype))


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.name.startswith("adapter_"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to `want`'s largest magnitude if above 1. Not comparable: infinite."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if not (got.isfinite().all() and want.isfinite().all()):
        return float("inf")
    got, want = got.double().cpu(), want.double().cpu()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1.0))


def assert_same_output(got: Tensor, want: Tensor, *, exact: bool = False) -> None:
    """`got` is `want` within `TOLERANCE` of its dtype; with `exact`, bit for bit."""
    if exact:
        assert _bytes(got) == _bytes(want), f"not bitwise equal: relative error {error(got, want):.3g}"
    found = error(got, want)
    allowed = TOLERANCE[want.dtype]
    assert found <= allowed, f"relative error {found:.3g}, above the {allowed} of {want.dtype}"


# --- snapshots ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorFacts:
    """All that can be seen of a tensor."""

    data: bytes
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: str
    data_ptr: int
    requires_grad: bool
    kind: str
    object_id: int | None
    grad: bytes | None


@dataclass(frozen=True)
class Snapshot:
    """Facts about a model by name. Holds the objects whose ids it has, or a freed id could be given again."""

    facts: dict[str, Any]
    held: tuple[Any, ...]


# attributes of modules that say what is live and of what size, wherever a module has them
_STATE = (
    "training", "merged_adapters", "_disable_adapters", "_active_adapter", "active_adapter", "fan_in_fan_out",
    "modules_to_save", "cast_input_dtype_enabled", "p", "in_features", "out_features", "in_channels",
    "out_channels", "groups",
)  # fmt: skip
_PER_ADAPTER = ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias", "lora_variant")


def snapshot(model: nn.Module) -> Snapshot:
    """Everything that a half-done swap could spoil, bitwise, with addresses and identities."""
    facts: dict[str, Any] = {}
    held: list[Any] = []
    modules = list(model.named_modules(remove_duplicate=False))  # under each of its names
    reborn = _reborn_parameters(modules)
    for name, module in modules:
        held.append(module)
        facts[f"{name}: module"] = (type(module).__qualname__, id(module))
        for attribute, value in _visible(module):
            key = f"{name}.{attribute}" if name else attribute
            if isinstance(value, Tensor):
                held.append(value)
                facts[key] = _tensor_facts(value, with_id=key not in reborn)
            else:
                facts[key] = _plain(value)
    return Snapshot(facts, tuple(held))


def _reborn_parameters(modules: list[tuple[str, nn.Module]]) -> set[str]:
    """Parameters that PEFT makes anew, over the same memory, at every walk over the modules: no id lasts."""
    names = set()
    for name, module in modules:
        if isinstance(module, MultiheadAttention):
            names |= {f"{name}.base_layer.in_proj_weight", f"{name}.base_layer.out_proj.base_layer.weight"}
    return names


def _visible(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module._parameters.items()
    yield from module._buffers.items()
    attributes = vars(module)
    for name, value in attributes.items():
        if isinstance(value, Tensor) or name in _STATE:
            yield name, value
    if isinstance(module, LoraLayer):
        for name in _PER_ADAPTER:
            values = attributes.get(name, {})
            yield f"{name} (adapters)", sorted(values)
            yield from ((f"{name}[{adapter!r}]", value) for adapter, value in values.items())
    for adapter, config in (attributes.get("peft_config") or {}).items():
        fields = config if isinstance(config, dict) else config.to_dict()
        yield from ((f"peft_config[{adapter!r}].{field}", value) for field, value in fields.items())


def _tensor_facts(tensor: Tensor, *, with_id: bool) -> TensorFacts:
    return TensorFacts(
        data=_bytes(tensor),
        dtype=tensor.dtype,
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        device=str(tensor.device),
        data_ptr=tensor.data_ptr(),
        requires_grad=tensor.requires_grad,
        kind=type(tensor).__name__,
        object_id=id(tensor) if with_id else None,
        grad=None if not tensor.is_leaf or tensor.grad is None else _bytes(tensor.grad),
    )


def _bytes(tensor: Tensor) -> bytes:
    if hasattr(tensor, "__tensor_flatten__"):  # of torchao: a wrapper, whose memory is that of the tensors within
        return b"".join(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    if tensor.is_meta:  # offloaded
        return b""
    # reshape first: a 0-dim tensor cannot be viewed as bytes
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _plain(value: Any) -> Any:
    """A copy that compares by value and by type: 2 is not 2.0, and a list changed in place is noticed."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return ("set", sorted(map(str, value)))
    if isinstance(value, list | tuple):
        return (type(value).__name__, [_plain(item) for item in value])
    if value is None or isinstance(value, str | int | float | Enum):
        return (type(value).__name__, repr(value))  # repr: NaN equals itself here
    return (type(value).__qualname__, id(value) if isinstance(value, nn.Module) else None)


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """One line for each fact that is not what it was, in the model's order."""
    lines = []
    for name in [*before.facts, *(name for name in after.facts if name not in before.facts)]:
        if name not in after.facts:
            lines.append(f"{name}: gone")
        elif name not in before.facts:
            lines.append(f"{name}: new")
        elif before.facts[name] != after.facts[name]:
            lines.append(f"{name}: {_describe(before.facts[name], after.facts[name])}")
    return lines


def _describe(old: Any, new: Any) -> str:
    if not (isinstance(old, TensorFacts) and isinstance(new, TensorFacts)):
        return f"{old} → {new}"
    parts = []
    for field in TensorFacts.__dataclass_fields__:
        was, now = getattr(old, field), getattr(new, field)
        if was != now:
            values = isinstance(was, bytes) and isinstance(now, bytes)
            parts.append(f"{field} {_changed_bytes(was, now)}" if values else f"{field} {was} → {now}")
    return ", ".join(parts)


def _changed_bytes(was: bytes, now: bytes) -> str:
    if len(was) != len(now):
        return f"of {len(was)} → {len(now)} bytes"
    changed = [index for index, (a, b) in enumerate(zip(was, now, strict=True)) if a != b]
    return f"differs in {len(changed)} of {len(was)} bytes, first at {changed[0]}"


def assert_unchanged(before: Snapshot, after: Snapshot, *, shown: int = 5) -> None:
    """Nothing changed; else an error that names the first differences."""
    found = differences(before, after)
    if found:
        more = [f"… and {len(found) - shown} more"] if len(found) > shown else []
        raise AssertionError("\n  ".join([f"{len(found)} facts changed:", *found[:shown], *more]))
