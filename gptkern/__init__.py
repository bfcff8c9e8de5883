"""gptkern: a kernel-accelerated GPT runtime.

The public names are loaded when they are first used, so that the command line's ``--help`` need not
wait for PyTorch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from gptkern import _at_import, _checkout

if TYPE_CHECKING:
    from gptkern import ops
    from gptkern.cache import KVCache
    from gptkern.checkpoint import CheckpointError
    from gptkern.config import GPTConfig
    from gptkern.generate import Completion, GenerateOutput, Score
    from gptkern.model import GPT, GPTOutput
    from gptkern.ops import backend
    from gptkern.routes import FallbackWarning, explain
    from gptkern.tokenizer import Tokenizer
    from gptkern.transformers import accelerate, restore

_HOMES = {
    "GPT": "model",
    "GPTConfig": "config",
    "GPTOutput": "model",
    "KVCache": "cache",
    "Tokenizer": "tokenizer",
    "CheckpointError": "checkpoint",
    "Completion": "generate",
    "GenerateOutput": "generate",
    "Score": "generate",
    "accelerate": "transformers",
    "backend": "ops",
    "explain": "routes",
    "FallbackWarning": "routes",
    "ops": "",
    "restore": "transformers",
}

__all__ = [
    "GPT",
    "CheckpointError",
    "Completion",
    "FallbackWarning",
    "GPTConfig",
    "GPTOutput",
    "GenerateOutput",
    "KVCache",
    "Score",
    "Tokenizer",
    "accelerate",
    "backend",
    "explain",
    "ops",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("gptkern")
    if name not in _HOMES:
        raise AttributeError(f"module 'gptkern' has no attribute {name!r}")
    home = _HOMES[name]
    value = getattr(import_module(f"gptkern.{home}"), name) if home else import_module(f"gptkern.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "__version__"})


_at_import.install()
_checkout.warn()
