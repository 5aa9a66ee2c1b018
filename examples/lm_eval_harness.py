"""Evaluate a T-REX adapter with lm-evaluation-harness, each continuation by the prior of its own context.

    pip install lm_eval[hf]==0.4.13
    python examples/lm_eval_harness.py [--adapter FOLDER] [--model NAME_OR_FOLDER] [--tasks NAME ...] [--limit N]

Without --tasks these are the held-out prompts of `make demo`, as multiple choice and as exact answers, which need no
hub. The harness scores a continuation in one forward, together with its context, and says nowhere where the context
ends. Its own HFLM therefore lets the prior see the continuation too, with a warning; `TRexLM` tells the model.
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, DatasetDict
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from small_model import DEVICE, Rows, load_model
from tasks import generate
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from peft_trex import steer_trex


class Row(NamedTuple):
    """What one row of a batch holds: its tokens, and how many of them are the prompt; the others are predicted."""

    tokens: tuple[int, ...]
    prompt: int


class TRexLM(HFLM):
    """HFLM for causal language models with a T-REX adapter: the prior of a row is that of its context alone.

    So a log-likelihood is what `generate` would give the same tokens after the same context, whatever continuation or
    batch they stand in. `generate_until` and encoder-decoder models need nothing, since there the prompt is apart.
    """

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is the greedy one) of each continuation, given as (text, context, tokens)."""
        if self.backend != "causal":
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        # Continuations of one context that differ in their last token only share a row.
        shared: dict[Row, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            shared[self._row(*request)].append(place)
        # The longest come first, so that rows of a batch are alike and a batch that is too large fails at once.
        rows = sorted(shared, key=lambda row: -len(row.tokens))
        size: Any = override_bs or self.batch_size
        if size == "auto":
            size = self._detect_batch_size([requests[shared[row][0]] for row in rows])
        answers: dict[int, tuple[float, bool]] = {}
        for start in tqdm(range(0, len(rows), size), disable=disable_tqdm or self.rank != 0):
            batch = rows[start : start + size]
            for row, logits in zip(batch, self._logits(batch), strict=True):
                for place in shared[row]:
                    text, _, continuation = requests[place]
                    target = torch.tensor(continuation, device=logits.device)
                    scores = logits[len(row.tokens) - len(target) : len(row.tokens)]
                    scores = scores.log_softmax(-1, dtype=self.softmax_dtype)
                    total = scores.gather(1, target[:, None]).sum()
                    answers[place] = total.item(), torch.equal(scores.argmax(-1), target)
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, answers[place])
        return [answers[place] for place in range(len(requests))]

    def _row(self, text: Any, context: list[int], continuation: list[int]) -> Row:
        """The row of a request. The last token is only predicted, so the model need not read it."""
        if not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"A continuation has {len(continuation)} tokens; expected from 1 to max_length={self.max_length}."
            )
        tokens = tuple(context + continuation[:-1])
        if len(tokens) > self.max_length:
            warnings.warn(
                f"A context and its continuation are longer than max_length={self.max_length}. The context loses its "
                "first tokens, and its prior is that of what is left.",
                stacklevel=2,
            )
            tokens = tokens[-self.max_length :]
        # A window of a rolling log-likelihood has no text, and what it repeats of the window before is no prompt.
        return Row(tokens, 1 if text is None else len(tokens) - len(continuation) + 1)

    def _logits(self, rows: list[Row]) -> Tensor:
        """Logits (B, T, V) of rows, padded on the right."""
        ids = [torch.tensor(row.tokens) for row in rows]
        masks = [torch.ones_like(tokens) for tokens in ids]
        predicted = [(torch.arange(len(row.tokens)) >= row.prompt).long() for row in rows]
        return self._model_call(*(pad_sequence(values, batch_first=True) for values in (ids, masks, predicted)))

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits (B, T, V). For a causal model, `labels` is one where tokens are predicted."""
        if self.backend != "causal":
            return super()._model_call(inps, attn_mask, labels)
        given = {"input_ids": inps, "attention_mask": attn_mask, "completion_mask": labels}
        given = {name: value.to(self.device) for name, value in given.items() if value is not None}
        half = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=half, enabled=half is not None):
            return self.model(
                **{name: value.to(self.device) for name, value in given.items() if value is not None}
            ).logits

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, of which every token is predicted.

        Such a text has no prompt but the token that the harness puts before it, and has the prior that `generate`
        computes from that token alone. The later windows of a long text keep this prior, since they go on with it.
        """
        with self._steered({"input_ids": torch.tensor([[self.prefix_token_id]])}):
            return super().loglikelihood_rolling(requests, disable_tqdm)

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        # The harness tries batches of made-up tokens, which are no prompt.
        with self._steered(0):
            return super()._detect_batch_size(requests, pos)

    def _steered(self, semantic_prior: Any) -> AbstractContextManager[None]:
        """A block with this prior, where there is a prior at all."""
        has_prior = self.backend == "causal" and self.model.active_peft_config.use_prior
        return steer_trex(self.model, semantic_prior) if has_prior else nullcontext()


