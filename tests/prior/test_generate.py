"""`generate` and hand-written decoding: the prompt's prior holds for all new tokens, whatever the path."""

import pytest
import torch
from conftest import CACHE, PAD, adapted, pad_to, prompts

from peft_trex import TRexLayer
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
