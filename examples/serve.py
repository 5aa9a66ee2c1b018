"""Serve an exported T-REX behind one model's name, "trex": vLLM chooses each request's adapter; stock PEFT beside it.

    python examples/serve.py [--vllm PYTHON] [--export FOLDER] [--model NAME_OR_FOLDER] [--data FILE.jsonl]

The folder is what `peft_trex.save_trex_as_lora(model, folder)` writes: plain LoRA adapters, one overall and one for
each cluster of prompts, and the router that picks one by the prompt. Starts vLLM's server with all of them and
`peft_trex.serve_router.TRexMiddleware`, sends prompts to the model "trex" and, as examples/serve_client.py does, to
adapters by name, compares the greedy tokens with those of stock PEFT in one mixed batch, and measures all of it.
PYTHON is the interpreter of an environment with vLLM and `pip install --no-deps peft-trex`; `make serve` sets one up
for CPUs. Works offline.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from serve_client import complete_all, encode, load_router
from serve_endpoint import MODEL, check_endpoint, overhead
from tasks import generate, load
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = "base"  # the name under which the server offers the base model itself
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes; smaller adapters are padded
NEAR_TIE = 1e-3  # logits this close are told apart by the order of float32 sums alone

Tokens = list[int]
Variants = dict[str, list[str]]


def save_base(folder: Path) -> None:
    """Write the model of examples/quickstart.py as a folder of safetensors, which vLLM can read."""
    from small_model import load_model

    model, tokenizer = load_model(None)
    part = folder.with_name(folder.name + ".part")  # a folder that was left half written is never taken for whole
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def check_export(router: Any) -> int:
    """The largest rank among the adapters' configurations; refuses a folder that lacks one of them."""
    ranks = []
    for name, folder in router.adapters.items():
        for file in (folder / "adapter_config.json", folder / "adapter_model.safetensors"):
            if not file.is_file():
                raise SystemExit(f"{file} is missing, which router.json lists as a part of adapter {name!r}.")
        config = json.loads((folder / "adapter_config.json").read_text())
        ranks.append(max([config["r"], *config.get("rank_pattern", {}).values()]))
    return max(ranks)


