"""The router of an exported folder: the model's own choice of cluster, without the model, and what it refuses."""

import functools
import json
import shutil
import subprocess
import sys
from collections import UserDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PAD, VOCAB, adapted, pad_to
from hypothesis import given, settings
from hypothesis import strategies as st
from pythons import OLDER_PYTHONS, PYTHONS
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from peft_trex import calibrate_trex_merge, initialize_trex_prior, save_trex_as_lora
from peft_trex.lora import semantic_router
from peft_trex.lora.semantic_router import Route, SemanticRouter
from peft_trex.prior.inputs import Inputs

DIM = 5
EVERY_PYTHON = {**OLDER_PYTHONS, **PYTHONS}


def write(folder, settings, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "router.json").write_text(json.dumps(settings))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "router.safetensors")
    return folder


def described(clusters, encoder):
    names = [f"cluster_{k:02d}" for k in range(clusters)]
    return {
        "version": 1,
        "base_model_name_or_path": None,
        "prior_encoder": encoder,
        "default": "overall",
        "adapters": {"overall": ".", **{name: name for name in names}},
        "clusters": names,
    }


def export(model, folder):
    """The folder of a model, for which any calibration will do."""
    batch = {"input_ids": torch.arange(4, 40).reshape(4, 9)}
    if model.base_model.config_of("default").prior_encoder == "external":
        batch["semantic_embeds"] = torch.eye(4, DIM)
    calibrate_trex_merge(model, [batch], per_cluster=True, progress=False)
    save_trex_as_lora(model, folder)
    return folder


def external_model(**settings):
    model = adapted(fit=False, prior_encoder="external", prior_dim=DIM, **settings)
    embeddings = torch.randn(40, DIM, generator=torch.Generator().manual_seed(0)) + 0.5
    initialize_trex_prior(model, embeddings=embeddings, progress=False)
    return model


@pytest.fixture(scope="module", params=[None, 5, "auto"], ids=["", "whitened", "auto"])
def tokens(tmp_path_factory, request):
    model = adapted(prior_whitening=request.param)
    return model, SemanticRouter.from_pretrained(export(model, tmp_path_factory.mktemp("tokens")))


@pytest.fixture(scope="module", params=[None, 5, "auto"], ids=["", "whitened", "auto"])
def external(tmp_path_factory, request):
    model = external_model(prior_whitening=request.param)
    return model, SemanticRouter.from_pretrained(export(model, tmp_path_factory.mktemp("external")))


def chosen(scores):
    """The route that a model's own scores (K,) stand for."""
    if not scores.any():
        return Route(None, "overall")
    return Route(int(scores.argmax()), f"cluster_{int(scores.argmax()):02d}")


def model_route(model, **inputs):
    """The routes of a model's own scores for what its forward gets."""
    tuner = model.base_model
    embeds = inputs.pop("semantic_embeds", None)
    state = tuner.prompts.scorer.score(Inputs.of(inputs), embeds, ["default"])
    return [chosen(row) for row in state.scores["default"]]


def random_prompts(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + 2 * (i % 20) if i % 3 else 1 for i in range(count)]
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths]


def test_takes_the_models_choice_for_tokens(tokens):
    model, router = tokens
    routes = [router.route(ids.tolist()) for ids in random_prompts(300)]
    assert routes == [model_route(model, input_ids=ids[None])[0] for ids in random_prompts(300)]
    assert {route.cluster for route in routes} == {0, 1, 2, 3}  # or else agreeing would mean little


@pytest.mark.parametrize("side", ["left", "right"])
def test_takes_the_models_choice_in_a_padded_batch(tokens, side):
    model, router = tokens
    rows = [*random_prompts(40, seed=1), torch.tensor([], dtype=torch.long)]
    padded, mask = (torch.stack(part) for part in zip(*(pad_to(row, 50, side) for row in rows), strict=True))
    routes = model_route(model, input_ids=padded, attention_mask=mask)
    assert [router.route(row.tolist()) for row in rows] == routes
    assert routes[-1] == Route(None, "overall") and PAD == 0
    assert router.adapter_names(rows) == [route.adapter for route in routes]


