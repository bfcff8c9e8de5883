"""Callers' own logits processors: applied row by row, before a row's settings are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gptkern.ops.sample import Sampled, TopLogprobs

if TYPE_CHECKING:
    from gptkern.engine.sampling import SamplerRow

# (a row's tokens ``(1, length)`` int64, its logits ``(1, vocab_size)`` fp32) -> logits of the same shape, as
# transformers' ``LogitsProcessor`` has it.
LogitsProcessor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# (a row's tokens ``(1, length)`` int64, None) -> whether it ends: a bool, or a tensor of one, as
# transformers' ``StoppingCriteria`` has it.
StoppingCriterion = Callable[[torch.Tensor, None], Any]


@dataclass(frozen=True)
class Callbacks:
    """The caller's functions that are called at every token of a row.

    Attributes:
        processors: Change the logits before they are drawn from.
        criteria: End the row after a token.
    """

    processors: Sequence[LogitsProcessor] = ()
    criteria: Sequence[StoppingCriterion] = ()

    @classmethod
    def of(cls, logits_processor: Any, stopping_criteria: Any, *, source: str = "generate") -> Callbacks:
        """Callables as a caller gives them: one, several, or None for none.

        Raises:
            TypeError: Anything else; the message begins with ``source``.
        """
        return cls(
            _several(f"{source}: logits_processor", logits_processor),
            _several(f"{source}: stopping_criteria", stopping_criteria),
        )

    def end(self, tokens: Sequence[int]) -> bool:
        """True if a row ends with the last of its ``tokens``."""
        if not self.criteria:
            return False
        ids = torch.tensor([tokens], device="cpu")
        return any(bool(criterion(ids, None)) for criterion in self.criteria)


def _several(name: str, value: Any) -> tuple[Callable[..., Any], ...]:
    if value is None:
        return ()
    several = tuple(value) if isinstance(value, list | tuple) else (value,)
    for one in several:
        if not callable(one):
            raise TypeError(f"{name} is or holds {one!r}; a callable or a list of them is needed")
    return several


def processed(
    rows: Sequence[SamplerRow],
    logits: torch.Tensor,
    drafts: Sequence[Sequence[int]],
    failures: dict[int, Exception],
) -> tuple[torch.Tensor, list[int]]:
    """The logits after the rows' processors, and the positions that have any.

    A row whose processor raises gets NaN, and its exception goes into ``failures``.
    """
    if not any(row.processors for row in rows):
        return logits, []
    # A copy, whatever the dtype: the model's own logits stay.
    logits = logits.to(torch.float32, copy=True)
    places: list[int] = []
    place = 0
    for row, draft in zip(rows, drafts, strict=True):
        for ahead in range(len(draft) + 1):
            if row.processors:
                places.append(place)
                tokens = [*row.prompt, *row.generated, *draft[:ahead]]
                try:
                    logits[place] = _applied(row.processors, tokens, logits[place : place + 1].clone())
                except Exception as error:
                    failures[place] = error
                    logits[place] = float("nan")
            place += 1
    return logits, places


def _applied(
    processors: Sequence[LogitsProcessor], tokens: Sequence[int], logits: torch.Tensor
) -> torch.Tensor:
    ids = torch.tensor([tokens], device=logits.device)
    for processor in processors:
        given = processor(ids, logits)
        if not isinstance(given, torch.Tensor) or given.shape != logits.shape:
            shape = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
            raise ValueError(
                f"a logits processor returned {shape}; a tensor of shape {tuple(logits.shape)} is needed"
            )
        logits = given
    return logits[0]


def with_raw_logprobs(sampled: Sampled, raw: torch.Tensor, places: Sequence[int]) -> Sampled:
    """``sampled`` with the model's log-probabilities at ``places``, whose logits were processed."""
    if not places or sampled.logprobs is None:
        return sampled
    at = torch.tensor(places, device=raw.device)
    model = raw[at].float().log_softmax(-1)
    logprobs = sampled.logprobs.index_copy(0, at, model.gather(1, sampled.tokens[at, None])[:, 0])
    top = sampled.top_logprobs
    if top is not None:
        best = model.sort(dim=-1, descending=True, stable=True)
        values, width = best.values, top.tokens.shape[1]
        tokens = best.indices.masked_fill(values == -float("inf"), -1)
        top = TopLogprobs(
            top.tokens.index_copy(0, at, tokens[:, :width]),
            top.logprobs.index_copy(0, at, values[:, :width]),
        )
    return sampled._replace(logprobs=logprobs, top_logprobs=top)
