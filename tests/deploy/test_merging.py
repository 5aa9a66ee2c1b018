"""calibrate_trex_merge: the best static weights by another road, what they miss as measured, nothing else changed."""

import copy
import warnings

import pytest
import torch
from conftest import (
    adapted,
    answered,
    batches,
    exact_model,
    make_llama,
    make_t5,
    padded,
    padded_data,
    prompts,
    randomize,
    some_embeddings,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from peft_trex import TRexConfig, TRexLayer, calibrate_trex_merge, initialize_trex_prior
from peft_trex.deploy import calibration as merging
from peft_trex.deploy.moments import RIDGE, Moments

CLUSTERS = 4
VARIANTS = {
    "grid": {},
    "more in than out": {"r_a": 4},
    "identity map": {"num_clusters": 6},
    "paired": {"expert_layout": "paired", "r_a": 3, "num_clusters": 3},
    "reduced router": {"router_rank": 2},
    "no prior": {"use_prior": False},
    "no router": {"use_router": False},
    "gpt2": {"kind": "gpt2"},
    "t5": {"kind": "t5"},
    "external": {"prior_encoder": "external", "prior_dim": 5},
}


def _layers(model):
    return {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, TRexLayer)}


def _statics(model, adapter_name="default"):
    return {
        name: layer.trex_static[adapter_name].clone()
        for name, layer in _layers(model).items()
        if adapter_name in layer.trex_static
    }


def _same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def _record(model, data):
    """For each layer: its tokens' inputs (N, D_in), what the adapter adds (N, D_out), the prompts' clusters (N,)."""
    found = {name: [] for name in _layers(model)}
    prior = model.base_model.prior_of("default")
    state = {}

    def watch(name):
        def hook(layer, args, output):
            decodes = name.startswith("decoder") and not name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
            kept = state["batch"]["decoder_attention_mask" if decodes else "attention_mask"].bool()
            clusters = state["clusters"][:, None].expand(kept.shape)
            found[name].append((args[0][kept], (output - layer.base_layer(args[0]))[kept], clusters[kept]))

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in _layers(model).items()]
    for batch in data:
        state["batch"] = batch
        state["clusters"] = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
        if prior is not None:
            mask = batch["attention_mask"][..., None]
            means = (model.get_input_embeddings()(batch["input_ids"]) * mask).sum(1) / mask.sum(1)
            centred = batch.get("semantic_embeds", means) - prior.mean
            state["clusters"] = F.cosine_similarity(centred[:, None], prior.centroids[None], dim=-1).argmax(-1)
            state["clusters"][~centred.any(-1)] = len(prior.centroids)  # nothing to go by
        model(**batch)
    for handle in handles:
        handle.remove()
    return {name: [torch.cat(part) for part in zip(*parts, strict=True)] for name, parts in found.items()}


def _least_squares(*rows):
    """W (D_out, n) with `W z ~ y` over all rows of z (N, n) and y (N, D_out)."""
    z, y = (torch.cat(part) for part in zip(*rows, strict=True))
    return torch.linalg.lstsq(z, y, driver="gelsd").solution.T


def _pulled(z, share, towards):
    """Rows that pull a solution towards another one, with a weight that is a share of the mean square of z."""
    pull = (share * (z.T @ z).diagonal().mean()).sqrt() * torch.eye(z.shape[1], dtype=z.dtype)
    return pull, pull @ towards.T


def _missed(x, y, delta):
    return (y - x @ delta.T).square().sum().item()


