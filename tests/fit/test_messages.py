"""The fit finds the chat markers by itself where the training prompts follow the tokenizer's chat template."""

import copy
import logging

import pytest
import torch
from conftest import adapted, make_llama, make_t5
from peft import PeftModel, get_peft_model
from texts import CHATML, make_chat_tokenizer

from peft_trex import TRexConfig, chat_markers, initialize_trex_prior
from peft_trex.fit.messages import LEAST_ROWS, Counts, MarkerSearch
from peft_trex.prior.chat import ChatMarkers

TOKENIZER = make_chat_tokenizer()
MARKERS = chat_markers(TOKENIZER)
USERS = [f"{'abcd'[number % 4] * 6} {number}" for number in range(48)]
NO_ROLES = "{% for message in messages %}{{ '<m>' + message['content'] + '</m>' }}{% endfor %}"


def make_model(base=None, **settings):
    config = TRexConfig(**{"r_a": 2, "r_b": 3, "num_clusters": 4, "task_type": "CAUSAL_LM", **settings})
    return get_peft_model(make_llama(vocab_size=400) if base is None else base, config)


def config_of(model):
    return model.peft_config["default"]


def chats(users=USERS, size=8):
    """Batches of conversations of one turn, after a system prompt."""
    rows = []
    for user in users:
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": user}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        rows.append(TOKENIZER.apply_chat_template(turns, **options)["input_ids"])
    return batches(rows, size)


def plain(users=USERS, size=8):
    return batches([TOKENIZER(user)["input_ids"] for user in users], size)


