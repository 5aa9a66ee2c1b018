"""routing_report and TRexRoutingCallback: figures by another road, and a model that is left as it was."""

import json
import math
import random
import re
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    PAD,
    adapted,
    answered,
    batches,
    exact_model,
    make_llama,
    padded_data,
    prompts,
    randomize,
)
from peft import get_peft_model
from sklearn.metrics import normalized_mutual_info_score
from transformers import Trainer, TrainingArguments, default_data_collator

from peft_trex import (
    RoutingReport,
    TRexConfig,
    TRexLayer,
    TRexRoutingCallback,
    initialize_trex_prior,
    routing_report,
)
from peft_trex.analysis import callback
from peft_trex.analysis.figures import group_changes, kinds_of, layers_before
from peft_trex.analysis.routing import routing_parts
from peft_trex.fast.base import Base

VARIANTS = {
    "grid": {},
    "more in than out": {"r_a": 4},
    "identity map": {"num_clusters": 6},
    "paired": {"expert_layout": "paired", "r_a": 3, "num_clusters": 3},
    "reduced router": {"router_rank": 2},
    "top k": {"router_top_k": 2},
    "no prior": {"use_prior": False},
    "unfitted prior": {"fit": False},
    "no router": {"use_router": False},
    "gpt2": {"kind": "gpt2"},
    "t5": {"kind": "t5"},
    "external": {"prior_encoder": "external", "prior_dim": 5},
}


def _report(model, data, **kwargs):
    return routing_report(model, data, progress=False, **kwargs)


def _layers(model):
    return {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, TRexLayer)}


@torch.no_grad()
def _measure(model, data):
    """For each layer: what its tokens show when vectors are really taken away."""
    found = {name: [] for name in _layers(model)}
    state = {}

    def watch(name):
        def hook(layer, args, output):
            decodes = name.startswith("decoder") and not name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
            kept = state["decoder_attention_mask" if decodes else "attention_mask"].bool()
            x, base = args[0], layer.base_layer(args[0])
            A, B = layer.trex_A["default"], layer.trex_B["default"]

            def without(parameter, *where):
                before = parameter.clone()
                parameter[where] = 0
                change = output - layer._add_adapter("default", Base(x, None, base))
                parameter.copy_(before)
                return change[kept].square().sum(-1)

            weights = layer.expert_weights(x)[kept]
            probabilities = torch.full_like(weights, torch.nan)
            if "default" in layer.trex_router:
                router = layer.trex_router["default"]
                if "default" in layer.trex_router_down:
                    router = router @ layer.trex_router_down["default"]
                logits = x[kept] @ router.T
                if (k := layer.trex_settings["default"].top_k) is not None:
                    logits[logits < logits.topk(k).values[..., -1:]] = -math.inf
                probabilities = logits.softmax(-1)
            found[name].append(
                {
                    "base": base[kept].square().sum(-1),
                    "added": (output - base)[kept].square().sum(-1),
                    "inputs": torch.stack([without(A, index) for index in range(len(A))], -1),
                    "outputs": torch.stack([without(B, slice(None), j) for j in range(B.shape[1])], -1),
                    "weights": weights,
                    "probabilities": probabilities,
                }
            )

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in _layers(model).items()]
    for batch in data:
        state.update(batch)
        model(**batch)
    for handle in handles:
        handle.remove()
    return {name: {key: torch.cat([one[key] for one in parts]) for key in parts[0]} for name, parts in found.items()}


def _close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(
        torch.tensor(found).double(), expected.double(), rtol=tolerance, atol=tolerance, check_device=False
    )


def _margins(joint):
    return joint.sum(0), joint.sum(1), joint.flatten()


