"""The tiny base model of the micro tier, pre-trained once (some ten minutes on a core) and kept under `.cache`."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from quality import micro_tasks
from quality.micro_tasks import FILLERS, LENGTH, MAPS, ORDERS, SYMBOLS
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAME = "micro"  # what an experiment's `base` calls it
FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "micro"
PAD, END, ASK = "<pad>", "</s>", "Answer:"  # the last is what `Texts` puts between prompt and answer
WORDS = [PAD, END, ASK, *SYMBOLS, *ORDERS, *MAPS, *FILLERS]
WANTED = 0.99  # exact answers, of an order that tasks are made of
WEIGHTS, KNOWN = "model.safetensors", "known.json"


@dataclass(frozen=True)
class Recipe:
    """How the model is pre-trained. The rate rises for a twentieth of the steps, and falls as a cosine.

    Where an order is not known after these steps, as many follow again, with the orders that are missing in half of
    the rows, for at most `rounds` rounds: which order comes late depends on how a processor rounds.
    """

    steps: int = 3000
    rounds: int = 4
    rows: int = 128
    learning_rate: float = 3e-3
    seed: int = 0

    @property
    def folder(self) -> Path:
        """Where the model is kept that this recipe makes in this language."""
        maps = [micro_tasks.value_map(name) for name in MAPS]
        words = json.dumps([asdict(self), WORDS, ORDERS, maps])
        return FOLDER / hashlib.sha256(words.encode()).hexdigest()[:8]


RECIPE = Recipe()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word; a word that the language lacks is an error."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=END, padding_side="left")


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=WORDS.index(PAD),
        bos_token_id=None,
        eos_token_id=WORDS.index(END),
    )
    return LlamaForCausalLM(config)


class Language:
    """Rows of the base model's language as token ids, drawn many at a time."""

    def __init__(self) -> None:
        self.orders = torch.tensor(list(ORDERS.values()))
        self.maps = torch.tensor([micro_tasks.value_map(name) for name in MAPS])
        self.first = {key: WORDS.index(words[0]) for key, words in (("order", list(ORDERS)), ("map", MAPS))}

    def draw(self, rows: int, generator: torch.Generator, among: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Prompts and what asks for the answer (rows, 11), answers with their end (rows, 7), in some or all orders."""

        def numbers(most: int, *shape: int) -> Tensor:
            return torch.randint(most, (rows, *shape), generator=generator)

        orders = torch.tensor(among or range(len(ORDERS)))
        orders = orders[numbers(len(orders))]
        maps, symbols = numbers(len(MAPS)), numbers(len(SYMBOLS), LENGTH)
        told = torch.stack((orders + self.first["order"], maps + self.first["map"]), 1)
        words = torch.cat((told, numbers(len(FILLERS), 2) + WORDS.index(FILLERS[0])), 1)
        words = words.gather(1, torch.rand(words.shape, generator=generator).argsort(1))
        images = self.maps[maps].gather(1, symbols.gather(1, self.orders[orders]))
        ask, end = (torch.full((rows, 1), WORDS.index(word)) for word in (ASK, END))
        symbol = WORDS.index(SYMBOLS[0])
        return torch.cat((words, symbols + symbol, ask), 1), torch.cat((images + symbol, end), 1)


def _logits(model: LlamaForCausalLM, prompts: Tensor, answers: Tensor) -> Tensor:
    """Logits (rows, 7, V) of the answers' tokens."""
    ids = torch.cat((prompts, answers[:, :-1]), 1)
    return model(input_ids=ids, use_cache=False).logits[:, prompts.shape[1] - 1 :]


@torch.no_grad()
def exact(model: LlamaForCausalLM, rows: int = 512) -> dict[str, float]:
    """The share of whole answers that are right, by order."""
    model.eval()
    language, generator = Language(), torch.Generator().manual_seed(1)
    found = {}
    for number, order in enumerate(ORDERS):
        prompts, answers = language.draw(rows, generator, [number])
        right = (_logits(model, prompts, answers).argmax(-1) == answers).all(1)
        found[order] = float(right.float().mean())
    return found


def pretrain(recipe: Recipe = RECIPE) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """A model, and the share of whole answers that it gives right, by order."""
    torch.manual_seed(recipe.seed)
    model, generator = make_model(), torch.Generator().manual_seed(recipe.seed)
    missing: list[int] = []
    for _ in range(recipe.rounds):
        _round(model, recipe, generator, missing)
        known = exact(model)
        print(f"{NAME}: exact answers by order: {known}", file=sys.stderr)
        missing = [number for number, order in enumerate(ORDERS) if known[order] < WANTED]
        if not missing:
            break
    return model, known


def _round(model: LlamaForCausalLM, recipe: Recipe, generator: torch.Generator, missing: Sequence[int]) -> None:
    model.train()
    language, start = Language(), time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, (0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps + 1, pct_start=0.05
    )
    extra = recipe.rows // 2 if missing else 0
    for step in range(1, recipe.steps + 1):
        parts = [language.draw(recipe.rows - extra, generator)]
        if extra:
            parts.append(language.draw(extra, generator, missing))
        prompts, answers = map(torch.cat, zip(*parts, strict=True))
        loss = F.cross_entropy(_logits(model, prompts, answers).flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            took = time.perf_counter() - start
            print(f"{NAME}: pre-training, step {step} of {recipe.steps}, loss {loss:.4f}, {took:.0f} s", flush=True)


def make(recipe: Recipe = RECIPE) -> Path:
    """The folder of the model, which is pre-trained if it is not there yet; one process does so, others wait."""
    recipe.folder.parent.mkdir(parents=True, exist_ok=True)
    with recipe.folder.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not recipe.folder.exists():
            unfinished = recipe.folder.with_suffix(".part")
            shutil.rmtree(unfinished, ignore_errors=True)
            model, known = pretrain(recipe)
            model.save_pretrained(unfinished)
            make_tokenizer().save_pretrained(unfinished)
            (unfinished / KNOWN).write_text(json.dumps(known))
            unfinished.rename(recipe.folder)  # all at once, so that an interruption leaves nothing half-made
    return recipe.folder


def label(recipe: Recipe = RECIPE) -> str:
    """The model's name in a row, with a digest of its weights: processors round differently, and so train others."""
    weights = recipe.folder / WEIGHTS
    if not weights.exists():
        return f"{NAME}, not made yet"
    return f"{NAME} {hashlib.sha256(weights.read_bytes()).hexdigest()[:8]}"


def check(orders: Iterable[str] | None, recipe: Recipe = RECIPE) -> None:
    """Refuse a base model that has not learnt the orders (None for all) that tasks are made of.

    Raises:
        ValueError: naming the orders.
    """
    known = json.loads((recipe.folder / KNOWN).read_text())
    poor = {order: known[order] for order in (ORDERS if orders is None else orders) if known[order] < WANTED}
    if poor:
        raise ValueError(
            f"The base model in {recipe.folder} gives too few right answers in the orders {poor}; {WANTED} are "
            "wanted. Leave these out by naming the others in `data: orders`, or change the recipe."
        )
