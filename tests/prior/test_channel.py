"""Which rows of a forward's scores go with a layer's input."""

import pytest
import torch
from torch import nn

from peft_trex.prior.channel import PriorChannel
from peft_trex.prior.order import Order
from peft_trex.prior.state import ForwardState

ROWS, TOKENS, CLUSTERS = 3, 5, 4
SCORES = torch.arange(12.0).view(ROWS, CLUSTERS)
BY_TOKEN = torch.arange(60.0).view(ROWS, TOKENS, CLUSTERS)


def scores_for(shape, scores=SCORES, order=None):
    channel = PriorChannel(nn.ModuleDict())
    state = ForwardState({"default": scores}, len(scores), (TOKENS,))
    return channel.run(state, channel.scores, "default", torch.zeros(*shape, 2), order)


def test_rows_and_tokens_tell_the_scores():
    assert torch.equal(scores_for((ROWS, TOKENS)), SCORES)
    assert torch.equal(scores_for((ROWS,)), SCORES)
    assert torch.equal(scores_for((ROWS * TOKENS,)), SCORES.repeat_interleave(TOKENS, 0))
    assert torch.equal(scores_for((ROWS, TOKENS), BY_TOKEN), BY_TOKEN)
    assert torch.equal(scores_for((ROWS * TOKENS,), BY_TOKEN), BY_TOKEN.flatten(0, 1))


@pytest.mark.parametrize("scores", [SCORES, BY_TOKEN], ids=["rows", "tokens"])
def test_what_all_rows_share_has_no_prior(scores):
    """As relative positions have it, whatever the module's source says."""
    for shape in ((1, TOKENS), (1, 2 * TOKENS), (1, 1, TOKENS)):
        assert scores_for(shape, scores) is None
    assert scores_for((1, TOKENS), scores[:1]) is not None


@pytest.mark.parametrize("shape", [(2, TOKENS), (TOKENS, ROWS), (ROWS + 1,), (6, 4, 3)])
def test_what_tells_nothing_is_refused(shape):
    with pytest.raises(ValueError, match="cannot tell which prompt each row belongs to"):
        scores_for(shape)


@pytest.mark.parametrize("scores", [SCORES, BY_TOKEN], ids=["rows", "tokens"])
def test_tokens_may_come_first(scores):
    turned = scores_for((TOKENS, ROWS), scores, Order())
    expected = scores if scores.dim() == 3 else scores[:, None].expand(-1, TOKENS, -1)
    assert torch.equal(turned, expected.transpose(0, 1))
    assert torch.equal(scores_for((ROWS, TOKENS), scores, Order()), scores)
    # A few tokens that attend to all.
    if scores is SCORES:
        assert torch.equal(scores_for((1, ROWS), scores, Order()), scores[None])
