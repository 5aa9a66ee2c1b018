"""Which calls a prior reaches: caches that are edited, calls within calls, contexts, and ends of every kind."""

import asyncio
import copy
import gc
import inspect
import pickle
import sys
import threading
import warnings
import weakref

import pytest
import torch
from conftest import BEFORE_5, CACHE, PAD, adapted, batches, exact_model, prompts, randomize
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    GitConfig,
    GitForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from peft_trex import TRexLayer, initialize_trex_prior, steer_trex
from peft_trex.prior.history import history_of

ROWS = prompts(3, seed=2)
MAMBA_CACHE = "cache" if "cache" in inspect.signature(MambaForCausalLM.forward).parameters else "cache_params"
TOKENS = torch.tensor([[5], [22], [40]])


@pytest.fixture(scope="module")
def model():
    return adapted()


def filled(model, rows=ROWS, **kwargs):
    with torch.no_grad():
        return model(input_ids=rows, use_cache=True, **kwargs)[CACHE]


def step(model, cache, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, **{CACHE: cache}).logits


def assert_idle(model):
    running = model.base_model.prompts.channel.running
    assert running.state is None and running.frame is None and running.generation is None


class Renamed(DynamicCache):
    """A class of one's own, with methods of its own."""

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)


@pytest.mark.parametrize("kind", [DynamicCache, Renamed])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", ["batch_select_indices", "reorder_cache"])
def test_the_prior_moves_with_a_caches_rows(model, kind, name, copied):
    cache, order = filled(model, **{CACHE: kind()}), torch.tensor([2, 0, 1])
    expected = step(model, copy.deepcopy(cache), TOKENS)[order]
    cache = copy.deepcopy(cache) if copied else cache
    getattr(cache, name)(order)
    torch.testing.assert_close(step(model, cache, TOKENS[order]), expected)


def test_repeated_rows_keep_their_prior(model):
    cache = filled(model)
    expected = step(model, copy.deepcopy(cache), TOKENS).repeat_interleave(2, 0)
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(step(model, cache, TOKENS.repeat_interleave(2, 0)), expected)
    chosen = torch.tensor([1, 4])
    cache = filled(model)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(chosen)
    torch.testing.assert_close(step(model, cache, TOKENS.repeat_interleave(2, 0)[chosen]), expected[chosen])
    fewer = filled(model)
    fewer.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(step(model, fewer, TOKENS[1:2]), expected[2:3])


def test_an_answer_that_is_cut_back_goes_on_with_its_prior(model):
    """As a decoder does that takes wrong guesses back."""
    cache = filled(model)
    expected = step(model, copy.deepcopy(cache), TOKENS)
    for token in (7, 8, 9):
        step(model, cache, torch.full((3, 1), token))
    cache.crop(-3)
    assert history_of(cache).content.length == ROWS.shape[1]
    # The turn goes on, so its prior need not be computed again, which the next token would wait for.
    assert not history_of(cache).is_cut
    torch.testing.assert_close(step(model, cache, TOKENS), expected)
    cache.crop(-2)
    assert history_of(cache).is_cut


@pytest.mark.skipif(BEFORE_5, reason="caches that are reset keep their number of tokens before transformers 5")
def test_a_cache_that_is_reset_forgets(model):
    model = adapted()
    cache = filled(model)
    cache.reset()
    assert history_of(cache) is None
    expected = filled(model, ROWS[:2])
    torch.testing.assert_close(
        step(model, filled(model, ROWS[:2], **{CACHE: cache}), TOKENS[:2]), step(model, expected, TOKENS[:2])
    )


def test_a_cache_is_freed_at_once_and_can_be_pickled(model):
    cache = filled(model)
    expected = step(model, copy.deepcopy(cache), TOKENS)
    loaded = pickle.loads(pickle.dumps(cache))
    torch.testing.assert_close(step(model, loaded, TOKENS), expected)
    gc.disable()
    try:
        held = weakref.ref(cache)
        del cache
        assert held() is None
    finally:
        gc.enable()


def test_a_cache_that_the_base_model_has_filled_too_warns():
    model = adapted()
    cache = filled(model)
    with model.disable_adapter():
        step(model, cache, TOKENS)
    with pytest.warns(UserWarning, match="cache whose prompt T-REX did not see"):
        step(model, cache, TOKENS)


