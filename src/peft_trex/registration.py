"""The one place that touches PEFT's tables: a new member in its enum of methods, and the method's registration.

`peft.utils.register_peft_method` takes only names that its enum already holds, and PEFT has no entry point for
plug-ins, so the member is added here. This file imports nothing heavy at load, and can be tested without torch.
`peft_patches.py` holds what is replaced in PEFT.
"""

from __future__ import annotations

import enum
import warnings
from typing import Any

METHOD = "trex"


def extend_str_enum(enum_class: type[enum.Enum], name: str, value: str) -> enum.Enum:
    """Add a member to a string enum that is already defined, and return it; an existing member is returned unchanged.

    Lookup by value and by name, attribute access, iteration, `in`, copying, pickling and JSON work as for any other
    member, on Python 3.10 to 3.14.
    """
    if name in enum_class.__members__:
        return enum_class[name]
    if not issubclass(enum_class, str):
        raise TypeError(f"{enum_class.__name__} is not a string enum; a member {name!r} cannot be added to it.")
    if value in enum_class._value2member_map_:
        other = enum_class._value2member_map_[value].name
        raise ValueError(f"{enum_class.__name__} already has the value {value!r}, under the name {other!r}.")
    member: Any = str.__new__(enum_class, value)
    member._name_ = name
    member._value_ = value
    member.__objclass__ = enum_class
    member._sort_order_ = len(enum_class._member_names_)
    # Python 3.11 and later look members up as class attributes, 3.10 in the map. Enum's own __setattr__ refuses both.
    type.__setattr__(enum_class, name, member)
    enum_class._member_map_[name] = member
    enum_class._member_names_.append(name)
    enum_class._value2member_map_[value] = member
    return member


def register(config_class: type, model_class: type) -> None:
    """Make `PeftType.TREX` known to PEFT; importing the package again replaces what the first import registered.

    Should PEFT itself bring a method of this name, PEFT's stays as it is, with a warning, and `TRexConfig` refuses to
    be built.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.peft_model import PeftModel
    from peft.utils import PeftType, register_peft_method
    from transformers import PreTrainedModel

    from .peft_patches import patch_hotswap, patch_optimizers, patch_peft_model
    from .transformers_patches import patch_transformers

    member: Any = extend_str_enum(PeftType, METHOD.upper(), METHOD.upper())
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(member, config_class)
    if registered.__module__.partition(".")[0] != __name__.partition(".")[0]:
        warnings.warn(
            f"This release of PEFT brings a method {member.value} of its own ({registered.__module__}). It was left "
            "as it is, and peft_trex did not register its own: use PEFT's, or an older PEFT.",
            stacklevel=2,
        )
        return
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(member, None)
    register_peft_method(name=METHOD, config_cls=config_class, model_cls=model_class)
    patch_peft_model(PeftModel)
    patch_optimizers()
    patch_hotswap()
    patch_transformers(PreTrainedModel)
