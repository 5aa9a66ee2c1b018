"""Save an adapter as plain LoRA: one for all prompts, one for each cluster of them, and the router between these."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..keys import for_file, is_prior
from ..layer import APPROXIMATE, TRexLayer
from ..model import TRexModel, find_peft_model, find_tuner
from ..prior.chat import ChatMarkers
from . import semantic_router
from .joining import OVERALL, TRexExportReport, group_clusters, shares
from .reader import DOWN, PREFIX, UP

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

# The folder that an export writes to, and in it the names of what moves out in the end.
PART, MOVING = ".part-", "moving.json"


def save_trex_as_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    per_cluster: bool = True,
    max_adapters: int | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    base_model: str | None = None,
) -> TRexExportReport:
    """Save an adapter as plain LoRA, which PEFT, vLLM and others load and serve without this package.

    The LoRA hold the static weights that [`calibrate_trex_merge`] found, to the rounding of the adapter's dtype; their
    rank is r_b or less, and lora_alpha equals it. The folder itself is the adapter for all prompts, "overall". It
    holds the hashes of its files in `SHA256SUMS`, and nothing in it is ever run.

    Args:
        model: a model with a T-REX adapter.
        path: the folder, which must not exist yet, or be empty. The files appear in it when all are written.
        adapter_name: the adapter.
        per_cluster: also save `cluster_00`, `cluster_01`, ..., one adapter for each cluster of prompts, or each group
            that [`calibrate_trex_merge`] was asked for, and what chooses between them: `router.json` and
            `router.safetensors`, for a [`SemanticRouter`], and for readers a copy of its module. They hold the
            adapter's chat markers, so that the router pools what the model does.
        max_adapters: how many adapters there may be for the clusters, beside "overall". Those whose static weights are
            closest are joined, and share an adapter, which has the name of the first of them; the router sends all of
            their prompts to it. It goes by the data of the calibration, which must have run in this process. None
            saves an adapter for each cluster.
        save_embedding_layers: as in PEFT's `save_pretrained`, with each LoRA; "auto" saves resized ones.
        base_model: the base model's name or folder where the LoRA will be served, if it is not the one that the
            adapter was trained on; a server that looks adapters up by their base model compares the two.

    Raises:
        FileExistsError: if there is something at `path` already.
        ValueError: if there is no such adapter, `per_cluster` was not calibrated, the adapter trains biases or is in a
            block of experts, another method's adapter is in the model, weights are not finite, or chat markers are
            not in the vocabulary.
    """
    tuner = find_tuner(model)
    config, layers = tuner.config_of(adapter_name), tuner.layers_of(adapter_name)
    _check_exportable(tuner, adapter_name, per_cluster)
    prior = tuner.prior_of(adapter_name)
    number = prior.groups if per_cluster and prior is not None else 0
    groups, joining_error = group_clusters(layers, adapter_name, number, max_adapters)
    if not per_cluster and adapter_name not in tuner.calibrated_adapters():
        warnings.warn(APPROXIMATE, stacklevel=2)
    peft_model: Any = find_peft_model(model)
    in_base = isinstance(peft_model, TRexModel)
    saved = get_peft_model_state_dict(
        peft_model.model if in_base else peft_model,
        adapter_name=adapter_name,
        save_embedding_layers=save_embedding_layers,
    )
    saved = for_file(saved) if in_base else saved
    of_trex = tuple(f".{name}" for name in (*TRexLayer.adapter_layer_names, "trex_static"))
    # Modules that are trained in full beside the adapter, such as a classification head, travel with each LoRA.
    trained = {key: tensor for key, tensor in saved.items() if not key.endswith(of_trex) and not is_prior(key)}
    trained = _checked(trained, adapter_name)
    base_model = base_model or config.base_model_name_or_path
    with _appearing(Path(path).resolve()) as folder:
        for name, clusters in ((".", None), *((name, groups[name]) for name in groups if name != OVERALL)):
            tensors, rank = _lora_tensors(layers, adapter_name, clusters)
            lora = LoraConfig(
                r=rank,
                lora_alpha=rank,
                target_modules=target_names(tuner.model, layers),
                modules_to_save=config.modules_to_save if trained else None,
                fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
                task_type=config.task_type,
                base_model_name_or_path=base_model,
                revision=config.revision,
                inference_mode=True,
            )
            lora.save_pretrained(str(folder / name))
            save_file({**tensors, **trained}, folder / name / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        if per_cluster:
            # Servers that find an adapter by its name look for a folder of that name.
            (folder / OVERALL).mkdir()
            for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
                shutil.copyfile(folder / name, folder / OVERALL / name)
            _save_router(folder, tuner, adapter_name, groups, base_model)
        written = semantic_router.hashes_of(folder, semantic_router.exported_files(folder))
        lines = [f"{digest}  {name}\n" for name, digest in written.items()]
        (folder / semantic_router.HASHES).write_text("".join(lines), encoding="utf-8")
    return TRexExportReport(groups, joining_error)


def _check_exportable(tuner: TRexModel, adapter_name: str, per_cluster: bool) -> None:
    layers = tuner.layers_of(adapter_name)
    for name, layer in layers.items():
        layer.check_static(name)
    bias = tuner.config_of(adapter_name).bias
    if bias != "none":
        raise ValueError(
            f"The adapter {adapter_name!r} trains biases (bias={bias!r}), which a LoRA for serving does not carry; "
            "train with bias='none', or merge the adapter."
        )
    for name, module in tuner.model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TRexLayer):
            raise ValueError(
                f"Another method's adapter lies in the model ({name}, a {type(module).__name__}), which these LoRA "
                "would not carry; merge or unload it before T-REX is put on top."
            )
    static = [layer.trex_static for layer in layers.values()]
    if per_cluster and any(adapter_name not in cores or len(cores[adapter_name]) == 1 for cores in static):
        raise ValueError(
            f"The adapter {adapter_name!r} has no static weights for each cluster; call calibrate_trex_merge(model, "
            "dataloader, per_cluster=True) first, or set per_cluster=False."
        )
    markers, embedding = _pooling_markers(tuner, adapter_name), tuner.input_embedding()
    if per_cluster and markers is not None and embedding is not None:
        highest, vocabulary = max(token for ids in markers for token in ids), embedding.num_embeddings
        if highest >= vocabulary:
            raise ValueError(
                f"The chat_markers of the adapter {adapter_name!r} hold the token id {highest}, but the model has "
                f"{vocabulary} tokens; set those of its tokenizer, peft_trex.chat_markers(tokenizer)."
            )


def _pooling_markers(tuner: TRexModel, adapter_name: str) -> ChatMarkers | None:
    """The chat markers by which the model pools prompts; only causal language models do that."""
    adapters = tuner.prompts.adapters
    return adapters.markers_of(adapter_name) if adapters.is_causal() else None


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """Give a folder to write to. All that is in it moves to `path` in the end, or is gone if something fails.

    What a process leaves here that is killed is removed by the next export.
    """
    if path.is_dir():
        _clear_killed(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"There is something at {path} already, and it was left as it is; give another path, or remove it first."
        )
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    moved: list[Path] = []
    try:
        with tempfile.TemporaryDirectory(dir=path, prefix=PART) as work, _held(Path(work)):
            yield Path(work)
            # The configuration moves last, because without it nothing takes a folder for an adapter.
            entries = sorted(Path(work).iterdir(), key=lambda entry: entry.name == CONFIG_NAME)
            (Path(work) / MOVING).write_text(json.dumps([entry.name for entry in entries]))
            for entry in entries:
                moved.append(path / entry.name)
                entry.rename(moved[-1])
    except BaseException:
        for entry in moved:
            _remove(entry)
        for folder in created:
            folder.rmdir()
        raise


def _remove(entry: Path) -> None:
    shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a folder as this process's own until the block ends, or the process; False if another one holds it."""
    # Without such locks nobody can tell whether the process that made the folder still lives.
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except OSError:
        held = False
    try:
        yield held
    finally:
        os.close(descriptor)