def test_takes_the_models_choice_for_embeddings(external):
    model, router = external
    prior = model.base_model.prior_of("default")
    e = torch.randn(300, DIM, generator=torch.Generator().manual_seed(1))
    e[0], e[1] = 0, prior.mean  # the model scores the one as it does any other; the other scores zero
    e[2:9] = prior.mean + 1e-4 * e[2:9]
    e[9], e[9, 0] = prior.mean, torch.nextafter(prior.mean[0], prior.mean[1])  # the least that is not the mean
    ids = torch.ones(len(e), 1, dtype=torch.long)
    routes = model_route(model, input_ids=ids, semantic_embeds=e)
    assert [router.route(embedding=row.numpy()) for row in e] == routes
    assert routes[0].cluster is not None and routes[1] == Route(None, "overall")
    assert {route.cluster for route in routes} == {0, 1, 2, 3, None}
    assert [router.route(embedding=row.double().numpy() * 1e3) for row in e] == model_route(
        model, input_ids=ids, semantic_embeds=e * 1e3
    )


def test_an_embedding_of_tokens_is_routed_as_they_are(tokens):
    model, router = tokens
    for ids in random_prompts(40, seed=2):
        embedding = model.get_input_embeddings()(ids).mean(0).detach()
        assert router.route(embedding=embedding) == router.route(ids)


@pytest.mark.parametrize("seed", range(5))
def test_a_prompt_that_is_the_mean_has_no_cluster(tmp_path, seed):
    model = adapted()
    prior = model.base_model.prior_of("default")
    table = model.get_input_embeddings().weight
    token = 7 + seed
    with torch.no_grad():
        # the table that a user exports may be summed up in another order than numpy's
        table[token] = 300 * torch.randn(table.shape[1], generator=torch.Generator().manual_seed(seed))
        prior.mean.copy_(table[token])
    router = SemanticRouter.from_pretrained(export(model, tmp_path))
    for ids in ([token], [token, token]):
        assert model_route(model, input_ids=torch.tensor([ids])) == [router.route(ids)] == [Route(None, "overall")]
    near = [token] * 999 + [5]  # as near to the mean as a prompt of a thousand tokens comes
    assert model_route(model, input_ids=torch.tensor([near])) == [router.route(near)]
    assert router.route(near).cluster is not None


def test_a_mean_of_zero_leaves_nothing_to_round(tmp_path):
    scores = np.zeros((3, 2), np.float32)
    scores[1], scores[2] = [-3e-30, -1e-30], [1e-30, -1e-30]
    tensors = {"centroids": np.eye(2, DIM, dtype=np.float32), "mean": np.zeros(DIM, np.float32)}
    folder = write(tmp_path, described(2, "input_embeddings"), {**tensors, "token_scores": scores})
    router = SemanticRouter.from_pretrained(folder)
    assert [router.route([token]).cluster for token in range(3)] == [None, 1, 0]


def test_scores_are_not_rounded_to_float32(tmp_path):
    small = 2.0**-13  # the scores are 1 and 1 + 2^-26, which float32 does not tell from 1
    centroids = np.array([[1, 0], [1, small]], np.float32)
    folder = write(tmp_path, described(2, "external"), {"centroids": centroids, "mean": np.zeros(2, np.float32)})
    assert SemanticRouter.from_pretrained(folder).route(embedding=[1, small]).cluster == 1


def test_all_forms_of_a_prompt(tokens):
    _, router = tokens
    ids = [61, 3, 17]
    forms = [tuple(ids), np.array(ids), np.array(ids, np.uint8), [np.int32(i) for i in ids], torch.tensor(ids)]
    for form in forms:
        assert router.route(form) == router.route(token_ids=ids)
    for nothing in ([], (), np.array([]), torch.tensor([]), np.array([], int)):
        assert router.route(nothing) == Route(None, "overall")
    assert router.adapter_names([]) == []
    assert router.adapter_names(torch.tensor([ids, ids])) == [router.route(ids).adapter] * 2
    cluster, adapter = router.route(ids)
    assert type(cluster) is int and type(adapter) is str


