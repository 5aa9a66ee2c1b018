"""PEFT's optimizers for LoRA refuse T-REX's parameters, however they were imported, and take LoRA's as before."""

import subprocess
import sys
from pathlib import Path

import peft.optimizers
import pytest
import torch
from conftest import adapted, make_llama
from peft import LoraConfig, get_peft_model

TESTS = Path(__file__).parents[1]
HELPERS = {
    "create_loraplus_optimizer": {"optimizer_cls": torch.optim.AdamW, "lr": 1e-3, "loraplus_lr_ratio": 16},
    "create_lorafa_optimizer": {"r": 8, "lora_alpha": 8, "lr": 1e-3},
    "create_riemannian_optimizer": {"optimizer_cls": torch.optim.AdamW, "lr": 1e-3},
}


def groups_of(optimizer):
    return [(len(group["params"]), group["lr"]) for group in optimizer.param_groups]


def test_all_helpers_are_here():
    assert set(peft.optimizers.__all__) == set(HELPERS)


@pytest.mark.parametrize("helper", HELPERS)
def test_refused_by_name_with_what_to_do(helper):
    model = adapted()
    with pytest.raises(ValueError, match=f"{helper} is for LoRA.*trex_A.default.*torch's optimizers.*trex_B"):
        getattr(peft.optimizers, helper)(model, **HELPERS[helper])
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "trex_" in name)


@pytest.mark.parametrize("helper", HELPERS)
def test_lora_is_taken_also_beside_a_frozen_adapter(helper):
    model = get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"]))
    alone = groups_of(getattr(peft.optimizers, helper)(model, **HELPERS[helper]))
    assert sum(count for count, _ in alone) >= 4
    model.register_module("other", adapted().requires_grad_(False))
    optimizer = getattr(peft.optimizers, helper)(model, **HELPERS[helper])
    if helper != "create_lorafa_optimizer":  # which also takes what is frozen
        assert groups_of(optimizer) == alone


def test_the_groups_that_the_text_tells_give_b_a_rate_of_its_own():
    model = adapted()
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    B = [one for name, one in trained.items() if ".trex_B." in name]
    others = [one for name, one in trained.items() if ".trex_B." not in name]
    assert len(B) == 14 and all(one.ndim == 2 and one.shape[1] == 3 for one in B)
    optimizer = torch.optim.AdamW([{"params": others}, {"params": B, "lr": 0.016}], lr=0.001)
    model.train()
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    before = [one.detach().clone() for one in B]
    with pytest.warns(UserWarning, match="whole row"):
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    # Adam's first step is the rate, whatever the gradient.
    moved = torch.cat([(one - old).abs().flatten() for one, old in zip(B, before, strict=True)])
    assert 0.01 < moved.median() < 0.02


@pytest.mark.slow
def test_a_helper_that_was_imported_before_the_package_refuses_too():
    code = (
        "from peft.optimizers import create_loraplus_optimizer as first, create_lorafa_optimizer as second\n"
        "from conftest import adapted\n"
        "import torch\n"
        "plus = lambda model: first(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)\n"
        "for call in (plus, lambda model: second(model, 8, 8, 1e-3)):\n"
        "    try: call(adapted())\n"
        "    except ValueError as error: print('refused', 'is for LoRA' in str(error))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=TESTS)
    assert result.stdout.split() == ["refused", "True"] * 2, result.stderr
