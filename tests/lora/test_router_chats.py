"""The router of an adapter with chat markers: it pools the tokens that the model pools, in whatever conversation."""

import json
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import VOCAB, adapted, make_llama, prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import TaskType
from transformers import LlamaConfig, LlamaForSequenceClassification

from peft_trex import TRexLayer, calibrate_trex_merge, initialize_trex_prior, save_trex_as_lora
from peft_trex.lora.semantic_router import Route, SemanticRouter, latest_message
from peft_trex.prior.chat import ChatMarkers
from peft_trex.prior.prompts import find_prompts

BEFORE, AFTER, HEADER = [60, 61], [62, 59], [63]
MARKERS = {"before": BEFORE, "after": AFTER, "assistant": HEADER}
NO_MESSAGE = "no user's message between"


def turn(user, answer=()):
    return [*BEFORE, *user, *AFTER, *HEADER, *answer]


def conversations(seed):
    """Conversations whose parts are of different tasks, so that each way to pool them gives another cluster."""
    one, two, three, system = prompts(4, length=12, seed=seed).roll(seed, 0).tolist()
    return {
        "single turn": turn(one),
        "two turns": turn(two, three) + turn(one),
        "three turns": turn(two, three) + turn(three, one[:3]) + turn(one),
        "system prompt": [*system, *system, *turn(one)],
        "system prompt and two turns": system + turn(two, three) + turn(one),
        "answer that has begun": turn(one, three),
        "no template": one + two,
        "no template, end marker": one + AFTER + two,
        "empty message": turn([]),
        "empty message after another": turn(two, three) + turn([]),
        "running message": BEFORE + one,
        "running message, half of the end marker": BEFORE + one + AFTER[:1],
        "running message after another": turn(two, three) + BEFORE + one[:5],
        "message without its end marker": BEFORE + two + turn(one),
        "message that is still to come": BEFORE,
        "message that is still to come after another": turn(two, three) + BEFORE,
        "half of the marker before a message": turn(two, three) + BEFORE[:1] + one,
    }


def export(model, folder):
    """The router of a model, for which any calibration will do."""
    calibrate_trex_merge(model, [{"input_ids": marked(8)}], per_cluster=True, progress=False)
    save_trex_as_lora(model, folder)
    return SemanticRouter.from_pretrained(folder)


def marked(count):
    return torch.stack([torch.tensor(turn(row)) for row in prompts(count).tolist()])


def chat_model(**config):
    model = adapted(fit=False, **config)
    initialize_trex_prior(model, [{"input_ids": marked(32)}], progress=False)
    return model


KINDS = {
    "markers": {"chat_markers": MARKERS},
    "markers, scope answer": {"chat_markers": MARKERS, "prior_scope": "answer"},
    "merged edges": {"chat_markers": {**MARKERS, "before_merged": BEFORE[:1], "after_merged": AFTER[1:]}},
    "no header": {"chat_markers": {**MARKERS, "assistant": []}},
    "no markers": {},
    "no markers, scope answer": {"prior_scope": "answer"},
    "markers switched off": {"chat_markers": False},
}


@pytest.fixture(scope="module", params=KINDS)
def served(request, tmp_path_factory):
    """A model's configuration, the model, and the folder of its export."""
    folder = tmp_path_factory.mktemp("export") / "out"
    model = chat_model(**KINDS[request.param])
    export(model, folder)
    return KINDS[request.param], model, folder


@torch.no_grad()
def layers_choice(model, run):
    """The route by the cluster that an adapted layer has for the last token of all that a call runs."""
    chosen = []
    layer = next(module for module in model.modules() if isinstance(module, TRexLayer))
    handle = layer.register_forward_pre_hook(lambda layer, args: chosen.append(int(layer.cluster_of(args[0])[0, -1])))
    try:
        run(model)
    finally:
        handle.remove()
    cluster = chosen[-1]
    return Route(None, "overall") if cluster == 4 else Route(cluster, f"cluster_{cluster:02d}")


def forward(ids):
    return lambda model: model(input_ids=torch.tensor([ids]))


def generate(ids):
    """The last forward is that of a new token, so it has the prior of the turn in either scope."""
    ids = torch.tensor([ids])
    return lambda model: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)


SEEDS = range(6)
EMPTY = ("empty message", "empty message after another", "message that is still to come")


@pytest.mark.parametrize("conversation", conversations(0))
def test_takes_the_models_choice(served, conversation):
    config, model, folder = served
    router = SemanticRouter.from_pretrained(folder)
    rows = [conversations(seed)[conversation] for seed in SEEDS]
    whole = config.get("chat_markers") and conversation.startswith("no template")
    with pytest.warns(UserWarning, match=NO_MESSAGE) if whole else nullcontext():
        routes = [router.route(row) for row in rows]
    # With the scope "answer" the last token of a prompt may have no prior yet.
    roads = [generate] if config.get("prior_scope") == "answer" else [forward, generate]
    with warnings.catch_warnings():
        # The model warns once only, and all tests here share it.
        warnings.filterwarnings("ignore", f".*{NO_MESSAGE}")
        for road in roads:
            assert routes == [layers_choice(model, road(row)) for row in rows], road
    if conversation in EMPTY:
        assert (set(routes) == {Route(None, "overall")}) == bool(config.get("chat_markers"))
    else:
        # The rows are of several tasks, so agreeing means something.
        assert len(set(routes)) > 1


