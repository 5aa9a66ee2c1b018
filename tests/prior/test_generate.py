"""`generate` and hand-written decoding: the prompt's prior holds for all new tokens, whatever the path."""

import warnings

import pytest
import torch
from conftest import CACHE, PAD, adapted, batches, make_llama, pad_to, prompts, randomize
from transformers import LogitsProcessorList

import peft_trex.layer
from peft_trex import TRexConfig, TRexLayer, initialize_trex_prior
from peft_trex.fast.core import fold
from peft_trex.prior.inputs import Inputs

LENGTHS = [9, 4, 6]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def decoder(request):
    return adapted(request.param)


@pytest.fixture(scope="module")
def t5():
    return adapted("t5")


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def any_model(request):
    return adapted(request.param)


def _rows():
    return [row[:length] for row, length in zip(prompts(3, seed=2), LENGTHS, strict=True)]


def _batch(side):
    padded, masks = zip(*(pad_to(row, 10, side) for row in _rows()), strict=True)
    return {"input_ids": torch.stack(padded), "attention_mask": torch.stack(masks)}


def _new(model, inputs, **kwargs):
    """Newly generated tokens only."""
    out = model.generate(**inputs, max_new_tokens=8, pad_token_id=PAD, **{"do_sample": False, **kwargs})
    return out if model.config.is_encoder_decoder else out[:, inputs["input_ids"].shape[1] :]


PATHS = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "beams, no cache": {"num_beams": 3, "use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("path", PATHS)
def test_batch_row_equals_single_row(decoder, path):
    together = _new(decoder, _batch("left"), **PATHS[path])
    for index, row in enumerate(_rows()):
        torch.testing.assert_close(_new(decoder, {"input_ids": row[None]}, **PATHS[path])[0], together[index])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_t5_batch_row_equals_single_row(t5, path, side):
    together = _new(t5, _batch(side), **PATHS[path])
    for index, row in enumerate(_rows()):
        torch.testing.assert_close(_new(t5, {"input_ids": row[None]}, **PATHS[path])[0], together[index])


@pytest.mark.parametrize("beams", [1, 3])
def test_cache_equals_no_cache(any_model, beams):
    model = any_model
    with_cache, without = (_new(model, _batch("left"), use_cache=cache, num_beams=beams) for cache in (True, False))
    assert torch.equal(with_cache, without)


def test_prior_is_the_same_for_every_new_token(any_model):
    """What the layers see: the prompts' own scores, repeated for each beam or returned sequence, in every call."""
    model = any_model
    inputs = _batch("left")
    tuner = model.base_model
    expected = tuner.trex_prior["default"].score(tuner.prompts.scorer.embed(Inputs.of(inputs))[0])
    seen = []
    layer = next(module for module in model.modules() if isinstance(module, TRexLayer))
    handle = layer.register_forward_pre_hook(
        lambda layer, args: seen.append(layer._channel.scores("default", args[0]))
    )
    try:
        for settings, times in (({}, 1), ({"num_beams": 2}, 2), ({"do_sample": True, "num_return_sequences": 3}, 3)):
            for cache in (True, False):
                seen.clear()
                _new(model, inputs, use_cache=cache, **settings)
                assert seen
                for scores in seen:
                    repeats = scores.shape[0] // 3
                    assert repeats in (1, times)
                    torch.testing.assert_close(scores, expected.repeat_interleave(repeats, dim=0))
    finally:
        handle.remove()


def test_sampling_several_sequences_draws_from_the_right_prompt(decoder):
    """With as good as no randomness, each returned sequence is its own prompt's greedy one."""
    greedy = _new(decoder, _batch("left"))
    sampled = _new(decoder, _batch("left"), do_sample=True, num_return_sequences=2, temperature=1e-4)
    assert torch.equal(sampled, greedy.repeat_interleave(2, dim=0))


@pytest.mark.parametrize("call", ["positional", "inputs", "base", "untyped"])
def test_every_way_to_call_generate(call):
    model = adapted(task_type=None if call == "untyped" else "CAUSAL_LM")
    ids = _rows()[0][None]
    expected = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert not torch.equal(expected, _without_prior(model, ids))
    settings = {"max_new_tokens": 6, "do_sample": False}
    if call == "positional":
        found = model.generate(ids, **settings)
    elif call == "inputs":
        found = model.generate(inputs=ids, **settings)
    elif call == "base":
        found = model.get_base_model().generate(ids, **settings)
    else:
        found = model.generate(input_ids=ids, **settings)
    assert torch.equal(found, expected)


def _without_prior(model, ids):
    prior = model.base_model.trex_prior["default"]
    kept = prior.centroids.clone()
    prior.centroids.mul_(-1)
    out = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    prior.centroids.copy_(kept)
    return out


def test_padding_without_a_mask_is_found_as_transformers_finds_it(decoder):
    batch = _batch("left")
    assert torch.equal(_new(decoder, {"input_ids": batch["input_ids"]}), _new(decoder, batch))


def test_inputs_embeds(decoder):
    ids = _rows()[0][None]
    embeds = decoder.get_input_embeddings()(ids)
    found = decoder.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False, pad_token_id=PAD)
    assert torch.equal(found, decoder.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=PAD)[:, 9:])


