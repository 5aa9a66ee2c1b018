"""Several adapters in one batch, one for each row: every row is as if it were alone.

All is in float64 but for the scores of the prompts, which are float32.
"""

import pytest
import torch
from conftest import CACHE, MAKERS, adapted, batches, padded, prompts, randomize

from peft_trex import TRexConfig, TRexLayer, initialize_trex_prior

# They differ in what the layers and the priors do.
SECOND = {"use_router": False, "prior_map": "learned", "shared_core": True, "num_clusters": 5}
CONFIGS = {"second": SECOND, "third": {"use_prior": False}, "scoped": {"prior_scope": "answer", "r_b": 2}}
NAMES = ["second", "default", "__base__", "third", "scoped", "default", "second"]
IDS = prompts(len(NAMES), seed=2)


def several(kind="llama", **config):
    """A model in float64 with four adapters, whose priors are fitted on other prompts each."""
    model = adapted(kind, base=MAKERS[kind]().double(), fit=False, **config)
    for name, changes in CONFIGS.items():
        task = model.peft_config["default"].task_type
        model.add_adapter(
            name, TRexConfig(**{"r_a": 2, "r_b": 3, "num_clusters": 4, "task_type": task, **config, **changes})
        )
    for seed, name in enumerate(model.peft_config):
        randomize(model, name, seed=seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    for seed, name in enumerate(model.peft_config):
        if model.peft_config[name].use_prior:
            initialize_trex_prior(model, batches(seed=seed), adapter_name=name, progress=False)
    return model.eval()


@torch.no_grad()
def alone(model, call):
    """What a call gives for each row by itself, with its adapter as the active one."""
    results = []
    for row in range(len(NAMES)):
        if NAMES[row] == "__base__":
            with model.disable_adapter():
                results.append(call(slice(row, row + 1)))
        else:
            model.set_adapter(NAMES[row])
            results.append(call(slice(row, row + 1)))
    model.set_adapter("default")
    return torch.cat(results)


def inputs_of(kind, side):
    """Rows of three to nine tokens, padded; the last two of each are its answer."""
    batch = padded(IDS, side)
    if kind == "t5":
        return {**{name: batch[name] for name in ("input_ids", "attention_mask")}, "decoder_input_ids": IDS[:, :4]}
    mask = batch["attention_mask"]
    predicted = (mask.cumsum(1) > mask.sum(1, keepdim=True) - 2) & (mask > 0)
    return {**batch, "labels": batch["input_ids"].masked_fill(~predicted, -100)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_forward(kind, side):
    model, batch = several(kind), inputs_of(kind, side)
    expected = alone(model, lambda rows: model(**{name: value[rows] for name, value in batch.items()}).logits)
    with torch.no_grad():
        mixed = model(**batch, adapter_names=NAMES).logits
        plain = model(**batch).logits
    torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=1e-4)
    # Each row hangs on its own adapter, and a call without names runs the active one again.
    differs = (mixed - plain).abs().amax((1, 2)) > 1e-3
    assert differs.tolist() == [name != "default" for name in NAMES]


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"use_cache": False}], ids=str
)
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generate(kind, options):
    model, batch = several(kind), padded(IDS, "left")
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 5, "do_sample": False, **options}
    each = alone(model, lambda rows: model.generate(**{name: value[rows] for name, value in batch.items()}, **options))
    with torch.no_grad():
        mixed = model.generate(**batch, adapter_names=NAMES, **options)
        plain = model.generate(**batch, **options)
    assert mixed.tolist() == each.tolist() != plain.tolist()


def test_decoding_by_hand():
    """A cache carries the priors of all its rows' adapters."""
    model = several()
    with torch.no_grad():
        output = model(input_ids=IDS, adapter_names=NAMES)
        token = output.logits[:, -1:].argmax(-1)
        logits = model(input_ids=token, **{CACHE: output.get(CACHE)}, adapter_names=NAMES).logits
        tokens = model.generate(input_ids=IDS, adapter_names=NAMES, max_new_tokens=2, do_sample=False)
    assert torch.equal(tokens[:, -2:], torch.cat([token, logits[:, -1:].argmax(-1)], 1))


