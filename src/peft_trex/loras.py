"""LoRA adapters as they are found, in folders or loaded models: their factors, checked and scaled."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

from .hub import check_adapter_file

Source = str | os.PathLike | PeftModel | tuple[PeftModel, str]
PREFIX = "base_model.model."
FACTORS = (".lora_A.weight", ".lora_B.weight")
# LoRA's variants whose weight is not just scaling * B A on the base model as it is
VARIANTS = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "monteclora_config",
    "velora_config",
    "kasa_config",
    "use_bdlora",
)
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")  # starts of LoRA that leave the base weights alone


@dataclass
class Lora:
    """A LoRA adapter: for each module up (D_out, r), scaled, and down (r, D_in)."""

    name: str
    config: LoraConfig
    factors: dict[str, tuple[Tensor, Tensor]]


def read_lora(source: Source) -> Lora:
    """An adapter's factors, from its folder or a loaded model, of which nothing is kept."""
    scalings: dict[str, float] = {}
    if isinstance(source, (str, os.PathLike)):
        folder = Path(source)
        name, where = folder.name, f"The adapter in {folder}"
        if not (folder / "adapter_config.json").is_file():
            raise ValueError(f"{folder} is no folder with an adapter: there is no adapter_config.json.")
        config = PeftConfig.from_pretrained(str(folder))
        if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            raise ValueError(
                f"{where} has no {SAFETENSORS_WEIGHTS_NAME}. Other files are not read, because pickles can run code: "
                "save it again with save_pretrained."
            )
        check_adapter_file(str(folder))
        tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    else:
        loaded, given = source if isinstance(source, tuple) else (source, None)
        if not isinstance(loaded, PeftModel):
            raise TypeError(
                f"An adapter is a {type(loaded).__name__}; expected a folder, a PeftModel, or a pair of a PeftModel "
                "and an adapter's name."
            )
        name = given or loaded.active_adapter
        where = f"The adapter {name!r}"
        if name not in loaded.peft_config:
            raise ValueError(f"There is no adapter {name!r} in the loaded model; it has {sorted(loaded.peft_config)}.")
        config = loaded.peft_config[name]
        if isinstance(config, LoraConfig):
            tensors = get_peft_model_state_dict(loaded, adapter_name=name, save_embedding_layers=False)
            for path, layer in loaded.get_base_model().named_modules():
                if isinstance(layer, LoraLayer) and name in layer.scaling:
                    scalings[path] = layer.scaling[name]
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{where} is a {config.peft_type} adapter; expected LoRA.")
    _check_plain(config, where)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    others = [key for key in tensors if not key.endswith(FACTORS) or not key.startswith(PREFIX)]
    if others:
        raise ValueError(
            f"{where} holds {len(others)} tensors that are no factors of linear layers, such as {others[0]}; they "
            "cannot become experts. Train the adapter without embeddings, biases and modules_to_save."
        )
    for path in sorted({key.removeprefix(PREFIX)[: -len(FACTORS[0])] for key in tensors}):
        pair = [tensors.get(PREFIX + path + end) for end in FACTORS]
        if pair[0] is None or pair[1] is None or any(t is None or t.dim() != 2 for t in pair):
            shapes = [None if tensor is None else tuple(tensor.shape) for tensor in pair]
            raise ValueError(f"{where} has the factors {shapes} for {path}; expected (r, D_in) and (D_out, r).")
        down, up = pair[0].detach().double().cpu(), pair[1].detach().double().cpu()
        if down.shape[0] != up.shape[1] or not (down.isfinite().all() and up.isfinite().all()):
            raise ValueError(f"{where} has factors for {path} that do not fit each other, or are not finite.")
        scaling = scalings.get(path)
        factors[path] = (up * (_scaling(config, path, down.shape[0]) if scaling is None else scaling), down)
    if not any(bool(up.any()) and bool(down.any()) for up, down in factors.values()):
        raise ValueError(f"{where} is zero, as before any training; there is nothing to begin with.")
    return Lora(str(name), config, factors)


def _scaling(config: LoraConfig, path: str, rank: int) -> float:
    pattern = config.alpha_pattern or {}
    alpha = pattern.get(get_pattern_key(list(pattern), path), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _check_plain(config: LoraConfig, where: str) -> None:
    for name in VARIANTS:
        if getattr(config, name, None):
            raise ValueError(f"{where} was made with {name}={getattr(config, name)!r}, which T-REX cannot take over.")
    if config.modules_to_save:
        raise ValueError(
            f"{where} trains modules in full, modules_to_save={sorted(config.modules_to_save)}, of which each adapter "
            "has its own; they cannot be mixed."
        )
    if config.bias != "none":
        raise ValueError(f"{where} trains biases, bias={config.bias!r}, which T-REX cannot mix.")
    if config.init_lora_weights not in KEEPS_BASE:
        raise ValueError(
            f"{where} was made with init_lora_weights={config.init_lora_weights!r}, which changes the base weights, "
            "so that it does not fit the model as it is. Save it converted to a plain LoRA (save_pretrained with "
            "path_initial_model_for_weight_conversion)."
        )


def stack(model: nn.Module, loras: list[Lora]) -> dict[str, list[tuple[Tensor, Tensor] | None]]:
    """For each module of the base model that is changed, every adapter's factors, in the model's order."""
    paths = {path for lora in loras for path in lora.factors}
    layers: dict[str, list[tuple[Tensor, Tensor] | None]] = {}
    for name, module in model.named_modules():
        if name not in paths:
            continue
        layers[name] = [lora.factors.get(name) for lora in loras]
        shape = tuple(_get_in_out_features(module))
        for lora in loras:
            if name in lora.factors:
                up, down = lora.factors[name]
                if (down.shape[1], up.shape[0]) != shape:
                    raise ValueError(
                        f"The adapter {lora.name!r} has factors ({down.shape[1]} to {up.shape[0]}) for {name}, which "
                        f"goes from {shape[0]} to {shape[1]}: it belongs to another base model."
                    )
    if len(layers) < len(paths):
        unknown = sorted(paths - set(layers))
        raise ValueError(
            f"The base model has no module {unknown[0]}, which a LoRA adapter changes ({len(unknown)} in all): it "
            "belongs to another base model."
        )
    return layers