def test_all_forms_of_an_embedding(external):
    _, router = external
    e = [1, -2, 0, 3, 1]
    for form in (tuple, np.array, torch.tensor, lambda e: np.array(e, np.float16), lambda e: torch.tensor(e).double()):
        assert router.route(embedding=form(e)) == router.route(embedding=[float(x) for x in e])


def test_where_the_adapters_are(tmp_path, monkeypatch):
    tensors = {"centroids": np.eye(2, DIM, dtype=np.float32), "mean": np.zeros(DIM, np.float32)}
    settings = described(2, "external")
    settings["adapters"]["cluster_01"] = "more/of/them"
    settings["clusters"] = ["cluster_01", "overall"]  # a cluster without an adapter of its own
    write(tmp_path / "out", settings, tensors)
    monkeypatch.chdir(tmp_path)
    for folder in ("out", Path("out"), tmp_path / "out"):
        router = SemanticRouter.from_pretrained(folder)
        assert router.adapters == {
            "overall": tmp_path / "out",
            "cluster_00": tmp_path / "out" / "cluster_00",
            "cluster_01": tmp_path / "out" / "more" / "of" / "them",
        }
    assert router.default == "overall" and router.clusters == ("cluster_01", "overall")
    assert router.route(embedding=np.eye(1, DIM)[0]) == Route(0, "cluster_01")
    assert router.route(embedding=np.eye(2, DIM)[1]) == Route(1, "overall")


@settings(max_examples=80, deadline=None)
@given(data=st.data(), batch=st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=25), max_size=5))
def test_batches_and_orders_change_nothing(tokens, data, batch):
    _, router = tokens
    routes = [router.route(ids) for ids in batch]
    assert router.adapter_names(batch) == [route.adapter for route in routes]
    for ids, route in zip(batch, routes, strict=True):
        assert router.route(data.draw(st.permutations(ids))) == route
        assert router.route(ids * 3) == route  # nor does the length count
        assert (route.cluster is None) == (not ids)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("text", TypeError, r"token_ids is a str; expected the integers of one prompt, \(T,\), in \[0, 64\)"),
        (b"text", TypeError, "is a bytes"),
        ({"input_ids": [1]}, TypeError, "is a dict"),
        (UserDict(), TypeError, "is a UserDict"),
        ({1, 2}, TypeError, "is a set of dtype object"),
        (["a", "b"], TypeError, "dtype <U1"),
        ([1.0, 2.0], TypeError, "is a list of dtype float64"),
        (torch.tensor([1.0]), TypeError, "is a Tensor of dtype float32"),
        ([True, False], TypeError, "dtype bool"),
        ([None], TypeError, "dtype object"),
        ([10**30], TypeError, "dtype object"),
        ([[1, 2], [3]], TypeError, "is a list that is no array"),
        (torch.ones(2, requires_grad=True), TypeError, "is a Tensor that is no array.*detach"),
        ([[1, 2]], ValueError, r"shape \(1, 2\)"),
        (np.ones((0, 3), int), ValueError, r"shape \(0, 3\)"),
        (5, ValueError, r"shape \(\)"),
        ([1, 64], ValueError, r"token_ids holds 64 at position 1; .*in \[0, 64\)\. Leave padding out"),
        ([1, 2, -100], ValueError, "holds -100 at position 2"),
        (np.array([2**64 - 1], np.uint64), ValueError, "holds 18446744073709551615"),
    ],
)
def test_wrong_tokens_are_refused(tokens, wrong, error, message):
    _, router = tokens
    with pytest.raises(error, match=message):
        router.route(wrong)
    with pytest.raises(error, match=message.replace("token_ids", r"token_ids\[1\]")):
        router.adapter_names([[1, 2], wrong])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("text", TypeError, r"embedding is a str; expected the numbers of one embedding, \(d,\) = \(5,\)"),
        ([True] * 5, TypeError, "dtype bool"),
        ([1j] * 5, TypeError, "dtype complex128"),
        (["1"] * 5, TypeError, "dtype <U1"),
        (torch.ones(5, requires_grad=True), TypeError, "no array"),
        (np.ones((1, 5)), ValueError, r"shape \(1, 5\)"),
        (3.0, ValueError, r"shape \(\)"),
        ([], ValueError, r"shape \(0,\)"),
        (np.ones(4), ValueError, r"shape \(4,\); .*\(5,\)"),
        ([1, 2, 3, 4, float("nan")], ValueError, "NaN, infinity or too large"),
        ([1, 2, 3, 4, float("-inf")], ValueError, "NaN, infinity or too large"),
        ([1, 2, 3, 4, 1e39], ValueError, "too large a number.*finite in float32"),
    ],
)
def test_wrong_embeddings_are_refused(external, wrong, error, message):
    with pytest.raises(error, match=message):
        external[1].route(embedding=wrong)


