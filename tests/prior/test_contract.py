"""One prompt, one prior, on every road: each way to run a conversation gives the logits that the rules ask for.

The rules are written down once more here, token by token in plain Python, and a forward with these scores, without any
of the package's hooks, is what every road is compared with. A road that cannot follow the rules has to warn.
"""

import copy
import warnings

import pytest
import torch
from conftest import BEFORE_5, CACHE, PAD, adapted, make_llama, make_t5, prompts
from peft import get_peft_model
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache

from peft_trex import TRexConfig, TRexLayer, initialize_trex_prior
from peft_trex.prior.state import ForwardState

BEFORE, AFTER, HEADER = [60, 61], [62], [63]
MARKERS = {"before": BEFORE, "after": AFTER, "assistant": HEADER}
# Tokens 1 and 2, which no message has.
SYSTEM = [1, 2, 1]
USERS = [row.tolist() for row in prompts(4, length=6, seed=2)]
ANSWERS = [row.tolist() for row in prompts(4, length=3, seed=5)]


def turn(number, answer=False):
    return [*BEFORE, *USERS[number], *AFTER, *HEADER, *(ANSWERS[number] if answer else [])]


# The prompt, and the answer to it; what stands before the last turn.
CONVERSATIONS = {
    "single turn": ([], turn(0)),
    "two turns": (turn(1, answer=True), turn(2)),
    "three turns": (turn(1, answer=True) + turn(3, answer=True), turn(2)),
    "system prompt": (SYSTEM, turn(0)),
    "system and two turns": (SYSTEM + turn(1, answer=True), turn(2)),
}
ANSWER = ANSWERS[3]
KINDS = {f"{scope}, {'markers' if marked else 'no markers'}": (scope, marked)
         for scope in ("prompt", "answer") for marked in (False, True)}  # fmt: skip


def expected_scores(tokens, said, scope, marked, prior, table):
    """The scores (T, K) of one sequence; `said` are the places of what is known to be predicted."""
    pooled, begins = [], []
    message, open_at, begun = [], None, False
    chat = marked and any(tokens[i - 1 : i + 1] == BEFORE for i in range(1, len(tokens)))
    for place, token in enumerate(tokens):
        if chat:
            if open_at is not None and token == AFTER[0] and not begun:
                message, open_at = list(range(open_at, place)), None
            elif open_at is None and token == HEADER[0] and message:
                begun = True
            pooled.append(message if open_at is None else list(range(open_at, place + 1)))
            begins.append(begun)
            if tokens[place - 1 : place + 1] == BEFORE and place:
                open_at, begun = place + 1, False
        else:
            runs = [p for p in said if p - 1 not in said]
            # The next answer to begin, or the one that runs; behind the last one, the last.
            ahead = [p for p in runs if p > place]
            running = [p for p in runs if p <= place]
            if place in said or not ahead:
                start = running[-1] if running else len(tokens)
            else:
                start = ahead[0]
            pooled.append(list(range(start)))
            begins.append(place >= start - 1)
    if chat:
        # All tokens of a turn have the prior of its whole message, those before the first message that of the first.
        starts = [i + 1 for i in range(1, len(tokens)) if tokens[i - 1 : i + 1] == BEFORE]
        for number, start in enumerate(starts):
            end = starts[number + 1] if number + 1 < len(starts) else len(tokens)
            length = next((i for i in range(start, end) if tokens[i] == AFTER[0]), end) - start
            for place in range(0 if number == 0 else start, end):
                pooled[place] = list(range(start, start + length))
    rows = []
    for places, acts in zip(pooled, begins, strict=True):
        score = prior.score(table[torch.tensor([tokens[p] for p in places])].mean(0)[None])[0]
        rows.append(score if acts or scope == "prompt" else torch.zeros_like(score))
    return torch.stack(rows)


def judged(model, tokens, said, kind):
    """The logits (T, V) of a sequence by the rules."""
    scope, marked = KINDS[kind]
    tuner = model.base_model
    scores = expected_scores(
        tokens, said, scope, marked, tuner.trex_prior["default"], model.get_input_embeddings().weight
    )
    watch = tuner.prompts
    watch.detach()
    try:
        state = ForwardState({"default": scores[None]}, 1, (len(tokens),))
        ids = torch.tensor([tokens])
        return watch.channel.run(state, tuner.model, input_ids=ids, use_cache=False).logits[0]
    finally:
        watch.attach()


