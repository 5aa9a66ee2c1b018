"""Which of a model's modules are adapted, where PEFT's own matching would take the wrong ones or say nothing."""

from __future__ import annotations

import copy
import math
import re
import warnings
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TaskType
from torch import nn
from transformers.pytorch_utils import Conv1D

from .quantized import scheme_of

# heads that PEFT adds to modules_to_save only after it has looked for linear layers
HEADS = {TaskType.TOKEN_CLS: ("classifier", "score"), TaskType.QUESTION_ANS: ("qa_outputs",)}
# what an expert's linear layers were called before transformers 5 put those of all experts into one parameter
FORMER_EXPERT_NAMES = {"gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"), "down_proj": ("w2",)}


def _is_all_linear(config: Any) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def leave_out(config: Any, model: nn.Module) -> None:
    """Exclude what "all-linear" would find, but must not be adapted."""
    if not _is_all_linear(config):
        return
    # PEFT trains these in full, but would find them among the linear layers too
    names = [name for name in HEADS.get(config.task_type, ()) if hasattr(model, name)]
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):  # it reads this layer's weight, and never calls the layer
            names.append(f"{path}.out_proj".removeprefix("."))
    if names and isinstance(config.exclude_modules, str):
        config.exclude_modules = "|".join([config.exclude_modules, *map(re.escape, names)])
    elif names:
        config.exclude_modules = {*(config.exclude_modules or ()), *names}


def name_by_kind(config: Any, model: nn.Module) -> None:
    """Name what "all-linear" means by the last part of each name: PEFT picks no layers from names in full."""
    if _is_all_linear(config):
        _maybe_include_all_linear_layers(config, model)
        config.target_modules = {name.rpartition(".")[2] for name in config.target_modules}


def check_fused_experts(config: Any, model: nn.Module) -> None:
    """Refuse targets that are experts held in one three-dimensional parameter, and warn where such are left out."""
    all_linear = _is_all_linear(config)
    anything = copy.copy(config)
    anything.target_modules = ".*"
    left_out: dict[str, int] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if len(shape) != 3 or isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)) or scheme_of(module) is not None:
                continue
            if not check_target_module_exists(anything, path):  # excluded, or trained in full
                continue
            named = [] if all_linear else _names_of_expert(config, path, name)
            for target in named:
                # PEFT shortens long lists, so a name that fits linear layers too may mean these alone
                if isinstance(config.target_modules, str) or not _names_a_layer(target, model):
                    raise ValueError(
                        f"target_modules names {target!r}, which in {path} is the parameter {name} of shape {shape}: "
                        "T-REX adapts linear layers, not experts that are held in one three-dimensional parameter. "
                        "Take the name out of target_modules, or, if it is to match linear layers elsewhere, add "
                        f"exclude_modules={[path.rpartition('.')[2]]}."
                    )
            if named or (all_linear and "expert" in f"{path}.{type(module).__name__}".lower()):
                left_out[path] = left_out.get(path, 0) + math.prod(shape)
    if left_out and not config.inference_mode:
        total = sum(math.prod(getattr(parameter, "ds_shape", parameter.shape)) for parameter in model.parameters())
        share = 100 * sum(left_out.values()) / total
        more = ", ..." if len(left_out) > 2 else ""
        warnings.warn(
            f"The experts in {', '.join([*left_out][:2])}{more} are not adapted: T-REX adapts linear layers, and "
            f"these hold {share:.0f} % of the model's weights in three-dimensional parameters.",
            stacklevel=2,
        )


def _names_of_expert(config: Any, path: str, name: str) -> list[str]:
    """The targets that mean a parameter of experts: by its own name, its module's, or one of earlier days."""
    keys = [path, f"{path}.{name}", *(f"{path}.0.{former}" for former in FORMER_EXPERT_NAMES.get(name, ()))]
    keys = [key for key in keys if check_target_module_exists(config, key)]
    if isinstance(config.target_modules, str):
        return [config.target_modules] if keys else []
    return sorted(target for target in config.target_modules if any(f".{key}".endswith(f".{target}") for key in keys))


def _names_a_layer(target: str, model: nn.Module) -> bool:
    for name, module in model.named_modules():
        linear = isinstance(module, (Conv1D, BaseTunerLayer)) or hasattr(module, "in_features")  # quantised, or not
        if linear and f".{name}".endswith(f".{target}"):
            return True
    return False


def check_untied(model: nn.Module, adapter_names: set[str]) -> None:
    """Raise a ValueError if merging these adapters would change a weight that another module uses as well."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(path)
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and any(name in getattr(layer, "trex_A", ()) for name in adapter_names):
            shared = owners.get(id(layer.get_base_layer()._parameters.get("weight")), [])
            if len(shared) > 1:
                others = [other for other in shared if not other.startswith(f"{path}.")]
                raise ValueError(
                    f"The weight of {path} is tied to that of {', '.join(others)}: merging an adapter into it would "
                    "change both, and nothing was merged. Leave the module out with exclude_modules, untie the two "
                    "before the adapter is made (a copy of the weight, and tie_word_embeddings=False in the model's "
                    "configuration), or serve the adapter as it is."
                )
