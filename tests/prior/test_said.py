"""What is wrong with a prior is said once, in evaluation as in training, by a forward as by generate."""

import warnings

import pytest
import torch
from conftest import adapted, prompts

MARKERS = {"before": [60, 61], "after": [62], "assistant": [63]}
UNFITTED, NO_MESSAGE = "is not fitted and counts as zero", "hold no user's message between the adapter's chat_markers"


def chats(count):
    rows = prompts(count, length=6).tolist()
    return torch.tensor([[60, 61, *row, 62, 63] for row in rows])


def labelled(ids):
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(ids.shape[1]) < 5, -100)}


CALLS = {
    "forward": lambda model, ids: model(**labelled(ids)),
    "generate": lambda model, ids: model.generate(ids, max_new_tokens=2, do_sample=False),
    "by hand": lambda model, ids: model(input_ids=ids),
}
# The settings, the prompts, and what is to be said.
CASES = {
    "unfitted": ({"fit": False}, lambda: prompts(3), UNFITTED),
    "fitted": ({}, lambda: prompts(3), None),
    "no message": ({"chat_markers": MARKERS}, lambda: prompts(3), NO_MESSAGE),
    "some rows without a message": (
        {"chat_markers": MARKERS},
        lambda: torch.cat([chats(2), prompts(1, length=10)]),
        NO_MESSAGE,
    ),
    "messages": ({"chat_markers": MARKERS}, lambda: chats(3), None),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", CASES)
def test_it_is_said_once(name, call, training):
    settings, make, text = CASES[name]
    with warnings.catch_warnings():
        # The fit says of prompts that are no chats what a forward says, too.
        warnings.simplefilter("ignore")
        model = adapted(**settings).train(training)
    model.base_model.prompts.scorer._warned.clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            CALLS[call](model, make())
    texts = [str(warning.message) for warning in seen]
    for each in (UNFITTED, NO_MESSAGE):
        assert len([one for one in texts if each in one]) == (each == text), texts


def test_a_prior_that_a_forward_within_generate_is_given_is_its_own():
    """Also where its tokens are those of the prompt."""
    model, ids, seen = adapted(), prompts(2), []
    expected = model(input_ids=ids, semantic_prior=2).logits

    def nested(_, scores):
        seen.append(model(input_ids=ids, semantic_prior=2).logits)
        return scores

    model.generate(ids, max_new_tokens=1, do_sample=False, logits_processor=[nested])
    torch.testing.assert_close(seen[0], expected)
    assert (expected - model(input_ids=ids, semantic_prior=0).logits).abs().max() > 1e-3
