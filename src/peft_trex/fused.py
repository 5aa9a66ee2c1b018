"""Experts that a module holds in three-dimensional parameters, as most of transformers' models do since release 5.

Such a block turns its input (N, D) into (N, D), each token by the experts that a router has chosen for it. One of
several kernels computes that, as the user chooses, so T-REX adapts the block as a whole.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import warnings
from collections.abc import Collection
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .quantized import scheme_of

# Before transformers 5 put the linear layers of all experts into one parameter, they had these names.
FORMER_NAMES = {"gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"), "down_proj": ("w2",)}
DOWN, UPS = "down_proj", ("gate_up_proj", "gate_proj", "up_proj")
NO_BLOCK = (
    "its forward does not take tokens, the experts of each, and their weights, so that it cannot be told which token "
    "a part of its output belongs to"
)


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, also where DeepSpeed's ZeRO-3 shards it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _fused_parameters(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's own three-dimensional parameters, by their names."""
    shapes = {name: shape_of(parameter) for name, parameter in module._parameters.items() if parameter is not None}
    return {name: shape for name, shape in shapes.items() if len(shape) == 3}


def width_of(module: nn.Module) -> int | None:
    """D of a block of experts, whose input and output are as wide; None for any other module.

    A block holds the experts' matrices in three-dimensional parameters, and its forward takes hidden states, the
    experts of each token, and their weights.
    """
    shapes = _fused_parameters(module)
    ups = [set(shapes[name][1:]) for name in UPS if name in shapes]
    # The module itself is the first of four arguments.
    if DOWN not in shapes or not ups or len(inspect.signature(type(module).forward).parameters) < 4:
        return None
    _, rows, columns = shapes[DOWN]
    widths = {rows, columns}.intersection(*ups)
    # Without a gate both matrices have the same axes, and only their order tells the outer one.
    if len(widths) == 2:
        return columns if getattr(module, "is_transposed", False) else rows
    return widths.pop() if widths else None


def _place_of(path: str) -> str:
    """The path of a module as it was before adapters were put around it."""
    return path.replace(".base_layer", "")


def named_blocks(config: Any, model: nn.Module) -> set[str]:
    """The paths of the blocks of experts that `target_parameters` names, by any of their parameters as LoRA does.

    Raises:
        ValueError: if a name fits no parameter, or one of another module.
    """
    wanted = config.target_parameters or ()
    unmatched = dict.fromkeys([wanted] if isinstance(wanted, str) else wanted)
    names, blocks = tuple(unmatched), set()
    for path, module in model.named_modules() if names else ():
        place = _place_of(path)
        for parameter, value in module.named_parameters(recurse=False):
            fitting = [name for name in names if f".{place}.{parameter}".endswith(f".{name}")]
            if not fitting:
                continue
            if width_of(module) is None:
                shape = shape_of(value)
                advice = f"T-REX cannot adapt this module, since {NO_BLOCK}. Take the name out."
                if len(shape) != 3:
                    advice = f"no block of experts. Write {_last(place)!r} in target_modules for a linear layer."
                raise ValueError(
                    f"target_parameters names {fitting[0]!r}, which in {place} is the parameter {parameter} of shape "
                    f"{shape}, of a {type(module).__name__}: {advice}"
                )
            blocks.add(place)
            for name in fitting:
                unmatched.pop(name, None)
    if unmatched:
        here = sorted({_place_of(path) for path, module in model.named_modules() if width_of(module) is not None})
        raise ValueError(
            f"target_parameters names {', '.join(map(repr, unmatched))}, and no module of the model has such a "
            f"parameter. The blocks of experts in it are: {', '.join(here) or 'none'}. Experts that are linear layers "
            "are named in target_modules."
        )
    return blocks


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def add_targets(config: Any, blocks: Collection[str], model: nn.Module) -> None:
    """Have a configuration, whose other targets are settled, target these blocks as modules."""
    config.target_parameters = None
    if not blocks:
        return
    names, lasts = set(blocks), set(map(_last, blocks))
    called = {_place_of(path) for path, _ in model.named_modules() if _last(path) in lasts}
    # The last part of a name stands for all blocks with it. PEFT picks no layers from names in full.
    if called <= names or config.layers_to_transform is not None:
        names = lasts
    if isinstance(config.target_modules, str):
        # PEFT takes a string for a pattern of the whole name.
        anywhere = [rf"(.*\.)?{re.escape(name)}" for name in sorted(names)]
        config.target_modules = "|".join([config.target_modules, *anywhere])
    else:
        config.target_modules = {*config.target_modules, *names}


