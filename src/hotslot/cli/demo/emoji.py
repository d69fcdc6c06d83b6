"""The pictures' model: a tiny diffusers pipeline of 32 × 32 emoji, and the names that it knows.

`demo/image` is a pipeline's folder as diffusers saves it, with LoRA files beside it. Instead of a text encoder it has a
file of embeddings, one tensor a name.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch.nn import functional as F

from ...errors import HotslotError

if TYPE_CHECKING:
    from torch import Tensor

diffusers: Any = import_module("diffusers")  # typed in parts; not installed everywhere that types are checked
loaders: Any = import_module("diffusers.loaders")
torch_utils: Any = import_module("diffusers.utils.torch_utils")

_TOKENS = 12  # of an embedding, with zeros behind the end: what the model was trained with
_NAMES = "prompt_embeddings.safetensors"


class EmojiPipeline(diffusers.DiffusionPipeline, loaders.StableDiffusionLoraLoaderMixin):  # type: ignore[misc]
    """Denoises pixels by DDIM, without guidance: the model has memorised its pictures, and guidance damages them."""

    model_cpu_offload_seq = "unet"
    _lora_loadable_modules = ["unet"]  # noqa: RUF012  as diffusers spells it
    text_encoder = None  # there is none, and the loader asks for it

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt_embeds: Tensor,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 20,
        output_type: str = "pil",
    ) -> Any:
        """One picture for each of `prompt_embeds`, [N, 12, 384].

        Args:
            generator: of the noise; a list has one for each picture.
            num_inference_steps: of DDIM.
            output_type: "pil", or "pt" for one tensor [N, 3, 32, 32] of values from 0 to 1.

        Returns:
            diffusers' ImagePipelineOutput.
        """
        config = self.unet.config
        shape = (len(prompt_embeds), config.in_channels, config.sample_size, config.sample_size)
        x = torch_utils.randn_tensor(shape, generator=generator, device=self.device, dtype=self.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        for t in self.progress_bar(self.scheduler.timesteps):
            predicted = self.unet(x, t, encoder_hidden_states=prompt_embeds).sample
            x = self.scheduler.step(predicted, t, x).prev_sample
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pil":
            images = self.numpy_to_pil(images.permute(0, 2, 3, 1).float().cpu().numpy())
        return diffusers.ImagePipelineOutput(images=images)


def load(folder: Path) -> Any:
    """The pipeline of a folder, in float32, without progress bars."""
    pipeline = EmojiPipeline.from_pretrained(str(folder), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embed(names: Sequence[str], folder: Path) -> Tensor:
    """[N, 12, 384], float32.

    Raises:
        HotslotError: the folder has no embedding of one of the names.
    """
    with safe_open(folder / _NAMES, framework="pt") as file:
        known = set(file.keys())
        for name in names:
            if name not in known:
                raise HotslotError(
                    f"The pictures' model does not know {name!r}.",
                    where="--prompt",
                    expected=f"one of its {len(known)} names"
                    + "".join(f", such as {close!r}" for close in get_close_matches(name, known, 1, 0.0)),
                    hint=f"they are the names of the tensors in {folder / _NAMES}",
                )
        found = [file.get_tensor(name).float() for name in names]
    return torch.stack([F.pad(each, (0, 0, 0, _TOKENS - len(each))) for each in found])