def demo_tasks(rows: Rows, chat: bool, seed: int = 0) -> list[dict[str, Any]]:
    """Two tasks for the harness: choose the answer among those of other prompts of its task, and write it.

    Prompts are written by the chat template, or plain as examples/small_model.py writes them.
    """
    rng = random.Random(seed)
    examples = []
    for row in rows:
        others = {other["answer"] for other in rows if other["task"] == row["task"]} - {row["answer"]}
        choices = [*rng.sample(sorted(others), min(3, len(others))), row["answer"]]
        rng.shuffle(choices)
        examples.append({**row, "choices": choices, "label": choices.index(row["answer"])})
    data = DatasetDict(test=Dataset.from_list(examples))
    common = {
        "custom_dataset": lambda **_: data,
        "test_split": "test",
        "doc_to_text": "{{prompt}}" if chat else "{{prompt}} =",
        "target_delimiter": "" if chat else " ",
    }
    choice = {"task": "demo_choice", "output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]}
    answer = {"task": "demo_answer", "output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
    until = {"until": ["\n"], "max_gen_toks": 14, "do_sample": False}
    return [
        {**common, **choice, "doc_to_choice": "choices", "doc_to_target": "label"},
        {**common, **answer, "doc_to_target": "answer" if chat else " {{answer}}", "generation_kwargs": until},
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=Path("runs/quickstart/adapter"), help="folder of an adapter")
    parser.add_argument("--model", help="name or folder of a causal language model (default: SmolLM2-135M-Instruct)")
    parser.add_argument(
        "--tasks", nargs="+", help="tasks of the harness, most of which need a hub (default: the demo's)"
    )
    parser.add_argument("--limit", type=int, help="prompts of each task (default: all)")
    parser.add_argument("--batch-size", default="8", help='a number, or "auto"')
    args = parser.parse_args(argv)
    base, tokenizer = load_model(args.model)
    model = PeftModel.from_pretrained(base.to(DEVICE), args.adapter).eval()
    chat = tokenizer.chat_template is not None
    if args.tasks is None:
        # `make demo` trains on plain prompts, `make demo ARGS=--full` on chats, and then finds their markers.
        chat = chat and bool(model.peft_config["default"].chat_markers)
    lm = TRexLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size, device=DEVICE)
    results = simple_evaluate(
        lm,
        tasks=args.tasks or demo_tasks(generate()[1], chat),
        limit=args.limit,
        apply_chat_template=chat,
        bootstrap_iters=0,
    )
    for task, metrics in sorted(results["results"].items()):
        for name, value in metrics.items():
            if isinstance(value, float):
                print(f"{task:<20}{name:<28}{value:.3f}")


if __name__ == "__main__":
    main()
