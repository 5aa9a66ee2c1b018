"""What of PEFT's own tests is not run with TREX, and what has to fail, each with its reason."""

from __future__ import annotations

from typing import NamedTuple

from peft_suite_rows import CONFIGS, ROWS


class Excluded(NamedTuple):
    """Tests that are not run: a regular expression on pytest's node id, why, and in which releases of PEFT."""

    pattern: str
    reason: str
    before: str = ""
    since: str = ""


class Expected(NamedTuple):
    """Tests that have to fail: how the line begins that fails, in which cases, why, and in which releases of PEFT."""

    function: str
    line: str
    cases: set[str]
    reason: str
    before: str = ""
    since: str = ""


OTHER = "is about another method"
NO_METHOD = "is about no method"
FROM_HUB = "loads weights from a hub that cannot be made here"
PARAMETERS = "target_parameters names weights for LoRA: T-REX takes it for blocks of experts, each as a whole"
TOKENS = "trainable_token_indices is LoRA's"
ALPHA = "alpha_pattern is LoRA's"
COUNTS = "states how many parameters LoRA of rank 8 has"
EMBEDDINGS = "reaches for LoRA's parameters of embedding layers"
PICKLE = "loads a pickle, which T-REX refuses: its adapters are safetensors"
BIASES = "loads biases that the configuration does not train, which T-REX refuses as tensors of the base model"
CONVERSION = "bounds the error of a conversion to LoRA, which for routed tokens hangs on the weights that are drawn"
MIXED = "PeftMixedModel refuses T-REX by name, which test_incompatible_config_raises sees"

EXCLUDED = [
    Excluded(r"low_level_api\.py.*\[(TinyLoRA|UniLoRA|VeRA|PVeRA|VBLoRA|FRoD|LoKrConfig)\]", OTHER),
    Excluded(r"low_level_api\.py.*\[(AdaLoRA|IA3|LoKr|RandLoRA)-", OTHER),
    Excluded(r"low_level_api\.py.*target_parameters", PARAMETERS),
    Excluded(r"low_level_api\.py.*test_inject_from_state_dict_stable_diffusion", FROM_HUB),
    Excluded(r"tuners_utils\.py.*(_ia3|_loha|vera|test_prefix_tuning|adaption_prompt)", OTHER),
    Excluded(r"tuners_utils\.py.*TestBaseTunerGetModelConfig", NO_METHOD),
    Excluded(
        r"tuners_utils\.py.*(test_find_minimal_target_modules|test_suffix_is_substring|test_filter_state)", NO_METHOD
    ),
    Excluded(r"tuners_utils\.py.*(test_no_matching_peft_module_error_hierarchy|_without_adapter|_vanilla)", NO_METHOD),
    Excluded(r"tuners_utils\.py.*test_transformers_model", FROM_HUB),
    Excluded(r"tuners_utils\.py.*(target(ed)?_param|TestTargetedParameterNames)", PARAMETERS),
    Excluded(r"tuners_utils\.py.*(trainable_tokens|tuner_layer_inside_auxiliary)", TOKENS),
    Excluded(r"tuners_utils\.py.*TestRankAndAlphaPattern.*_alpha_", ALPHA),
    Excluded(r"tuners_utils\.py.*test_(nb_params|model_with_injected|model_status_with_modules_to_save)", COUNTS),
    Excluded(r"tuners_utils\.py.*test_(model_requires_grad_model|requires_grad)_irregular", EMBEDDINGS),
    Excluded(r"tuners_utils\.py.*test_mixed_model_raises", MIXED),
    Excluded(r"lora_conversion\.py.*test_(miss|kasa|prompt_learning|peft_model_but|converted_lora_to_lora)", OTHER),
    Excluded(r"lora_conversion\.py.*test_no_peft_layer", NO_METHOD),
    Excluded(r"test_decoder_models\.py.*test_lora_conversion.*Gemma3", CONVERSION, before="0.21.2"),
    Excluded(r"test_save_pretrained(_selected_adapters)?_pickle", PICKLE),
    Excluded(r"custom_models\.py.*test_save_load_roundtrip_fsdp_wrapped_learnable_bias", BIASES),
    Excluded(r"test_mixed\.py.*::(?!test_incompatible_config_raises)test_", MIXED),
]

