"""Choose the plain LoRA adapter of an exported folder that a prompt goes to.

This file needs NumPy and safetensors only, and nothing of this package. A copy lies in each exported folder:

    router = SemanticRouter.from_pretrained("the folder")
    router.route(tokenizer(prompt)["input_ids"]).adapter

Axis legend: T tokens of a prompt, V vocabulary, d width of the embedding, K clusters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

VERSION = 1
ROUTER_JSON, ROUTER_TENSORS = "router.json", "router.safetensors"
EXPORT = "Export the folder again with peft_trex.save_trex_as_lora"


# A dataclass would not load from a file that is not in sys.modules.
class Route(NamedTuple):
    """Where a prompt goes: its cluster in 0..K-1, or None for a prompt without one, and the adapter's name."""

    cluster: int | None
    adapter: str


class SemanticRouter:
    """Sends each prompt to the adapter of the cluster with the highest score; threads can share a router.

    The scores are those of the T-REX adapter that the folder was exported from, `cos(e - mean, c_k)` for the prompt's
    embedding `e`, up to a positive factor that is the same for all clusters. A prompt whose scores are all zero (one
    without tokens, or whose embedding is the mean) has no cluster, and goes to the default adapter.

    Attributes:
        adapters: the adapters' names, and their folders as absolute paths. The router does not read these folders.
        default: the name of the adapter for prompts without a cluster.
        clusters: the names of the clusters' adapters, K of them.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
        self.adapters: dict[str, Path] = {name: folder / where for name, where in settings["adapters"].items()}
        self.default: str = settings["default"]
        self.clusters: tuple[str, ...] = tuple(settings["clusters"])
        self._mean = tensors["mean"]  # (d,)
        self._centroids = tensors["centroids"].astype(np.float64)  # (K, d)
        self._token_scores = tensors.get("token_scores")  # (V, K)
        mean = self._mean.astype(np.float64)
        self._mean_scores = self._centroids @ mean  # (K,)
        # The table is rounded to float32, which must not give a cluster to a prompt that is the mean itself.
        self._rounding = float(4 * np.finfo(np.float32).eps * np.linalg.norm(mean))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> SemanticRouter:
        """Read `router.json` and `router.safetensors` from a folder on this machine.

        Raises:
            FileNotFoundError: if the folder or a file is not there.
            ValueError: if a file is damaged, of another version, or what they hold does not fit together.
        """
        root = Path(os.path.abspath(folder))
        for path in (root, root / ROUTER_JSON, root / ROUTER_TENSORS):
            if not path.exists():
                raise FileNotFoundError(f"There is no {path} on this machine. {EXPORT}, per_cluster=True.")
        settings = _read_settings(root / ROUTER_JSON)
        return cls(root, settings, _read_tensors(root / ROUTER_TENSORS, settings))

    def route(self, token_ids: Any = None, *, embedding: Any = None) -> Route:
        """Choose the adapter for one prompt.

        Args:
            token_ids: (T,) integers in [0, V): all tokens of the prompt, as its model gets them, without padding. A
                list, a tuple, an array, or a tensor on the CPU. May be empty. Not for prior_encoder="external".
            embedding: (d,) numbers instead: with prior_encoder="external" from the encoder that the prior was fitted
                with, else the mean of the prompt's input embeddings. Zeros are an embedding like any other.

        Raises:
            TypeError, ValueError: for arguments of another kind, shape or range, or both of them, or neither.
        """
        if (token_ids is None) == (embedding is None):
            arguments = "neither" if embedding is None else "both"
            raise TypeError(f"route got {arguments} of token_ids and embedding; give one of them.")
        return self._route_tokens(token_ids, "token_ids") if embedding is None else self._route_embedding(embedding)

    def adapter_names(self, token_ids: Sequence[Any]) -> list[str]:
        """Choose the adapter for each prompt of a list, as `route` takes them: for PEFT's `adapter_names=[...]`."""
        if isinstance(token_ids, (str, bytes, Mapping)):
            raise TypeError(f"token_ids is a {type(token_ids).__name__}; expected a list of prompts of integers each.")
        return [self._route_tokens(ids, f"token_ids[{i}]").adapter for i, ids in enumerate(token_ids)]

    def _route_tokens(self, token_ids: Any, name: str) -> Route:
        if self._token_scores is None:
            raise ValueError(
                "This folder's prior has prior_encoder='external', so the router cannot embed tokens; give the "
                "prompt's embedding instead: route(embedding=...)."
            )
        vocabulary = len(self._token_scores)
        expected = f"expected the integers of one prompt, (T,), in [0, {vocabulary})"
        ids = _as_array(token_ids, name, "iu", expected)
        if not ids.size:
            return Route(None, self.default)
        wrong = np.flatnonzero((ids < 0) | (ids >= vocabulary))
        if wrong.size:
            raise ValueError(
                f"{name} holds {ids[wrong[0]]} at position {wrong[0]}; {expected}. Leave padding out, and use the "
                "tokenizer of the model that the folder was exported from."
            )
        scores = self._token_scores[ids].mean(0, dtype=np.float64) - self._mean_scores
        return self._best(scores, self._rounding)

    def _route_embedding(self, embedding: Any) -> Route:
        expected = f"expected the numbers of one embedding, (d,) = {self._mean.shape}, finite in float32"
        array = _as_array(embedding, "embedding", "iuf", expected)
        if array.shape != self._mean.shape:
            raise ValueError(f"embedding has shape {array.shape}; {expected}.")
        # The model computes the deviation in float32, too.
        with np.errstate(over="ignore"):
            deviation = array.astype(np.float32) - self._mean
        if not np.isfinite(deviation).all():
            raise ValueError(f"embedding holds NaN, infinity or too large a number; {expected}.")
        return self._best(self._centroids @ deviation)

    def _best(self, scores: np.ndarray, rounding: float = 0.0) -> Route:
        if np.abs(scores).max() <= rounding:
            return Route(None, self.default)
        cluster = int(scores.argmax())
        return Route(cluster, self.clusters[cluster])


