"""All of PEFT that is replaced at import: methods of `peft.PeftModel`, because PEFT has no place to plug these in.

Models without a T-REX adapter see no change. A method that the installed releases do not have is left out, and
CONTRIBUTING.md says what is lost then. Importing the package again replaces nothing twice.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from .loading import PREFIX, check_adapter_file, complete_card
from .undo import Snapshot, Undone, copies

Method = Callable[..., Any]
MARK = "_trex_replacement"


def patch_peft_model(model_class: type) -> None:
    """Replace methods of `peft.PeftModel`; a method that is replaced already stays as it is."""
    for name, replacement in REPLACEMENTS.items():
        method = getattr(model_class, name, None)
        if method is not None and not _is_replacement(inspect.unwrap(method, stop=_is_replacement)):
            setattr(model_class, name, _with_adapter(replacement, method))


def _is_replacement(method: Any) -> bool:
    # functools.wraps copies attributes to whatever wraps a replacement later, so the mark names its own function.
    return getattr(method, MARK, None) is method


def _with_adapter(replacement: Method, original: Method) -> Method:
    """The method that takes the replacement, which gets the original, for a model with a T-REX adapter."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(config.peft_type == "TREX" for config in self.peft_config.values()):
            return replacement(original, self, *args, **kwargs)
        return original(self, *args, **kwargs)

    setattr(method, MARK, method)
    return method


def _write_card(original: Method, model: Any, output_dir: str) -> None:
    """Add to the model card what loading a T-REX adapter needs, wherever PEFT or a Trainer writes the card."""
    original(model, output_dir)
    complete_card(os.path.join(output_dir, "README.md"), type(model).__name__.replace("PeftModel", "AutoModel"))


def _upload_with_card(original: Method, model: Any, working_dir: str, *args: Any, **kwargs: Any) -> Any:
    """Write PEFT's model card once more before an upload: transformers' `push_to_hub` puts its own card over it."""
    model.create_or_update_model_card(working_dir)
    return original(model, working_dir, *args, **kwargs)


def _check_before_loading(original: Method, model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
    """Name a damaged file also where a resumed Trainer loads weights into an adapter that exists.

    PEFT reads no configuration then, and reading the configuration is what checks the file elsewhere.
    """
    check_adapter_file(str(model_id))
    adapter_name = args[0] if args else kwargs.get("adapter_name")
    with Undone(Snapshot(model, values=copies(_loaded_into(model, adapter_name)))):
        return original(model, model_id, *args, **kwargs)


def _loaded_into(model: Any, adapter_name: str | None) -> set[Tensor]:
    """The tensors that weights are loaded into if the adapter exists: its own, and those trained beside it."""
    if adapter_name not in model.peft_config:
        return set()
    tensors = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            tensors.update(module.parameters())
        elif hasattr(module, "prior_of"):
            tensors.update(module.trex_prior.buffers())
        elif hasattr(module, "parameters_of"):
            tensors.update(module.parameters_of(adapter_name), module.trex_static.buffers())
    return tensors


def _all_or_nothing(original: Method, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Leave the model as it was if an adapter is added or deleted, and something ends that half-way."""
    with Undone(Snapshot(model)):
        return original(model, *args, **kwargs)


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
    "add_adapter": _all_or_nothing,
    "delete_adapter": _all_or_nothing,
    "load_adapter": _check_before_loading,
    "_update_offload": _find_offloaded,
}