def test_rows_that_a_cache_does_not_have_are_refused(model):
    cache = filled(model)
    cache.batch_select_indices(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"3 rows, but the prior was computed for 2 prompts"):
        step(model, cache, TOKENS)
    with pytest.raises(ValueError, match=r"3 rows, but the prior was computed for 2 prompts"):
        model.generate(torch.cat([ROWS, TOKENS], 1), max_new_tokens=2, **{CACHE: cache})
    assert_idle(model)


def test_an_encoder_decoders_cache():
    t5 = adapted("t5")
    start = torch.zeros(3, 1, dtype=torch.long)
    with torch.no_grad():
        output = t5(input_ids=ROWS, decoder_input_ids=start, use_cache=True)
        cache, encoded = output.past_key_values, t5.get_base_model().get_encoder()(input_ids=ROWS)
        both = torch.cat([start, TOKENS], 1)
        expected = t5(encoder_outputs=encoded, decoder_input_ids=both).logits[:, 1:]
        order = torch.tensor([2, 0, 1])
        cache.reorder_cache(order)
        swapped = (encoded.last_hidden_state[order],)
        got = t5(encoder_outputs=swapped, decoder_input_ids=TOKENS[order], past_key_values=cache).logits
    torch.testing.assert_close(got, expected[order])


def test_an_encoder_decoders_scope_answer():
    """Nothing of the prompt is an answer, and all of what the decoder writes is."""
    models = {scope: exact_model("t5", prior_scope=scope) for scope in ("prompt", "answer")}
    ids = {"input_ids": ROWS, "decoder_input_ids": ROWS[:, :4]}
    encoded, logits = {}, {}
    with torch.no_grad():
        for scope, model in models.items():
            encoder = model.get_base_model().get_encoder()
            encoded[scope] = [encoder(input_ids=ROWS, semantic_prior=c).last_hidden_state for c in (0, 1)]
            logits[scope] = [model(**ids, semantic_prior=cluster).logits for cluster in (0, 1)]
        own = models["answer"](**ids).logits
        alone = [models["answer"](**{name: value[row : row + 1] for name, value in ids.items()}) for row in range(3)]
    assert torch.equal(*encoded["answer"]) and not torch.allclose(*encoded["prompt"])
    assert not torch.allclose(*logits["answer"]) and not torch.allclose(own, logits["answer"][0])
    # T5 norms in float32 whatever the weights are.
    torch.testing.assert_close(own, torch.cat([output.logits for output in alone]), atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(BEFORE_5, reason="Mamba wants a cache_position in each forward before transformers 5")
def test_a_state_space_models_cache():
    torch.manual_seed(0)
    config = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.3}
    base = MambaForCausalLM(MambaConfig(**config, pad_token_id=PAD, bos_token_id=1, eos_token_id=2)).eval()
    model = adapted(base=base, target_modules=["in_proj", "x_proj"])
    ids = ROWS[:1]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, 9:].tolist()
    with torch.no_grad():
        output, tokens = model(input_ids=ids, use_cache=True), []
        for _ in range(6):
            token = output.logits[:, -1:].argmax(-1)
            tokens.append(token.item())
            output = model(input_ids=token, use_cache=True, **{MAMBA_CACHE: output[MAMBA_CACHE]})
    assert tokens == expected


def test_a_sliding_windows_cache():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, sliding_window=6, pad_token_id=PAD, eos_token_id=None,
    )  # fmt: skip
    model = adapted(base=MistralForCausalLM(config).eval(), prior_scope="answer")
    expected = model.generate(ROWS, max_new_tokens=6, do_sample=False)[:, 9:]
    output, tokens = model(input_ids=ROWS, use_cache=True), []
    with torch.no_grad():
        for _ in range(6):
            tokens.append(output.logits[:, -1:].argmax(-1))
            output = model(input_ids=tokens[-1], use_cache=True, **{CACHE: output[CACHE]})
    assert torch.equal(torch.cat(tokens, 1), expected)