def test_arguments_that_are_missing_too_many_or_of_another_encoder(tokens, external):
    with pytest.raises(TypeError, match="got neither of token_ids and embedding"):
        tokens[1].route()
    with pytest.raises(TypeError, match="got both of token_ids and embedding"):
        tokens[1].route([1], embedding=[1.0])
    for wrong in ("text", {"input_ids": [[1]]}):
        with pytest.raises(TypeError, match="expected a list of prompts"):
            tokens[1].adapter_names(wrong)
    with pytest.raises(ValueError, match=r"token_ids\[0\] has shape \(\)"):
        tokens[1].adapter_names([1, 2])
    for call, wrong in ((external[1].route, [1]), (external[1].route, []), (external[1].adapter_names, [[]])):
        with pytest.raises(ValueError, match=r"prior_encoder='external'.*route\(embedding="):
            call(wrong)


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def described_by(**changes):
    def change(folder):
        now = {**json.loads((folder / "router.json").read_text()), **changes}
        (folder / "router.json").write_text(json.dumps({key: value for key, value in now.items() if value != "gone"}))

    return change


MARKERS = {"before": [1, 2], "after": [5], "assistant": [0]}


def chatting(**changes):
    """A folder with chat markers, but for these changes."""
    return described_by(**{"version": 2, "chat_markers": MARKERS, "prior_scope": "answer", **changes})


TENSORS = {
    "centroids": np.eye(2, 3, dtype=np.float32),
    "mean": np.ones(3, np.float32),
    "token_scores": np.ones((6, 2), np.float32),
}


def holding(**changes):
    def change(folder):
        now = {name: tensor for name, tensor in {**TENSORS, **changes}.items() if tensor is not None}
        save_file(now, folder / "router.safetensors")

    return change


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def bfloat16(folder):
    tensors = {name: torch.from_numpy(tensor) for name, tensor in TENSORS.items()}
    save_torch_file({**tensors, "mean": tensors["mean"].bfloat16()}, folder / "router.safetensors")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n"
