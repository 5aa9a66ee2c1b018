"""Fitting a prior at scale: streams of any length, and several processes. Run as a script, it is one of those."""

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import adapted, batches, make_llama, prompts
from peft import get_peft_model
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import normalized_mutual_info_score
from texts import make_chat_tokenizer
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments

from peft_trex import TRexConfig, TRexPriorCallback, chat_markers, initialize_trex_prior
from peft_trex.fit import fitting
from peft_trex.fit.ranks import shares
from peft_trex.fit.reservoir import Reservoir

DIM = 16


def _external(clusters=4, dim=DIM, **settings):
    return adapted(fit=False, num_clusters=clusters, prior_encoder="external", prior_dim=dim, **settings)


def _prior(model):
    return model.base_model.trex_prior["default"]


def _state(model):
    return {name: tensor.clone() for name, tensor in _prior(model).state_dict().items()}


def _same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def _tasks(count, tasks=4, dim=DIM, spread=0.4, seed=0):
    """Embeddings (count, dim) of tasks in turn, float32."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(1).standard_normal((tasks, dim))
    labels = np.arange(count) % tasks
    return (centres[labels] + spread * generator.standard_normal((count, dim))).astype(np.float32), labels


def _loader(embeddings, size=50):
    return (
        {"semantic_embeds": torch.from_numpy(part)} for part in np.array_split(embeddings, len(embeddings) // size)
    )


@pytest.fixture
def small_sample(monkeypatch):
    """400 prompts of width DIM and no more."""
    monkeypatch.setattr(fitting, "SAMPLE_BYTES", 400 * 4 * DIM)
    monkeypatch.setattr(fitting, "SAMPLE_PER_CLUSTER", 1)


# the sample


@pytest.mark.parametrize("size", [1, 7, 999, 5000])
def test_what_fits_is_held_in_order_and_summed(size):
    rows = np.random.default_rng(0).standard_normal((3000, 5), np.float32)
    reservoir = Reservoir(3000, 5, [0])
    for start in range(0, 3000, size):
        reservoir.add(rows[start : start + size])
    assert np.array_equal(reservoir.rows, rows)
    assert reservoir.draw(3000) is not None and np.array_equal(reservoir.draw(3000), rows)
    assert np.array_equal(reservoir.total, rows.sum(0, dtype=np.float64))


def test_the_sample_does_not_depend_on_how_the_stream_is_cut():
    rows = np.arange(2500, dtype=np.float32)[:, None]
    kept = []
    for size in (1, 7, 100, 2500):
        reservoir = Reservoir(90, 1, [3, 1])
        for start in range(0, len(rows), size):
            reservoir.add(rows[start : start + size])
        kept.append(reservoir.rows[:, 0].tolist())
    assert all(other == kept[0] for other in kept)
    assert len(set(kept[0])) == 90
    other = Reservoir(90, 1, [4, 1])
    other.add(rows)
    assert other.rows[:, 0].tolist() != kept[0]


@pytest.mark.parametrize("count", [50, 20])
def test_every_row_is_as_likely_as_any_other(count):
    """In tenths of the stream, over 400 seeds; 20 of the 50 that are held are as good a sample as all."""
    rows = np.arange(1000, dtype=np.float32)[:, None]
    found = np.zeros(1000)
    for seed in range(400):
        reservoir = Reservoir(50, 1, [seed, 0])
        reservoir.add(rows)
        found[reservoir.draw(count)[:, 0].astype(int)] += 1
    tenths, expected = found.reshape(10, 100).sum(1), 400 * count / 10
    assert ((tenths - expected) ** 2 / expected).sum() < 27.9  # chi-squared, 9 degrees of freedom: p = 0.001
    assert 0.75 < found[20:50].mean() / (400 * count / 1000) < 1.25  # as these would lie behind the first 20 held


@pytest.mark.parametrize(
    ("size", "seen", "counts"),
    [
        (10, [5, 5], [5, 5]),
        (10, [100, 100], [5, 5]),
        (10, [300, 100, 0], [8, 2, 0]),
        (7, [1, 1, 10**12], [0, 0, 7]),
        (3, [1, 1, 1, 1], [1, 1, 1, 0]),
        (0, [0, 0], [0, 0]),
    ],
)
def test_shares_go_by_the_counts(size, seen, counts):
    assert shares(size, seen) == counts


def _as_before(embeddings, clusters, seed):
    """All in memory at once."""
    mean = embeddings.mean(0, dtype=np.float64).astype(np.float32)
    unit = F.normalize(torch.from_numpy(embeddings - mean), dim=-1).numpy()
    kmeans = MiniBatchKMeans(clusters, init="k-means++", n_init=3, batch_size=4096, random_state=seed).fit(unit)
    nearest = kmeans.cluster_centers_[kmeans.labels_]
    explained = 1 - ((unit - nearest) ** 2).sum() / ((unit - unit.mean(0)) ** 2).sum()
    centroids = F.normalize(torch.from_numpy(kmeans.cluster_centers_), dim=-1)
    means = torch.from_numpy(unit.mean(0)) @ centroids.T
    return {
        "centroids": F.normalize(centroids, dim=-1),
        "mean": torch.from_numpy(mean),
        "mean_scores": means,
    }, explained


@pytest.mark.parametrize("seed", [0, 3])
def test_a_stream_that_fits_ends_where_all_in_memory_does(seed):
    embeddings, _ = _tasks(5300)
    expected, explained = _as_before(embeddings, 4, seed)
    for given in ({"dataloader": _loader(embeddings, 77)}, {"embeddings": embeddings}):
        model = _external()
        report = initialize_trex_prior(model, **given, seed=seed, progress=False)
        assert _same(expected, _state(model))
        assert report.explained_variance == pytest.approx(explained, abs=1e-5)
        assert report.prompts == report.sampled == sum(report.cluster_sizes) == 5300


def test_a_stream_sorted_by_task_is_clustered_by_task(small_sample):
    """Where k-means that goes along with the stream loses what comes late."""
    embeddings, labels = _tasks(16000, 8)
    order = np.argsort(labels, kind="stable")
    embeddings, labels = embeddings[order], labels[order]
    model = _external(8)
    report = initialize_trex_prior(model, _loader(embeddings), progress=False)
    assert (report.prompts, report.sampled, sum(report.cluster_sizes)) == (16000, 400, 400)
    torch.testing.assert_close(_prior(model).mean, torch.from_numpy(embeddings.mean(0, dtype=np.float64)).float())
    scores = _prior(model).score(torch.from_numpy(embeddings))
    unit = F.normalize(torch.from_numpy(embeddings) - _prior(model).mean, dim=-1).numpy()
    online = MiniBatchKMeans(8, random_state=0)
    for part in np.array_split(unit, 320):
        online.partial_fit(part)
    ours = normalized_mutual_info_score(labels, scores.argmax(1))
    theirs = normalized_mutual_info_score(labels, online.predict(unit))
    assert ours > 0.95 and ours > theirs + 0.1
    torch.testing.assert_close(_prior(model).mean_scores, scores.mean(0), atol=0.1, rtol=0)


@pytest.fixture
def samples(monkeypatch):
    """What is clustered, each time that it is."""
    seen, cluster = [], fitting.cluster

    def watched(rows, *others, **options):
        seen.append(rows.copy())
        return cluster(rows, *others, **options)

    monkeypatch.setattr(fitting, "cluster", watched)
    return seen


def test_the_sample_depends_on_the_seed(small_sample, samples):
    embeddings, _ = _tasks(3000)
    states = []
    for seed in (0, 0, 1):
        model = _external()
        initialize_trex_prior(model, _loader(embeddings), seed=seed, progress=False)
        states.append(_state(model))
    assert _same(states[0], states[1]) and not _same(states[0], states[2])
    assert np.array_equal(samples[0], samples[1]) and not np.array_equal(samples[0], samples[2])


class _Column:
    """What is not in memory, and says how much of it was asked for at once."""

    def __init__(self, rows):
        self.rows = rows
        self.most = 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        part = self.rows[index]
        self.most = max(self.most, len(part))
        return part.tolist()


def test_columns_and_mapped_arrays_are_read_in_parts(tmp_path):
    embeddings, _ = _tasks(4321)
    np.save(tmp_path / "rows.npy", embeddings)
    column = _Column(embeddings)
    states = []
    for given in (embeddings, np.load(tmp_path / "rows.npy", mmap_mode="r"), column, torch.from_numpy(embeddings)):
        model = _external()
        assert initialize_trex_prior(model, embeddings=given, progress=False).prompts == 4321
        states.append(_state(model))
    assert all(_same(states[0], other) for other in states)
    assert 0 < column.most <= 1000


MEMORY = """
import sys, torch
from conftest import adapted
from peft_trex import initialize_trex_prior
model = adapted(fit=False, num_clusters=32, prior_encoder="external", prior_dim=384)
random = torch.Generator().manual_seed(0)
initialize_trex_prior(model, [{"semantic_embeds": torch.randn(100, 384, generator=random)}], progress=False)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) // 1024
before = peak()
stream = ({"semantic_embeds": torch.randn(1000, 384, generator=random)} for _ in range(300))
report = initialize_trex_prior(model, stream, progress=False)
print(report.prompts, report.sampled, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of the memory from /proc")
def test_memory_does_not_grow_with_the_stream():
    """300,000 prompts are 461 MB by themselves, and clustering all of them at once takes several times that."""
    command = [sys.executable, "-c", MEMORY]
    found = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300, check=True
    )
    seen, sampled, megabytes = map(int, found.stdout.split()[-3:])
    assert (seen, sampled) == (300_000, 166_666)
    assert 200 < megabytes < 400


