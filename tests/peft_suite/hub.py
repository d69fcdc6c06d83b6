"""The hub models that PEFT's hotswap tests load: tiny ones of the same architectures, laid out as a cache.

Their weights are random, as are those of the models that they stand for. Nothing is downloaded.
"""

from pathlib import Path

import torch
from transformers import GptOssConfig, GptOssForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

REVISION = "0" * 40  # what a commit of the hub looks like


def _opt() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 4, "num_attention_heads": 4}
    config = OPTConfig(vocab_size=1024, num_hidden_layers=2, max_position_embeddings=100, **sizes)
    return OPTForCausalLM(config)


def _gpt_oss() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "head_dim": 8, "num_attention_heads": 4}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = GptOssConfig(vocab_size=1024, num_hidden_layers=1, num_key_value_heads=2, **sizes, **experts)
    return GptOssForCausalLM(config)


MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt,
    "trl-internal-testing/tiny-GptOssForCausalLM": _gpt_oss,
}


def build(cache: Path) -> None:
    """Writes every model into `cache`, laid out as `HF_HUB_CACHE` is."""
    disable_progress_bar()
    for model_id, make in MODELS.items():
        torch.manual_seed(0)
        folder = cache / f"models--{model_id.replace('/', '--')}"
        make().save_pretrained(folder / "snapshots" / REVISION)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(REVISION)
