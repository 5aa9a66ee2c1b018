"""save_trex_as_lora(max_adapters=n): the closest clusters share a LoRA, at the loss told, and the router knows."""

import itertools
import json

import pytest
import torch
from conftest import adapted, batches, exact_model, prompts
from peft import PeftModel
from safetensors.torch import load_file

from peft_trex import SemanticRouter, TRexLayer, calibrate_trex_merge, save_trex_as_lora
from peft_trex.lora.joining import join
from peft_trex.parameters import Kinship


def layers_of(model):
    tuner = model.base_model.model
    return {name: layer for name, layer in tuner.named_modules() if isinstance(layer, TRexLayer)}


def made_up(clusters=6, layers=3, seed=0):
    """For each layer: vectors (K, n) of the clusters, and their tokens (K,)."""
    generator = torch.Generator().manual_seed(seed)
    vectors = [torch.randn(clusters, 4, generator=generator).double() for _ in range(layers)]
    return vectors, torch.randint(1, 50, (layers, clusters), generator=generator).double()


def kin(vectors, tokens, energy=10.0):
    return [Kinship(v @ v.T, w, energy) for v, w in zip(vectors, tokens, strict=True)]


def spread(vectors, tokens, groups):
    """The sum of squares around the groups' means, counting by tokens."""
    total = 0.0
    for v, w in zip(vectors, tokens, strict=True):
        for group in groups:
            mean = (w[group, None] * v[group]).sum(0) / w[group].sum()
            total += (w[group, None] * (v[group] - mean) ** 2).sum().item()
    return total


@pytest.mark.parametrize("seed", range(5))
def test_the_closest_are_joined_and_the_loss_is_the_sum_of_squares(seed):
    vectors, tokens = made_up(seed=seed)
    for most in range(1, 8):
        groups, missed = join(kin(vectors, tokens), most)
        assert len(groups) == min(most, 6) and sorted(itertools.chain(*groups)) == list(range(6))
        assert groups == sorted(map(sorted, groups))
        assert missed == pytest.approx(spread(vectors, tokens, groups) / 30, rel=1e-9, abs=1e-12)
    # The first pair is the best of all pairs.
    pairs = {pair: spread(vectors, tokens, [list(pair)]) for pair in itertools.combinations(range(6), 2)}
    groups, _ = join(kin(vectors, tokens), 5)
    assert next(tuple(group) for group in groups if len(group) == 2) == min(pairs, key=pairs.get)


def test_equal_ones_are_joined_at_no_loss_and_those_without_tokens_are_left_out():
    vectors, tokens = made_up()
    for v in vectors:
        v[4] = v[1]
    tokens[:, 3] = 0
    groups, missed = join(kin(vectors, tokens), 4)
    assert groups == [[0], [1, 4], [2], [5]] and missed == pytest.approx(0, abs=1e-12)
    assert join(kin(vectors, torch.zeros_like(tokens)), 4) == ([], 0.0)