# what goes wrong


def test_nan_in_a_prompt_that_is_not_sampled(small_sample):
    embeddings, _ = _tasks(5000)
    embeddings[4990:4992, 3] = np.nan, np.inf
    model = _external()
    initialize_trex_prior(model, embeddings=embeddings[:500], progress=False)
    before = _state(model)
    with pytest.raises(ValueError, match=r"2 of the 50 prompt embeddings in batch 99 .*NaN or infinity"):
        initialize_trex_prior(model, _loader(embeddings), progress=False)
    with pytest.raises(ValueError, match=r"2 of the 1000 .* rows from 4000 on .*NaN or infinity"):
        initialize_trex_prior(model, embeddings=embeddings, progress=False)
    assert _same(before, _state(model))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"seed": None}, ValueError, "seed=None"),
        ({"dataloader": [{"inputs_embeds": torch.ones(8, 3, 31)}]}, ValueError, "width 31; expected 32"),
        ({"dataloader": iter(())}, ValueError, "no batch"),
    ],
)
def test_what_is_refused(change, error, message):
    model = adapted()
    before = _state(model)
    with pytest.raises(error, match=message):
        initialize_trex_prior(model, **{"dataloader": batches(), "progress": False, **change})
    assert _same(before, _state(model))


def test_too_few_distinct_prompts_in_a_sample(small_sample):
    with pytest.raises(ValueError, match="the 3 distinct prompts among the 400 that were sampled of 3000"):
        initialize_trex_prior(_external(), _loader(_tasks(3, 3)[0].repeat(1000, 0)), progress=False)


