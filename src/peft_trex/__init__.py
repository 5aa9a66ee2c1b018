"""T-REX, a mixture of rank-one experts with a semantic prior (arXiv 2404.08985), as an adapter type for PEFT.

Importing this package registers the method: afterwards `get_peft_model`, `PeftModel.from_pretrained` and their kin
know `TRexConfig` and the adapters saved with it.

An engine's environment need not have PEFT. Without PEFT or torch, only `SemanticRouter` and `serve_router` can be
used, and asking for anything else names what is missing.
"""

from typing import Any

from .lora.semantic_router import SemanticRouter
from .version import VERSION

# An engine has torch and no PEFT, and would import torch, transformers and more until that was found out.
try:
    import peft  # noqa: F401

    from . import registration
    from .analysis.callback import TRexRoutingCallback
    from .analysis.figures import LayerRouting
    from .analysis.routing import RoutingReport, routing_report
    from .config import TRexConfig
    from .deploy.calibration import TRexMergeReport, calibrate_trex_merge
    from .deploy.pruning import PruningPoint, TRexPruneReport, prune_trex, pruning_curve
    from .fit.clustering import TRexPriorReport
    from .fit.external import SemanticEmbedsCollator, embed_prompts
    from .fit.fitting import TRexPriorCallback, initialize_trex_prior
    from .layer import TRexLayer
    from .lora.export import TRexExportReport, save_trex_as_lora
    from .lora.from_lora import TRexFromLoraReport, trex_from_lora
    from .mixture import rank_one_mixture
    from .model import TRexModel
    from .notes import describe_trex
    from .prior.chat import chat_markers
    from .steer import steer_trex
except ModuleNotFoundError as error:
    if error.name not in ("peft", "torch"):
        raise
    _MISSING: str | None = error.name
else:
    _MISSING = None

__version__ = VERSION

__all__ = [
    "LayerRouting",
    "PruningPoint",
    "RoutingReport",
    "SemanticEmbedsCollator",
    "SemanticRouter",
    "TRexConfig",
    "TRexExportReport",
    "TRexFromLoraReport",
    "TRexLayer",
    "TRexMergeReport",
    "TRexModel",
    "TRexPriorCallback",
    "TRexPriorReport",
    "TRexPruneReport",
    "TRexRoutingCallback",
    "calibrate_trex_merge",
    "chat_markers",
    "describe_trex",
    "embed_prompts",
    "initialize_trex_prior",
    "prune_trex",
    "pruning_curve",
    "rank_one_mixture",
    "routing_report",
    "save_trex_as_lora",
    "steer_trex",
    "trex_from_lora",
]

if _MISSING is None:
    registration.register(TRexConfig, TRexModel)


def __getattr__(name: str) -> Any:
    if _MISSING is not None and name in __all__:
        raise ModuleNotFoundError(
            f"peft_trex.{name} needs {_MISSING}, which is not installed here: pip install peft-trex. Without it only "
            "SemanticRouter and serve_router work.",
            name=_MISSING,
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
