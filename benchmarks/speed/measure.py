"""How things are measured: time, peak memory, launches, and the environment that a row was measured in."""

from __future__ import annotations

import datetime
import functools
import gc
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

import peft_trex

COUNTED = "counted run"


@dataclass
class Job:
    """One variant at work.

    Attributes:
        run: what is timed.
        prepare: brings everything back to where it was before; not timed.
        model: whose parameters are counted.
        optimizer: whose state is resident as well.
        settings: the variant's settings in words.
        part: seconds of the last run that went into what is looked for (the prior's case).
    """

    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    model: torch.nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    settings: str = ""
    part: Callable[[], float] | None = None


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(job: Job, device: str, repeats: int = 1) -> tuple[float, float]:
    """Mean time of a run, and of the part that is looked for, over some repeats."""
    total = part = 0.0
    for _ in range(repeats):
        job.prepare()
        wait(device)
        start = time.perf_counter()
        job.run()
        wait(device)
        total += time.perf_counter() - start
        part += job.part() if job.part else 0.0
    return total / repeats, part / repeats


@dataclass(frozen=True)
class Samples:
    times: list[float]
    parts: list[float]
    repeats: int


def interleave(
    jobs: Mapping[str, Job], device: str, rounds: int, at_least: float = 0.0, warm_ups: int = 1
) -> dict[str, Samples]:
    """Time the jobs in turns: each once in every round, in an order that changes from round to round.

    Args:
        jobs: by name.
        device: "cpu" or "cuda".
        rounds: that count.
        at_least: seconds that a sample should take; short runs are repeated for it.
        warm_ups: rounds before, which do not count.
    """
    names, order = list(jobs), random.Random(0)
    repeats = dict.fromkeys(names, 1)
    found: dict[str, Samples] = {}
    gc.disable()  # a collection takes longer than many a run
    try:
        for round_number in range(-warm_ups, rounds):
            gc.collect(0)
            order.shuffle(names)
            for name in names:
                if round_number == -1 and at_least:
                    seconds(jobs[name], device)  # the very first run loads and allocates, and tells nothing of others
                    repeats[name] = max(1, min(200, round(at_least / seconds(jobs[name], device)[0])))
                took, part = seconds(jobs[name], device, repeats[name])
                if round_number >= 0:
                    samples = found.setdefault(name, Samples([], [], repeats[name]))
                    samples.times.append(took)
                    samples.parts.append(part)
    finally:
        gc.enable()
    return {name: found[name] for name in jobs}


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(values)
    middle, cut = len(ordered) // 2, len(ordered) // 5
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return median, ordered[cut], ordered[-1 - cut]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler writes to stderr each time it starts and stops, past Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_memory(job: Job, device: str) -> int:
    """Most bytes that were live at once during one run, above what was there before it.

    On a GPU by its allocator's own count. On a CPU by the profiler's record of every block that torch's allocator gave
    out and took back, in their order: tensors, and what operators take from that allocator for a while. What libraries
    (oneDNN, NumPy) allocate by themselves is not in it. A run before, of which nothing counts, is recorded as well,
    so that blocks are known which the counted run frees.
    """
    job.prepare()
    wait(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job.run()
        wait(device)
        return torch.cuda.max_memory_allocated() - before
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        job.run()
        job.prepare()
        with record_function(COUNTED):
            job.run()
    events = profiler.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == COUNTED)
    blocks = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    blocks.sort(key=lambda block: block[0])  # and where times are equal, as they were recorded
    before = sum(size for when, size in blocks if when < start)
    live = peak = before
    for when, size in blocks:
        if when >= start:
            live += size
            peak = max(peak, live)
    return peak - before


def resident_memory(job: Job) -> int | None:
    """Bytes of the model's parameters and buffers and of the optimizer's state: what stays between two runs."""
    if job.model is None:
        return None
    tensors = [*job.model.parameters(), *job.model.buffers()]
    if job.optimizer is not None:
        states = job.optimizer.state.values()
        tensors += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def launches(job: Job, device: str) -> int:
    """Operators that one run calls (CPU: aten operators, views among them), or kernels that it launches (GPU)."""
    job.prepare()
    if device == "cpu":
        with _Operators() as operators:
            job.run()
        return operators.count
    with _quiet(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        job.run()
        wait(device)
    on_device = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


def trainable(job: Job) -> int | None:
    if job.model is None:
        return None
    return sum(parameter.numel() for parameter in job.model.parameters() if parameter.requires_grad)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


@functools.cache
def _constant(device: str) -> dict[str, Any]:
    changed = _git("status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results")
    return {
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "peft_trex": peft_trex.__version__,
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": None if changed is None else bool(changed),  # the results themselves do not count
    }


def environment(device: str) -> dict[str, Any]:
    """Where and with what a row is measured."""
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **_constant(device),
    }