JSON, SAFE = "router.json", "router.safetensors"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            shutil.rmtree,
            FileNotFoundError,
            r"There is no .*out on this machine. .* peft_trex.save_trex_as_lora, per_cluster=True",
        ),
        (lambda folder: (folder / JSON).unlink(), FileNotFoundError, "There is no .*/router.json .*per_cluster=True"),
        (lambda folder: (folder / SAFE).unlink(), FileNotFoundError, "There is no .*/router.safetensors "),
        *((cut(SAFE, size), ValueError, "router.safetensors is damaged .*restore it") for size in (0, 4, 60, 200, -1)),
        (put(SAFE, LFS), ValueError, "router.safetensors is damaged"),
        *((cut(JSON, size), ValueError, "router.json is damaged .*restore it") for size in (0, 1, 40, -1)),
        (put(JSON, b"\xff\xfe\x00"), ValueError, "router.json is damaged"),
        (put(JSON, b"[]"), ValueError, "a list at the top; expected an object"),
        (
            put(JSON, b"[" * 10**5 + b"]" * 10**5),
            ValueError,
            "router.json is damaged .*more than 100 lists and objects",
        ),
        (put(JSON, b"{}" + b" " * 2**24), ValueError, "router.json is damaged .too large"),
        *(
            (described_by(version=wrong), ValueError, f"version {told}; expected version 1 or 2, .* a newer peft-trex")
            for wrong, told in ((3, "3"), (True, "True"), ("1", "'1'"), ("gone", "None"))
        ),
        (described_by(prior_scope="all"), ValueError, r"prior_scope='all'; expected one of \('prompt', 'answer'\)"),
        (described_by(prior_scope=None), ValueError, "prior_scope=None; expected one of"),
        (described_by(chat_markers=MARKERS), ValueError, "version 1 with chat_markers=.*; expected them in version 2"),
        (chatting(prior_scope="gone"), ValueError, "prior_scope=None; expected one of"),
        (chatting(prior_scope=["prompt"]), ValueError, r"prior_scope=\['prompt'\]; expected one of"),
        *(
            (chatting(chat_markers=wrong), ValueError, "chat_markers=.*; expected .* token ids before, after, assist")
            for wrong in ("gone", None, False, [], {}, [1], "user", {**MARKERS, "system": [1]}, {"before": [1]})
        ),
        *(
            (chatting(chat_markers={**MARKERS, name: wrong}), ValueError, "chat_markers=.*; expected .* token ids")
            for name in MARKERS
            for wrong in (None, 3, "3", {"3": 1}, [-1], [1.0], ["1"], [True], [None], [[1]])
        ),
        *(
            (chatting(chat_markers={**MARKERS, name: []}), ValueError, "only the last may be empty")
            for name in ("before", "after")
        ),
        *(
            (
                chatting(chat_markers={**MARKERS, name: [1, wrong]}),
                ValueError,
                f"{JSON} has the token id {wrong} in ch",
            )
            for name in MARKERS
            for wrong in (6, 2**70)
        ),
        (described_by(prior_encoder="bert"), ValueError, "prior_encoder='bert'; expected one of .*'input_embeddings'"),
        (described_by(adapters="gone"), ValueError, "adapters=None; expected an object"),
        (described_by(adapters={}), ValueError, r"adapters=\{\}"),
        (described_by(adapters=["overall"]), ValueError, r"adapters=\['overall'\]"),
        *(
            (described_by(adapters={"overall": where}), ValueError, "for the adapter 'overall'; expected a relative")
            for where in (3, None, "/etc", "../else", "a/../../b")
        ),
        (described_by(default="gone"), ValueError, "None as default or in clusters; expected one of its adapters"),
        (described_by(default="other"), ValueError, "'other' as default"),
        (described_by(clusters="gone"), ValueError, "clusters=None; expected a list"),
        (described_by(clusters=[]), ValueError, r"clusters=\[\]"),
        (described_by(clusters=["cluster_00", "cluster_07"]), ValueError, r"'cluster_07' .*\['cluster_00', 'cl"),
        (described_by(clusters=["cluster_00", ["cluster_01"]]), ValueError, r"\['cluster_01'\] as default or in clus"),
        (described_by(clusters=["cluster_00"]), ValueError, r"shapes .*\(2, 3\).*expected .*K = 1 clusters as in"),
        (described_by(prior_encoder="external"), ValueError, "the tensors .*'token_scores'.*; expected"),
        (
            holding(token_scores=None),
            ValueError,
            r"tensors \['centroids', 'mean'\]; expected .*token_scores \(V, K\)",
        ),
        (holding(lora_A=ones(2)), ValueError, "the tensors .*'lora_A'"),
        (holding(mean=ones(3, dtype=np.float64)), ValueError, r"dtypes \['F32', 'F64', 'F32'\]; expected the float32"),
        (bfloat16, ValueError, "dtypes .*'BF16'"),
        (holding(mean=ones(4)), ValueError, r"the shapes .*\(4,\)"),
        (holding(mean=ones(1, 3)), ValueError, r"the shapes .*\(1, 3\)"),
        (holding(mean=ones()), ValueError, r"the shapes"),
        (holding(mean=ones(0), centroids=ones(2, 0)), ValueError, r"the shapes"),
        (holding(centroids=ones(3, 3)), ValueError, r"the shapes .*K = 2 clusters"),
        (holding(centroids=ones(3)), ValueError, r"the shapes"),
        (holding(token_scores=ones(6, 3)), ValueError, r"the shapes .*\(6, 3\)"),
        (holding(token_scores=ones(2)), ValueError, r"the shapes"),
        (holding(token_scores=ones(0, 2)), ValueError, r"the shapes"),
        *(
            (holding(**{name: np.full_like(TENSORS[name], wrong)}), ValueError, f"NaN or infinity in {name}")
            for name in TENSORS
            for wrong in ("nan", "inf")
        ),
    ],
)
def test_folders_that_are_refused(tmp_path, damage, error, message):
    folder = write(tmp_path / "out", described(2, "input_embeddings"), TENSORS)
    SemanticRouter.from_pretrained(folder)
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        SemanticRouter.from_pretrained(folder)
    assert str(folder) in str(caught.value) and "peft_trex" in str(caught.value)


