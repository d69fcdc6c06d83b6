"""How long a swap takes, beside a plain copy of the same bytes and PEFT's own hotswap, all in one run.

Takes a swapper with its adapters loaded, and a second, uncompiled model for PEFT; gives SwapTimes. The compiled
model's own answers are not its business.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from .result import SwapTimes

if TYPE_CHECKING:
    from torch import Tensor

    from ... import Swapper
    from ...checkpoint import Checkpoint

# Largest difference to hotslot's logits at which PEFT's are the same adapter's: the worst by rounding alone is 100
# times smaller, another adapter's 100 times larger.
_SAME_LOGITS = 1e-2


class Copy:
    """A plain copy of an adapter's bytes into memory like the live parameters'.

    Args:
        checkpoint: whose bytes.
        live: name → shape of each live parameter.

    One flat copy where every tensor fills its parameter; tensor by tensor where the slots are padded to a larger rank.
    """

    def __init__(self, checkpoint: Checkpoint, live: Mapping[str, tuple[int, ...]]) -> None:
        import torch

        sources = {name: checkpoint.tensor(name) for name in checkpoint.tensors}
        shapes = {name: live.get(_live_name(name), tuple(source.shape)) for name, source in sources.items()}
        if all(shapes[name] == source.shape for name, source in sources.items()):
            self.kind = "flat"
            self._pairs = [(torch.empty_like(checkpoint.data), checkpoint.data)]
        else:
            self.kind = "per tensor"
            self._pairs = [(_corner(shapes[name], source), source) for name, source in sources.items()]

    def __call__(self) -> None:
        """Copy once."""
        for target, source in self._pairs:
            target.copy_(source)


class PeftTwin:
    """PEFT's hotswap of one adapter into a model of its own that holds another, prepared as PEFT's guide says.

    Attributes:
        refusal: why PEFT cannot do this swap; None if it can.
    """

    def __init__(self, base: Any, before: Path | str, adapter: Path | str, max_rank: int) -> None:
        from peft import LoraConfig, PeftModel
        from peft.utils import load_peft_weights
        from peft.utils.hotswap import prepare_model_for_compiled_hotswap

        self.refusal: str | None = None
        self._adapter = str(adapter)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about PEFT's own calls; not ours to mend
            try:
                self._model = PeftModel.from_pretrained(base, str(before)).eval()
                prepare_model_for_compiled_hotswap(self._model, target_rank=max_rank)
                self._config = LoraConfig.from_pretrained(self._adapter)
                self._weights = {
                    _live_name(k, ""): v for k, v in load_peft_weights(self._adapter, device="cpu").items()
                }
                self.from_file()
            except Exception as error:  # whatever PEFT says is what the table shows
                self.refusal = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    def from_file(self) -> None:
        """Swap, reading the adapter's file."""
        from peft.utils.hotswap import hotswap_adapter

        hotswap_adapter(self._model, self._adapter, "default", torch_device="cpu")

    def from_memory(self) -> Callable[[], None]:
        """A swap of tensors that are in memory, ready to be called once: PEFT may consume them."""
        from peft.utils.hotswap import hotswap_adapter_from_state_dict

        weights = {name: tensor.clone() for name, tensor in self._weights.items()}
        return lambda: hotswap_adapter_from_state_dict(self._model, weights, "default", self._config)

    def refuse_other_logits(self, ids: Any, expected: Tensor) -> None:
        """Set `refusal` if PEFT made the swap, and the model does not compute `expected`."""
        import torch

        if self.refusal is not None:
            return
        with torch.no_grad():
            worst = float((self._model(ids).logits - expected).abs().max())
        if worst > _SAME_LOGITS:
            self.refusal = f"swaps without an error, but the logits are off by {worst:.2g}"


def time_swap(swapper: Swapper, name: str, before: str | None, copy: Copy, twin: PeftTwin, *, rounds: int) -> SwapTimes:
    """Swap from `before` to `name` again and again, a copy and PEFT's swaps in between. `name` is left live."""
    swaps: list[float] = []
    copies: list[float] = []
    peft: list[float] = []
    peft_file: list[float] = []
    nbytes = 0
    for _ in range(rounds):
        if before is None:
            swapper.deactivate()
        else:
            swapper.activate(before)
        copies.append(_seconds(copy))
        started = time.perf_counter()
        nbytes = swapper.activate(name).nbytes
        swaps.append(time.perf_counter() - started)
        if twin.refusal is None:
            peft.append(_seconds(twin.from_memory()))
            peft_file.append(_seconds(twin.from_file))
    return SwapTimes(
        seconds=median(swaps),
        nbytes=nbytes,
        copy_seconds=median(copies),
        copy_kind=copy.kind,
        peft_seconds=median(peft) if peft else None,
        peft_file_seconds=median(peft_file) if peft_file else None,
        peft_refusal=twin.refusal,
    )


def _seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _live_name(key: str, prefix: str = "base_model.model.") -> str:
    """A name in the file → that of the live tensor: `…lora_A.weight` → `…lora_A.default.weight`."""
    path = key.removeprefix(prefix)
    stem, _, last = path.rpartition(".")
    return f"{stem}.default.{last}" if last in ("weight", "bias") else f"{path}.default"


def _corner(shape: tuple[int, ...], source: Tensor) -> Tensor:
    """Scratch memory for `source` in the corner of a tensor of `shape`."""
    import torch

    return torch.empty(shape)[tuple(slice(size) for size in source.shape)]
