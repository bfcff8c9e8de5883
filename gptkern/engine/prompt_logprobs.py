"""The log-probabilities of a prompt's own tokens."""

from __future__ import annotations

from collections.abc import Sequence

from gptkern.engine.packed_pass import hidden_states, logits_at
from gptkern.engine.steering import Steering
from gptkern.model.decoder import Decoder
from gptkern.model.taps import Taps

PromptLogprobs = tuple[tuple[float, tuple[tuple[int, float], ...]], ...]


def prompt_logprobs(
    model: Decoder, prompt: Sequence[int], top: int, steering: Steering | None = None
) -> PromptLogprobs:
    """The log-probability of each token from the second on, and the ``top`` likeliest tokens with theirs.

    The prompt goes through the model once more, alone: its bits depend on nothing else.
    """
    if len(prompt) < 2:
        return ()
    taps = None if steering is None else Taps(frozenset(), None, steering.vectors)
    (hidden,) = hidden_states(model, [prompt[:-1]], taps)
    found: list[tuple[float, tuple[tuple[int, float], ...]]] = []
    for logits, targets in logits_at(model, hidden, prompt[1:]):
        logprobs = logits.log_softmax(-1)
        own = logprobs.gather(1, targets)[:, 0].tolist()
        best = logprobs.topk(min(top, logprobs.shape[1]))
        likeliest = [
            tuple(zip(tokens, values, strict=True))
            for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        found += zip(own, likeliest, strict=True)
    return tuple(found)
