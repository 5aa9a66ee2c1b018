"""Models that put the tokens first inside: a row of a batch is as alone, whatever the batch's shape."""

import pytest
import torch
from conftest import batches, prompts, randomize
from peft import get_peft_model
from transformers import (
    BertModel,
    FSMTConfig,
    FSMTForConditionalGeneration,
    LEDConfig,
    LEDForConditionalGeneration,
    LlamaModel,
    LongformerConfig,
    LongformerForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)
from transformers.models.fsmt.modeling_fsmt import FSMTEncoder
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.xlnet.modeling_xlnet import XLNetModel

from peft_trex import TRexConfig, initialize_trex_prior, routing_report
from peft_trex.prior.order import Order, turns_rows

WIDTHS = {"vocab_size": 64, "d_model": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "init_std": 0.3}
SIDES = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))
}


def longformer():
    config = LongformerConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        attention_window=4, max_position_embeddings=64, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return LongformerForSequenceClassification(config)


def xlnet():
    config = XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=48, pad_token_id=0)
    config.initializer_range, config.dropout, config.summary_last_dropout = 0.3, 0.0, 0.0
    return XLNetForSequenceClassification(config)


def led():
    places = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
    return LEDForConditionalGeneration(
        LEDConfig(**WIDTHS, **SIDES, **places, attention_window=[4], decoder_start_token_id=2)
    )


def fsmt():
    sizes = {"src_vocab_size": 64, "tgt_vocab_size": 64, "max_position_embeddings": 64}
    return FSMTForConditionalGeneration(FSMTConfig(langs=["a", "b"], **sizes, **WIDTHS, **SIDES))


MODELS = {"longformer": longformer, "xlnet": xlnet, "led": led, "fsmt": fsmt}


def turned(name, **settings):
    torch.manual_seed(0)
    two_sided = name in ("led", "fsmt")
    task = "SEQ_2_SEQ_LM" if two_sided else "SEQ_CLS"
    model = get_peft_model(MODELS[name](), TRexConfig(r_a=2, r_b=3, num_clusters=4, task_type=task, **settings))
    randomize(model)
    if settings.get("use_prior", True):
        initialize_trex_prior(model, batches(), progress=False)
    return model.double().eval()


def batch_of(name, rows, tokens):
    ids = prompts(rows, length=tokens, seed=3)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**batch, "decoder_input_ids": prompts(rows, length=5, seed=4)} if name in ("led", "fsmt") else batch


@torch.no_grad()
def assert_rows_are_as_alone(model, batch):
    together = model(**batch).logits
    for row in range(len(together)):
        alone = model(**{name: value[row : row + 1] for name, value in batch.items()}).logits[0]
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=0)
    steered = model(**batch, semantic_prior=1).logits
    assert (steered - together).abs().max() > 1e-2, "the prior takes part"


@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_as_alone(name):
    model = turned(name)
    # The last has as many rows as tokens.
    for rows, tokens in ((4, 8), (3, 10), (8, 8)):
        assert_rows_are_as_alone(model, batch_of(name, rows, tokens))


@pytest.mark.parametrize("name", MODELS)
def test_a_first_batch_that_does_not_tell_is_refused(name):
    model, square = turned(name), batch_of(name, 8, 8)
    with torch.no_grad(), pytest.raises(ValueError, match=r"as many rows as tokens, nothing tells which"):
        model(**square)
    assert_rows_are_as_alone(model, batch_of(name, 4, 8))
    assert_rows_are_as_alone(model, square)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"num_beams": 2, "use_cache": False}], ids=str)
@pytest.mark.parametrize("name", ["led", "fsmt"])
def test_a_row_is_generated_as_alone(name, settings):
    """FSMT's encoder, which generate runs by itself, is no model of its own."""
    model, ids = turned(name), prompts(3, length=8, seed=3)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **settings}
    together = model.generate(input_ids=ids, **settings)
    for row, new in zip(ids, together, strict=True):
        assert torch.equal(model.generate(input_ids=row[None], **settings)[0], new)
    assert not torch.equal(model.generate(input_ids=ids, semantic_prior=1, **settings), together)


def test_training_reaches_all_of_the_adapter():
    model = turned("xlnet").train()
    model(**batch_of("xlnet", 4, 8), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if "trex_" in name}
    assert grads and all(grad is not None and bool(grad.any()) for name, grad in grads.items() if "trex_B" in name)


def test_padding_stays_out_of_losses_and_reports():
    """The mask is (B, T) there, too."""
    losses, counted = [], []
    for pad in (0, 3):
        model = turned("longformer", balance_loss_coef=1.0).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        batch = batch_of("longformer", 4, 8)
        ids = torch.nn.functional.pad(batch["input_ids"], (0, 4), value=0)
        ids[1:, 8:] = 5
        mask = torch.ones_like(ids)
        mask[0, 8:] = 0
        # What padding holds must not matter.
        ids[0, 8:] = pad
        output = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 0, 1]))
        losses.append(output.router_loss if hasattr(output, "router_loss") else output.loss)
        report = routing_report(model, [{"input_ids": ids, "attention_mask": mask}], progress=False)
        counted.append(report.tokens)
    assert counted == [44, 44]
    torch.testing.assert_close(*losses, atol=1e-9, rtol=0)


def test_the_source_tells_who_turns_rows():
    assert all(map(turns_rows, (LongformerSelfAttention, XLNetModel, FSMTEncoder)))
    assert not any(map(turns_rows, (LlamaModel, BertModel, torch.nn.Linear)))


def test_one_call_tells_for_the_next():
    order = Order()
    assert not order.is_turned(torch.empty(5, 1, 2), 1)
    with pytest.raises(ValueError, match="nothing tells"):
        order.is_turned(torch.empty(3, 3, 2), 3)
    assert order.is_turned(torch.empty(5, 3, 2), 3) and order.is_turned(torch.empty(3, 3, 2), 3)
    assert order.is_turned(torch.empty(1, 3, 2), 3) and not order.is_turned(torch.empty(15, 2), 3)
    order = Order()
    assert not order.is_turned(torch.empty(3, 5, 2), 3) and not order.is_turned(torch.empty(3, 3, 2), 3)
