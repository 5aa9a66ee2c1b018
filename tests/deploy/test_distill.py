"""calibrate_trex_merge(distill_steps=n): static weights that learn the routed model's logits, and are never worse."""

import warnings

import pytest
import torch
from conftest import adapted, answered, batches, exact_model, prompts
from torch.nn import functional as F

from peft_trex import TRexLayer, calibrate_trex_merge
from peft_trex.data_pass import Attended
from peft_trex.deploy import distill
from peft_trex.deploy.distill import predicted
from peft_trex.prior.inputs import Inputs


def _layers(model):
    return {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, TRexLayer)}


def _statics(model):
    layers = _layers(model).items()
    return {name: layer.trex_static["default"].clone() for name, layer in layers if "default" in layer.trex_static}


def _same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _data(count=8):
    return [answered(8, seed=seed) for seed in range(count)]


def _logits(model, batch):
    """Those of the four answer tokens, which the token before each predicts."""
    with torch.no_grad():
        return model(**batch).logits[:, 4:8]


def _merged(model, batch, index=0):
    """The logits with one set of static weights merged."""
    before = _statics(model)
    for name, layer in _layers(model).items():
        layer.keep_static("default", before[name][index][None])
    model.merge_adapter()
    logits = _logits(model, batch)
    model.unmerge_adapter()
    for name, layer in _layers(model).items():
        layer.keep_static("default", before[name])
    return logits


def _divergence(model, data, by_cluster=False):
    """The mean KL(routed || static) in nats for each answer token."""
    total = tokens = 0.0
    for batch in data:
        wanted, number = _logits(model, batch), torch.zeros(len(batch["input_ids"]), dtype=torch.long)
        if by_cluster:
            embeds = model.get_input_embeddings()(batch["input_ids"][:, :5]).mean(1)
            number = 1 + model.base_model.prior_of("default").score(embeds).argmax(-1)
        for index in number.unique().tolist():
            rows = number == index
            logs, right = (F.log_softmax(part[rows], -1) for part in (_merged(model, batch, index), wanted))
            total += (right.exp() * (right - logs)).sum().item()
            tokens += right[..., 0].numel()
    return total / tokens


def test_they_come_closer_on_what_was_held_out_by_as_much_as_is_told():
    model, data = exact_model(), _data()
    held_out = data[1::4]
    calibrate_trex_merge(model, data, per_cluster=True, fit="core", progress=False)
    before = [_divergence(model, held_out, by_cluster) for by_cluster in (False, True)]
    report = calibrate_trex_merge(model, data, per_cluster=True, fit="core", distill_steps=40, progress=False)
    after = [_divergence(model, held_out, by_cluster) for by_cluster in (False, True)]
    assert [polish.before for polish in report.polished] == pytest.approx(before, rel=1e-3)
    assert [polish.after for polish in report.polished] == pytest.approx(after, rel=1e-3)
    # The clusters' weights are near their best on so few rows.
    assert after[0] < 0.995 * before[0] and after[1] <= 1.001 * before[1]
    assert f"polished, KL {before[0]:.4f} to {after[0]:.4f} nats" in str(report)
    assert not any("_add_adapter" in vars(layer) for layer in _layers(model).values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_would_be_worse_is_not_kept(monkeypatch):
    monkeypatch.setattr(distill, "RATE", 100.0)
    model, data = exact_model(), _data(4)
    calibrate_trex_merge(model, data, per_cluster=True, progress=False)
    closed_form = _statics(model)
    report = calibrate_trex_merge(model, data, per_cluster=True, distill_steps=3, progress=False)
    assert _same(_statics(model), closed_form)
    assert all(polish.after == polish.before for polish in report.polished) and len(report.polished) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_polish_leaves_all_as_it_was(monkeypatch, error):
    model, data = adapted(), _data(4)
    calibrate_trex_merge(model, data, progress=False)
    before, routed = _statics(model), _logits(model, data[0])
    model.train()

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch.optim.Adam, "step", fail)
    with pytest.raises(error):
        calibrate_trex_merge(model, data[:3], distill_steps=3, progress=False)
    assert _same(_statics(model), before) and model.training
    assert not any("_add_adapter" in vars(layer) for layer in _layers(model).values())
    assert torch.equal(_logits(model.eval(), data[0]), routed)


def test_an_iterator_is_read_once_and_prompts_alone_do():
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the batches are prompts alone
        report = calibrate_trex_merge(model, iter(batches(24)), max_batches=2, distill_steps=2, progress=False)
    assert report.tokens == 2 * 8 * 9 and len(report.polished) == 1


def test_what_cannot_be_polished_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match="holds a part of the data out, but the dataloader gave 1 batches"):
        calibrate_trex_merge(model, _data(1), distill_steps=2, progress=False)
    for steps in (-1, True, None, 1.0):
        with pytest.raises(ValueError, match=f"distill_steps={steps} must be a whole number of at least 0"):
            calibrate_trex_merge(model, _data(2), distill_steps=steps, progress=False)
    data = [{**batch, "return_dict": False} for batch in _data(2)]
    with pytest.raises(ValueError, match="compares logits, and the model gave a tuple without any"):
        calibrate_trex_merge(model, data, distill_steps=2, progress=False)
    assert not _statics(model)


def test_the_tokens_that_count():
    model, ids = adapted(), prompts(2)
    attended = Attended(model.base_model)
    logits = torch.zeros(2, 9, 5)
    labels = ids.masked_fill(torch.arange(9) < 5, -100)
    inputs = Inputs.of({"input_ids": ids, "labels": labels})
    attended.start(inputs)
    assert predicted(logits, inputs, attended, causal=True).tolist() == [[4 <= token < 8 for token in range(9)]] * 2
    assert predicted(logits, inputs, attended, causal=False).tolist() == [[token >= 5 for token in range(9)]] * 2
    mask = (torch.arange(9) < 7).long().expand(2, -1)
    inputs = Inputs.of({"input_ids": ids, "attention_mask": mask})
    attended.start(inputs)
    assert torch.equal(predicted(logits, inputs, attended, causal=True), mask.bool())
    assert predicted(logits[:, 0], inputs, attended, causal=False).tolist() == [True, True]


@pytest.mark.parametrize("width", (8, 512))
def test_a_step_moves_wide_weights_output_no_further_than_narrow_ones(width):
    """Adam changes all weights alike, so their number must not count: wide fits got worse at first."""
    statics = {"layer": torch.randn(3, 8, width)}
    student = distill._Student(exact_model(), "default", statics, by_cluster=False)
    with torch.no_grad():
        student.changes["layer"].fill_(1.0)
    moved = (student.weights()["layer"] - statics["layer"]).norm(dim=-1)
    torch.testing.assert_close(moved, statics["layer"].square().mean().sqrt().expand_as(moved))