@pytest.mark.parametrize("fit", ["core", "input"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_static_weights_are_the_least_squares_and_errors_are_those_measured(variant, fit):
    model = exact_model(**VARIANTS[variant])
    data = padded_data(VARIANTS[variant].get("kind"), variant == "external")
    per_cluster = variant != "no prior"
    if variant == "external":
        data[0]["semantic_embeds"][2] = model.base_model.prior_of("default").mean
    layers, recorded = _layers(model), _record(model, data)
    means = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    report = calibrate_trex_merge(model, data, per_cluster=per_cluster, fit=fit, progress=False)
    clusters = model.peft_config["default"].num_clusters if per_cluster else 0
    totals = torch.zeros(4, dtype=torch.float64)
    for name, layer in layers.items():
        x, y, cluster = recorded[name]
        A = layer.trex_A["default"].data
        mean, static = means[name], layer.get_delta_weight("default")
        if layer.fan_in_fan_out:
            mean, static = mean.T, static.T
        a = x @ A.T
        core = _least_squares((a, y))
        z, best, into = a, core, A
        if fit == "input":
            z, into = x, torch.eye(x.shape[1], dtype=x.dtype)
            best = _least_squares((x, y), _pulled(x, RIDGE[fit], core @ A))
        torch.testing.assert_close(static, best @ into, rtol=1e-4, atol=1e-5 * y.std().item())
        missed = y.new_zeros(4)
        missed[0], missed[1], missed[2] = y.square().sum(), _missed(x, y, static), _missed(x, y, mean)
        assert report.layers[name] == pytest.approx(missed[1].item() / missed[0].item(), rel=1e-3, abs=1e-9)
        few, r_a = (z.shape[1] / len(z)) ** 0.5, len(A)
        for index in range(clusters):
            own = cluster == index
            down, up = layer.static_factors("default", {index: 1.0})
            towards = best
            if fit == "input":
                # The cluster is drawn to its own best core where that misses less than the weights of all tokens.
                pull = (r_a / len(a)) ** 0.5 * a
                own_core = _least_squares((a[own], y[own]), (pull, pull @ core.T), _pulled(a, RIDGE["core"], core)) @ A
                towards = min((best, own_core), key=lambda delta: _missed(x[own], y[own], delta))
            expected = _least_squares(
                (z[own], y[own]), (few * z, few * z @ towards.T), _pulled(z, RIDGE[fit], towards)
            )
            torch.testing.assert_close(up @ down, expected @ into, rtol=1e-4, atol=1e-5 * y.std().item())
            missed[3] += _missed(x[own], y[own], up @ down)
            assert len(down) <= min(up.shape[1], 3)
        missed[3] += _missed(x[cluster == clusters], y[cluster == clusters], static)
        assert layer.trex_static["default"].shape[0] == 1 + clusters
        totals += missed
    assert report.error == pytest.approx((totals[1] / totals[0]).item(), rel=1e-3, abs=1e-9)
    assert report.mean_routing_error == pytest.approx((totals[2] / totals[0]).item(), rel=1e-3)
    assert report.error <= report.mean_routing_error
    assert report.tokens == max(len(x) for x, _, _ in recorded.values())
    assert set(report.layers) == set(layers) and report.fits == dict.fromkeys(layers, fit)
    assert ("clusters" in str(report)) is per_cluster and f"{report.error:.2%}" in str(report)
    if not per_cluster:
        assert report.cluster_error is None and report.cluster_tokens == ()
        return
    assert report.cluster_error == pytest.approx((totals[3] / totals[0]).item(), rel=1e-3, abs=1e-9)
    assert report.cluster_error < report.error or variant == "t5"
    longest = max(recorded.values(), key=lambda parts: len(parts[0]))[2]
    assert report.cluster_tokens == tuple(torch.bincount(longest, minlength=clusters).tolist()[:clusters])


@pytest.mark.parametrize("fit", ["core", "input"])
def test_what_does_not_depend_on_its_input_is_merged_exactly(fit):
    model = adapted(fit=False, prior_encoder="external", prior_dim=5, use_router=False)
    initialize_trex_prior(model, embeddings=some_embeddings(40), progress=False)
    one = some_embeddings(1).expand(8, 5)
    report = calibrate_trex_merge(model, [{**batch, "semantic_embeds": one} for batch in batches()], fit=fit)
    assert report.error < 1e-6 < 0.01 < report.mean_routing_error
    expected = model(**batches(seed=7)[0], semantic_embeds=one).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batches(seed=7)[0]).logits, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("fit", ["core", "input"])
def test_padding_and_company_do_not_change_the_static_weights(fit):
    ids, found = prompts(24), []
    sizes = {"right": 24, "left": 24, "left ": 5}
    for side, size in sizes.items():
        model = exact_model()
        whole = padded(ids, side.strip(), 9 + len(found))
        loader = [
            dict(zip(whole, part, strict=True)) for part in zip(*(t.split(size) for t in whole.values()), strict=True)
        ]
        calibrate_trex_merge(model, loader, per_cluster=True, fit=fit, progress=False)
        found.append(_statics(model))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("filling", [0, 5])
def test_packed_rows_count_like_rows_of_their_own(filling):
    ids, models = prompts(12), [exact_model(), exact_model()]
    positions = torch.cat([torch.arange(9).repeat(3), torch.zeros(filling, dtype=torch.long)]).expand(4, -1)
    flat = F.pad(ids.reshape(4, 27), (0, filling))
    packed = {"input_ids": flat, "position_ids": positions, "use_cache": False}
    reports = [
        calibrate_trex_merge(model, [batch], per_cluster=True, progress=False)
        for model, batch in zip(models, ({"input_ids": ids}, packed), strict=True)
    ]
    torch.testing.assert_close(_statics(models[1]), _statics(models[0]), rtol=1e-4, atol=1e-5)
    assert reports[1].cluster_tokens == reports[0].cluster_tokens
    assert reports[1].error == pytest.approx(reports[0].error, rel=1e-6)


def test_only_the_prompt_decides_the_cluster_when_labels_mark_the_answer():
    model, batch = adapted(), answered(8)
    report = calibrate_trex_merge(model, [batch], per_cluster=True, progress=False)
    prior = model.base_model.prior_of("default")
    clusters = prior.score(model.get_input_embeddings()(batch["input_ids"][:, :5]).mean(1)).argmax(-1)
    assert report.cluster_tokens == tuple((9 * torch.bincount(clusters, minlength=CLUSTERS)).tolist())


@pytest.mark.parametrize("given_as", ["decoder_attention_mask", "labels"])
def test_an_encoders_padding_is_not_the_decoders(given_as):
    model = adapted("t5", base=make_t5())
    ids = prompts(16)
    read, answer = (torch.arange(9) < 4).long().expand(16, -1), (torch.arange(9) < 7).long().expand(16, -1)
    given = {"decoder_input_ids": ids, given_as: answer}
    if given_as == "labels":
        given = {"labels": ids.masked_fill(answer == 0, -100)}
    batch = {"input_ids": ids, "attention_mask": read, **given}
    assert calibrate_trex_merge(model, [batch], progress=False).tokens == 16 * 7
    apart = {
        key: F.pad(part, (0, 1)) if "input_ids" in key or key.startswith("att") else part
        for key, part in batch.items()
    }
    if given_as == "labels":
        statics = _statics(model)
        calibrate_trex_merge(model, [apart], progress=False)
        torch.testing.assert_close(_statics(model), statics, rtol=1e-3, atol=1e-4)


class _Counted(list):
    """Batches, with the number of times that they are read from the beginning."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def _watched(monkeypatch):
    """The moments of every layer that is solved, by its name, in the order of the calls."""
    seen, solve = [], merging._solve
    monkeypatch.setattr(merging, "_solve", lambda *args: seen.append((args[0], args[3])) or solve(*args))
    return seen


def test_moments_do_not_grow_with_the_data(monkeypatch):
    seen, model = _watched(monkeypatch), adapted()
    for count in (8, 32):
        calibrate_trex_merge(model, batches(count), per_cluster=True, fit="core", progress=False)
    for _, (core, wide) in seen:
        shapes = [tuple(part.shape) for part in (core.zz, core.mz, core.mm)]
        assert shapes == [(1 + CLUSTERS, 2, 2), (1 + CLUSTERS, 3, 2), (1 + CLUSTERS, 3, 3)] and wide is None


# Of a block's seven layers, q, k and v share an input of 32 entries, gate and up another; o has its own, down has 48.
INPUT, SHARED = 32**2 * 8, 3 * 32 * 8
BLOCK = 3 * INPUT + 6 * SHARED + 48**2 * 8 + 3 * 48 * 8


def test_layers_that_read_the_same_tensor_share_its_moments(monkeypatch):
    seen, model = _watched(monkeypatch), exact_model()
    calibrate_trex_merge(model, batches(), fit="input", per_cluster=True, progress=False)
    shared, moments = _statics(model), {name: wide.moments.zz for name, (_, wide) in seen}
    for block in range(2):
        at = f"model.layers.{block}."
        q, k, v, o = (moments[f"{at}self_attn.{name}_proj"] for name in "qkvo")
        gate, up = (moments[f"{at}mlp.{name}_proj"] for name in ("gate", "up"))
        assert q is k is v and gate is up and q is not o and q is not gate
    # A tensor of its own for each layer, of the same numbers, gives the same weights.
    for layer in _layers(model).values():
        layer.register_forward_pre_hook(lambda layer, args: (args[0].clone(),))
    calibrate_trex_merge(model, batches(), fit="input", per_cluster=True, progress=False)
    assert len({id(wide.moments.zz) for _, (_, wide) in seen[14:]}) == 14
    torch.testing.assert_close(_statics(model), shared, rtol=1e-9, atol=1e-12)


def test_what_was_shared_once_and_changes_later_is_not_taken_for_the_same(monkeypatch):
    found = []
    for copies in (False, True):
        seen, model = _watched(monkeypatch), exact_model(target_modules=["q_proj", "k_proj", "v_proj"])
        calls = []

        def change(layer, args, calls=calls, copies=copies):
            calls.append(1)
            # k reads what q read in the first batch, and that changed in place in the later ones.
            if len(calls) > 2:
                args[0].mul_(0.5)
            return (args[0].clone(),) if copies else None

        for name, layer in _layers(model).items():
            if name.endswith("k_proj"):
                layer.register_forward_pre_hook(change)
        calibrate_trex_merge(model, batches(), fit="input", progress=False)
        found.append({name: wide.moments.zz for name, (_, wide) in seen})
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    layers = [f"model.layers.0.self_attn.{name}_proj" for name in "qk"]
    assert not torch.allclose(*(found[0][name] for name in layers), rtol=0.1)


def test_a_model_in_inference_mode_tells_no_changes_and_shares_nothing(monkeypatch):
    seen, model = _watched(monkeypatch), exact_model()
    with torch.inference_mode():
        calibrate_trex_merge(model, batches(), fit="input", progress=False)
    assert len({id(wide.moments.zz) for _, (_, wide) in seen}) == 14
    inferred = {name: static.clone() for name, static in _statics(model).items()}
    calibrate_trex_merge(model, batches(), fit="input", progress=False)
    torch.testing.assert_close(inferred, _statics(model), rtol=1e-9, atol=1e-12)


def test_little_memory_reads_the_data_again_and_changes_nothing():
    model = exact_model()
    calibrate_trex_merge(model, batches(), fit="input", per_cluster=True, progress=False)
    whole, data = _statics(model), _Counted(batches())
    settings = {"fit": "input", "per_cluster": True, "memory_gb": (1 + CLUSTERS) * BLOCK / 2**30, "progress": False}
    report = calibrate_trex_merge(model, data, **settings)
    # One batch tells what is shared; then each block's moments have room.
    assert data.passes == 1 + 2 and len(report.layers) == 14
    torch.testing.assert_close(_statics(model), whole, rtol=1e-9, atol=1e-12)
    calibrate_trex_merge(model, iter(batches()), **{**settings, "memory_gb": (1 + CLUSTERS) * 2 * BLOCK / 2**30})
    torch.testing.assert_close(_statics(model), whole, rtol=1e-9, atol=1e-12)


def test_auto_takes_the_input_where_memory_and_tokens_do():
    model, data = exact_model(), _Counted(batches(128))
    found = {}
    for fit in ("core", "input"):
        calibrate_trex_merge(model, data, fit=fit, progress=False)
        found[fit] = _statics(model)
    # There are 1152 tokens: twenty for each of 32 and of 48 entries. All fits, and nothing has to be found out before.
    data.passes = 0
    report = calibrate_trex_merge(model, data, progress=False)
    assert set(report.fits.values()) == {"input"} and data.passes == 1 and "(input, 1152 tokens)" in str(report)
    assert _same(_statics(model), found["input"])
    # With room for all but the widest inputs, and read once, as an iterator can be.
    widest = {f"model.layers.{block}.mlp.down_proj" for block in range(2)}
    room = {"memory_gb": 2 * (3 * INPUT + 6 * SHARED) / 2**30}
    report = calibrate_trex_merge(model, iter(batches(128)), **room, progress=False)
    assert {name for name, fit in report.fits.items() if fit == "core"} == widest
    assert "(input in 12 layers and core in 2 layers, 1152 tokens)" in str(report)
    expected = {name: found[fit][name] for name, fit in report.fits.items()}
    torch.testing.assert_close(_statics(model), expected, rtol=1e-9, atol=1e-12)
    assert set(calibrate_trex_merge(model, data, memory_gb=0, progress=False).fits.values()) == {"core"}
    assert _same(_statics(model), found["core"])
    # 720 tokens are twenty for each of 32 entries, and fewer for each of 48; 630 are too few for both.
    fits = [calibrate_trex_merge(model, batches(count), progress=False).fits for count in (80, 70)]
    assert {name for name, fit in fits[0].items() if fit == "core"} == widest
    assert set(fits[1].values()) == {"core"}


@pytest.mark.parametrize("fit", ["core", "input"])
def test_as_many_input_vectors_as_inputs(fit):
    model = adapted(r_a=32, target_modules=["q_proj"])
    report = calibrate_trex_merge(model, padded_data(), fit=fit, progress=False)
    for name, (x, y, _) in _record(model, padded_data()).items():
        missed = _missed(x, y, _layers(model)[name].get_delta_weight("default")) / y.square().sum().item()
        assert report.layers[name] == pytest.approx(missed, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 40),
    r_b=st.integers(1, 5),
    tokens=st.integers(0, 60),
    sets=st.integers(1, 4),
    rank=st.integers(1, 40),
    weight=st.floats(-9, 1),
    seed=st.integers(0, 999),
)
def test_a_fit_never_misses_more_than_its_start(n, r_b, tokens, sets, rank, weight, seed):
    torch.manual_seed(seed)
    z = torch.randn(tokens, min(rank, n)).double() @ torch.randn(min(rank, n), n).double()
    m, where = torch.randn(tokens, r_b).double(), torch.randint(sets, (tokens,))
    moments = Moments.zeros(sets, n, r_b, torch.device("cpu"))
    for part in torch.arange(tokens).split(7):
        moments.add(z[part], m[part], where[part])
    start, B = torch.randn(r_b, n).double(), torch.randn(6, r_b).double()
    for index in (None, *range(sets)):
        own = torch.ones_like(where, dtype=torch.bool) if index is None else where == index
        found = moments.of(index)
        torch.testing.assert_close(found.zz, z[own].T @ z[own])
        torch.testing.assert_close(found.mz, m[own].T @ z[own])
        torch.testing.assert_close(found.mm, m[own].T @ m[own])
        assert found.tokens == own.sum()
        best = found.solve(start, 10**weight * torch.eye(n, dtype=torch.float64))
        before, after = found.missed(start, B.T @ B), found.missed(best, B.T @ B)
        assert after <= before * (1 + 1e-6) + 1e-6
        assert before == pytest.approx(((m[own] - z[own] @ start.T) @ B.T).square().sum().item(), rel=1e-6, abs=1e-6)
        if not own.any():
            torch.testing.assert_close(best, start)


def _silent(function, *args, **kwargs):
    """Calls it where any warning is an error, but that the batches are prompts alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="A forward got neither labels")
        return function(*args, **kwargs)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merging_takes_the_calibrated_weights_and_warns_without_them(kind):
    model = adapted(kind)
    for function in (model.merge_adapter, lambda: convert_to_lora(model, 3)):
        with pytest.warns(
            UserWarning, match=r"approximately.* 38 % .*calibrate_trex_merge\(model, dataloader\).*79 %"
        ):
            function()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        calibrate_trex_merge(model, batches(), progress=False)
    model.unmerge_adapter()
    calibrate_trex_merge(model, batches(), progress=False)
    before = {name: layer.base_layer.weight.clone() for name, layer in _layers(model).items()}
    deltas = {name: layer.get_delta_weight("default") for name, layer in _layers(model).items()}
    assert not any(delta.requires_grad for delta in deltas.values())
    _, lora = _silent(convert_to_lora, model, 3)
    for name, delta in deltas.items():
        A, B = (lora[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        expected = delta.T if kind == "gpt2" else delta
        torch.testing.assert_close(B @ A, expected, atol=1e-4, rtol=1e-4)
    _silent(model.merge_adapter)
    for name, layer in _layers(model).items():
        torch.testing.assert_close(layer.base_layer.weight, before[name] + deltas[name])
    _silent(model.unmerge_adapter)
    for name, layer in _layers(model).items():
        torch.testing.assert_close(layer.base_layer.weight, before[name], atol=1e-5, rtol=1e-5)
    merged = dict(_silent(model.merge_and_unload).named_modules())
    for name, delta in deltas.items():
        torch.testing.assert_close(merged[name].weight, before[name] + delta, atol=1e-5, rtol=1e-5)


def _two(other=("q_proj",), **kwargs):
    """A model with the active adapter "default", calibrated, and "other", which is not."""
    model = adapted(target_modules=["q_proj"], **kwargs)
    calibrate_trex_merge(model, batches(), progress=False)
    config = {"r_a": 2, "r_b": 3, "num_clusters": 4, "task_type": "CAUSAL_LM", "target_modules": list(other)}
    model.add_adapter("other", TRexConfig(**config))
    initialize_trex_prior(randomize(model, "other"), batches(), adapter_name="other", progress=False)
    return model.eval()


def test_the_adapters_that_are_merged_are_looked_at_not_the_active_ones():
    model = _two()
    with pytest.warns(UserWarning, match="approximately"):
        model.merge_adapter(adapter_names=["other"])
    model.unmerge_adapter()
    model.set_adapter("other")
    _silent(model.merge_adapter, adapter_names=["default"])


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
@pytest.mark.parametrize("by_name", [False, True])
def test_merging_into_tied_weights_is_refused(by_name):
    model = _two(["q_proj", "lm_head"], base=make_llama(tie_word_embeddings=True))
    if not by_name:
        model.set_adapter("other")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merges = [model.merge_adapter] if by_name else [model.merge_adapter, model.merge_and_unload]
    for merge in merges:
        with pytest.raises(ValueError, match=r"lm_head is tied to that of model\.embed_tokens"):
            merge(adapter_names=["other"] if by_name else None)
        assert _same(before, model.state_dict())
        assert not any(layer.merged for layer in _layers(model).values())
    model.set_adapter("default")
    model.merge_adapter()


@pytest.mark.parametrize("settings", [{}, {"fit": "input", "per_cluster": True}])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_the_file_carries_the_static_weights(tmp_path, settings, low_cpu_mem_usage):
    model = adapted()
    calibrate_trex_merge(model, batches(), progress=False, **settings)
    statics, folder = _statics(model), tmp_path / "adapter"
    model.save_pretrained(folder)
    names = {f"base_model.model.{name}.trex_static" for name in statics}
    assert names == {name for name in load_file(folder / "adapter_model.safetensors") if "static" in name}
    loaded = PeftModel.from_pretrained(make_llama(), folder, "another", low_cpu_mem_usage=low_cpu_mem_usage)
    assert len(statics) == 14 and _same(_statics(loaded, "another"), statics)
    next_to = adapted()
    next_to.load_adapter(folder, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert _same(_statics(next_to, "second"), statics) and not _statics(next_to)
    for name, layer in _layers(next_to).items():
        assert layer.get_delta_weight("second").equal(_layers(model)[name].get_delta_weight("default"))
    if not low_cpu_mem_usage:  # with which PEFT rounds all of the adapter to bfloat16 on the way
        assert _same(_statics(PeftModel.from_pretrained(make_llama().bfloat16(), folder)), statics)
    adapted().save_pretrained(tmp_path / "plain")
    assert not _statics(PeftModel.from_pretrained(make_llama(), tmp_path / "plain"))
    model.load_adapter(tmp_path / "plain", "default", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not _statics(model)


def _shape(*shape):
    return lambda tensors, key: tensors.update({key: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("trex_static", dict.pop),
        ("trex_B", dict.pop),
        ("trex_static", _shape(5, 3)),
        ("trex_static", _shape(5, 2, 2)),
        ("trex_static", _shape(5, 3, 5)),
        ("trex_static", _shape(4, 3, 2)),
        ("trex_static", _shape(1, 3, 2)),
        ("trex_foreign", _shape(5, 3, 2)),
    ],
    ids=["absent", "another one absent", "two axes", "r_b", "width", "sets", "sets unlike others'", "foreign"],
)
def test_a_damaged_file_is_refused_and_nothing_is_lost(tmp_path, part, damage):
    model = adapted()
    calibrate_trex_merge(model, batches(), per_cluster=True, progress=False)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    damage(tensors, f"base_model.model.model.layers.1.mlp.up_proj.{part}")
    save_file(tensors, file, metadata={"format": "pt"})
    calibrate_trex_merge(model, batches(seed=1), per_cluster=True, progress=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"up_proj.*(damaged|saved for another)"):
        PeftModel.from_pretrained(make_llama(), tmp_path)
    with pytest.raises(ValueError, match=r"up_proj.*(damaged|saved for another)"):
        model.load_adapter(tmp_path, "default")
    assert _same(model.state_dict(), before)


def test_training_drops_them_with_one_warning_and_evaluation_does_not():
    model = _two()
    model.set_adapter("other")
    model.train()
    model.set_requires_grad("default")
    _silent(model, **answered(4)).loss.backward()  # trains the other one
    model.set_adapter("default")
    with torch.no_grad():
        _silent(model, **answered(4))
    _silent(model.eval(), **answered(4))
    model.train().requires_grad_(False)
    _silent(model, **answered(4))
    model.eval().merge_adapter()
    model.train().set_requires_grad("default")
    _silent(model, **answered(4))
    model.unmerge_adapter()
    assert len(_statics(model)) == 2
    with pytest.warns(UserWarning, match="'default' is trained again.*dropped") as caught:
        model(**answered(4))
    assert len(caught) == 1 and not _statics(model)
    _silent(model, **answered(4))


def test_training_drops_loaded_ones_and_calibrating_again_brings_them_back(tmp_path):
    model = adapted()
    calibrate_trex_merge(model, batches(), progress=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True).train()
    with pytest.warns(UserWarning, match="trained again"):
        loaded(**answered(4))
    assert not _statics(loaded)
    calibrate_trex_merge(loaded, batches(), progress=False)
    copied = copy.deepcopy(loaded)
    for again in (loaded, copied):
        with pytest.warns(UserWarning, match="trained again"):
            again(**answered(4))
        assert not _statics(again)


def test_a_new_prior_or_a_new_adapter_has_none():
    model = _two()
    initialize_trex_prior(model, batches(), adapter_name="other", progress=False)
    assert _statics(model)
    initialize_trex_prior(model, batches(seed=1), progress=False)
    assert not _statics(model)
    calibrate_trex_merge(model, batches(), progress=False)
    config = model.peft_config["default"]
    model.delete_adapter("default")
    assert "trex_static" not in str([*model.state_dict()])
    model.add_adapter("default", config)
    assert "trex_static" not in str([*model.state_dict()])


@pytest.mark.filterwarnings("ignore:Already found:UserWarning", "ignore:You are trying to modify:UserWarning")
def test_a_second_tuner_on_the_same_base_model():
    first = adapted(target_modules=["q_proj"])
    calibrate_trex_merge(first, batches(), progress=False)
    config = {"r_a": 2, "r_b": 3, "num_clusters": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    second = get_peft_model(first.base_model.model, TRexConfig(**config), adapter_name="other")
    assert len(_statics(second)) == 2  # the former adapter goes on, and goes stale when it is trained
    second.base_model.set_adapter(["default", "other"])
    initialize_trex_prior(second, batches(), adapter_name="other", progress=False)
    with pytest.warns(UserWarning, match="'default' is trained again"):
        second.train()(**answered(4))
    calibrate_trex_merge(second, batches(), adapter_name="other", progress=False)
    third = get_peft_model(second.base_model.model, TRexConfig(**config), adapter_name="other")  # takes its place
    assert not _statics(third, "other")


def _state(model):
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {
            name: (layer.active_adapters, layer.disable_adapters, layer.merged_adapters[:])
            for name, layer in _layers(model).items()
        },
        (model.active_adapters, model.base_model.active_adapters),
        {name: (len(module._forward_pre_hooks), len(module._forward_hooks)) for name, module in model.named_modules()},
        torch.get_rng_state().tolist(),
    )


class _Interrupted(list):
    def __iter__(self):
        yield self[0]
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("loader", "error"),
    [
        (batches(), None),
        (_Interrupted(batches()), KeyboardInterrupt),
        ([batches()[0], {"input_ids": torch.full((2, 3), 99)}], IndexError),
        ([batches()[0], [1, 2]], TypeError),
    ],
    ids=["done", "interrupted", "failed", "foreign batch"],
)
@pytest.mark.parametrize("calibrated", ["default", "other"])
@pytest.mark.parametrize("disabled", [False, True])
def test_all_else_is_as_it_was(loader, error, calibrated, disabled):
    model = _two(["q_proj", "v_proj"], trex_dropout=0.1)
    calibrate_trex_merge(model, batches(seed=2), adapter_name="other", progress=False)
    model.train()
    model.base_model.model.model.layers[1].eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.trex_A["default"].requires_grad_(False)
    layer.base_layer.weight.requires_grad_(True)
    if disabled:
        model.base_model.disable_adapter_layers()
    loader = (
        loader if error else torch.utils.data.DataLoader([{"input_ids": row} for row in prompts(16)], 4, shuffle=True)
    )
    before, statics = _state(model), [_statics(model, name) for name in ("default", "other")]
    if error is None:
        _silent(calibrate_trex_merge, model, loader, adapter_name=calibrated, per_cluster=True, progress=False)
        changed = [
            not _same(_statics(model, name), old) for name, old in zip(("default", "other"), statics, strict=True)
        ]
        assert changed == [calibrated == "default", calibrated == "other"]
    else:
        with pytest.raises(error):
            calibrate_trex_merge(model, loader, adapter_name=calibrated, progress=False)
        assert all(_same(_statics(model, name), old) for name, old in zip(("default", "other"), statics, strict=True))
    assert _state(model) == before


def test_random_state_is_kept_when_several_passes_are_needed():
    model, state = adapted(), torch.get_rng_state()
    loader = torch.utils.data.DataLoader([{"input_ids": row} for row in prompts(16)], 4, shuffle=True)
    calibrate_trex_merge(model, loader, fit="input", memory_gb=0, progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_adapter_merged_elsewhere_is_refused_and_stays():
    model = _two(["v_proj"])
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="approximately"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        _silent(calibrate_trex_merge, model, batches(), progress=False)
    assert any(layer.merged for layer in _layers(model).values())


def test_max_batches_iterators_and_labels():
    model = adapted()
    assert calibrate_trex_merge(model, iter(batches(32)), max_batches=2, progress=False).tokens == 16 * 9
    first = _statics(model)
    calibrate_trex_merge(model, batches(16), max_batches=99, progress=False)
    assert _same(_statics(model), first)


def test_an_adapter_at_its_start_misses_nothing():
    model = get_peft_model(
        make_llama(), TRexConfig(r_a=2, r_b=3, num_clusters=4, use_prior=False, task_type="CAUSAL_LM")
    )
    report = calibrate_trex_merge(model, batches(), progress=False)
    assert report.error == report.mean_routing_error == 0 and set(report.layers.values()) == {0}


def test_layers_that_were_never_called_keep_the_mean_routing():
    model = adapted("t5")
    expected = {name: layer.get_delta_weight("default") for name, layer in _layers(model).items()}
    encoder = model.base_model.model.encoder
    model.base_model.model.forward = lambda input_ids, **_: encoder(input_ids=input_ids)
    with pytest.warns(UserWarning, match=r"20 adapted layers were never called.* decoder\.block\.0"):
        report = calibrate_trex_merge(model, batches(), progress=False)
    for name, layer in _layers(model).items():
        assert (name in report.layers) is name.startswith("encoder")
        if name not in report.layers:
            torch.testing.assert_close(layer.get_delta_weight("default"), expected[name])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"adapter_name": "absent"}, ValueError, r"no adapter 'absent'; the model has \['default'\]"),
        ({"fit": "x"}, ValueError, "fit='x' is unknown; use one of .*'core', 'leading', 'input'"),
        ({"dataloader": iter(batches()), "fit": "leading"}, ValueError, "reads the data twice.* an iterator"),
        ({"fit": "leading", "memory_gb": 0}, ValueError, "no room for fit='leading'"),
        ({"memory_gb": -1}, ValueError, "memory_gb=-1 must be a finite number of at least 0"),
        ({"memory_gb": "2"}, ValueError, "memory_gb='2'"),
        ({"memory_gb": float("nan")}, ValueError, "memory_gb=nan"),
        ({"max_batches": 0}, ValueError, "max_batches=0 must be a whole number of at least 1, or None"),
        ({"max_batches": True}, ValueError, "max_batches=True"),
        ({"max_batches": "3"}, ValueError, "max_batches='3'"),
        ({"dataloader": []}, ValueError, "no batch"),
        (
            {"dataloader": [{"input_ids": prompts(2), "attention_mask": torch.zeros(2, 9)}]},
            ValueError,
            "no batch with a token",
        ),
        ({"dataloader": [[1, 2]]}, TypeError, "gave a list; expected a mapping"),
        ({"dataloader": [{"input_ids": prompts(1, length=1)}]}, ValueError, r"1 tokens, fewer than .*\(r_a=2\)"),
        (
            {"dataloader": iter(batches()), "fit": "input", "memory_gb": 0},
            ValueError,
            "reads the data 8 times .* an iterator",
        ),
        ({"model": "model"}, TypeError, "model is a str"),
        ({"model": make_llama()}, ValueError, "has no T-REX adapter"),
    ],
)
def test_errors_say_what_to_do_and_store_nothing(change, error, message):
    model = adapted()
    with pytest.raises(error, match=message):
        calibrate_trex_merge(**{"model": model, "dataloader": batches(), "progress": False, **change})
    assert not _statics(model)


