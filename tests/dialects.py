"""LoRA files as other trainers write them: the names of tensors that each dialect has, for the tiny pipelines.

What the names mean is diffusers' to say; a dialect here says which names a trainer gives, and nothing else.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipelines import PIPELINES, Kind

KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")


@dataclass
class File:
    """A file that is being written."""

    kind: Kind
    seed: int
    rank: int
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(
        self,
        name: str,
        *modules: str,
        component: str | None = None,
        parts: tuple[str, str] = KOHYA,
        alpha: float | None = None,
        rank: int | None = None,
    ) -> None:
        """A pair of matrices.

        Args:
            name: in the file.
            *modules: in the component; of several, the second matrix has the rows of all, as a fused layer has.
            component: of the pipeline, by default the denoiser.
            parts: what the file calls the two.
            alpha: stated beside them, if given.
            rank: of this pair, if not the file's.
        """
        shapes = _shapes(self.kind.name, component or self.kind.denoiser)
        into, rank = shapes[modules[0]], rank or self.rank
        out = sum(shapes[module][0] for module in modules)
        self.tensors[f"{name}.{parts[0]}"] = self._random(rank, *into[1:])
        self.tensors[f"{name}.{parts[1]}"] = self._random(out, rank, *(1 for _ in into[2:]))
        if alpha is not None:
            self.tensors[f"{name}.alpha"] = torch.tensor(float(alpha))

    def all_of(
        self, name: Callable[[str], str], *endings: str, component: str | None = None, alphas: bool = False, **how: Any
    ) -> None:
        """A pair for each module whose name ends so; alphas that are stated differ."""
        names = _shapes(self.kind.name, component or self.kind.denoiser)
        for i, module in enumerate(name_ for name_ in names if name_.endswith(endings)):
            self.add(
                name(module), module, component=component, alpha=1.0 + (i + self.seed) % 3 if alphas else None, **how
            )

    def norm(self, name: str, module: str) -> None:
        """Values of a norm's own weight."""
        (size,) = _shapes(self.kind.name, self.kind.denoiser)[module]
        self.tensors[name] = 1 + self._random(size) / 4

    def _random(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000 * self.seed + len(self.tensors))
        return torch.randn(shape, generator=generator) / 2


@cache
def _shapes(kind: str, component: str) -> dict[str, tuple[int, ...]]:
    """Module → shape of its weight."""
    modules = PIPELINES[kind].component(component).named_modules()
    return {name: tuple(m.weight.shape) for name, m in modules if isinstance(getattr(m, "weight", None), Tensor)}


def _flat(prefix: str, module: str) -> str:
    return prefix + module.replace(".", "_")


def _dotted(prefix: str, module: str) -> str:
    return f"{prefix}.{module}"


def _clip(prefix: str, module: str) -> str:
    """CLIP's layers, which trainers know below `text_model`."""
    return f"{prefix}_text_model_" + module.removeprefix("text_model.").replace(".", "_")


_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
_CLIP = ("q_proj", "k_proj", "v_proj", "out_proj", "mlp.fc1", "mlp.fc2")


def kohya_sd(file: File) -> None:
    """kohya's sd-scripts for SD 1.x: diffusers' names with underscores, alphas, convolutions, the text encoder."""
    file.all_of(partial(_flat, "lora_unet_"), *_ATTENTION, ".proj_in", ".conv1", alphas=True)
    file.all_of(partial(_clip, "lora_te"), *_CLIP, component="text_encoder", alphas=True)


def kohya_sdxl(file: File) -> None:
    """… for SDXL: Stability's names of the unet's blocks, two text encoders."""
    for inner in ("attn1_to_q", "attn1_to_out_0", "attn2_to_v"):
        module = inner.replace("_to_", ".to_").replace("out_0", "out.0")
        for theirs, ours in (("input_blocks_3_1", "down_blocks.1"), ("output_blocks_1_1", "up_blocks.0")):
            layer = 1 if theirs.startswith("output") else 0
            file.add(
                f"lora_unet_{theirs}_transformer_blocks_0_{inner}",
                f"{ours}.attentions.{layer}.transformer_blocks.0.{module}",
                alpha=2.0,
            )
    for i, name in ((1, "text_encoder"), (2, "text_encoder_2")):
        file.all_of(partial(_clip, f"lora_te{i}"), *_CLIP, component=name, alphas=True)


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


def _in_block(*names: str, block: str = "transformer_blocks.0") -> list[str]:
    return [f"{block}.{name}" for name in names]


def kohya_flux(file: File) -> None:
    """… for Flux: Black Forest Labs' names, fused queries, keys and values."""
    file.add("lora_unet_double_blocks_0_img_attn_qkv", *_in_block(*_QKV), alpha=2.0)
    file.add("lora_unet_double_blocks_0_txt_attn_qkv", *_in_block(*_ADDED), alpha=1.0)
    file.add("lora_unet_double_blocks_0_img_mlp_0", *_in_block("ff.net.0.proj"), alpha=3.0)
    file.add("lora_unet_single_blocks_0_linear2", "single_transformer_blocks.0.proj_out", alpha=1.0)
    file.all_of(partial(_clip, "lora_te1"), *_CLIP, component="text_encoder", alphas=True)


