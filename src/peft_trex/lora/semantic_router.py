"""Choose the plain LoRA adapter of an exported folder that a prompt goes to.

This file needs NumPy and safetensors only, and nothing of this package; it runs on Python 3.8 and later. So a client
loads it by its path, or has a copy. Never run code from an exported folder: anybody may have changed that.

The prompt is the text that the model gets, written by the chat template where the adapter was trained with one.
Axis legend: T tokens of a prompt, V vocabulary, d width of the embedding, K clusters.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

# A folder with chat markers has the higher version, because code that knows only the lower one would leave them out.
VERSION, VERSION_WITH_MARKERS = 1, 2
MARKERS, MERGED = ("before", "after", "assistant"), ("before_merged", "after_merged")
ROUTER_JSON, ROUTER_TENSORS, HASHES = "router.json", "router.safetensors", "SHA256SUMS"
# An export of ten thousand clusters has less than this, and ten lists and objects.
MOST_BYTES, MOST_BRACKETS = 16 << 20, 100
EXPORT = "Export the folder again with peft_trex.save_trex_as_lora"


# A dataclass would not load from a file that is not in sys.modules.
class Route(NamedTuple):
    """Where a prompt goes: its cluster in 0..K-1, or None for a prompt without one, and the adapter's name."""

    cluster: int | None
    adapter: str


class SemanticRouter:
    """Sends each prompt to the adapter of the cluster with the highest score; threads can share a router.

    The scores are those of the T-REX adapter that the folder was exported from, `cos(e - mean, c_k)` for the prompt's
    embedding `e`, up to a positive factor that is the same for all clusters. That is the mean embedding of all tokens
    of the prompt or, with chat markers, of the latest user's message alone: no template, no system prompt, no earlier
    turn. A message that has not ended counts as far as it goes. A prompt without any user's message between markers
    counts whole, as in the model, and the first such prompt warns.

    A prompt whose scores are all zero (one without tokens or with an empty message, or whose embedding is the mean)
    has no cluster, and goes to the default adapter.

    Attributes:
        adapters: the adapters' names, and their folders as absolute paths.
        default: the name of the adapter for prompts without a cluster.
        clusters: the names of the clusters' adapters, K of them.
        chat_markers: the token ids that stand "before" and "after" a user's message, and then before the "assistant"'s
            answer; None without any.
        prior_scope: "prompt" or "answer", the tokens that the adapter's prior acted on; routes do not depend on it.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
        self.adapters: dict[str, Path] = {name: folder / where for name, where in settings["adapters"].items()}
        self.default: str = settings["default"]
        self.clusters: tuple[str, ...] = tuple(settings["clusters"])
        self.chat_markers: dict[str, list[int]] | None = settings.get("chat_markers")
        self.prior_scope: str = settings.get("prior_scope", "prompt")
        self._warned = False
        self._mean = tensors["mean"]  # (d,)
        self._centroids = tensors["centroids"].astype(np.float64)  # (K, d)
        self._token_scores = tensors.get("token_scores")  # (V, K)
        mean = self._mean.astype(np.float64)
        self._mean_scores = self._centroids @ mean  # (K,)
        # The table is rounded to float32, which must not give a cluster to a prompt that is the mean itself.
        self._rounding = float(4 * np.finfo(np.float32).eps * np.linalg.norm(mean))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, adapters: bool = True) -> SemanticRouter:
        """Read `router.json` and `router.safetensors` from a folder on this machine.

        The hashes of all files are checked, where there are some: they tell of damage, not of somebody who changed
        both. With `adapters=False` the adapters may lie elsewhere, and only the router's two files are checked.

        Raises:
            FileNotFoundError: if the folder or a file is not there.
            ValueError: if a file is damaged, changed, added or of another version, or what they hold does not fit.
        """
        root = Path(os.path.abspath(folder))
        for path in (root, root / ROUTER_JSON, root / ROUTER_TENSORS):
            if not path.exists():
                raise FileNotFoundError(f"There is no {path} on this machine. {EXPORT}, per_cluster=True.")
        if (root / HASHES).exists():
            _check_hashes(root, adapters)
        settings = _read_settings(root / ROUTER_JSON)
        return cls(root, settings, _read_tensors(root / ROUTER_TENSORS, settings))

    def route(self, token_ids: Any = None, *, embedding: Any = None) -> Route:
        """Choose the adapter for one prompt.

        Args:
            token_ids: (T,) integers in [0, V): all tokens of the prompt, as its model gets them, template and earlier
                turns included, without padding. A list, a tuple, an array, or a tensor on the CPU. May be empty. Not
                for prior_encoder="external".
            embedding: (d,) numbers instead: with prior_encoder="external" from the encoder that the prior was fitted
                with, else the mean input embedding of the prompt or, with chat markers, of its latest user's message.
                Zeros are an embedding like any other.

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
        pooled = self._pooled(ids.astype(np.int64))
        if not pooled.size:
            return Route(None, self.default)
        scores = self._token_scores[pooled].mean(0, dtype=np.float64) - self._mean_scores
        return self._best(scores, self._rounding)

    def _pooled(self, ids: np.ndarray) -> np.ndarray:
        """The tokens of a prompt (T,) whose scores are averaged."""
        if self.chat_markers is None:
            return ids
        message = latest_message(ids, self.chat_markers)
        if message is not None:
            return ids[message]
        if not self._warned:
            self._warned = True
            warnings.warn(
                "A prompt holds no user's message between the folder's chat_markers, so all its tokens are pooled. "
                "Write prompts by the tokenizer's chat template, as in training, and give the router all tokens.",
                stacklevel=2,
            )
        return ids

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


