"""Exact match for several tasks at once, as a module for `evaluate`: the accuracy of each task, and their mean."""

from collections import defaultdict

import datasets
import evaluate

DESCRIPTION = "Share of predictions that equal their reference exactly, for each task, and the mean over the tasks."
INPUTS = """
Args:
    predictions: list of str, the answers.
    references: list of str, the gold answers.
    tasks: list of str, the task that each of them belongs to.
Returns:
    accuracy: mean over the tasks, in [0, 1], each counting the same.
    tasks: dict of task to its accuracy in [0, 1].
"""


class TaskAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "references": text, "tasks": text}),
        )

    def _compute(self, predictions: list[str], references: list[str], tasks: list[str]) -> dict:
        right: dict[str, list[bool]] = defaultdict(list)
        for prediction, reference, task in zip(predictions, references, tasks, strict=True):
            right[task].append(prediction == reference)
        shares = {task: sum(hits) / len(hits) for task, hits in right.items()}
        return {"accuracy": sum(shares.values()) / len(shares), "tasks": shares}