class StockPeft:
    """The exported adapters on the base model, by nothing but PEFT."""

    def __init__(self, model: str, adapters: dict[str, Path], pad_token_id: int) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        base.generation_config.eos_token_id = None  # all rows run to the end, as the server's do
        (first, folder), *others = adapters.items()
        self.model = PeftModel.from_pretrained(base, folder, adapter_name=first)
        for name, folder in others:
            self.model.load_adapter(folder, adapter_name=name)
        self.model.eval()
        self.pad_token_id = pad_token_id

    def batch(self, prompts: Sequence[Tokens]) -> dict[str, torch.Tensor]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[self.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return {"input_ids": ids, "attention_mask": mask}

    @torch.no_grad()
    def complete_all(self, names: list[str], prompts: list[Tokens], max_tokens: int) -> list[Tokens]:
        inputs = self.batch(prompts)
        options = {"max_new_tokens": max_tokens, "do_sample": False, "pad_token_id": self.pad_token_id}
        if set(names) == {BASE}:
            with self.model.disable_adapter():
                new = self.model.generate(**inputs, **options)
        elif len(set(names)) == 1:
            self.model.set_adapter(names[0])
            new = self.model.generate(**inputs, **options)
        else:
            names = ["__base__" if name == BASE else name for name in names]
            new = self.model.generate(**inputs, **options, adapter_names=names)
        return new[:, inputs["input_ids"].shape[1] :].tolist()

    @torch.no_grad()
    def margin(self, name: str, tokens: Tokens, first: int, second: int) -> float:
        """By how much the logit of `first` exceeds that of `second` after `tokens`."""
        names = ["__base__" if name == BASE else name]
        logits = self.model(input_ids=torch.tensor([tokens]), adapter_names=names).logits[0, -1]
        return (logits[first] - logits[second]).item()


def tail(log: Path, lines: int = 30) -> str:
    return f"The end of {log}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def wait_until_ready(process: subprocess.Popen, server: str, log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"The server ended with code {process.returncode} before it was ready. {tail(log)}")
        connection = HTTPConnection(server, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except (OSError, HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(1)
    raise SystemExit(f"The server was not ready after {seconds:.0f} seconds. {tail(log)}")


def stop(process: subprocess.Popen) -> None:
    """End the server and the processes that it started: they are in a group of their own."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(10)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also after a second Ctrl-C, and for an engine that outlived its server
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def free_address() -> str:
    """HOST:PORT where nobody listens yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@contextmanager
def running(command: list[str], server: str, log: Path, seconds: float, settings: dict[str, str]) -> Iterator[None]:
    """Start a server with these variables set besides, and stop it: the block begins when it is ready."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **settings},
            start_new_session=True,
        )
    try:
        wait_until_ready(process, server, log, seconds)
        yield
    except (OSError, HTTPException) as error:
        raise SystemExit(f"The server failed: {error!r}. {tail(log)}") from error
    finally:
        stop(process)


@contextmanager
def vllm_server(arguments: argparse.Namespace, model: str, adapters: dict[str, Path], rank: int) -> Iterator[str]:
    """A vLLM server on a free port, with the base model and all adapters; yields its HOST:PORT and stops it."""
    log, server = arguments.out / "vllm.log", free_address()
    # Prefixes are not cached, because the same prompts are sent again and again to be timed.
    command = [str(arguments.vllm), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model, "--served-model-name", BASE]
    command += ["--host", "127.0.0.1", "--port", server.split(":")[1], "--dtype", "float32", "--enforce-eager"]
    command += ["--no-enable-prefix-caching", "--enable-lora", "--max-lora-rank", str(rank)]
    # One place more than there are adapters: among requests to adapters, vLLM's code for CPUs treats one to the base
    # model with what lies in the last place, which therefore must stay empty.
    command += ["--max-loras", str(len(adapters) + 1), "--max-cpu-loras", str(len(adapters) + 1)]
    # serve_endpoint.py asks /render which tokens the server itself makes of a request.
    command += ["--middleware", "peft_trex.serve_router.TRexMiddleware", "--enable-scale-out"]
    settings = {"TREX_FOLDER": str(arguments.export), "TREX_MODEL": MODEL, "TREX_TOKENIZER": model}
    if arguments.resolver:
        settings |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_PLUGINS": "lora_filesystem_resolver"}
        settings["VLLM_LORA_RESOLVER_CACHE_DIR"] = str(arguments.export)
    else:
        command += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    shown = [f"{name}={value}" for name, value in settings.items()] + command
    print(f"$ {shlex.join(shown[: 1 - len(adapters)] if not arguments.resolver else shown)} (log: {log})", flush=True)
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ, **settings}
    with running(command, server, log, arguments.timeout, settings):
        yield server


def until_end(tokens: Tokens, ends: set[int]) -> Tokens:
    """The tokens up to the first end of text, with it."""
    return next((tokens[: index + 1] for index, token in enumerate(tokens) if token in ends), tokens)


def differing(
    peft: StockPeft,
    names: list[str],
    prompts: list[Tokens],
    expected: list[Tokens],
    found: list[Tokens],
    ends: set[int],
) -> int:
    """How many rows differ from those of stock PEFT; shows them, and refuses any that is no near tie."""
    count = 0
    for name, prompt, ours, theirs in zip(names, prompts, expected, found, strict=True):
        ours, theirs = until_end(ours, ends), until_end(theirs, ends)
        if ours == theirs:
            continue
        count += 1
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if at is None:
            raise SystemExit(f"{name}: the server gave {len(theirs)} tokens where PEFT gave {len(ours)}.")
        margin = peft.margin(name, prompt + ours[:at], ours[at], theirs[at])
        print(f"  {name}: token {at} is {theirs[at]} on the server, {ours[at]} with PEFT; logits {margin:.1e} apart")
        if abs(margin) > NEAR_TIE:
            raise SystemExit("The server's tokens are not those of stock PEFT, and no near tie explains it.")
    return count


def in_turns(
    run: Callable[[list[str]], list[Tokens]], variants: Variants, repeats: int
) -> tuple[dict[str, list[Tokens]], dict[str, float]]:
    """What each variant gave, and its median seconds, where all were run so many times in turns (once for 0)."""
    found: dict[str, list[Tokens]] = {}
    times: dict[str, list[float]] = {title: [] for title in variants}
    for _ in range(max(1, repeats)):
        for title, names in variants.items():
            start = time.perf_counter()
            found[title] = run(names)
            times[title].append(time.perf_counter() - start)
    return found, {title: statistics.median(taken) for title, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--vllm", type=Path, default=Path(".venv-vllm/bin/python"), help="Python of an environment with vLLM"
    )
    parser.add_argument("--export", type=Path, default=Path("runs/quickstart/lora"), help="exported folder")
    parser.add_argument("--model", help="name or folder of the base model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", type=Path, help="JSONL of task, prompt and answer (default: generated)")
    parser.add_argument("--prompts", type=int, default=32, help="how many prompts to send at once")
    parser.add_argument("--max-tokens", type=int, default=16, help="new tokens of each prompt")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each variant; 0 for none")
    parser.add_argument("--timeout", type=float, default=900, help="seconds to wait for the server to get ready")
    parser.add_argument(
        "--resolver",
        action="store_true",
        help="let vLLM find the adapters by itself; the export names --model as base",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/serve"), help="folder for base model and server's log")
    parser.add_argument("--save-base", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    base = arguments.out / "base"
    if arguments.save_base:
        save_base(base)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then, too
    if not arguments.vllm.is_file():
        raise SystemExit(
            f"There is no Python {arguments.vllm}; expected that of an environment with vLLM. `make serve` makes one "
            "for CPUs, in .venv-vllm; --vllm takes another."
        )
    if not (arguments.export / "router.json").is_file():
        raise SystemExit(
            f"{arguments.export} holds no router.json: expected an exported adapter with one LoRA for each cluster. "
            "`make demo` writes one to runs/quickstart/lora; your own: peft_trex.save_trex_as_lora(model, folder)."
        )
    router = load_router(arguments.export)
    rank = check_export(router)
    if rank > VLLM_RANKS[-1]:
        raise SystemExit(f"The adapters have rank {rank}; vLLM takes up to {VLLM_RANKS[-1]}.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.model is None and not base.is_dir():  # in a process of its own, since it imports peft_trex
        print(f"saving the base model to {base}", flush=True)
        again = [sys.executable, __file__, "--save-base", "--out", str(arguments.out)]
        subprocess.run(again, check=True)
    model = arguments.model or str(base)

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = load(arguments.data)[1] if arguments.data else generate()[1]  # held out in the demo
    prompts = [encode(tokenizer, row["prompt"], router) for row in rows[: arguments.prompts]]
    try:
        routed = router.adapter_names(prompts)
    except ValueError as error:  # a router for another vocabulary, or for embeddings of one's own
        raise SystemExit(f"The router of {arguments.export} cannot route the prompts: {error}") from error
    variants = {
        "base model": [BASE] * len(prompts),
        f"one adapter, {router.default}": [router.default] * len(prompts),
        f"{len(set(routed))} adapters, by name": routed,
    }
    endpoint = f"{len(set(routed))} adapters, by {MODEL!r}"
    mixed = {
        "base model and adapters": [name if index % 2 else BASE for index, name in enumerate(routed)],
    }
    print(f"{len(router.adapters)} adapters; {len(prompts)} prompts are routed to {len(set(routed))} of them")

    # PEFT first, so that an idle server takes nothing from it
    peft = StockPeft(model, router.adapters, tokenizer.eos_token_id)

    def ask_peft(names: list[str]) -> list[Tokens]:
        return peft.complete_all(names, prompts, arguments.max_tokens)

    expected, peft_seconds = in_turns(ask_peft, variants, arguments.repeats)
    expected |= {title: ask_peft(names) for title, names in mixed.items()}
    expected[endpoint] = expected[f"{len(set(routed))} adapters, by name"]
    assert "peft_trex" not in sys.modules  # stock PEFT did all of this alone

    start = time.monotonic()
    slots = next(size for size in VLLM_RANKS if size >= rank)
    with vllm_server(arguments, model, router.adapters, slots) as server:
        print(f"ready after {time.monotonic() - start:.0f} seconds")

        def send(names: list[str]) -> list[Tokens]:
            return complete_all(server, names, prompts, arguments.max_tokens, ignore_eos=True)

        found, vllm_seconds = in_turns(send, {**variants, endpoint: [MODEL] * len(prompts)}, arguments.repeats)
        found |= {title: send(names) for title, names in mixed.items()}
        for title, names in {**variants, **mixed, endpoint: routed}.items():
            count = differing(peft, names, prompts, expected[title], found[title], {tokenizer.eos_token_id})
            print(
                f"{title}: greedy tokens of {len(prompts) - count} of {len(prompts)} prompts are those of stock PEFT"
            )
        check_endpoint(server, router, [row["prompt"] for row in rows])
    print("server stopped")
    overhead(arguments.export, model)
    if arguments.repeats:
        many = f"{len(prompts)} requests at once, {arguments.max_tokens} new tokens each"
        print(f"\ntokens per second, and times the base model's ({many}; medians of {arguments.repeats}, in turns)")
        print(f"{'':<28}{'vLLM':>8}{'':>8}{'PEFT':>8}")
        for title in vllm_seconds:
            print(f"{title:<28}", end="")
            for taken in (vllm_seconds, peft_seconds):
                if title in taken:
                    speed = len(prompts) * arguments.max_tokens / taken[title]
                    print(f"{speed:>8.1f}{taken['base model'] / taken[title]:>8.2f}", end="")
            print()


if __name__ == "__main__":
    main()
