"""Time of a training step, and of decoding one token, with T-REX against LoRA r = 32 on the same model.

    python benchmarks/step.py [--width 576] [--layers 6] [--rounds 9]

A Llama-type model with random weights, all linear layers adapted. The variants take turns (A B A B), since a machine's
speed changes while it runs; printed are the medians of each round's ratio to LoRA. A run starts with a check that the
adapter equals the readable formula, and prints no speed if it does not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_trex import TRexConfig, TRexLayer, initialize_trex_prior, rank_one_mixture

VOCABULARY = 4096


def make_model(config: Any, width: int, layers: int) -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
        )
    )
    return get_peft_model(base, config)


def check(model: Any) -> None:
    """The adapter's layer equals the formula on its own tensors, with the prior of the prompt."""
    layer = next(module for module in model.modules() if isinstance(module, TRexLayer))
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    handle = layer.register_forward_hook(
        lambda layer, args, output: seen.append((args[0], layer._channel.scores("default", args[0]), output))
    )
    with torch.no_grad():
        layer.trex_B["default"].normal_()
        layer.trex_router["default"].normal_()
        model.eval()(input_ids=torch.randint(VOCABULARY, (2, 33)))
        x, scores, output = seen[0]
        tensors = [getattr(layer, f"trex_{name}")["default"] for name in ("A", "B", "router")]
        logits = [layer.trex_omega["default"], layer.trex_gate["default"]]
        expected = layer.base_layer(x) + rank_one_mixture(x, *tensors, scores, *logits, token_scale=32.0)
    handle.remove()
    torch.testing.assert_close(output, expected)


def seconds(function: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    configs = {
        "LoRA r=32": LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        "T-REX 4x8": TRexConfig(task_type="CAUSAL_LM"),
    }
    models = {
        name: make_model(config, arguments.width, arguments.layers).to(device) for name, config in configs.items()
    }
    prompts = [{"input_ids": torch.randint(VOCABULARY, (64, 16), device=device)} for _ in range(4)]
    initialize_trex_prior(models["T-REX 4x8"], prompts, progress=False)
    if device == "cpu":
        check(models["T-REX 4x8"])
    ids = torch.randint(VOCABULARY, (arguments.rows, arguments.length), device=device)
    labels = ids.masked_fill(torch.arange(arguments.length, device=device) < 32, -100)

    def train(model: Any) -> None:
        model.train()
        model(input_ids=ids, labels=labels).loss.backward()
        model.zero_grad()

    def decode(model: Any) -> None:
        model.eval()
        model.generate(input_ids=ids[:1, :16], max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)

    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, width {arguments.width}")
    for title, job in (("training step", train), ("decoding", decode)):
        times: dict[str, list[float]] = {name: [] for name in models}
        for round_number in range(arguments.rounds + 1):
            for name, model in models.items():
                took = seconds(lambda job=job, model=model: job(model))
                if round_number:  # the first round warms up
                    times[name].append(took)
        lora = times["LoRA r=32"]
        for name in list(models)[1:]:
            ratios = sorted(mine / theirs for mine, theirs in zip(times[name], lora, strict=True))
            low, high = ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]
            print(f"{title}: {name} {statistics.median(ratios):.2f} x LoRA r=32 (20/80 %: {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
