"""What each static form of a T-REX adapter costs, on the tasks of the demo: accuracy, and KL from the routed adapter.

    python benchmarks/studies/merge.py [--adapter runs/quickstart/adapter] [--test 40] [--calibrate 320] [--distill 0]

Takes the adapter that `make demo` trained. Compared are the routed adapter; the base model with the adapter merged by
its mean routing, by the best core, and by the best input fit; and the LoRA of each cluster, or of each of some groups
of prompts, exported, and served by PEFT itself in mixed batches. The test prompts are the demo's, and others like them
that it was not trained on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import DataCollatorForSeq2Seq

from peft_trex import SemanticRouter, calibrate_trex_merge, save_trex_as_lora

# Where this file runs as a script, Python knows no other folder than this one.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from small_model import answer_logits, encode, load_model, print_table, right_answers, shares
from tasks import generate


class Served:
    """The exported adapters in stock PEFT, each row of a batch with the one that the router names."""

    def __init__(self, base: Any, folder: Path) -> None:
        self.router = SemanticRouter.from_pretrained(folder)
        names = iter(self.router.adapters.items())
        name, path = next(names)
        self.model = PeftModel.from_pretrained(base, path, adapter_name=name)
        for name, path in names:
            self.model.load_adapter(path, adapter_name=name)
        self.device = self.model.device

    def eval(self) -> Any:
        return self.model.eval()

    def __call__(
        self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> Any:
        prompt = (labels == -100) & (attention_mask != 0 if attention_mask is not None else True)
        names = self.router.adapter_names([row[kept].tolist() for row, kept in zip(input_ids, prompt, strict=True)])
        return self.model(input_ids=input_ids, attention_mask=attention_mask, adapter_names=names)


def mean_kl(reference: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Mean KL(reference || other) of the next token, in nats, over all answer tokens."""
    p, q = torch.cat(reference).log_softmax(-1), torch.cat(other).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=Path("runs/quickstart/adapter"))
    parser.add_argument("--model", help="the base model (default: the demo's)")
    parser.add_argument("--test", type=int, default=40, help="test prompts of each task")
    parser.add_argument("--probe", type=int, default=64, help="test prompts to measure the KL on")
    parser.add_argument("--calibrate", type=int, default=320, help="training rows to calibrate on")
    parser.add_argument("--distill", type=int, default=0, help="distill_steps of the calibrations")
    parser.add_argument(
        "--forms",
        nargs="+",
        default=["mean", "core", "input", "clusters", "32 groups"],
        help='which to measure; "N groups" has a LoRA for each of N groups of prompts',
    )
    arguments = parser.parse_args()
    train, test = generate()
    known = {row["prompt"] for row in (*train, *test)}
    _, drawn = generate(test=arguments.test, seed=1)
    test += [row for row in drawn if row["prompt"] not in known]
    probe = test[: arguments.probe]
    base, tokenizer = load_model(arguments.model)
    model = PeftModel.from_pretrained(base, arguments.adapter).eval()
    if not model.peft_config["default"].chat_markers:
        tokenizer.chat_template = None  # `make demo` trains on plain prompts, and with --full on chats
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    rows = train[: arguments.calibrate]
    data = [collate([encode(tokenizer, row) for row in rows[start : start + 16]]) for start in range(0, len(rows), 16)]
    print(f"{len(test)} test prompts, KL on {len(probe)}; calibration on {len(rows)} training rows")
    routed = answer_logits(model, tokenizer, probe)
    answered: dict[str, list[bool]] = {}
    found: dict[str, dict[str, float]] = {}
    kl: dict[str, float] = {}

    def measure(form: str, deployed: Any) -> None:
        hits = answered[form] = right_answers(deployed, tokenizer, test, form)
        found[form] = {**shares(test, hits), "prompts": sum(hits) / len(hits)}
        kl[form] = mean_kl(routed, answer_logits(deployed, tokenizer, probe))
        changes = Counter(zip(answered["routed"], hits, strict=True))
        lost, won = changes[True, False], changes[False, True]
        print(f"{form}: {sum(hits)} of {len(hits)} right, {lost} lost and {won} won, KL {kl[form]:.4f}", flush=True)

    measure("routed", model)

    for form in arguments.forms:
        if form == "mean":
            model.base_model.forget_static("default")  # the demo saves its adapter calibrated
        else:
            start = time.perf_counter()
            fit = "input" if form == "input" else "core"
            per_cluster = int(form.split()[0]) if form.endswith("groups") else form == "clusters"
            report = calibrate_trex_merge(
                model, data, fit=fit, per_cluster=per_cluster, distill_steps=arguments.distill
            )
            print(f"{form}: {report}; {time.perf_counter() - start:.0f} s")
        if form.endswith(("clusters", "groups")):
            with tempfile.TemporaryDirectory() as folder:
                save_trex_as_lora(model, Path(folder) / "lora", save_embedding_layers=False)
                measure(form, Served(load_model(arguments.model)[0], Path(folder) / "lora"))
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the mean routing is approximate is what is measured
            model.merge_adapter()
        measure(form, model)
        model.unmerge_adapter()
    print()
    print_table(found)
    width = 2 + max(map(len, next(iter(found.values()))))
    print(f"{'KL':<{width}}" + "".join(f"{value:>12.4f}" for value in kl.values()))


if __name__ == "__main__":
    main()
