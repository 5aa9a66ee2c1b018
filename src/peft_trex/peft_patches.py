"""All of PEFT that is replaced at import, because PEFT has no place to plug it in.

These are methods of `peft.PeftModel`, what the optimizers of `peft.optimizers` begin with, and `hotswap_adapter`.

Models without a T-REX adapter see no change. A method that the installed releases do not have is left out, and
CONTRIBUTING.md says what is lost then. Importing the package again replaces nothing twice. `transformers_patches.py`
does the same for transformers' models, which load adapters themselves.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from huggingface_hub import hf_hub_download
from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .card import complete_card, facts_of_model
from .loading import FOREIGN, IN_FILE, PICKLE, PREFIX, check_config, check_weights
from .prior.adapters import is_trex
from .prior.priors import Priors
from .undo import Snapshot, Undone, copies

Method = Callable[..., Any]
MARK = "_trex_replacement"
# The helpers of peft.optimizers, and what each of them calls first with the model or its parameters. A helper that was
# imported before this package is PEFT's own function, but it looks these up when it is called.
OPTIMIZERS = {
    "create_loraplus_optimizer": ("loraplus", "get_parameter_names"),
    "create_lorafa_optimizer": ("lorafa", "LoraFAOptimizer.__init__"),
    "create_riemannian_optimizer": ("riemannian", "_collect_lora_pairs"),
}

# What two adapters may differ in that are swapped: how they began and were trained, and where they come from. The
# names of modules may be written in several ways, and the tensors tell which they are.
SWAPPED_ANYHOW = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "revision"),
    *("peft_version", "peft_trex_version", "init_weights", "trainable", "trex_dropout", "mixture_implementation"),
    *("balance_loss_coef", "router_z_loss_coef", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}


def patch_peft_model(model_class: type) -> None:
    """Replace methods of `peft.PeftModel`."""
    replace_methods(model_class, REPLACEMENTS, FOR_ALL)


def replace_methods(model_class: type, replacements: Mapping[str, Method], for_all: Collection[str]) -> None:
    """Replace methods of a class of models; one that is replaced already stays as it is.

    Args:
        model_class: the class.
        replacements: by the names of the methods, what takes their place and gets the original first.
        for_all: those that also see models in which there is no T-REX adapter yet.
    """
    for name, replacement in replacements.items():
        method = getattr(model_class, name, None)
        if method is None or _is_replacement(inspect.unwrap(method, stop=_is_replacement)):
            continue
        if inspect.ismethod(method):
            setattr(model_class, name, classmethod(_marked(replacement, method.__func__)))
        else:
            wrapped = _marked if name in for_all else _with_adapter
            setattr(model_class, name, wrapped(replacement, method))


def patch_optimizers() -> None:
    """Have the optimizers of `peft.optimizers`, which know LoRA's parameters by name, refuse those of T-REX."""
    for helper, (module, place) in OPTIMIZERS.items():
        *owners, name = place.split(".")
        try:
            owner = functools.reduce(getattr, owners, importlib.import_module(f"peft.optimizers.{module}"))
            method = getattr(owner, name)
        except (ImportError, AttributeError):
            continue
        if not _is_replacement(method):
            setattr(owner, name, _marked(functools.partial(_for_lora, helper), method))


def patch_hotswap() -> None:
    """Have `peft.utils.hotswap.hotswap_adapter` swap adapters of T-REX, which PEFT refuses as it does all but LoRA."""
    try:
        module = importlib.import_module("peft.utils.hotswap")
        original = module.hotswap_adapter
    except (ImportError, AttributeError):
        return
    if not _is_replacement(original):
        vars(module)["hotswap_adapter"] = _marked(_hotswap, original)