@pytest.mark.filterwarnings("ignore:The semantic prior of the adapter")
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_each_layer_as_measured(variant):
    model = exact_model(**variant)
    data = padded_data(variant.get("kind"), "prior_encoder" in variant)
    report = _report(model, data)
    measured = _measure(model, data)
    assert report.layers.keys() == measured.keys()
    for name, layer in report.layers.items():
        own, weights = measured[name], measured[name]["weights"]
        energy = own["added"].mean()
        assert layer.tokens == len(weights)
        _close(layer.energy, energy / own["base"].mean())
        _close(layer.input_contribution, own["inputs"].mean(0) / energy)
        _close(layer.output_contribution, own["outputs"].mean(0) / energy)
        shares = weights.abs() / weights.abs().sum(-1, keepdim=True).clamp(min=1e-30)
        _close(layer.load, shares.mean(0))
        load = torch.tensor(layer.load)
        _close(layer.used_experts, torch.distributions.Categorical(probs=load).entropy().exp() if load.any() else 1.0)
        adapter = _layers(model)[name]
        if adapter.trex_settings["default"].layout == "paired":
            assert layer.core_rank is None
        else:
            cores = weights.unflatten(-1, (len(layer.input_contribution), -1))
            values = torch.linalg.svdvals(cores).square()
            _close(layer.core_rank, (values.sum(-1).square() / values.square().sum(-1).clamp(min=1e-30)).mean())
        before = re.sub(r"\.(\d+)\.", lambda number: f".{int(number[1]) - 1}.", name, count=1)
        if before not in measured:
            assert layer.affinity is None and ".0." in name
        else:
            earlier = measured[before]["weights"]
            joint = (earlier.abs() / earlier.abs().sum(-1, keepdim=True).clamp(min=1e-30)).T @ shares
            entropies = [torch.distributions.Categorical(probs=p.clamp(min=1e-300)).entropy() for p in _margins(joint)]
            _close(layer.affinity, entropies[0] + entropies[1] - entropies[2] if joint.any() else torch.zeros(()))
        omega = torch.sigmoid(100 * adapter.trex_omega["default"].detach())
        assert layer.omega == pytest.approx(float(omega))
        assert layer.gate == pytest.approx(float(torch.sigmoid(100 * adapter.trex_gate["default"].detach())))
        p = own["probabilities"]
        if p.isnan().any():
            assert (layer.router_entropy, layer.router_load, layer.token_share) == (None, None, 0.0)
            continue
        entropies = torch.distributions.Categorical(probs=p).entropy()
        _close(layer.router_entropy, entropies.mean() / math.log(p.shape[-1]), 1e-5)
        _close(layer.effective_experts, entropies.exp().mean(), 1e-5)
        _close(layer.router_load, p.mean(0))
        by_token = float(omega) * adapter.trex_settings["default"].token_scale * p
        by_prior = (weights - by_token).abs().sum(-1)
        _close(layer.token_share, (by_token.sum(-1) / (by_token.sum(-1) + by_prior)).mean(), 1e-5)


def _figures(report):
    """All numbers of a report's layers, in a row."""
    found = report.to_dict()["layers"]
    return torch.tensor([value for layer in found.values() for value in _flat(layer) if value is not None]).double()


