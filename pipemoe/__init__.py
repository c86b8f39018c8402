"""pipemoe: mixture-of-experts prefill in which no rank waits for another's tokens."""

from pipemoe.config import Config
from pipemoe.errors import PipemoeError
from pipemoe.experts import ExpertWeights, local_range
from pipemoe.layer import PipelinedMoE
from pipemoe.model import Model, load_model
from pipemoe.models.source import Prefilled
from pipemoe.plug_in import from_transformers
from pipemoe.serving.engine import Engine
from pipemoe.serving.requests import FirstToken
from pipemoe.version import __version__
from pipemoe.world import World, init

__all__ = [
    "Config",
    "Engine",
    "ExpertWeights",
    "FirstToken",
    "Model",
    "PipelinedMoE",
    "PipemoeError",
    "Prefilled",
    "World",
    "from_transformers",
    "init",
    "load_model",
    "local_range",
    "__version__",
]
