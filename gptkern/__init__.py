"""gptkern: a kernel-accelerated GPT runtime.

Public names and subpackages are imported at their first use, so that the command line's ``--help`` need not
wait for PyTorch.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from gptkern import _at_import, _checkout
from gptkern._lazy import lazily

if TYPE_CHECKING:
    from gptkern import (
        bench,
        checkpoint,
        generate,
        ops,
        quantize,
        serve,
        testing,
        tokenizer,
        train,
        transformers,
    )
    from gptkern.checkpoint import CheckpointError
    from gptkern.config import GPTConfig
    from gptkern.drop_in import accelerate, restore
    from gptkern.engine.async_engine import AsyncEngine
    from gptkern.engine.cache import KVCache
    from gptkern.engine.engine import Engine
    from gptkern.engine.request import Request, TokenEvent
    from gptkern.environment import FallbackWarning
    from gptkern.generate import Completion, GenerateOutput, Score
    from gptkern.gpt import GPT, explain
    from gptkern.model.decoder import GPTOutput
    from gptkern.ops import backend
    from gptkern.tokenizer import Tokenizer

    __version__: str

# Where each public name is defined; "" is a submodule of this package.
_HOMES = {
    "GPT": "gptkern.gpt",
    "CheckpointError": "gptkern.checkpoint",
    "Completion": "gptkern.generate",
    "FallbackWarning": "gptkern.environment",
    "GPTConfig": "gptkern.config",
    "GPTOutput": "gptkern.model.decoder",
    "GenerateOutput": "gptkern.generate",
    "AsyncEngine": "gptkern.engine.async_engine",
    "Engine": "gptkern.engine.engine",
    "KVCache": "gptkern.engine.cache",
    "Score": "gptkern.generate",
    "Request": "gptkern.engine.request",
    "TokenEvent": "gptkern.engine.request",
    "Tokenizer": "gptkern.tokenizer",
    "accelerate": "gptkern.drop_in",
    "backend": "gptkern.ops",
    "bench": "",
    "checkpoint": "",
    "explain": "gptkern.gpt",
    "generate": "",
    "ops": "",
    "quantize": "",
    "restore": "gptkern.drop_in",
    "serve": "",
    "testing": "",
    "tokenizer": "",
    "train": "",
    "transformers": "",
}

__all__ = [
    "GPT",
    "AsyncEngine",
    "CheckpointError",
    "Completion",
    "Engine",
    "FallbackWarning",
    "GPTConfig",
    "GPTOutput",
    "GenerateOutput",
    "KVCache",
    "Request",
    "Score",
    "TokenEvent",
    "Tokenizer",
    "accelerate",
    "backend",
    "bench",
    "checkpoint",
    "explain",
    "generate",
    "ops",
    "quantize",
    "restore",
    "serve",
    "testing",
    "tokenizer",
    "train",
    "transformers",
]

_get, _names = lazily(__name__, _HOMES)


def __getattr__(name: str) -> Any:
    return version("gptkern") if name == "__version__" else _get(name)


def __dir__() -> list[str]:
    return sorted({*_names(), "__version__"})


_at_import.install()
_checkout.warn()