class Force(LogitsProcessor):
    """Has generate write the answer."""

    def __init__(self, length, answer=ANSWER):
        self.length, self.answer = length, answer

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -1e4)
        forced[:, self.answer[min(input_ids.shape[1] - self.length, len(self.answer) - 1)]] = 0
        return forced


def generate(model, prompt, answer=ANSWER, **kwargs):
    """The raw logits (B, len(answer), V), and the whole output."""
    ids = prompt if isinstance(prompt, torch.Tensor) else torch.tensor([prompt])
    kwargs = {"attention_mask": torch.ones_like(ids), "do_sample": False, **kwargs}
    output = model.generate(
        ids, max_new_tokens=len(answer), pad_token_id=PAD, output_logits=True, return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([Force(ids.shape[1], answer)]), **kwargs,
    )  # fmt: skip
    return torch.stack(output.logits, 1), output


def by_hand(model, pieces, cache=None, answer=ANSWER, **kwargs):
    """The logits (len(answer), V) of decoding by hand, of a prompt in pieces."""
    logits = []
    for piece in [*pieces, *([token] for token in answer[:-1])]:
        given = {} if cache is None else {CACHE: cache}
        output = model(input_ids=torch.tensor([piece]), use_cache=True, **given, **kwargs)
        scores, cache = output[:2] if isinstance(output, tuple) else (output.logits, output[CACHE])
        logits.append(scores[0, -1])
    return torch.stack(logits[max(len(pieces) - 1, 0) :])


def without_cache(model, prompt):
    logits = []
    for end in range(len(ANSWER)):
        ids = torch.tensor([prompt + ANSWER[:end]])
        logits.append(model(input_ids=ids, use_cache=False).logits[0, -1])
    return torch.stack(logits)


def labelled(model, former, prompt, name="labels", length=None, side="right"):
    """A training row; earlier answers are labelled as well."""
    tokens = former + prompt + ANSWER
    predicted = torch.zeros(len(tokens), dtype=torch.bool)
    predicted[-len(ANSWER) :] = True
    place = 0
    for number in range(4):
        answered = turn(number, answer=True)
        for start in range(place, len(former) - len(answered) + 1):
            if former[start : start + len(answered)] == answered:
                predicted[start + len(answered) - 3 : start + len(answered)] = True
    ids, mask = torch.tensor(tokens), torch.ones(len(tokens), dtype=torch.long)
    if length:
        pad = (0, length - len(tokens)) if side == "right" else (length - len(tokens), 0)
        ids, mask, predicted = (torch.nn.functional.pad(part, pad) for part in (ids, mask, predicted))
    told = ids.masked_fill(~predicted, -100) if name == "labels" else predicted.long()
    # A second row, with a prompt of its own.
    other = torch.full_like(ids, 5)
    batch = {
        "input_ids": torch.stack([ids, other]),
        "attention_mask": torch.stack([mask, torch.ones_like(mask)]),
        name: torch.stack([told, other if name == "labels" else torch.ones_like(told)]),
    }
    if name == "labels":
        batch["labels"][1, :4] = -100
    else:
        batch[name][1, :4] = 0
    logits = model(**batch).logits[0]
    end = len(tokens) if side == "right" or not length else length
    return logits[end - len(ANSWER) - 1 : end - 1]


def packed(model, former, prompt):
    """The same row behind another sequence, told by positions."""
    tokens = former + prompt + ANSWER
    first = USERS[3]
    labels = torch.tensor([[-100] * 3 + first[3:] + [-100] * (len(tokens) - len(ANSWER)) + ANSWER])
    positions = torch.tensor([[*range(len(first)), *range(len(tokens))]])
    ids = torch.tensor([first + tokens])
    return model(input_ids=ids, position_ids=positions, labels=labels, use_cache=False).logits[
        0, -len(ANSWER) - 1 : -1
    ]


def from_the_previous_turn(model, former, prompt):
    """The cache of an earlier generate call is gone on from, with the whole conversation as ids."""
    cut = len(former) - len(ANSWERS[0])
    _, first = generate(model, former[:cut], former[cut:])
    return generate(model, former + prompt, past_key_values=copy.deepcopy(first.past_key_values))[0][0]


