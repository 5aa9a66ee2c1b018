"""Teach a small language model tasks that contradict each other, with T-REX and with LoRA, and use the T-REX adapter.

    python examples/quickstart.py [--full] [--model NAME_OR_FOLDER] [--data FILE.jsonl] [--steps N] [--out FOLDER]

Fits the semantic prior, trains both with transformers' Trainer on the same rows in the same order, compares their
answers task by task, draws what the routers do, saves the adapter and loads it in a fresh process, exports it as plain
LoRA, and lets the exported router choose among these by a prompt's content. Works offline.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_model import (
    DEVICE,
    Rows,
    answer_logits,
    batches_by_task,
    encode,
    first_of_each,
    load_model,
    print_table,
    prompt_ids,
    right_answers,
    shares,
)
from tasks import TASKS, generate
from tasks import load as load_rows
from tqdm import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    logging,
    set_seed,
)

from peft_trex import (
    SemanticRouter,
    TRexConfig,
    calibrate_trex_merge,
    initialize_trex_prior,
    routing_report,
    save_trex_as_lora,
)

STEPS, ROWS = 45, 12  # of a training, and of each step
LORA = 32  # the rank of the LoRA beside T-REX, of 3.7 times its parameters


class Steps:
    """Says how long each step took, and the whole process since its first line, imports included.

    The processors' time is that of all cores together. Where it is less than the time by the clock, others had them.
    """

    @contextmanager
    def __call__(self, title: str) -> Iterator[None]:
        print(f"\n{title}", flush=True)
        start, used = time.monotonic(), self._used()
        yield
        took = time.monotonic() - start
        print(f"[{title}: {took:.0f} s by the clock, {self._used() - used:.0f} s of processors]", flush=True)

    def __str__(self) -> str:
        minutes = (time.time() - psutil.Process().create_time()) / 60
        return f"{minutes:.1f} minutes by the clock, {self._used() / 60:.1f} of processors"

    @staticmethod
    def _used() -> float:
        """Seconds of processors' time of this process and those it has started."""
        return sum(os.times()[:4])