def test_lists_of_states_are_caches():
    """RWKV's state, as a kind of its own: it cannot carry anything."""
    config = RwkvConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, context_length=64, pad_token_id=PAD, eos_token_id=2
    )
    torch.manual_seed(0)
    model = adapted(base=RwkvForCausalLM(config).eval())
    seen = []
    layer = next(module for module in model.modules() if isinstance(module, TRexLayer))
    layer.register_forward_pre_hook(lambda layer, args: seen.append(layer._channel.scores("default", args[0])))
    model.generate(ROWS, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert len(seen) == 5 and all(torch.equal(scores, seen[0]) for scores in seen)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*neither labels nor")
        state = model(input_ids=ROWS, use_cache=True).state
    with pytest.warns(UserWarning, match="cache whose prompt T-REX did not see"):
        model(input_ids=TOKENS, state=state)


def test_a_shallow_copy_of_a_cache_that_is_gone(model):
    cache = filled(model)
    copied = copy.copy(cache)
    del cache
    with pytest.raises(RuntimeError, match=r"crop was called on a shallow copy .*use copy\.deepcopy"):
        copied.crop(-1)


def test_a_prior_that_is_given_needs_no_mask_of_tokens(model):
    mask = torch.ones(9, 9, dtype=torch.bool).tril().expand(3, 1, 9, 9)
    torch.testing.assert_close(run(model, semantic_prior=1, attention_mask=mask), run(model, semantic_prior=1))
    with pytest.raises(ValueError, match="needs a mask of shape"):
        run(model, attention_mask=mask)


def test_a_tower_within_the_text_model_sees_no_prior():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    model = adapted(
        base=GitForCausalLM(GitConfig(vision_config=vision, vocab_size=64, pad_token_id=PAD, **sizes)).eval()
    )
    pixels, seen = torch.randn(3, 3, 8, 8), []
    model.get_base_model().git.image_encoder.register_forward_hook(lambda *args: seen.append(args[2][0]))
    logits = [run(model, pixel_values=pixels, semantic_prior=cluster) for cluster in (0, 1)]
    assert torch.equal(*seen) and not torch.allclose(*logits)


class Within(LogitsProcessor):
    """Runs something within a generate call, after its first forward."""

    def __init__(self, action):
        self.action, self.results = action, []

    def __call__(self, input_ids, scores):
        self.results.append(self.action(input_ids))
        return scores


def generate(model, ids=ROWS[:1], action=None, **kwargs):
    processor = Within(action or (lambda _: None))
    with torch.no_grad():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=PAD,
            logits_processor=LogitsProcessorList([processor]), **kwargs,
        )  # fmt: skip
    return output, processor.results


OTHER = ROWS[1:2, :5]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "action",
    [
        lambda model: lambda _: model(input_ids=OTHER).logits,
        lambda model: lambda _: model(input_ids=OTHER, semantic_prior=2).logits,
        lambda model: lambda _: model(input_ids=ROWS[:1], semantic_prior=2).logits,
        lambda model: lambda _: model(input_ids=ROWS).logits,
        lambda model: lambda _: model.generate(OTHER, max_new_tokens=4, do_sample=False).float(),
        lambda model: lambda _: step(model, filled(model, OTHER), TOKENS[:1]),
    ],
    ids=["forward", "steered forward", "its own prompt steered", "more rows", "generate", "a cache of its own"],
)
def test_a_call_within_generate_has_its_own_prior(model, action, use_cache):
    plain, _ = generate(model, use_cache=use_cache)
    with torch.no_grad():
        alone = action(model)(None)
    output, results = generate(model, action=action(model), use_cache=use_cache)
    assert torch.equal(output, plain) and len(results) == 3
    for result in results:
        torch.testing.assert_close(result, alone)
    assert_idle(model)


def test_a_call_within_generate_that_goes_on_with_its_prompt_has_its_prior(model):
    """A reward model's look at what is written so far, for instance."""
    length = ROWS.shape[1]

    def told(ids):
        mask = torch.zeros_like(ids)
        mask[:, length:] = 1
        return model(input_ids=ids).logits, model(input_ids=ids, completion_mask=mask).logits

    _, results = generate(model, action=lambda ids: model(input_ids=ids).logits)
    output, _ = generate(model)
    for new, logits in enumerate(results):
        with torch.no_grad():
            _, expected = told(output[:, : length + new]) if new else (None, model(input_ids=ROWS[:1]).logits)
        torch.testing.assert_close(logits, expected)