@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
@pytest.mark.filterwarnings("ignore:.*past_key_values.*deprecated:FutureWarning")
def test_decoding_by_hand_with_a_cache(decoder, name):
    """A cache carries the prior of its prompt: token by token equals the whole sequence with the prompt's prior.

    It does so under each name that transformers takes it by.
    """
    ids = _rows()[0][None]
    expected = decoder.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=PAD)[0, 9:].tolist()
    output = decoder(input_ids=ids, use_cache=True)
    found = []
    for _ in range(6):
        token = output.logits[:, -1:].argmax(-1)
        found.append(token.item())
        output = decoder(input_ids=token, **{name: output[CACHE]}, use_cache=True)
    assert found == expected


def test_a_foreign_cache_warns_once():
    model = adapted()
    ids = _rows()[0][None]
    with model.disable_adapter():
        cache = {CACHE: model(input_ids=ids, use_cache=True)[CACHE]}
    with pytest.warns(UserWarning, match="cache whose prompt T-REX did not see"):
        model(input_ids=ids[:, :1], **cache)
    model(input_ids=ids[:, :1], **cache)  # a second warning would be an error here


def test_t5_encoder_on_its_own(t5):
    ids = prompts(3)
    decoder_ids = ids[:, :4]
    expected = t5(input_ids=ids, decoder_input_ids=decoder_ids).logits
    encoded = t5.get_base_model().get_encoder()(input_ids=ids)
    torch.testing.assert_close(t5(encoder_outputs=encoded, decoder_input_ids=decoder_ids).logits, expected)
    bare = (encoded.last_hidden_state,)
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        t5(encoder_outputs=bare, decoder_input_ids=decoder_ids)


def test_backbone_on_its_own():
    model = adapted()
    ids = prompts(3)
    hidden = model.get_base_model().model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model.get_base_model().lm_head(hidden), model(input_ids=ids).logits)


def test_a_prompt_of_nothing_has_no_prior():
    model = adapted()
    model.generate(max_new_tokens=3, do_sample=False, bos_token_id=1)


def test_a_failed_forward_leaves_no_prior_behind():
    model = adapted()
    with pytest.raises(IndexError):
        model(input_ids=torch.full((2, 3), 10_000))
    with pytest.raises(Exception, match=r".*"):
        model.generate(input_ids=prompts(2), max_new_tokens=-1)
    running = model.base_model.prompts.channel.running
    assert running.state is None and running.frame is None and running.generation is None
    model(input_ids=prompts(3))