def stock(folder, name):
    tensors = load_file(folder / name / "adapter_model.safetensors")
    keys = [key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    return {key: tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"] for key in keys}


@pytest.fixture(scope="module")
def model():
    model = exact_model()
    calibrate_trex_merge(model, batches(), per_cluster=True, fit="core", progress=False)
    return model


@pytest.mark.parametrize("most", [1, 2, 3, 4, 9])
def test_the_folder_has_so_many_and_the_router_knows_which(model, tmp_path, most):
    report = save_trex_as_lora(model, tmp_path / "out", max_adapters=most)
    groups = {name: clusters for name, clusters in report.adapters.items() if name != "overall"}
    assert len(groups) == min(most, 4) and sorted(itertools.chain(*groups.values())) == [0, 1, 2, 3]
    assert all(name == f"cluster_{clusters[0]:02d}" for name, clusters in groups.items())
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    # "overall" is there too, for those who look for each adapter in a folder of its own name.
    assert folders == {"overall", *groups}
    said = json.loads((tmp_path / "out" / "router.json").read_text())
    assert said["adapters"] == {"overall": ".", **{name: name for name in groups}}
    router, ids = SemanticRouter.from_pretrained(tmp_path / "out"), prompts(16, seed=5)
    scores = model.base_model.prior_of("default").score(model.get_input_embeddings()(ids).mean(1))
    for row, cluster in zip(ids, scores.argmax(-1).tolist(), strict=True):
        route = router.route(row)
        assert route.cluster == cluster and cluster in groups[route.adapter]
    # A joined LoRA holds the mean of its clusters' weights by their tokens.
    tokens = next(iter(layers_of(model).values())).trex_kinship["default"].tokens
    for name, clusters in groups.items():
        deltas = stock(tmp_path / "out", name)
        for path, layer in layers_of(model).items():
            parts = [layer.static_factors("default", {index: 1.0}) for index in clusters]
            shares = [tokens[index] / sum(tokens[index] for index in clusters) for index in clusters]
            mean = sum(share * up @ down for share, (down, up) in zip(shares, parts, strict=True))
            torch.testing.assert_close(
                deltas[f"base_model.model.{path}"].double(), mean.double(), atol=1e-6, rtol=1e-5
            )
    assert (report.joining_error == 0) is (most >= 4) and f"{report.joining_error:.2%}" in str(report)


def test_the_loss_is_that_of_the_joined_weights_on_the_data(model, tmp_path):
    report = save_trex_as_lora(model, tmp_path / "out", max_adapters=2)
    inputs = {name: [] for name in layers_of(model)}
    hooks = [
        layer.register_forward_hook(lambda layer, args, _, name=name: inputs[name].append(args[0].flatten(0, 1)))
        for name, layer in layers_of(model).items()
    ]
    added = dict.fromkeys(inputs, 0.0)
    with torch.no_grad():
        for batch in batches():
            model(**batch)
        for hook in hooks:
            hook.remove()
        missed = 0.0
        for name, layer in layers_of(model).items():
            x, tokens = torch.cat(inputs[name]), layer.trex_kinship["default"].tokens
            added[name] = layer.trex_kinship["default"].energy
            for group in report.adapters.values():
                deltas = {index: layer.static_factors("default", {index: 1.0}) for index in group}
                deltas = {index: up @ down for index, (down, up) in deltas.items()}
                mean = sum(tokens[index] * delta for index, delta in deltas.items())
                for index, delta in deltas.items():
                    change = delta - mean / sum(tokens[index] for index in group)
                    missed += tokens[index] * (x @ change.T).square().sum().item() / len(x)
    assert report.joining_error == pytest.approx(float(missed) / sum(added.values()), rel=1e-4)
    assert report.joining_error > 1e-3


def test_clusters_without_tokens_go_to_the_adapter_for_all(tmp_path):
    model = adapted()
    ids = prompts(32)
    prior = model.base_model.prior_of("default")
    clusters = prior.score(model.get_input_embeddings()(ids).mean(1)).argmax(-1)
    some = [{"input_ids": ids[clusters < 2]}]
    calibrate_trex_merge(model, some, per_cluster=True, progress=False)
    empty = [2, 3]
    report = save_trex_as_lora(model, tmp_path / "out", max_adapters=4)
    assert report.adapters == {"overall": (2, 3), "cluster_00": (0,), "cluster_01": (1,)}
    router = SemanticRouter.from_pretrained(tmp_path / "out")
    assert [index for index, name in enumerate(router.clusters) if name == "overall"] == empty


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_adapters": 0}, "max_adapters=0 must be a whole number of at least 1, or None"),
        ({"max_adapters": True}, "max_adapters=True"),
        ({"max_adapters": 2.0}, "max_adapters=2.0"),
        (
            {"max_adapters": 2, "per_cluster": False},
            "max_adapters=2 joins adapters of clusters, which per_cluster=False",
        ),
    ],
)
def test_what_cannot_be_is_refused(model, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        save_trex_as_lora(model, tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_what_the_file_does_not_carry_is_refused_by_name(tmp_path):
    model = adapted()
    calibrate_trex_merge(model, batches(), per_cluster=True, progress=False)
    model.save_pretrained(tmp_path / "adapter")
    base = adapted(fit=False).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"max_adapters=2 goes by the calibration's data.*per_cluster=True\) in this"):
        save_trex_as_lora(loaded, tmp_path / "out", max_adapters=2)
    # Weights that are loaded over calibrated ones, or found for all tokens alone, take the place of what was known.
    model.load_adapter(tmp_path / "adapter", "default")
    assert not any(layer.trex_kinship for layer in layers_of(model).values())
    calibrate_trex_merge(model, batches(), per_cluster=True, progress=False)
    assert all(layer.trex_kinship for layer in layers_of(model).values())
    calibrate_trex_merge(model, batches(), progress=False)
    assert not any(layer.trex_kinship for layer in layers_of(model).values())