@pytest.mark.parametrize("markers", [MARKERS, {**MARKERS, "assistant": []}])
@pytest.mark.parametrize("encoder", ["input_embeddings", "external"])
def test_folders_with_markers(tmp_path, encoder, markers):
    tensors = {name: TENSORS[name] for name in TENSORS if encoder == "input_embeddings" or name != "token_scores"}
    folder = write(tmp_path / "out", described(2, encoder), tensors)
    chatting(chat_markers=markers)(folder)
    router = SemanticRouter.from_pretrained(folder)
    assert router.chat_markers == markers and router.prior_scope == "answer"
    # Without a table of tokens nothing says how many there are, and nothing asks for the markers.
    chatting(chat_markers={**markers, "before": [2**70]})(folder)
    if encoder == "external":
        assert SemanticRouter.from_pretrained(folder).route(embedding=[1, 2, 3]).cluster == 1
    else:
        with pytest.raises(ValueError, match="token id"):
            SemanticRouter.from_pretrained(folder)


def unhashed(folder):
    """An export as it was before there were hashes, which may be changed."""
    (folder / "SHA256SUMS").unlink()
    described_by(hashes="gone")(folder)
    return folder


def hidden(folder):
    """What git, the hub and its client leave beside the files."""
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "README.txt").write_text("kept")
    (folder / ".gitattributes").write_text("* -text")
    (folder / "README.md").write_text("# A card")


@pytest.fixture(scope="module")
def hashed(tmp_path_factory):
    return export(adapted(), tmp_path_factory.mktemp("hashed") / "out")


