"""Who takes part in the swap benchmark: hotslot, PEFT, and plain copies of the same bytes.

Each contender has a twin, the thing it swaps in: a model of its own, or for a plain copy the bytes alone. A twin may
serve several contenders; it knows which of the two adapters is live, and every swap brings the other one.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import hotswap as peft_hotswap
from safetensors import safe_open
from torch import nn

import hotslot

from .llama import ADAPTER_NAME, Bench
from .report import PLAIN_READ

COLD = "cold: file → live"
WARM = "warm: host memory → live"
HOT = "hot: device memory → live"
INSTEAD = "delete + load instead"

# What padding a low-rank matmul may change in an output, as a part of what the swap changes in it.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}


class Twin(ABC):
    """Something in which one of two adapters is live."""

    live = 0

    @abstractmethod
    def error(self) -> float:
        """How far it is from having adapter `live`, and nothing else, in it. 0: bit for bit; infinite: too far."""


class Model(Twin):
    """Compared by its outputs with a fresh PeftModel.

    Args:
        bench: whence inputs and expected outputs come.
        model: with adapter 0 live, or about to be swapped to it.
        exact: whether its slots have the adapters' own rank. Then the outputs have to be equal bit for bit on the CPU;
            a GPU may choose another kernel for memory that is aligned otherwise.
    """

    def __init__(self, bench: Bench, model: nn.Module, *, exact: bool) -> None:
        self.bench, self.model, self.exact = bench, model, exact

    def error(self) -> float:
        """The largest difference in the outputs, as a part of what the other adapter would change in them."""
        got, want = self.bench.output(self.model), self.bench.expected[self.live]
        if torch.equal(got, want):
            return 0.0
        scale = (self.bench.expected[0].float() - self.bench.expected[1].float()).abs().max()
        found = float((got.float() - want.float()).abs().max() / scale)
        too_far = (self.exact and want.is_cpu) or not found < TOLERANCE[want.dtype]
        return float("inf") if too_far else found


class Bytes(Twin):
    """Memory shaped like a model's slots, and both adapters' bytes in host memory.

    Args:
        bench: whence the adapters come.
        slot_rank: one flat run of bytes if it is the adapters' own rank, else a padded tensor for each of theirs.
    """

    def __init__(self, bench: Bench, slot_rank: int) -> None:
        self.paths = [folder / "adapter_model.safetensors" for folder in bench.folders]
        files = [path.read_bytes() for path in self.paths]
        self.starts = [8 + int.from_bytes(file[:8], "little") for file in files]
        pinned, device = bench.device.type == "cuda", bench.device
        self.buffer = torch.zeros(max(map(len, files)), dtype=torch.uint8, pin_memory=pinned)
        self.host = [
            torch.frombuffer(bytearray(file[start:]), dtype=torch.uint8).clone()
            for file, start in zip(files, self.starts, strict=True)
        ]
        if pinned:
            self.host = [data.pin_memory() for data in self.host]
        self.device = [data.to(device) for data in self.host] if pinned else []
        self._views = _tensor_views(files[0][8 : self.starts[0]])
        self._targets: list[torch.Tensor] = []
        self._flat = torch.zeros_like(self.host[0], device=device)
        if slot_rank != bench.size.rank:
            self._targets = [_padded(view(self._flat), bench.size.rank, slot_rank) for view in self._views]

    def sources(self, data: torch.Tensor) -> list[torch.Tensor]:
        """What `copy` takes: an adapter's bytes as they go into the slots, whole or tensor by tensor."""
        return [view(data) for view in self._views] if self._targets else [data]

    def copy(self, sources: Sequence[torch.Tensor]) -> None:
        for target, source in zip(self._targets or [self._flat], sources, strict=True):
            target.copy_(source, non_blocking=True)

    def error(self) -> float:
        sources = self.sources(self.host[self.live])
        for target, source in zip(self._targets or [self._flat], sources, strict=True):
            if not torch.equal(target, source.to(target.device)):
                return float("inf")
        return 0.0


@dataclass(frozen=True, eq=False)
class Contender:
    """One way to do a case's job. `swap(i)` makes adapter i the live one."""

    case: str
    name: str
    twin: Twin
    swap: Callable[[int], object]


