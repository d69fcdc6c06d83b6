"""Tiny random diffusers pipelines, one for each way of keeping LoRAs, and the LoRA files that diffusers itself saves.

No downloads: components come from configs and a seed. A component that carries LoRA is there, and a VAE, a tokenizer or
a text encoder that carries none is not: what is compared are forward passes of the components.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoKrConfig, LoraConfig, PeftConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CLIP = ("q_proj", "k_proj", "v_proj", "out_proj")
SEED = 0
_COMPUTED = (torch.float32, torch.bfloat16, torch.float16)  # and not what layers are merely stored in

Components = dict[str, Callable[[], nn.Module]]


@dataclass(frozen=True)
class Kind:
    """One kind of pipeline.

    Attributes:
        name: in the zoo.
        pipeline: class in diffusers.
        components: name → what builds it; those that carry LoRA, in diffusers' order.
        inputs: name → arguments of its forward pass.
        targets: name → module names, each of which LoRAs of several subsets may have.
        arguments: other arguments of the pipeline's class, None for a component that is left out.
    """

    name: str
    pipeline: str
    components: Components
    inputs: Mapping[str, Callable[[], dict[str, Any]]]
    targets: Mapping[str, tuple[str, ...]]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def build(self, seed: int = SEED, dtype: torch.dtype = torch.float32) -> Any:
        """The pipeline: equal seeds make equal weights."""
        import diffusers

        cls = getattr(diffusers, self.pipeline)
        built = {name: self.component(name, seed, dtype) for name in self.components}
        absent = dict.fromkeys(_wanted(cls) - built.keys() - self.arguments.keys())
        pipe = cls(**{**absent, **built, **self.arguments})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def outputs(self, pipe: Any, **options: Any) -> dict[str, Tensor]:
        """What each component computes, by name.

        Args:
            pipe: the pipeline.
            **options: further arguments of the forward passes of diffusers' own models.
        """
        outputs = {}
        for name in self.components:
            model = getattr(pipe, name)
            dtype = next(p.dtype for p in model.parameters() if p.dtype in _COMPUTED)
            inputs = {key: _as(value, dtype) for key, value in self.inputs[name]().items()}
            if not name.startswith("text_encoder"):
                inputs.update(options)
            with torch.no_grad():
                outputs[name] = _tensor(model(**inputs)).clone()
        return outputs

    def component(self, name: str, seed: int = SEED, dtype: torch.dtype = torch.float32) -> nn.Module:
        """One of the pipeline's components, as `build` makes it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1_000 * seed + list(self.components).index(name))
            model = _lively(self.components[name]()).eval().requires_grad_(False)
        return model if dtype == torch.float32 else model.to(dtype)

    @property
    def denoiser(self) -> str:
        """Name of the component that every LoRA for it has."""
        return next(name for name in self.components if name in ("unet", "transformer"))


def _wanted(cls: Any) -> set[str]:
    """Names of the components that the pipeline's class has no default for."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {p.name for p in parameters if p.default is inspect.Parameter.empty}


def _lively(model: nn.Module) -> nn.Module:
    """What is initialised to zero or one, as gates and norms, would hide what LoRAs do: every parameter is random."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter.ndim < 2 or not parameter.any()):
            nn.init.normal_(parameter, 0.5, 0.2)
    return model


def _tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    for key in ("sample", "last_hidden_state"):
        if hasattr(output, key):
            found = getattr(output, key)
            return torch.stack(list(found)) if isinstance(found, list | tuple) else found
    return _tensor(output[0])


def _as(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return [_as(item, dtype) for item in value] if isinstance(value, list) else value


# -- the zoo ---------------------------------------------------------------------------------------------------------


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _model(name: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import diffusers

        model: nn.Module = getattr(diffusers, name)(**config)
        return model

    return make


def _clip(*, projected: bool = False) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        config = CLIPTextConfig(
            hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2, vocab_size=32,
            max_position_embeddings=8, projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )  # fmt: skip
        return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)

    return make


def _connectors() -> nn.Module:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    model: nn.Module = LTX2TextConnectors(
        caption_channels=8, text_proj_in_factor=3, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=4, video_connector_num_layers=1,
        video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=4, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None, rope_double_precision=False, rope_type="split",
    )  # fmt: skip
    return model


def _tokens() -> dict[str, Any]:
    return {"input_ids": torch.tensor([[0, 5, 9, 17, 1]])}


def _time(value: float = 7.0) -> Tensor:
    return torch.tensor([value])


_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
    "cross_attention_dim": 16,
}
_UNET_XL: dict[str, Any] = {
    **_UNET,
    "cross_attention_dim": 32,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 40,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
}
_CONVOLUTIONS = ("conv1", "conv_shortcut", "proj_in")


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler()


