"""The semantic prior: which tokens are the prompt, what is clustered, and what is refused."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from conftest import PAD, adapted, answered, batches, make_llama, make_t5, pad_to, prompts
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from peft_trex import TRexConfig, TRexPriorReport, initialize_trex_prior
from peft_trex.prior.channel import PriorChannel
from peft_trex.prior.prompts import find_prompts
from peft_trex.prior.semantic_prior import SemanticPrior
from peft_trex.prior.state import ForwardState


def _prior(model, adapter_name="default"):
    return model.base_model.trex_prior[adapter_name]


def _scores(model, **inputs):
    """The scores that a forward hands to the layers."""
    seen = []
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    handle = layer.register_forward_pre_hook(
        lambda layer, args: seen.append(layer._channel.scores("default", args[0]))
    )
    model(**inputs)
    handle.remove()
    return seen[0]


def test_scores_are_cosines_to_the_centroids():
    prior = SemanticPrior(3, 5)
    assert not prior.fitted
    centroids, mean, e = torch.randn(3, 5), torch.randn(5), torch.randn(4, 5)
    prior.set(centroids, mean, torch.randn(3))
    assert prior.fitted
    expected = torch.nn.functional.cosine_similarity((e - mean)[:, None], centroids[None], dim=-1)
    torch.testing.assert_close(prior.score(e), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(prior.score(e), expected)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    sides=st.lists(st.sampled_from(["left", "right"]), min_size=4, max_size=4),
    extra=st.integers(0, 4),
    answers=st.lists(st.integers(0, 6), min_size=4, max_size=4),
    labelled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_pooling_takes_the_prompt_whatever_the_padding(lengths, sides, extra, answers, labelled, seed):
    torch.manual_seed(seed)
    table = torch.randn(20, 3)
    width = max(1, *lengths) + extra
    ids, masks, labels, expected, told = [], [], [], [], True
    for length, side, answer in zip(lengths, sides, answers, strict=False):
        row = torch.randint(1, 20, (length,))
        padded, mask = pad_to(row, width, side)
        label = torch.full((width,), -100)
        positions = mask.nonzero().flatten()
        answered = positions[len(positions) - min(answer, length) :]
        label[answered] = padded[answered]
        prompt = row[: length - min(answer, length)] if labelled else row
        if labelled and length and not len(prompt):
            prompt, told = row, False
        expected.append(table[prompt].mean(0) if len(prompt) else torch.zeros(3))
        ids.append(padded)
        masks.append(mask)
        labels.append(label)
    ids, masks, labels = torch.stack(ids), torch.stack(masks), torch.stack(labels)
    found = find_prompts(ids, masks, labels if labelled else None)
    torch.testing.assert_close(found.mean(table[ids]), torch.stack(expected))
    assert found.known.tolist() == [length > 0 for length in lengths]
    assert found.told is None if not labelled else bool(found.told) is told


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(
        st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=3), max_size=3
    ).filter(len),
    told_by=st.sampled_from(["labels", "completion_mask", "both", None]),
    filled=st.integers(0, 3),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
# By labels alone a prompt of one token could not be told.
@example(lengths=[[(1, 2), (3, 1)]], told_by="both", filled=0, masked=False, seed=0)
def test_packed_sequences_have_the_prompts_they_have_alone(lengths, told_by, filled, masked, seed):
    """Rows of (prompt, answer) lengths packed without gaps, filled up with one-token sequences or masked padding."""
    torch.manual_seed(seed)
    table = torch.randn(20, 3)
    sizes = [sum(prompt + answer for prompt, answer in row) for row in lengths]
    width = max(sizes) + filled
    packed = any(len(row) > 1 for row in lengths) or (not masked and any(size < width for size in sizes))
    ids = torch.randint(1, 20, (len(lengths), width))
    answered, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    mask, expected, told = torch.zeros_like(ids), torch.zeros(len(lengths), width, 3), True
    for i, row in enumerate(lengths):
        begin = 0
        for prompt, answer in row:
            end = begin + prompt + answer
            answered[i, begin + prompt : end] = 1
            positions[i, begin:end] = torch.arange(end - begin)
            mask[i, begin:end] = 1
            if packed and not masked and end - begin == 1:
                begin = end  # is taken for filling
                continue
            tells = told_by in ("completion_mask", "both") or (told_by == "labels" and (masked or prompt > 1))
            told = told and tells
            expected[i, begin:end] = table[ids[i, begin : begin + prompt if tells else end]].mean(0)
            begin = end
    tells = {"labels": ids.masked_fill(answered == 0, -100), "completion_mask": answered}
    # Beside the mask, labels of all tokens say nothing.
    given_by = {**tells, "labels": ids} if told_by == "both" else {told_by: tells[told_by]} if told_by else {}
    found = find_prompts(ids, mask if masked else None, position_ids=positions, **given_by)
    assert (found.index is not None) == packed
    spread = found.spread(found.mean(table[ids]))
    attended = mask.bool() | (not masked)
    if packed:
        torch.testing.assert_close(spread[attended], expected[attended])
    else:
        torch.testing.assert_close(spread, expected[:, 0])
    assert found.told is None if told_by is None else bool(found.told) is told


def test_filled_up_rows_do_not_change_the_fit():
    rows = [prompts(4, seed=seed) for seed in range(16)]
    reports = []
    for filling in (0, 7):
        positions = torch.cat([torch.arange(9).repeat(4), torch.zeros(filling, dtype=torch.long)])[None]
        flat = [torch.cat([ids.flatten(), torch.full((filling,), PAD)])[None] for ids in rows]
        model = adapted(fit=False)
        loader = [{"input_ids": ids, "position_ids": positions} for ids in flat]
        reports.append((initialize_trex_prior(model, loader, progress=False), _prior(model).centroids))
    assert reports[0][0].prompts == 64
    assert reports[1][0].prompts == reports[0][0].prompts
    torch.testing.assert_close(reports[1][1], reports[0][1])


def test_the_logits_that_are_kept_are_the_same():
    model, ids = adapted(), prompts(3)
    torch.testing.assert_close(model(ids, logits_to_keep=4).logits, model(ids).logits[:, -4:])


def test_a_completion_mask_stands_in_for_labels():
    model, batch = adapted(), answered(3)
    mask = (batch["labels"] != -100).long()
    expected = model(**batch).logits
    torch.testing.assert_close(model(batch["input_ids"], completion_mask=mask).logits, expected, rtol=0, atol=0)
    assert not torch.equal(model(batch["input_ids"]).logits, expected)
    with pytest.raises(ValueError, match=r"completion_mask has shape \(1, 9\); expected .*\(3, 9\)"):
        model(batch["input_ids"], completion_mask=mask[:1])
    with pytest.raises(TypeError, match="completion_mask is a list"):
        model(batch["input_ids"], completion_mask=mask.tolist())
    with model.disable_adapter():
        model(batch["input_ids"], completion_mask=mask)


@pytest.mark.parametrize("packed", [False, True])
def test_a_completion_mask_counts_before_labels(packed):
    """Who trains on the prompt's tokens too has labels for them, and still may say where the answer begins."""
    model, batch = adapted(), answered(3)
    ids, mask = batch["input_ids"], (batch["labels"] != -100).long()
    more = {"position_ids": torch.arange(9).expand(3, -1)} if packed else {}
    expected = model(ids, labels=batch["labels"], **more).logits
    everything = model(ids, labels=ids, completion_mask=mask, **more)
    torch.testing.assert_close(everything.logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(everything.loss, model.loss_function(expected, ids, vocab_size=expected.shape[-1]))
    with pytest.raises(ValueError, match=r"completion_mask has shape \(1, 9\); expected .*\(3, 9\)"):
        model(ids, labels=ids, completion_mask=mask[:1], **more)


def test_a_base_models_own_completion_mask_reaches_it():
    base = torch.nn.Sequential()
    base.forward = lambda x, completion_mask: base.lin(x) * completion_mask
    base.lin = torch.nn.Linear(3, 3)
    model = get_peft_model(base, TRexConfig(target_modules=["lin"], use_prior=False, num_clusters=2))
    assert not model(torch.ones(2, 3), completion_mask=torch.zeros(2, 1)).any()


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "seq_idx"])
def test_rows_packed_without_positions_are_refused(name):
    for model in (adapted(), _external()):
        with pytest.raises(ValueError, match="return_position_ids=True"):
            model(prompts(1), semantic_embeds=None, **{name: torch.tensor([0, 4, 9])})


