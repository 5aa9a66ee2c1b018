"""Training with transformers' Trainer: the callback fits the prior, the loss falls, resuming changes nothing."""

import json
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import PAD, adapted, answered, make_llama, prompts
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_trex import TRexConfig, TRexLayer, TRexPriorCallback

datasets = pytest.importorskip("datasets")

SETTINGS = {"r_a": 2, "r_b": 3, "num_clusters": 4, "task_type": "CAUSAL_LM"}


class Pad:
    """The collator's idea of a tokenizer: it pads on the right."""

    padding_side = "right"

    def __call__(self, features):
        width = max(len(feature["input_ids"]) for feature in features)
        fill = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
        return {
            key: torch.tensor([feature[key] + [fill[key]] * (width - len(feature[key])) for feature in features])
            for key in fill
        }


def _data(count=64):
    """Each group of prompts has an answer of its own, which the adapter can learn."""
    rows = []
    for index, ids in enumerate(prompts(count).tolist()):
        prompt, answer = ids[: 5 + index % 4], [10 + index % 4] * 2
        rows.append(
            {
                "input_ids": prompt + answer,
                "attention_mask": [1] * (len(prompt) + 2),
                "labels": [-100] * len(prompt) + answer,
            }
        )
    return rows


def _trainer(model, folder, steps, callbacks=(), **kwargs):
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 0,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **{**settings, **kwargs}),
        train_dataset=_data(),
        data_collator=Pad(),
        callbacks=list(callbacks),
    )


def _losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _fresh(seed=0):
    torch.manual_seed(seed)
    return get_peft_model(make_llama(), TRexConfig(**SETTINGS))


def test_callback_fits_and_training_learns(tmp_path):
    model = _fresh()
    trainer = _trainer(model, tmp_path, 30, [TRexPriorCallback(progress=False)])
    trainer.train()
    assert model.base_model.trex_prior["default"].fitted
    losses = _losses(trainer)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_callback_keeps_a_prior_that_is_there(tmp_path):
    model = adapted()
    before = model.base_model.trex_prior["default"].centroids.clone()
    _trainer(model, tmp_path, 1, [TRexPriorCallback(progress=False)]).train()
    torch.testing.assert_close(model.base_model.trex_prior["default"].centroids, before, rtol=0, atol=0)


@pytest.mark.slow
def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    unbroken = _trainer(_fresh(), tmp_path / "a", 8, [TRexPriorCallback(progress=False)])
    unbroken.train()
    _trainer(
        _fresh(), tmp_path / "b", 4, [TRexPriorCallback(progress=False)], save_strategy="steps", save_steps=4
    ).train()
    # another start, so that only what the checkpoint holds can make the two runs equal
    resumed = _trainer(_fresh(seed=9), tmp_path / "b", 8, [TRexPriorCallback(seed=123, progress=False)])
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    torch.testing.assert_close(_losses(resumed)[-4:], _losses(unbroken)[-4:])
    first, second = (trainer.model.base_model.trex_prior["default"].centroids for trainer in (unbroken, resumed))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_callback_does_not_fit_in_the_middle_of_a_run(tmp_path):
    model = _fresh()
    callback = TRexPriorCallback(progress=False)
    trainer = _trainer(model, tmp_path, 4)
    trainer.state.global_step = 3
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model, train_dataloader=[])
    assert not model.base_model.trex_prior["default"].fitted


@pytest.mark.filterwarnings("ignore:The semantic prior:UserWarning")
def test_callback_names_what_it_cannot_do(tmp_path):
    with pytest.raises(ValueError, match="has no T-REX adapter"):
        _trainer(make_llama(), tmp_path, 1, [TRexPriorCallback(progress=False)]).train()
    external = get_peft_model(make_llama(), TRexConfig(**SETTINGS, prior_encoder="external", prior_dim=5))
    with pytest.raises(ValueError, match="embeddings="):
        _trainer(external, tmp_path, 1, [TRexPriorCallback(progress=False)]).train()


def test_gradient_checkpointing_and_accumulation_train_alike(tmp_path):
    plain = _trainer(adapted(), tmp_path, 3)
    plain.train()
    for settings in (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": True},
        {"activation_checkpointing": True},
    ):
        if not settings.keys() <= TrainingArguments.__dataclass_fields__.keys():
            continue  # transformers before 5.24 has the older name only
        other = _trainer(adapted(), tmp_path, 3, **settings)
        other.model.enable_input_require_grads()  # which reentrant checkpointing wants, and PEFT does in time since 5
        other.train()
        torch.testing.assert_close(_losses(other), _losses(plain), atol=2e-4, rtol=1e-3)


