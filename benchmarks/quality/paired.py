"""Statistics of paired differences between two methods, over seeds, tasks and examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean difference, its 95 % interval, and the difference that would have been seen four times in five."""

    mean: float
    low: float
    high: float
    visible: float


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; no error of a single value."""
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return float(np.mean(values)), error


def crossed_interval(differences: np.ndarray) -> Interval | None:
    """Interval for the mean of differences (seeds, tasks), where other seeds and other tasks are to be spoken for.

    The variance of the mean is that of the seeds' means, and that of the tasks' means, less what both of them hold of
    the single cells' noise (Cameron, Gelbach and Miller 2011), but no less than either; the degrees of freedom of
    Student's t are Satterthwaite's. With one task, it is the t interval over seeds. None for fewer than 2 seeds.
    """
    seeds, tasks = differences.shape
    if seeds < 2:
        return None
    by_seed, by_task, mean = differences.mean(1), differences.mean(0), float(differences.mean())
    of_seeds, of_tasks, of_cells = by_seed.var(ddof=1) / seeds, 0.0, 0.0
    if tasks > 1:
        rest = differences - by_seed[:, None] - by_task + mean
        of_tasks = by_task.var(ddof=1) / tasks
        of_cells = (rest**2).sum() / ((seeds - 1) * (tasks - 1)) / differences.size
    variance = max(of_seeds + of_tasks - of_cells, of_seeds, of_tasks)
    if not variance:
        return Interval(mean, mean, mean, 0.0)
    freedom = (of_seeds + of_tasks) ** 2 / (of_seeds**2 / (seeds - 1) + of_tasks**2 / max(tasks - 1, 1))
    wide, power = stats.t.ppf([0.975, 0.8], freedom) * variance**0.5
    return Interval(mean, mean - float(wide), mean + float(wide), float(wide + power))


def bootstrap_interval(values: Sequence[np.ndarray], draws: int = 2000, seed: int = 0) -> np.ndarray:
    """Percentile interval from drawing seeds, tasks, and examples within each task, all with replacement.

    Examples and tasks are the same for all seeds, so one draw of them serves all.

    Args:
        values: differences of each task, (seeds, examples of the task, measures); or one mean for the examples.

    Returns:
        (measures, 2): 2.5th and 97.5th percentile of the mean over tasks and seeds.
    """
    generator = np.random.default_rng(seed)

    def counted(n: int) -> np.ndarray:  # how often each of n was drawn, as a share
        return generator.multinomial(n, np.full(n, 1 / n), size=draws) / n

    of_seeds, of_tasks = counted(values[0].shape[0]), counted(len(values))
    found = np.zeros((draws, values[0].shape[2]))
    for task, own in enumerate(values):
        by_seed = np.tensordot(counted(own.shape[1]), own, (1, 1))  # (draws, seeds, measures)
        found += of_tasks[:, task, None] * np.einsum("dsm,ds->dm", by_seed, of_seeds)
    return np.quantile(found, [0.025, 0.975], axis=0).T


def wilcoxon(differences: np.ndarray) -> float:
    """P value of Wilcoxon's signed-rank test over all cells, as if they were independent; 1 where all are zero."""
    # the exact distribution takes seconds where there are ties
    return float(stats.wilcoxon(differences.ravel(), method="asymptotic").pvalue) if differences.any() else 1.0


def outcome(interval: Interval | None) -> str:
    """What an interval says about "the difference is above zero"."""
    if interval is not None and interval.low > 0:
        return "holds here"
    return "does not hold here" if interval is not None and interval.high < 0 else "cannot be told"