@pytest.mark.parametrize("part", ["trex_A", "trex_B", "trex_router", "trex_gate", "trex_omega", "trex_map"])
def test_a_broken_adapter_is_named(part):
    model = adapted()
    calibrate_trex_merge(model, batches(), progress=False)
    before, broken = _statics(model), "model.layers.1.mlp.up_proj"
    getattr(_layers(model)[broken], part)["default"].data[..., 0] = float("nan")
    with pytest.raises(ValueError, match=rf"NaN or infinity came up in the layer {broken}: the adapter 'default'"):
        calibrate_trex_merge(model, batches(), progress=False)
    assert _same(_statics(model), before)


def test_clusters_need_a_fitted_prior():
    for model, found in ((adapted(fit=False), "not fitted"), (adapted(fit=False, use_prior=False), "use_prior=False")):
        with pytest.raises(ValueError, match=f"per_cluster=True goes by the clusters .*{found}"):
            calibrate_trex_merge(model, batches(), per_cluster=True, progress=False)


def test_packed_rows_that_are_embedded_already_may_be_filled_up():
    ids, model = prompts(12), adapted()
    positions = torch.cat([torch.arange(9).repeat(3), torch.zeros(5, dtype=torch.long)]).expand(4, -1)
    embeds = model.get_input_embeddings()(F.pad(ids.reshape(4, 27), (0, 5)))
    batch = {"inputs_embeds": embeds, "position_ids": positions, "use_cache": False}
    assert calibrate_trex_merge(model, [batch], progress=False).tokens == 4 * 27


