"""What to write in a configuration instead of LoRA's words, and of those of PEFT's other methods."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

Kind = TypeVar("Kind", bound=type)
SIZE = (
    "write r_a and r_b, the numbers of input and output vectors of a layer (rows of A, columns of B), or "
    "TRexConfig.like_lora({}), which trains about as many parameters as LoRA of rank {}"
)
SCALE = "leave it out, T-REX has no alpha: token_scale and prior_scale weigh the experts, by default as the paper does"
DROPOUT = "write trex_dropout={}, which is the same"
START = (
    "leave it out, it starts LoRA's A and B: init_weights has T-REX's starts, and trex_from_lora begins with LoRA "
    "adapters that are trained already"
)
VARIANT = "leave it out, it belongs to a variant of LoRA that T-REX does not have"
MEGATRON = "leave it out, T-REX has no layers of its own for Megatron's parallel ones"
# Each field of LoraConfig that TRexConfig lacks; {} is the value that it was given.
OF_LORA = {
    "r": SIZE,
    "lora_alpha": SCALE,
    "lora_dropout": DROPOUT,
    "rank_pattern": "write r_a_pattern and r_b_pattern, whose keys fit the layers' names in the same way",
    "alpha_pattern": "leave it out, T-REX has no alpha: expert_pattern gives a layer a token_scale of its own",
    "use_rslora": "leave it out, T-REX has no alpha whose scale would depend on the rank",
    "init_lora_weights": START,
    "corda_config": START,
    "eva_config": START,
    "loftq_config": START,
    "lora_ga_config": START,
    "lora_bias": "leave it out, B has no bias: bias='trex_only' trains those of the adapted layers",
    "use_dora": VARIANT,
    "use_qalora": VARIANT,
    "qalora_group_size": VARIANT,
    "use_bdlora": VARIANT,
    "kasa_config": VARIANT,
    "monteclora_config": VARIANT,
    "velora_config": VARIANT,
    "arrow_config": f"{VARIANT}: trex_from_lora turns several LoRA adapters into experts, among which T-REX chooses",
    "alora_invocation_tokens": f"{VARIANT}: prior_scope='answer' keeps the prior, not the adapter, from the prompt",
    "layer_replication": "leave it out, T-REX repeats no layers: give it a base model that has them",
    "runtime_config": "leave it out, T-REX's parameters are where those of the layer are",
    "megatron_config": MEGATRON,
    "megatron_core": MEGATRON,
    "trainable_token_indices": (
        "write modules_to_save with the name of the token embedding, of which all rows are then trained, T-REX trains "
        "no choice of them"
    ),
    "ensure_weight_tying": (
        "leave it out, T-REX keeps no trained modules tied: untie them before the adapter is made (a copy of the "
        "weight, and tie_word_embeddings=False in the model's configuration), or train neither of them"
    ),
}
# Words for the same things in PEFT's other methods, as patterns of the whole word.
OF_OTHERS = {
    r"rank|dim|(init|target|mini|hybrid)_r|(effective|subspace)_rank": SIZE,
    r"(\w+_)?alpha|scaling": SCALE,
    r"(?!rank_|module_)(\w+_)?dropout(_p)?": DROPOUT,
    r"init(_\w+)?_weights": START,
}


def in_own_words(kind: Kind) -> Kind:
    """Decorate a configuration so that it tells what to write instead of words that it does not know."""
    init: Any = kind.__init__  # type: ignore[misc]
    known = inspect.signature(init).parameters

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        foreign = {name: value for name, value in kwargs.items() if name not in known}
        if foreign:
            raise TypeError(explain(kind.__name__, foreign, known))
        init(self, *args, **kwargs)

    kind.__init__ = checked  # type: ignore[misc]
    return kind


def explain(kind: str, foreign: Mapping[str, Any], known: Collection[str]) -> str:
    """A sentence for each word, with its value, that a configuration does not know."""
    # PEFT knows the error of a field in a file that it should leave out by Python's own words, which come first.
    lines = [f"- {name}: {_instead(name, value, known)}." for name, value in foreign.items()]
    head = f"{kind} got an unexpected keyword argument: {', '.join(foreign)}. T-REX has words of its own:"
    return "\n".join([head, *lines])


def _instead(name: str, value: Any, known: Collection[str]) -> str:
    if name in OF_LORA:
        return _filled(OF_LORA[name], value)
    kinds = {each.__name__ for each in PEFT_TYPE_TO_CONFIG_MAPPING.values() if name in _fields_of(each)}
    text = next((text for pattern, text in OF_OTHERS.items() if re.fullmatch(pattern, name)), None)
    if text is not None:
        return _filled(text, value)
    if kinds:
        return f"leave it out, it is a word of {', '.join(sorted(kinds))}, for which T-REX has none"
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}" if close else "no method of PEFT has it; help(TRexConfig) explains the fields"


def _filled(text: str, value: Any) -> str:
    return text.replace("{}", repr(value))


def _fields_of(kind: Any) -> Collection[str]:
    return getattr(kind, "__dataclass_fields__", ())