@pytest.mark.parametrize("conversation", ["two turns", "three turns", "system prompt", "system prompt and two turns"])
def test_only_with_markers_the_latest_message_alone_counts(served, conversation):
    config, _, folder = served
    router = SemanticRouter.from_pretrained(folder)
    routes = [[router.route(conversations(seed)[name]) for seed in SEEDS] for name in ("single turn", conversation)]
    assert (routes[0] == routes[1]) == bool(config.get("chat_markers"))


def test_a_conversation_without_a_message_warns_once(tmp_path):
    router = export(chat_model(chat_markers=MARKERS), tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ids in ([], BEFORE, turn([5, 6]), turn([])):
            router.route(ids)
    with pytest.warns(UserWarning, match=f"{NO_MESSAGE}.*chat template") as caught:
        for ids in ([5, 6], [7], AFTER):
            router.route(ids)
    assert len(caught) == 1


def test_what_the_folder_holds(served):
    config, _, folder = served
    written = json.loads((folder / "router.json").read_text())
    router = SemanticRouter.from_pretrained(folder)
    markers, scope = config.get("chat_markers") or None, config.get("prior_scope", "prompt")
    assert written["version"] == (1 if markers is None else 2)
    assert router.chat_markers == written.get("chat_markers") == markers
    assert router.prior_scope == written.get("prior_scope", "prompt") == scope
    # A folder of version 1 has nothing that it had not before there were markers.
    assert ("chat_markers" in written) == (markers is not None)
    assert ("prior_scope" in written) == (markers is not None or scope == "answer")


@pytest.mark.parametrize("kind", ["classifier", "encoder-decoder"])
def test_models_that_are_no_chats_pool_all_tokens(tmp_path, kind):
    if kind == "classifier":
        config = LlamaConfig(**{**make_llama().config.to_dict(), "num_labels": 3})
        base = LlamaForSequenceClassification(config)
        model = adapted(base=base, fit=False, task_type=TaskType.SEQ_CLS)
    else:
        model = adapted("t5", fit=False)
    answers = {} if kind == "classifier" else {"decoder_input_ids": torch.ones(1, 3, dtype=torch.long)}
    data = [{"input_ids": row[None], **answers} for row in marked(32)]
    initialize_trex_prior(model, data, progress=False)
    calibrate_trex_merge(model, data, per_cluster=True, progress=False)
    save_trex_as_lora(model, tmp_path / "out")
    router = SemanticRouter.from_pretrained(tmp_path / "out")
    assert router.chat_markers is None
    routes = []
    for seed in range(12):
        row = conversations(seed)["system prompt and two turns"]
        routes.append(router.route(row))
        inputs = {"input_ids": torch.tensor([row]), **answers}
        assert layers_choice(model, lambda model, inputs=inputs: model(**inputs)) == routes[-1]
    assert len(set(routes)) > 1


def test_markers_outside_of_the_vocabulary_are_not_exported(tmp_path):
    model = chat_model(chat_markers={**MARKERS, "assistant": [VOCAB]})
    calibrate_trex_merge(model, [{"input_ids": marked(8)}], per_cluster=True, progress=False)
    with pytest.raises(ValueError, match=f"'default' hold the token id {VOCAB}, but the model has {VOCAB} tokens"):
        save_trex_as_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # Without a router nothing depends on them.
    save_trex_as_lora(model, tmp_path / "out", per_cluster=False)


def inside_last_turn(ids, markers):
    """The places that the model's markers call the message of the last turn; all of them without a message."""
    chat = markers.find(torch.tensor([ids]), torch.zeros(len(ids), dtype=torch.long))
    if not chat.opens.any():
        return list(range(len(ids)))
    start = max(chat.starts.nonzero().flatten().tolist(), default=len(ids))
    return [place for place in chat.inside.nonzero().flatten().tolist() if place >= start]


def pooled_by_model(ids, markers):
    found = find_prompts(torch.tensor([ids]), markers=markers)
    turns = torch.zeros(len(ids)) if found.index is None else found.index[0]
    return (found.mask[0] & (turns == turns[-1])).nonzero().flatten().tolist()


# Few kinds of tokens, so that markers overlap, repeat and break off.
TOKENS = st.integers(0, 3)
MARKER = st.lists(TOKENS, min_size=1, max_size=3)


@st.composite
def rows(draw):
    """Markers, and a row in which they stand whole or in pieces, at random places."""
    before, after, assistant = draw(MARKER), draw(MARKER), draw(st.lists(TOKENS, max_size=2))
    # Whitespace of a message may merge with the last token of the one marker, or the first of the other.
    merged = [draw(st.sampled_from([[], part])) for part in (before[:-1], after[1:])]
    piece = st.sampled_from([before, after, assistant, before[:-1], after[:-1], before[1:], after[1:]])
    pieces = draw(st.lists(st.one_of(piece, st.lists(TOKENS, max_size=4)), max_size=8))
    ids = [token for piece in pieces for token in piece]
    return ChatMarkers(*map(tuple, (before, after, assistant, *merged))), ids or [draw(TOKENS)]


@settings(max_examples=600, deadline=None)
@given(drawn=rows())
def test_pools_what_the_model_pools(drawn):
    markers, ids = drawn
    message = latest_message(np.array(ids), markers.as_value())
    places = list(range(len(ids)) if message is None else range(len(ids))[message])
    assert places == inside_last_turn(ids, markers) == pooled_by_model(ids, markers)
