"""Which of PEFT's hotswap tests are run: every one, less DESELECTED, by the names that PEFT gives them."""

CLASSES = ("tests/test_initialization.py::TestHotSwapping", "tests/test_gpu_examples.py::TestHotSwapping")

# They compile nothing, or never run what they compile: 4 s in all.
EAGER = (
    "test_hotswap_works[False-config0]",
    "test_hotswap_works[False-config1]",
    "test_hotswap_different_peft_types_raises",
    "test_hotswap_wrong_peft_types_raises",
    "test_hotswap_missing_key_works",
    "test_hotswap_extra_key_raises",
    "test_hotswap_works_different_ranks_alphas[ranks0]",
    "test_hotswap_works_different_ranks_alphas[ranks1]",
    "test_hotswap_works_different_ranks_alphas_conv2d[ranks0]",
    "test_hotswap_works_different_ranks_alphas_conv2d[ranks1]",
    "test_hotswap_works_different_ranks_conv2d_groups[ranks0]",
    "test_hotswap_works_different_ranks_conv2d_groups[ranks1]",
    "test_hotswap_raises_when_target_adapter_merged",
    "test_hotswap_allowed_when_other_adapter_merged",
    "test_prepare_model_for_compiled_hotswap_scalings_are_tensors",
    "test_prepare_model_for_compiled_hotswap_rank_padding_works",
    "test_prepare_model_for_compiled_hotswap_same_rank_padding_works",
    "test_prepare_model_for_compiled_hotswap_conv2d_rank_padding_works",
    "test_prepare_model_for_compiled_hotswap_conv2d_groups_rank_padding_works",
    "test_prepare_model_for_compiled_hotswap_conv2d_groups_rank_not_divisible_raises",
    "test_prepare_model_for_compiled_hotswap_lower_rank_padding_raises",
    "test_prepare_model_for_compiled_hotswap_with_rank_pattern",
    "test_prepare_model_for_compiled_hotswap_conserves_requires_grad[False]",
    "test_prepare_model_for_compiled_hotswap_conserves_requires_grad[True]",
    "test_prepare_model_for_compiled_hotswap_conv2d_conserves_requires_grad[False]",
    "test_prepare_model_for_compiled_hotswap_conv2d_conserves_requires_grad[True]",
    "test_prepare_model_for_compiled_hotswap_model_already_compiled_raises",
    "test_prepare_model_for_compiled_hotswap_model_already_compiled_warns",
    "test_prepare_model_for_compiled_hotswap_model_already_compiled_ignore",
    "test_prepare_model_for_compiled_hotswap_model_already_compiled_wrong_argument",
    "test_prepare_model_for_compiled_hotswap_model_no_adapter_raises",
    "test_prepare_model_for_compiled_hotswap_does_not_change_output",
    "test_prepare_model_for_compiled_hotswap_does_not_change_output_conv2d",
    "test_prepare_model_for_compiled_hotswap_scalings_update_config",
    "test_prepare_model_for_compiled_hotswap_lora_bias",
    "test_prepare_model_for_compiled_hotswap_conv2d_lora_bias",
)

# They run compiled models; all but the first two are in PEFT's module for GPUs, and pass on a CPU too.
COMPILED = (
    "test_hotswap_works[True-config0]",
    "test_hotswap_works[True-config1]",
    "test_hotswapping_compiled_model_does_not_trigger_recompilation[ranks0]",
    "test_hotswapping_compiled_model_does_not_trigger_recompilation[ranks1]",
    "test_hotswapping_compiled_model_does_not_trigger_recompilation[ranks2]",
    "test_no_hotswapping_compiled_model_triggers_recompilation",
    "test_hotswap_lora_target_parameters[False]",
    "test_hotswap_lora_target_parameters[True]",
)

# By function, with the reason.
DESELECTED = {
    "test_hotswapping_compiled_diffusers_model_does_not_trigger_recompilation": (
        "needs diffusers, and a Stable Diffusion pipeline with its tokenizer and text encoder"
    ),
}

# They ask for nothing that a hotswap which does nothing does not do.
NEED_NO_HOTSWAP = (
    "test_hotswap_allowed_when_other_adapter_merged",
    "test_prepare_model_for_compiled_hotswap_same_rank_padding_works",
    "test_prepare_model_for_compiled_hotswap_conserves_requires_grad[False]",
    "test_prepare_model_for_compiled_hotswap_conserves_requires_grad[True]",
    "test_prepare_model_for_compiled_hotswap_conv2d_conserves_requires_grad[False]",
    "test_prepare_model_for_compiled_hotswap_conv2d_conserves_requires_grad[True]",
    "test_prepare_model_for_compiled_hotswap_model_already_compiled_ignore",
    "test_prepare_model_for_compiled_hotswap_does_not_change_output",
    "test_prepare_model_for_compiled_hotswap_does_not_change_output_conv2d",
)
