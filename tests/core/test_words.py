"""Whoever writes LoRA's words, or those of another method, in a TRexConfig is told what to write instead."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import peft
import pytest
from conftest import make_llama
from packaging.version import Version
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peft_trex import TRexConfig

LORA = [one.name for one in dataclasses.fields(LoraConfig) if one.name not in TRexConfig.__dataclass_fields__]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "coming-from-lora.md"


def told(**words):
    """The sentence for each word that a configuration refuses."""
    with pytest.raises(TypeError, match="TRexConfig got an unexpected keyword argument: ") as caught:
        TRexConfig(**words)
    return dict(re.findall(r"^- (\w+): (.+)\.$", str(caught.value), re.MULTILINE))


@pytest.mark.parametrize("word", LORA)
def test_each_word_of_lora_has_its_sentence(word):
    if Version(peft.__version__) >= Version("0.22") and word not in PAGE.read_text():
        pytest.skip("a word that LoRA has learned since")
    text = told(**{word: 7})[word]
    # A field that is named is one that there is.
    assert set(re.findall(r"\bwrite (\w+)", text)) <= set(TRexConfig.__dataclass_fields__)
    assert text.startswith(("write ", "leave it out")) and "word of" not in text


def test_the_sentences_take_up_the_values_and_come_all_at_once():
    sentences = told(r=16, lora_alpha=32, lora_dropout=0.05)
    assert list(sentences) == ["r", "lora_alpha", "lora_dropout"]
    assert "r_a and r_b" in sentences["r"] and "TRexConfig.like_lora(16)" in sentences["r"]
    assert "token_scale and prior_scale" in sentences["lora_alpha"]
    assert "trex_dropout=0.05" in sentences["lora_dropout"]


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("rank", ["r_a and r_b"]),
        ("init_r", ["r_a and r_b"]),
        ("alpha", ["no alpha"]),
        ("psoft_alpha", ["no alpha"]),
        ("dropout", ["trex_dropout=7"]),
        ("vera_dropout", ["trex_dropout=7"]),
        ("rank_dropout", ["LoHaConfig, LoKrConfig"]),
        ("block_size", ["C3AConfig", "none"]),
        ("num_cluster", ["did you mean num_clusters"]),
        ("hexagon", ["help(TRexConfig)"]),
    ],
)
def test_words_of_other_methods_and_slips(word, parts):
    assert all(part in told(**{word: 7})[word] for part in parts)


def test_each_word_of_each_method_is_answered():
    words = {name for kind in PEFT_TYPE_TO_CONFIG_MAPPING.values() for name in kind.__dataclass_fields__}
    words -= set(TRexConfig.__dataclass_fields__)
    sentences = told(**dict.fromkeys(words, 7))
    assert set(sentences) == words
    assert not [word for word, text in sentences.items() if "no method of PEFT" in text or "did you mean" in text]


def test_own_words_pass_and_the_signature_stays():
    assert TRexConfig(r_a=2, trex_dropout=0.5).trex_dropout == 0.5
    parameters = inspect.signature(TRexConfig).parameters
    assert set(parameters) == set(TRexConfig.__dataclass_fields__)
    assert dataclasses.replace(TRexConfig(), r_a=2).r_a == 2
    with pytest.raises(TypeError, match="r_a and r_b"):
        dataclasses.replace(TRexConfig(), r=2)


def test_in_a_file_unknown_words_warn_as_before(tmp_path):
    TRexConfig(r_a=2).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 32}))
    for kind in (TRexConfig, PeftConfig):
        with pytest.warns(UserWarning, match="lora_alpha"):
            assert kind.from_pretrained(str(tmp_path)).r_a == 2


def trainable(config, width):
    base = make_llama(hidden_size=width, intermediate_size=width, num_key_value_heads=4, num_hidden_layers=1)
    model = get_peft_model(base, config)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("r", "form"),
    [(1, {}), (8, {}), (20, {}), (20, {"use_router": True}), (8, {"use_router": True, "router_rank": 2})],
)
def test_like_lora_trains_as_many_parameters_as_no_other_size_does(r, form):
    width, targets = 256, ["q_proj", "o_proj", "up_proj"]
    config = TRexConfig.like_lora(r, width, target_modules=targets, **form)
    assert config.r_a == config.r_b and config.target_modules == set(targets)
    wanted = trainable(LoraConfig(r=r, target_modules=targets), width)
    missed = abs(trainable(config, width) - wanted)
    for size in {config.r_a - 1, config.r_a + 1} - {0}:
        other = TRexConfig.recommended(r_a=size, r_b=size, target_modules=targets, **form)
        assert missed < abs(trainable(other, width) - wanted)


def test_like_lora_refuses_what_no_rank_is():
    for r in (0, 2.5, None, "8"):
        with pytest.raises((TypeError, ValueError), match=f"r={r!r} must be a whole number"):
            TRexConfig.like_lora(r)
    with pytest.raises(TypeError, match="r_a"):
        TRexConfig.like_lora(8, r_a=4)


def test_the_page_has_the_sizes_and_the_words():
    text = PAGE.read_text()
    header, *rows = re.findall(r"^\| (\d+|r) \|(.+)\|$", text, re.MULTILINE)
    widths = [int(width) for width in re.findall(r"\d+", header[1])]
    assert widths and len(rows) >= 5
    for r, sizes in rows:
        computed = [TRexConfig.like_lora(int(r), width).r_a for width in widths]
        assert [int(one) for one in re.findall(r"(\d+) x \1", sizes)] == computed
    assert not [word for word in LORA if f"`{word}`" not in text and Version(peft.__version__) < Version("0.22")]
