"""The rows with which TREX joins the tables of PEFT's own tests, and what else is changed in them."""

from __future__ import annotations

from typing import Any

# test file with a table of configurations, and the task type of its models
TABLES = {
    "test_decoder_models.py": "CAUSAL_LM",
    "test_encoder_decoder_models.py": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models.py": "FEATURE_EXTRACTION",
    "test_seq_classifier.py": "SEQ_CLS",
}
# test files that are written for LoRA: regular expressions, and what turns LoRA into T-REX there
LORA_TO_TREX = [
    (r"lora_|_lora\b|(?<=[\"'])lora(?=[\"'])", lambda found: found[0].replace("lora", "trex")),
]
REPLACED: dict[str, list[tuple[str, Any]]] = {
    "test_low_level_api.py": [
        *LORA_TO_TREX,
        # a parameter, not a module
        (r'(trex_A\["default"\]|trex_B\.default)\.weight', r"\1"),
        # T-REX has more than A and B in a layer
        (
            r'del sd_before\["(\S+)\.trex_A\.weight"\]\n +del \S+',
            r'sd_before = {key: value for key, value in sd_before.items() if not key.startswith("\1.")}',
        ),
    ],
    "test_tuners_utils.py": [
        *LORA_TO_TREX,
        (r'(proj\.trex_[AB]\["\w+"\]), nn\.Linear', r"\1, nn.Parameter"),
        (r'"lora\.(Linear|Embedding)"', '"trex.Linear"'),
        (r'"lora\.Conv2d"', '"trex.Convolution"'),
        ('"LoraModel"', '"TRexModel"'),
        ('"LORA"', '"TREX"'),
        # a model with several kinds of layers to adapt; T-REX adapts no embeddings
        (r"(self\.emb[01] = )nn\.Embedding", r"\1nn.Linear"),
        # r_b is 8 unless told otherwise, as LoRA's rank is
        (r"\brank_pattern=", "r_b_pattern="),
        (r'\.r\["default"\]', '.trex_B["default"].shape[1]'),
        (r'\n +assert \S+\.scaling\["default"\][^\n]*', ""),
    ],
    # written for LoKr; a single expert, whose weight does not depend on the input, can be converted without loss
    "test_lora_conversion.py": [
        (r"\.lokr", ".trex_A"),
        (
            r"\Z",
            "\n\ndef LoKrConfig(r=None, **kwargs):\n"
            "    targets = {'target_modules': ['q_proj', 'v_proj']}\n"
            "    return TRexConfig(r_a=1, r_b=1, num_clusters=1, token_scale=512.0, **{**targets, **kwargs})\n",
        ),
        (r"weight shape \(16\)", "weight shape (32)"),  # of our models
    ],
    "test_mixed.py": [(r"PrefixTuningConfig\(\)", "TRexConfig()"), ("PREFIX_TUNING", "TREX")],
}

# name, model of PEFT's test file, arguments of TRexConfig. No name may be a part of another.
# These models have no prior. Their inputs and learning rate are so large that three steps may close the output's gate
# for good, from one start or another; from the paper's, they do not close it in the rows that ask for it here.
ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("Vanilla MLP 1 TRex", "MLP", {"target_modules": "lin0", "init_weights": "zero_router"}),
    ("Vanilla MLP 2 TRex", "MLP", {"target_modules": ["lin0"], "init_weights": "zero_router"}),
    ("Vanilla MLP 3 TRex", "MLP", {"target_modules": ["lin1"]}),
    ("Vanilla MLP 4 TRex", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("Vanilla MLP 5 TRex", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    (
        "Vanilla MLP 6 TRex",
        "MLP",
        {"target_modules": ["lin0"], "r_a": 2, "r_b": 3, "num_clusters": 5, "prior_map": "learned"},
    ),
    (
        "Vanilla MLP 7 TRex",
        "MLP",
        {"target_modules": ["lin0"], "expert_layout": "paired", "r_a": 4, "r_b": 4, "num_clusters": 4},
    ),
    ("Vanilla MLP 8 TRex", "MLP", {"target_modules": ["lin0"], "use_router": False}),
    ("Vanilla MLP 9 TRex", "MLP", {"target_modules": ["lin0", "lin1"], "use_prior": False}),
    ("Vanilla MLP 10 TRex", "MLP", {"target_modules": ["lin0"], "trex_dropout": 0.1, "init_weights": "zero_router"}),
    # a single expert has the weight 1 whatever the input, so that what merging adds is what the adapter adds
    ("Vanilla MLP 11 TRex", "MLP", {"target_modules": ["lin0", "lin1"], "r_a": 1, "r_b": 1, "num_clusters": 1}),
    ("Embedding + transformers Conv1D 1 TRex", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Embedding + transformers Conv1D 2 TRex", "EmbConv1D", {"target_modules": ["conv1d"], "fan_in_fan_out": True}),
    (
        "Embedding + transformers Conv1D 3 TRex",
        "EmbConv1D",
        {"target_modules": ["conv1d"], "r_a": 1, "r_b": 1, "num_clusters": 1},
    ),
]

# name, arguments of the first and of the second adapter, both on an MLP
PAIRS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "TRex Same",
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin0"], "init_weights": False},
    ),
    (
        "TRex Different",
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin1"], "init_weights": False},
    ),
    (
        "TRex one expert Same",
        {"target_modules": ["lin0"], "r_a": 1, "r_b": 1, "num_clusters": 1, "init_weights": False},
        {"target_modules": ["lin0"], "r_a": 1, "r_b": 1, "num_clusters": 1, "init_weights": False},
    ),
    (
        "TRex one expert Different",
        {"target_modules": ["lin0"], "r_a": 1, "r_b": 1, "num_clusters": 1, "init_weights": False},
        {"target_modules": ["lin1"], "r_a": 1, "r_b": 1, "num_clusters": 1, "init_weights": False},
    ),
]

# name, arguments of TRexConfig, and which tests run, for each model of the files in TABLES
CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("TRex default", {}, ""),
    ("TRex one expert", {"r_a": 1, "r_b": 1, "num_clusters": 1}, "merge|unload|lora_conversion"),
]
# name, arguments of TRexConfig, arguments of torch.compile: traced both ways, without minutes of code generation
COMPILED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("TRex all layers", {}, {"backend": "aot_eager", "torch_compile_backend": "aot_eager"}),
]
