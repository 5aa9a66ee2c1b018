"""Checks of an adapter's files, handed what they need of the model, and the model card.

What a folder holds is taken for hostile until it is checked: the configuration and the names, dtypes and shapes in
the header of the weights before anything is made by them, the tensors before the first of them is copied.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Collection, Mapping
from statistics import mode
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .fused import shape_of
from .prior.semantic_prior import OPTIONAL
from .room import note_file
from .targets import size_patterns, try_patterns
from .version import VERSION

# Every saved tensor of an adapter carries this prefix.
PREFIX = "trex_"
STATIC = f"{PREFIX}static"
IN_FILE = "base_model.model."
FOREIGN = (
    "The file is damaged or was saved for another base model or configuration: restore it, or load it onto the model "
    "that its adapter_config.json names"
)
PICKLE = (
    f"Pickles can run code and are not read, T-REX adapters are {SAFETENSORS_WEIGHTS_NAME}. If you trust a pickle, "
    "convert it: safetensors.torch.save_file(torch.load(pickle, weights_only=True), safetensors file)."
)
# An expert_pattern of some 100,000 layers is as large; the lists in it are on the fourth level.
MOST_BYTES, MOST_LEVELS = 16 << 20, 16
# None is an axis that the model gives.
Axes = tuple[int | None, ...]
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class WrongShape(ValueError, RuntimeError):
    """A tensor of a file has no place in the model. torch raises a RuntimeError for that, this package ValueErrors."""


def newer_writer(version: Any) -> str:
    """What to tell of a file that a later release than this one has written; empty for other files."""
    numbers = re.match(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?(?!\d)", version) if isinstance(version, str) else None
    newer = numbers and [int(number or 0) for number in numbers.groups()] > [int(part) for part in VERSION.split(".")]
    if not numbers or not newer:
        return ""
    return f" peft-trex {numbers[0]} wrote the file, and this is {VERSION}: upgrade it (pip install -U peft-trex)."


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in an adapter's configuration; a ValueError if it is large or deep enough to do harm."""
    size = os.path.getsize(path)
    if size > MOST_BYTES:
        raise ValueError(f"{path} has {size} bytes; expected at most {MOST_BYTES} for an adapter's configuration.")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or save the adapter again.") from error
    level = [content]
    for _ in range(MOST_LEVELS):
        level = [
            child
            for value in level
            for child in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
        ]
    if level or not isinstance(content, dict):
        kind = f"nests deeper than {MOST_LEVELS} levels" if level else f"holds a {type(content).__name__}"
        raise ValueError(f"{path} {kind}; expected the object that save_pretrained writes.")
    return content


def check_config(folder: str) -> bool:
    """Whether a folder holds the configuration of a T-REX adapter; a ValueError if PEFT had better not read it.

    PEFT reads all of it to look for the method's name.
    """
    path = os.path.join(folder, CONFIG_NAME)
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        if b'"TREX"' not in file.read(MOST_BYTES + 1):
            return False
    return read_config(path).get("peft_type") == "TREX"


def check_weights(folder: str) -> None:
    """Raise a ValueError if `folder` holds adapter weights that are a pickle or cannot be read."""
    path, pickled = (os.path.join(folder, name) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    if not os.path.isfile(path):
        if os.path.isfile(pickled):
            raise ValueError(f"The adapter is {pickled}. {PICKLE}")
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The adapter file {path} is damaged ({error}; {os.path.getsize(path)} bytes). It was probably cut short "
            "while it was written or copied: restore it from where it came from, or save the adapter again."
        ) from error


