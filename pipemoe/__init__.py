"""pipemoe: mixture-of-experts prefill in which no rank waits for another's tokens."""

from pipemoe.comm.world import World, init
from pipemoe.config import Config
from pipemoe.errors import PipemoeError
from pipemoe.layer import PipelinedMoE
from pipemoe.model import Model, Prefilled, load_model

__version__ = "0.1.0"

__all__ = ["Config", "Model", "PipelinedMoE", "PipemoeError", "Prefilled", "World", "init", "load_model", "__version__"]
