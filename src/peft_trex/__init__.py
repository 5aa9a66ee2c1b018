"""T-REX, a mixture of rank-one experts with a semantic prior (arXiv 2404.08985), as an adapter type for PEFT.

Importing this package registers the method: afterwards `get_peft_model`, `PeftModel.from_pretrained` and their kin
know `TRexConfig` and the adapters saved with it.
"""

from . import registration
from .config import TRexConfig
from .embeddings import SemanticEmbedsCollator, embed_prompts
from .export import save_trex_as_lora
from .fitting import TRexPriorCallback, TRexPriorReport, initialize_trex_prior
from .layer import TRexLayer
from .merging import TRexMergeReport, calibrate_trex_merge
from .mixture import rank_one_mixture
from .model import TRexModel
from .semantic_router import SemanticRouter

__version__ = "0.1.0"

__all__ = [
    "SemanticEmbedsCollator",
    "SemanticRouter",
    "TRexConfig",
    "TRexLayer",
    "TRexMergeReport",
    "TRexModel",
    "TRexPriorCallback",
    "TRexPriorReport",
    "calibrate_trex_merge",
    "embed_prompts",
    "initialize_trex_prior",
    "rank_one_mixture",
    "save_trex_as_lora",
]

registration.register(TRexConfig, TRexModel)