def comfy_flux(file: File) -> None:
    """The same as ComfyUI writes it."""
    file.add("diffusion_model.double_blocks.0.img_attn.qkv", *_in_block(*_QKV))
    file.add("diffusion_model.single_blocks.0.linear2", "single_transformer_blocks.0.proj_out")


def mixed_flux(file: File) -> None:
    """diffusers' names after kohya's prefix."""
    for name in ("to_q", "to_v", "to_add_out"):
        file.add(f"lora_transformer_transformer_blocks_0_attn_{name}", *_in_block(f"attn.{name}"), alpha=2.0)
    file.all_of(partial(_clip, "lora_te1"), *_CLIP, component="text_encoder", alphas=True)


def xlabs_flux(file: File) -> None:
    """XLabs: names of attention processors."""
    parts = ("down.weight", "up.weight")
    file.add("double_blocks.0.processor.qkv_lora1", *_in_block(*_QKV), parts=parts)
    file.add("double_blocks.0.processor.proj_lora1", *_in_block("attn.to_out.0"), parts=parts)
    file.add("double_blocks.0.processor.proj_lora2", *_in_block("attn.to_add_out"), parts=parts)
    file.add("single_blocks.0.processor.qkv_lora", *_in_block(*_QKV, block="single_transformer_blocks.0"), parts=parts)


