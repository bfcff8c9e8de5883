"""Choosing each row's next token: one call's settings, put to ``ops.sample``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from gptkern.generate.options import Settings
from gptkern.generate.prompt import Prompts
from gptkern.ops.sample import Sampled, SamplerState, SamplingParams, sample


class Picker:
    """The sampler of one call.

    Args:
        rows: Which of ``batch * num_return_sequences`` rows each row of logits is. A draw depends on the
            seed, this number and the step alone.
        logprobs: Whether the model's log-probabilities of chosen tokens are wanted.
    """

    def __init__(
        self,
        settings: Settings,
        prompts: Prompts,
        rows: Sequence[int],
        *,
        vocab_size: int,
        logprobs: bool,
        device: torch.device,
    ) -> None:
        penalised = settings.repetition_penalty != 1.0
        sampling = settings.do_sample
        self._params = SamplingParams.make(
            len(rows),
            vocab_size,
            temperature=settings.temperature if sampling else 0.0,
            top_k=min(settings.top_k, vocab_size) if sampling else 0,
            top_p=settings.top_p if sampling else 1.0,
            min_p=settings.min_p if sampling else 0.0,
            typical_p=settings.typical_p if sampling else 1.0,
            repetition_penalty=settings.repetition_penalty,
            min_new_tokens=settings.min_new,
            eos_token_id=sorted({token for token in settings.eos if token < vocab_size}),
            n_logprobs=0 if logprobs else None,
            device=device,
        )
        self._state = SamplerState.make(
            len(rows), vocab_size, seed=settings.seed, request=list(rows), history=penalised, device=device
        )
        if penalised:
            source = torch.tensor([row // settings.num_return_sequences for row in rows], device=device)
            mask = None if prompts.mask is None else prompts.mask[source]
            self._state.add_prompt(prompts.ids[source], mask)

    def __call__(self, logits: torch.Tensor) -> Sampled:
        """Choose from ``(rows, vocab_size)`` logits."""
        return sample(logits, self._params, state=self._state)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        chosen, params, state = list(rows), self._params, self._state
        eos_ids = None if params.eos_ids is None else params.eos_ids[chosen]
        counts = None if state.counts is None else state.counts[chosen]
        self._params = replace(params, values=params.values[chosen], eos_ids=eos_ids)
        self._state = replace(state, counters=state.counters[chosen], counts=counts)
