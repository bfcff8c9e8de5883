"""Request: what a caller asks of the engine, and the events that answer it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from gptkern.engine.constraint import Constraint
from gptkern.engine.option_checks import checked, plain
from gptkern.engine.processors import Callbacks, LogitsProcessor, StoppingCriterion

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue.

    Attributes:
        prompt: Token ids, one or more; a list, a tuple, or a tensor of one dimension.
        options: Those of ``generate`` (``gptkern.generate.GenerateOptions``). Each of
            ``num_return_sequences`` copies has events of its own; they share one prefill. With ``num_beams``
            they all come when the search has ended, one token an event: until then no token is settled.
        priority: Requests of a higher priority are begun first; within one, in the order of arrival.
        deadline: Seconds after ``add``: what still runs then ends, with the tokens that it has. None: no end.
        logprobs: None: no log-probabilities; 0: that of each new token; n: also the n likeliest tokens'. Not
            with ``num_beams``, whose sequences have a score.
        prompt_logprobs: The same of every prompt token but the first, which nothing comes before.
        logits_processor, stopping_criteria: As in ``GPT.generate``, called in ``Engine.step``. A copy ends
            with the error that one of them raises for it. Not with ``num_beams``.
        constraint: The language that new tokens stay in (a grammar), in which a copy ends where nothing may
            follow. Each copy goes on with a fork of it. Such a request drafts nothing. Not with
            ``num_beams``.
        steering: Vectors ``(width,)`` that are added to the hidden states of all its tokens, by layer: 0 is
            the embeddings, i what the first i blocks made. For an ``Engine(steering=True)``.

    Raises:
        TypeError, ValueError: A field or an option of the wrong type or out of range; what depends on the
            model (tokens of its vocabulary, room in its context) is refused by ``Engine.add``.
    """

    prompt: Sequence[int]
    options: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0
    deadline: float | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None
    stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] | None = None
    constraint: Constraint | None = None
    steering: Mapping[int, torch.Tensor] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _tokens(self.prompt))
        if not isinstance(self.options, Mapping):
            raise TypeError(f"Request: options is {type(self.options).__name__}; a mapping is needed")
        object.__setattr__(self, "options", dict(self.options))
        checked("Request", self.options)
        _check_whole("priority", self.priority)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_whole(name, value)
                if value < 0:
                    raise ValueError(f"Request: {name} is {value}; 0 or more is needed, or None")
        _check_deadline(self.deadline)
        _check_constraint(self.constraint)
        _check_steering(self.steering)
        # A bad one is refused now.
        _ = self.callbacks

    @property
    def callbacks(self) -> Callbacks:
        """The caller's own callables."""
        return Callbacks.of(self.logits_processor, self.stopping_criteria, source="Request")


class TokenEvent(NamedTuple):
    """One new token of one copy of a request, or its end.

    Attributes:
        request, copy: Which, as ``add`` numbered it; copies from 0.
        token: None where the copy ends without one more (cancelled, past its deadline, failed).
        logprob: The model's log-probability of it, where the request asks for that.
        top_logprobs: The likeliest tokens and theirs, best first, where it asks for some.
        prompt_logprobs: With a copy's first event, where the request asks for them: of each prompt token from
            the second on its log-probability and the likeliest tokens'.
        finish_reason: Why the copy ends here; None: it goes on.
        error: What went wrong, where the reason is "error".
        drafted, accepted: Tokens drafted in the copy's last pass, and those of them that held.
        text: New text that is final with this event, where the engine was given a tokenizer, or stop strings:
            no half character, and nothing of a stop string or an end-of-text token.
        score: With the last event of a sequence from beam search: the sum of its log-probabilities, divided
            by its length to the power of ``length_penalty``.
    """

    request: int
    copy: int
    token: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] | None = None
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    drafted: int = 0
    accepted: int = 0
    text: str = ""
    score: float | None = None


def _tokens(prompt: Any) -> tuple[int, ...]:
    tokens = plain(prompt)
    if isinstance(tokens, str) or not isinstance(tokens, Sequence):
        raise TypeError(f"Request: prompt is {type(prompt).__name__}; a sequence of token ids is needed")
    if not tokens:
        raise ValueError("Request: prompt is empty; one token or more is needed")
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool):
            raise TypeError(f"Request: prompt holds {token!r}; token ids, whole numbers, are needed")
        if token < 0:
            raise ValueError(f"Request: prompt holds {token}; token ids from 0 on are accepted")
    return tuple(tokens)


def _check_whole(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Request: {name} is {value!r}; a whole number is needed")


def _check_constraint(constraint: Any) -> None:
    if constraint is not None and not isinstance(constraint, Constraint):
        kind = type(constraint).__name__
        raise TypeError(f"Request: constraint is {kind}; a Constraint is needed, or None")


def _check_steering(steering: Any) -> None:
    if steering is None:
        return
    if not isinstance(steering, Mapping):
        raise TypeError(f"Request: steering is {type(steering).__name__}; a mapping is needed, or None")
    for layer in steering:
        _check_whole("steering's layer", layer)


def _check_deadline(deadline: Any) -> None:
    if deadline is None:
        return
    if not isinstance(deadline, int | float) or isinstance(deadline, bool):
        raise TypeError(f"Request: deadline is {deadline!r}; a number of seconds is needed, or None")
    if not 0 < deadline < math.inf:
        raise ValueError(f"Request: deadline is {deadline}; a finite number of seconds above 0 is needed")
