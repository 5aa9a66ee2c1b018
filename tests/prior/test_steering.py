"""Steering: a prior that is set counts as a computed one of the same scores would, on every path."""

import contextlib
import copy
import threading

import pytest
import torch
from conftest import CACHE, MAKERS, PAD, adapted, answered, make_llama, pad_to, prompts
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_trex import TRexConfig, TRexLayer, initialize_trex_prior, steer_trex

K = 4  # clusters
LENGTHS = [9, 4, 6]
ROWS = torch.tensor([2, -1, 0])  # the second row is left to its own prompt


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def any_model(request):
    return adapted(request.param)


@pytest.fixture(scope="module")
def decoder():
    return adapted()


def _batch(side="left"):
    rows = [row[:length] for row, length in zip(prompts(3, seed=2), LENGTHS, strict=True)]
    padded, masks = zip(*(pad_to(row, 10, side) for row in rows), strict=True)
    return {"input_ids": torch.stack(padded), "attention_mask": torch.stack(masks)}


def _forward_batch(model, side="left"):
    batch = _batch(side)
    return {**batch, "decoder_input_ids": prompts(3, 4)} if model.config.is_encoder_decoder else batch


def _prior(model, adapter_name="default"):
    return model.base_model.prior_of(adapter_name)


def _cosines(model, adapter_name="default"):
    centroids = _prior(model, adapter_name).centroids
    return centroids @ centroids.T


@contextlib.contextmanager
def _scored_as(model, scores, chosen=None, adapter_name="default"):
    """What steering should be equal to: the scores replaced where a prompt's own are computed."""
    prior = _prior(model, adapter_name)
    own = prior.score

    def score(embedding):
        given = scores.expand(len(embedding), -1)
        return given if chosen is None else torch.where(chosen[:, None], given, own(embedding))

    prior.score = score
    try:
        yield
    finally:
        del prior.score


@contextlib.contextmanager
def _scored_by_rows(model, ids=ROWS):
    with _scored_as(model, _cosines(model)[ids.clamp(min=0)], ids >= 0):
        yield


def _generate(model, side="left", **kwargs):
    torch.manual_seed(0)
    settings = {"max_new_tokens": 6, "pad_token_id": PAD, "do_sample": False, **kwargs}
    return model.generate(**_batch(side), output_logits=True, return_dict_in_generate=True, **settings)


