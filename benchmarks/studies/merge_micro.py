"""What each static form of a T-REX adapter loses where tasks contradict each other, on the micro tier.

    python benchmarks/studies/merge_micro.py [--experiment micro-conflict] [--method "T-REX recommended"] [--seeds 1 2]

Trains the method as the quality benchmark does (the base model is made on the first call), and gives the share of test
prompts whose whole answer is right: routed; one LoRA for each cluster, and for fewer, by stock PEFT and the exported
router; a single merged weight, by each fit, and polished. Without a token router a layer is static within a prompt:
there, groups of prompts finer than the prior's clusters are exported too.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

# Where this file runs as a script, Python knows no other folder than this one.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from quality import corpora, micro_base
from quality.methods import METHODS
from quality.run import Bench, Run, read_experiment

from peft_trex import SemanticRouter, calibrate_trex_merge, save_trex_as_lora

EXPERIMENTS = Path(__file__).resolve().parents[1] / "quality" / "experiments"
GROUPS = (64, 128, 256)


class Study:
    """An adapter, the test rows as batches of one row's prompt and answer, and what is measured on them."""

    def __init__(self, bench: Bench, run: Run, folder: Path) -> None:
        method = METHODS[run.method]
        self.bench, self.rows = bench, bench.corpus.test
        self.model, _, self.texts, train = bench.start(method, run.seed)
        place = folder / f"{bench.experiment.name}-{run.method.replace(' ', '_')}-{run.seed}"
        if not place.exists():
            bench._train(run, method, self.texts, self.model, train, folder / "work" / place.name)
            self.model.save_pretrained(place, save_embedding_layers=False)
        self.model = PeftModel.from_pretrained(copy.deepcopy(bench.base), place).eval()
        self.train = train
        self.test = [self.texts.example(row) for row in self.rows]

    def batches(self, rows: int) -> list[dict[str, Tensor]]:
        """Training rows with labels, to calibrate on."""
        found = []
        for start in range(0, rows, 64):
            batch = self.texts.collate(self.train[start : start + 64])
            completion = batch.pop("completion_mask")
            found.append({**batch, "labels": batch["input_ids"].masked_fill(completion == 0, -100)})
        return found

    @torch.no_grad()
    def right(self, model: Any, numbers: Iterable[int]) -> int:
        """How many of these test rows' answers are right as a whole, each token by the ones before it."""
        numbers, count, masked = list(numbers), 0, model is self.model
        for start in range(0, len(numbers), 128):
            batch = self.texts.collate([self.test[number] for number in numbers[start : start + 128]])
            completion = batch["completion_mask"].bool()
            if not masked:
                del batch["completion_mask"]
            guessed = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
            equal = guessed == batch["input_ids"][:, 1:]
            count += int((equal | ~completion[:, 1:]).all(1).sum())
        return count

    def merged(self, numbers: Iterable[int]) -> int:
        self.model.merge_adapter()
        layer_model = self.model.get_base_model()
        try:
            return self.right(layer_model, numbers)
        finally:
            self.model.unmerge_adapter()

    def exported(self, **settings: Any) -> tuple[int, str]:
        """With the exported LoRA, in stock PEFT, each prompt with the one that the router names."""
        with tempfile.TemporaryDirectory() as folder:
            report = save_trex_as_lora(self.model, Path(folder) / "lora", save_embedding_layers=False, **settings)
            router = SemanticRouter.from_pretrained(Path(folder) / "lora")
            where = defaultdict(list)
            for number, name in enumerate(router.adapter_names([list(one["prompt"]) for one in self.test])):
                where[name].append(number)
            served, count = None, 0
            for name, numbers in where.items():
                if served is None:
                    base = copy.deepcopy(self.bench.base)
                    served = PeftModel.from_pretrained(base, router.adapters[name], adapter_name=name).eval()
                else:
                    served.load_adapter(router.adapters[name], adapter_name=name)
                    served.set_adapter(name)
                count += self.right(served, numbers)
        return count, f"{len(where)} used, joining misses {report.joining_error:.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="micro-conflict")
    parser.add_argument("--method", default="T-REX recommended")
    parser.add_argument("--rate", type=float, default=0.006)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--calibrate", type=int, default=2048, help="training rows to calibrate on")
    parser.add_argument("--distill", type=int, default=0, help="steps of polishing; 0 leaves these forms out")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/merge_micro"), help="where trained adapters are kept"
    )
    arguments = parser.parse_args()
    experiment = read_experiment(EXPERIMENTS / f"{arguments.experiment}.yaml")
    micro_base.make()
    bench = Bench(experiment, corpora.load(experiment.data), arguments.folder)
    for seed in arguments.seeds:
        run = Run(arguments.method, "final", arguments.rate, seed, experiment.steps, "")
        study = Study(bench, run, arguments.folder)
        every, total = range(len(study.test)), len(study.test)
        data = study.batches(arguments.calibrate)

        def show(form: str, count: int, more: str = "", total: int = total, seed: int = seed) -> None:
            print(
                f"| {experiment.name} | {arguments.method} | {seed} | {form} | {count / total:.1%} | {more} |",
                flush=True,
            )

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            show("routed", study.right(study.model, every))
            if not study.model.peft_config["default"].use_router:
                for groups in GROUPS:
                    report = calibrate_trex_merge(study.model, data, per_cluster=groups, fit="core", progress=False)
                    count, more = study.exported()
                    show(f"one LoRA for each of {groups} groups", count, f"misses {report.cluster_error:.2%}; {more}")
            for steps in sorted({0, arguments.distill}):
                polished = f", {steps} steps" if steps else ""
                report = calibrate_trex_merge(
                    study.model, data, per_cluster=True, fit="core", distill_steps=steps, progress=False
                )
                told = "; ".join(f"KL {each.before:.4f} to {each.after:.4f}" for each in report.polished)
                for most in (None, 16, 8) if not steps else (None,):
                    count, more = study.exported(max_adapters=most)
                    name = "one LoRA a cluster" if most is None else f"{most} LoRA for the clusters"
                    show(name + polished, count, f"misses {report.cluster_error:.2%}; {more}; {told}")
                for fit in ("core", "input"):
                    report = calibrate_trex_merge(study.model, data, fit=fit, distill_steps=steps, progress=False)
                    told = "; ".join(f"KL {each.before:.4f} to {each.after:.4f}" for each in report.polished)
                    show(f"merged, {fit}{polished}", study.merged(every), f"misses {report.error:.2%}; {told}")
            study.model.base_model.forget_static("default")
            show("merged, mean routing", study.merged(every))


if __name__ == "__main__":
    main()
