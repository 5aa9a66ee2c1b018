"""The callback on streams of training data: endless ones, and those that can be read only once."""

import itertools

import pytest
import torch
from conftest import make_llama, prompts
from peft import get_peft_model
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments

from peft_trex import TRexConfig, TRexPriorCallback
from peft_trex.fit.stream import is_stream

IDS = prompts(64)


def row(number):
    ids = IDS[number % 64]
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < 5, -100)}


class Endless(IterableDataset):
    """Begins anew each time, and counts the rows that it gave in all."""

    def __init__(self):
        self.given = 0

    def __iter__(self):
        for number in itertools.count():
            self.given += 1
            yield row(number)


class EndlessOfALength(Endless):
    def __len__(self):
        return 10**6


class Drawn(IterableDataset):
    """Rows drawn by chance, from torch's global generator."""

    def __iter__(self):
        while True:
            yield row(int(torch.randint(64, ())))


class OneShot(IterableDataset):
    """A generator that goes on where it was left."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self.rows


class OneShotInDisguise(OneShot):
    def __iter__(self):
        yield from self.rows


class OneShotOfALength(OneShot):
    def __len__(self):
        return 24


def train(folder, data, callback=None, **settings):
    model = get_peft_model(make_llama(), TRexConfig(r_a=2, r_b=3, num_clusters=4, task_type="CAUSAL_LM"))
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **settings}
    silent = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    callback = callback or TRexPriorCallback(progress=False)
    args = TrainingArguments(str(folder), **silent, **options)
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[callback])
    trainer.train()
    return trainer


def mean_of(trainer, count):
    """The mean of the embeddings of the first prompts."""
    tuner = trainer.model.base_model
    return tuner.input_embedding()(IDS[:count, :5]).mean(1).mean(0).detach()


@pytest.mark.parametrize("kind", [Endless, EndlessOfALength])
def test_an_endless_stream_is_read_as_far_as_the_training_will(tmp_path, kind):
    data = kind()
    trainer = train(tmp_path, data)
    assert trainer.state.global_step == 3
    # Three steps of two batches of four rows.
    mean = trainer.model.base_model.trex_prior["default"].mean
    torch.testing.assert_close(mean, mean_of(trainer, 24), atol=1e-5, rtol=1e-4)
    # Accelerate reads one batch ahead: once in the fit, once when a batch is read again, once in the training.
    assert data.given <= 24 + 8 + 24 + 3 * 4


def test_the_callbacks_own_number_goes_first(tmp_path):
    trainer = train(tmp_path, Endless(), TRexPriorCallback(max_batches=2, progress=False))
    mean = trainer.model.base_model.trex_prior["default"].mean
    torch.testing.assert_close(mean, mean_of(trainer, 8), atol=1e-5, rtol=1e-4)


def test_a_data_set_of_a_length_is_read_whole(tmp_path):
    data = [row(number) for number in range(64)]
    trainer = train(tmp_path, data)
    mean = trainer.model.base_model.trex_prior["default"].mean
    torch.testing.assert_close(mean, mean_of(trainer, 64), atol=1e-5, rtol=1e-4)


def test_rows_that_are_drawn_by_chance_come_again(tmp_path):
    assert train(tmp_path, Drawn()).state.global_step == 3


@pytest.mark.parametrize("kind", [OneShot, OneShotInDisguise, OneShotOfALength])
def test_a_stream_that_the_fit_has_used_up_is_refused(tmp_path, kind):
    with pytest.raises(ValueError, match=f"a {kind.__name__}, can be read only once: .* 6 batches, and nothing is"):
        train(tmp_path, kind(map(row, range(24))))


@pytest.mark.parametrize("kind", [OneShot, OneShotInDisguise])
def test_a_stream_that_goes_on_is_said(tmp_path, kind):
    with pytest.warns(UserWarning, match=f"a {kind.__name__}, gave other rows .* the first 7 batches"):
        trainer = train(tmp_path, kind(map(row, itertools.count())))
    assert trainer.state.global_step == 3


def test_the_advice_helps(tmp_path):
    from datasets import IterableDataset as Stream

    data = Stream.from_generator(lambda: map(row, range(24)))
    assert train(tmp_path, data).state.global_step == 3


def test_what_is_a_stream():
    assert is_stream(iter([1])) and is_stream(DataLoader(Endless())) and is_stream(DataLoader(EndlessOfALength()))
    assert not is_stream([1]) and not is_stream(DataLoader([1]))