def contenders(bench: Bench, slot_rank: int) -> list[Contender]:
    """All that swap on this size into slots of this rank. The first PEFT and first copy of a case are its measures."""
    exact = slot_rank == bench.size.rank
    found = []
    if exact:  # PEFT's slots have room for another rank only if prepared
        found += _peft(bench, Model(bench, bench.peft_model(0), exact=True), "", instead=True)
    prepared = bench.peft_model(0)
    peft_hotswap.prepare_model_for_compiled_hotswap(prepared, target_rank=slot_rank)
    found += _peft(bench, Model(bench, prepared, exact=exact), ", prepared")
    if exact:
        found += _drop_in(bench, Model(bench, bench.peft_model(0), exact=True), "")
    ours = bench.peft_model(0)
    hotslot.prepare_model_for_compiled_hotswap(ours, target_rank=slot_rank)
    found += _drop_in(bench, Model(bench, ours, exact=exact), ", prepared")
    found += _swapper(bench, slot_rank)
    return found + _copies(Bytes(bench, slot_rank))


def _peft(bench: Bench, twin: Model, state: str, *, instead: bool = False) -> list[Contender]:
    host = _state_dicts(bench, "cpu")
    swap = partial(_hotswap, peft_hotswap.hotswap_adapter, twin.model, bench)
    from_dict = partial(_hotswap_from_state_dict, peft_hotswap.hotswap_adapter_from_state_dict, twin.model)
    found = [
        Contender(COLD, f"PEFT hotswap_adapter{state}", twin, swap),
        Contender(WARM, f"PEFT hotswap_adapter_from_state_dict{state}", twin, partial(from_dict, host)),
    ]
    if bench.device.type == "cuda":
        on_device, name = _state_dicts(bench, bench.device), f"PEFT hotswap_adapter_from_state_dict{state}"
        found.append(Contender(HOT, name, twin, partial(from_dict, on_device)))
    if instead:
        twin = Model(bench, bench.peft_model(0), exact=True)
        name = "PEFT delete_adapter + load_adapter + set_adapter"
        found.append(Contender(INSTEAD, name, twin, partial(_delete_and_load, twin.model, bench)))
    return found


def _drop_in(bench: Bench, twin: Model, state: str) -> list[Contender]:
    host = _state_dicts(bench, "cpu")
    swap = partial(_hotswap, hotslot.hotswap_adapter, twin.model, bench)
    from_dict = partial(_hotswap_from_state_dict, hotslot.hotswap_adapter_from_state_dict, twin.model)
    found = [
        Contender(COLD, f"hotslot hotswap_adapter{state}", twin, swap),
        Contender(WARM, f"hotslot hotswap_adapter_from_state_dict{state}", twin, partial(from_dict, host)),
    ]
    if bench.device.type == "cuda":
        on_device, name = _state_dicts(bench, bench.device), f"hotslot hotswap_adapter_from_state_dict{state}"
        found.append(Contender(HOT, name, twin, partial(from_dict, on_device)))
    return found


def _swapper(bench: Bench, slot_rank: int) -> list[Contender]:
    exact = slot_rank == bench.size.rank
    model = _slots(bench, slot_rank)
    names = ("first", "second")
    swapper = hotslot.attach(model, dict(zip(names, map(str, bench.folders), strict=True)), adapter_name=ADAPTER_NAME)
    swapper.activate(names[0])
    twin = Model(bench, model, exact=exact)

    def load_and_activate(adapter: int) -> None:
        swapper.load("cold", str(bench.folders[adapter]))
        swapper.activate("cold")

    found = [
        Contender(COLD, "hotslot Swapper.load + activate", twin, load_and_activate),
        Contender(WARM, "hotslot Swapper.activate", twin, lambda adapter: swapper.activate(names[adapter])),
    ]
    found += [_exclusive(bench, slot_rank, WARM), _packed(bench, slot_rank), _packed(bench, slot_rank, lazy=True)]
    found += [_packed(bench, slot_rank, exclusive=True)]
    if bench.device.type == "cuda":
        found += [_kept(bench, slot_rank), _exclusive(bench, slot_rank, HOT)]
    return found


def _exclusive(bench: Bench, slot_rank: int, case: str) -> Contender:
    """With slots that nobody else writes one by one; both adapters in host memory, or on the device."""
    limit = None if case == HOT else 0
    return _activating(bench, slot_rank, case, ", exclusive", cache=hotslot.Cache(device_bytes=limit), exclusive=True)


def _packed(bench: Bench, slot_rank: int, *, lazy: bool = False, exclusive: bool = False) -> Contender:
    """From the packed files that an earlier reading has left; the first swap to each adapter, untimed, makes them.

    If `lazy`, it is the swap that reads: on a GPU each piece goes there while the next are read.
    """
    model = _slots(bench, slot_rank)
    cache = hotslot.Cache(disk_bytes=None, folder=bench.folders[0].parent / "packed")
    sources, options = {"cold": str(bench.folders[0])}, {"cache": cache, "exclusive": exclusive}
    swapper = hotslot.attach(model, sources, adapter_name=ADAPTER_NAME, **options)
    swapper.activate("cold")

    def load_and_activate(adapter: int) -> None:
        swapper.load("cold", str(bench.folders[adapter]), lazy=lazy)
        swapper.activate("cold")

    twin = Model(bench, model, exact=slot_rank == bench.size.rank)
    name = f"hotslot Swapper.load{'(lazy=True)' if lazy else ''} + activate, packed{', exclusive' if exclusive else ''}"
    return Contender(COLD, name, twin, load_and_activate)


