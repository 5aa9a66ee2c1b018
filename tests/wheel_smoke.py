"""What a user does first, with the installed wheel and nothing else: `make package` runs it."""

from __future__ import annotations

import tempfile
from importlib.metadata import requires, version
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peft_trex
from peft_trex import TRexConfig, initialize_trex_prior

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def main() -> None:
    package = Path(peft_trex.__file__).parent
    assert "site-packages" in package.parts, f"{package} is not what was installed"
    assert (package / "py.typed").is_file()
    assert version("peft-trex") == peft_trex.__version__
    assert any(need.startswith("torch>=") for need in requires("peft-trex") or ())

    ids = torch.randint(3, 64, (32, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9) < 5, -100)
    model = get_peft_model(make_base(), TRexConfig(r_a=2, r_b=3, num_clusters=4, task_type="CAUSAL_LM"))
    report: peft_trex.TRexPriorReport = initialize_trex_prior(model, [{"input_ids": ids, "labels": labels}])
    assert report.prompts == 32
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(make_base(), folder)
    tokens = [each.eval().generate(input_ids=ids[:2], max_new_tokens=4, do_sample=False) for each in (model, loaded)]
    assert torch.equal(*tokens)
    print(f"peft-trex {peft_trex.__version__} from {package}: trained, saved, loaded, generated")


if __name__ == "__main__":
    main()