def test_as_many_distinct_prompts_as_clusters_are_enough():
    report = initialize_trex_prior(_external(), embeddings=_tasks(4)[0].repeat(3, 0), progress=False)
    assert report.cluster_sizes == (3, 3, 3, 3) and report.explained_variance == pytest.approx(1)


def test_after_an_error_a_rank_reads_on_but_takes_no_more():
    """The loader may need it, to give the other ranks their batches; what is raised is the first error."""
    batches_read, taken = [], []

    def stream():
        for number in range(5):
            batches_read.append(number)
            yield number

    def take(number, batch):
        taken.append(batch)
        if number >= 2:
            raise ValueError(f"batch {number}")

    counts, ended, errors = zip(*islice(fitting._read(stream(), take, False), 4), strict=True)
    assert (counts, ended) == ((1, 2, 4, 5), (False, False, False, True))
    assert errors[:2] == (None, None) and str(errors[2]) == "batch 2" and errors[3] is errors[2]
    assert (batches_read, taken) == ([0, 1, 2, 3, 4], [0, 1, 2])


@pytest.mark.parametrize("interrupt", [False, True])
def test_random_states_are_kept_and_an_interrupt_changes_nothing(interrupt):
    model = adapted()
    before = _state(model)

    def stream():
        for index, batch in enumerate(batches(64, seed=2)):
            random.random(), np.random.rand(), torch.rand(1)
            if interrupt and index == 5:
                raise KeyboardInterrupt
            yield batch

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with pytest.raises(KeyboardInterrupt) if interrupt else contextlib.nullcontext():
        initialize_trex_prior(model, stream(), progress=False)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert _same(before, _state(model)) == interrupt