def test_labels_tell_the_decoders_padding_only_where_no_mask_does():
    model, ids = adapted("t5"), prompts(16)
    mask = (torch.arange(9) < 7).long().expand(16, -1)
    labels = ids.masked_fill(torch.arange(9) >= 8, -100)
    batch = {"input_ids": ids[:, :4], "decoder_attention_mask": mask, "labels": labels}
    assert calibrate_trex_merge(model, [batch], progress=False).tokens == 16 * 7


def test_a_decoder_without_a_mask_has_no_padding():
    model, ids = adapted("t5"), prompts(16)
    batch = {"input_ids": ids, "attention_mask": (torch.arange(9) < 4).long().expand(16, -1), "decoder_input_ids": ids}
    assert calibrate_trex_merge(model, [batch], progress=False).tokens == 16 * 9


def test_nothing_watches_an_encoder_afterwards():
    model = adapted("t5")
    before = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    calibrate_trex_merge(model, [{**batch, "labels": batch["input_ids"]} for batch in batches()], progress=False)
    assert before == {name: len(module._forward_hooks) for name, module in model.named_modules()}


def test_padding_does_not_count_where_a_layer_sees_all_tokens_one_below_the_other():
    model, ids = adapted(), prompts(16)
    batch = {"input_ids": ids, "attention_mask": (torch.arange(9) < 6).long().expand(16, -1)}
    calibrate_trex_merge(model, [batch], progress=False)
    expected = _statics(model)
    for block in model.base_model.model.model.layers:
        block.mlp.forward = lambda x, former=block.mlp.forward: former(x.flatten(0, 1)).view_as(x)
    calibrate_trex_merge(model, [batch], progress=False)
    torch.testing.assert_close(_statics(model), expected, rtol=1e-4, atol=1e-5)