def _unet_inputs() -> dict[str, Any]:
    return {"sample": _random(1, 4, 8, 8), "timestep": 7, "encoder_hidden_states": _random(1, 5, 16, seed=1)}


def _unet_xl_inputs() -> dict[str, Any]:
    added = {"text_embeds": _random(1, 16, seed=2), "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]])}
    return _unet_inputs() | {"encoder_hidden_states": _random(1, 5, 32, seed=1), "added_cond_kwargs": added}


def _motion_inputs() -> dict[str, Any]:
    return {"sample": _random(1, 4, 2, 8, 8), "timestep": 7, "encoder_hidden_states": _random(2, 5, 16, seed=1)}


_FLUX: dict[str, Any] = {
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}


def _flux_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _random(1, 4, 8),
        "encoder_hidden_states": _random(1, 3, 16, seed=1),
        "pooled_projections": _random(1, 16, seed=2),
        "timestep": _time(0.5),
        "img_ids": torch.tensor([[0.0, i // 2, i % 2] for i in range(4)]),
        "txt_ids": torch.zeros(3, 3),
        "guidance": _time(1.0),
    }


def _chroma_inputs() -> dict[str, Any]:
    inputs = _flux_inputs()
    return {key: inputs[key] for key in inputs if key not in ("pooled_projections", "guidance")}


def _flux2_inputs() -> dict[str, Any]:
    inputs = _flux_inputs()
    del inputs["pooled_projections"]
    ids = torch.tensor([[0.0, i // 2, i % 2, 0] for i in range(4)])
    return inputs | {"img_ids": ids, "txt_ids": torch.zeros(3, 4)}


def _sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _random(1, 4, 8, 8),
        "encoder_hidden_states": _random(1, 3, 16, seed=1),
        "pooled_projections": _random(1, 32, seed=2),
        "timestep": _time(),
    }


_WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def _wan_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _random(1, 4, 2, 4, 4),
        "timestep": _time(),
        "encoder_hidden_states": _random(1, 3, 16, seed=1),
    }


def _ltx_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _random(1, 8, 8),
        "encoder_hidden_states": _random(1, 3, 16, seed=1),
        "timestep": _time(),
        "encoder_attention_mask": torch.ones(1, 3, dtype=torch.bool),
        "num_frames": 2,
        "height": 2,
        "width": 2,
    }


def _qwen_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _random(1, 4, 16),
        "encoder_hidden_states": _random(1, 3, 16, seed=1),
        "encoder_hidden_states_mask": torch.ones(1, 3, dtype=torch.bool),
        "timestep": _time(0.5),
        "img_shapes": [(1, 2, 2)],
    }


def _z_image_inputs() -> dict[str, Any]:
    return {"x": [_random(4, 1, 4, 4)], "t": _time(0.5), "cap_feats": [_random(3, 16, seed=1)]}


def _hunyuan_video_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _random(1, 4, 2, 4, 4),
        "timestep": _time(),
        "encoder_hidden_states": _random(1, 3, 16, seed=1),
        "encoder_attention_mask": torch.ones(1, 3, dtype=torch.bool),
        "pooled_projections": _random(1, 8, seed=2),
        "guidance": _time(1000.0),
    }


def _text_and_image(channels: int = 4, *, time: float = 7.0) -> Callable[[], dict[str, Any]]:
    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": _random(1, channels, 4, 4),
            "encoder_hidden_states": _random(1, 3, 16, seed=1),
            "timestep": _time(time),
        }

    return inputs


def _masked(inputs: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    return lambda: inputs() | {"encoder_attention_mask": torch.ones(1, 3, dtype=torch.bool)}


def _cogvideox_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _random(1, 1, 4, 8, 8),
        "encoder_hidden_states": _random(1, 4, 16, seed=1),
        "timestep": _time(),
    }


def _mochi_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _random(1, 4, 2, 4, 4),
        "encoder_hidden_states": _random(1, 3, 16, seed=1),
        "timestep": _time(),
        "encoder_attention_mask": torch.ones(1, 3, dtype=torch.bool),
    }