def flip(name):
    def change(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *(
            (flip(name), ValueError, f"{name} has changed since the export; expected the files that SHA256SUMS lists")
            for name in (SAFE, JSON, "adapter_config.json", "cluster_02/adapter_model.safetensors")
        ),
        (cut("cluster_01/adapter_model.safetensors", -1), ValueError, "cluster_01/.* has changed"),
        (put("semantic_router.py", b"print('ran')"), ValueError, "semantic_router.py has changed since the export"),
        (put("cluster_00/adapter_model.bin", b""), ValueError, "cluster_00/adapter_model.bin has been added"),
        (
            lambda folder: (folder / "cluster_03" / "adapter_config.json").unlink(),
            FileNotFoundError,
            "no .*cluster_03/",
        ),
        (lambda folder: shutil.rmtree(folder / "cluster_03"), FileNotFoundError, "cluster_03.*give adapters=False"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), ValueError, "expected the file SHA256SUMS beside it"),
        (put("SHA256SUMS", b"\xff"), ValueError, "SHA256SUMS is damaged"),
        (put("SHA256SUMS", b"0 one space"), ValueError, "SHA256SUMS is damaged"),
        (put("SHA256SUMS", b""), ValueError, "has been added since the export"),
    ],
)
def test_a_changed_missing_or_added_file_is_named(tmp_path, hashed, change, error, message):
    folder = shutil.copytree(hashed, tmp_path / "out")
    hidden(folder)
    SemanticRouter.from_pretrained(folder)
    change(folder)
    with pytest.raises(error, match=message) as caught:
        SemanticRouter.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_the_adapters_may_lie_elsewhere(tmp_path, hashed):
    for name in (JSON, SAFE, "SHA256SUMS"):
        shutil.copy(hashed / name, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json here, which SHA256SUMS lists"):
        SemanticRouter.from_pretrained(tmp_path)
    router = SemanticRouter.from_pretrained(tmp_path, adapters=False)
    assert router.adapters["cluster_01"] == tmp_path / "cluster_01"
    flip(SAFE)(tmp_path)
    with pytest.raises(ValueError, match=f"{SAFE} has changed"):
        SemanticRouter.from_pretrained(tmp_path, adapters=False)


def test_a_folder_without_hashes_is_read_as_ever(tmp_path, hashed):
    folder = unhashed(shutil.copytree(hashed, tmp_path / "out"))
    (folder / "added").write_text("later")
    router, prompts = SemanticRouter.from_pretrained(folder), random_prompts(40)
    assert router.adapter_names(prompts) == SemanticRouter.from_pretrained(hashed).adapter_names(prompts)


# Runs where there is neither torch nor PEFT, on any Python: the file of the package, loaded by its path.
LONE = """
import importlib.util, json, sys
from pathlib import Path
code, folder, asked = map(Path, sys.argv[1:])
spec = importlib.util.spec_from_file_location("semantic_router", code)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
router = module.SemanticRouter.from_pretrained(folder)
prompts = json.loads(asked.read_text())
routes = [router.route(ids) for ids in prompts]
assert router.adapter_names(prompts) == [route.adapter for route in routes]
for wrong in ("text", [1.5], [-1], [[1]], [[1], [2, 3]]):
    try:
        router.route(wrong)
    except (TypeError, ValueError) as error:
        assert "expected the integers of one prompt" in str(error)
    else:
        raise AssertionError(wrong)
(folder / "router.safetensors").write_bytes((folder / "router.safetensors").read_bytes()[:-1])
try:
    module.SemanticRouter.from_pretrained(folder)
except ValueError as error:
    assert ("has changed" if (folder / "SHA256SUMS").exists() else "is damaged") in str(error)
else:
    raise AssertionError("a file that was cut short was read")
loaded = sorted({"torch", "peft", "transformers", "peft_trex"} & set(sys.modules))
print(json.dumps({"python": sys.version_info[:2], "loaded": loaded, "routes": routes}))
"""


def run_lone_file(python, folder, model, chat):
    """Have the lone file route as the model does in an interpreter of its own, which is returned."""
    export(model, folder)
    prompts = [ids.tolist() for ids in random_prompts(60)]
    expected = [Route(None, "overall"), *(model_route(model, input_ids=torch.tensor([ids]))[0] for ids in prompts)]
    prompts = [[], *prompts]
    if chat:
        # The same prompts as a chat's last messages; no message holds a marker as long as these.
        before, after, header = [1, 2, 3], [5, 4, 3], [0]
        chatting(chat_markers={"before": before, "after": after, "assistant": header})(unhashed(folder))
        former = [7, 8, *before, 9, *after, *header, 10]
        prompts = [[*former, *before, *ids, *after, *header] for ids in prompts]
    asked = folder.with_name("prompts.json")
    asked.write_text(json.dumps(prompts))
    command = [str(python), "-c", LONE, semantic_router.__file__, str(folder), str(asked)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["loaded"] == []
    assert [Route(*route) for route in told["routes"]] == expected
    return tuple(told["python"])


@pytest.mark.parametrize("chat", [False, True])
def test_the_lone_file_loads_neither_torch_nor_peft(tmp_path, tokens, chat):
    assert run_lone_file(sys.executable, tmp_path / "out", tokens[0], chat) == sys.version_info[:2]


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """Makes an interpreter with NumPy and safetensors only, once for each version; or says why there is none."""

    @functools.cache
    def make(version):
        folder = tmp_path_factory.mktemp("venv")
        python = folder / "bin" / "python"
        for command in (
            [EVERY_PYTHON[version], "-m", "venv", folder],
            [python, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "numpy", "safetensors"],
        ):
            made = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if made.returncode:
                return None, made.stderr.strip()[-300:]
        without = subprocess.run([python, "-c", "import torch"], capture_output=True)
        assert without.returncode  # so that the file cannot lean on it
        return python, ""

    return make


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("version", sorted(EVERY_PYTHON))
def test_the_lone_file_on_every_python(tmp_path, tokens, version, chat, bare_python):
    python, why = bare_python(version)
    if python is None:
        pytest.skip(f"numpy and safetensors are not to be had for Python {version}: {why}")
    assert str(run_lone_file(python, tmp_path / "out", tokens[0], chat)) == version