def test_continuous_batching_is_refused():
    model = adapted()
    with pytest.raises(NotImplementedError, match="generate_batch"):
        model.generate_batch(inputs=prompts(2).tolist())
    assert "generate_batch" not in vars(model.unload())


def test_the_prompt_ends_where_prediction_begins():
    ids = torch.arange(1, 9)[None]
    labels = torch.tensor([[-100, -100, 3, 4, -100, -100, 7, -100]])
    found = find_prompts(ids, None, labels)
    assert found.mask[0].tolist() == [True, True, False, False, True, True, False, False]
    # The second answer is predicted from all that stands before it.
    assert found.lengths.tolist() == [2, 6]
    assert found.index[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert found.answers[0].tolist() == [False, True, True, True, False, True, True, True]
    mask = (ids > 1).long()
    assert find_prompts(ids, mask, labels).mask[0].tolist() == [False, True, False, False, True, True, False, False]


def test_where_packed_sequences_begin():
    ids = torch.ones(1, 6, dtype=torch.long)
    for positions, mask, index in (
        ([0, 1, 2, 3, 4, 5], None, None),
        ([0, 1, 2, 0, 1, 2], None, [0, 0, 0, 1, 1, 1]),
        ([2, 3, 4, 2, 3, 4], None, [0, 0, 0, 1, 1, 1]),  # where transformers cuts the attention
        ([0, 1, 2, 7, 8, 9], None, [0, 0, 0, 1, 1, 1]),
        ([1, 1, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1], None),  # padding
        ([0, 1, 2, 1, 3, 4], [1, 1, 1, 0, 1, 1], None),  # a gap in the mask
        ([0, 1, 2, 0, 1, 1], [1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]),
        ([5, 6, 7, 8, 9, 10], [1] * 6, None),  # goes on from a cache
    ):
        found = find_prompts(
            ids, None if mask is None else torch.tensor([mask]), position_ids=torch.tensor([positions])
        )
        assert (None if found.index is None else found.index[0].tolist()) == index, positions
    text = torch.tensor([[[0, 1, 2, 0, 1, 2]]])  # and three of images and time behind
    assert find_prompts(ids, position_ids=torch.cat([text, text.expand(3, -1, -1) * 0])).index is not None


def test_packed_rows_with_padding_on_the_left():
    table, ids = torch.randn(9, 3), torch.tensor([[8, 8, 1, 2, 3], [4, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = find_prompts(ids, mask, position_ids=torch.tensor([[1, 1, 0, 1, 0], [7, 8, 9, 10, 11]]))
    spread = found.spread(found.mean(table[ids]))
    torch.testing.assert_close(spread[0, 2:], torch.stack([table[1:3].mean(0)] * 2 + [table[3]]))
    torch.testing.assert_close(spread[1], table[4:9].mean(0).expand(5, 3))


def test_a_layer_finds_its_rows_of_a_packed_prior():
    scores = torch.randn(2, 3, 4)
    channel = PriorChannel(torch.nn.ModuleDict())
    with_prior = partial(channel.run, ForwardState({"a": scores}, 2, (3,)), channel.scores, "a")
    assert with_prior(torch.zeros(2, 3, 5)).equal(scores)
    assert with_prior(torch.zeros(6, 5)).equal(scores.reshape(6, 4))
    # What all rows share has no prior.
    assert with_prior(torch.zeros(1, 3, 5)) is None
    for shape in ((2, 5), (3, 5), (2, 1, 5), (3, 2, 5), (2, 3, 1, 5)):
        with pytest.raises(ValueError, match="which prompt each row belongs to"):
            with_prior(torch.zeros(shape))


def test_labels_of_another_shape_say_nothing_of_the_prompt():
    ids = torch.ones(2, 3, dtype=torch.long)
    found = find_prompts(ids, None, torch.tensor([1, -100]))
    assert found.mask.all() and found.told is None
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        find_prompts(ids, torch.ones(2, 1, 3, 3), None)


def test_fit_finds_the_groups_and_reports_them():
    model = adapted(fit=False, num_clusters=4)
    # The means of long prompts leave no prompt between two groups, whatever version of k-means looks for them.
    report = initialize_trex_prior(model, batches(200, length=60), progress=False)
    assert isinstance(report, TRexPriorReport)
    assert report.prompts == 200
    assert sorted(report.cluster_sizes) == [50, 50, 50, 50]
    assert 0.3 < report.explained_variance < 1
    prior = _prior(model)
    embedded = model.get_input_embeddings()(prompts(200, length=60)).mean(1)
    torch.testing.assert_close(prior.mean, embedded.mean(0))
    torch.testing.assert_close(prior.centroids.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(prior.mean_scores, prior.score(embedded).mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(_scores(model, input_ids=prompts(200, length=60)[:3]), prior.score(embedded[:3]))


def test_fit_depends_on_the_seed_alone_and_leaves_random_state_and_mode():
    model = adapted(fit=False).train()
    torch.manual_seed(7)
    dataset = [{"input_ids": row} for row in prompts(64)]
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
    state = torch.get_rng_state()
    initialize_trex_prior(model, batches(64), seed=3, progress=False)
    first = _prior(model).centroids.clone()
    initialize_trex_prior(model, batches(64), seed=3, progress=False)
    torch.testing.assert_close(_prior(model).centroids, first, rtol=0, atol=0)
    initialize_trex_prior(model, loader, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_max_batches_and_iterable_data():
    model = adapted(fit=False)
    assert initialize_trex_prior(model, iter(batches(64)), max_batches=3, progress=False).prompts == 24
    assert initialize_trex_prior(model, batches(64), max_batches=99, progress=False).prompts == 64


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_only_the_prompt_is_embedded_when_labels_mark_the_answer(task_type):
    model = adapted(task_type=task_type)
    ids = prompts(6)
    changed = ids.clone()
    changed[:, 5:] = 3
    labels = torch.full_like(ids, -100)
    labels[:, 5:] = 7
    torch.testing.assert_close(
        _scores(model, input_ids=ids, labels=labels), _scores(model, input_ids=changed, labels=labels)
    )
    torch.testing.assert_close(_scores(model, input_ids=ids, labels=labels), _scores(model, input_ids=ids[:, :5]))
    assert not torch.allclose(_scores(model, input_ids=ids), _scores(model, input_ids=changed))


def test_labels_without_a_prompt_take_the_whole_row_and_warn_once():
    model = adapted()
    ids = prompts(4)
    with pytest.warns(UserWarning, match="without a prompt"):
        scores = _scores(model, input_ids=ids, labels=ids)
    torch.testing.assert_close(scores, _scores(model, input_ids=ids))
    _scores(model, input_ids=ids, labels=ids)  # a second warning would be an error here


@pytest.mark.parametrize("task_type", ["SEQ_2_SEQ_LM", None])
def test_labels_mean_nothing_to_an_encoder(task_type):
    model = adapted("t5", task_type=task_type)
    ids = prompts(4)
    same = torch.full_like(ids, -100)
    same[:, 4:] = 5
    seen = []
    layer = model.base_model.model.encoder.block[0].layer[0].SelfAttention.q
    layer.register_forward_pre_hook(lambda layer, args: seen.append(layer._channel.scores("default", args[0])))
    model(input_ids=ids, labels=same)
    model(input_ids=ids, labels=ids)
    torch.testing.assert_close(seen[0], seen[1])


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    extra=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_a_row_does_not_depend_on_its_batch_or_its_padding(lengths, side, extra, seed):
    model = MODEL
    rows = [row[:length] for row, length in zip(prompts(len(lengths), seed=seed), lengths, strict=True)]
    padded, masks = zip(*(pad_to(row, max(lengths) + extra, side) for row in rows), strict=True)
    ids, mask = torch.stack(padded), torch.stack(masks)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for index, row in enumerate(rows):
        alone = model(input_ids=row[None]).logits[0]
        torch.testing.assert_close(together[index][mask[index].bool()], alone, atol=1e-4, rtol=1e-4)


MODEL = adapted()


def test_inputs_embeds_give_the_same_prior_as_their_tokens():
    model = adapted()
    ids = prompts(3)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(input_ids=ids).logits)


def test_trained_embeddings_do_not_move_the_prior():
    model = adapted(modules_to_save=["embed_tokens"])
    ids = prompts(3)
    before = _scores(model, input_ids=ids)
    model.get_input_embeddings().modules_to_save["default"].weight.data.normal_()
    torch.testing.assert_close(_scores(model, input_ids=ids), before)


def test_an_all_padding_row_has_no_prior():
    model = adapted()
    ids = prompts(2)
    mask = torch.ones_like(ids)
    mask[1] = 0
    scores = _scores(model, input_ids=ids, attention_mask=mask)
    assert scores[0].any() and not scores[1].any()


@pytest.mark.parametrize("training", [True, False])
def test_that_nobody_tells_where_prompts_end_is_said_once(training):
    """In evaluation too, where scorers come this way."""
    batch = answered(3)
    telling = {"labels": batch["labels"]}, {"semantic_prior": 1}
    cases = (({}, {}, 1), *(({}, told, 0) for told in telling), ({"task_type": "SEQ_CLS"}, {}, 0))
    for config, told, said in cases:
        model = adapted(**config).train(training)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                model(input_ids=batch["input_ids"], **told)
        texts = [str(warning.message) for warning in seen]
        assert len([text for text in texts if "forward got neither labels nor a completion_mask" in text]) == said


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_found_without_a_mask(side):
    """Runs of the pad token at the ends of a row; within a prompt it is a token like any other."""
    model, row = adapted(), torch.tensor([5, 6, PAD, PAD, 7, 20])
    padded, mask = pad_to(row, 9, side)
    for ids, attended in ((padded, mask), (prompts(1)[0], torch.ones(9))):
        expected = _scores(model, input_ids=ids[None], attention_mask=attended[None])
        torch.testing.assert_close(_scores(model, input_ids=ids[None]), expected)
    assert not torch.allclose(expected, _scores(model, input_ids=padded[None]))
    model.get_base_model().generation_config.eos_token_id = PAD
    everything = {"input_ids": padded[None], "attention_mask": torch.ones(1, 9)}
    torch.testing.assert_close(_scores(model, input_ids=padded[None]), _scores(model, **everything))


def test_unfitted_counts_as_zero_and_warns_once():
    model = adapted(fit=False)
    ids = prompts(3)
    with pytest.warns(UserWarning, match=r"not fitted and counts as zero: call initialize_trex_prior"):
        y = model(input_ids=ids).logits
    model(input_ids=ids)  # a second warning would be an error here
    initialize_trex_prior(model, batches(), progress=False)
    assert not torch.allclose(model(input_ids=ids).logits, y)
    for name, parameter in model.named_parameters():
        if "trex_map" in name:
            parameter.data.zero_()
    torch.testing.assert_close(model(input_ids=ids).logits, y)


def test_a_model_without_tokens_says_so():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), TRexConfig(target_modules=["0"]))
    with pytest.warns(UserWarning, match="no token embedding"):
        model(torch.randn(2, 3))
    with pytest.raises(ValueError, match="no token embedding"):
        initialize_trex_prior(model, batches(), progress=False)


def test_several_adapters_have_a_prior_each():
    model = adapted()
    ids = prompts(3)
    alone = model(input_ids=ids).logits
    model.add_adapter("other", TRexConfig(r_a=1, r_b=2, num_clusters=3, task_type="CAUSAL_LM", init_weights=False))
    initialize_trex_prior(model, batches(seed=5), adapter_name="other", progress=False)
    assert _prior(model, "other").centroids.shape == (3, 32)
    torch.testing.assert_close(model(input_ids=ids).logits, alone, rtol=0, atol=0)
    model.set_adapter("other")
    assert not torch.allclose(model(input_ids=ids).logits, alone)
    model.base_model.set_adapter(["default", "other"])
    model(input_ids=ids)
    model.delete_adapter("other")
    assert list(model.base_model.trex_prior) == ["default"]
    torch.testing.assert_close(model(input_ids=ids).logits, alone, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"adapter_name": "absent"}, ValueError, r"no adapter 'absent'; the model has \['default'\]"),
        ({"max_batches": 0}, ValueError, "max_batches=0"),
        ({"max_batches": 1.5}, ValueError, "max_batches=1.5"),
        ({"dataloader": []}, ValueError, "no batch"),
        ({"dataloader": [torch.ones(2, 3)]}, TypeError, "Tensor; expected a mapping"),
        ({"dataloader": [{"pixel_values": torch.ones(2, 3)}]}, ValueError, "pixel_values"),
        ({"dataloader": None}, ValueError, "give a dataloader"),
        ({"embeddings": torch.zeros(9, 32)}, ValueError, "a dataloader and no embeddings"),
        ({"dataloader": batches(3)}, ValueError, "num_clusters=4 is more than the 3 distinct prompts among the 3"),
        ({"dataloader": [{"input_ids": prompts(2).repeat(20, 1)}]}, ValueError, "2 distinct prompts among the 40"),
        ({"dataloader": [{"input_ids": prompts(3).repeat(200, 1)}]}, ValueError, "3 distinct prompts among the 600"),
    ],
)
def test_fit_refuses_and_leaves_the_adapter_as_it_was(change, error, message):
    model = adapted()
    before = {name: tensor.clone() for name, tensor in _prior(model).state_dict().items()}
    with pytest.raises(error, match=message):
        initialize_trex_prior(model, **{"dataloader": batches(), "progress": False, **change})
    for name, tensor in _prior(model).state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_an_interrupted_fit_leaves_the_adapter_as_it_was():
    model = adapted(fit=False)

    def interrupted():
        yield from batches(16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        initialize_trex_prior(model, interrupted(), progress=False)
    assert not _prior(model).fitted


def test_fit_refuses_nan_a_plain_model_and_a_merged_one():
    with pytest.raises(ValueError, match="has no T-REX adapter"):
        initialize_trex_prior(make_llama(), batches(), progress=False)
    with pytest.raises(TypeError, match="model is a str"):
        initialize_trex_prior("model", batches(), progress=False)
    model = adapted()
    model.get_input_embeddings().weight.data[5] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        initialize_trex_prior(model, [{"input_ids": torch.full((8, 3), 5)}], progress=False)
    model = adapted()
    with pytest.warns(UserWarning, match="approximately"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        initialize_trex_prior(model, batches(), progress=False)
    with pytest.raises(ValueError, match="use_prior=False"):
        initialize_trex_prior(adapted(fit=False, use_prior=False), batches(), progress=False)


def _external(fit=True, **kwargs):
    model = adapted(fit=False, prior_encoder="external", prior_dim=5, **kwargs)
    if fit:
        embeddings = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
        initialize_trex_prior(model, embeddings=embeddings, progress=False)
    return model


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_external_embeddings_reach_forward_and_generate(task_type):
    model = _external(task_type=task_type)
    ids, e = prompts(3), torch.randn(3, 5)
    y = model(input_ids=ids, semantic_embeds=e).logits
    torch.testing.assert_close(_scores(model, input_ids=ids, semantic_embeds=e), _prior(model).score(e))
    assert not torch.allclose(model(input_ids=ids, semantic_embeds=-e).logits, y)
    batch = model.generate(input_ids=ids, semantic_embeds=e, max_new_tokens=6, do_sample=False)
    beams = model.generate(input_ids=ids, semantic_embeds=e, max_new_tokens=6, num_beams=3, do_sample=False)
    for row in range(3):
        single = {"input_ids": ids[row : row + 1], "semantic_embeds": e[row : row + 1], "do_sample": False}
        assert torch.equal(model.generate(**single, max_new_tokens=6)[0], batch[row])
        assert torch.equal(model.generate(**single, max_new_tokens=6, num_beams=3)[0], beams[row])
    with model.disable_adapter():  # the argument is not the base model's, and must not reach it
        model(input_ids=ids, semantic_embeds=e)
        model.generate(input_ids=ids, semantic_embeds=e, max_new_tokens=2)


def test_external_embeddings_as_arrays_fit_alike():
    embeddings = torch.randn(40, 5)
    fits = []
    for given_as in (embeddings, embeddings.numpy(), embeddings.double().numpy()):
        model = _external(fit=False)
        report = initialize_trex_prior(model, embeddings=given_as, progress=False)
        assert report.prompts == 40
        fits.append(_prior(model).centroids)
    torch.testing.assert_close(fits[0], fits[1], rtol=0, atol=0)
    torch.testing.assert_close(fits[0], fits[2])


@pytest.mark.parametrize(
    ("embeds", "error", "message"),
    [
        (None, ValueError, "semantic_embeds is missing.*prior_encoder='external'"),
        (torch.zeros(3, 4), ValueError, r"shape \(3, 4\); expected .*\(3, 5\)"),
        (torch.zeros(2, 5), ValueError, r"shape \(2, 5\); expected .*\(3, 5\)"),
        (torch.zeros(5), ValueError, r"shape \(5,\)"),
        (np.zeros((3, 5)), TypeError, "ndarray"),
        (torch.full((3, 5), float("nan")), ValueError, "NaN"),
    ],
)
def test_wrong_external_embeddings_are_refused(embeds, error, message):
    model = _external()
    for call in (model, model.generate):
        with pytest.raises(error, match=message):
            call(input_ids=prompts(3), semantic_embeds=embeds)
    e = torch.randn(3, 5)  # and the model works on as before
    torch.testing.assert_close(
        model(input_ids=prompts(3), semantic_embeds=e).logits, model(input_ids=prompts(3), semantic_embeds=e).logits
    )


def test_external_embeddings_are_refused_where_they_are_not_used():
    with pytest.raises(ValueError, match="compute the prior from the input embeddings"):
        adapted()(input_ids=prompts(3), semantic_embeds=torch.zeros(3, 5))
    with pytest.raises(TypeError, match="list"):
        initialize_trex_prior(_external(fit=False), embeddings="text", progress=False)
    with pytest.raises(ValueError, match=r"shape \(9, 4\)"):
        initialize_trex_prior(_external(fit=False), embeddings=torch.zeros(9, 4), progress=False)
    with pytest.raises(ValueError, match="no dataloader"):
        initialize_trex_prior(_external(fit=False), batches(), progress=False)


def test_t5_prior_is_the_encoders_prompt():
    model = adapted("t5", base=make_t5()).double()  # in float32 its logits are off by several 1e-4
    ids = prompts(3)
    padded, mask = zip(*(pad_to(row, 12, "right") for row in ids), strict=True)
    y = model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits
    other = model(input_ids=torch.stack(padded), attention_mask=torch.stack(mask), decoder_input_ids=ids[:, :4]).logits
    torch.testing.assert_close(y, other, atol=1e-4, rtol=1e-4)
    assert PAD == 0


def test_a_look_that_waits_for_the_device_is_ever_more_seldom():
    scorer = adapted().base_model.prompts.scorer
    there, elsewhere = torch.tensor(True), torch.ones((), dtype=torch.bool, device="meta")
    assert all(scorer._may_look("a", there) for _ in range(5))
    looks = [number for number in range(1, 70) if scorer._may_look("a", elsewhere)]
    assert looks == [1, 2, 4, 8, 16, 32, 64]


def test_prompts_that_differ_late_are_found_distinct():
    """Whether they are is looked up among the first 100 for each cluster, which is enough as a rule."""
    model = adapted(fit=False)
    ids = torch.cat([prompts(1).repeat(450, 1), prompts(12)])
    report = initialize_trex_prior(model, [{"input_ids": ids}], progress=False)
    assert len(report.cluster_sizes) == 4


def test_centroids_that_arrive_in_place_are_noticed():
    """As DDP brings those of its first process to the others, which may have looked before."""
    prior = SemanticPrior(3, 4)
    assert not prior.fitted
    prior.centroids.copy_(torch.eye(3, 4))
    assert prior.fitted