def known_fields(config_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a file that this release knows; it warns of others, which PEFT would take for its own later ones.

    Raises:
        TypeError, ValueError: as the class does, and with the advice to upgrade if a later release wrote a value.
    """
    known = {name: value for name, value in values.items() if name in config_class.__dataclass_fields__}  # type: ignore[attr-defined]
    unknown = sorted(set(values) - set(known))
    newer = newer_writer(values.get("peft_trex_version"))
    if unknown:
        warnings.warn(
            f"The adapter's configuration has the fields {', '.join(unknown)}, which peft-trex {VERSION} does not "
            "know and leaves out, so that the adapter may compute something else."
            + (newer or " They are of a newer peft-trex or PEFT (upgrade it then), or the file was changed."),
            stacklevel=2,
        )
    if newer:
        try:
            config_class(**known)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error}{newer}") from error
    return known


def shapes_of(config: Any, layer: str, in_features: Any = None, out_features: Any = None) -> dict[str, Axes]:
    """The shapes of a layer's tensors that a configuration asks for, but for the two logits; None for what is open."""
    inputs, outputs = config.vectors_of(layer)
    experts, width = config.num_experts_of(layer), config.router_rank or in_features
    shapes: dict[str, Axes] = {"trex_A": (len(inputs), in_features), "trex_B": (out_features, len(outputs))}
    if config.use_router:
        shapes["trex_router"] = (experts, width)
    if config.router_rank is not None:
        shapes["trex_router_down"] = (config.router_rank, in_features)
    if config.learned_map:
        shapes["trex_map"] = (experts, config.num_clusters)
    if config.shared_core:
        shapes["trex_core"] = (experts,)
    return shapes


def check_against_config(folder: str, config: Any) -> None:
    """Raise a WrongShape if the weights in `folder` have other shapes than their configuration asks for.

    Only the file's header is read, before anything is made by the configuration: what it asks for beyond what the file
    holds costs nothing.
    """
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    note_file(config, 0)
    if not os.path.isfile(path):
        return
    with safe_open(path, framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys() if f".{PREFIX}" in key}
    note_file(config, sum(map(math.prod, shapes.values())))
    layers = {key.removesuffix(".trex_A") for key in shapes if key.endswith(".trex_A")}
    try_patterns(size_patterns(config), [layer.removeprefix(IN_FILE) for layer in layers])
    expected = {layer: shapes_of(config, layer.removeprefix(IN_FILE)) for layer in layers}
    priors = {key.removesuffix(".centroids") for key in shapes if key.endswith(".centroids")}
    # Only a model without a token embedding has no prior, unless it is given embeddings of a width.
    if config.use_prior and (priors or config.prior_dim is not None):
        of_prior: dict[str, Axes] = {"centroids": (config.num_clusters, None), "mean": (config.prior_dim,)}
        expected |= {prior: of_prior for prior in priors or {f"{IN_FILE[:11]}.{PREFIX}prior"}}
    advice = f"{FOREIGN}.{newer_writer(config.peft_trex_version)}"
    if not layers:
        raise WrongShape(f"The adapter file {path} lacks all T-REX tensors. {advice}")
    wanted = {f"{module}.{name}": axes for module, each in expected.items() for name, axes in each.items()}
    if lacking := set(wanted) - set(shapes):
        raise WrongShape(
            f"The adapter file lacks {len(lacking)} T-REX tensors, such as {min(lacking)}, that its configuration "
            f"asks for. {advice}"
        )
    for key, axes in wanted.items():
        shape = shapes[key]
        if len(shape) != len(axes) or any(axis not in (None, size) for axis, size in zip(axes, shape, strict=True)):
            raise WrongShape(
                f"The T-REX tensor {key} has shape {shape} in the file, where its configuration asks for "
                f"{str(axes).replace('None', 'any')}. {advice}"
            )


def split_calibrated(
    layers: Mapping[str, Any], adapter_name: str, num_clusters: int, cells: str, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a calibration has left in a file, by its keys in the model, and the file's other tensors.

    These are the adapter's static weights in its `layers`, which are given by name, and perhaps the prior's `cells`,
    which is their key. Raises a WrongShape if one has a wrong shape, or only some layers have static weights.
    """
    static = {name: tensors[key] for name in layers if (key := f"{name}.{STATIC}") in tensors}
    found = {cells: tensors[cells]} if cells in tensors else {}
    groups = len(found[cells]) if found and found[cells].dim() == 2 else num_clusters
    if found and (not static or tuple(found[cells].shape) != (groups, num_clusters)):
        raise WrongShape(
            f"The T-REX tensor {cells} has shape {tuple(found[cells].shape)} in the file; expected (any, "
            f"{num_clusters}), and static weights beside it. {FOREIGN}, or calibrate the adapter again."
        )
    sets = mode(weights.shape[:1] for weights in static.values()) if static else None
    for name, layer in layers.items() if static else ():
        shape = tuple(static[name].shape) if name in static else None
        (r_a, width), r_b = layer.trex_A[adapter_name].shape, layer.trex_B[adapter_name].shape[1]
        expected = {(count, r_b, columns) for count in (1, 1 + groups) for columns in (r_a, width)}
        if shape not in expected or shape[:1] != sets:
            raise WrongShape(
                f"The T-REX tensor {name}.{STATIC} {'has shape ' + str(shape) if shape else 'is not'} in the file; "
                f"expected (1 or {1 + groups}, {r_b}, {r_a} or {width}), and as many sets as the other layers "
                f"have. {FOREIGN}, or remove these of all layers and calibrate the adapter again."
            )
    found |= {f"{name}.{STATIC}.{adapter_name}": weights for name, weights in static.items()}
    taken = {cells, *(f"{name}.{STATIC}" for name in static)}
    return found, {key: tensor for key, tensor in tensors.items() if key not in taken}


def _is_own(key: str) -> bool:
    """Whether a key is one of an adapter's own tensors; that of a prior may begin with the prefix."""
    return f".{PREFIX}" in f".{key}"


def check_tensors(
    adapter_name: str,
    in_model: Mapping[str, Tensor],
    in_file: Mapping[str, Tensor],
    others: Collection[str],
    newer: str,
) -> None:
    """Raise a ValueError if an adapter's file lacks tensors of it, or holds others than its own, or useless values.

    PEFT loads without strictness, so what a damaged or foreign file lacks would silently keep its start values, and
    what it holds besides would change the base model or another adapter.

    Args:
        adapter_name: the adapter.
        in_model: the model's state dict.
        in_file: the file's tensors by the keys of that, without the static weights and the embedding's rows.
        others: the keys of other tensors of the model that the adapter may bring.
        newer: what to tell if a later release has written the file.
    """
    # An adapter may be called like a part of a module's name, so only its place in a key tells.
    key_of_adapter = re.compile(rf"(^|\.){PREFIX}(?!static\.)\w+\.{re.escape(adapter_name)}(\.\w+)?$")
    expected = {key for key in in_model if key_of_adapter.search(key)}
    trained = f".modules_to_save.{adapter_name}."
    # PEFT saves an embedding that is trained in full twice, once without the adapter's name.
    twice = {key for key in in_file if key.replace(".modules_to_save.", trained) in set(in_file) - {key}}
    rest = {key for key in set(in_file) - expected - set(others) - twice if trained not in key or key not in in_model}
    # A module of the base model that is trained in full may carry the prefix, too.
    unknown = {key for key in rest if key not in in_model and _is_own(key)}
    advice = f"{FOREIGN}.{newer} delete_adapter({adapter_name!r}) removes what was made for it."
    for what, keys in (("lacks", expected - set(in_file)), ("holds unknown", unknown)):
        if keys:
            raise ValueError(
                f"The adapter file {what} {len(keys)} T-REX tensors, such as {min(keys)}; the adapter has "
                f"{len(expected)}. {advice}"
            )
    if rest:
        place = "is the base model's or another adapter's" if rest & set(in_model) else "is not in the model"
        raise ValueError(
            f"The adapter file holds {len(rest)} tensors that are not the adapter's, such as {min(rest)}, which "
            f"{place}; expected T-REX tensors, and those of modules_to_save and bias. {advice}"
        )
    check_values(in_file, in_model)
    for key in sorted(expected):
        if in_file[key].shape != shape_of(in_model[key]):
            raise WrongShape(_misfit(key, in_file[key], in_model[key]))


def check_values(tensors: Mapping[str, Tensor], in_model: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if tensors of a file, by their keys, are not finite numbers and the model's own are."""
    for key, tensor in tensors.items():
        own = None if _is_own(key) else in_model.get(key)
        # A module that is trained in full may have counters, too.
        dtypes = FLOATS if own is None or own.dtype in FLOATS else (own.dtype,)
        if tensor.dtype not in dtypes:
            raise ValueError(
                f"The tensor {key} of the adapter file has the dtype {tensor.dtype}; expected "
                f"{', '.join(map(str, dtypes))}. {FOREIGN}."
            )
        if dtypes is FLOATS and not _is_finite(tensor) and (own is None or own.is_meta or _is_finite(own)):
            raise ValueError(
                f"The tensor {key} of the adapter file holds NaN or infinity, so that the model would compute NaN. "
                "The training diverged, or the file is damaged: take an earlier checkpoint, or restore the file."
            )


def _is_finite(tensor: Tensor) -> bool:
    # A rank may have only its share. The two extremes tell without a tensor of the same size; both are NaN if one is.
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.is_meta or not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def check_shapes(module: nn.Module, tensors: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """A hook before weights are loaded: raise a WrongShape before the first is copied, where torch would after all."""
    for key, tensor in module.state_dict(prefix=prefix, keep_vars=True).items():
        # A prior takes over as many cells and rows of its own as there are, and a layer such static weights.
        if key not in tensors or key.endswith(tuple(f".{name}" for name in OPTIONAL)) or f".{STATIC}." in key:
            continue
        # Where ZeRO-3 shards parameters, its own files hold as little as they do.
        if tensors[key].shape not in (shape_of(tensor), tensor.shape):
            raise WrongShape(_misfit(key, tensors[key], tensor))


def _misfit(key: str, in_file: Tensor, in_model: Tensor) -> str:
    kind = "T-REX tensor" if _is_own(key) else "tensor"
    shapes = f"{tuple(in_file.shape)} in the file and {tuple(shape_of(in_model))} in the model"
    return f"size mismatch for {key}: the {kind} has shape {shapes}. {FOREIGN}."
