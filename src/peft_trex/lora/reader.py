"""LoRA adapters as they are found in folders or loaded models: their factors, checked and scaled."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

from ..loading import check_weights, read_config
from ..targets import try_patterns
from .lora_fit import Factors

Source = str | os.PathLike | PeftModel | tuple[PeftModel, str]
PREFIX = "base_model.model."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
# With these options of LoRA an adapter is more than scaling * B A on the base model as it is.
VARIANTS = (
    "use_dora use_qalora use_bdlora lora_bias bias modules_to_save layer_replication target_parameters "
    "trainable_token_indices alora_invocation_tokens arrow_config monteclora_config velora_config kasa_config"
).split()
# These starts of LoRA leave the base weights alone.
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")


class Lora(NamedTuple):
    """A LoRA adapter, with the scaled factors of each module, float64 on the CPU."""

    name: str
    config: LoraConfig
    factors: dict[str, Factors]


def read_lora(source: Source) -> Lora:
    """Read an adapter's factors from its folder, or from a loaded model; the errors are those of `trex_from_lora`."""
    scalings: dict[str, float] = {}
    if isinstance(source, (str, os.PathLike)):
        folder = Path(source)
        name, title = folder.name, f"The adapter in {folder}"
        config, tensors = _read_folder(folder, title)
    else:
        model, chosen = source if isinstance(source, tuple) else (source, None)
        if not isinstance(model, PeftModel):
            raise TypeError(
                f"An adapter is a {type(model).__name__}; expected a folder, PeftModel or (PeftModel, name)."
            )
        name = chosen or model.active_adapter
        title = f"The adapter {name!r}"
        if name not in model.peft_config:
            raise ValueError(f"There is no adapter {name!r} in the loaded model; it has {sorted(model.peft_config)}.")
        config = _check_plain(model.peft_config[name], title)
        tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        # The scaling of a loaded layer may have been changed since it was made.
        for path, layer in model.get_base_model().named_modules():
            if isinstance(layer, LoraLayer) and name in layer.scaling:
                scalings[path] = layer.scaling[name]
    others = [key for key in tensors if not key.endswith((DOWN, UP)) or not key.startswith(PREFIX)]
    if others:
        raise ValueError(
            f"{title} holds {len(others)} tensors that are no factors of linear layers, such as {others[0]}; they "
            "cannot become experts. Train the adapter without embeddings, biases and modules_to_save."
        )
    factors = {}
    patterns = list(config.alpha_pattern or {})
    try_patterns(
        [(text, "match", rf"(.*\.)?({text})$") for text in patterns], [key.removeprefix(PREFIX) for key in tensors]
    )
    for path in sorted({key.removeprefix(PREFIX)[: -len(DOWN)] for key in tensors}):
        down, up = (tensors.get(PREFIX + path + end) for end in (DOWN, UP))
        if down is None or up is None or down.dim() != 2 or up.dim() != 2 or len(down) != up.shape[1]:
            shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (down, up)]
            raise ValueError(f"{title} has the factors {shapes} for {path}; expected (r, D_in) and (D_out, r).")
        if not all(factor.is_floating_point() and factor.isfinite().all() for factor in (down, up)):
            raise ValueError(f"{title} has factors for {path} that are not finite, or no floating-point numbers.")
        alpha: Any = (config.alpha_pattern or {}).get(get_pattern_key(patterns, path), config.lora_alpha)
        if not (isinstance(alpha, (int, float)) and math.isfinite(alpha)):
            raise ValueError(f"{title} has lora_alpha={alpha!r} for {path}; expected a finite number.")
        scaling = alpha / (math.sqrt(len(down)) if config.use_rslora else len(down))
        factors[path] = Factors(up.cpu().double() * scalings.get(path, scaling), down.cpu().double())
    if not any(up.any() and down.any() for up, down in factors.values()):
        raise ValueError(f"{title} is zero, as before any training; there is nothing to begin with.")
    return Lora(str(name), config, factors)


def _read_folder(folder: Path, title: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} is no folder with an adapter: there is no {CONFIG_NAME}.")
    read_config(folder / CONFIG_NAME)
    config = _check_plain(PeftConfig.from_pretrained(str(folder)), title)
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{title} has no {SAFETENSORS_WEIGHTS_NAME}. Other files are not read, because pickles can run code: "
            "save it again with save_pretrained."
        )
    check_weights(str(folder))
    return config, load_file(folder / SAFETENSORS_WEIGHTS_NAME)


def _check_plain(config: Any, title: str) -> LoraConfig:
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{title} is a {config.peft_type} adapter; expected LoRA.")
    for name in VARIANTS:
        value = getattr(config, name, None)
        if value and value != "none":
            raise ValueError(f"{title} was made with {name}={value!r}, which T-REX cannot take over.")
    if config.init_lora_weights not in KEEPS_BASE:
        raise ValueError(
            f"{title} was made with init_lora_weights={config.init_lora_weights!r}, which changes the base weights. "
            "Convert it to a plain LoRA: save_pretrained with path_initial_model_for_weight_conversion."
        )
    return config


def factors_by_layer(model: nn.Module, loras: list[Lora]) -> dict[str, list[Factors]]:
    """Every adapter's factors for each module of the base model that is in any of them, of rank 0 if they are zero."""
    modules = dict(model.named_modules())
    layers: dict[str, list[Factors]] = {}
    for number, lora in enumerate(loras):
        for path, (up, down) in lora.factors.items():
            widths = (down.shape[1], len(up))
            in_base = _get_in_out_features(modules[path]) if path in modules else "no such module"
            if in_base != widths:
                raise ValueError(
                    f"The adapter {lora.name!r} has factors of the widths {widths} for {path}, where the base model "
                    f"has {in_base}: it belongs to another one."
                )
            layer = layers.setdefault(path, [Factors(up[:, :0], down[:0])] * len(loras))
            if up.any() and down.any():
                layer[number] = Factors(up, down)
    return layers