def from_the_previous_turn_by_hand(model, former, prompt):
    """The same, decoded by hand, with the new turn's tokens alone."""
    cut = len(former) - len(ANSWERS[0])
    cache = model(input_ids=torch.tensor([former[:cut]]), use_cache=True)[CACHE]
    by_hand(model, [], cache, answer=[*former[cut:], 1])
    return by_hand(model, [prompt], cache)


def from_a_shared_prefix(model, former, prompt):
    """The cache of the first tokens is filled once, and gone on from for two prompts."""
    cache = model(input_ids=torch.tensor([former]), use_cache=True)[CACHE]
    by_hand(model, [turn(3)], copy.deepcopy(cache))
    return by_hand(model, [prompt], copy.deepcopy(cache))


def from_a_cropped_cache(model, former, prompt):
    cache = model(input_ids=torch.tensor([former + turn(3)]), use_cache=True)[CACHE]
    cache.crop(-len(turn(3)))
    return by_hand(model, [prompt], cache)


class Own(DynamicCache):
    """A cache class of one's own."""


def in_pieces(tokens, size=4):
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


# Each takes the model, what stands before the last turn, and the last turn's prompt, and gives the answer's logits.
TOLD = {
    "labels": labelled,
    "completion_mask": lambda m, f, p: labelled(m, f, p, "completion_mask"),
    "padded on the right": lambda m, f, p: labelled(m, f, p, length=60),
    "padded on the left": lambda m, f, p: labelled(m, f, p, length=60, side="left"),
    "packed": packed,
}
SERVED = {
    "generate": lambda m, f, p: generate(m, f + p)[0][0],
    "generate without cache": lambda m, f, p: generate(m, f + p, use_cache=False)[0][0],
    "static cache": lambda m, f, p: generate(m, f + p, cache_implementation="static", disable_compile=True)[0][0],
    "prompt in chunks": lambda m, f, p: generate(m, f + p, prefill_chunk_size=4)[0][0],
    "beams": lambda m, f, p: generate(m, f + p, num_beams=2)[0][0],
    "assisted": lambda m, f, p: generate(m, f + p, prompt_lookup_num_tokens=2)[0][0],
    "several sequences": lambda m, f, p: generate(m, f + p, do_sample=True, num_return_sequences=2)[0][1],
    "left padding, no mask": lambda m, f, p: generate(
        m, torch.tensor([[PAD] * 3 + f + p, [5] * (3 + len(f + p))]), attention_mask=None
    )[0][0],
    "by hand": lambda m, f, p: by_hand(m, [f + p]),
    "by hand, tuples": lambda m, f, p: by_hand(m, [f + p], return_dict=False),
    "by hand, own cache class": lambda m, f, p: by_hand(m, [f + p], Own()),
    "by hand, static cache": lambda m, f, p: by_hand(m, [f + p], StaticCache(config=m.config, max_cache_len=80)),
    "by hand, embeddings": lambda m, f, p: generate(
        m, torch.tensor([f + p]), inputs_embeds=m.get_input_embeddings()(torch.tensor([f + p]))
    )[0][0],
}
LATER = {
    "by hand without cache": lambda m, f, p: without_cache(m, f + p),
    "by hand in chunks": lambda m, f, p: by_hand(m, in_pieces(f + p)),
    "by hand, token by token": lambda m, f, p: by_hand(m, in_pieces(f + p, 1)),
}


def run(road, *args):
    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("always")
        logits = road(*args)
    return logits, [str(warning.message) for warning in seen if "prior" in str(warning.message)]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    scope, marked = KINDS[kind]
    model = adapted(base=make_llama(), fit=False, prior_scope=scope, chat_markers=MARKERS if marked else None)
    ids = prompts(32)
    if marked:
        ids = torch.stack([torch.tensor([*BEFORE, *row, *AFTER, *HEADER]) for row in ids.tolist()])
    initialize_trex_prior(model, [{"input_ids": ids}], progress=False)
    return model


def check(model, kind, road, conversation, told):
    """Whether the logits are those of the rules, and what was warned of."""
    former, prompt = CONVERSATIONS[conversation]
    tokens = former + prompt + ANSWER
    said = set(range(len(former + prompt), len(tokens)))
    if told:
        said |= {p for start in range(len(former)) for p in _answer_at(former, start)}
    with torch.no_grad():
        expected = judged(model, tokens, sorted(said), kind)[-len(ANSWER) - 1 : -1]
    logits, warned = run(road, model, former, prompt)
    return (logits - expected).abs().max().item() < 1e-4, warned