def _flat(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [part for one in value for part in _flat(one)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_company_change_nothing(side):
    model = exact_model()
    padded = padded_data(side=side)
    groups = [f"g{index % 3}" for index in range(8)]
    alone = [
        {"input_ids": row[mask.bool()][None], "task": [group]}
        for batch in padded
        for row, mask, group in zip(batch["input_ids"], batch["attention_mask"], groups, strict=True)
    ]
    together = _report(model, [{**batch, "task": groups} for batch in padded], group_by="task")
    apart = _report(model, alone, group_by="task")
    torch.testing.assert_close(_figures(together), _figures(apart), rtol=1e-6, atol=1e-6)
    assert together.clusters == apart.clusters and together.group_clusters == apart.group_clusters
    assert sum(together.clusters) == sum(together.groups.values()) == 24
    assert together.prior_spread == pytest.approx(apart.prior_spread)


@pytest.mark.parametrize("labels_for", ["rows", "sequences"])
@pytest.mark.parametrize("filling", [0, 3])
def test_packed_sequences_count_as_prompts_of_their_own(filling, labels_for):
    model = exact_model()
    rows = [row[: 4 + index % 5] for index, row in enumerate(prompts(6, seed=3))]
    groups = ["a", "b", "a", "b", "b", "a"] if labels_for == "sequences" else ["a"] * 6
    filler = torch.full((filling,), PAD)
    packed = {
        "input_ids": torch.cat([*rows, filler])[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows] + [torch.zeros(filling).long()])[None],
        "use_cache": False,
    }
    # what only fills a row up is a sequence to those who count them, and has no tokens
    packed["task"] = groups + ["c"] * filling if labels_for == "sequences" else groups[:1]
    apart = [{"input_ids": row[None], "task": [group]} for row, group in zip(rows, groups, strict=True)]
    one, several = _report(model, [packed], group_by="task"), _report(model, apart, group_by="task")
    torch.testing.assert_close(_figures(one), _figures(several), rtol=1e-6, atol=1e-6)
    assert one.groups == several.groups and one.group_clusters == several.group_clusters


def test_padding_before_a_packed_row_leaves_the_row_above_its_label():
    attended = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    positions = torch.tensor([[*range(4), *range(5)], [0] * 3 + [*range(6)]])
    batch = {"input_ids": prompts(2), "attention_mask": attended, "position_ids": positions, "use_cache": False}
    report = _report(exact_model(), [{**batch, "task": ["two", "one"]}], group_by="task")
    assert report.groups == {"one": 1, "two": 2}


def test_groups_clusters_and_what_they_tell():
    model = exact_model(num_clusters=6, r_a=4)
    data = [{**batch, "task": torch.arange(8) % 3} for batch in padded_data()]
    report = _report(model, data, group_by="task")
    assert report.groups == {"0": 9, "1": 9, "2": 6}
    tasks, clusters, scores, means = [], [], [], {name: [] for name in report.layers}
    joint = {name: torch.zeros(3, 12).double() for name in report.layers}
    plain = [{key: value for key, value in batch.items() if key != "task"} for batch in data]
    handles = []

    def watch(name):
        def hook(layer, args):
            weights, mask = layer.expert_weights(args[0]), batch["attention_mask"]
            clusters_here = layer.cluster_of(args[0])[:, 0].tolist()
            for row, task in enumerate((torch.arange(8) % 3).tolist()):
                own = weights[row][mask[row].bool()].detach()
                means[name].append(own.mean(0))
                joint[name][task] += (own.abs() / own.abs().sum(-1, keepdim=True)).sum(0)
            if name == next(iter(report.layers)):
                clusters.extend(clusters_here)
                scores.extend(layer._channel.scores("default", args[0]).float())
                tasks.extend((torch.arange(8) % 3).tolist())

        return hook

    for name, layer in _layers(model).items():
        handles.append(layer.register_forward_pre_hook(watch(name)))
    for batch in plain:
        model(**batch)
    for handle in handles:
        handle.remove()
    assert report.clusters == tuple(clusters.count(number) for number in range(6))
    assert report.nmi == pytest.approx(normalized_mutual_info_score(tasks, clusters))
    pairs = list(zip(clusters, tasks, strict=True))
    best = [max(pairs.count((cluster, task)) for task in range(3)) for cluster in range(6)]
    assert report.purity == pytest.approx(sum(best) / 24)
    of_tasks = [sum(scores[row] for row in range(24) if tasks[row] == task) for task in range(3)]
    overlaps = [float(torch.cosine_similarity(of_tasks[a], of_tasks[b], dim=0)) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert report.prior_spread == pytest.approx(float(torch.stack(scores).std(-1, correction=0).mean()), rel=1e-5)
    assert report.group_overlap == pytest.approx(sum(map(abs, overlaps)) / 3, abs=1e-5)
    assert f"Those of two groups overlap by {report.group_overlap:.2f}." in report.to_markdown()
    for name, layer in report.layers.items():
        parts = (joint[name].sum(0), joint[name].sum(1), joint[name].flatten())
        of_experts, of_groups, of_both = (torch.distributions.Categorical(probs=part).entropy() for part in parts)
        assert layer.mutual_information == pytest.approx(float(of_experts + of_groups - of_both), abs=1e-7)
        _close(layer.group_load["1"], joint[name][1] / joint[name][1].sum())
        values, index = torch.stack(means[name]), torch.tensor(tasks)
        centred = values - values.mean(0)
        between = sum((index == one).sum() * centred[index == one].mean(0).square().sum() for one in range(3))
        assert layer.group_share == pytest.approx(float(between / centred.square().sum()), rel=1e-5)


def test_labels_from_a_function_that_takes_them_out():
    model = exact_model()
    data = [{**batch, "task": ["a", "b"] * 4} for batch in padded_data()]
    by_name = _report(model, data, group_by="task")
    by_function = _report(model, data, group_by=lambda batch: [one.upper() for one in batch.pop("task")])
    assert by_function.groups == {"A": 12, "B": 12}
    torch.testing.assert_close(_figures(by_function), _figures(by_name))
    assert all("task" in batch for batch in data)


def test_dead_and_duplicate_experts_are_named():
    model = exact_model()
    name, layer = next(iter(_layers(model).items()))
    with torch.no_grad():
        layer.trex_A["default"][1] *= 1e-3  # experts 3, 4 and 5
        for parameter in (layer.trex_router["default"], layer.trex_map["default"]):
            parameter[2] = parameter[0]
        layer.trex_B["default"][:, 2] = -2 * layer.trex_B["default"][:, 0]
    found = _report(model, padded_data()).layers
    assert found[name].dead == (3, 4, 5) and found[name].duplicates == ((0, 2),)
    assert all(not one.dead and not one.duplicates for other, one in found.items() if other != name)


def test_an_adapter_at_its_start_adds_nothing():
    model = get_peft_model(make_llama(), TRexConfig(r_a=2, r_b=3, num_clusters=4, task_type="CAUSAL_LM"))
    initialize_trex_prior(model, batches(), progress=False)
    report = _report(model, batches())
    for layer in report.layers.values():
        assert (layer.energy, layer.dead, layer.duplicates) == (0.0, (), ())
        assert layer.router_entropy == pytest.approx(1.0) and layer.effective_experts == pytest.approx(6.0)
    assert "NaN" not in json.dumps(report.to_dict())


def test_one_of_several_adapters_is_looked_at_alone():
    model = adapted()
    alone = _report(model, batches())
    model.add_adapter("other", TRexConfig(r_a=3, r_b=3, num_clusters=4, task_type="CAUSAL_LM"))
    randomize(model, "other", seed=1)
    initialize_trex_prior(model, batches(), adapter_name="other", progress=False)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(_figures(_report(model, batches())), _figures(alone))
    other = _report(model, batches(), adapter_name="other")
    assert len(next(iter(other.layers.values())).load) == 9 and other.adapter_name == "other"


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("disabled", [False, True])
def test_the_model_is_left_as_it_was(error, disabled):
    model = adapted()
    model.train()
    model.base_model.model.model.layers[0].eval()
    if disabled:
        model.base_model.disable_adapter_layers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()

    def data():
        yield from batches()
        np.random.rand(), random.random(), torch.rand(1)
        if error:
            raise RuntimeError("the disk is gone")

    if error:
        with pytest.raises(RuntimeError, match="the disk is gone"):
            _report(model, data())
    else:
        _report(model, data())
    assert modes == [module.training for module in model.modules()]
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert all(layer.disable_adapters == disabled for layer in _layers(model).values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_no_batch_is_kept():
    seen = []

    def data():
        for number in range(4):
            assert all(one() is None for one in seen[:-1])
            ids = prompts(8, seed=number)
            seen.append(weakref.ref(ids))
            yield {"input_ids": ids}
            del ids

    report = _report(adapted(), data())
    assert len(seen) == 4 and report.tokens == 32 * 9


def test_max_batches_and_labels():
    model = adapted()
    assert _report(model, batches(), max_batches=1).tokens == 72
    # the clusters are the prompts', whatever the answers are; the statistics are over all tokens
    batch = answered(8)
    changed = {**batch, "input_ids": torch.where(batch["labels"] == -100, batch["input_ids"], 7)}
    first, second = _report(model, [batch]), _report(model, [changed])
    assert first.clusters == second.clusters and first.tokens == 72
    assert not torch.equal(_figures(first), _figures(second))


def test_layers_that_were_never_called_are_named():
    model = adapted()
    model.base_model.model.spare = model.base_model.model.model.layers[0].mlp.up_proj.__class__(
        torch.nn.Linear(4, 4), "default", model.peft_config["default"], model.base_model.prompts.channel
    )
    with pytest.warns(UserWarning, match="1 adapted layers were never called on this data, such as spare"):
        report = _report(model, batches())
    assert "spare" not in report.layers


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"adapter_name": "other"}, ValueError, "no adapter 'other'"),
        ({"max_batches": 0}, ValueError, "max_batches=0"),
        ({"group_by": 3}, TypeError, "group_by is a int"),
        ({"group_by": "task"}, ValueError, "no column 'task' to group by; it has"),
        ({"group_by": lambda batch: ["a"]}, ValueError, "1 labels for a batch of 8 rows; expected one a row"),
        ({"group_by": lambda batch: "abcdefgh"}, TypeError, "gave a str; expected a list of one label"),
        ({"group_by": lambda batch: torch.ones(8, 2)}, TypeError, "gave a list; expected a list of one label"),
        ({"dataloader": []}, ValueError, "no batch with a token"),
        ({"dataloader": [[1]]}, TypeError, "gave a list; expected a mapping"),
    ],
)
def test_errors_say_what_to_do(change, error, message):
    arguments = {"dataloader": batches(), "progress": False, **change}
    with pytest.raises(error, match=message):
        routing_report(adapted(), arguments.pop("dataloader"), **arguments)


