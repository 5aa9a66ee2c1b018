"""A hostile configuration costs nothing, also where the file's header agrees with it."""

import json
import time

import pytest
import torch
from conftest import adapted, make_llama
from peft import PeftModel, get_peft_model
from processes import in_child
from safetensors.torch import save_file

from peft_trex import TRexConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYER = "model.layers.1.self_attn.q_proj"
KEY = f"base_model.model.{LAYER}"


def thin(rows, columns=None, **more):
    """Tensors of one layer, as narrow as can be."""
    A, B = torch.ones(rows, 1), torch.ones(1, columns or rows)
    logits = {"trex_omega": torch.zeros(1), "trex_gate": torch.zeros(1)}
    return {f"{KEY}.{name}": tensor for name, tensor in {"trex_A": A, "trex_B": B, **logits, **more}.items()}


def prior(clusters):
    sizes = {"centroids": (clusters, 1), "mean": (1,), "mean_scores": (clusters,)}
    return {f"base_model.trex_prior.{name}": torch.ones(size) for name, size in sizes.items()}


WIDE = {"r_a": 30_000, "r_b": 30_000, "num_clusters": 900_000_000, "use_router": False, "prior_map": "identity"}
PATTERN = {LAYER: {"inputs": [0], "outputs": [0]}}
LISTED = {LAYER: {"inputs": list(range(30_000)), "outputs": list(range(30_000))}}
# What the configuration says, and the tensors of a file whose header it agrees with.
HOSTILE = {
    "no centroids, and as many clusters as experts": (WIDE, thin(30_000)),
    "clusters far beyond the file": ({**WIDE, "prior_map": "auto"}, thin(30_000)),
    "narrow centroids": (
        {"r_a": 1, "r_b": 1, "num_clusters": 4_000_000, "use_router": False, "prior_map": "learned"},
        {**thin(1, trex_map=torch.ones(1, 4_000_000)), **prior(4_000_000)},
    ),
    "layers that the file lacks": (
        {"r_a": 10**6, "r_b": 10**6, "num_clusters": 4, "prior_map": "learned", "expert_pattern": PATTERN},
        {**thin(1, trex_router=torch.ones(1, 1), trex_map=torch.ones(1, 4)), **prior(4)},
    ),
    "one wide layer": (
        {"r_a": 1_000_000, "r_b": 1, "use_router": False, "num_clusters": 1, "prior_map": "learned"},
        {**thin(1_000_000, 1, trex_map=torch.ones(1_000_000, 1)), **prior(1)},
    ),
    "experts that are listed": (
        {**WIDE, "r_a": 40_000, "r_b": 40_000, "num_clusters": 1_600_000_000, "expert_pattern": LISTED},
        thin(30_000),
    ),
    "no prior": (
        {"r_a": 10**6, "r_b": 10**6, "use_prior": False, "expert_pattern": PATTERN},
        thin(1, trex_router=torch.ones(1, 1)),
    ),
}


def written(folder, fields, tensors):
    config = TRexConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM").to_dict()
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    (folder / CONFIG).write_text(json.dumps({**config, "peft_type": "TREX", **fields}))
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_agrees_does_not_help(tmp_path, name):
    written(tmp_path, *HOSTILE[name])
    model = adapted(fit=False)

    def load():
        told, start = [], time.process_time()
        for road in (
            lambda: PeftModel.from_pretrained(make_llama(hidden_size=512, intermediate_size=512), tmp_path),
            lambda: model.load_adapter(tmp_path, "new"),
        ):
            with pytest.raises(ValueError) as error:
                road()
            told.append(str(error.value))
        return [told, time.process_time() - start, "new" in model.peft_config]

    (told, seconds, left), grown, status = in_child(load)
    assert status == 0 and grown < 400 and seconds < 20 and not left
    assert "asks for" in told[0] and "expected at most" in told[0]
    # A narrow model has room for what a narrow file holds, and the tensors' shapes are refused then.
    assert all("expected at most" in each or "lacks" in each or "mismatch" in each for each in told)


def test_an_adapter_of_ones_own_may_be_of_any_size(tmp_path):
    """One that the configuration of another is the pattern for, too."""
    model = adapted()
    model.save_pretrained(tmp_path)
    config = TRexConfig.from_pretrained(str(tmp_path))
    config.r_a = 8
    wider = get_peft_model(make_llama(hidden_size=64), config)
    assert wider.base_model.model.model.layers[0].self_attn.q_proj.trex_A["default"].shape == (8, 64)
    # Beyond what the file is good for, it says how.
    config = TRexConfig.from_pretrained(str(tmp_path))
    config.num_clusters = 2_500_000
    base = make_llama()
    with pytest.raises(ValueError, match=r"the prior, where the file holds \d+ numbers.*built anew: TRexConfig\("):
        get_peft_model(base, config)
    anew = TRexConfig(**config.to_dict())
    assert anew.num_clusters == 2_500_000 and anew.target_modules == config.target_modules
    get_peft_model(base, TRexConfig(**{**anew.to_dict(), "num_clusters": 25}))


def test_a_file_that_is_not_here_yet_leaves_room_for_what_lora_would_take(tmp_path):
    """From a hub, the configuration comes first."""
    model = adapted()
    model.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    config = TRexConfig.from_pretrained(str(tmp_path))
    get_peft_model(make_llama(), config)
    config.r_a, config.r_b = 10**6, 10**6
    with pytest.raises(ValueError, match="where the file holds none that are here"):
        get_peft_model(make_llama(), config)
