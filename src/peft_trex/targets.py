"""The modules that an adapter goes into, where PEFT's own matching takes the wrong ones or says nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TaskType
from torch import nn
from transformers.pytorch_utils import Conv1D

from .fused import add_targets, check_fused, named_blocks, width_of
from .quantized import scheme_of
from .unsuited import CONVOLUTIONS, Reason, unsuited_layers

# PEFT adds these heads to modules_to_save only after it has looked for linear layers.
HEADS = {TaskType.TOKEN_CLS: ("classifier", "score"), TaskType.QUESTION_ANS: ("qa_outputs",)}
# A pattern with at most one of these signs, and of at most this length, takes few steps on the name of a module.
CHOICES, SHORT = re.compile(r"[*+?{(]"), 1000
# Nothing within a process can stop a search of Python's. The limits are seconds of a processor, and of a clock.
SECONDS, WAIT = 5, 60
TRIAL = """
import json, re, sys
patterns, names, seconds = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
except ImportError:
    pass
for method, pattern in patterns:
    search = getattr(re.compile(pattern), method)
    for name in names:
        search(name)
"""
# Modules that have no place for an adapter, and why.
REFUSED = {
    nn.Embedding: (
        "its input are ids, not vectors, so that a token router would have a column for each of the vocabulary, and "
        "the prior reads the token embedding as it was. Leave it out with exclude_modules; modules_to_save trains it "
        "in full"
    ),
    nn.MultiheadAttention: (
        "its forward hands the weights of all its projections to one function, so that what depends on the input has "
        "no place between them. Leave it out with exclude_modules, or give the model an attention that calls "
        "linear layers"
    ),
}


def check_patterns(config: Any, model: nn.Module) -> None:
    """Try the regular expressions in a configuration on the names of a model's modules, as PEFT will match them."""

    def listed(value: Any) -> list[str]:
        return [value] if isinstance(value, str) else list(value or ())

    whole = [text for text in (config.target_modules, config.exclude_modules) if isinstance(text, str)]
    patterns = [
        *size_patterns(config),
        *((text, "fullmatch", text) for text in whole),
        *((text, "match", rf"(^|.*\.){text}($|\..*)") for text in listed(config.modules_to_save)),
        *((text, "match", rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.") for text in listed(config.layers_pattern)),
    ]
    try_patterns(patterns, [path for path, _ in model.named_modules()])


def size_patterns(config: Any) -> list[tuple[str, str, str]]:
    """The patterns of a configuration that give layers sizes of their own, as [`try_patterns`] takes them."""
    return [(key, "match", rf"(.*\.)?({key})$") for key in (*config.r_a_pattern, *config.r_b_pattern)]


def try_patterns(patterns: Iterable[tuple[str, str, str]], names: list[str]) -> None:
    """Raise a ValueError if matching names against regular expressions fails, or would take very long.

    They come with adapters from elsewhere, and one of twenty characters can keep Python busy for years. Those with
    several choices are tried in a process of their own.

    Args:
        patterns: what a configuration says, and the method of `re` and the pattern that PEFT makes of it.
        names: the names of modules.
    """
    tried = [each for each in patterns if len(each[0]) > SHORT or len(CHOICES.findall(each[0])) > 1]
    if not tried:
        return
    work = json.dumps([[each[1:] for each in tried], names, SECONDS])
    try:
        # A frozen program would start itself.
        if getattr(sys, "frozen", False):
            raise OSError("there is no Python to try it in")
        command = [sys.executable, "-I", "-S", "-c", TRIAL]
        run = subprocess.run(command, input=work, text=True, capture_output=True, timeout=WAIT)
        problem = (
            (run.stderr.strip().splitlines() or [f"it takes more than {SECONDS} s"])[-1] if run.returncode else ""
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        texts = ", ".join(repr(each[0][:200]) for each in tried)
        raise ValueError(
            f"The regular expressions {texts} of the adapter's configuration cannot be matched against the names of "
            f"modules: {problem}. Write simpler ones, or the names as a list."
        )


def settle_targets(config: Any, model: nn.Module) -> Any:
    """Write into a configuration what its targets and exclude_modules mean in this model, and return it.

    Blocks of experts that `target_parameters` names become targets among the modules.

    Raises:
        ValueError: if a target is a parameter of experts, or a linear layer that an adapter cannot be put into, or
            `target_parameters` names what is none of a block of experts.
    """
    if config.target_modules is None:
        config.target_modules = "all-linear"
    all_linear = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    unsuited, blocks = unsuited_layers(model), named_blocks(config, model)
    if all_linear:
        _leave_out(config, model, unsuited)
    else:
        _check_suited(config, unsuited)
    check_fused(config, model, all_linear, blocks)
    if all_linear:
        _maybe_include_all_linear_layers(config, model)
        config.target_modules |= _quantised_layers(model)
        if config.layers_to_transform is not None:
            # PEFT picks no layers from names in full, so the last part of each name stands for it.
            config.target_modules = {name.rpartition(".")[2] for name in config.target_modules}
    add_targets(config, blocks, model)
    return config


def _leave_out(config: Any, model: nn.Module, unsuited: Iterable[str]) -> None:
    """Exclude linear layers that must not be adapted."""
    # PEFT trains the heads in full.
    names = {name for name in HEADS.get(config.task_type, ()) if hasattr(model, name)}
    # No convolution is a linear layer, and all-linear takes none.
    unsuited = [path for path in unsuited if not isinstance(model.get_submodule(path), CONVOLUTIONS)]
    # The last part of a name stands for all layers with it, where all of them are unsuited.
    kinds = (nn.Linear, Conv1D, BaseTunerLayer)
    linear = [path for path, module in model.named_modules() if isinstance(module, kinds)]
    suited = {path.rpartition(".")[2] for path in linear if path not in set(unsuited)}
    lasts = {path: path.rpartition(".")[2] for path in unsuited}
    names |= {path if last in suited else last for path, last in lasts.items()}
    if names and isinstance(config.exclude_modules, str):
        # PEFT takes a string for a pattern of the whole name.
        anywhere = [rf"(.*\.)?{re.escape(name)}" for name in sorted(names)]
        config.exclude_modules = "|".join([config.exclude_modules, *anywhere])
    elif names:
        config.exclude_modules = {*(config.exclude_modules or ()), *names}


def _check_suited(config: Any, unsuited: Mapping[str, Reason]) -> None:
    """Refuse layers that are named as targets and cannot be adapted; an adapter that is only used warns.

    A layer that some roads of the code call can be named, as with LoRA. Where the first training step takes another
    road, a warning says so.
    """
    targets = [path for path in unsuited if unsuited[path].always and check_target_module_exists(config, path)]
    if not targets:
        return
    names = ", ".join([*targets[:2], "..."][: len(targets)])
    lasts = sorted({path.rpartition(".")[2] for path in targets})
    message = f"T-REX cannot adapt the target module {names}: {unsuited[targets[0]].text}."
    if not config.inference_mode:
        raise ValueError(f"{message} Take it out of target_modules, or leave it out with exclude_modules={lasts}.")
    warnings.warn(f"{message} Its adapter may have no effect here, or another one than in training.", stacklevel=2)


def _quantised_layers(model: nn.Module) -> set[str]:
    """The quantised layers of other classes than `nn.Linear`, which alone PEFT looks for; the head is none of them."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    modules = dict(model.named_modules())
    adapted = tuple(f"{path}." for path, module in modules.items() if isinstance(module, BaseTunerLayer))
    others = {path: module for path, module in modules.items() if module is not head and not path.startswith(adapted)}
    return {path for path, module in others.items() if not isinstance(module, nn.Linear) and scheme_of(module)}


def check_target(target: nn.Module, path: str) -> None:
    """Raise a ValueError if a module is none that T-REX can adapt."""
    layer: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    for kind, reason in REFUSED.items():
        if isinstance(layer, kind):
            raise ValueError(
                f"The target module {path} is a {type(layer).__name__}, which T-REX does not adapt: {reason}."
            )
    if isinstance(layer, CONVOLUTIONS):
        _check_convolution(layer, path)
        return
    if width_of(layer) is not None:
        return
    plain = isinstance(layer, (nn.Linear, Conv1D)) and layer.weight.is_floating_point()
    if not plain and scheme_of(layer) is None:
        raise ValueError(
            f"The target module {path} is a {type(layer).__name__}; T-REX adapts torch.nn.Linear, Conv1d, Conv2d "
            "and Conv3d and transformers' Conv1D with floating-point weights, quantised linear layers that PEFT "
            "knows, and blocks of experts in three-dimensional parameters. Name such layers in target_modules, or "
            "leave this one out with exclude_modules."
        )


def _check_convolution(layer: Any, path: str) -> None:
    """Raise a ValueError if a convolution is none that T-REX can adapt."""
    own = any(
        getattr(type(layer), name, None) not in [getattr(kind, name) for kind in CONVOLUTIONS]
        for name in ("forward", "_conv_forward")
    )
    weight = layer._parameters.get("weight")
    obstacle = ""
    if weight is None or not weight.is_floating_point() or scheme_of(layer) is not None:
        obstacle = "computes its weight from others (weight_norm, for instance), or has it quantised"
    elif own:
        obstacle = "has a forward of its own, of which nobody can tell how it uses the kernel"
    elif layer.groups != 1:
        obstacle = f"has groups={layer.groups}, which would need experts for each group"
    if obstacle:
        raise ValueError(
            f"The target module {path} is a {type(layer).__name__} that {obstacle}; leave it out with exclude_modules."
        )


def check_pattern(config: Any, layers: Collection[str]) -> None:
    """Raise a ValueError if `expert_pattern` names layers that the adapter is not in; warn of sizes for none."""
    # Pruning may have taken away all layers that a key is for.
    for key, method, pattern in [] if config.inference_mode else size_patterns(config):
        if not any(getattr(re, method)(pattern, layer) for layer in layers):
            warnings.warn(f"No adapted layer has a name that the key {key!r} of a size pattern fits.", stacklevel=2)
    if unknown := set(config.expert_pattern) - set(layers):
        raise ValueError(
            f"expert_pattern names {len(unknown)} modules that the adapter is not in, such as {min(unknown)!r}; it "
            f"takes names in full, as {min(layers)!r}."
        )


def check_untied(model: nn.Module, layers: Mapping[str, BaseTunerLayer]) -> None:
    """Raise a ValueError if another module of the model uses the weight of one of these layers as well."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(path)
    for path, layer in layers.items():
        paths = owners.get(id(layer.get_base_layer()._parameters.get("weight")), [])
        others = [other for other in paths if not other.startswith(f"{path}.")]
        if others:
            raise ValueError(
                f"The weight of {path} is tied to that of {', '.join(others)}: a merge would change both, and nothing "
                "was merged. Leave the module out with exclude_modules, untie the two before the adapter is made (a "
                "copy of the weight, and tie_word_embeddings=False in the model's configuration), or do not merge."
            )
