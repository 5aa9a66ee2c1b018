"""The rules of a configuration's values, one by one and together: what cannot be is refused when it is built."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

from .prior.chat import check_markers

POSITIVE = "a positive, finite number"
COUNT = "a whole number of at least 1, less than 2**63"
COUNTS = ("r_a", "r_b", "num_clusters", "prior_dim", "prior_whitening", "router_rank", "router_top_k")
SIZES = ("r_a_pattern", "r_b_pattern")
NAMES = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_pattern")
# The rules of the numbers, in words and as a function. Where the default is None, None is allowed too.
NUMBERS: dict[str, tuple[tuple[str, ...], Callable[[float], bool]]] = {
    COUNT: (COUNTS, lambda x: isinstance(x, int) and 1 <= x < 2**63),
    POSITIVE: (("token_scale", "prior_scale", "gate_temperature"), lambda x: 0 < x < math.inf),
    "a finite number, at least 0": (("balance_loss_coef", "router_z_loss_coef"), lambda x: 0 <= x < math.inf),
    "a number of at least 0 and less than 1": (("trex_dropout",), lambda x: 0 <= x < 1),
}
# The knobs that have no use when the router or the prior is left out.
NEEDED = {
    "use_router": "token_scale router_rank router_top_k balance_loss_coef router_z_loss_coef init_weights".split(),
    "use_prior": "prior_map shared_core prior_encoder prior_whitening prior_scope chat_markers".split(),
}


def check_names(config: Any) -> None:
    """Raise a TypeError if a field that holds modules' names holds anything else."""
    for name in NAMES:
        value = getattr(config, name)
        names = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(names, (list, tuple, set)) or not all(isinstance(each, str) for each in names):
            raise TypeError(f"{name}={value!r} must be a name or a list of names.")


def check_values(config: Any, kind: type) -> None:
    """Raise if a field has a value that it can never have; `kind` is the class that declares the fields."""
    for name, annotation in kind.__annotations__.items():
        if annotation is bool or get_origin(annotation) is Literal:
            value, choices = getattr(config, name), get_args(annotation) or (True, False)
            # Python takes 1 for equal to True, but it is no choice.
            if not any(value == choice and isinstance(value, type(choice)) for choice in choices):
                raise ValueError(f"{name}={value!r} is unknown; it must be one of {', '.join(map(str, choices))}.")
    check_markers(config.chat_markers)
    for rule, (names, _) in NUMBERS.items():
        for name in names:
            value = getattr(config, name)
            if (name, value) == ("prior_whitening", "auto"):
                continue
            if value is not None or getattr(kind, name) is not None:
                check_number(name, value, rule)


def check_combinations(config: Any, kind: type) -> None:
    """Raise if values that could be by themselves do not go together."""
    if not (config.use_router or config.use_prior):
        raise ValueError("use_router=False and use_prior=False leave nothing to mix; set at least one to True.")
    if config.expert_layout == "paired" and config.r_a != config.r_b:
        raise ValueError(f"expert_layout='paired' needs r_a = r_b; got r_a={config.r_a} and r_b={config.r_b}.")
    for switch, names in NEEDED.items():
        for name in names:
            # init_weights=False draws B too, so it has a use without a router.
            if not getattr(config, switch) and getattr(config, name) not in (getattr(kind, name), False):
                raise ValueError(f"{name}={getattr(config, name)!r} is for a part that {switch}=False drops.")
    if config.router_top_k is not None and config.router_top_k > config.num_experts:
        raise ValueError(f"router_top_k={config.router_top_k} is more than the {config.num_experts} experts.")
    if config.trainable == "router" and not (config.use_router or config.learned_map or config.shared_core):
        raise ValueError(
            "trainable='router' trains what chooses experts, but there is nothing that does: use_router=False, "
            "shared_core=False, and the prior has no learned map (prior_map='learned')."
        )
    sized = config.r_a_pattern or config.r_b_pattern
    if config.prior_map == "identity" and sized:
        raise ValueError(
            "prior_map='identity' needs as many clusters as experts in every layer, which r_a_pattern and r_b_pattern "
            "make different; use prior_map='learned'."
        )
    if config.expert_layout == "paired" and config.r_a_pattern != config.r_b_pattern:
        raise ValueError(
            f"expert_layout='paired' needs r_a = r_b in every layer; got r_a_pattern={config.r_a_pattern} and "
            f"r_b_pattern={config.r_b_pattern}, which must be the same."
        )
    if config.prior_map == "identity" and config.num_clusters != config.num_experts:
        raise ValueError(
            f"prior_map='identity' needs as many clusters as experts; got num_clusters={config.num_clusters} and "
            f"{config.num_experts} experts. Use prior_map='learned' or change one of them."
        )
    if (config.prior_encoder == "external") != (config.prior_dim is not None):
        raise ValueError(
            f"prior_encoder={config.prior_encoder!r} does not go with prior_dim={config.prior_dim}: 'external' needs "
            "the width of `semantic_embeds` there, and 'input_embeddings' None, since the base model tells it."
        )
    if config.layers_to_transform is not None and isinstance(config.target_modules, str):
        raise ValueError(
            "layers_to_transform needs target_modules to be a list of module names, or None for all linear "
            f"layers; got target_modules={config.target_modules!r}."
        )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError(f"layers_pattern={config.layers_pattern!r} has no use without layers_to_transform.")


