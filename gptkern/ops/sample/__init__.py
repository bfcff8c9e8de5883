"""Choosing tokens: exact filters, seeded draws, the same token on the CPU and on a GPU."""

from gptkern.ops.sample.op import (
    Accepted,
    Sampled,
    TopLogprobs,
    sample,
    sampling_probs,
    speculative_accept,
    top_k_logprobs,
)
from gptkern.ops.sample.params import SamplerState, SamplingParams

__all__ = [
    "Accepted",
    "Sampled",
    "SamplerState",
    "SamplingParams",
    "TopLogprobs",
    "sample",
    "sampling_probs",
    "speculative_accept",
    "top_k_logprobs",
]
