"""T-REX in PEFT's own comparison of methods on MetaMathQA, for a GPU.

    python benchmarks/metamath/run.py PEFT experiments/trex/llama-3.2-3B-recommended [-v]

PEFT is a checkout of PEFT's repository, installed from there (`pip install -e PEFT`), with the requirements of
`method_comparison/MetaMathQA`; the experiment is a folder beside this file. PEFT's script runs as it is, so that its
result can be compared with those of the other methods. It gets two things that T-REX needs: the prior is fitted on
questions of the training set, and each training batch says where its questions end, which the script's labels do not
tell.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from peft_trex import initialize_trex_prior

FOLDER = Path(__file__).resolve().parent
QUESTIONS = 8192  # that the prior is fitted on, from all over the training set
LENGTHS = "prompt_tokens"  # a column with the number of tokens that a row's question has


def mark_answers(model: Any, arguments: tuple[Any, ...], batch: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Turn the questions' lengths (B,) of a training batch into a `completion_mask` (B, T), 1 behind the question."""
    lengths = batch.pop(LENGTHS, None)
    if lengths is not None:
        places = torch.arange(batch["input_ids"].shape[1], device=lengths.device)
        batch["completion_mask"] = (places >= lengths[:, None]).long()
    return arguments, batch


def prompts(train: Any, tokenizer: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """Batches of rows from all over the training set."""
    chosen = train.select(range(0, len(train), max(1, len(train) // QUESTIONS)))
    for start in range(0, len(chosen), 64):
        rows = chosen[start : start + 64]
        columns = {name: rows[name] for name in ("input_ids", "attention_mask", LENGTHS)}
        yield mark_answers(None, (), dict(tokenizer.pad(columns, return_tensors="pt").to(device)))[1]


def prepare(utils: Any, data: Any) -> None:
    """Have the script's own functions, of its modules `utils` and `data`, give T-REX what it needs."""
    get_model, tokenize = utils.get_model, data.tokenize_with_answer
    get_datasets = data.get_train_valid_test_datasets
    made: list[Any] = []

    def get_marked_model(**settings: Any) -> Any:
        model = get_model(**settings)
        model.register_forward_pre_hook(mark_answers, with_kwargs=True)
        made.append(model)
        return model

    def tokenize_and_measure(samples: Mapping[str, Any], tokenizer: Any, template: str) -> Any:
        tokens = tokenize(samples, tokenizer, template)
        questions = [template.format(query=query) for query in samples["query"]]
        tokens[LENGTHS] = [len(ids) for ids in tokenizer(questions)["input_ids"]]
        return tokens

    def get_datasets_and_fit(*, tokenizer: Any, **settings: Any) -> tuple[Any, ...]:
        train, *others = get_datasets(tokenizer=tokenizer, **settings)
        print(initialize_trex_prior(made[-1], prompts(train, tokenizer, made[-1].device)), file=sys.stderr)
        return train, *others

    utils.get_model, data.tokenize_with_answer = get_marked_model, tokenize_and_measure
    data.get_train_valid_test_datasets = get_datasets_and_fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peft", type=Path, help="checkout of PEFT's repository")
    parser.add_argument("experiment", help="folder beside this file, experiments/trex/NAME")
    arguments, others = parser.parse_known_args()
    source = arguments.peft.resolve() / "method_comparison" / "MetaMathQA"
    if not (source / "run.py").is_file():
        raise SystemExit(f"There is no {source / 'run.py'}; expected a checkout of PEFT's repository.")
    # PEFT's script takes its experiments from the working directory, and its modules from its own folder.
    os.chdir(FOLDER)
    sys.path.insert(0, str(source))
    import data
    import utils

    prepare(utils, data)
    sys.argv = ["run.py", arguments.experiment, *others]
    runpy.run_path(str(source / "run.py"), run_name="__main__")


if __name__ == "__main__":
    main()