def _kandinsky_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _random(1, 1, 4, 4, 4),
        "encoder_hidden_states": _random(1, 3, 16, seed=1),
        "timestep": _time(),
        "pooled_projections": _random(1, 8, seed=2),
        "visual_rope_pos": [torch.arange(1), torch.arange(2), torch.arange(2)],
        "text_rope_pos": torch.arange(3),
    }


def _cogview_inputs() -> dict[str, Any]:
    size = torch.tensor([[4.0, 4.0]])
    return _text_and_image()() | {"original_size": size, "target_size": size, "crop_coords": torch.zeros(1, 2)}


def _ltx2_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _random(1, 8, 8),
        "audio_hidden_states": _random(1, 4, 8, seed=1),
        "encoder_hidden_states": _random(1, 4, 16, seed=2),
        "audio_encoder_hidden_states": _random(1, 4, 16, seed=3),
        "timestep": _time(),
        "num_frames": 2,
        "height": 2,
        "width": 2,
        "audio_num_frames": 4,
    }


def _connectors_inputs() -> dict[str, Any]:
    return {"text_encoder_hidden_states": _random(1, 4, 8, 3), "attention_mask": torch.ones(1, 4, dtype=torch.long)}


_SD = Kind(
    "sd",
    "StableDiffusionPipeline",
    {"unet": _model("UNet2DConditionModel", **_UNET), "text_encoder": _clip()},
    {"unet": _unet_inputs, "text_encoder": _tokens},
    {"unet": (*ATTENTION, *_CONVOLUTIONS), "text_encoder": CLIP},
    {"requires_safety_checker": False},
)
_SDXL = Kind(
    "sdxl",
    "StableDiffusionXLPipeline",
    {
        "unet": _model("UNet2DConditionModel", **_UNET_XL),
        "text_encoder": _clip(),
        "text_encoder_2": _clip(projected=True),
    },
    {"unet": _unet_xl_inputs, "text_encoder": _tokens, "text_encoder_2": _tokens},
    {"unet": (*ATTENTION, "ff.net.2"), "text_encoder": CLIP, "text_encoder_2": CLIP},
)
_SD3 = Kind(
    "sd3",
    "StableDiffusion3Pipeline",
    {
        "transformer": _model(
            "SD3Transformer2DModel", sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=32,
            pos_embed_max_size=8,
        ),
        "text_encoder": _clip(projected=True),
        "text_encoder_2": _clip(projected=True),
    },
    {"transformer": _sd3_inputs, "text_encoder": _tokens, "text_encoder_2": _tokens},
    {"transformer": ATTENTION, "text_encoder": CLIP, "text_encoder_2": CLIP},
)  # fmt: skip
_FLUX_KIND = Kind(
    "flux",
    "FluxPipeline",
    {
        "transformer": _model("FluxTransformer2DModel", **_FLUX, pooled_projection_dim=16, guidance_embeds=True),
        "text_encoder": _clip(),
    },
    {"transformer": _flux_inputs, "text_encoder": _tokens},
    {"transformer": (*ATTENTION, "proj_mlp"), "text_encoder": CLIP},
)


def _denoiser(name: str, pipeline: str, model: Any, inputs: Any, targets: tuple[str, ...] = ATTENTION) -> Kind:
    return Kind(name, pipeline, {"transformer": model}, {"transformer": inputs}, {"transformer": targets})


_WAN_22 = Kind(
    "wan22",
    "WanPipeline",
    {"transformer": _model("WanTransformer3DModel", **_WAN), "transformer_2": _model("WanTransformer3DModel", **_WAN)},
    {"transformer": _wan_inputs, "transformer_2": _wan_inputs},
    {"transformer": ATTENTION, "transformer_2": ATTENTION},
    {"boundary_ratio": 0.9},
)
_LTX2 = Kind(
    "ltx2",
    "LTX2Pipeline",
    {
        "transformer": _model(
            "LTX2VideoTransformer3DModel", in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8,
            cross_attention_dim=16, audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=2,
            audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=1, caption_channels=16,
            rope_double_precision=False, rope_type="split",
        ),
        "connectors": _connectors,
    },
    {"transformer": _ltx2_inputs, "connectors": _connectors_inputs},
    {"transformer": ATTENTION, "connectors": ATTENTION},
)  # fmt: skip