def _assert_same(found, expected, other):
    """Equal to what is expected, where that is not what comes out anyway."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, other, atol=3e-3)


PATHS = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "beams, no cache": {"num_beams": 3, "use_cache": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("by", ["argument", "block"])
@pytest.mark.parametrize("path", PATHS)
def test_generate(any_model, path, by):
    model, settings = any_model, PATHS[path]
    with _scored_by_rows(model):
        expected = _generate(model, **settings)
    if by == "argument":
        found = _generate(model, semantic_prior=ROWS, **settings)
    else:
        with steer_trex(model, ROWS):
            found = _generate(model, **settings)
    plain = _generate(model, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    _assert_same(found.logits[0], expected.logits[0], plain.logits[0])
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("path", ["greedy", "beams"])
def test_generate_with_one_for_all_rows(any_model, path):
    with _scored_as(any_model, _cosines(any_model)[1:2]):
        expected = _generate(any_model, **PATHS[path])
    found, plain = (_generate(any_model, **given, **PATHS[path]) for given in ({"semantic_prior": 1}, {}))
    _assert_same(found.logits[0], expected.logits[0], plain.logits[0])
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("by", ["argument", "block"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_forward(any_model, side, by):
    model = any_model
    batch = _forward_batch(model, side)
    with torch.no_grad():
        plain = model(**batch).logits
        with _scored_by_rows(model):
            expected = model(**batch).logits
        with steer_trex(model, ROWS) if by == "block" else contextlib.nullcontext():
            found = model(**batch, **({} if by == "block" else {"semantic_prior": ROWS})).logits
        again = model(**batch).logits
    _assert_same(found, expected, plain)
    torch.testing.assert_close(found[1], plain[1])
    torch.testing.assert_close(again, plain)  # nothing is left behind


@pytest.mark.parametrize("when", ["prompt", "every call", "block"])
def test_decoding_by_hand(decoder, when):
    """The cache carries the steered prior; saying it again changes nothing."""
    given = {"semantic_prior": ROWS}

    def decode(first, then):
        batch = _batch()
        output = decoder(**batch, use_cache=True, **first)
        mask, logits = batch["attention_mask"], [output.logits[:, -1]]
        for token in range(3):
            mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
            step = torch.full((3, 1), 7 + token)
            cache = {CACHE: output[CACHE]}
            output = decoder(input_ids=step, attention_mask=mask, **cache, use_cache=True, **then)
            logits.append(output.logits[:, -1])
        return torch.stack(logits)

    with torch.no_grad():
        plain = decode({}, {})
        with _scored_by_rows(decoder):
            expected = decode({}, {})
        if when == "block":
            with steer_trex(decoder, ROWS):
                found = decode({}, {})
        else:
            found = decode(given, given if when == "every call" else {})
    _assert_same(found, expected, plain)


def test_steering_may_begin_in_the_middle(decoder):
    """Steered rows change from there on; a row of its own goes on with the prior of its prompt."""
    batch, step = _batch(), torch.full((3, 1), 7)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)

    def second(**kwargs):
        with torch.no_grad():
            cache = {CACHE: decoder(**batch, use_cache=True)[CACHE]}
            return decoder(input_ids=step, attention_mask=mask, **cache, **kwargs).logits

    plain, found = second(), second(semantic_prior=ROWS)
    torch.testing.assert_close(found[1], plain[1])
    assert not torch.allclose(found[[0, 2]], plain[[0, 2]], atol=1e-3)
    torch.testing.assert_close(second(semantic_prior=[2, -1, 0]), found)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("ids", [[2, -1, 0, 3], [1]])
def test_packed_rows(external, ids):
    settings = {"prior_encoder": "external", "prior_dim": 5} if external else {}
    model = adapted(fit=not external, **settings)
    tokens = prompts(2, length=12, seed=3)
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)
    batch = {"input_ids": tokens, "position_ids": positions}
    if external:
        generator = torch.Generator().manual_seed(0)
        initialize_trex_prior(model, embeddings=torch.randn(40, 5, generator=generator), progress=False)
        batch["semantic_embeds"] = torch.randn(4, 5, generator=generator)
    with torch.no_grad():
        plain = model(**batch, use_cache=False).logits
        with _scored_by_rows(model, torch.tensor(ids).expand(4)):
            expected = model(**batch, use_cache=False).logits
        found = model(**batch, use_cache=False, semantic_prior=torch.tensor(ids)).logits
        torch.testing.assert_close(model(**batch, use_cache=False, semantic_prior=-1).logits, plain)
    _assert_same(found, expected, plain)
    if -1 in ids:
        torch.testing.assert_close(found[0, 5:], plain[0, 5:])


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["whole", "not reentrant", "reentrant"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_gradients(kind, checkpointing):
    """Also where the layers run again after the block was left and another forward ran."""
    model = adapted(kind, base=MAKERS[kind]().double()).train()
    model.config.use_cache = False
    batch = answered(3)

    def gradients(run):
        model.zero_grad()
        loss = run()
        model(**answered(3, 1))
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def steered():
        with steer_trex(model, ROWS):
            return model(**batch).loss

    def expected():
        with _scored_by_rows(model):
            return model(**batch).loss

    plain, reference = gradients(lambda: model(**batch).loss), gradients(expected)
    if checkpointing is not None:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.get_base_model().enable_input_require_grads()
    for run in (steered, lambda: model(**batch, semantic_prior=ROWS).loss):
        _assert_same(gradients(run), reference, plain)


def _values(model, centroids):
    """What can be given for all rows, and what it should stand for, as it is compared with the centroids."""
    weights = torch.tensor([0.25, 0.0, 0.75, 0.0])
    batch = {"input_ids": torch.stack([row for row in prompts(1, seed=8)])}
    embedding = _prior(model).direction(model.get_input_embeddings()(batch["input_ids"]).mean(1))
    padded = {"input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), batch["input_ids"]], 1)}
    padded["attention_mask"] = torch.cat([torch.zeros(1, 3), torch.ones(1, 9)], 1)
    labels = batch["input_ids"].masked_fill(torch.arange(9) < 9, -100)
    answer = {
        "input_ids": torch.cat([batch["input_ids"], torch.full((1, 4), 40)], 1),
        "labels": torch.cat([labels, torch.full((1, 4), 40)], 1),
    }
    return {
        "an int": (2, centroids[2:3]),
        "one id": ([2], centroids[2:3]),
        "an array": (torch.tensor([2]).numpy(), centroids[2:3]),
        "a mixture": (weights, (weights @ centroids)[None]),
        "weights of another size": ((3 * weights).tolist(), (weights @ centroids)[None]),
        "half precision": (weights.bfloat16()[None], (weights @ centroids)[None]),
        "an example": (batch, embedding),
        "a padded example": (padded, embedding),
        "an example with its answer": (answer, embedding),
        "embedded tokens": ({"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}, embedding),
        "by adapter": ({"default": 2}, centroids[2:3]),
    }


VALUES = tuple(_values(adapted(), torch.eye(K, 32)))


@pytest.mark.parametrize("whitening", [None, 5])
@pytest.mark.parametrize("value", VALUES)
def test_what_can_be_given(value, whitening):
    decoder = adapted(prior_whitening=whitening)
    given, direction = _values(decoder, _prior(decoder).centroids)[value]
    scores = torch.nn.functional.cosine_similarity(direction[:, None], _prior(decoder).centroids[None], dim=-1)
    with torch.no_grad():
        plain = decoder(**_batch()).logits
        with _scored_as(decoder, scores):
            expected = decoder(**_batch()).logits
        found = decoder(**_batch(), semantic_prior=given).logits
        with steer_trex(decoder, given):
            in_block = decoder(**_batch()).logits
    _assert_same(found, expected, plain)
    torch.testing.assert_close(in_block, found)


def test_rows_of_a_mixture_and_of_examples(decoder):
    weights = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2.0]])
    examples = _batch("right")
    examples["attention_mask"][1] = 0
    centroids = _prior(decoder).centroids
    mixed = torch.nn.functional.normalize(weights @ centroids, dim=-1) @ centroids.T
    embeds = torch.stack(
        [
            decoder.get_input_embeddings()(row[: int(kept.sum())]).mean(0) if kept.any() else torch.ones(32)
            for row, kept in zip(examples["input_ids"], examples["attention_mask"], strict=True)
        ]
    )
    by_example = _prior(decoder).score(embeds.detach())
    swapped = {key: value.flip(0) for key, value in _batch().items()}
    for given, scores in ((weights, mixed), (examples, by_example)):
        with torch.no_grad():
            plain = decoder(**swapped).logits
            with _scored_as(decoder, scores, torch.tensor([True, False, True])):
                expected = decoder(**swapped).logits
            found = decoder(**swapped, semantic_prior=given).logits
        _assert_same(found, expected, plain)
        torch.testing.assert_close(found[1], plain[1])


def test_an_example_of_its_own_changes_nothing(any_model):
    batch = _forward_batch(any_model)
    example = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        torch.testing.assert_close(any_model(**batch, semantic_prior=example).logits, any_model(**batch).logits)


def test_external_embeddings_are_not_needed_where_all_rows_are_steered():
    model = adapted(fit=False, prior_encoder="external", prior_dim=5)
    generator = torch.Generator().manual_seed(0)
    initialize_trex_prior(model, embeddings=torch.randn(40, 5, generator=generator), progress=False)
    batch, embeds = _batch(), torch.randn(3, 5, generator=generator)
    with torch.no_grad():
        plain = model(**batch, semantic_embeds=embeds).logits
        with _scored_as(model, _cosines(model)[2:3]):
            expected = model(**batch, semantic_embeds=embeds).logits
        _assert_same(model(**batch, semantic_prior=2).logits, expected, plain)
        torch.testing.assert_close(model(**batch, semantic_embeds=embeds, semantic_prior=2).logits, expected)
        torch.testing.assert_close(model(**batch, semantic_prior={"semantic_embeds": embeds}).logits, plain)
        one, others = torch.tensor([False, True, False]), torch.tensor([True, False, True])
        example = {"semantic_embeds": embeds.flip(0).masked_fill(one[:, None], 0)}  # the row of zeros keeps its own
        found = model(**batch, semantic_embeds=embeds, semantic_prior=example).logits
        torch.testing.assert_close(found[one], plain[one])
        torch.testing.assert_close(found[others], model(**batch, semantic_embeds=embeds.flip(0)).logits[others])
        with pytest.raises(ValueError, match="semantic_embeds is missing"):
            model(**batch, semantic_prior=ROWS)
    found = _generate(model, semantic_prior=2)
    torch.testing.assert_close(found.logits[0], expected[:, -1])


@pytest.mark.filterwarnings("error::UserWarning")
def test_what_is_not_computed_is_not_warned_of():
    """Neither a cache of unknown origin nor a training without labels matters to a prior that is set."""
    model = adapted()
    with torch.no_grad():
        cache = model(**_batch(), semantic_prior=1)[CACHE]
        del cache._trex_history
        mask = torch.cat([_batch()["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
        model(input_ids=torch.full((3, 1), 7), attention_mask=mask, **{CACHE: cache}, semantic_prior=1)
    model.train()(**_batch(), semantic_prior=1)


def test_several_adapters():
    model = adapted()
    model.add_adapter("other", TRexConfig(r_a=2, r_b=2, num_clusters=3, task_type="CAUSAL_LM", init_weights=False))
    initialize_trex_prior(model, [{"input_ids": prompts(20, seed=5)}], adapter_name="other", progress=False)
    model.base_model.set_adapter(["default", "other"])
    model.eval()
    batch, ids = _batch(), torch.tensor([1, -1, 1])
    with torch.no_grad():
        plain = model(**batch).logits
        other = _cosines(model, "other")[ids.clamp(min=0)]
        with _scored_as(model, other, ids >= 0, "other"):
            only_other = model(**batch).logits
            with _scored_as(model, _cosines(model)[3:4]):
                both = model(**batch).logits
        _assert_same(model(**batch, semantic_prior={"other": ids}).logits, only_other, plain)
        _assert_same(model(**batch, semantic_prior={"other": ids, "default": 3}).logits, both, only_other)
        example = {"input_ids": prompts(1, seed=9)}
        by_name = model(**batch, semantic_prior={"other": example, "default": example}).logits
        _assert_same(model(**batch, semantic_prior=example).logits, by_name, plain)
        with pytest.raises(ValueError, match=r"\['default', 'other'\]; give a mapping"):
            model(**batch, semantic_prior=1)
        with pytest.raises(ValueError, match="cluster"):
            model(**batch, semantic_prior={"other": 3})
        with steer_trex(model, {"other": 1}):
            model.set_adapter("default")
            with pytest.raises(ValueError, match=r"for the adapter 'other', but the active .* \['default'\]"):
                model(**batch)


def test_blocks_nest_and_end_with_an_error(decoder):
    batch = _batch()
    with torch.no_grad():
        plain, first, second = (
            decoder(**batch, **given).logits for given in ({}, {"semantic_prior": 1}, {"semantic_prior": 2})
        )
        with steer_trex(decoder, 1):
            with steer_trex(decoder, 2):
                torch.testing.assert_close(decoder(**batch).logits, second)
            torch.testing.assert_close(decoder(**batch).logits, first)
            torch.testing.assert_close(decoder(**batch, semantic_prior=2).logits, second)
            torch.testing.assert_close(decoder(**batch, semantic_prior=-1).logits, plain)
        with pytest.raises(KeyError), steer_trex(decoder, 1):
            raise KeyError
        with pytest.raises(ValueError, match="3 prompts"), steer_trex(decoder, [1, 2]):
            decoder(**batch)
        torch.testing.assert_close(decoder(**batch).logits, plain)
    assert not torch.allclose(first, second, atol=1e-3) and not torch.allclose(first, plain, atol=1e-3)


def test_threads_are_steered_each_by_itself(decoder):
    expected = [_generate(decoder, semantic_prior=k).logits[0] for k in range(K)]
    unsteered = _generate(decoder).logits[0]
    found, meet = {}, threading.Barrier(K + 1, timeout=60)

    def serve(k):
        with steer_trex(decoder, k) if k < K else contextlib.nullcontext():
            meet.wait()
            found[k] = _generate(decoder).logits[0]
            meet.wait()

    threads = [threading.Thread(target=serve, args=(k,)) for k in range(K + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, logits in enumerate([*expected, unsteered]):
        torch.testing.assert_close(found[k], logits)


def test_a_copy_in_a_block_is_not_steered(decoder):
    with steer_trex(decoder, 1), torch.no_grad():
        copied = copy.deepcopy(decoder)
        found = copied(**_batch()).logits
    torch.testing.assert_close(found, decoder(**_batch()).logits)


def test_disabled_adapters_take_no_part(decoder):
    batch = _batch()
    with torch.no_grad(), decoder.disable_adapter():
        expected = decoder(**batch).logits
        torch.testing.assert_close(decoder(**batch, semantic_prior=1).logits, expected)
        with steer_trex(decoder, 1):
            torch.testing.assert_close(decoder(**batch).logits, expected)
            assert torch.equal(_generate(decoder).sequences, _generate(decoder, semantic_prior=2).sequences)


@pytest.mark.filterwarnings("ignore:T-REX depends on its input")
def test_merged_adapters_are_refused():
    model = adapted()
    with steer_trex(model, 1):
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"\['default'\] are merged"):
            model(**_batch())
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"\['default'\] are merged"):
            call(**_batch(), semantic_prior=1)
    with pytest.raises(ValueError, match="merged"), steer_trex(model, 1):
        pass
    model(**_batch())
    with model.disable_adapter():  # which takes it out
        torch.testing.assert_close(model(**_batch(), semantic_prior=1).logits, make_llama()(**_batch()).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit": False}, "prior of the adapter 'default' is not fitted.*initialize_trex_prior"),
        ({"fit": False, "use_prior": False}, r"no active adapter \(default\) has a prior.*use_prior=False"),
    ],
)
def test_an_adapter_without_a_prior_is_refused(settings, message):
    model = adapted(**settings)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(**_batch(), semantic_prior=1)
    with pytest.raises(ValueError, match=message), steer_trex(model, 1):
        pass


NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (4, ValueError, r"clusters \[4\]; there are 4, 0 to 3"),
        ([0, -2, 1], ValueError, r"clusters \[0, -2, 1\]"),
        ([0, 1], ValueError, "2 rows for 3 prompts"),
        (torch.ones(2, K), ValueError, "2 rows for 3 prompts"),
        ({"input_ids": prompts(2)}, ValueError, "2 rows for 3 prompts"),
        (torch.tensor([1.0, NAN, 0, 0]), ValueError, "NaN"),
        (torch.tensor([1.0, -1.0, 0, 0]), ValueError, "negative"),
        (torch.ones(5), ValueError, r"shape \(5,\), floats for K = 4"),
        (0.5, ValueError, r"shape \(\), floats"),
        (True, TypeError, "torch.bool"),
        (torch.ones(3, K, dtype=torch.long), TypeError, r"shape \(3, 4\) and dtype torch.int64"),
        ("french", TypeError, "is a str; expected cluster ids"),
        ({"other": 1}, ValueError, r"keys \['other'\].*adapters with a prior are \['default'\]"),
        ({}, ValueError, "expected cluster ids"),
        ({"semantic_embeds": torch.ones(1, 5)}, ValueError, "needs input_ids"),
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids is a list"),
        (
            {"input_ids": prompts(1), "position_ids": torch.cat([torch.arange(4), torch.arange(5)])[None]},
            ValueError,
            "packs several prompts",
        ),
    ],
)
def test_what_cannot_be_given(decoder, value, error, message):
    for call in (decoder, decoder.generate):
        with pytest.raises(error, match=message):
            call(**_batch(), semantic_prior=value)
    with pytest.raises(error, match=message), steer_trex(decoder, value):
        decoder(**_batch())


def test_clusters_that_cancel_out():
    model = adapted(num_clusters=2, prior_map="learned")
    with torch.no_grad():
        _prior(model).centroids[1] = -_prior(model).centroids[0]
    with pytest.raises(ValueError, match="cancel out"):
        model(**_batch(), semantic_prior=torch.tensor([0.5, 0.5]))


def test_autocast_does_not_round_a_mixture(decoder):
    weights = torch.tensor([[0.3, 0.1, 0.7, 0.0]])
    expected = _prior(decoder).score_direction(weights @ _prior(decoder).centroids)
    layer = next(module for module in decoder.modules() if isinstance(module, TRexLayer))
    seen = []
    hook = layer.register_forward_pre_hook(lambda layer, args: seen.append(layer._channel.scores("default", args[0])))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        decoder(**_batch(), semantic_prior=weights)
    hook.remove()
    torch.testing.assert_close(seen[0], expected.expand(3, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"input_ids": prompts(1)}, "needs semantic_embeds"),
        ({"semantic_embeds": torch.ones(1, 4)}, r"is \(1, 4\); expected a tensor \(B, prior_dim = 5\)"),
        ({"semantic_embeds": [[1.0] * 5]}, "is a list"),
        ({"semantic_embeds": torch.full((1, 5), NAN)}, "NaN"),
    ],
)
def test_examples_of_external_embeddings_that_cannot_be(example, message):
    model = adapted(fit=False, prior_encoder="external", prior_dim=5)
    initialize_trex_prior(model, embeddings=torch.randn(40, 5), progress=False)
    with pytest.raises(ValueError, match=message):
        model(**_batch(), semantic_prior=example)


def _conflicting(task, seed):
    """The same prompts for both tasks, which answer the last word of them in two ways."""
    generator = torch.Generator().manual_seed(seed)
    # With four words the skills are learned without a mistake, and the thresholds do not hang on the seed.
    ids = torch.randint(3, 7, (len(task), 4), generator=generator)
    answer = ids[:, -1:] + torch.where(task == 0, 10, 20)[:, None]
    return {
        "input_ids": torch.cat([ids, answer], 1),
        "labels": torch.cat([ids.new_full((len(task), 4), -100), answer], 1),
    }


@pytest.mark.parametrize("told_by", ["embeddings", "cluster ids"])
def test_steering_chooses_the_skill(told_by):
    """Trained on two tasks that conflict, the adapter answers with the skill that is chosen: nothing else tells."""
    torch.manual_seed(0)
    settings = {"prior_encoder": "external", "prior_dim": 6} if told_by == "embeddings" else {}
    config = TRexConfig(r_a=4, r_b=4, num_clusters=2, prior_map="learned", task_type="CAUSAL_LM", **settings)
    model = get_peft_model(make_llama(), config)
    task = torch.arange(64) % 2
    embeds = torch.where(task[:, None] == 0, 1.0, -1.0) + 0.3 * torch.randn(64, 6)
    if told_by == "embeddings":
        initialize_trex_prior(model, embeddings=embeds, progress=False)
        cluster = _prior(model).score(embeds).argmax(-1)[:2].tolist()
        given = {"semantic_embeds": embeds}
    else:
        initialize_trex_prior(model, [{"input_ids": prompts(64)}], progress=False)
        cluster = [0, 1]
        given = {"semantic_prior": task}
    assert sorted(cluster) == [0, 1]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    # A rate that falls to zero ends where the skills are learned, and not amid one of Adam's jumps.
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=140)
    for step in range(140):
        optimizer.zero_grad()
        model.train()(**_conflicting(task, step), **given).loss.backward()
        optimizer.step()
        rate.step()
    model.eval()
    ids = _conflicting(task, 1000)["input_ids"][:, :4]

    def answered_as(**kwargs):
        """The task that each prompt is answered by, -1 for a wrong answer."""
        answers = model.generate(input_ids=ids, max_new_tokens=1, do_sample=False, **kwargs)[:, -1]
        offset = answers - ids[:, -1]
        return torch.where(offset == 10, 0, torch.where(offset == 20, 1, -1))

    def check(wanted, **kwargs):
        answers = answered_as(**kwargs)
        assert (answers == wanted).float().mean() > 0.85
        assert (answers == 1 - wanted).float().mean() < 0.05  # what is wrong is not the other skill's

    check(task, **given)
    for skill in (0, 1):
        check(skill, semantic_prior=cluster[skill])
        with steer_trex(model, cluster[skill]):
            check(skill)
        if told_by == "embeddings":  # an example of the skill does as well
            check(skill, semantic_prior={"semantic_embeds": embeds[skill::2][:1]})
    rows = torch.randint(0, 2, (64,))
    check(rows, semantic_prior=torch.tensor(cluster)[rows])


def test_trainer_hands_the_column_on(tmp_path):
    """Cluster ids as a column: each row is trained with its own, as if its prompt had these scores."""
    rows = [
        {"input_ids": ids, "labels": [-100] * 5 + ids[5:], "semantic_prior": index % K}
        for index, ids in enumerate(prompts(8).tolist())
    ]

    def train(model, data):
        args = TrainingArguments(
            tmp_path, max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
            remove_unused_columns=False, learning_rate=0.01, save_strategy="no", seed=0,
        )  # fmt: skip
        Trainer(model=model, args=args, train_dataset=data).train()
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    found = train(adapted(), rows)
    plain = train(adapted(), [{key: row[key] for key in ("input_ids", "labels")} for row in rows])
    model = adapted()
    seen = []
    handle = model.base_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.pop("ours")) or (args, kwargs), with_kwargs=True, prepend=True
    )
    prior = _prior(model)
    prior.score = lambda embedding: _cosines(model)[seen[-1]]
    expected = train(
        model,
        [{**{k: v for k, v in row.items() if k != "semantic_prior"}, "ours": row["semantic_prior"]} for row in rows],
    )
    handle.remove()
    assert len(seen) == 2
    _assert_same(found, expected, plain)


@pytest.mark.slow
def test_compiled_in_one_graph():
    """Other clusters for other rows compile nothing anew, by argument and in a block."""
    torch._dynamo.reset()
    model = adapted(base=make_llama(num_hidden_layers=1), target_modules=["q_proj", "down_proj"])
    batch, given = _batch(), [ROWS, ROWS.flip(0)]
    with torch.no_grad():
        plain = model(**batch).logits
        expected = [model(**batch, semantic_prior=rows).logits for rows in given]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for number, (rows, logits) in enumerate(zip(given, expected, strict=True)):
            with torch._dynamo.config.patch(error_on_recompile=bool(number)):
                _assert_same(compiled(**batch, semantic_prior=rows).logits, logits, plain)
        for number, (rows, logits) in enumerate(zip(given, expected, strict=True)):
            with steer_trex(model, rows), torch._dynamo.config.patch(error_on_recompile=bool(number)):
                _assert_same(compiled(**batch).logits, logits, plain)
        _assert_same(compiled(**batch).logits, plain, expected[0])
    torch._dynamo.reset()
