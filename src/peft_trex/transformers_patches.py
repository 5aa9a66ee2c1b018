"""All of transformers that is replaced at import: how its models load and save an adapter by themselves.

`model.load_adapter`, and with it `from_pretrained` and `pipeline` of an adapter's folder, read tensors in a way of
their own since transformers 5: what a layer makes room for when it is loaded stays out, and what a file lacks stays at
its start. `save_pretrained` puts one prefix before all keys, those of a prior included.

Models without a T-REX adapter see no change. A method that the installed release does not have is left out.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import fields
from functools import partial
from typing import Any

import transformers.modeling_utils
from huggingface_hub import ModelCard
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from .card import complete_card, facts_of_model
from .config import TRexConfig
from .keys import for_file
from .loading import IN_FILE, check_config, check_weights
from .peft_patches import Method, all_or_nothing, naming_a_missing_tensor, replace_methods
from .prior.adapters import Adapters, is_trex
from .prior.priors import Priors
from .room import NUMBERS, note_file
from .undo import Snapshot

# transformers' report of what was loaded; releases before 5 have none.
Report: Any = getattr(transformers.modeling_utils, "LoadStateDictInfo", None)


def patch_transformers(model_class: type) -> None:
    """Replace methods of `transformers.PreTrainedModel`."""
    replace_methods(model_class, REPLACEMENTS, FOR_ALL)


def _bind(method: Method, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
    """The arguments of a call, with the defaults."""
    call = inspect.signature(method).bind(*args, **kwargs)
    call.apply_defaults()
    return call


def _load_adapter(original: Method, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Have PEFT read a T-REX adapter, with all checks of its file; leave the model as it was if that is refused."""
    arguments = _bind(original, model, *args, **kwargs).arguments
    name = arguments["adapter_name"] or "default"
    folder = os.path.join(str(arguments["peft_model_id"]), (arguments["adapter_kwargs"] or {}).get("subfolder") or "")
    numbers = 0
    if check_config(folder):
        # PEFT's own class, which transformers asks for it, does not look at the weights beside it.
        numbers = getattr(TRexConfig.from_pretrained(folder), NUMBERS, 0)
    before, read = Snapshot(model), getattr(model, "_load_pretrained_model", None)
    # Before transformers 5, PEFT reads the tensors anyway.
    if read is not None:
        model._load_pretrained_model = partial(_read, read, name)
    if arguments["peft_config"] is None:
        note_file(model, numbers)
    try:
        return original(model, *args, **kwargs)
    except BaseException:
        # What another method leaves behind is not ours to decide.
        if is_trex(getattr(model, "peft_config", {}).get(name)):
            before.undo()
        raise
    finally:
        for attribute in ("_load_pretrained_model", NUMBERS):
            vars(model).pop(attribute, None)


def _read(original: Method, adapter_name: str, *, model: Any, **arguments: Any) -> Any:
    """In the place of transformers' own way to read the tensors of an adapter that has just been injected."""
    if not is_trex(model.peft_config[adapter_name]):
        return original(model=model, **arguments)
    layers = Adapters(model, model.peft_config, nn.ModuleDict()).layers_of(adapter_name)
    offloaded = [name for name, layer in layers.items() if layer.trex_A[adapter_name].is_meta]
    if offloaded:
        raise ValueError(
            f"{len(offloaded)} of the layers are offloaded, such as {offloaded[0]}, where transformers' own way "
            "cannot load a T-REX adapter; use PeftModel.from_pretrained(model, folder)."
        )
    tensors = dict(arguments.get("state_dict") or {})
    for path in arguments.get("checkpoint_files") or ():
        check_weights(os.path.dirname(path))
        tensors |= load_file(path)
    tensors = {key.removeprefix(IN_FILE): tensor for key, tensor in tensors.items()}
    with naming_a_missing_tensor():
        set_peft_model_state_dict(model, tensors, adapter_name)
    # What is not as it should be has been refused, so there is nothing to report.
    kinds = {"error_msgs": list, "conversion_errors": dict}
    report = Report(**{field.name: kinds.get(field.name, set)() for field in fields(Report)})
    # Later releases return the place of offloaded weights beside it.
    return (report, None) if str(inspect.signature(original).return_annotation).startswith("tuple") else report


def _save_pretrained(original: Method, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Give the tensors of an active T-REX adapter the keys that PEFT would give them."""
    call = _bind(original, model, *args, **kwargs)
    alone = getattr(model, "_hf_peft_config_loaded", False) and call.arguments["save_peft_format"]
    if not alone or not is_trex(model.peft_config.get(model.active_adapters()[0])):
        return original(model, *args, **kwargs)
    collect = model.get_adapter_state_dict
    model.get_adapter_state_dict = lambda *args, **kwargs: for_file(collect(*args, **kwargs))
    call.arguments["save_peft_format"] = False
    try:
        return original(*call.args, **call.kwargs)
    finally:
        vars(model).pop("get_adapter_state_dict", None)


def _upload_with_card(original: Method, model: Any, working_dir: str, *args: Any, **kwargs: Any) -> Any:
    """Say in the model card how a T-REX adapter is loaded, before it is uploaded."""
    if getattr(model, "_hf_peft_config_loaded", False):
        name, priors = model.active_adapters()[0], Priors.within(model)
        config, path = model.peft_config.get(name), os.path.join(working_dir, "README.md")
        if is_trex(config) and priors is not None:
            card = ModelCard.load(path, ignore_metadata_errors=True)
            card.data["base_model"] = card.data.get("base_model") or config.base_model_name_or_path
            card.save(path)
            tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
            complete_card(path, type(model).__name__, facts_of_model(tuner.around(priors), name))
    return original(model, working_dir, *args, **kwargs)


def _add_adapter(original: Method, model: Any, adapter_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Leave the model as it was if a T-REX adapter cannot be added."""
    if not is_trex(adapter_config):
        return original(model, adapter_config, *args, **kwargs)
    return all_or_nothing(original, model, adapter_config, *args, **kwargs)


REPLACEMENTS: dict[str, Method] = {
    "load_adapter": _load_adapter,
    "add_adapter": _add_adapter,
    "delete_adapter": all_or_nothing,
    "save_pretrained": _save_pretrained,
    "_upload_modified_files": _upload_with_card,
}
FOR_ALL = ("load_adapter", "add_adapter")