def _as_array(value: Any, name: str, kinds: str, expected: str) -> np.ndarray:
    """Make `value` an array of one axis whose dtype is of one of numpy's `kinds`; empty lists are of any kind."""
    if isinstance(value, (str, bytes, Mapping)):
        raise TypeError(f"{name} is a {type(value).__name__}; {expected}.")
    # Ragged lists, and tensors on a GPU or with a gradient, are no arrays.
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} is a {type(value).__name__} that is no array ({error}); {expected}.") from error
    if array.size and array.dtype.kind not in kinds:
        raise TypeError(f"{name} is a {type(value).__name__} of dtype {array.dtype}; {expected}.")
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; {expected}.")
    return array


def _damaged(path: Path, error: Exception) -> ValueError:
    problem = f"is damaged ({error}; {path.stat().st_size} bytes), cut short perhaps: restore it from its origin"
    return ValueError(f"The file {path} {problem}. {EXPORT}.")


def _check(path: Path, holds: bool, content: str, expected: str) -> None:
    if not holds:
        raise ValueError(f"The file {path} has {content}; expected {expected}. {EXPORT}.")


def _read_settings(path: Path) -> dict[str, Any]:
    """Read router.json, and check it in itself."""
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(path, error) from error
    _check(path, isinstance(settings, dict), f"a {type(settings).__name__} at the top", "an object")
    fields = ("version", "prior_encoder", "adapters", "default", "clusters")
    version, encoder, adapters, default, clusters = map(settings.get, fields)
    copy = f"version {VERSION}, or else the copy of semantic_router.py that lies in the folder"
    _check(path, version == VERSION and version is not True, f"version {version!r}", copy)
    encoders = ("input_embeddings", "external")
    _check(path, encoder in encoders, f"prior_encoder={encoder!r}", f"one of {encoders}")
    _check(path, isinstance(adapters, dict) and adapters != {}, f"adapters={adapters!r}", "an object of folders")
    # A folder from elsewhere must not point out of itself.
    for name, where in adapters.items():
        inside = isinstance(where, str) and not Path(where).is_absolute() and ".." not in Path(where).parts
        _check(path, inside, f"the folder {where!r} for the adapter {name!r}", "a relative path inside of the folder")
    _check(path, isinstance(clusters, list) and clusters != [], f"clusters={clusters!r}", "a list of adapters' names")
    for name in (default, *clusters):
        listed = isinstance(name, str) and name in adapters
        _check(path, listed, f"{name!r} as default or in clusters", f"one of its adapters, {sorted(adapters)}")
    return settings


def _read_tensors(path: Path, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Read router.safetensors, and check it in itself and against router.json."""
    clusters = len(settings["clusters"])
    expected = f"the float32 tensors centroids (K, d) with K = {clusters} clusters as in {ROUTER_JSON}, mean (d,)"
    wanted = ["centroids", "mean"]
    if settings["prior_encoder"] == "input_embeddings":
        expected += ", token_scores (V, K)"
        wanted.append("token_scores")
    try:
        with safe_open(path, framework="numpy") as file:
            names = sorted(file.keys())
            dtypes = [file.get_slice(name).get_dtype() for name in names]
            _check(path, names == wanted, f"the tensors {names}", expected)
            # NumPy cannot read every dtype: it has no bfloat16.
            _check(path, set(dtypes) == {"F32"}, f"the dtypes {dtypes}", expected)
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise _damaged(path, error) from error
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    # An axis without entries fits nothing.
    width, vocabulary = max(1, tensors["mean"].size), max(1, tensors[wanted[-1]].size // clusters)
    fitting = dict(zip(wanted, ((clusters, width), (width,), (vocabulary, clusters)), strict=False))
    _check(path, shapes == fitting, f"the shapes {shapes}", expected)
    for name, tensor in tensors.items():
        _check(path, bool(np.isfinite(tensor).all()), f"NaN or infinity in {name}", expected)
    return tensors
