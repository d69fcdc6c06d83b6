"""diffusers' own ways of doing the demo's swaps, on pipelines of their own, to be timed beside hotslot's."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

from . import emoji

# Largest difference of a prediction at which it is the same LoRA's: rounding is 1000 times smaller, another LoRA's
# difference 100 times larger.
_SAME_PREDICTION = 1e-2
_SLOT = "style"
_REFUSAL_WIDTH = 90  # diffusers names every tensor


class Twin(ABC):
    """A pipeline without hotslot, not compiled.

    Attributes:
        call: what it calls to swap.
        refusal: why diffusers cannot do the swap; None if it can.
    """

    call: str
    refusal: str | None = None

    @abstractmethod
    def swap_to(self, weights: Mapping[str, float]) -> None:
        """Make these styles live, at these strengths."""


class Loaded(Twin):
    """All styles are loaded, and `set_adapters` chooses among them. Compiled code would compile anew."""

    call = "set_adapters"

    def __init__(self, folder: Path, files: Mapping[str, Path]) -> None:
        self.pipe = emoji.load(folder)
        with _without_warnings():
            for style, file in files.items():
                self.pipe.load_lora_weights(str(file), adapter_name=style)

    def swap_to(self, weights: Mapping[str, float]) -> None:  # noqa: D102
        if weights:
            self.pipe.enable_lora()
            self.pipe.set_adapters(list(weights), list(weights.values()))
        else:
            self.pipe.disable_lora()


class Hotswapped(Twin):
    """`load_lora_weights(…, hotswap=True)` between two styles, prepared as diffusers' guide says."""

    call = "hotswap=True"

    def __init__(self, folder: Path, before: Path, after: Path) -> None:
        self._files = {file.stem: str(file) for file in (before, after)}
        self._pipe: Any = emoji.load(folder)
        self._after = after.stem
        with _without_warnings():
            try:
                self._pipe.enable_lora_hotswap(target_rank=_largest_rank(before, after))
                self._pipe.load_lora_weights(self._files[before.stem], adapter_name=_SLOT)
                self.swap_to({self._after: 1.0})
            except Exception as error:  # whatever diffusers says is what the table shows
                self.refusal = shorten(f"{type(error).__name__}: {error}", _REFUSAL_WIDTH, placeholder=" …")

    def swap_to(self, weights: Mapping[str, float]) -> None:  # noqa: D102
        (style,) = weights
        self._pipe.load_lora_weights(self._files[style], adapter_name=_SLOT, hotswap=True)

    def refuse_other_pictures(self, unet: Any, embeddings: Any) -> None:
        """Set `refusal` if the swap was made, and the twin does not predict what `unet` does."""
        import torch

        if self.refusal is not None:
            return
        config = unet.config
        x = torch.randn(1, config.in_channels, config.sample_size, config.sample_size)
        with torch.no_grad():
            one, other = (each(x, 500, embeddings[:1]).sample for each in (unet, self._pipe.unet))
        worst = float((one - other).abs().max())
        if worst > _SAME_PREDICTION:
            self.refusal = f"swaps without an error, but the prediction is off by {worst:.2g}"


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Of PEFT, about diffusers' own calls: not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _largest_rank(*files: Path) -> int:
    from safetensors import safe_open

    ranks: list[int] = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            ranks += [file.get_slice(name).get_shape()[0] for name in file.keys() if "lora_A" in name]  # noqa: SIM118
    return max(ranks)
