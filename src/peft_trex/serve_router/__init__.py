"""One name for a whole exported folder: the server chooses the adapter of each request.

`TRexMiddleware` does it inside vLLM or any other ASGI server, `python -m peft_trex.serve_router` in front of any
OpenAI-compatible server. Nothing here needs torch or PEFT.
"""

from .middleware import TRexMiddleware
from .routing import Routing

__all__ = ["Routing", "TRexMiddleware"]
