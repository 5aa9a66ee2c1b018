"""What the prior sees of the tasks, with and without whitening: no training, a minute on a CPU.

    python benchmarks/studies/prior.py benchmarks/quality/experiments/generated-small.yaml
    python benchmarks/studies/prior.py benchmarks/quality/experiments/multitask-small.yaml --data FOLDER

Embeds the training prompts of an experiment as the adapter does, fits a prior of 32 clusters on them for each number
of whitened directions, and prints: purity and normalised mutual information of clusters and tasks, the spread of a
prompt's scores, the mean |cos| between two tasks' mean scores, and how much of the embeddings' variance lies along
the first principal direction.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn

from peft_trex import TRexConfig, initialize_trex_prior
from peft_trex.analysis.statistics import agreement, overlaps

# Where this file runs as a script, Python knows no other folder than this one.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from quality import corpora
from quality.run import read_experiment
from quality.scoring import Texts
from reporting import table
from small_model import load_model

DIRECTIONS = (None, 4, 8, 16, 32, 64)


def look(embeddings: torch.Tensor, tasks: list[str], directions: int | None, seed: int = 0) -> list[str]:
    """A line of the table for embeddings (N, d) and the task of each."""
    config = TRexConfig(
        target_modules=["0"], prior_encoder="external", prior_dim=embeddings.shape[1], prior_whitening=directions
    )
    model = get_peft_model(nn.Sequential(nn.Linear(1, 1)), config)
    initialize_trex_prior(model, embeddings=embeddings, seed=seed, progress=False)
    scores = model.base_model.trex_prior["default"].score(embeddings)
    own = {task: scores[[one == task for one in tasks]] for task in sorted(set(tasks))}
    counts = [part.argmax(-1).bincount(minlength=scores.shape[1]) for part in own.values()]
    purity, nmi = agreement(torch.stack(counts).double())
    overlap = overlaps({task: part.mean(0) for task, part in own.items()})
    return [
        "none" if directions is None else str(directions),
        f"{purity:.2f}",
        f"{nmi:.2f}",
        f"{float(scores.std(-1, correction=0).mean()):.2f}",
        f"{overlap.mean():.2f} (at most {overlap.max():.2f})",
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="an experiment file of quality/run.py")
    parser.add_argument("--data", type=Path, help="the folder of an experiment whose data lie in one")
    args = parser.parse_args(argv)
    experiment = read_experiment(args.experiment)
    rows = corpora.load(experiment.data, args.data).train
    base, tokenizer = load_model(experiment.base)
    texts, table_of_tokens = Texts(tokenizer), base.get_input_embeddings().weight.detach().float()
    embeddings = torch.stack([table_of_tokens[torch.tensor(texts.prompt(row))].mean(0) for row in rows])
    tasks = [row["task"] for row in rows]
    variances = torch.linalg.svdvals(embeddings - embeddings.mean(0)).square()
    print(
        f"{experiment.name}: {len(rows)} prompts of {len(set(tasks))} tasks; {variances[0] / variances.sum():.0%} of "
        "the embeddings' variance lies along their first principal direction\n"
    )
    head = ["whitened directions", "purity", "NMI", "spread of a prompt's scores", "overlap of two tasks' scores"]
    print(table(head, [look(embeddings, tasks, directions) for directions in DIRECTIONS]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