def batches(rows, size):
    width = max(map(len, rows))
    ids = torch.tensor([row + [2] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return [{"input_ids": ids[i : i + size], "attention_mask": mask[i : i + size]} for i in range(0, len(rows), size)]


def mean_of(model, texts):
    """The mean of the texts' embeddings, as the prior keeps it."""
    table = model.base_model.input_embedding().weight.detach()
    return torch.stack([table[TOKENIZER(each)["input_ids"]].mean(0) for each in texts]).mean(0)


def prior_of(model):
    return model.base_model.trex_prior["default"]


def fit(model, data, tokenizer=TOKENIZER, **options):
    return initialize_trex_prior(model, data, tokenizer=tokenizer, progress=False, **options)


def test_messages_of_chats_are_told_and_the_markers_kept(tmp_path, caplog):
    model = make_model()
    # A generator is read once only.
    with caplog.at_level(logging.INFO, "peft_trex"):
        report = fit(model, iter(chats()))
    assert report.prompts == 48 and report.chat_markers == config_of(model).chat_markers == MARKERS
    torch.testing.assert_close(prior_of(model).mean, mean_of(model, USERS), atol=1e-5, rtol=1e-4)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "follow the tokenizer's chat template" in caplog.text
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(vocab_size=400), tmp_path)
    assert config_of(loaded).chat_markers == MARKERS


def test_the_same_as_with_the_markers_in_the_configuration():
    found, given = make_model(), make_model(chat_markers=MARKERS)
    fit(found, chats())
    assert fit(given, chats(), tokenizer=None).chat_markers == MARKERS
    torch.testing.assert_close(prior_of(found).centroids, prior_of(given).centroids, rtol=0, atol=0)
    ids = chats()[0]["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, given(ids).logits)


def test_prompts_that_are_no_chats_are_pooled_whole():
    model = make_model()
    report = fit(model, plain())
    assert report.chat_markers is None and config_of(model).chat_markers is None
    torch.testing.assert_close(prior_of(model).mean, mean_of(model, USERS), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("chat", "finds"), [(16, False), (17, True)])
def test_more_than_half_of_the_first_rows_decide(chat, finds):
    model = make_model()
    data = chats(USERS[:chat], size=1) + plain(USERS[chat:32], size=1) + (plain if finds else chats)(USERS[32:])
    if finds:
        with pytest.warns(UserWarning, match="Some rows hold no user's message"):
            fit(model, data)
    else:
        fit(model, data)
    assert (config_of(model).chat_markers is not None) == finds


def test_the_ranks_decide_together():
    markers = ChatMarkers.of(MARKERS)
    for counts, settled, kept in (
        ([Counts(20, 20), Counts(11, 0)], False, True),
        ([Counts(20, 20), Counts(12, 0)], True, True),
        ([Counts(20, 12), Counts(20, 8)], True, False),
    ):
        search = MarkerSearch(markers)
        assert search.settle(counts, ended=False) == search.settled == settled
        assert (search.markers is not None) == kept
    assert MarkerSearch(markers).settle([Counts(1, 1)], ended=True)
    assert LEAST_ROWS == 32


@pytest.mark.parametrize(
    "setting", [False, {"before": MARKERS["before"][:-1], "after": MARKERS["after"], "assistant": []}]
)
def test_what_the_configuration_says_is_kept(setting):
    model = make_model(chat_markers=setting)
    report = fit(model, chats())
    assert config_of(model).chat_markers == setting and report.chat_markers == (setting or None)
    assert not torch.allclose(prior_of(model).mean, mean_of(model, USERS), atol=1e-3)


def test_the_users_own_configuration_serves_other_models():
    config = TRexConfig(r_a=2, r_b=3, num_clusters=4, task_type="CAUSAL_LM")
    model = get_peft_model(make_llama(vocab_size=400), config)
    fit(model, chats())
    assert config.chat_markers is None and config_of(model).chat_markers == MARKERS


def failing(data):
    yield from data
    raise OSError("gone")


def test_what_fails_leaves_the_configuration():
    model = make_model()
    before = copy.deepcopy(config_of(model).to_dict())
    for data, error in ((failing(chats()), OSError), (chats(USERS[:3] * 20), ValueError)):
        with pytest.raises(error):
            fit(model, data)
        assert config_of(model).to_dict() == before and not prior_of(model).fitted


def test_what_cannot_be_read_is_refused_as_without_a_template():
    for data, error, message in (([3], TypeError, "gave a int"), ([{"pixels": 1}], ValueError, "neither input_ids")):
        with pytest.raises(error, match=message):
            fit(make_model(), data)


def test_a_template_without_markers_is_said_once(caplog):
    model = make_model()
    fit(model, plain(), tokenizer=make_chat_tokenizer(NO_ROLES))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "fitted without chat markers" in caplog.text and "do not tell it from what is around it" in caplog.text
    assert config_of(model).chat_markers is None


def test_a_tokenizer_without_a_template_is_no_matter(caplog):
    fit(make_model(), plain(), tokenizer=make_chat_tokenizer(None))
    assert not caplog.records


def test_a_system_prompt_within_the_message_is_said(caplog):
    merge = """{% if messages[0]['role'] == 'system' %}{% set text = messages[0]['content'] + \
messages[1]['content'] %}{% set messages = [{'role': 'user', 'content': text}] + messages[2:] %}{% endif %}"""
    template = merge + CHATML
    model = make_model()
    fit(model, chats(), tokenizer=make_chat_tokenizer(template))
    assert config_of(model).chat_markers == MARKERS
    assert "a system prompt is pooled with it" in caplog.text


@pytest.mark.parametrize("kind", ["classifier", "encoder-decoder"])
def test_other_models_have_no_chats(kind):
    if kind == "classifier":
        model = make_model(task_type="SEQ_CLS")
    else:
        base = make_t5()
        base.resize_token_embeddings(400)
        model = make_model(base=base, task_type="SEQ_2_SEQ_LM")
    fit(model, chats())
    assert config_of(model).chat_markers is None


def test_external_embeddings_need_no_markers():
    model = adapted(fit=False, prior_encoder="external", prior_dim=4)
    fit(model, [{"semantic_embeds": torch.randn(8, 4), **batch} for batch in chats()])
    assert config_of(model).chat_markers is None


@pytest.mark.parametrize("messages", [True, False])
def test_rows_with_a_prompt(messages):
    """As TRL's online trainers have them."""
    rows = [{"prompt": [{"role": "user", "content": user}] if messages else user} for user in USERS]
    model = make_model()
    fit(model, [rows[:6], rows[6:20], rows[20:]])
    assert config_of(model).chat_markers == (MARKERS if messages else None)
    torch.testing.assert_close(prior_of(model).mean, mean_of(model, USERS), atol=1e-5, rtol=1e-4)
