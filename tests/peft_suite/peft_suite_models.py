"""Tiny models, a tokenizer and a text data set that stand in for those which PEFT's tests fetch from a hub.

They are written under the very names that the tests ask for, relative to the folder that the tests run in:
`from_pretrained` and `load_dataset` take an existing folder before they think of a hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HUB_ID = re.compile(r'"([\w-]+/[\w.-]+)"')
QUOTES = "ybelkada/english_quotes_copy"

# weights that are large enough for adapters to be seen in the outputs; no dropout, for outputs that can be compared
BASE = {"vocab_size": 96, "hidden_size": 32, "initializer_range": 0.2, "num_attention_heads": 4}
BERT = {
    **BASE,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 96,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LLAMA = {
    **BASE,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
GPT2 |= {"bos_token_id": 94, "eos_token_id": 95, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CLIP = {**BASE, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 77}
OPT = {**BASE, "ffn_dim": 48, "num_hidden_layers": 2, "word_embed_proj_dim": 32, "dropout": 0.0, "init_std": 0.2}
OPT |= {"max_position_embeddings": 128}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
T5 |= {"decoder_start_token_id": 0, "initializer_factor": 2.0}
BART = {"vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 96}
BART |= {"dropout": 0.0, "init_std": 0.2}

# what a hub id's last part begins with (the first that fits counts), class, arguments of its configuration
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("tiny-OPTForCausalLM-lora", "", {}),  # named in a configuration only
    ("tiny-random-OPTForCausalLM", "OPTForCausalLM", OPT),
    ("opt-125m", "OPTForCausalLM", {**OPT, "num_hidden_layers": 12}),
    ("tiny-random-GPT2LMHeadModel", "GPT2LMHeadModel", GPT2),
    ("tiny-random-gpt2", "GPT2LMHeadModel", GPT2),
    ("tiny-random-GPTJForCausalLM", "GPTJForCausalLM", {**GPT2, "rotary_dim": 4}),
    (
        "tiny-random-GPTBigCodeForCausalLM",
        "GPTBigCodeForCausalLM",
        GPT2,
    ),
    (
        "tiny-random-gpt_neo",
        "GPTNeoForCausalLM",
        {
            **BASE,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 128,
            "bos_token_id": 94,
            "eos_token_id": 95,
        },
    ),
    (
        "tiny-random-GPTNeoXForCausalLM",
        "GPTNeoXForCausalLM",
        {**BASE, "intermediate_size": 48, "num_hidden_layers": 2},
    ),
    ("tiny-random-BloomForCausalLM", "BloomForCausalLM", {**BASE, "n_layer": 5, "n_head": 4}),
    ("tiny-random-LlamaForCausalLM", "LlamaForCausalLM", LLAMA),
    ("tiny-LlamaForSequenceClassification", "LlamaForSequenceClassification", {**LLAMA, "num_labels": 1}),
    ("tiny-random-MistralForCausalLM", "MistralForCausalLM", LLAMA),
    ("tiny-dummy-qwen2", "Qwen2ForCausalLM", LLAMA),
    ("tiny-random-Gemma3ForCausalLM", "Gemma3ForCausalLM", {**LLAMA, "head_dim": 8}),
    ("tiny-random-t5", "T5ForConditionalGeneration", T5),
    ("tiny-random-T5ForConditionalGeneration", "T5ForConditionalGeneration", T5),
    ("flan-t5-small", "T5ForConditionalGeneration", T5),
    ("tiny-random-BartForConditionalGeneration", "BartForConditionalGeneration", BART),
    ("tiny-clip-text-2", "CLIPTextModel", CLIP),
    ("tiny-random-BertModel", "BertModel", BERT),
    ("tiny-random-BertForSequenceClassification", "BertForSequenceClassification", BERT),
    ("tiny-random-RobertaModel", "RobertaModel", BERT),
    ("tiny-random-RobertaForSequenceClassification", "RobertaForSequenceClassification", BERT),
    ("tiny-random-DebertaModel", "DebertaModel", BERT),
    ("tiny-random-DebertaV2Model", "DebertaV2Model", BERT),
]


def make_hub(folder: Path, texts: Iterable[str]) -> None:
    """Write every model that the sources of the tests name, and the data set, into `folder`."""
    names = sorted({name for text in texts for name in HUB_ID.findall(text)})
    for name in names:
        for start, class_name, arguments in MODELS:
            if name.partition("/")[2].startswith(start):
                if class_name:
                    _make_model(class_name, arguments).save_pretrained(folder / name)
                    _make_tokenizer().save_pretrained(folder / name)
                break
    (folder / QUOTES).mkdir(parents=True)
    rows = [
        {
            "quote": " ".join(f"w{(7 * row + step * (row % 5 + 1)) % 90}" for step in range(6 + row % 5)),
            "author": "",
            "tags": [],
        }
        for row in range(40)
    ]
    (folder / QUOTES / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _make_model(class_name: str, arguments: dict[str, Any]) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**arguments))


def _make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {
        word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *(f"w{n}" for n in range(90))])
    }
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
    )
