"""Kept sets and probabilities against transformers' own processors, on random settings."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from gptkern.ops import SamplerState, SamplingParams, sampling_probs

processors = pytest.importorskip("transformers.generation.logits_process")


def random_setting(vocab: int) -> dict[str, Any]:
    chance = random.random
    return {
        "temperature": random.uniform(0.3, 2.0),
        "top_k": random.randint(1, vocab) if chance() < 0.5 else 0,
        "top_p": random.uniform(0.05, 0.999) if chance() < 0.5 else 1.0,
        "min_p": random.uniform(0.0, 0.4) if chance() < 0.3 else 0.0,
        "typical_p": random.uniform(0.05, 0.99) if chance() < 0.3 else 1.0,
        "epsilon_cutoff": random.uniform(1e-4, 0.05) if chance() < 0.3 else 0.0,
        "eta_cutoff": random.uniform(1e-4, 0.05) if chance() < 0.3 else 0.0,
        "repetition_penalty": random.uniform(0.7, 1.6) if chance() < 0.5 else 1.0,
        "min_new_tokens": 1 if chance() < 0.2 else 0,
        "logit_bias": {random.randrange(vocab): random.uniform(-5, 5) for _ in range(4)}
        if chance() < 0.3
        else {},
        "banned": random.sample(range(1, vocab), 3) if chance() < 0.3 else [],
    }


def transformers_probs(logits: torch.Tensor, prompt: torch.Tensor, s: dict[str, Any]) -> torch.Tensor:
    chain: list[Any] = []
    if s["logit_bias"]:
        chain.append(processors.SequenceBiasLogitsProcessor({(t,): b for t, b in s["logit_bias"].items()}))
    if s["repetition_penalty"] != 1:
        chain.append(processors.RepetitionPenaltyLogitsProcessor(s["repetition_penalty"]))
    if s["banned"]:
        chain.append(processors.NoBadWordsLogitsProcessor([[t] for t in s["banned"]], eos_token_id=[0]))
    if s["min_new_tokens"]:
        chain.append(processors.MinNewTokensLengthLogitsProcessor(prompt.shape[1], 1, [0]))
    chain.append(processors.TemperatureLogitsWarper(s["temperature"]))
    if s["top_k"]:
        chain.append(processors.TopKLogitsWarper(s["top_k"]))
    if s["top_p"] < 1:
        chain.append(processors.TopPLogitsWarper(s["top_p"]))
    if s["min_p"]:
        chain.append(processors.MinPLogitsWarper(s["min_p"]))
    if s["typical_p"] < 1:
        chain.append(processors.TypicalLogitsWarper(s["typical_p"]))
    if s["epsilon_cutoff"]:
        chain.append(processors.EpsilonLogitsWarper(s["epsilon_cutoff"]))
    if s["eta_cutoff"]:
        chain.append(processors.EtaLogitsWarper(s["eta_cutoff"]))
    for processor in chain:
        logits = processor(prompt, logits)
    return torch.softmax(logits, dim=-1)


def test_a_thousand_random_settings() -> None:
    """transformers runs in float64: in fp32 its own cumulative sums move the cuts."""
    for trial in range(1000):
        vocab = random.choice((20, 257, 1000))
        logits = torch.randn(1, vocab) * random.uniform(0.5, 4)
        prompt = torch.randint(vocab, (1, 12))
        setting = random_setting(vocab)
        state = SamplerState.make(1, vocab, seed=0, history=True)
        state.add_prompt(prompt)
        params = SamplingParams.make(1, vocab, eos_token_id=0, **setting)
        got = sampling_probs(logits, params, state=state)
        expected = transformers_probs(logits.double(), prompt, setting).float()
        context = f"trial {trial}: {setting}"
        # What has less than 2^-45 of the largest probability has no weight here.
        assert (got[expected > 1e-12] > 0).all(), context
        assert not got[expected == 0].any(), context
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6, msg=context)