def test_merged_and_broken_adapters_are_refused():
    model = adapted()
    with pytest.warns(UserWarning):
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"unmerge_adapter\(\) before"):
        _report(model, batches())
    model.unmerge_adapter()
    _layers(model)["model.layers.1.mlp.up_proj"].trex_B["default"].data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinity came up in the layer model\.layers\.1\.mlp"):
        _report(model, batches())


@pytest.fixture(scope="module")
def deep():
    """A report of 30 blocks in which a few layers stand out."""
    model = get_peft_model(
        make_llama(num_hidden_layers=30, initializer_range=0.1),
        TRexConfig(r_a=2, r_b=3, num_clusters=4, task_type="CAUSAL_LM"),
    )
    randomize(model)
    layers = _layers(model)
    layers["model.layers.7.mlp.down_proj"].trex_gate["default"].data.fill_(-0.2)
    layers["model.layers.9.self_attn.q_proj"].trex_A["default"].data[0] = 0
    layers["model.layers.11.self_attn.v_proj"].trex_B["default"].data.mul_(1000)
    layers["model.layers.12.self_attn.k_proj"].trex_router["default"].data.zero_()
    initialize_trex_prior(model, batches(), progress=False)
    data = [{**batch, "task": [f"task|{index % 4}" for index in range(8)]} for batch in batches()]
    return _report(model.eval(), data, group_by="task")


