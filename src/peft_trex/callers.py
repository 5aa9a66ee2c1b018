"""Trainers that merge an adapter before each generation, so that another engine generates with it."""

from __future__ import annotations

import sys
from collections.abc import Collection

# The first part of the name of the modules that merge: GRPO and its kin, with vLLM.
TRAINERS = ("openrlhf", "trl", "verl")
BETWEEN = ("peft", "peft_trex", "contextlib", "functools")


def check_caller(uncalibrated: Collection[str]) -> None:
    """Refuse a trainer that merges adapters without calibrated static weights: it would not say that they differ.

    Raises:
        ValueError: naming the trainer's module and the adapters.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in BETWEEN:
        frame = frame.f_back
    caller = frame.f_globals.get("__name__", "")
    if caller.partition(".")[0] in TRAINERS:
        raise ValueError(
            f"{caller} merges the adapters {sorted(uncalibrated)} to generate with them, but a T-REX adapter depends "
            "on its input: the merged model would be another policy than the one that is trained. Generate with the "
            "model itself (in TRL: use_vllm=False), or call calibrate_trex_merge(model, dataloader) after each step, "
            "in a TrainerCallback's on_step_end: its static weights are then merged, until the adapter is trained "
            "again."
        )