def _clear_killed(path: Path) -> None:
    """Remove what an export into a folder has left that was killed: its part, and what had moved out of that."""
    for part in path.glob(f"{PART}*"):
        with _held(part) as dead:
            if not dead:
                continue
            try:
                names = json.loads((part / MOVING).read_text())
            except (OSError, ValueError):
                names = []
            # The configuration was the last to move.
            for name in [] if (path / CONFIG_NAME).exists() else names:
                _remove(path / Path(name).name)
            shutil.rmtree(part)


def _checked(tensors: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """The tensors as safetensors takes them, which are finite."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"NaN or infinity is in {name} of the adapter {adapter_name!r}; nothing was saved.")
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _lora_tensors(
    layers: Mapping[str, TRexLayer], adapter_name: str, clusters: tuple[int, ...] | None
) -> tuple[dict[str, Tensor], int]:
    """The LoRA matrices of all layers by their names in PEFT's files, filled up to one rank, and this rank.

    They hold the weights for these clusters together, None for all tokens.
    """
    factors = {
        name: layer.static_factors(adapter_name, shares(layer, adapter_name, clusters))
        for name, layer in layers.items()
    }
    rank = max(len(down) for down, _ in factors.values())
    tensors = {}
    for name, (down, up) in factors.items():
        dtype, missing = layers[name].trex_A[adapter_name].dtype, rank - len(down)
        down, up = layers[name].as_lora(F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing)))
        tensors[PREFIX + name + DOWN], tensors[PREFIX + name + UP] = down.to(dtype), up.to(dtype)
    # The check comes after the cast: in float16 a large product may have become infinity.
    return _checked(tensors, adapter_name), rank


def target_names(model: nn.Module, layers: Mapping[str, TRexLayer]) -> list[str] | str:
    """LoRA's `target_modules` that finds these layers and no others: short names if possible, else full ones."""
    modules = [name for name, _ in model.named_modules()]
    for names in ({name.rpartition(".")[2] for name in layers}, set(layers)):
        ends = tuple(f".{name}" for name in names)
        if {name for name in modules if name in names or name.endswith(ends)} == set(layers):
            return sorted(names)
    # One layer's name is the end of another module's, so only a pattern tells them apart.
    return "|".join(re.escape(name) for name in sorted(layers))


@torch.no_grad()
def _save_router(
    folder: Path, tuner: TRexModel, adapter_name: str, groups: Mapping[str, tuple[int, ...]], base_model: str | None
) -> None:
    config, prior, embedding = tuner.config_of(adapter_name), tuner.prior_of(adapter_name), tuner.input_embedding()
    # Clusters can only be calibrated with a prior.
    assert prior is not None
    tensors = {"centroids": prior.pulled_back(), "mean": prior.mean.float()}
    if config.prior_encoder == "input_embeddings":
        assert embedding is not None
        # A prompt's scores before centring are the mean over those of its tokens, (V, K).
        scores = []
        for ids in torch.arange(embedding.num_embeddings).split(4096):
            embeds = tuner.prompts.scorer.look_up(embedding, ids[:, None], prior)[:, 0].float()
            with torch.autocast(embeds.device.type, enabled=False):
                scores.append(embeds @ tensors["centroids"].T.to(embeds.device))
        tensors["token_scores"] = torch.cat(scores)
    save_file(_checked(tensors, adapter_name), folder / semantic_router.ROUTER_TENSORS)
    markers, adapters = _pooling_markers(tuner, adapter_name), {k: name for name, ks in groups.items() for k in ks}
    chat: dict[str, Any] = {}
    # Folders without these fields are as they always were.
    if markers is not None or config.prior_scope != "prompt":
        chat["prior_scope"] = config.prior_scope
    if markers is not None:
        chat["chat_markers"] = markers.as_value()
    settings = {
        "version": semantic_router.VERSION if markers is None else semantic_router.VERSION_WITH_MARKERS,
        "base_model_name_or_path": base_model,
        "prior_encoder": config.prior_encoder,
        "default": OVERALL,
        "adapters": {name: "." if name == OVERALL else name for name in groups},
        "clusters": [adapters[index] for index in range(prior.groups)],
        "hashes": semantic_router.HASHES,
        **chat,
    }
    (folder / semantic_router.ROUTER_JSON).write_text(json.dumps(settings, indent=2) + "\n")
    # It is there to be read, and says itself that nobody should run a folder's code.
    shutil.copyfile(semantic_router.__file__, folder / "semantic_router.py")