def test_steering():
    """A prior that is set for one adapter acts on the rows of that one."""
    model = several()
    clusters = {"default": 2, "second": torch.tensor([3, -1, -1, -1, -1, -1, 1])}

    def call(rows):
        chosen = {"default": 2, "second": clusters["second"][rows]}
        own = {name: chosen[name] for name in model.active_adapters if name in chosen}
        with_prior = own and NAMES[rows.start] in own
        return model(input_ids=IDS[rows], **({"semantic_prior": own} if with_prior else {})).logits

    expected = alone(model, call)
    with torch.no_grad():
        steered = model(input_ids=IDS, adapter_names=NAMES, semantic_prior=clusters).logits
        plain = model(input_ids=IDS, adapter_names=NAMES).logits
    torch.testing.assert_close(steered, expected, atol=1e-4, rtol=1e-4)
    assert ((steered - plain).abs().amax((1, 2)) > 1e-3).tolist() == [name in clusters for name in NAMES]


def test_modules_that_are_trained_in_full():
    """Each adapter has a head of its own, and the base model's rows have the base model's."""
    model = several(modules_to_save=["lm_head"], target_modules=["q_proj", "up_proj"])
    with torch.no_grad():
        for seed, name in enumerate(model.peft_config):
            model.base_model.model.lm_head.modules_to_save[name].weight.mul_(seed + 2)
    batch = inputs_of("llama", "left")
    expected = alone(model, lambda rows: model(**{name: value[rows] for name, value in batch.items()}).logits)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, adapter_names=NAMES).logits, expected, atol=1e-4, rtol=1e-4)
        tokens = model.generate(input_ids=IDS, adapter_names=NAMES, num_beams=2, max_new_tokens=3, do_sample=False)
    each = alone(
        model, lambda rows: model.generate(input_ids=IDS[rows], num_beams=2, max_new_tokens=3, do_sample=False)
    )
    assert torch.equal(tokens, each)


def test_an_adapter_that_is_not_in_all_layers():
    model = several(target_modules=["q_proj", "v_proj"])
    model.add_adapter(
        "narrow", TRexConfig(r_a=2, r_b=2, num_clusters=4, target_modules=["v_proj"], task_type="CAUSAL_LM")
    )
    randomize(model, "narrow", seed=9)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    initialize_trex_prior(model, batches(), adapter_name="narrow", progress=False)
    with torch.no_grad():
        mixed = model(input_ids=IDS[:2], adapter_names=["narrow", "default"]).logits
        model.set_adapter("narrow")
        torch.testing.assert_close(mixed[:1], model(input_ids=IDS[:1]).logits, atol=1e-4, rtol=1e-4)


REFUSED = {
    "too few": (["default"], ValueError, "1 names for 7 rows"),
    "too many": ([*NAMES, "default"], ValueError, "8 names for 7 rows"),
    "half as many": (NAMES[:1] * 14, ValueError, "14 names for 7 rows"),
    "unknown": (
        ["nobody", *NAMES[1:]],
        ValueError,
        r"holds nobody; expected .*\['default', 'scoped', 'second', 'third'\]",
    ),
    "none": ([], ValueError, "holds nothing"),
    "a name": ("default", TypeError, "must be a list of names"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("generates", [False, True])
def test_refused(case, generates):
    model = several()
    names, kind, message = REFUSED[case]
    call = model.generate if generates else model
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        with pytest.raises(kind, match=message):
            call(input_ids=IDS, adapter_names=names)
        assert torch.equal(model(input_ids=IDS).logits, before)


def test_what_cannot_be_by_row():
    model = several()
    with pytest.raises(ValueError, match=r"is for inference; call eval\(\) first"):
        model.train()(input_ids=IDS, adapter_names=NAMES)
    model.eval()
    with pytest.warns(UserWarning, match="T-REX depends on its input"):
        model.merge_adapter(["third"])
    with pytest.raises(ValueError, match=r"call unmerge_adapter\(\) first"):
        model(input_ids=IDS, adapter_names=NAMES)
    model.unmerge_adapter()
    layer = next(module for module in model.modules() if isinstance(module, TRexLayer))
    hook = layer.register_forward_pre_hook(lambda module, args: (args[0][:3],))
    with pytest.raises(ValueError, match=r"input of shape .* in a forward of 7 rows, so adapter_names"):
        model(input_ids=IDS, adapter_names=NAMES)
    hook.remove()
    with model.disable_adapter(), torch.no_grad():
        disabled = model(input_ids=IDS, adapter_names=NAMES).logits
        assert torch.equal(disabled, model(input_ids=IDS).logits)