def _answer_at(former, start):
    for number in range(4):
        whole = turn(number, answer=True)
        if former[start : start + len(whole)] == whole:
            return range(start + len(whole) - 3, start + len(whole))
    return ()


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("road", TOLD)
def test_rows_whose_answers_are_told(model, kind, road, conversation):
    if road == "packed" and not KINDS[kind][1] and "turns" in conversation:
        pytest.skip("its earlier answers are not labelled, so they are prompt")
    equal, warned = check(model, kind, TOLD[road], conversation, told=True)
    assert equal, warned
    # Only markers make generate see what was trained on.
    several = any("several answers" in text for text in warned)
    assert several == ("turns" in conversation and not KINDS[kind][1])


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("road", SERVED)
def test_ways_to_go_on_from_a_prompt(model, kind, road, conversation):
    if road == "by hand, embeddings" and KINDS[kind][1]:
        pytest.skip("generate is given the ids, too")
    if road == "assisted" and BEFORE_5:
        pytest.skip("assisted generation needs an end token before transformers 5")
    equal, warned = check(model, kind, SERVED[road], conversation, told=False)
    assert equal, warned


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("road", LATER)
def test_ways_that_need_markers(model, kind, road, conversation):
    equal, warned = check(model, kind, LATER[road], conversation, told=False)
    assert equal or warned
    scope, marked = KINDS[kind]
    exact = marked and (scope == "answer" or road == "by hand without cache")
    assert equal or not exact, warned


def test_the_scope_answer_needs_a_model_that_writes_answers():
    for task in ("SEQ_CLS", "FEATURE_EXTRACTION"):
        base = make_llama()
        with pytest.raises(ValueError, match=rf"prior_scope='answer' needs .* This is a Llama.*task_type='{task}'"):
            get_peft_model(base, TRexConfig(prior_scope="answer", task_type=task))
        assert not any(isinstance(module, TRexLayer) for module in base.modules())
    adapted("t5", prior_scope="answer")
    adapted(task_type=None, prior_scope="answer")


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}, {"prefill_chunk_size": 4}])
def test_a_row_of_a_batch_is_as_alone(model, settings):
    """Conversations of unlike lengths and turns, padded on the left."""
    rows = [f + p for f, p in CONVERSATIONS.values()]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD, **settings}
    together = model.generate(ids, attention_mask=(ids != PAD).long(), **settings)[:, width:]
    for row, new in zip(rows, together, strict=True):
        alone = model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)), **settings)
        assert torch.equal(alone[0, len(row) :], new)


@pytest.mark.parametrize("base", ["classifier", "backbone", "t5"])
def test_chat_markers_need_a_model_that_writes_chats(base):
    task = {"classifier": "SEQ_CLS", "backbone": None, "t5": "SEQ_2_SEQ_LM"}[base]
    base = {"classifier": make_llama(), "backbone": make_llama().model, "t5": make_t5()}[base]
    with pytest.raises(ValueError, match=r"chat_markers need a causal language model, .* that of all tokens"):
        get_peft_model(base, TRexConfig(chat_markers=MARKERS, task_type=task))
    assert not any(isinstance(module, TRexLayer) for module in base.modules())
    get_peft_model(base, TRexConfig(chat_markers=False, task_type=task))


def test_embeddings_without_ids_do_not_show_markers(model, kind):
    embeds = model.get_input_embeddings()(torch.tensor([turn(0)]))
    for _ in range(2):
        _, warned = run(lambda: model.generate(inputs_embeds=embeds, max_new_tokens=2, do_sample=False))
        assert any("got inputs_embeds without input_ids" in text for text in warned) == KINDS[kind][1]
        kind = "prompt, no markers"


def test_an_answer_that_the_prompt_begins_is_an_answer_in_training_too(model, kind):
    """As after a template's empty thoughts, and where a last message is continued."""
    begun = [*turn(0), *ANSWERS[1][:2]]
    ids = torch.tensor([begun + ANSWER])
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(begun), -100)
    with torch.no_grad():
        trained = model(input_ids=ids, labels=labels).logits[0, len(begun) - 1 : -1]
    torch.testing.assert_close(generate(model, begun)[0][0], trained, atol=1e-4, rtol=0)