KINDS = [
    _SD,
    _SDXL,
    _SD3,
    _FLUX_KIND,
    _denoiser("wan", "WanPipeline", _model("WanTransformer3DModel", **_WAN), _wan_inputs),
    _WAN_22,
    _denoiser(
        "ltx",
        "LTXPipeline",
        _model(
            "LTXVideoTransformer3DModel", in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8,
            cross_attention_dim=16, num_layers=1, caption_channels=16,
        ),
        _ltx_inputs,
    ),
    _LTX2,
    _denoiser(
        "qwen-image",
        "QwenImagePipeline",
        _model(
            "QwenImageTransformer2DModel", in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
        ),
        _qwen_inputs,
    ),
    _denoiser(
        "z-image",
        "ZImagePipeline",
        _model(
            "ZImageTransformer2DModel", in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
            cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[64, 32, 32],
        ),
        _z_image_inputs,
        (*ATTENTION, "w2"),
    ),
    _denoiser(
        "hunyuan-video",
        "HunyuanVideoPipeline",
        _model(
            "HunyuanVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2,
            attention_head_dim=8, num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=2,
            text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 2, 4),
        ),
        _hunyuan_video_inputs,
    ),
    _denoiser(
        "auraflow",
        "AuraFlowPipeline",
        _model(
            "AuraFlowTransformer2DModel", sample_size=4, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
            attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16,
            pos_embed_max_size=16,
        ),
        _text_and_image(time=0.5),
    ),
    _denoiser(
        "sana",
        "SanaPipeline",
        _model(
            "SanaTransformer2DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
            num_layers=1, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
            caption_channels=16, sample_size=4,
        ),
        _text_and_image(),
    ),
    _denoiser(
        "cogvideox",
        "CogVideoXPipeline",
        _model(
            "CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            time_embed_dim=4, text_embed_dim=16, num_layers=1, sample_width=8, sample_height=8, sample_frames=1,
            max_text_seq_length=4,
        ),
        _cogvideox_inputs,
    ),
    _denoiser(
        "lumina2",
        "Lumina2Pipeline",
        _model(
            "Lumina2Transformer2DModel", sample_size=4, in_channels=4, hidden_size=24, num_layers=1,
            num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=8,
            axes_dim_rope=(4, 2, 2), axes_lens=(64, 32, 32), cap_feat_dim=16,
        ),
        _masked(_text_and_image(time=0.5)),
    ),
    _denoiser(
        "mochi",
        "MochiPipeline",
        _model(
            "MochiTransformer3DModel", num_attention_heads=2, attention_head_dim=8, num_layers=2,
            pooled_projection_dim=16, in_channels=4, text_embed_dim=16, time_embed_dim=4, max_sequence_length=16,
        ),
        _mochi_inputs,
    ),
    _denoiser(
        "chroma",
        "ChromaPipeline",
        _model(
            "ChromaTransformer2DModel", **_FLUX, approximator_num_channels=8, approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        _chroma_inputs,
    ),
    _denoiser(
        "flux2",
        "Flux2Pipeline",
        _model("Flux2Transformer2DModel", **_FLUX | {"axes_dims_rope": (2, 2, 2, 2)}, timestep_guidance_channels=16),
        _flux2_inputs,
        (*ATTENTION, "to_qkv_mlp_proj"),
    ),
    _denoiser(
        "kandinsky5",
        "Kandinsky5T2VPipeline",
        _model(
            "Kandinsky5Transformer3DModel", in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8,
            time_dim=8, model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(2, 2, 4),
        ),
        _kandinsky_inputs,
        ("to_query", "to_key", "to_value"),
    ),
    _denoiser(
        "cogview4",
        "CogView4Pipeline",
        _model(
            "CogView4Transformer2DModel", in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
            num_attention_heads=2, text_embed_dim=16, time_embed_dim=8, condition_dim=4, rope_axes_dim=(8, 8),
        ),
        _cogview_inputs,
    ),
    Kind(
        "animatediff",
        "AnimateDiffPipeline",
        {"unet": _model(
            "UNetMotionModel", sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
            up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"), cross_attention_dim=16, num_attention_heads=2,
            motion_num_attention_heads=2, motion_max_seq_length=4,
        ), "text_encoder": _clip()},
        {"unet": _motion_inputs, "text_encoder": _tokens},
        {"unet": ATTENTION, "text_encoder": CLIP},
    ),
]  # fmt: skip
PIPELINES = {kind.name: kind for kind in KINDS}


# -- LoRA files ------------------------------------------------------------------------------------------------------