def test_another_adapter_within_generate():
    model = adapted()
    model.add_adapter("judge", copy.deepcopy(model.peft_config["default"]))
    randomize(model, "judge", seed=3)
    initialize_trex_prior(model, batches(seed=4), adapter_name="judge", progress=False)

    def judged(_):
        model.set_adapter("judge")
        logits = model(input_ids=OTHER).logits
        model.set_adapter("default")
        return logits

    plain, _ = generate(model)
    with torch.no_grad():
        alone = judged(None)
    output, results = generate(model, action=judged)
    assert torch.equal(output, plain)
    for result in results:
        torch.testing.assert_close(result, alone)


def test_guidance_runs_its_negative_prompt_with_its_own_prior(model):
    ids, negative = ROWS[:1], OTHER
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), negative_prompt_ids=negative, guidance_scale=1.7,
        negative_prompt_attention_mask=torch.ones_like(negative), max_new_tokens=2, do_sample=False,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    token = output.sequences[:, -2:-1]
    for new, scores in enumerate(output.scores):
        logits = []
        for prompt in (ids, negative):
            whole = torch.cat([prompt, token[:, :new]], 1)
            mask = (torch.arange(whole.shape[1]) >= prompt.shape[1]).long()[None]
            with torch.no_grad():
                logits.append(model(input_ids=whole, completion_mask=mask).logits[:, -1].log_softmax(-1))
        torch.testing.assert_close(scores, logits[1] + 1.7 * (logits[0] - logits[1]))