def _hotswap(
    original: Method, model: Any, model_name_or_path: Any, adapter_name: str, torch_device: Any = None, **places: Any
) -> None:
    """Put the tensors of a file in the place of an adapter's, its prior included, without making anything anew.

    Raises:
        ValueError: if the adapter is merged, or the file's configuration differs in what an adapter computes.
    """
    configs = getattr(model, "peft_config", {}) if hasattr(model, "active_peft_config") else {}
    config = configs.get(adapter_name)
    if not is_trex(config) and (config is not None or not any(map(is_trex, configs.values()))):
        return original(model, model_name_or_path, adapter_name, torch_device=torch_device, **places)
    if config is None:
        raise ValueError(f"There is no adapter {adapter_name!r} to swap; the model has {sorted(configs)}.")
    other = PeftConfig.from_pretrained(model_name_or_path, **places)
    advice = f"load it under another name, model.load_adapter({str(model_name_or_path)!r}, ...), and set_adapter."
    if not is_trex(other):
        raise ValueError(
            f"{model_name_or_path} is a {other.peft_type.value} adapter, and {adapter_name!r} is TREX; {advice}"
        )
    names = [field.name for field in fields(config) if field.name not in SWAPPED_ANYHOW]
    values = {name: (getattr(config, name), getattr(other, name)) for name in names}
    unlike = [f"{name} ({one!r} and {two!r})" for name, (one, two) in values.items() if one != two]
    if unlike:
        raise ValueError(
            f"The adapter {adapter_name!r} and the one in {model_name_or_path} differ in {', '.join(unlike)}; "
            f"expected equal ones, since a swap changes tensors alone. Instead {advice}"
        )
    if any(adapter_name in getattr(layer, "merged_adapters", ()) for layer in model.modules()):
        raise ValueError(f"The adapter {adapter_name!r} is merged; call unmerge_adapter() before it is swapped.")
    # Otherwise PEFT would put the whole model into eval mode.
    model.load_adapter(model_name_or_path, adapter_name, is_trainable=True, torch_device=torch_device, **places)


def _for_lora(helper: str, original: Method, *args: Any, **kwargs: Any) -> Any:
    """Raise a ValueError if parameters of T-REX are among those that an optimizer for LoRA is made for."""
    for name, parameter in _named_parameters(args):
        if parameter.requires_grad and f".{PREFIX}" in name:
            raise ValueError(
                f"{helper} is for LoRA, whose A and B it finds by their names. It would train T-REX's parameters, "
                f"such as {name}, without what it is for. Use one of torch's optimizers; where B is to have a rate "
                "of its own, give it groups of parameters: those of B have '.trex_B.' in their names."
            )
    return original(*args, **kwargs)


def _named_parameters(arguments: Iterable[Any]) -> Iterable[tuple[str, Any]]:
    """The parameters, by name, of the models and of the groups of parameters with names among some arguments."""
    for argument in arguments:
        if isinstance(argument, nn.Module):
            yield from argument.named_parameters()
        elif isinstance(argument, list):
            for group in argument:
                if isinstance(group, dict) and "names" in group:
                    yield from zip(group["names"], group["params"], strict=True)


def _is_replacement(method: Any) -> bool:
    # functools.wraps copies attributes to whatever wraps a replacement later, so the mark names its own function.
    return getattr(method, MARK, None) is getattr(method, "__func__", method)


def _marked(replacement: Method, original: Method) -> Method:
    """The function that takes the replacement, which gets the original."""

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(method, MARK, method)
    return method


def _with_adapter(replacement: Method, original: Method) -> Method:
    """The same for a model with a T-REX adapter; other models take the original."""

    def for_adapter(original: Method, model: Any, *args: Any, **kwargs: Any) -> Any:
        # A model of transformers has no such attribute before its first adapter.
        if any(map(is_trex, getattr(model, "peft_config", {}).values())):
            return replacement(original, model, *args, **kwargs)
        return original(model, *args, **kwargs)

    return _marked(for_adapter, original)


def _write_card(original: Method, model: Any, output_dir: str) -> None:
    """Fill in the model card with what a T-REX adapter is and needs, wherever PEFT or a Trainer writes the card."""
    original(model, output_dir)
    names = [name for name, config in model.peft_config.items() if config.peft_type == "TREX"]
    name = next((name for name in names if name in model.active_adapters), names[0])
    auto_class = type(model).__name__.replace("PeftModel", "AutoModel")
    complete_card(os.path.join(output_dir, "README.md"), auto_class, facts_of_model(model.base_model, name))