class Watch(TrainerCallback):
    """Shows a training's progress and its loss, and keeps the losses."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.title)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
        # The last entry of a training has figures of the whole instead.
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.bar.set_postfix_str(f"loss {logs['loss']:.2f}", refresh=False)
            self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """The base model and its tokenizer, without its chat template where prompts are to be plain."""
    base, tokenizer = load_model(options.model)
    if not options.chat:
        tokenizer.chat_template = None
    return base.to(DEVICE), tokenizer


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


def train(
    model: Any, tokenizer: Any, data: Dataset, rate: float, options: argparse.Namespace, title: str
) -> list[float]:
    """Train an adapter in place; returns the loss of each step."""
    watch = Watch(title)
    trainer = Trainer(
        model=model,
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[watch],
        args=TrainingArguments(
            output_dir=str(Path(options.out) / "trainer"),
            max_steps=options.steps,
            per_device_train_batch_size=ROWS,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, options.steps // 20),
            bf16=(DEVICE == "cuda" or bf16_is_fast()) if options.bf16 is None else options.bf16,
            use_cpu=DEVICE == "cpu",
            logging_steps=1,
            disable_tqdm=True,  # the watch has a bar of its own
            save_strategy="no",
            report_to=[],
            seed=options.seed,
            data_seed=options.seed,  # so both methods get the same rows in the same order
        ),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    # without the autocast that the trainer leaves on, as a fresh process will run it
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return watch.losses


def show_answers(model: Any, tokenizer: Any, rows: Rows) -> None:
    """What the model writes to some prompts."""
    prompts = [{"input_ids": prompt_ids(tokenizer, row["prompt"])} for row in rows]
    inputs = tokenizer.pad(prompts, return_tensors="pt").to(model.device)
    new = model.eval().generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(new[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for row, text in zip(rows, texts, strict=True):
        print(f"  {row['prompt']} -> {text.strip()}" + (text.strip() != row["answer"]) * f" (wanted: {row['answer']})")


def in_fresh_process(options: argparse.Namespace) -> None:
    """What other programs do: load the adapter, and the exported LoRA, on one base model that is read once.

    The adapter's outputs must be those of before, bit by bit. The exported router then chooses a LoRA for each prompt,
    and stock PEFT answers with it.
    """
    import peft_trex  # noqa: F401 - registers the method

    out = Path(options.out)
    base, tokenizer = load(options)
    model = PeftModel.from_pretrained(base.to(DEVICE), out / "adapter").eval()
    rows = json.loads((out / "test.json").read_text())
    expected, probe = load_file(out / "probe.safetensors"), first_of_each(rows, 1)
    for index, found in enumerate(answer_logits(model, tokenizer, probe)):
        if not torch.equal(found, expected[str(index)]):
            worst = (found - expected[str(index)]).abs().max()
            raise SystemExit(f"The reloaded adapter differs, by up to {worst:.2e}, on: {probe[index]['prompt']}")
    print(f"fresh process: outputs for {len(expected)} prompts are bitwise equal to those before saving")

    base = model.unload()
    router = SemanticRouter.from_pretrained(out / "lora")
    tokens = [prompt_ids(tokenizer, row["prompt"]) for row in rows]
    routed: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(router.adapter_names(tokens)):
        routed[name].append(index)
    hits = [False] * len(rows)
    for name in tqdm(sorted(routed), desc="served by stock PEFT"):
        served = PeftModel.from_pretrained(base, router.adapters[name])
        part = [rows[index] for index in routed[name]]
        for index, hit in zip(routed[name], right_answers(served, tokenizer, part), strict=True):
            hits[index] = hit
        base = served.unload()
    print(f"the exported router sent {len(rows)} prompts to {len(routed)} of {len(router.adapters)} LoRA")
    (out / "served.json").write_text(json.dumps(shares(rows, hits)))


def losses_by_part(losses: list[float], parts: int = 4) -> dict[str, float]:
    """Mean losses over so many parts of a training, by their steps."""
    cuts = [len(losses) * part // parts for part in range(parts + 1)]
    return {
        f"steps {first + 1} to {last}": sum(losses[first:last]) / (last - first)
        for first, last in pairwise(cuts)
        if last > first
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--full",
        action="store_true",
        help="the long form: four times the steps, in the model's chat template; merging",
    )
    parser.add_argument("--chat", action="store_true", help="write prompts by the model's chat template, not plain")
    parser.add_argument("--model", help="name or folder of a causal language model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", type=Path, help="JSONL of task, prompt and answer (default: generated)")
    parser.add_argument(
        "--steps", type=int, help=f"training steps of {ROWS} rows (default: {STEPS}; --full: {4 * STEPS})"
    )
    parser.add_argument("--test", type=int, default=12, help="held-out prompts of each generated task")
    # Each is the best of three in benchmarks/results/quality/conflict-brief.jsonl.
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of T-REX (default: 0.003)")
    parser.add_argument("--lora-rate", type=float, default=1e-3, help="of LoRA (default: 0.001)")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="train in bfloat16 autocast (default: where it is fast)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/quickstart", help="folder for the adapter and the picture")
    parser.add_argument("--reload", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.chat = options.chat or options.full
    options.steps = options.steps or STEPS * (4 if options.full else 1)
    return options


def main() -> None:
    options = parse()
    logging.set_verbosity_error()
    # PEFT asks transformers by a name that is going to change, which is no concern of who runs this.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    if options.reload:
        in_fresh_process(options)
        return
    step = Steps()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    set_seed(options.seed)
    with step("loading"):
        if options.data:
            train_rows, test = load_rows(options.data)
        else:
            # Each row is seen once, unless the training is very long.
            count = min(1000, max(8, options.steps * ROWS // len(TASKS)))
            train_rows, test = generate(count, options.test, options.seed)
        base, tokenizer = load(options)
        # A fresh process reads the weights in a second, where those of the package must be unpacked.
        if options.model is None:
            base.save_pretrained(out / "base")
            tokenizer.save_pretrained(out / "base")
        data = Dataset.from_list([encode(tokenizer, row) for row in train_rows])
    print(f"{len({row['task'] for row in test})} tasks, {len(train_rows)} training rows, {len(test)} held-out prompts")
    right, losses = {}, {}
    if options.full:
        with step("the base model alone"):
            right["base"] = shares(test, right_answers(base, tokenizer, test, "base model"))

    with step(f"LoRA r={LORA}"):
        model = get_peft_model(
            base, LoraConfig(r=LORA, lora_alpha=2 * LORA, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        model.print_trainable_parameters()
        losses["LoRA"] = train(model, tokenizer, data, options.lora_rate, options, "LoRA")
        right["LoRA"] = shares(test, right_answers(model, tokenizer, test, "held out"))
        base = model.unload()
    with step("T-REX: the prior"):
        # With a cluster for each task; 32 are the default, for data whose tasks nobody has counted.
        clusters = 32 if options.data else len(TASKS)
        config = TRexConfig.recommended(num_clusters=clusters, task_type="CAUSAL_LM")
        set_seed(options.seed)
        model = get_peft_model(base, config)
        model.print_trainable_parameters()
        loader = torch.utils.data.DataLoader(data, batch_size=32, collate_fn=DataCollatorForSeq2Seq(tokenizer))
        # The tokenizer tells where a user's message stands in a chat; the prior then is that of the message alone.
        prior = initialize_trex_prior(model, loader, seed=options.seed, tokenizer=tokenizer)
        sizes = prior.cluster_sizes
        print(
            f"{prior.prompts} prompts in {len(sizes)} clusters of {min(sizes)} to {max(sizes)}, explained variance "
            f"{prior.explained_variance:.2f}"
        )
    with step("T-REX: training"):
        losses["T-REX"] = train(model, tokenizer, data, options.learning_rate, options, "T-REX")
        right["T-REX"] = shares(test, right_answers(model, tokenizer, test, "held out"))
        show_answers(model, tokenizer, first_of_each(test, 1)[:16])

    with step("what the routers do"):
        routing = routing_report(model, list(batches_by_task(tokenizer, first_of_each(test, 4))), group_by="task")
        (out / "routing.md").write_text(routing.to_markdown())
        routing.plot(out / "routing.png")
        print(f"{routing}\nsee {out / 'routing.png'} and {out / 'routing.md'}")

    with step("saving and exporting"):
        print(calibrate_trex_merge(model, loader, fit="core", per_cluster=True, max_batches=10))
        (out / "test.json").write_text(json.dumps(test))
        probe = answer_logits(model, tokenizer, first_of_each(test, 1))
        save_file({str(index): logits for index, logits in enumerate(probe)}, out / "probe.safetensors")
        model.save_pretrained(out / "adapter", save_embedding_layers=False)  # the vocabulary is the base model's
        size = (out / "adapter" / "adapter_model.safetensors").stat().st_size
        shutil.rmtree(out / "lora", ignore_errors=True)  # of an earlier run; an export never writes over anything
        print(save_trex_as_lora(model, out / "lora", save_embedding_layers=False))
        print(f"saved {out / 'adapter'}, {size / 1e6:.1f} MB, and {out / 'lora'}")

    with step("a fresh process"):
        again = [sys.executable, __file__, "--reload", "--out", str(out)]
        again += ["--chat"] * options.chat + ["--model", options.model or str(out / "base")]
        subprocess.run(again, check=True)
        right["served"] = json.loads((out / "served.json").read_text())
    if options.full:
        with step("merging"):
            print(calibrate_trex_merge(model, loader))
            right["merged"] = shares(test, right_answers(model.merge_and_unload(), tokenizer, test, "merged"))

    print("\ntraining loss")
    print_table({name: losses_by_part(losses[name]) for name in losses})
    print("\nright answers to held-out prompts")
    print_table(right)
    print(f"\ndone in {step}")


if __name__ == "__main__":
    main()