def latest_message(ids: np.ndarray, markers: Mapping[str, Sequence[int]]) -> slice | None:
    """Where the latest user's message stands in a prompt (T,); None where the marker before one stands nowhere."""
    whole, ends = _places(ids, markers["before"]), _places(ids, markers["after"])
    starts = whole + len(markers["before"])
    # Whitespace of a message may be one token with the rest of a marker, and then counts as the message's.
    if markers.get("before_merged"):
        merged, alone = _places(ids, markers["before_merged"]), np.bincount(whole, minlength=len(ids)) == 0
        starts = np.concatenate([starts, merged[alone[merged]] + len(markers["before_merged"])])
    if markers.get("after_merged"):
        ends = np.concatenate([ends, _places(ids, markers["after_merged"])])
    if not starts.size:
        return None
    # A marker at the prompt's end has no message behind it yet, so the turn before it still runs.
    starts = starts[starts < len(ids)]
    if not starts.size:
        return slice(0, 0)
    start = int(starts.max())
    # The marker before a message may end with the token that the one after it begins with; the message is then empty.
    ends = ends[ends >= start - 1]
    return slice(start, int(ends.min()) if ends.size else len(ids))


def _places(ids: np.ndarray, marker: Sequence[int]) -> np.ndarray:
    """Where a marker begins that stands in a prompt (T,) as a whole, ascending."""
    here = np.flatnonzero(ids[: max(0, len(ids) - len(marker) + 1)] == marker[0])
    for offset, token in enumerate(marker[1:], 1):
        here = here[ids[here + offset] == token]
    return here


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


def exported_files(folder: Path) -> list[str]:
    """The names of all files in a folder but the hashes, a model card, and hidden ones such as git's."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    shown = {path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)}
    return sorted(shown - {HASHES, "README.md"})


def hashes_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of each of these files, in hexadecimal digits."""
    hashes = {name: hashlib.sha256() for name in names}
    for name, digest in hashes.items():
        with open(folder / name, "rb") as file:
            for piece in iter(lambda: file.read(2**20), b""):
                digest.update(piece)
    return {name: digest.hexdigest() for name, digest in hashes.items()}


def _check_hashes(folder: Path, adapters: bool) -> None:
    """Compare the files with what the export wrote of them, in the format of sha256sum."""
    path, names = folder / HASHES, exported_files(folder) if adapters else [ROUTER_JSON, ROUTER_TENSORS]
    try:
        written = dict(line.split("  ", 1)[::-1] for line in path.read_text(encoding="utf-8").splitlines())
    except ValueError as error:
        raise _damaged(path, error) from error
    missing = sorted(set(written) - set(names)) if adapters else []
    if missing:
        advice = f"{EXPORT}, or give adapters=False"
        raise FileNotFoundError(f"There is no {folder / missing[0]} here, which {HASHES} lists. {advice}.")
    for name, digest in hashes_of(folder, names).items():
        happened = "changed" if name in written else "been added"
        expected = f"the files that {HASHES} lists, and no others"
        _check(folder / name, digest == written.get(name), f"{happened} since the export", expected)


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"The file {path} is damaged ({error}; {path.stat().st_size} bytes): restore it. {EXPORT}.")


