"""gptkern: a kernel-accelerated GPT runtime."""

from gptkern.config import GPTConfig
from gptkern.ops import backend

__all__ = ["GPTConfig", "backend"]
