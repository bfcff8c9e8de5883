"""The GPT of 2018 as a ``DecoderSpec``: GPT-2's, with norms of each sum and none before the head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptkern.model.families import gpt2
from gptkern.model.spec import DecoderSpec

if TYPE_CHECKING:
    from gptkern.config import GPTConfig


def spec(config: GPTConfig) -> DecoderSpec:
    """The decoder of such a configuration."""
    return gpt2.spec(config).replace(norm_place="after")
