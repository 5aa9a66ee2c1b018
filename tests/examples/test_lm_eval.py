"""The recipe for lm-evaluation-harness: a log-likelihood has the prior of its context alone, as generate has it."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import PAD, adapted, make_llama, prompts
from texts import make_tokenizer, save_tiny_model, text
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from peft_trex import initialize_trex_prior

MARKERS = {"before": [1, 63], "after": [2], "assistant": []}
KINDS = {"prompt": {}, "answer": {"prior_scope": "answer"}, "chat": {"chat_markers": MARKERS}}
PREFIX = 1
APART = "lm_eval is not importable here: see test_with_a_harness_that_is_kept_apart"


@pytest.fixture(scope="module")
def recipe():
    pytest.importorskip("lm_eval", reason=APART)
    import lm_eval_harness

    return lm_eval_harness


@pytest.fixture(params=KINDS)
def model(request):
    settings = KINDS[request.param]
    model = adapted(base=make_llama(eos_token_id=2, pad_token_id=None), fit=False, **settings)
    rows = [as_chat(row) if "chat_markers" in settings else row for row in prompts(32).tolist()]
    initialize_trex_prior(model, [{"input_ids": torch.tensor(rows)}], progress=False)
    return model


def as_chat(message):
    return MARKERS["before"] + message + MARKERS["after"]


def requests(kind, args):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, number) for number, one in enumerate(args)]


def make(recipe, model, batch_size=1, plain=False, **kwargs):
    """The recipe's model for the harness, or the harness's own."""
    kind = recipe.HFLM if plain else recipe.TRexLM
    return kind(pretrained=model, tokenizer=make_tokenizer(), batch_size=batch_size, device="cpu", **kwargs)


def questions(model):
    """(context, continuation), both as ids: of many lengths, and several continuations for a context."""
    ids = prompts(8, 30, seed=2).tolist()
    contexts = [row[: 3 + 3 * number] for number, row in enumerate(ids)]
    if model.peft_config["default"].chat_markers:
        # The messages, and before every other one an earlier turn.
        former = as_chat(ids[0][:4]) + ids[1][:3]
        contexts = [former * (number % 2) + as_chat(row) for number, row in enumerate(contexts)]
    found = []
    for context, answer in zip(contexts, prompts(8, 4, seed=3).tolist(), strict=True):
        # One token, the same but for the last token, longer; and the same tokens, cut elsewhere.
        ends = [answer[:1], answer[1:2], answer[:3], [*answer[:2], 40], answer, answer[:1] * 2]
        found += [(context, end) for end in ends] + [(context + answer[:1], answer[1:])]
    return found


def log_likelihoods(lm, pairs):
    args = [(shown(context), " " + shown(answer)) for context, answer in pairs]
    return lm.loglikelihood(requests("loglikelihood", args), disable_tqdm=True)


def shown(ids):
    return make_tokenizer().decode(ids)


class Force(LogitsProcessor):
    def __init__(self, length, answer):
        self.length, self.answer = length, answer

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -1e4)
        forced[:, self.answer[input_ids.shape[1] - self.length]] = 0
        return forced


def by_generate(model, context, answer):
    """The log-likelihood that generate gives the tokens of an answer, and whether they are the greedy ones."""
    output = model.generate(
        torch.tensor([context]), attention_mask=torch.ones(1, len(context)), max_new_tokens=len(answer),
        do_sample=False, pad_token_id=PAD, output_logits=True, return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([Force(len(context), answer)]),
    )  # fmt: skip
    logits = torch.cat(output.logits)
    target = torch.tensor(answer)
    return logits.log_softmax(-1).gather(1, target[:, None]).sum().item(), torch.equal(logits.argmax(-1), target)


def check(found, expected):
    torch.testing.assert_close([one[0] for one in found], [one[0] for one in expected], atol=1e-3, rtol=0)
    assert [one[1] for one in found] == [one[1] for one in expected]


@pytest.mark.parametrize("batch_size", [1, 8, "auto"])
def test_log_likelihoods_are_those_of_generate(recipe, model, batch_size):
    pairs = questions(model)
    pairs.append((pairs[0][0], [model.generate(torch.tensor([pairs[0][0]]), max_new_tokens=1)[0, -1].item()]))
    expected = [by_generate(model, *pair) for pair in pairs]
    with warnings.catch_warnings():
        # Not even the search for a batch size lets the prior see an answer.
        warnings.filterwarnings("error", "A forward got neither")
        found = log_likelihoods(make(recipe, model, batch_size, max_batch_size=4), pairs)
    check(found, expected)
    assert found[-1][1] and not all(one[1] for one in found)


def test_the_harness_alone_lets_the_prior_see_the_answer(recipe):
    """Otherwise the test above could not fail."""
    model = adapted()
    pairs = questions(model)
    found = log_likelihoods(make(recipe, model, plain=True), pairs)
    expected = [by_generate(model, *pair) for pair in pairs]
    assert max(abs(one[0] - other[0]) for one, other in zip(found, expected, strict=True)) > 0.1


@pytest.mark.parametrize("kind", ["prompt", "answer"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_whole_text_has_the_prior_of_the_token_before_it(recipe, kind, batch_size):
    model = adapted(**KINDS[kind])
    # The first fits into a window, the others are cut.
    texts = [row[:length] for row, length in zip(prompts(3, 50, seed=4).tolist(), (12, 37, 50), strict=True)]
    lm = make(recipe, model, batch_size, max_length=16)
    assert lm.prefix_token_id == PREFIX
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text(ids),) for ids in texts]), True)
    expected = []
    for ids in texts:
        seen, total = [PREFIX, *ids], 0.0
        for start in range(0, len(ids), 16):
            end = min(start + 16, len(ids))
            window = torch.tensor([seen[max(0, end - 16) : end]])
            with torch.no_grad():
                logits = model(
                    input_ids=window,
                    completion_mask=(torch.arange(window.shape[1]) > 0).long()[None],
                    semantic_prior={"input_ids": torch.tensor([[PREFIX]])},
                ).logits[0, start - end :]
            total += logits.log_softmax(-1).gather(1, torch.tensor(ids[start:end])[:, None]).sum().item()
        expected.append(total)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert found[0] == pytest.approx(by_generate(model, [PREFIX], texts[0])[0], abs=1e-3)


def test_without_a_prior_it_is_the_harness(recipe):
    """Long requests, which lose their first tokens, and whole texts among them."""
    model = adapted(fit=False, use_prior=False)
    # With its cache, the harness takes logits at the wrong places for continuations of unlike lengths.
    settings = {"max_length": 16, "logits_cache": False}
    ours, theirs = (make(recipe, model, 3, plain, **settings) for plain in (False, True))
    pairs = questions(model)
    assert max(len(context) for context, _ in pairs) > 16
    with pytest.warns(UserWarning, match="longer than max_length=16"):
        found = log_likelihoods(ours, pairs)
    check(found, log_likelihoods(theirs, pairs))
    texts = requests("loglikelihood_rolling", [(text(row),) for row in prompts(3, 50, seed=4).tolist()])
    expected = theirs.loglikelihood_rolling(texts, True)
    torch.testing.assert_close(ours.loglikelihood_rolling(texts, True), expected, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="A continuation has 20 tokens; expected from 1 to max_length=16"):
        log_likelihoods(ours, [([5, 6], [7] * 20)])


def test_generated_texts_do_not_depend_on_the_batch(recipe, model):
    contexts = list({tuple(context) for context, _ in questions(model)})
    args = [(shown(list(context)), {"until": ["w59"], "max_gen_toks": 6}) for context in contexts]
    alone, batch = (
        make(recipe, model, size).generate_until(requests("generate_until", args), True) for size in (1, 8)
    )
    assert alone == batch and len(set(alone)) > 4
    for context, found in zip(contexts, alone, strict=True):
        ids = model.generate(torch.tensor([context]), max_new_tokens=6, do_sample=False, pad_token_id=PAD)
        new = make_tokenizer().decode(ids[0, len(context) :], skip_special_tokens=True)
        assert found == new.partition("w59")[0]


def test_the_command_line(recipe, tmp_path, capsys):
    save_tiny_model(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted(base=base, num_clusters=4).save_pretrained(tmp_path / "adapter")
    recipe.main(["--adapter", str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), "--limit", "4"])
    shown_lines = capsys.readouterr().out
    for task, metric in (("demo_choice", "acc"), ("demo_answer", "exact_match")):
        assert re.search(rf"^{task} +{metric},none +[01]\.\d\d\d$", shown_lines, re.MULTILINE), shown_lines


@pytest.mark.slow
def test_with_a_harness_that_is_kept_apart():
    """The harness is not importable beside the other tests, so that evaluate and PEFT are tested without it."""
    folder = Path(sys.prefix) / "lm_eval"
    if not folder.is_dir():
        pytest.skip(f"lm_eval is not in {folder.name}/ of the virtual environment, where `make test` puts it")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not kept_apart", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert re.search(r"^19 passed, 1 deselected", done.stdout, re.MULTILINE), done.stdout[-4000:] + done.stderr[-2000:]