# whitening


def _drowned(count=4000):
    """Embeddings (count, DIM) of four tasks, of two materials whose difference is 20 times as large."""
    generator = np.random.default_rng(0)
    embeddings, labels = _tasks(count, spread=0.2)
    material = np.random.default_rng(2).standard_normal(DIM)
    return (embeddings + 20 * generator.integers(0, 2, (count, 1)) * material).astype(np.float32), labels


def test_whitened_prompts_are_compared_along_their_principal_directions():
    embeddings, labels = _drowned()
    plain, model = _external(), _external(prior_whitening=4)
    for each in (plain, model):
        initialize_trex_prior(each, embeddings=embeddings, progress=False)
    prior, given = _prior(model), torch.from_numpy(embeddings)
    variances, directions = torch.linalg.eigh(torch.cov(given.double().T))
    directions = directions[:, -4:] / variances[-4:].sqrt()
    found = prior.direction(given).double()
    torch.testing.assert_close(torch.cov(found.T), torch.eye(4).double(), atol=1e-3, rtol=0)
    along = (given.double() - given.double().mean(0)) @ directions
    torch.testing.assert_close(found @ found.T, along @ along.T, atol=1e-2, rtol=1e-3)  # whatever their signs
    torch.testing.assert_close(prior.centroids.norm(dim=-1), torch.ones(4))
    scores = prior.score(given)
    torch.testing.assert_close(scores, F.normalize(found.float(), dim=-1) @ prior.centroids.T)
    torch.testing.assert_close(prior.mean_scores, scores.mean(0), atol=1e-5, rtol=1e-4)
    known = [normalized_mutual_info_score(labels, _prior(each).score(given).argmax(1)) for each in (plain, model)]
    assert known[0] < 0.7 and known[1] > known[0] + 0.2
    pulled = (given - prior.mean) @ prior.pulled_back().T
    factor = (pulled / scores).median(1).values[:, None]
    assert (factor > 0).all() and prior.pulled_back().norm(dim=-1).max() == pytest.approx(1)
    torch.testing.assert_close(pulled, factor * scores, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("whitening", "given", "message"),
    [
        (4, np.ones((50, DIM)), "prior_whitening=4, but the embeddings of the 50 prompts vary in 0 directions"),
        (4, np.eye(3, DIM)[np.arange(60) % 3], "vary in 2 directions"),
        (8, _tasks(6)[0], "the embeddings of the 6 prompts vary in 5 directions"),
    ],
)
def test_too_few_directions_to_whiten(whitening, given, message):
    model = _external(prior_whitening=whitening)
    before = _state(model)
    with pytest.raises(ValueError, match=message):
        initialize_trex_prior(model, embeddings=given.astype(np.float32), progress=False)
    assert _same(before, _state(model)) and not _prior(model).fitted


def test_more_directions_than_the_embedding_has():
    with pytest.raises(ValueError, match="prior_whitening=33 is more than 32, the width"):
        adapted(prior_whitening=33)