def test_labels_of_a_header_begin_the_answer(model, kind):
    header, ids = len(turn(0)) - len(HEADER), torch.tensor([turn(0) + ANSWER])
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < header, -100)
    scores = {}
    layer = next(module for module in model.modules() if isinstance(module, TRexLayer))
    for name, told in (("header", labels), ("none", None), ("message", ids)):
        handle = layer.register_forward_pre_hook(
            lambda layer, args, name=name: scores.__setitem__(name, layer._channel.scores("default", args[0]))
        )
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model(input_ids=ids, labels=told)
        handle.remove()
    if kind == "answer, markers":
        begins = {name: int(each[0].any(-1).nonzero()[0]) for name, each in scores.items()}
        assert begins == {"header": header - 1, "none": header, "message": header}


def test_what_generate_writes_is_an_answer_without_a_header_too(model, kind):
    """As where a prompt was rendered without `add_generation_prompt`."""
    prompt = turn(0)[: -len(HEADER)]
    expected = torch.tensor([prompt + ANSWER])
    mask = (torch.arange(expected.shape[1]) >= len(prompt)).long()[None]
    with torch.no_grad():
        logits = model(input_ids=expected, completion_mask=mask).logits[0, len(prompt) - 1 : -1]
    torch.testing.assert_close(generate(model, prompt)[0][0], logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("conversation", ["two turns", "three turns", "system and two turns"])
@pytest.mark.parametrize("road", [from_the_previous_turn, from_the_previous_turn_by_hand])
def test_a_chat_goes_on_from_its_cache(model, kind, road, conversation):
    equal, warned = check(model, kind, road, conversation, told=False)
    assert equal or any("another prior" in text for text in warned)
    assert equal or not KINDS[kind][1], warned


def test_the_fit_takes_the_latest_message_of_rows_whose_answers_nobody_tells(kind, model):
    tuner, table = model.base_model, model.get_input_embeddings().weight
    rows = [torch.tensor([PAD] * (40 - len(f + p)) + f + p) for f, p in CONVERSATIONS.values() if f[:1] != SYSTEM[:1]]
    batch = {"input_ids": torch.stack(rows), "attention_mask": (torch.stack(rows) != PAD).long()}
    embeds, prompts_found = tuner.prompts.scorer.embed(batch)
    assert len(embeds) == len(rows) and bool(prompts_found.known.all())
    message = {"single turn": 0, "two turns": 2, "three turns": 2}
    for embed, row, number in zip(embeds, rows, message.values(), strict=True):
        tokens = torch.tensor(USERS[number]) if KINDS[kind][1] else row[row != PAD]
        torch.testing.assert_close(embed, table[tokens].mean(0))


def test_an_answer_of_an_earlier_turn_is_gone_back_to(model, kind):
    ids = turn(0, answer=True) + turn(2)
    cache = model(input_ids=torch.tensor([ids]), use_cache=True)[CACHE]
    cache.crop(len(turn(0)) - len(ids))
    logits, warned = run(lambda: by_hand(model, [], cache, answer=[*ANSWER, 1]))
    tokens = turn(0) + ANSWER
    with torch.no_grad():
        expected = judged(model, tokens, list(range(len(turn(0)), len(tokens))), kind)[-len(ANSWER) :]
    equal = (logits - expected).abs().max().item() < 1e-4
    assert equal or (not KINDS[kind][1] and any("another prior" in text for text in warned))


def test_a_marker_that_is_merged_begins_a_turn_token_by_token():
    markers = {**MARKERS, "before_merged": BEFORE[:1]}
    model = adapted(base=make_llama(), fit=False, prior_scope="answer", chat_markers=markers)
    ids = torch.stack([torch.tensor([*BEFORE, *row, *AFTER, *HEADER]) for row in prompts(32).tolist()])
    initialize_trex_prior(model, [{"input_ids": ids}], progress=False)
    tokens = turn(1, answer=True) + BEFORE[:1] + turn(2)[len(BEFORE) :]
    with torch.no_grad():
        logits = by_hand(model, in_pieces(tokens, 1))
    torch.testing.assert_close(logits, generate(model, tokens)[0][0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("road", [from_a_shared_prefix, from_a_cropped_cache])
def test_a_shared_prefix(model, kind, road):
    equal, warned = check(model, kind, road, "system prompt", told=False)
    assert equal or any("another prior" in text for text in warned)
    exact = KINDS[kind][0] == "answer" and (KINDS[kind][1] or road is from_a_cropped_cache)
    assert equal or not exact, warned
