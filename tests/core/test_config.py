"""Every knob of TRexConfig is checked, and a saved config is the same when it is loaded."""

import dataclasses

import pytest
from peft import PeftConfig, PeftType

from peft_trex import TRexConfig


def test_defaults_are_the_papers():
    config = TRexConfig()
    assert (config.r_a, config.r_b, config.num_clusters, config.expert_layout) == (4, 8, 32, "grid")
    assert (config.prior_scale, config.gate_temperature, config.num_experts) == (4.0, 100.0, 32)
    assert not config.learned_map
    assert config.peft_type == PeftType.TREX


def test_overrides_of_the_recommended_form_win():
    recommended = TRexConfig.recommended()
    assert (recommended.use_router, recommended.shared_core, recommended.learned_map) == (False, True, True)
    assert (recommended.r_a, recommended.r_b, recommended.prior_scale) == (8, 8, 16)
    assert recommended.prior_whitening == "auto"
    changed = TRexConfig.recommended(r_a=4, prior_whitening=16, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert (changed.r_a, changed.r_b, changed.prior_whitening, changed.target_modules) == (4, 8, 16, {"q_proj"})
    with pytest.raises(ValueError, match="shared_core=True is for a part that use_prior=False drops"):
        TRexConfig.recommended(use_prior=False, use_router=True, prior_map="auto", prior_whitening=None)


def test_each_field_has_its_explanation_and_the_docstring_has_the_same():
    documented = " ".join(TRexConfig.__doc__.split())
    knobs = [field for field in dataclasses.fields(TRexConfig) if field.name in TRexConfig.__annotations__]
    assert len(knobs) == 36
    for knob in knobs:
        assert documented.count(f" {knob.name}: {knob.metadata['help']} ") == 1


@pytest.mark.parametrize(
    ("settings", "learned"),
    [
        ({"r_a": 2, "r_b": 3}, True),
        ({"r_a": 2, "r_b": 3, "num_clusters": 6}, False),
        ({"r_a": 2, "r_b": 3, "num_clusters": 6, "prior_map": "learned"}, True),
        ({"r_a": 6, "r_b": 6, "num_clusters": 6, "expert_layout": "paired"}, False),
        ({"r_a": 2, "r_b": 3, "use_prior": False}, False),
    ],
)
def test_auto_map_is_the_identity_where_it_can_be(settings, learned):
    assert TRexConfig(**settings).learned_map is learned


def test_all_may_be_drawn_without_a_router():
    assert TRexConfig(init_weights=False, use_router=False).init_weights is False


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r_a": 0}, ["r_a=0", "at least 1"]),
        ({"r_a": 2.5}, ["r_a=2.5", "whole number"]),
        ({"r_a": None}, ["r_a=None", "whole number"]),
        ({"prior_scale": None}, ["prior_scale=None", "positive"]),
        ({"r_b": True}, ["r_b=True", "whole number"]),
        ({"r_b": "8"}, ["r_b='8'", "whole number"]),
        ({"num_clusters": -1}, ["num_clusters=-1", "at least 1"]),
        ({"expert_layout": "ring"}, ["expert_layout='ring'", "grid, paired"]),
        ({"prior_map": "linear"}, ["prior_map='linear'", "auto, identity, learned"]),
        ({"prior_encoder": "bert"}, ["prior_encoder='bert'", "input_embeddings, external"]),
        ({"bias": "lora_only"}, ["bias='lora_only'", "trex_only"]),
        ({"use_router": "no"}, ["use_router='no'", "one of True, False"]),
        ({"token_scale": 0}, ["token_scale=0", "positive"]),
        ({"token_scale": "1"}, ["token_scale='1'", "number"]),
        ({"prior_scale": float("nan")}, ["prior_scale=nan", "finite"]),
        ({"gate_temperature": -1.0}, ["gate_temperature=-1.0", "positive"]),
        ({"gate_temperature": float("inf")}, ["gate_temperature=inf", "finite"]),
        ({"trex_dropout": 1.0}, ["trex_dropout=1.0", "less than 1"]),
        ({"trex_dropout": -0.1}, ["trex_dropout=-0.1", "at least 0"]),
        ({"use_router": False, "use_prior": False}, ["use_router=False", "use_prior=False"]),
        ({"expert_layout": "paired"}, ["r_a=4", "r_b=8", "r_a = r_b"]),
        ({"use_router": False, "token_scale": 2.0}, ["token_scale=2.0", "use_router=False"]),
        ({"use_router": False, "router_rank": 2}, ["router_rank=2", "use_router=False"]),
        ({"prior_whitening": 0}, ["prior_whitening=0"]),
        ({"prior_whitening": 16, "use_prior": False}, ["prior_whitening=16", "use_prior=False"]),
        ({"prior_whitening": "auto", "use_prior": False}, ["prior_whitening='auto'", "use_prior=False"]),
        ({"prior_whitening": "all"}, ["prior_whitening='all'", "whole number"]),
        ({"shared_core": 1}, ["shared_core=1", "one of True, False"]),
        ({"shared_core": True, "use_prior": False}, ["shared_core=True", "use_prior=False"]),
        ({"init_weights": "gaussian"}, ["init_weights='gaussian'", "one of True, False, random_router, zero_router"]),
        ({"init_weights": 1}, ["init_weights=1", "one of True, False, random_router"]),
        ({"init_weights": "random_router", "use_router": False}, ["'random_router'", "use_router=False"]),
        ({"init_weights": "zero_router", "use_router": False}, ["'zero_router'", "use_router=False"]),
        ({"router_rank": 0}, ["router_rank=0", "at least 1"]),
        ({"router_rank": 2.0}, ["router_rank=2.0", "whole number"]),
        ({"balance_loss_coef": -0.1}, ["balance_loss_coef=-0.1", "at least 0"]),
        ({"router_z_loss_coef": float("inf")}, ["router_z_loss_coef=inf", "finite"]),
        ({"balance_loss_coef": "1"}, ["balance_loss_coef='1'", "number"]),
        ({"balance_loss_coef": 0.1, "use_router": False}, ["balance_loss_coef=0.1", "use_router=False"]),
        ({"router_top_k": 0}, ["router_top_k=0", "at least 1"]),
        ({"router_top_k": True}, ["router_top_k=True", "whole number"]),
        ({"router_top_k": 33}, ["router_top_k=33", "32 experts"]),
        ({"router_top_k": 2, "use_router": False}, ["router_top_k=2", "use_router=False"]),
        ({"use_prior": False, "prior_map": "learned"}, ["prior_map='learned'", "use_prior=False"]),
        ({"use_prior": False, "prior_encoder": "external"}, ["prior_encoder='external'", "use_prior=False"]),
        ({"prior_map": "identity", "num_clusters": 31}, ["num_clusters=31", "32 experts"]),
        ({"prior_encoder": "external"}, ["prior_dim", "None"]),
        ({"prior_dim": 5}, ["prior_dim=5", "external"]),
        ({"prior_encoder": "external", "prior_dim": 0}, ["prior_dim=0", "at least 1"]),
        ({"layers_to_transform": [0], "target_modules": "all-linear"}, ["target_modules='all-linear'"]),
        ({"layers_pattern": "layers", "target_modules": ["q"]}, ["layers_pattern='layers'", "layers_to_transform"]),
        ({"task_type": "CAUSAL"}, ["CAUSAL"]),
    ],
)
def test_refuses_by_name(settings, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        TRexConfig(**settings)
    for word in words:
        assert word in str(caught.value)


def test_round_trip(tmp_path):
    config = TRexConfig(
        r_a=3,
        r_b=3,
        expert_layout="paired",
        num_clusters=5,
        token_scale=2.5,
        trex_dropout=0.1,
        prior_encoder="external",
        prior_dim=7,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[1],
        bias="trex_only",
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(tmp_path)
    for loaded in (TRexConfig.from_pretrained(str(tmp_path)), PeftConfig.from_pretrained(str(tmp_path))):
        assert isinstance(loaded, TRexConfig)
        assert loaded.to_dict() == config.to_dict()


def test_a_bad_value_in_a_saved_config_is_refused(tmp_path):
    TRexConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    text = file.read_text().replace('"expert_layout": "grid"', '"expert_layout": "hexagon"')
    file.write_text(text)
    with pytest.raises(ValueError, match="expert_layout='hexagon'"):
        PeftConfig.from_pretrained(str(tmp_path))
    assert file.read_text() == text