def check_fused(config: Any, model: nn.Module, all_linear: bool, blocks: Collection[str]) -> None:
    """Refuse targets that mean experts by a parameter's name, and warn where experts are left out.

    Args:
        config: the configuration, with targets that PEFT can match, or all linear layers.
        model: the base model.
        all_linear: whether it is all linear layers.
        blocks: the blocks that are adapted besides.
    """
    anything = copy.copy(config)
    anything.target_modules = ".*"
    left_out: dict[str, int] = {}
    adaptable = set()
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)) or scheme_of(module) is not None:
            continue
        path, is_block, shapes = _place_of(path), width_of(module) is not None, _fused_parameters(module)
        if path in blocks or (is_block and not all_linear and check_target_module_exists(config, path)):
            continue
        # Modules that are excluded or trained in full are no targets.
        for name, shape in shapes.items() if shapes and check_target_module_exists(anything, path) else ():
            targets = [] if all_linear else _targets_of_expert(config, path, name)
            for target in targets:
                # PEFT shortens long lists, so a name that fits linear layers too may mean these alone.
                if isinstance(config.target_modules, str) or not _names_a_layer(target, model):
                    raise ValueError(_refusal(target, path, (name, shape), is_block))
            if targets or (all_linear and "expert" in f"{path}.{type(module).__name__}".lower()):
                left_out[path] = left_out.get(path, 0) + math.prod(shape)
                adaptable |= {f"{_last(path)}.{DOWN}"} if is_block else set()
    if left_out and not config.inference_mode:
        total = sum(math.prod(shape_of(parameter)) for parameter in model.parameters())
        names = [*list(left_out)[:2], "..."][: len(left_out)]
        advice = f" target_parameters={sorted(adaptable)} adapts each block of them as a whole." if adaptable else ""
        warnings.warn(
            f"The experts in {', '.join(names)} are not adapted: these are no linear layers, and hold "
            f"{100 * sum(left_out.values()) / total:.0f} % of the model's weights in three-dimensional parameters."
            + advice,
            stacklevel=2,
        )


def _refusal(target: str, path: str, parameter: tuple[str, tuple[int, ...]], is_block: bool) -> str:
    """What is said of a target that means experts."""
    name, shape = parameter
    reason = f"T-REX cannot adapt its module, since {NO_BLOCK}. Take"
    if is_block:
        instead = f"target_parameters={[f'{_last(path)}.{name}']}"
        reason = f"it is no module. Write {instead}, which adapts the block of experts as a whole, or take"
    return (
        f"target_modules names {target!r}, which in {path} is the parameter {name} of shape {shape}: {reason} the "
        "name out of target_modules, or, if it is to match linear layers elsewhere, add "
        f"exclude_modules={[_last(path)]}."
    )


def _targets_of_expert(config: Any, path: str, name: str) -> list[str]:
    """The targets that mean a parameter of experts, by its name or its module's, or by a former name."""
    keys = [path, f"{path}.{name}", *(f"{path}.0.{former}" for former in FORMER_NAMES.get(name, ()))]
    keys = [key for key in keys if check_target_module_exists(config, key)]
    if isinstance(config.target_modules, str):
        return [config.target_modules] if keys else []
    return sorted(target for target in config.target_modules if any(f".{key}".endswith(f".{target}") for key in keys))


def _names_a_layer(target: str, model: nn.Module) -> bool:
    """Whether a target fits the name of a linear layer."""
    modules = [module for path, module in model.named_modules() if f".{path}".endswith(f".{target}")]
    # Quantised layers of any library have this attribute.
    return any(isinstance(module, (Conv1D, BaseTunerLayer)) or hasattr(module, "in_features") for module in modules)