def lora_tensors(
    kind: Kind, *, seed: int, targets: Mapping[str, Any], dtype: torch.dtype = torch.float32, **config: Any
) -> tuple[dict[str, dict[str, Tensor]], dict[str, LoraConfig]]:
    """Random LoRAs as a trainer has them: component → PEFT's state dict, and → the config.

    Args:
        kind: of the pipeline.
        seed: equal seeds make equal values.
        targets: component → `target_modules`.
        dtype: of the tensors.
        **config: of `peft.LoraConfig`.
    """
    states, configs = {}, {}
    for i, (name, modules) in enumerate(targets.items()):
        model = kind.component(name)
        configs[name] = LoraConfig(target_modules=modules if isinstance(modules, str) else list(modules), **config)
        inject_adapter_in_model(configs[name], model, "default")
        generator, state = torch.Generator().manual_seed(1_000 * seed + i), {}
        for key, tensor in get_peft_model_state_dict(model, adapter_name="default").items():
            noise = torch.randn(tensor.shape, generator=generator) / 2
            # a magnitude is about a norm; other values would hide what a wrong norm does
            state[key] = (tensor * (1 + noise / 2) if "magnitude" in key else noise).to(dtype).contiguous()
        states[name] = state
    return states, configs


def make_lora(
    kind: Kind,
    folder: Path,
    *,
    seed: int,
    components: tuple[str, ...] | None = None,
    targets: Mapping[str, Any] | None = None,
    metadata: bool = True,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Save a random LoRA for the pipeline as diffusers' `save_lora_weights` saves one.

    Args:
        kind: of the pipeline.
        folder: to save into, made if need be.
        seed: equal seeds make equal values.
        components: those that get LoRA layers, by default the denoiser alone.
        targets: component → `target_modules`, where they are not the kind's.
        metadata: whether the file says with which config it was trained; else alpha is the rank.
        dtype: of the tensors.
        **config: of `peft.LoraConfig`: r, lora_alpha, rank_pattern, use_rslora, use_dora, lora_dropout, lora_bias …

    Returns:
        The folder.
    """
    wanted = {name: kind.targets[name] for name in components or (targets or {kind.denoiser: ()})} | dict(targets or {})
    states, configs = lora_tensors(kind, seed=seed, targets=wanted, dtype=dtype, **config)
    save_lora(kind, folder, states, configs if metadata else {})
    return folder


def make_lokr(folder: Path, *, seed: int, kind: Kind | None = None, **config: Any) -> Path:
    """Save a random LoKr for the transformer, as diffusers saves a LoRA.

    Args:
        folder: to save into, made if need be.
        seed: equal seeds make equal values.
        kind: of the pipeline, by default Flux 2; diffusers loads LoKr into that and Z-Image, and into a model alone.
        **config: of `peft.LoKrConfig`.
    """
    kind = kind or PIPELINES["flux2"]
    model, stated = kind.component("transformer"), {"r": 2, "alpha": 3, "target_modules": ["to_q"], **config}
    inject_adapter_in_model(LoKrConfig(**stated, init_weights=False), model, "default")
    noise = torch.Generator().manual_seed(seed)
    tensors = {
        key: torch.randn(value.shape, generator=noise)
        for key, value in get_peft_model_state_dict(model, adapter_name="default").items()
    }
    save_lora(kind, folder, {"transformer": tensors}, {"transformer": LoKrConfig(**stated)})
    return folder


def save_lora(
    kind: Kind, folder: Path, states: Mapping[str, dict[str, Tensor]], configs: Mapping[str, PeftConfig]
) -> None:
    """Save state dicts by component, by what all of diffusers' `save_lora_weights` call.

    Theirs differ in their parameters, and Wan's and LTX2's know of one component where loading knows of two.
    """
    import diffusers

    said = {name: configs[name].to_dict() if name in configs else None for name in states}
    getattr(diffusers, kind.pipeline)._save_lora_weights(folder, lora_layers=dict(states), lora_metadata=said)


def load_plain(pipe: Any, source: Path | dict[str, Tensor], name: str = "style", **options: Any) -> None:
    """The oracle: load a LoRA as diffusers does, into all components that it is for."""
    pipe.load_lora_weights(source, adapter_name=name, **options)
    if getattr(pipe, "transformer_2", None) is not None:  # which diffusers leaves out of one file's
        options = {"prefix": "transformer_2", "use_safetensors": True, "adapter_name": name}
        pipe.transformer_2.load_lora_adapter(source, **options)
