"""T-REX in PEFT's own comparison on MetaMathQA: the experiments, and what is added to PEFT's script."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_llama
from datasets import Dataset
from peft import PeftConfig, get_peft_model
from texts import make_tokenizer, pairs, text

from peft_trex import TRexConfig, TRexLayer

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "metamath"
TEMPLATE = "w3 {query} w4"


@pytest.fixture(scope="module")
def launcher():
    spec = importlib.util.spec_from_file_location("metamath_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("recommended", TRexConfig.recommended(task_type="CAUSAL_LM")),
        ("recommended-qv", TRexConfig.recommended(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])),
        ("paper", TRexConfig(task_type="CAUSAL_LM")),
    ],
)
def test_the_experiments_are_the_forms_that_they_are_called(name, expected):
    found = PeftConfig.from_pretrained(FOLDER / "experiments" / "trex" / f"llama-3.2-3B-{name}")
    assert found.to_dict() == expected.to_dict()


def script():
    """PEFT's two modules, as far as the script uses them: what they take and give, and how they are called."""
    rows = [{"query": text(prompt), "response": f" {text(answer)}"} for prompt, answer in pairs(48)]

    def tokenize_with_answer(samples, tokenizer, template):
        both = zip(samples["query"], samples["response"], strict=True)
        return dict(tokenizer([template.format(query=query) + answer for query, answer in both]))

    def get_model(*, peft_config):
        return get_peft_model(make_llama(), peft_config)

    def get_train_valid_test_datasets(*, tokenizer, query_template, print_fn):
        arguments = {"tokenizer": tokenizer, "template": query_template}
        train = Dataset.from_list(rows).map(data.tokenize_with_answer, batched=True, fn_kwargs=arguments)
        return train.remove_columns(["query"]), "valid", "test"

    data = SimpleNamespace(
        tokenize_with_answer=tokenize_with_answer, get_train_valid_test_datasets=get_train_valid_test_datasets
    )
    return SimpleNamespace(get_model=get_model), data


def test_the_prior_is_that_of_the_question(launcher):
    utils, data = script()
    launcher.prepare(utils, data)
    tokenizer, config = make_tokenizer(), TRexConfig.recommended(num_clusters=4, task_type="CAUSAL_LM")
    model = utils.get_model(peft_config=config)
    train, *others = data.get_train_valid_test_datasets(tokenizer=tokenizer, query_template=TEMPLATE, print_fn=print)
    assert others == ["valid", "test"]
    prior = model.base_model.prior_of("default")
    questions = [tokenizer(TEMPLATE.format(query=text(prompt)))["input_ids"] for prompt, _ in pairs(48)]
    embedding = model.get_input_embeddings()
    means = torch.stack([embedding(torch.tensor(question)).mean(0) for question in questions]).detach()
    torch.testing.assert_close(prior.mean, means.mean(0), atol=1e-6, rtol=1e-5)
    # A training batch as the script makes it: padded on the right, labels for all that is no padding.
    columns = train[:6]
    del columns["response"]
    batch = tokenizer.pad(columns, return_tensors="pt", padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    layer = next(module for module in model.modules() if isinstance(module, TRexLayer))
    seen = []
    layer.register_forward_pre_hook(lambda layer, args: seen.append(layer.scores_of("default", args[0])))
    loss = model(**batch, labels=labels, num_items_in_batch=9).loss
    assert loss.isfinite()
    torch.testing.assert_close(seen[0].reshape(6, -1), prior.score(means[:6]), atol=1e-5, rtol=1e-5)


def test_what_is_no_checkout_is_said(launcher, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["run.py", str(tmp_path), "experiments/trex/llama-3.2-3B-paper"])
    with pytest.raises(SystemExit, match=r"There is no .*MetaMathQA/run.py; expected a checkout of PEFT"):
        launcher.main()
