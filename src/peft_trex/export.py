"""Leaving as plain LoRA: one adapter for all prompts, one for each cluster of them, and the router between these."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from . import semantic_router
from .layer import TRexLayer
from .model import TRexModel, find_tuner
from .prior import SemanticPrior

OVERALL = "overall"


def save_trex_as_lora(
    model: nn.Module, path: str | os.PathLike[str], *, adapter_name: str = "default", per_cluster: bool = True
) -> None:
    """Save an adapter as plain LoRA, which PEFT, vLLM and others load and serve without this package.

    The LoRA hold the static weights that [`calibrate_trex_merge`] found, without further loss; their rank is r_b or
    less, and lora_alpha equals it. The folder itself is the adapter for all prompts, "overall". With `per_cluster` it
    also holds `cluster_00`, `cluster_01`, ..., one adapter for each cluster of prompts, and what chooses between them:
    `router.json`, `router.safetensors` and `semantic_router.py`, a copy of the module with [`SemanticRouter`], which
    needs NumPy and safetensors only.

    Args:
        model: a model with a T-REX adapter.
        path: the folder, which must not exist yet, or be empty. It appears when all is written.
        adapter_name: the adapter.
        per_cluster: save the clusters' adapters, too.

    Raises:
        FileExistsError: if there is something at `path` already.
        ValueError: if there is no such adapter, `per_cluster` was not calibrated, the adapter trains biases, or its
            weights are not finite.
    """
    tuner = find_tuner(model)
    config = tuner.config_of(adapter_name)
    layers = {
        name: module
        for name, module in tuner.model.named_modules()
        if isinstance(module, TRexLayer) and adapter_name in module.trex_A
    }
    if config.bias != "none":
        raise ValueError(
            f"The adapter {adapter_name!r} trains biases (bias={config.bias!r}), which a LoRA for serving does not "
            "carry; train with bias='none', or merge the adapter."
        )
    if per_cluster and any(
        adapter_name not in layer.trex_static or len(layer.trex_static[adapter_name]) == 1 for layer in layers.values()
    ):
        raise ValueError(
            f"The adapter {adapter_name!r} has no static weights for each cluster; call calibrate_trex_merge(model, "
            "dataloader, per_cluster=True) first, or set per_cluster=False."
        )
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    # what is trained in full beside the adapter, a classification head for instance
    others = {key: tensor for key, tensor in saved.items() if f".{TRexModel.prefix}" not in key}
    folders: dict[str, int | None] = {".": None}
    if per_cluster:
        folders.update((f"cluster_{index:02d}", index) for index in range(config.num_clusters))
    with _appearing(Path(path).absolute()) as folder:
        for name, cluster in folders.items():
            tensors, rank = _lora_tensors(layers, adapter_name, cluster)
            lora = LoraConfig(
                r=rank,
                lora_alpha=rank,
                target_modules=_target_names(tuner.model, layers),
                modules_to_save=config.modules_to_save if others else None,
                fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
                task_type=config.task_type,
                base_model_name_or_path=config.base_model_name_or_path,
                inference_mode=True,
            )
            (folder / name).mkdir(exist_ok=True)
            save_file({**tensors, **others}, folder / name / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            lora.save_pretrained(str(folder / name))
        if per_cluster:
            _save_router(folder, tuner, adapter_name, list(folders)[1:])


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `path` when all is done, and is gone if that fails."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(
            f"There is something at {path} already, and it was left as it is; give another path, or remove it first."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f".{path.name}.{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
        if path.is_dir():
            path.rmdir()
        folder.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lora_tensors(
    layers: dict[str, TRexLayer], adapter_name: str, cluster: int | None
) -> tuple[dict[str, Tensor], int]:
    """The LoRA matrices of all layers by their names in PEFT's files, and their rank."""
    factors = {name: layer.static_factors(adapter_name, cluster) for name, layer in layers.items()}
    rank = max(len(down) for down, _ in factors.values())
    tensors = {}
    for name, (down, up) in factors.items():
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise ValueError(f"NaN or infinity was found in the layer {name} of the adapter {adapter_name!r}.")
        dtype, missing = layers[name].trex_A[adapter_name].dtype, rank - len(down)
        tensors[f"base_model.model.{name}.lora_A.weight"] = F.pad(down, (0, 0, 0, missing)).to("cpu", dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = F.pad(up, (0, missing)).to("cpu", dtype)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, rank


def _target_names(model: nn.Module, layers: dict[str, TRexLayer]) -> list[str]:
    """The shortest names by which LoRA finds these layers and no others."""
    names = {name.rpartition(".")[2] for name in layers}
    found = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in names}
    return sorted(names if found == set(layers) else layers)


def _save_router(folder: Path, tuner: TRexModel, adapter_name: str, clusters: list[str]) -> None:
    config, prior = tuner.config_of(adapter_name), tuner.prior_of(adapter_name)
    assert prior is not None  # its clusters were calibrated
    tensors = {"centroids": prior.centroids.float(), "mean": prior.mean.float()}
    if config.prior_encoder == "input_embeddings":
        tensors["token_scores"] = _token_scores(tuner, prior)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / "router.safetensors"
    )
    described: dict[str, Any] = {
        "version": semantic_router.VERSION,
        "base_model_name_or_path": config.base_model_name_or_path,
        "prior_encoder": config.prior_encoder,
        "default": OVERALL,
        "adapters": {OVERALL: ".", **{name: name for name in clusters}},
        "clusters": clusters,
    }
    (folder / "router.json").write_text(json.dumps(described, indent=2) + "\n")
    shutil.copyfile(semantic_router.__file__, folder / "semantic_router.py")


@torch.no_grad()
def _token_scores(tuner: TRexModel, prior: SemanticPrior) -> Tensor:
    """Each token's part (V, K) in a prompt's score, before centring: the mean over the prompt decides its cluster."""
    embedding = tuner.input_embedding()
    assert embedding is not None
    training, embedding.training = embedding.training, False
    try:
        device = embedding.weight.device
        centroids = prior.centroids.to(device).float().T
        with torch.autocast(device.type, enabled=False):
            parts = torch.arange(embedding.num_embeddings, device=device).split(4096)
            return torch.cat([embedding(part).float() @ centroids for part in parts])
    finally:
        embedding.training = training