def _upload_with_card(original: Method, model: Any, working_dir: str, *args: Any, **kwargs: Any) -> Any:
    """Write PEFT's model card once more before an upload: transformers' `push_to_hub` puts its own card over it."""
    model.create_or_update_model_card(working_dir)
    return original(model, working_dir, *args, **kwargs)


def _load_into(original: Method, model: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """Check a file also where a resumed Trainer loads it into an adapter that exists; take back an adapter in vain.

    PEFT reads no configuration then, and reading the configuration is what checks the file elsewhere. From a hub, PEFT
    would take a pickle where there is nothing else.
    """
    places = model._split_kwargs(dict(kwargs))[0]
    if "use_auth_token" in places:
        places["token"] = places.pop("use_auth_token")
    folder = _local(model_id, places)
    check_config(folder)
    if os.path.isdir(str(model_id)):
        check_weights(folder)
    else:
        try:
            hf_hub_download(str(model_id), SAFETENSORS_WEIGHTS_NAME, **places)
        except (OSError, ValueError) as error:
            raise ValueError(f"{model_id} has no {SAFETENSORS_WEIGHTS_NAME} ({error}). {PICKLE}") from error
    with Undone(Snapshot(model, values=copies(_loaded_into(model, adapter_name)))):
        with naming_a_missing_tensor(IN_FILE):
            return original(model, model_id, adapter_name, *args, **kwargs)


@contextmanager
def naming_a_missing_tensor(start: str = "") -> Iterator[None]:
    """PEFT looks the tensors of modules_to_save, whose keys begin so, up without a question."""
    try:
        yield
    except KeyError as error:
        if str(error.args[0]).startswith(start):
            raise ValueError(f"The adapter file lacks the tensor {error.args[0]}. {FOREIGN}.") from error
        raise


def _loaded_into(model: Any, adapter_name: str) -> set[Tensor]:
    """The tensors that weights are loaded into if the adapter exists: its own, and those trained beside it."""
    if adapter_name not in model.peft_config:
        return set()
    tensors = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            tensors.update(module.parameters())
        elif isinstance(module, Priors):
            tensors.update(module.buffers())
        elif hasattr(module, "parameters_of"):
            tensors.update(module.parameters_of(adapter_name), module.trex_static.buffers())
    return tensors


def _from_pretrained(original: Method, cls: type, model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
    """Leave the base model as it was when an adapter's files are refused, which PEFT reads after it has changed it."""
    check_config(_local(model_id, kwargs))
    before = Snapshot(model)
    try:
        return original(cls, model, model_id, *args, **kwargs)
    except BaseException:
        # What another method leaves behind is PEFT's to decide.
        if Priors.within(model) is not None:
            before.undo()
        raise


def all_or_nothing(original: Method, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Leave the model as it was if an adapter is added or deleted, and something ends that half-way."""
    with Undone(Snapshot(model)):
        return original(model, *args, **kwargs)


def _local(model_id: Any, places: Mapping[str, Any]) -> str:
    return os.path.join(str(model_id), places.get("subfolder") or "")


def _find_offloaded(original: Method, model: Any, offload_index: Any, adapters_weights: Any) -> Any:
    """Let the tensors of layers that a device map sends to the disk be found there.

    PEFT's index has the adapter's name before the last part of each key, which is right for `lora_A.weight` and wrong
    for `trex_A`.
    """
    result = original(model, offload_index, adapters_weights)
    for key in list(offload_index or ()):
        *layer, adapter_name, tensor = key.split(".")
        if tensor.startswith(PREFIX) and adapter_name in model.peft_config:
            offload_index[".".join((*layer, tensor, adapter_name))] = offload_index[key]
    return result


REPLACEMENTS: dict[str, Method] = {
    "create_or_update_model_card": _write_card,
    "_upload_modified_files": _upload_with_card,
    "add_adapter": all_or_nothing,
    "delete_adapter": all_or_nothing,
    "load_adapter": _load_into,
    "from_pretrained": _from_pretrained,
    "_update_offload": _find_offloaded,
}
FOR_ALL = ("from_pretrained",)
