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

from .loading import PREFIX, check_adapter_file, complete_card

Method = Callable[..., Any]
MARK = "_trex_replacement"


def patch_peft_model(model_class: type) -> None:
    """Replace methods of `peft.PeftModel`; a method that is replaced already stays as it is."""
    for name, make in REPLACEMENTS.items():
        method = getattr(model_class, name, None)
        if method is None or _is_replacement(inspect.unwrap(method, stop=_is_replacement)):
            continue
        replacement = functools.wraps(method)(make(method))
        setattr(replacement, MARK, replacement)
        setattr(model_class, name, replacement)


def _is_replacement(method: Any) -> bool:
    # functools.wraps copies attributes to whatever wraps a replacement later, so the mark names its own function.
    return getattr(method, MARK, None) is method


def _trex_config(model: Any) -> Any:
    """The configuration of a T-REX adapter in a PeftModel, or None if it has none."""
    return next((config for config in model.peft_config.values() if config.peft_type == "TREX"), None)


def _write_card(original: Method) -> Method:
    """Add to the model card what loading a T-REX adapter needs, wherever PEFT or a Trainer writes the card."""

    def create_or_update_model_card(self: Any, output_dir: str) -> None:
        original(self, output_dir)
        if (config := _trex_config(self)) is not None:
            complete_card(os.path.join(output_dir, "README.md"), config.task_type)

    return create_or_update_model_card


def _upload_with_card(original: Method) -> Method:
    """Write PEFT's model card once more before an upload: transformers' `push_to_hub` puts its own card over it."""

    def _upload_modified_files(self: Any, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        if _trex_config(self) is not None:
            self.create_or_update_model_card(working_dir)
        return original(self, working_dir, *args, **kwargs)

    return _upload_modified_files


def _check_before_loading(original: Method) -> Method:
    """Name a damaged file also where a resumed Trainer loads weights into an adapter that exists.

    PEFT reads no configuration then, and reading the configuration is what checks the file elsewhere.
    """

    def load_adapter(self: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        if _trex_config(self) is not None and os.path.isdir(model_id):
            check_adapter_file(model_id)
        return original(self, model_id, *args, **kwargs)

    return load_adapter


def _find_offloaded(original: Method) -> Method:
    """Let the tensors of layers that a device map sends to the disk be found there.

    PEFT's index has the adapter's name before the last part of each key, which is right for `lora_A.weight` and wrong
    for `trex_A`.
    """

    def _update_offload(self: Any, offload_index: Any, adapters_weights: Any) -> Any:
        result = original(self, offload_index, adapters_weights)
        if _trex_config(self) is not None:
            for key in list(offload_index or ()):
                *layer, adapter_name, tensor = key.split(".")
                if tensor.startswith(PREFIX) and adapter_name in self.peft_config:
                    offload_index[".".join((*layer, tensor, adapter_name))] = offload_index[key]
        return result

    return _update_offload


REPLACEMENTS: dict[str, Callable[[Method], Method]] = {
    "create_or_update_model_card": _write_card,
    "_upload_modified_files": _upload_with_card,
    "load_adapter": _check_before_loading,
    "_update_offload": _find_offloaded,
}