def settle_size_patterns(config: Any) -> None:
    """Make dicts of the pairs that a file holds; raise if a pattern gives no sizes by names or regular expressions."""
    for name in SIZES:
        pattern = getattr(config, name)
        if isinstance(pattern, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pattern):
            pattern = {str(key): size for key, size in pattern}
            setattr(config, name, pattern)
        if not isinstance(pattern, dict) or not all(isinstance(key, str) for key in pattern):
            raise TypeError(f"{name}={pattern!r} must be a dict of numbers by layers' names, such as {{'q_proj': 8}}.")
        for key, size in pattern.items():
            check_number(f"{name}[{key!r}]", size, COUNT)
            try:
                re.compile(key)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{name} has the key {key!r}, which is no regular expression: {error}.") from error


def check_expert_pattern(config: Any) -> None:
    """Raise if `expert_pattern` asks for vectors that a layer of full size has not."""
    pattern: Any = config.expert_pattern
    if not isinstance(pattern, dict):
        raise TypeError(
            f"expert_pattern is a {type(pattern).__name__}; expected a dict of entries such as "
            "{'inputs': [0, 2], 'outputs': [0, 1, 5]} by the layers' names."
        )
    # The layers' own sizes are not looked up: a regular expression from elsewhere has not been tried yet.
    counts = {
        "inputs": max(config.r_a, *config.r_a_pattern.values()) if config.r_a_pattern else config.r_a,
        "outputs": max(config.r_b, *config.r_b_pattern.values()) if config.r_b_pattern else config.r_b,
    }
    for layer, entry in pattern.items():
        name = f"expert_pattern[{layer!r}]"
        if not isinstance(entry, dict) or not set(counts) <= set(entry) <= {*counts, "token_scale"}:
            raise ValueError(
                f"{name}={entry!r} must be a dict of 'inputs' and 'outputs', and 'token_scale' if it has its own."
            )
        for side, count in counts.items():
            numbers = entry[side]
            whole = isinstance(numbers, list) and all(isinstance(number, int) for number in numbers) and numbers
            if not whole or numbers != sorted(set(numbers)) or not 0 <= numbers[0] <= numbers[-1] < count:
                raise ValueError(
                    f"{name} has {side} {numbers!r}; expected a list of at least one of the numbers 0 to "
                    f"{count - 1}, ascending."
                )
        if config.expert_layout == "paired" and entry["inputs"] != entry["outputs"]:
            raise ValueError(
                f"{name} has inputs {entry['inputs']} and outputs {entry['outputs']}; with "
                "expert_layout='paired' they must be the same."
            )
        if "token_scale" in entry:
            name = f"{name}['token_scale']"
            check_number(name, entry["token_scale"], POSITIVE)
            if not config.use_router:
                raise ValueError(f"{name} scales the token router, which use_router=False drops.")


def check_number(name: str, value: Any, rule: str) -> None:
    """Raise if a number breaks one of the rules of `NUMBERS`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not NUMBERS[rule][1](value):
        raise (ValueError if is_number else TypeError)(f"{name}={value!r} must be {rule}.")
