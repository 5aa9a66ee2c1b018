"""T-REX, a mixture of rank-one experts with a semantic prior (arXiv 2404.08985), as an adapter type for PEFT.

Importing this package registers the method: afterwards `get_peft_model`, `PeftModel.from_pretrained` and their kin
know `TRexConfig` and the adapters saved with it.
"""

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
from .lora.semantic_router import SemanticRouter
from .mixture import rank_one_mixture
from .model import TRexModel
from .prior.chat import chat_markers
from .steer import steer_trex
from .version import VERSION

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

registration.register(TRexConfig, TRexModel)
