"""How fast an adapter begins to change its layers: the first steps of a training, without scoring.

    python benchmarks/studies/pace.py benchmarks/quality/experiments/generated-small.yaml --method "T-REX 4x8"

Prints, after some steps at a constant learning rate, the energy of what the adapter adds, relative to that of the
layer it is in (median of the layers, over a batch that is not trained on), and the training loss.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

# Where this file runs as a script, Python knows no other folder than this one.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from quality import corpora
from quality.methods import METHODS
from quality.run import Bench, Learner, read_experiment
from reporting import table

SHOWN = (1, 2, 4, 8)  # steps


class _Energies:
    """What the adapters of a model add, while this is open: {layer: energy relative to the layer's own}."""

    def __init__(self, model: nn.Module) -> None:
        self.found: dict[str, float] = {}
        self._layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(getattr(layer, "base_layer", None), nn.Linear)
        }

    def __enter__(self) -> dict[str, float]:
        self._hooks = [layer.register_forward_hook(self._of(name)) for name, layer in self._layers.items()]
        return self.found

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _of(self, name: str):
        def look(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            own = layer.base_layer(inputs[0])
            self.found[name] = float((output - own).square().sum() / own.square().sum())

        return look


def pace(bench: Bench, name: str, rate: float, steps: int, seed: int = 1) -> list[str]:
    """A line of the table."""
    experiment, method = bench.experiment, METHODS[name]
    model, _, texts, train = bench.start(method, seed)
    rows = experiment.rows_per_step
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    if not 0 < steps < len(order) // rows:
        raise ValueError(
            f"steps={steps} must be from 1 to {len(order) // rows - 1}: there are {len(order)} training rows, {rows} "
            "for a step, and as many to look at."
        )
    batches = [
        {key: value.to(bench.device) for key, value in texts.collate([train[i] for i in order[start:][:rows]]).items()}
        for start in range(0, rows * (steps + 1), rows)
    ]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(folder, learning_rate=rate, report_to=[], use_cpu=bench.device == "cpu")
        optimizer = Learner(texts, method.factors, model=model, args=settings).create_optimizer()
    losses, energies = [], []
    for step, batch in enumerate(batches[:-1], 1):
        model.train()
        with bench.precision.context(bench.device):
            loss = texts.loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        if step in SHOWN:
            with torch.no_grad(), bench.precision.context(bench.device), _Energies(model.eval()) as found:
                texts.loss(model, batches[-1])
            energies.append(statistics.median(found.values()))
    half = statistics.mean(losses[len(losses) // 2 :])
    return [name, f"{rate:g}", *(f"{energy:.1e}" for energy in energies), f"{half:.2f}"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="an experiment file of quality/run.py")
    parser.add_argument("--data", type=Path, help="the folder of an experiment whose data lie in one")
    parser.add_argument(
        "--method", nargs="+", choices=[name for name in METHODS if METHODS[name].config], required=True
    )
    parser.add_argument("--rate", nargs="+", type=float, default=[0.001], help="learning rates")
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args(argv)
    try:
        experiment = read_experiment(args.experiment)
        bench = Bench(experiment, corpora.load(experiment.data, args.data), Path("runs"))
        lines = [pace(bench, name, rate, args.steps) for name in args.method for rate in args.rate]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    head = ["", "learning rate", *(f"added after {step}" for step in SHOWN if step <= args.steps)]
    print(table([*head, f"loss of steps {args.steps // 2 + 1} to {args.steps}"], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