def _kept(bench: Bench, slot_rank: int) -> Contender:
    """From the device, where both adapters stay."""
    return _activating(bench, slot_rank, HOT, "", cache=hotslot.Cache(device_bytes=None))


def _activating(bench: Bench, slot_rank: int, case: str, state: str, **options: Any) -> Contender:
    """A swapper of its own that has both adapters."""
    model = _slots(bench, slot_rank)
    names = ("first", "second")
    sources = dict(zip(names, map(str, bench.folders), strict=True))
    swapper = hotslot.attach(model, sources, adapter_name=ADAPTER_NAME, **options)
    for name in reversed(names):
        swapper.activate(name)
    twin = Model(bench, model, exact=slot_rank == bench.size.rank)
    return Contender(case, f"hotslot Swapper.activate{state}", twin, lambda adapter: swapper.activate(names[adapter]))


def _slots(bench: Bench, rank: int) -> nn.Module:
    """A model with slots of this rank, as they came with it."""
    return bench.peft_model(0) if rank == bench.size.rank else bench.peft_model_of_rank(rank)


def _copies(twin: Bytes) -> list[Contender]:
    def read_and_copy(adapter: int, buffer: torch.Tensor | None) -> None:
        if buffer is None:
            buffer = torch.empty_like(twin.buffer)
        with twin.paths[adapter].open("rb", buffering=0) as file:
            os.preadv(file.fileno(), [buffer.numpy().data], 0)
        twin.copy(twin.sources(buffer[twin.starts[adapter] :]))

    host = [twin.sources(data) for data in twin.host]
    found = [
        Contender(COLD, PLAIN_READ, twin, partial(read_and_copy, buffer=twin.buffer)),
        Contender(COLD, "plain read into fresh memory + copy", twin, partial(read_and_copy, buffer=None)),
        Contender(WARM, "plain copy", twin, lambda adapter: twin.copy(host[adapter])),
    ]
    if twin.device:
        device = [twin.sources(data) for data in twin.device]
        found.append(Contender(HOT, "plain copy", twin, lambda adapter: twin.copy(device[adapter])))
    return found


def _hotswap(function: Callable[..., None], model: nn.Module, bench: Bench, adapter: int) -> None:
    function(model, str(bench.folders[adapter]), ADAPTER_NAME, torch_device=bench.device.type)


def _hotswap_from_state_dict(
    function: Callable[..., None],
    model: nn.Module,
    loaded: Sequence[tuple[dict[str, torch.Tensor], LoraConfig]],
    adapter: int,
) -> None:
    tensors, config = loaded[adapter]
    function(model, tensors, ADAPTER_NAME, config)


def _delete_and_load(model: Any, bench: Bench, adapter: int) -> None:
    model.delete_adapter(ADAPTER_NAME)
    folder, device = str(bench.folders[adapter]), bench.device.type
    model.load_adapter(folder, ADAPTER_NAME, torch_device=device, autocast_adapter_dtype=False)
    model.set_adapter(ADAPTER_NAME)


def _state_dicts(bench: Bench, device: str | torch.device) -> list[tuple[dict[str, torch.Tensor], LoraConfig]]:
    """Each adapter's tensors in memory, under the names that they have in a model."""
    return [
        (
            {
                name.replace(".weight", f".{ADAPTER_NAME}.weight"): tensor.to(device)
                for name, tensor in _read_tensors(folder / "adapter_model.safetensors").items()
            },
            LoraConfig.from_pretrained(str(folder)),
        )
        for folder in bench.folders
    ]


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict


def _tensor_views(header: bytes) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """For each tensor of a safetensors file a function that finds it among the file's data bytes."""
    entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}

    def view(data: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
        begin, end = entry["data_offsets"]
        return data[begin:end].view(dtypes[entry["dtype"]]).view(entry["shape"])

    return [partial(view, entry=entry) for entry in sorted(entries, key=lambda entry: entry["data_offsets"])]


def _padded(tensor: torch.Tensor, rank: int, slot_rank: int) -> torch.Tensor:
    """A corner, of `tensor`'s shape, in new memory whose rank dimension is as long as the slot's."""
    shape = [slot_rank if i == (0 if tensor.shape[0] == rank else 1) else n for i, n in enumerate(tensor.shape)]
    return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)[: tensor.shape[0], : tensor.shape[1]]