def test_as_many_directions_as_there_are_clusters_or_as_vary():
    """What is chosen equals the fit with that number, and the shapes do not hang on it."""
    embeddings, _ = _tasks(400, dim=DIM)
    few = embeddings @ np.diag(np.arange(DIM) < 3).astype(np.float32)
    for given, clusters, chosen in ((embeddings, 4, 4), (few, 5, 3), (embeddings, 30, DIM), (few[:9], 2, 2)):
        model, plain = (_external(clusters, prior_whitening=each) for each in ("auto", chosen))
        for each in (model, plain):
            initialize_trex_prior(each, embeddings=given, progress=False)
        prior = _prior(model)
        assert prior.whitening.shape == (min(clusters, DIM), DIM)
        assert prior.whitening.any(1).tolist() == [number < chosen for number in range(len(prior.whitening))]
        rows = torch.from_numpy(given)
        torch.testing.assert_close(prior.score(rows), _prior(plain).score(rows))
        torch.testing.assert_close(prior.pulled_back(), _prior(plain).pulled_back())
        if chosen < min(clusters, DIM):
            with pytest.raises(ValueError, match=rf"vary in {chosen} directions.*with \"auto\""):
                initialize_trex_prior(_external(clusters, prior_whitening=clusters), embeddings=given, progress=False)


def test_prompts_that_are_all_alike_leave_nothing_to_whiten():
    model = _external(prior_whitening="auto")
    before = _state(model)
    with pytest.raises(ValueError, match="1 distinct prompts"):
        initialize_trex_prior(model, embeddings=np.ones((50, DIM), np.float32), progress=False)
    assert _same(before, _state(model)) and not _prior(model).fitted


# several processes


def _digest(model):
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in _state(model).values())).hexdigest()


def _shared(rank, count=400):
    return [{"input_ids": part} for part in prompts(count).split(8)][rank::2]


def _failing(batches_, how, at=5):
    for number, batch in enumerate(batches_):
        if number == at:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "no tokens":
                batch = {"pixels": 1}
            if how in (OSError, KeyboardInterrupt):
                raise how("gone")
        yield batch