def _check(path: Path, holds: bool, content: str, expected: str) -> None:
    if not holds:
        raise ValueError(f"The file {path} has {content}; expected {expected}. {EXPORT}.")


def _read_settings(path: Path) -> dict[str, Any]:
    """Read router.json, and check it in itself."""
    try:
        content = path.read_bytes() if path.stat().st_size <= MOST_BYTES else b""
        # Nested deep enough, JSON overflows the stack.
        if not content or content.count(b"[") + content.count(b"{") > MOST_BRACKETS:
            raise ValueError(f"too large, empty, or more than {MOST_BRACKETS} lists and objects")
        settings = json.loads(content)
    except ValueError as error:
        raise _damaged(path, error) from error
    _check(path, isinstance(settings, dict), f"a {type(settings).__name__} at the top", "an object")
    fields = ("version", "prior_encoder", "adapters", "default", "clusters")
    version, encoder, adapters, default, clusters = map(settings.get, fields)
    known = f"version {VERSION} or {VERSION_WITH_MARKERS}, or else a newer peft-trex"
    _check(path, version in (VERSION, VERSION_WITH_MARKERS) and version is not True, f"version {version!r}", known)
    hashed = settings.get("hashes") is None or path.with_name(HASHES).exists()
    _check(path, hashed, f"hashes={settings.get('hashes')!r}", f"the file {HASHES} beside it")
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
    _check_chat(path, settings)
    return settings


def _check_chat(path: Path, settings: Mapping[str, Any]) -> None:
    """Check the fields of router.json that say what is pooled, which version 1 may leave out."""
    marked = settings["version"] == VERSION_WITH_MARKERS
    scope, scopes = settings.get("prior_scope", None if marked else "prompt"), ("prompt", "answer")
    _check(path, scope in scopes, f"prior_scope={scope!r}", f"one of {scopes}")
    markers: Any = settings.get("chat_markers")
    if not marked:
        content = f"version {VERSION} with chat_markers={markers!r}"
        _check(path, markers is None, content, f"them in version {VERSION_WITH_MARKERS} only")
        return
    whole = isinstance(markers, dict) and set(MARKERS) <= set(markers) <= {*MARKERS, *MERGED}
    whole = whole and all(
        isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids) for ids in markers.values()
    )
    expected = f"lists of token ids {', '.join(MARKERS)}, only the last may be empty, or {' or '.join(MERGED)}"
    _check(path, whole and [] not in (markers["before"], markers["after"]), f"chat_markers={markers!r}", expected)


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
            _check(path, names == wanted, f"the tensors {names}", expected)
            slices = {name: file.get_slice(name) for name in names}
            dtypes = [one.get_dtype() for one in slices.values()]
            shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
            # NumPy cannot read every dtype: it has no bfloat16.
            _check(path, set(dtypes) == {"F32"}, f"the dtypes {dtypes}", expected)
            # An axis without entries fits nothing, and nothing is read before the shapes fit.
            width, vocabulary = (max([1, *shapes[name][:1]]) for name in ("mean", wanted[-1]))
            every = {"centroids": (clusters, width), "mean": (width,), "token_scores": (vocabulary, clusters)}
            _check(path, shapes == {name: every[name] for name in wanted}, f"the shapes {shapes}", expected)
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise _damaged(path, error) from error
    for name, tensor in tensors.items():
        _check(path, bool(np.isfinite(tensor).all()), f"NaN or infinity in {name}", expected)
    markers = settings.get("chat_markers")
    if markers is not None and "token_scores" in tensors:
        highest = max(token for ids in markers.values() for token in ids)
        content, expected = f"the token id {highest} in chat_markers", f"ids in [0, V = {vocabulary})"
        _check(path.with_name(ROUTER_JSON), highest < vocabulary, content, expected)
    return tensors
