"""Prompts without tokens, without a direction, and very long ones."""

import pytest
import torch
from conftest import PAD, adapted, batches, make_llama, prompts
from peft import get_peft_model
from speed.measure import Job, peak_memory

from peft_trex import SemanticRouter, TRexConfig, calibrate_trex_merge, routing_report, save_trex_as_lora
from peft_trex.prior.inputs import Inputs
from peft_trex.prior.semantic_prior import SemanticPrior


@pytest.mark.parametrize("whitened", [None, 2])
def test_an_embedding_without_a_direction_scores_zero(whitened):
    prior = SemanticPrior(3, 5, whitened)
    whitening = None if whitened is None else torch.randn(2, 5)
    for mean in (torch.randn(5), torch.zeros(5)):
        prior.set(torch.randn(3, whitened or 5), mean, torch.randn(3), whitening)
        scores = prior.score(torch.stack([mean, mean + 1]))
        assert not scores[0].any() and scores[1].any() and scores.isfinite().all()


def padded():
    """A prompt, and a row of nothing but padding."""
    ids = prompts(2)
    ids[1] = PAD
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def the_mean():
    """A prompt, and one of a single token, which stands where the prior's centre is."""
    batch = padded()
    batch["input_ids"][1, -1], batch["attention_mask"][1, -1] = 7, 1
    return batch


@pytest.fixture(params=[padded, the_mean])
def case(request):
    """A model, and a batch whose second row has no direction."""
    model, batch = adapted(), request.param()
    if request.param is the_mean:
        model.base_model.prior_of("default").mean.copy_(model.get_input_embeddings().weight[7])
    return model, batch


def labels_of(batch):
    return torch.where(torch.arange(9) < 5, -100, batch["input_ids"])


def forward(model, batch):
    loss = model(**batch, labels=labels_of(batch)).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    return model(**batch).logits[0]


def compiled(model, batch):
    torch.compiler.reset()
    return torch.compile(model, backend="eager")(**batch).logits[0]


def generated(model, batch):
    return model.generate(**batch, max_new_tokens=3, do_sample=False)[0]


def in_float16(model, batch):
    with torch.autocast("cpu", torch.float16):
        return model(**batch).logits[0]


@pytest.mark.filterwarnings("ignore:.*got neither labels:UserWarning", "ignore:.*without a prompt:UserWarning")
@pytest.mark.parametrize("road", [forward, compiled, generated, in_float16])
def test_a_row_without_a_direction_harms_no_other(case, road):
    model, batch = case
    scores = model.base_model.prompts.scorer.score(Inputs.of(batch), None, ["default"]).scores["default"]
    assert scores[0].any() and not scores[1].any()
    both = road(model, batch)
    alone = road(model, {name: value[:1] for name, value in batch.items()})
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=0.05 if road is in_float16 else 1e-4)


@pytest.mark.filterwarnings("ignore:.*got neither labels:UserWarning")
def test_a_row_without_a_direction_is_reported_calibrated_and_exported(case, tmp_path):
    model, batch = case
    report = routing_report(model, [batch], progress=False)
    assert all(torch.as_tensor(layer.omega).isfinite() for layer in report.layers.values())
    calibrated = calibrate_trex_merge(model, [*batches(), batch], per_cluster=True, progress=False)
    assert "nan" not in str(calibrated)
    save_trex_as_lora(model, tmp_path / "out")
    router = SemanticRouter.from_pretrained(tmp_path / "out")
    kept = [row[mask.bool()].tolist() for row, mask in zip(*batch.values(), strict=True)]
    assert [router.route(ids).cluster is None for ids in kept] == [False, True]


def test_a_batch_of_no_rows_and_one_of_no_tokens():
    scorer = adapted().base_model.prompts.scorer
    for shape, rows in (((0, 4), 0), ((2, 0), 2)):
        ids = torch.zeros(shape, dtype=torch.long)
        places = torch.zeros(shape, dtype=torch.long)
        embeds, places = scorer.embed(Inputs.of({"input_ids": ids, "position_ids": places, "labels": ids}), "default")
        assert embeds.shape == (rows, 32) and not embeds.any() and not places.known.any()


def rows_of(kind, ids):
    """8 long rows: prompts alone, with an answer each, with several answers each, or as embeddings."""
    place, half = torch.arange(ids.shape[1]), ids.shape[1] // 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "answers":
        batch["labels"] = torch.where(place < half, -100, ids)
    elif kind == "several answers":
        batch["labels"] = torch.where((place < half) | ((place > half + 100) & (place < half + 200)), -100, ids)
    elif kind == "embeddings":
        batch["inputs_embeds"] = torch.randn(*batch.pop("input_ids").shape, 512).bfloat16()
    return batch


@pytest.mark.filterwarnings("ignore:Some rows hold several answers:UserWarning")
@pytest.mark.parametrize("kind", ["prompts", "answers", "several answers", "embeddings"])
def test_long_prompts_take_no_more_memory_than_their_embeddings(kind):
    base = make_llama(hidden_size=512, num_hidden_layers=1).to(torch.bfloat16)
    model = get_peft_model(base, TRexConfig(r_a=2, r_b=3, num_clusters=4, target_modules=["q_proj"]))
    model.base_model.prior_of("default").set(torch.randn(4, 512), torch.randn(512), torch.randn(4))
    inputs, scorer = Inputs.of(rows_of(kind, prompts(8).repeat(1, 456)[:, :4096])), model.base_model.prompts.scorer
    embeddings = 8 * 4096 * 512 * 2  # bytes in bfloat16, which looking tokens up takes
    for run in (lambda: scorer.score(inputs, None, ["default"]), lambda: scorer.embed(inputs, "default")):
        beside = peak_memory(Job(run), "cpu") - embeddings * (kind != "embeddings")
        assert beside < 0.5 * embeddings