def _dispatched(rank):
    """accelerate's: rank 0 reads, and the ranks talk for each batch. Rank 1 fails, and must go on to take part."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    loader = accelerator.prepare(DataLoader([{"input_ids": row} for row in prompts(400)], batch_size=8))
    for number, batch in enumerate(loader):
        yield {"pixels": 1} if rank == 1 and number == 5 else batch


def _trained(dataset, **accelerator_config):
    model = get_peft_model(make_llama(), TRexConfig(r_a=2, r_b=3, num_clusters=4, task_type="CAUSAL_LM"))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=4,
            max_steps=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            accelerator_config=accelerator_config or None,
        )
        trainer = Trainer(model=model, args=args, train_dataset=dataset, callbacks=[TRexPriorCallback(progress=False)])
        trainer.train()
    assert _prior(model).fitted
    return model, None


class _Rows(IterableDataset):
    def __iter__(self):
        return iter(_rows())


def _rows():
    return [{"input_ids": row, "labels": row.masked_fill(torch.arange(9) < 5, -100)} for row in prompts(64)]


# The rows of each rank, of 48, that are chats.
CHATS = {"chats on one": (48, 0), "most are chats": (48, 16), "one ends early": (8, 48), "no chats": (4, 4)}


def _chats(rank, *counts):
    model = adapted(fit=False, base=make_llama(vocab_size=400))
    tokenizer = make_chat_tokenizer()
    plain, data = ["ab cd", "efg", "hi"], []
    for number in range(counts[0] if counts == (8, 48) and rank == 0 else 48):
        user = f"{plain[number % 3] * 3} {number} {rank}"
        turns = [{"role": "user", "content": user}]
        chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(chat if number < counts[rank] else user)["input_ids"]
        data.append({"input_ids": torch.tensor([ids])})
    return model, initialize_trex_prior(model, data, progress=False, tokenizer=tokenizer)


def _fit(rank, how):
    """One of the cases below, in one of the two processes: the model, and what was reported."""
    if how.startswith("trained"):
        return {
            "trained": lambda: _trained(_rows()),
            "trained, split": lambda: _trained(_rows(), dispatch_batches=True, split_batches=True),
            "trained on a stream": lambda: _trained(_Rows()),
            "trained on a stream, not dispatched": lambda: _trained(_Rows(), dispatch_batches=False),
        }[how]()
    if how in CHATS:
        return _chats(rank, *CHATS[how])
    model, options = adapted(prior_whitening=8 if how == "whitened" else None), {}
    data = _shared(rank)
    embeddings = [_tasks(3000)[0], _tasks(1000, seed=5)[0]][rank]
    if how == "unequal":
        data = data if rank else data[:1]
    elif how == "one has none":
        data = data if rank else []
    elif how == "none":
        data = []
    elif how == "not shared out":
        data = _shared(0) + _shared(1)
    elif how == "few kinds":
        data = [{"input_ids": prompts(3)}]
    elif how in ("sampled", "nan"):
        fitting.SAMPLE_BYTES, fitting.SAMPLE_PER_CLUSTER = 400 * 4 * DIM, 1
        model, data = _external(), _loader(embeddings)
        if how == "nan" and rank == 0:
            embeddings[700] = np.nan
    elif how == "dispatched":
        data = _dispatched(rank)
    elif how == "argument":
        options["max_batches"] = -rank or None
    elif rank == 1 and how not in ("shared out", "whitened"):
        data = _failing(data, {"raises": OSError, "interrupted": KeyboardInterrupt}.get(how, how))
    before, fitted = _state(model), _prior(model).fitted
    try:
        return model, initialize_trex_prior(model, data, progress=False, **options)
    except BaseException:
        assert _same(before, _state(model)) and _prior(model).fitted == fitted
        raise


def _run_rank(folder, *cases):
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", f"file://{folder}/meet", timeout=timedelta(seconds=60), rank=rank, world_size=2)
    for how in cases:
        try:
            model, report = _fit(rank, how)
            found = {"digest": _digest(model), "mean": _prior(model).mean.tolist()}
            if report is not None:
                found |= {"report": [report.prompts, report.sampled, sum(report.cluster_sizes)]}
                found |= {"markers": report.chat_markers, "kept": model.peft_config["default"].chat_markers}
        except BaseException as error:
            found = {"error": type(error).__name__, "message": str(error)}
            if how == "interrupted" and rank == 1:
                # with the error at hand, whose traceback must not keep the others waiting
                found["late"] = any(Path(folder, "done-0").exists() or time.sleep(0.1) for _ in range(200))
        if how == "interrupted" and rank == 0:
            Path(folder, "done-0").touch()
        with Path(folder, f"{rank}.jsonl").open("a") as file:
            file.write(json.dumps({"how": how, **found}) + "\n")
        if how != "killed":
            dist.barrier()


CASES = (
    "shared out",
    "whitened",
    *CHATS,
    "not shared out",
    "unequal",
    "one has none",
    "sampled",
    "trained",
    "trained, split",
    "trained on a stream",
    "trained on a stream, not dispatched",
    "none",
    "few kinds",
    "no tokens",
    "nan",
    "raises",
    "argument",
    "dispatched",
    "interrupted",
    "killed",
)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What came of each case: {case: [of rank 0, of rank 1]}."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # accelerate wants them, and uses them for nothing
        # The process finds conftest.py where this one does.
        env["PYTHONPATH"] = os.pathsep.join(sys.path)
        command = [sys.executable, __file__, str(folder), *CASES]
        with (folder / f"{rank}.txt").open("w") as log:
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        for process in processes:
            process.wait(timeout=180)
    except subprocess.TimeoutExpired:
        pass  # the cases that are missing tell
    finally:
        for process in processes:
            process.kill()
    found = {}
    for rank in range(2):
        path = folder / f"{rank}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            entry = json.loads(line)
            found.setdefault(entry["how"], [None, None])[rank] = entry
    found["log"] = "".join((folder / f"{rank}.txt").read_text()[-3000:] for rank in range(2))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "report"),
    [
        ("shared out", [400, 400, 400]),
        ("whitened", [400, 400, 400]),
        ("not shared out", [800, 800, 800]),
        ("unequal", [208, 208, 208]),
        ("one has none", [200, 200, 200]),
        ("sampled", [4000, 400, 400]),
        ("trained", None),
        ("trained, split", None),
        ("trained on a stream", None),
        ("trained on a stream, not dispatched", None),
    ],
)
def test_all_ranks_end_with_the_same_prior(how, report, two_ranks):
    assert how in two_ranks, two_ranks["log"]
    first, second = two_ranks[how]
    assert "error" not in first and "error" not in second, (first, second)
    assert first["digest"] == second["digest"]
    if report is not None:
        assert first["report"] == second["report"] == report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "finds"),
    [("chats on one", False), ("most are chats", True), ("one ends early", True), ("no chats", False)],
)
def test_all_ranks_find_the_chat_markers_or_none_does(how, finds, two_ranks):
    assert how in two_ranks, two_ranks["log"]
    first, second = two_ranks[how]
    assert first["digest"] == second["digest"] and first["report"] == second["report"]
    expected = chat_markers(make_chat_tokenizer()) if finds else None
    assert [each[name] for each in (first, second) for name in ("markers", "kept")] == [expected] * 4


@pytest.mark.slow
def test_ranks_together_see_what_one_process_sees(two_ranks):
    embedded = adapted().get_input_embeddings()(prompts(400)).mean(1).mean(0)
    for how in ("shared out", "not shared out"):
        torch.testing.assert_close(torch.tensor(two_ranks[how][0]["mean"]), embedded.detach())
    both = np.concatenate([_tasks(3000)[0], _tasks(1000, seed=5)[0]])
    mean = torch.tensor(two_ranks["sampled"][0]["mean"])
    torch.testing.assert_close(mean, torch.from_numpy(both.mean(0, dtype=np.float64)).float())
    assert two_ranks["trained"][0]["digest"] != two_ranks["shared out"][0]["digest"]


AWAY = ("RuntimeError", "Another rank left")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "first", "second"),
    [
        ("none", ("ValueError", "no batch"), ("ValueError", "no batch")),
        ("few kinds", ("ValueError", "3 distinct prompts"), ("RuntimeError", "Rank 0 failed.*3 distinct prompts")),
        ("no tokens", ("RuntimeError", "Rank 1 failed.*pixels"), ("ValueError", "pixels")),
        ("nan", ("ValueError", "1 of the 50 .*in batch 14"), ("RuntimeError", "Rank 0 failed.*in batch 14")),
        ("raises", ("RuntimeError", "Rank 1 failed.*OSError: gone"), ("OSError", "gone")),
        ("argument", AWAY, ("ValueError", "max_batches=-1")),
        ("dispatched", ("RuntimeError", "Rank 1 failed.*pixels"), ("ValueError", "pixels")),
        ("interrupted", AWAY, ("KeyboardInterrupt", "gone")),
        ("killed", AWAY, None),
    ],
)
def test_what_goes_wrong_on_one_rank_is_raised_on_all(how, first, second, two_ranks):
    assert how in two_ranks, two_ranks["log"]
    for expected, found in zip((first, second), two_ranks[how], strict=True):
        if expected is None:
            assert found is None
        else:
            assert found["error"] == expected[0], found
            assert re.search(expected[1], found["message"]), found
    if how == "interrupted":
        assert two_ranks[how][1]["late"]  # rank 0 was told while rank 1 still held its error


def test_another_rank_is_gone_before_the_ranks_have_met(monkeypatch):
    def leave(**_):
        raise RuntimeError("Connection closed by peer")

    model = adapted()
    before = _state(model)
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 0}.items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(dist, "new_group", leave)
    with pytest.raises(RuntimeError, match=AWAY[1]):
        initialize_trex_prior(model, _shared(0), progress=False)
    assert _same(before, _state(model))


if __name__ == "__main__":
    _run_rank(*sys.argv[1:])