# the oldest release of PEFT runs with the oldest of transformers: `make test-lowest`
TIED = "merging into tied weights is refused; since transformers 5 PEFT's model of that test has none"
MEAN_ROUTING = "a merged weight is the same for all tokens and holds the mean routing; the adapter routes each token"
SILENT = "without a router, and with a prior that is not fitted and counts as zero, the adapter adds nothing"
IDLE_MAP = "a prior that is not fitted counts as zero, so that the learned map gets no gradient"
IDLE_ROUTER = "the softmax over one expert is constant, so that the router gets no gradient"
POOLER = "T-REX adapts all linear layers unless told otherwise, the pooler among them, which this loss does not reach"
ALL_LINEAR = "T-REX adapts all linear layers unless told otherwise, and not only LoRA's choice for the architecture"
PRIOR_KEY = "the prior is the model's, so that the keys of its tensors hold no layer's name"
LORA_KEYS = "the keys that are expected are those of LoRA's tensors"
RANK_ONE = "a single expert has rank one, which PEFT takes for the 1.0 that was asked for, and so for no exception"
UNGATHERED = "PEFT looks at tensors called lora_A and lora_B only"

MLP = "Vanilla MLP {} TRex"
CONV1D = "Embedding + transformers Conv1D {} TRex"
NO_ROUTER = {MLP.format(8)}
ONE_EXPERT = {MLP.format(11), CONV1D.format(3)}
LEARNED_MAP = {MLP.format(6)}
ROUTED = {name for name, *_ in ROWS} - NO_ROUTER - ONE_EXPERT
ROUTED_PAIRS = {"TRex Same", "TRex Different"}

# PEFT's own test of merging leaves out GPT2LMHeadModel, Llama and Gemma3
DECODERS = ["tiny-random-OPTForCausalLM", "tiny-random-GPTJForCausalLM", "tiny-dummy-qwen2"]
SEQ2SEQS = ["tiny-random-T5ForConditionalGeneration-calibrated", "tiny-random-BartForConditionalGeneration"]
POOLED = ["tiny-random-BertModel", "tiny-random-RobertaModel"]
ENCODERS = [*POOLED, "tiny-random-DebertaModel", "tiny-random-DebertaV2Model"]


def default(models: list[str], *before: str) -> set[str]:
    """Cases of our default row for these models, with the parameters that come before it."""
    return {"-".join([*before, CONFIGS[0][0], model]) for model in models}