def test_a_report_in_words_names_what_stands_out_and_stays_short(deep):
    text = deep.to_markdown()
    assert len(text) < 6000 and len(deep.layers) == 210
    table = [line for line in text.splitlines() if line.startswith("| `")]
    assert [line.split(" | ")[0] for line in table] == [
        f"| `{kind}_proj`" for kind in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    columns = next(line for line in text.splitlines() if line.startswith("| layers")).split(" | ")
    assert columns[-3] == "nats from the block before"
    assert columns[-2:] == ["nats about the group", "variance between groups |"]
    assert {len(line.split(" | ")) for line in table} == {len(columns)}
    assert "layers that add most: `model.layers.11.self_attn.v_proj`" in text
    assert "gates that are shut (below 0.001): `model.layers.7.mlp.down_proj` (2.1e-09)\n" in text
    assert "`model.layers.9.self_attn.q_proj` (3)" in text  # dead experts
    assert "| task\\|0 | 8 |" in text
    assert str(deep) in text and "1 gates shut" in str(deep)


def test_kinds_of_layers_keep_what_tells_them_apart():
    names = ["encoder.block.0.q", "decoder.block.0.q", "decoder.block.1.q", "head"]
    assert kinds_of({name: name for name in names}) == {
        "encoder.block.q": {0: "encoder.block.0.q"},
        "decoder.block.q": {0: "decoder.block.0.q", 1: "decoder.block.1.q"},
        "head": {0: "head"},
    }


def test_a_layer_is_compared_with_its_kind_in_the_nearest_block_before():
    names = ["h.2.q", "h.0.q", "h.10.q", "h.0.v", "enc.h.1.q", "head"]
    assert layers_before(names) == {"h.2.q": "h.0.q", "h.10.q": "h.2.q"}


def test_flattened_tokens_are_not_taken_for_the_same():
    model = exact_model()
    for block in model.base_model.model.model.layers:
        block.mlp.forward = lambda x, run=block.mlp.forward: run(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    layers = _report(model, batches(16)).layers
    assert layers["model.layers.1.mlp.up_proj"].tokens == layers["model.layers.1.self_attn.q_proj"].tokens
    assert layers["model.layers.1.mlp.up_proj"].affinity is None
    assert layers["model.layers.1.self_attn.q_proj"].affinity > 1e-6


def test_groups_are_compared_over_the_layers_of_the_commonest_size():
    loads = [{"a": (0.9, 0.1)}, {"a": (0.2, 0.3, 0.5)}, {"a": (0.4, 0.3, 0.3)}]
    layers = {
        str(number): SimpleNamespace(load=load["a"], group_load={**load, "b": load["a"][::-1], "c": load["a"]})
        for number, load in enumerate(loads)
    }
    layers["never called with labels"] = SimpleNamespace(load=(0.5, 0.5), group_load={})
    changes = group_changes(layers, {"a": 1, "b": 3, "c": 2}, most=2)
    assert list(changes) == ["b", "c"]
    # The means over the two layers are (0.4, 0.3, 0.3) for b, and the reverse for c.
    np.testing.assert_allclose(changes["b"], [0.4 / 0.35 - 1, 0, 0.3 / 0.35 - 1], atol=1e-12)
    np.testing.assert_allclose(changes["c"], [0.3 / 0.35 - 1, 0, 0.4 / 0.35 - 1], atol=1e-12)


def test_a_report_as_json(deep):
    found = deep.to_dict()
    assert json.loads(json.dumps(found)) == found
    assert "moments" not in found["layers"]["model.layers.0.mlp.up_proj"]
    assert found["groups"] == {f"task|{index}": 8 for index in range(4)}


def _size(path):
    """Width and height of a PNG in pixels."""
    picture = path.read_bytes()
    assert picture.startswith(b"\x89PNG")
    return [int.from_bytes(picture[start : start + 4], "big") for start in (16, 20)]


@pytest.mark.slow
def test_a_report_as_a_picture_in_detail(deep, tmp_path):
    deep.plot(tmp_path / "report.png", detail=True)
    width, height = _size(tmp_path / "report.png")
    # 10 maps of 7 kinds by 30 blocks, 7 of the experts' load, two of the groups: cells of at least four pixels
    assert width >= 2 * 30 * 10 and height >= 5 * 7 * 15 + 4 * 100


def _drawn(report, path, **kwargs):
    """The texts of a picture."""
    report.plot(path, **kwargs)
    return re.findall(r"<!-- (.*?) -->", path.read_text())


def test_a_picture_fits_on_a_screen_and_begins_with_what_tells_the_groups_apart(deep, tmp_path):
    deep.plot(tmp_path / "report.png")
    width, height = _size(tmp_path / "report.png")
    assert 1000 < width <= 1280 and 500 < height <= 720
    texts = _drawn(deep, tmp_path / "report.svg")
    titles = [text for text in texts if text.startswith(("Red", "Bright", "Blue", "Dark"))]
    assert titles[:2] == [
        "Red: experts that a group uses more than the others do",
        "Bright: the prior's clusters that a group's prompts fall into",
    ]
    assert len(titles) == 5
    assert {"task|0", "against the mean of the groups, %", "the token router's share"} <= set(texts)
    detailed = _drawn(deep, tmp_path / "detail.svg", detail=True)
    assert "dead experts, share of E" in detailed and "dead experts, share of E" not in texts


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_pictures_of_other_models_and_without_groups(kind, tmp_path):
    report = _report(adapted(kind, fit=False, use_prior=False), padded_data(kind))
    drawn = _drawn(report, tmp_path / "detail.svg", detail=True)
    for title in ("router's entropy for a token, of log E", "omega: router (1) against prior (0)"):
        assert title in drawn
    short = _drawn(report, tmp_path / "report.svg")
    assert "Dark: layers whose gate is shut" in short and "block of the model" in short
    assert isinstance(report, RoutingReport)


def test_without_matplotlib_the_error_says_what_to_install(deep, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'peft-trex\[plot\]'"):
        deep.plot(tmp_path / "report.png")
    assert not list(tmp_path.iterdir())


def _trainer(tmp_path, model, report_to=(), **kwargs):
    batch = answered(24)
    rows = [{key: value[index] for key, value in batch.items()} for index in range(24)]
    arguments = {"max_steps": 12, "logging_steps": 2, "per_device_train_batch_size": 4, **kwargs}
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=list(report_to),
        save_strategy="no",
        disable_tqdm=True,
        **arguments,
    )
    return Trainer(model=model, args=settings, train_dataset=rows, data_collator=default_data_collator)


CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
FROM_PARAMETERS = {"routing/omega", "routing/gate", "routing/gates_shut"}
FROM_A_FORWARD = {
    "routing/router_entropy",
    "routing/token_share",
    "routing/used_experts",
    "routing/used_experts_min",
}


def _logged(trainer):
    history = [entry for entry in trainer.state.log_history if "routing/omega" in entry]
    return {entry["step"]: {key: value for key, value in entry.items() if "routing" in key} for entry in history}


@pytest.mark.parametrize("settings", [{}, CHECKPOINTED, {"gradient_accumulation_steps": 2}])
def test_a_trainer_logs_the_routing(tmp_path, settings, monkeypatch):
    watched = []

    def recorded(layer, *rest):
        watched.append(layer)
        return routing_parts(layer, *rest)

    monkeypatch.setattr(callback, "routing_parts", recorded)
    trainer = _trainer(tmp_path, adapted(), **settings)
    trainer.add_callback(TRexRoutingCallback(trainer, every=6))
    trainer.train()
    logged = _logged(trainer)
    assert list(logged) == [2, 4, 6, 8, 10, 12]
    assert all(set(logged[step]) == FROM_PARAMETERS | FROM_A_FORWARD for step in (2, 8))
    assert all(set(logged[step]) == FROM_PARAMETERS for step in (4, 6, 10, 12))
    # each layer in one forward of each of the two steps, not in those that are accumulated, nor run again
    assert len(watched) == 2 * len(set(watched)) == 2 * len(_layers(trainer.model))
    assert not any(module._forward_pre_hooks for module in _layers(trainer.model).values())


def test_no_forward_of_a_compiled_model_is_looked_at(tmp_path):
    trainer = _trainer(tmp_path, adapted(), max_steps=2)
    trainer.args.torch_compile = True  # after the Trainer has read it: nothing is compiled
    trainer.add_callback(TRexRoutingCallback(trainer))
    trainer.train()
    assert set(_logged(trainer)[2]) == FROM_PARAMETERS


def test_the_callback_logs_what_the_report_says(tmp_path):
    model = adapted(fit=True)
    batch = answered(24)
    trainer = _trainer(
        tmp_path, model, max_steps=1, logging_steps=1, per_device_train_batch_size=24, learning_rate=0.0
    )
    trainer.add_callback(TRexRoutingCallback(trainer))
    trainer.train()
    found, layers = _logged(trainer)[1], _report(model, [batch]).layers.values()
    shares = [layer.used_experts / len(layer.load) for layer in layers]
    expected = {
        "routing/omega": sum(layer.omega for layer in layers) / len(layers),
        "routing/gate": sum(layer.gate for layer in layers) / len(layers),
        "routing/gates_shut": sum(layer.gate < 1e-3 for layer in layers),
        "routing/router_entropy": sum(layer.router_entropy for layer in layers) / len(layers),
        "routing/token_share": sum(layer.token_share for layer in layers) / len(layers),
        "routing/used_experts": sum(shares) / len(shares),
        "routing/used_experts_min": min(shares),
    }
    assert found == pytest.approx(expected, rel=1e-4)


def test_training_is_the_same_with_the_callback(tmp_path):
    states = []
    for watched in (False, True):
        trainer = _trainer(tmp_path, adapted())
        if watched:
            trainer.add_callback(TRexRoutingCallback(trainer, every=1))
        trainer.train()
        states.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("settings", [{"use_router": False}, {"use_prior": False, "fit": False}])
def test_the_callback_with_half_of_the_routing(tmp_path, settings):
    trainer = _trainer(tmp_path, adapted(**settings), max_steps=2)
    trainer.add_callback(TRexRoutingCallback(trainer))
    trainer.train()
    found = _logged(trainer)[2]
    assert ("routing/router_entropy" in found) == settings.get("use_router", True)
    assert found["routing/token_share"] == (1.0 if settings.get("use_router", True) else 0.0)


def test_tensorboard_gets_the_figures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = _trainer(tmp_path, adapted(), report_to=["tensorboard"])
    trainer.add_callback(TRexRoutingCallback(trainer, every=5))
    trainer.train()
    folder = next(path.parent for path in tmp_path.rglob("events.out.tfevents.*"))
    events = EventAccumulator(str(folder)).Reload()
    logged = _logged(trainer)
    for name in FROM_PARAMETERS | FROM_A_FORWARD:
        found = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert found == pytest.approx({step: own[name] for step, own in logged.items() if name in own})
        assert len(found) == (6 if name in FROM_PARAMETERS else 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("default",), TypeError, r"trainer is a str; .*add_callback\(TRexRoutingCallback\(trainer\)\)"),
        ((None, -1), ValueError, "every=-1 must be a whole number of at least 0"),
    ],
)
def test_a_wrong_callback_is_refused(tmp_path, arguments, error, message):
    first, *rest = arguments
    with pytest.raises(error, match=message):
        TRexRoutingCallback(first or _trainer(tmp_path, adapted()), **({"every": rest[0]} if rest else {}))
