"""T-REX in sentence-transformers: an adapter that it adds, trains, saves and loads by itself."""

import pytest
import torch
from conftest import VOCAB, prompts, randomize
from peft import get_peft_model
from safetensors.torch import load_file
from texts import make_tokenizer, text
from transformers import BertConfig, BertModel

from peft_trex import TRexConfig, initialize_trex_prior
from peft_trex.model import find_tuner

pytest.importorskip("sentence_transformers")

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from sentence_transformers.models import Pooling, Transformer

SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def any_release_of_peft(monkeypatch):
    """transformers 5.24 asks for a release of PEFT that is not out, and works with those before."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")


def sentences(count=16, **kwargs):
    return [text(row) for row in prompts(count, **kwargs).tolist()]


def config():
    targets = {"target_modules": ["query", "value"], "task_type": "FEATURE_EXTRACTION"}
    return TRexConfig(r_a=2, r_b=3, num_clusters=4, **targets)


def make_encoder(folder):
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES, num_attention_heads=4)).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    return SentenceTransformer(modules=[Transformer(str(folder / "base")), Pooling(32)], device="cpu")


def fit(model):
    ids = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in prompts(32).split(8)]
    initialize_trex_prior(model, ids, progress=False)


def train(model, folder):
    options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    arguments = SentenceTransformerTrainingArguments(
        str(folder / "out"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, **options
    )
    pairs = Dataset.from_dict({"anchor": sentences(), "positive": sentences(seed=1)})
    loss = losses.MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=pairs, loss=loss).train()


@pytest.mark.parametrize("added", [True, False])
def test_train_save_and_load(tmp_path, added):
    """By `add_adapter`, and by a PeftModel in the place of its transformer."""
    model = make_encoder(tmp_path)
    if added:
        model.add_adapter(config())
    else:
        place = "model" if hasattr(model[0], "model") else "auto_model"
        setattr(model[0], place, get_peft_model(getattr(model[0], place), config()))
    fit(randomize(model))
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if "trex_" in name}
    train(model, tmp_path)
    changed = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed == {name for name in before if not torch.equal(before[name], dict(model.named_parameters())[name])}
    assert changed == set(before)
    embeddings = model.encode(sentences(seed=2))
    model.save(str(tmp_path / "saved"))
    keys = load_file(next((tmp_path / "saved").rglob("adapter_model.safetensors")))
    assert "base_model.trex_prior.centroids" in keys
    assert "base_model.model.encoder.layer.1.attention.self.query.trex_A" in keys
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert find_tuner(loaded).prior_of("default").fitted
    assert abs(embeddings - loaded.encode(sentences(seed=2))).max() < 1e-5
    # Rows of several lengths in a batch, each of its own prior.
    alone = torch.stack([torch.tensor(loaded.encode([row])[0]) for row in ["w5 w9", *sentences(3, seed=3)]])
    together = torch.tensor(loaded.encode(["w5 w9", *sentences(3, seed=3)]))
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    loaded.disable_adapters()
    plain = make_encoder(tmp_path).encode(sentences(seed=2))
    assert abs(plain - loaded.encode(sentences(seed=2))).max() < 1e-5 < abs(plain - embeddings).max()