def test_cross_attention_in_another_dtype_than_the_adapters():
    ids, found = prompts(16), []
    mask = (torch.arange(9) < 4).long().expand(16, -1)
    for extra in (0, 1):  # with it, the lengths of encoder and decoder tell them apart
        model = adapted("t5", base=make_t5().bfloat16())
        batch = {"input_ids": F.pad(ids, (0, extra)), "attention_mask": F.pad(mask, (0, extra)), "labels": ids}
        calibrate_trex_merge(model, [batch], progress=False)
        found.append(
            {name: static for name, static in _statics(model).items() if "block.0.layer.1.EncDecAttention.k" in name}
        )
    torch.testing.assert_close(found[0], found[1], rtol=0.1, atol=0.05)


def test_as_many_tokens_as_input_vectors_do():
    assert calibrate_trex_merge(adapted(), [{"input_ids": prompts(1, length=2)}], progress=False).tokens == 2


@pytest.mark.filterwarnings("ignore:.*bias")
def test_biases_of_a_disabled_adapter_are_not_warned_of_again():
    model = adapted("gpt2", bias="all")
    model.base_model.disable_adapter_layers()
    _silent(calibrate_trex_merge, model, batches(), progress=False)


def test_moments_of_wide_inputs_in_bfloat16_are_summed_more_precisely():
    z, m = (torch.randn(64, n, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (40, 3))
    moments = Moments.zeros(1, 40, 3, torch.device("cpu"))
    moments.add(z, m, torch.zeros(64, dtype=torch.long))
    torch.testing.assert_close(moments.zz[0], z.double().T @ z.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "part", ["trex_A", "trex_B", "trex_router.", "trex_router_down", "trex_map", "trex_omega", "trex_gate"]
)
def test_training_any_part_of_the_adapter_drops_them(part):
    model = adapted(router_rank=2)
    calibrate_trex_merge(model, batches(), progress=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    with pytest.warns(UserWarning, match="trained again"):
        model.train()(**answered(4))


def test_names_that_are_merged_and_unloaded_are_looked_at():
    model = _two()
    model.set_adapter("other")
    _silent(model.merge_and_unload, adapter_names=["default"])


def test_what_is_not_merged_is_not_warned_of():
    model = _two()
    _silent(model.merge_adapter, adapter_names=["default", "absent"])
    model.unmerge_adapter()
    model.set_adapter("other")
    _silent(model.merge_adapter, adapter_names=[])
    assert not any(layer.merged for layer in _layers(model).values())


@pytest.mark.filterwarnings(
    "ignore:Model (has|with) `tie_word_embeddings=True`", "ignore:Already found", "ignore:You are trying"
)
def test_a_refused_merge_leaves_the_adapter_beneath_as_it_is():
    beneath = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    base = get_peft_model(make_llama(tie_word_embeddings=True), beneath).base_model.model
    model = adapted(base=base, target_modules=["lm_head", "q_proj"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="tied"):
        model.merge_and_unload()
    assert _same(before, model.state_dict())


@pytest.mark.filterwarnings("ignore:Already found", "ignore:You are trying")
def test_names_and_safety_reach_the_adapter_beneath():
    for names, broken in ((["default"], False), (None, True)):
        beneath = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        base = get_peft_model(make_llama(), beneath, adapter_name="beneath" if names else "default").base_model.model
        model = adapted(base=base, target_modules=["q_proj"])
        calibrate_trex_merge(model, batches(), progress=False)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        weight, delta = layer.get_base_layer().weight.clone(), layer.get_delta_weight("default")
        if broken:
            layer.base_layer.lora_A["default"].weight.data[0, 0] = float("nan")
            with pytest.raises(ValueError, match="NaN"):
                model.merge_and_unload(safe_merge=True)
            assert torch.equal(layer.get_base_layer().weight, weight)
        else:
            merged = model.merge_and_unload(adapter_names=names)
            torch.testing.assert_close(merged.model.layers[0].self_attn.q_proj.weight, weight + delta)


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
def test_only_others_are_named_as_tied():
    model = _two(["lm_head"], base=make_llama(tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"lm_head is tied to that of model\.embed_tokens: "):
        model.merge_adapter(adapter_names=["other"])


def test_merging_rounds_once():
    model = adapted()
    for name, parameter in model.named_parameters():
        if ".trex_" in name:
            parameter.data = parameter.data.bfloat16()
    calibrate_trex_merge(model, batches(), progress=False)
    layer = _layers(model)["model.layers.0.self_attn.q_proj"]
    down, up = layer.static_factors("default")
    expected = layer.base_layer.weight + up @ down
    model.merge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, expected, rtol=0, atol=1e-6)


def test_labels_tell_the_padding_of_decoder_input_ids():
    model, ids = adapted("t5"), prompts(16)
    labels = ids.masked_fill(torch.arange(9) >= 7, -100)
    batch = {"input_ids": ids[:, :4], "decoder_input_ids": ids, "labels": labels}
    assert calibrate_trex_merge(model, [batch], progress=False).tokens == 16 * 7


def test_given_encoder_outputs_are_what_cross_attention_reads():
    ids, mask = prompts(16), (torch.arange(9) < 4).long().expand(16, -1)
    found = []
    for extra in (0, 1):  # with it, the lengths of encoder and decoder tell them apart
        model = adapted("t5", use_prior=False, fit=False)
        padded, kept = F.pad(ids, (0, extra)), F.pad(mask, (0, extra))
        encoded = model.base_model.model.encoder(input_ids=padded, attention_mask=kept)
        batch = {"encoder_outputs": encoded, "attention_mask": kept, "labels": ids}
        with pytest.warns(UserWarning, match="never called"):
            calibrate_trex_merge(model, [batch], progress=False)
        found.append(_statics(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_a_model_that_was_compiled_in_place():
    model = adapted()
    calibrate_trex_merge(model, batches(), progress=False)
    expected = _statics(model)
    model.compile(backend="eager")
    calibrate_trex_merge(model, batches(), progress=False)
    assert _same(_statics(model), expected)


def test_autocast_does_not_round_what_is_merged():
    model = adapted()
    calibrate_trex_merge(model, batches(), progress=False)
    for layer in _layers(model).values():
        expected = layer.get_delta_weight("default")
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.get_delta_weight("default").equal(expected)