@pytest.mark.parametrize("part", ["model", "backbone"])
def test_a_forward_within_a_forward(model, part):
    layer = next(module for module in model.modules() if isinstance(module, TRexLayer))
    called = model if part == "model" else model.get_base_model().model
    with torch.no_grad():
        plain, alone = model(input_ids=ROWS).logits, called(input_ids=OTHER)[0]
        inner = []

        def run(*_):
            if not inner:
                inner.append(None)
                inner[0] = called(input_ids=OTHER)[0]

        handle = layer.register_forward_pre_hook(run)
        outer = model(input_ids=ROWS).logits
        handle.remove()
    torch.testing.assert_close(inner[0], alone)
    torch.testing.assert_close(outer, plain)
    assert_idle(model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, GeneratorExit])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_what_ends_a_forward_leaves_nothing_behind(kind, error):
    model = adapted(kind)
    base = model.get_base_model()
    inner = base.get_encoder() if kind == "t5" else base.model
    layers = [module for module in model.modules() if isinstance(module, TRexLayer)]
    with torch.no_grad():
        expected = inner(input_ids=ROWS[:2]).last_hidden_state

    def fail(*_):
        raise error

    for call in ("model", "generate", "inner"):
        for layer in (layers[0], layers[len(layers) // 2 if call != "inner" else 3], layers[-1]):
            handle = layer.register_forward_pre_hook(fail)
            try:
                with torch.no_grad():
                    if call == "model":
                        model(input_ids=ROWS, **({"labels": ROWS} if kind == "t5" else {}))
                    elif call == "generate":
                        model.generate(input_ids=ROWS, max_new_tokens=2)
                    else:
                        inner(input_ids=ROWS)
            except error:
                pass
            handle.remove()
            assert_idle(model)
    with torch.no_grad():
        torch.testing.assert_close(inner(input_ids=ROWS[:2]).last_hidden_state, expected)


def test_a_forward_that_is_called_past_the_hooks():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = adapted(base=BertModel(config).eval(), task_type="FEATURE_EXTRACTION")
    base = model.get_base_model()
    with torch.no_grad():
        torch.testing.assert_close(base.forward(ROWS).last_hidden_state, base(ROWS).last_hidden_state)
        causal = adapted()
        direct = causal.get_base_model().forward(input_ids=ROWS, semantic_prior=1).logits
        torch.testing.assert_close(direct, causal(input_ids=ROWS, semantic_prior=1).logits)
    assert_idle(model)
    assert "forward" not in vars(model.unload())


def test_a_copy_is_watched_by_itself(model):
    with torch.no_grad():
        twin = copy.deepcopy(model)
        expected = model(input_ids=ROWS).logits
        twin.base_model.trex_prior["default"].centroids.mul_(-1)
        assert not torch.allclose(twin(input_ids=ROWS).logits, expected, atol=1e-3)
        assert not torch.allclose(twin.get_base_model().forward(input_ids=ROWS).logits, expected, atol=1e-3)
        torch.testing.assert_close(model(input_ids=ROWS).logits, expected)


def run(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=ROWS, **kwargs).logits


def test_blocks_of_coroutines_that_end_in_any_order(model):
    plain, steered = run(model), [run(model, semantic_prior=cluster) for cluster in range(3)]
    order = []

    async def request(cluster, entered, go):
        with steer_trex(model, cluster):
            entered.set()
            await go.wait()
            torch.testing.assert_close(run(model), steered[cluster])
            torch.testing.assert_close(await asyncio.to_thread(run, model), steered[cluster])
        torch.testing.assert_close(run(model), plain)
        order.append(cluster)

    async def main():
        entered, go = [asyncio.Event() for _ in range(3)], [asyncio.Event() for _ in range(3)]
        tasks = []
        for cluster in range(3):
            tasks.append(asyncio.create_task(request(cluster, entered[cluster], go[cluster])))
            await entered[cluster].wait()
        for cluster in (0, 2, 1):
            go[cluster].set()
            await tasks[cluster]

    asyncio.run(main())
    assert order == [0, 2, 1]
    torch.testing.assert_close(run(model), plain)


def test_blocks_of_generators_that_end_in_any_order(model):
    plain, steered = run(model), [run(model, semantic_prior=cluster) for cluster in range(2)]

    def stream(cluster):
        with steer_trex(model, cluster):
            yield run(model)
            yield None

    first, second = stream(0), stream(1)
    torch.testing.assert_close(next(first), steered[0])
    torch.testing.assert_close(next(second), steered[1])
    first.close()
    torch.testing.assert_close(run(model), steered[1])
    second.close()
    torch.testing.assert_close(run(model), plain)
    assert not model.base_model.prompts.channel.running.blocks


def test_a_thread_has_blocks_of_its_own(model):
    plain, steered, results = run(model), run(model, semantic_prior=1), []
    with steer_trex(model, 1):
        for given in ({}, {"semantic_prior": 1}):
            thread = threading.Thread(target=lambda given=given: results.append(run(model, **given)))
            thread.start()
            thread.join()
    inherits = getattr(sys.flags, "thread_inherit_context", False)
    torch.testing.assert_close(results[0], steered if inherits else plain)
    torch.testing.assert_close(results[1], steered)
    torch.testing.assert_close(run(model), plain)


@torch.no_grad()
def test_a_call_within_an_encoder_decoders_generate_has_its_own_prior():
    t5 = adapted("t5")
    start = torch.zeros(1, 2, dtype=torch.long)
    encoded = t5.get_base_model().get_encoder()(input_ids=OTHER)
    actions = [
        lambda _: t5(input_ids=OTHER, decoder_input_ids=start).logits,
        lambda _: t5(encoder_outputs=encoded, decoder_input_ids=start).logits,
        lambda _: t5.generate(input_ids=OTHER, max_new_tokens=4, do_sample=False).float(),
    ]
    alone = [action(None) for action in actions]
    for settings in ({}, {"num_beams": 2}, {"use_cache": False}):
        plain, _ = generate(t5, **settings)
        for action, expected in zip(actions, alone, strict=True):
            output, results = generate(t5, action=action, **settings)
            assert torch.equal(output, plain)
            for result in results:
                torch.testing.assert_close(result, expected)
    assert_idle(t5)


@pytest.mark.parametrize("path", [{}, {"prompt_lookup_num_tokens": 2}], ids=["greedy", "assisted"])
@pytest.mark.filterwarnings("ignore:.*past_key_values.*deprecated:FutureWarning")
def test_a_cut_generation_goes_on(model, path):
    if path and BEFORE_5:
        pytest.skip("assisted generation needs an end token before transformers 5")

    def more(ids, count, **kwargs):
        settings = {"do_sample": False, "pad_token_id": PAD, "return_dict_in_generate": True, **kwargs}
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **settings)

    whole = more(ROWS[:1], 8).sequences
    half = more(ROWS[:1], 4, **path)
    rest = more(half.sequences, 4, past_key_values=half.past_key_values)
    assert torch.equal(rest.sequences, whole)