EXPECTED: dict[str, list[Expected]] = {
    "test_custom_models.py": [
        Expected(
            "TestPeftCustomModel.test_merge_layers",
            "assert torch.allclose(logits, logits_merged,",
            ROUTED,
            MEAN_ROUTING,
        ),
        Expected(
            "TestPeftCustomModel.test_safe_merge",
            "assert torch.allclose(logits_peft, logits_unloaded,",
            ROUTED,
            MEAN_ROUTING,
        ),
        Expected(
            "TestPeftCustomModel.test_safe_merge",
            "assert not torch.allclose(logits_base, logits_peft,",
            NO_ROUTER,
            SILENT,
        ),
        Expected(
            "TestPeftCustomModel.test_disable_adapters_with_merging",
            "assert torch.allclose(outputs_after, outputs_unmerged,",
            ROUTED,
            MEAN_ROUTING,
        ),
        Expected(
            "TestPeftCustomModel.test_disable_adapters_with_merging",
            "assert not torch.allclose(outputs_before, outputs_after,",
            NO_ROUTER,
            SILENT,
        ),
        Expected(
            "TestPeftCustomModel.test_disable_adapters",
            "assert not torch.allclose(outputs_before, outputs_after,",
            NO_ROUTER,
            SILENT,
        ),
        Expected(
            "TestMultipleActiveAdapters.test_multiple_active_adapters_merge_and_unmerge",
            "assert torch.allclose(merged_combined_output, combined_output,",
            ROUTED_PAIRS,
            MEAN_ROUTING,
        ),
        Expected(
            "TestMultipleActiveAdapters.test_merge_layers_multi",
            "assert torch.allclose(outputs_merged_adapter_2, outputs_adapter_2,",
            ROUTED_PAIRS,
            MEAN_ROUTING,
        ),
        Expected(
            "TestPeftCustomModel.test_only_params_are_updated",
            "assert not torch.allclose(param_before, param_after,",
            NO_ROUTER,
            SILENT,
        ),
        Expected(
            "TestPeftCustomModel.test_only_params_are_updated",
            "assert not torch.allclose(param_before, param_after,",
            LEARNED_MAP,
            IDLE_MAP,
        ),
        Expected(
            "TestPeftCustomModel.test_only_params_are_updated",
            "assert not torch.allclose(param_before, param_after,",
            ONE_EXPERT,
            IDLE_ROUTER,
        ),
    ],
    "test_decoder_models.py": [
        Expected(
            "TestDecoderModels.test_merge_layers",
            "assert torch.allclose(logits, logits_merged,",
            default(DECODERS),
            MEAN_ROUTING,
        ),
        Expected(
            "TestDecoderModels.test_merge_layers_multi",
            "assert torch.allclose(logits_merged_adapter_2, logits_adapter_2,",
            default([*DECODERS, "tiny-random-GPT2LMHeadModel"]),
            MEAN_ROUTING,
        ),
        Expected(
            "TestDecoderModels.test_merge_layers_nan",
            "assert torch.allclose(logits_unmerged, logits_merged,",
            default(DECODERS),
            MEAN_ROUTING,
        ),
    ],
    "test_encoder_decoder_models.py": [
        Expected(
            "TestEncoderDecoderModels.test_merge_layers",
            "assert torch.allclose(logits, logits_merged,",
            default(SEQ2SEQS),
            MEAN_ROUTING,
        ),
    ],
    "test_feature_extraction_models.py": [
        Expected(
            "TestPeftFeatureExtractionModel.test_merge_layers",
            "assert torch.allclose(logits, logits_merged,",
            default(ENCODERS),
            MEAN_ROUTING,
        ),
        Expected(
            "TestPeftFeatureExtractionModel.test_training",
            "assert param.grad is not None",
            default(POOLED),
            POOLER,
        ),
        Expected(
            "TestPeftFeatureExtractionModel.test_training_gradient_checkpointing",
            "assert param.grad is not None",
            default(POOLED, "True") | default(POOLED, "False"),
            POOLER,
        ),
    ],
    "test_seq_classifier.py": [],
    "test_lora_conversion.py": [
        Expected(
            "TestLoraConversion.test_dynamic_rank_1_lora_config", "assert lora_config.rank_pattern", {""}, RANK_ONE
        ),
    ],
    "test_low_level_api.py": [
        Expected(
            "TestPeftStateDict.test_get_peft_model_state_dict_removes_adapter_name_when_same_as_module_name",
            'assert ("v_proj" in key) or ("q_proj" in key)',
            {""},
            PRIOR_KEY,
        ),
        Expected(
            "TestStateDictFsdpShapeValidation.test_save_pretrained_warns_for_unsharded_state_dict",
            "with pytest.warns(PeftWarning,",
            {""},
            UNGATHERED,
        ),
    ],
    "test_tuners_utils.py": [
        Expected(
            "TestBaseTunerWarnForTiedEmbeddings.test_warn_for_tied_embeddings_merge",
            "raise ValueError(",
            {""},
            TIED,
            before="0.21.2",
        ),
        Expected(
            "TestPeftCustomKwargs.test_module_matching_trex",
            "assert matched == expected",
            {""},
            ALL_LINEAR,
        ),
        Expected(
            "TestTargetedModuleNames.test_realistic_example",
            "assert model.targeted_module_names == expected",
            {""},
            ALL_LINEAR,
        ),
        Expected(
            "TestExcludedModuleNames.test_realistic_example",
            "assert model.targeted_module_names == expected",
            {""},
            ALL_LINEAR,
        ),
        Expected(
            "TestTunerStateDictKeyPrefixes.test_prefixes_select_correct_state_dict_keys",
            "assert sorted(state_dict) == expected",
            {""},
            LORA_KEYS,
        ),
    ],
    "test_mixed.py": [],
    "test_torch_compile.py": [],
}


def applies(entry: Excluded | Expected, release: str) -> bool:
    """Whether an entry is about a release of PEFT."""
    current = _numbers(release)
    return (not entry.before or current < _numbers(entry.before)) and (
        not entry.since or current >= _numbers(entry.since)
    )


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))