def test_checkpoint_folder_is_a_loadable_adapter(tmp_path):
    model = _fresh()
    _trainer(model, tmp_path, 2, [TRexPriorCallback(progress=False)], save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "TREX"
    loaded = PeftModel.from_pretrained(make_llama(), folder)
    ids = prompts(3)
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def _adapter(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Rows of one length, so that the mean over micro batches is the mean over all."""
    model, batch = adapted().train(), answered(8)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**batch).loss.backward()
        whole = {name: parameter.grad.clone() for name, parameter in _adapter(model).items()}
        model.zero_grad()
        for start in range(0, 8, 2):
            (model(**{key: value[start : start + 2] for key, value in batch.items()}).loss / 4).backward()
        for name, parameter in _adapter(model).items():
            torch.testing.assert_close(parameter.grad, whole[name], atol=1e-5, rtol=1e-4, msg=name)


def test_trainers_bfloat16_trains_as_float32_does(tmp_path):
    # Adam's steps follow the signs of gradients, which a rounding may turn: only small steps stay comparable.
    plain, mixed = (_trainer(adapted(), tmp_path, 3, bf16=bf16, learning_rate=1e-3) for bf16 in (False, True))
    for trainer in (plain, mixed):
        trainer.train()
    first, second = _losses(plain), _losses(mixed)
    assert first != second  # autocast did take part
    torch.testing.assert_close(second, first, atol=0.05, rtol=0.02)
    mixed = _trainer(adapted(), tmp_path, 40, bf16=True)
    mixed.train()
    losses = _losses(mixed)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert {parameter.dtype for parameter in _adapter(mixed.model).values()} == {torch.float32}


@pytest.fixture
def fresh_accelerate(monkeypatch):
    """accelerate keeps its precision for the whole process; others must not find this one, nor this one another's."""
    # transformers before 5 hands the precision on in the environment
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerates_mixed_precision(fresh_accelerate):
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = adapted().train()
    plain = model(**answered(8)).loss
    optimizer = torch.optim.Adam(_adapter(model).values(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    layer, seen = accelerator.unwrap_model(model).base_model.model.model.layers[1].mlp.up_proj, []
    layer.register_forward_pre_hook(lambda layer, args: seen.append(layer._channel.scores("default", args[0])))
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        output = model(**answered(8))
        accelerator.backward(output.loss)
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[0] != plain.item() and losses[0] == pytest.approx(plain.item(), rel=0.02)
    assert losses[-1] < 0.6 * losses[0]
    assert seen[0].dtype == torch.float32  # a prior is not rounded, whatever the layers compute in


@pytest.mark.filterwarnings("ignore:The semantic prior of the adapter 'default' is not fitted")
@pytest.mark.parametrize("upcast", [True, False])
def test_adapters_on_a_bfloat16_base(tmp_path, upcast, fresh_accelerate):
    torch.manual_seed(0)
    base = make_llama().to(torch.bfloat16)
    model = get_peft_model(base, TRexConfig(**SETTINGS), autocast_adapter_dtype=upcast)
    expected = torch.float32 if upcast else torch.bfloat16
    assert {parameter.dtype for parameter in _adapter(model).values()} == {expected}
    assert model(**answered(2)).logits.dtype == torch.bfloat16
    trainer = _trainer(model, tmp_path, 30, [TRexPriorCallback(progress=False)])
    trainer.train()
    losses = _losses(trainer)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        make_llama().to(torch.bfloat16), tmp_path / "adapter", autocast_adapter_dtype=upcast
    )
    assert torch.equal(loaded.eval()(**answered(2)).logits, model.eval()(**answered(2)).logits)


def _scores_in_training(folder, **kwargs):
    """The prior's scores of the first step's rows, and what was warned of."""
    model, seen = adapted().train(), []
    layer = next(module for module in model.modules() if isinstance(module, TRexLayer))
    layer.register_forward_pre_hook(lambda layer, args: seen.append(layer._channel.scores("default", args[0])))
    rows = [
        {"input_ids": ids, "labels": [-100] * 5 + ids[5:], "completion_mask": [0] * 5 + [1] * 4}
        for ids in prompts(8).tolist()
    ]
    settings = {"max_steps": 1, "per_device_train_batch_size": 8, "use_cpu": True, "report_to": [], "seed": 0}
    args = TrainingArguments(str(folder), disable_tqdm=True, save_strategy="no", **settings, **kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(model=model, args=args, train_dataset=datasets.Dataset.from_list(rows)).train()
    said = [str(warning.message) for warning in caught if "completion_mask" in str(warning.message)]
    return seen[0], said


def test_the_advice_about_labels_that_are_taken_away_works(tmp_path):
    """label_smoothing_factor keeps labels from the forward, and the Trainer drops columns that it does not know."""
    expected, quiet = _scores_in_training(tmp_path)
    whole, said = _scores_in_training(tmp_path, label_smoothing_factor=0.1)
    assert not quiet and (whole - expected).abs().max() > 1e-3
    assert len(said) == 1 and "a completion_mask column then needs remove_unused_columns=False" in said[0]
    kept, said = _scores_in_training(tmp_path, label_smoothing_factor=0.1, remove_unused_columns=False)
    assert not said
    torch.testing.assert_close(kept, expected)
