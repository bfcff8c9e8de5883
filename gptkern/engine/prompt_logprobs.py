"""The log-probabilities of a prompt's own tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gptkern.engine.steering import Steering
from gptkern.model.attend import PackedAttend
from gptkern.model.decoder import Decoder
from gptkern.model.taps import Taps

# The head takes so many rows at once: logits of GPT-2's vocabulary are 200 kB a row.
ROWS_AT_ONCE = 256

PromptLogprobs = tuple[tuple[float, tuple[tuple[int, float], ...]], ...]


def prompt_logprobs(
    model: Decoder, prompt: Sequence[int], top: int, steering: Steering | None = None
) -> PromptLogprobs:
    """The log-probability of each token from the second on, and the ``top`` likeliest tokens with theirs.

    The prompt goes through the model once more, alone: its bits depend on nothing else.
    """
    if len(prompt) < 2:
        return ()
    ids = torch.tensor(list(prompt), device=model.device)
    count = len(prompt) - 1
    ends = torch.tensor([0, count], dtype=torch.int32, device=model.device)
    attend = PackedAttend(ends, count, 0.0, dropout=False)
    taps = None if steering is None else Taps(frozenset(), None, steering.vectors)
    hidden = model.transformer(ids[:-1], torch.arange(count, device=model.device), attend, taps)
    found: list[tuple[float, tuple[tuple[int, float], ...]]] = []
    for rows, targets in zip(hidden.split(ROWS_AT_ONCE), ids[1:].split(ROWS_AT_ONCE), strict=True):
        logprobs = model.logits(rows).float().log_softmax(-1)
        own = logprobs.gather(1, targets[:, None])[:, 0].tolist()
        best = logprobs.topk(min(top, logprobs.shape[1]))
        likeliest = [
            tuple(zip(tokens, values, strict=True))
            for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        found += zip(own, likeliest, strict=True)
    return tuple(found)