_BFL = {  # of all of Flux's linear layers, as both Black Forest Labs and fal write them
    "double_blocks.0.img_mod.lin": _in_block("norm1.linear"),
    "double_blocks.0.txt_mod.lin": _in_block("norm1_context.linear"),
    "double_blocks.0.img_attn.qkv": _in_block(*_QKV),
    "double_blocks.0.txt_attn.qkv": _in_block(*_ADDED),
    "double_blocks.0.img_mlp.0": _in_block("ff.net.0.proj"),
    "double_blocks.0.img_mlp.2": _in_block("ff.net.2"),
    "double_blocks.0.txt_mlp.0": _in_block("ff_context.net.0.proj"),
    "double_blocks.0.txt_mlp.2": _in_block("ff_context.net.2"),
    "double_blocks.0.img_attn.proj": _in_block("attn.to_out.0"),
    "double_blocks.0.txt_attn.proj": _in_block("attn.to_add_out"),
    "single_blocks.0.modulation.lin": _in_block("norm.linear", block="single_transformer_blocks.0"),
    "single_blocks.0.linear1": _in_block(*_QKV, "proj_mlp", block="single_transformer_blocks.0"),
    "single_blocks.0.linear2": _in_block("proj_out", block="single_transformer_blocks.0"),
    "final_layer.linear": ["proj_out"],
}
_BFL_CONTROL = {
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "txt_in": ["context_embedder"],
    "img_in": ["x_embedder"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
_NORMS = {
    "double_blocks.0.img_attn.norm.query_norm.scale": "transformer_blocks.0.attn.norm_q",
    "double_blocks.0.img_attn.norm.key_norm.scale": "transformer_blocks.0.attn.norm_k",
    "double_blocks.0.txt_attn.norm.query_norm.scale": "transformer_blocks.0.attn.norm_added_q",
    "double_blocks.0.txt_attn.norm.key_norm.scale": "transformer_blocks.0.attn.norm_added_k",
    "single_blocks.0.norm.query_norm.scale": "single_transformer_blocks.0.attn.norm_q",
    "single_blocks.0.norm.key_norm.scale": "single_transformer_blocks.0.attn.norm_k",
}


def bfl_control(file: File) -> None:
    """Black Forest Labs' control LoRAs: every linear layer, and norms of their own."""
    for name, modules in (_BFL | _BFL_CONTROL).items():
        file.add(name, *modules, parts=PEFT)
    for name, module in _NORMS.items():
        file.norm(name, module)


def fal_kontext(file: File) -> None:
    """fal's trainer of Flux Kontext."""
    for name, modules in _BFL.items():
        file.add(f"base_model.model.{name}", *modules, parts=PEFT)


def flux_alphas(file: File) -> None:
    """diffusers' names, and alphas beside them."""
    file.all_of(partial(_dotted, "transformer"), *_ATTENTION, parts=PEFT, alphas=True)


def _wan(kind: str, join: str) -> Iterator[tuple[str, str]]:
    for block in range(2):
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            for name, layer in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True):
                yield join.join(("blocks", str(block), theirs, name)), f"blocks.{block}.{ours}.{layer}"
        for i, layer in ((0, "net.0.proj"), (2, "net.2")):
            yield join.join(("blocks", str(block), "ffn", str(i))), f"blocks.{block}.ffn.{layer}"


def wan(file: File) -> None:
    """Wan's own names, as ComfyUI and most trainers write them."""
    for name, module in _wan(file.kind.name, "."):
        file.add(f"diffusion_model.{name}", module, parts=PEFT)


def musubi_wan(file: File) -> None:
    """musubi-tuner: the same with underscores, and alphas."""
    for name, module in _wan(file.kind.name, "_"):
        file.add(f"lora_unet_{name}", module, alpha=2.0)


def qwen(file: File) -> None:
    """musubi-tuner's for Qwen-Image."""
    file.all_of(partial(_flat, "lora_unet_"), *_ATTENTION, alphas=True)


def qwen_dotted(file: File) -> None:
    """ComfyUI's for Qwen-Image."""
    file.all_of(partial(_dotted, "diffusion_model"), *_ATTENTION, parts=PEFT)


def ltx(file: File) -> None:
    """Lightricks' own."""
    file.all_of(partial(_dotted, "diffusion_model"), *_ATTENTION, parts=PEFT)


def z_image(file: File) -> None:
    """ComfyUI's for Z-Image."""
    file.all_of(partial(_dotted, "diffusion_model"), *_ATTENTION, parts=PEFT)


def musubi_z_image(file: File) -> None:
    """musubi-tuner's for Z-Image, alphas beside them."""
    names = _shapes(file.kind.name, file.kind.denoiser)
    for i, module in enumerate(name for name in names if name.endswith((".to_q", ".to_k", ".to_v"))):
        file.add(_flat("lora_unet_", module), module, alpha=1.0 + i % 2)


def hunyuan_video(file: File) -> None:
    """Tencent's own names."""
    file.add("diffusion_model.double_blocks.0.img_attn_qkv", *_in_block(*_QKV), parts=PEFT)
    file.add("diffusion_model.double_blocks.0.txt_attn_qkv", *_in_block(*_ADDED), parts=PEFT)
    file.add("diffusion_model.double_blocks.0.img_mlp.fc1", *_in_block("ff.net.0.proj"), parts=PEFT)
    file.add("diffusion_model.single_blocks.0.linear2", "single_transformer_blocks.0.proj_out", parts=PEFT)


def flux2(file: File) -> None:
    """Black Forest Labs' names of Flux 2."""
    file.add("diffusion_model.double_blocks.0.img_attn.qkv", *_in_block(*_QKV), parts=PEFT)
    file.add("diffusion_model.single_blocks.0.linear2", "single_transformer_blocks.0.attn.to_out", parts=PEFT)


def diffusers_sd(file: File) -> None:
    """diffusers' own older names, of attention processors."""
    name = "unet.{}.processor.to_{}_lora".format
    for module in _shapes("sd", "unet"):
        attention, _, layer = module.rpartition(".to_")
        if layer in ("q", "k", "v"):
            file.add(name(attention, layer), module, parts=("down.weight", "up.weight"))


@dataclass(frozen=True)
class Dialect:
    """Who writes LoRAs so, and for which pipeline."""

    name: str
    kind: Kind
    write: Callable[[File], None]

    def save(self, path: Path, *, seed: int, rank: int = 3) -> Path:
        """Write a file of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors(seed=seed, rank=rank), path)
        return path

    def tensors(self, *, seed: int, rank: int = 3) -> dict[str, Tensor]:
        """What is in the file."""
        file = File(self.kind, seed, rank)
        self.write(file)
        return file.tensors


DIALECTS = {
    f"{kind}: {write.__name__}": Dialect(f"{kind}: {write.__name__}", PIPELINES[kind], write)
    for kind, writers in {
        "sd": [kohya_sd, diffusers_sd],
        "sdxl": [kohya_sdxl],
        "flux": [kohya_flux, comfy_flux, mixed_flux, xlabs_flux, bfl_control, fal_kontext, flux_alphas],
        "flux2": [flux2],
        "wan": [wan, musubi_wan],
        "qwen-image": [qwen, qwen_dotted],
        "ltx": [ltx],
        "z-image": [z_image, musubi_z_image],
        "hunyuan-video": [hunyuan_video],
    }.items()
    for write in writers
}


@contextmanager
def sizes_of_the_tiny_flux(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """diffusers' converters of whole Flux LoRAs have that model's numbers of layers and widths in their code."""
    from diffusers.loaders import lora_pipeline

    sizes = {19: 1, 38: 1, 3072: 16}
    with patch.context() as patched:
        for name in ("_convert_bfl_flux_control_lora_to_diffusers", "_convert_fal_kontext_lora_to_diffusers"):
            function = getattr(lora_pipeline, name)
            constants = tuple(sizes.get(c, c) if isinstance(c, int) else c for c in function.__code__.co_consts)
            scaled = types.FunctionType(function.__code__.replace(co_consts=constants), function.__globals__, name)
            patched.setattr(lora_pipeline, name, scaled)
        yield