def test_a_layer_outside_of_a_forward_is_refused():
    model = adapted()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with pytest.raises(RuntimeError, match="outside of a forward"):
        layer(torch.zeros(1, 2, 32))


def test_rows_that_do_not_fit_the_prompts_are_refused():
    model = adapted()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    original = layer.forward
    layer.forward = lambda x: original(x.flatten(0, 1)[:5])[None]
    with pytest.raises(ValueError, match="which prompt each row belongs to"):
        model(input_ids=prompts(3))
    flat = adapted()
    expected = flat(input_ids=prompts(3)).logits
    flat_layer = flat.base_model.model.model.layers[0].self_attn.q_proj
    inner = flat_layer.forward
    flat_layer.forward = lambda x: inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    torch.testing.assert_close(flat(input_ids=prompts(3)).logits, expected)


STATIC = {"use_router": False, "shared_core": True}
STATIC_PATHS = {
    **PATHS,
    "several sequences": {"do_sample": True, "num_return_sequences": 2, "temperature": 1e-4},
    "scope answer": {},
    "identity map": {},
    "paired": {},
    "not fitted": {},
}


def _twins(path="greedy"):
    """A model without a token router, and the same by the readable formula."""
    settings = {
        "scope answer": {"prior_scope": "answer"},
        "identity map": {"num_clusters": 6},
        "paired": {"expert_layout": "paired", "r_a": 3, "r_b": 3},
        "not fitted": {"fit": False},
    }.get(path, {})
    return [adapted(**STATIC, **settings, mixture_implementation=each) for each in ("auto", "reference")]


def _logits(model, inputs, **kwargs):
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 6, "pad_token_id": PAD}
    found = model.generate(**inputs, **{"do_sample": False, **options, **kwargs})
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize("path", STATIC_PATHS)
@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.filterwarnings("ignore:The semantic prior of the adapter:UserWarning")
def test_without_a_token_router_generation_equals_the_formula(path, inference):
    model, twin = _twins(path)
    for inputs in (_batch("left"), {"input_ids": _rows()[0][None]}):
        with torch.inference_mode() if inference else torch.no_grad():
            (ids, found), (same_ids, expected) = (
                _logits(each, inputs, **STATIC_PATHS[path]) for each in (model, twin)
            )
        assert torch.equal(ids, same_ids)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_generate_call_computes_the_weights_once(monkeypatch):
    model, _ = _twins()
    layers = sum(isinstance(module, TRexLayer) for module in model.modules())
    calls = []

    def counted(*args):
        calls.append(None)
        return fold(*args)

    monkeypatch.setattr(peft_trex.layer, "fold", counted)
    for number in (1, 2):
        _new(model, _batch("left"))
        assert len(calls) == number * layers
    with torch.no_grad():
        model(**_batch("left")), model(**_batch("left"))
    assert len(calls) == 4 * layers


def _add(layer, kind):
    with torch.no_grad():
        getattr(layer, kind)["default"].add_(0.3 if kind in ("trex_map", "trex_core") else 0.02)


def _replace(layer, kind):
    parameters = getattr(layer, kind)
    parameters["default"] = torch.nn.Parameter(parameters["default"].detach() + 0.02, requires_grad=False)


@pytest.mark.parametrize("kind", ["trex_map", "trex_core", "trex_omega", "trex_gate", "trex_A", "trex_B"])
@pytest.mark.parametrize("change", [_add, _replace])
def test_what_changes_while_a_call_runs_counts_from_the_next_token_on(kind, change):
    outputs = []
    for model in _twins():
        seen = []

        def processor(ids, scores, model=model, seen=seen):
            seen.append(scores)
            if len(seen) == 3:
                for layer in [module for module in model.modules() if isinstance(module, TRexLayer)]:
                    change(layer, kind)
            return scores

        _logits(model, {"input_ids": _rows()[0][None]}, logits_processor=LogitsProcessorList([processor]))
        outputs.append(torch.stack(seen))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    model, _ = _twins()
    _, unchanged = _logits(model, {"input_ids": _rows()[0][None]})
    torch.testing.assert_close(outputs[0][:3], unchanged[:3], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs[0][3], unchanged[3], rtol=1e-3, atol=1e-3)


def test_another_adapter_takes_over_while_a_call_runs():
    outputs = []
    for model in _twins():
        implementation = model.peft_config["default"].mixture_implementation
        other = TRexConfig(
            r_a=3, r_b=2, num_clusters=4, task_type="CAUSAL_LM", **STATIC, mixture_implementation=implementation
        )
        model.add_adapter("other", other)
        randomize(model, "other", seed=3)
        initialize_trex_prior(model, batches(), adapter_name="other", progress=False)
        model.base_model.set_adapter(["default", "other"])

        def processor(ids, scores, model=model):
            if ids.shape[1] == 12:
                model.set_adapter("other")
            return scores

        inputs = {"input_ids": _rows()[0][None]}
        outputs.append(_logits(model, inputs, logits_processor=LogitsProcessorList([processor]))[1])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_a_model_drafts_its_own_tokens():
    """As with early exit, where the model itself is the assistant: the draft has the prompt's prior, and so has what
    is kept of it."""
    model = adapted(base=make_llama(num_hidden_layers=3))
    ids = prompts(1, seed=7)
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
    expected = model.generate(ids, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.generate(ids, assistant_model=model.get_base_model(), **kwargs), expected)
        assert torch.equal(model.generate(ids, assistant_early_exit=1, **kwargs), expected)
    # What runs afterwards is not touched.
    assert torch.equal(model.generate(ids, **kwargs), expected)


@pytest.mark.filterwarnings("ignore:.*past_key_values.*deprecated:FutureWarning")
def test_a_pad_token_within_an_answer_stays_when_it_goes_on():
    """transformers masks it where there is no mask, and the answer would go on otherwise than in one call."""
    model, answer = adapted(), [11, PAD, 12, PAD, 13, 14, 15, 16]
    row = torch.cat([torch.tensor([PAD, PAD]), prompts(1, length=7)[0]])
    ids = torch.stack([row, prompts(2)[1]])

    def write(_, scores):
        written.append(answer[len(written)])
        return torch.full_like(scores, -1e4).index_fill(1, torch.tensor([written[-1]]), 0.0)

    def more(ids, count, **kwargs):
        settings = {"do_sample": False, "pad_token_id": PAD, "output_logits": True, "return_dict_in_generate": True}
        return model.generate(ids, max_new_tokens=count, logits_processor=[write], **settings, **kwargs)

    written = []
    whole = more(ids, 8)
    written = []
    half = more(ids, 5)
    rest = more(half.sequences, 3, past_key_values=half.past_key_values)
    assert torch.equal(rest.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(rest.logits), torch.stack(whole.logits[5:]), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:.*past_key_values.*deprecated:FutureWarning")
def test_several_sequences_of_a_prompt_go_on_from_their_cache():
    model, ids = adapted(), prompts(3, seed=9)

    def more(ids, count, **kwargs):
        settings = {"do_sample": True, "temperature": 1e-4, "return_dict_in_generate": True, **kwargs}
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **settings)

    whole = more(ids, 8).sequences.repeat_interleave(2, 0)
    half = more(ids, 4, num_return_sequences=2)
    rest = more(half.sequences, 4, past_key_values=half.past_key_values)
    assert torch.equal(rest.sequences, whole)


def test_a_generate_call_that_its_caches_rows_do_not_fit_is_refused():
    model = adapted()
    cache = model(input_ids=prompts(2), use_cache=True)[CACHE]
    with pytest.raises(ValueError, match=r"called with 3 rows, but the prior was computed for 2 prompts"):
        model.generate(prompts(3, length=12), past_key_values=cache, max_new_tokens=2)
