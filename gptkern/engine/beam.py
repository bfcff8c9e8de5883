"""Beam search, with the scores and the stopping rules of transformers: logits in, beams to continue out.

A beam's text, rules and token counts grow by one token a pass, and nothing of it is read twice.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gptkern._native import IN_PROMPT
from gptkern.engine.rules import RowRules
from gptkern.engine.sampling import RowParams, padded
from gptkern.engine.settings import Settings
from gptkern.engine.stop_strings import StopWatch
from gptkern.ops.sample import reference, top_k_logprobs

if TYPE_CHECKING:
    from gptkern.tokenizer import Tokenizer


@dataclass(slots=True)
class Beam:
    """One way on from a prompt.

    Attributes:
        tokens: New tokens, which nobody may change: others may hold the same list.
        score: Sum of their log-probabilities; of a complete beam, divided by its length penalty.
        complete: Whether it has ended.
        rules: Its rules; None where they do not depend on its tokens.
        watch: Its text; None where there are no stop strings.
    """

    tokens: list[int]
    score: float
    complete: bool = False
    rules: RowRules | None = None
    watch: StopWatch | None = None


class _Candidate(NamedTuple):
    """A token after one of a search's running beams."""

    score: float
    beam: int
    token: int


class BeamSearch:
    """The search from one prompt.

    Args:
        prompt: Its tokens, without padding.
        params: The sampler's parameters of the same settings.
        tokenizer: Needed where there are stop strings.

    Attributes:
        running: Beams that go on, best first; none before the search has begun and once it has ended.
        complete: The best complete ones, best first, ``num_beams`` at most.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        settings: Settings,
        params: RowParams,
        device: torch.device,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self._prompt, self._settings, self._params = prompt, settings, params
        self._device, self._tokenizer = device, tokenizer
        self._altered = bool(params.penalised or params.rules.active or (settings.min_new and params.eos))
        self._counts: torch.Tensor | None = None
        self.running: list[Beam] = []
        self.complete: list[Beam] = []

    def restart(self) -> None:
        """Take back every token: the next logits are those after the prompt."""
        self.running, self.complete = [], []

    def begin(self) -> None:
        """Begin with the one beam that has no token yet."""
        settings, params, prompt = self._settings, self._params, self._prompt
        first = Beam([], 0.0, rules=RowRules(params.rules, prompt) if params.rules.changing else None)
        if settings.stop_strings:
            assert self._tokenizer is not None
            first.watch = StopWatch(self._tokenizer, settings.stop_strings, prompt)
        self.running = [first]
        if params.penalised:
            shape = (1, params.vocab_size)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._counts[0, torch.tensor(sorted(set(prompt)), device=self._device)] = IN_PROMPT

    @property
    def most(self) -> int:
        """The number of candidates of a pass: enough that ``num_beams`` can go on whichever of them end."""
        settings = self._settings
        candidates = max(2, 1 + len(settings.eos)) * settings.num_beams
        return min(candidates, len(self.running) * self._params.vocab_size)

    def scored(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits ``(beams, vocab_size)`` and scores ``(beams,)`` fp32 that next tokens are chosen by.

        After biases, penalties, bans and the minimum length, log-probabilities stand in the logits' place.
        They are not normalised again: what a row lacks to a sum of 1 goes into its score.
        """
        beams, params = self.running, self._params
        scores = torch.tensor([beam.score for beam in beams], device=self._device)
        if logits.dtype == torch.float64:
            logits = logits.float()
        if not self._altered:
            return logits, scores
        verdicts = [params.verdict if beam.rules is None else beam.rules.verdict() for beam in beams]
        bias_ids = padded([list(v.biases) for v in verdicts], -1, torch.int32, self._device)
        amounts = padded([list(v.biases.values()) for v in verdicts], 0.0, torch.float32, self._device)
        x = reference.processed(
            logits.float().log_softmax(-1),
            torch.tensor([params.values] * len(beams), dtype=torch.float64, device=self._device),
            torch.tensor([len(beam.tokens) for beam in beams], device=self._device),
            self._counts,
            None if bias_ids is None or amounts is None else (bias_ids, amounts),
            padded([sorted(v.banned) for v in verdicts], -1, torch.int32, self._device),
            padded([params.eos] * len(beams), -1, torch.int32, self._device),
        )
        totals = x.logsumexp(-1)
        # A beam without a token left: its candidates come last.
        over = totals == -math.inf
        return x.masked_fill(over[:, None], 0.0), torch.where(over, -math.inf, scores + totals)

    def extend(self, candidates: Sequence[_Candidate]) -> list[int]:
        """Go on with the best ``candidates``; which running beam each one that runs then continues."""
        if candidates[0].score == -math.inf:
            raise ValueError("the options bar every token there is")
        width, before = self._settings.num_beams, self.running
        parents: list[int] = []
        self.running = []
        for rank, candidate in enumerate(candidates):
            if len(self.running) == width and rank >= width:
                break
            beam = self._grown(before[candidate.beam], candidate)
            if not beam.complete and len(self.running) < width:
                self.running.append(beam)
                parents.append(candidate.beam)
            elif beam.complete and rank < width:
                beam.score /= len(beam.tokens) ** self._settings.length_penalty
                beam.rules = beam.watch = None
                self.complete.append(beam)
        self.complete.sort(key=lambda beam: -beam.score)
        del self.complete[width:]
        if self._closed():
            self.running, parents = [], []
        _divide_rules(self.running, parents)
        if self._counts is not None and parents:
            rows = torch.arange(len(parents), device=self._device)
            self._counts = self._counts[torch.tensor(parents, device=self._device)]
            tokens = [beam.tokens[-1] for beam in self.running]
            self._counts[rows, torch.tensor(tokens, device=self._device)] += 1
        return parents

    def _grown(self, parent: Beam, candidate: _Candidate) -> Beam:
        """A beam and one token more; its rules are still its parent's."""
        beam = Beam([*parent.tokens, candidate.token], candidate.score, rules=parent.rules)
        beam.complete = candidate.token in self._settings.eos
        if parent.watch is not None and not beam.complete:
            beam.watch = parent.watch.fork()
            beam.watch.push(candidate.token)
            beam.complete = beam.watch.stopped
        beam.complete |= len(beam.tokens) == self._settings.max_new
        return beam

    def _closed(self) -> bool:
        """True if no running beam can beat the complete ones, by the ``early_stopping`` rule."""
        settings = self._settings
        if len(self.complete) < settings.num_beams or not self.running:
            return False
        if settings.early_stopping is True:
            return True
        best = self.running[0]
        longest = settings.early_stopping == "never" and settings.length_penalty > 0
        length = settings.max_new if longest else len(best.tokens)
        return bool(best.score / length**settings.length_penalty <= self.complete[-1].score)


def advance(searches: Sequence[BeamSearch], logits: torch.Tensor) -> list[list[int] | Exception]:
    """Take searches one token on.

    Args:
        logits: ``(rows, vocab_size)``, a row for each running beam, search after search; of a search that has
            not begun the row after its prompt.

    Returns:
        For each search the beams, out of those that ran, which the ones that run now continue, none once it
        has ended; or why it cannot go on: logits that no distribution can be made of, options that bar every
        token, whatever its tokenizer raised.
    """
    outcomes: list[list[int] | Exception] = [[] for _ in searches]
    counts = [max(len(search.running), 1) for search in searches]
    # The largest of a row is NaN where one of its numbers is.
    largest = logits.amax(-1).tolist()
    alike: dict[Any, list[_Asked]] = defaultdict(list)
    end = 0
    for place, (search, rows) in enumerate(zip(searches, logits.split(counts), strict=True)):
        start, end = end, end + len(rows)
        try:
            _refuse(largest[start:end])
            if not search.running:
                search.begin()
            asked = _Asked(place, *search.scored(rows))
            alike[search.most, asked.logits.shape, asked.logits.dtype].append(asked)
        except Exception as error:  # it is its search's alone
            outcomes[place] = error
    for (most, *_), group in alike.items():
        for asked, candidates in zip(group, _candidates(group, most), strict=True):
            try:
                outcomes[asked.place] = searches[asked.place].extend(candidates)
            except Exception as error:
                outcomes[asked.place] = error
    return outcomes


class _Asked(NamedTuple):
    """The place of a search, and its logits and scores as ``BeamSearch.scored`` gives them."""

    place: int
    logits: torch.Tensor
    scores: torch.Tensor


def _candidates(group: Sequence[_Asked], most: int) -> list[list[_Candidate]]:
    """The ``most`` best tokens after the beams of each search, best first, all in one call."""
    best = top_k_logprobs(
        torch.stack([asked.logits for asked in group]),
        most,
        scores=torch.stack([asked.scores for asked in group]),
    )
    # One wait for the device.
    packed = torch.stack([part.double() for part in best], dim=-1).tolist()
    return [[_Candidate(score, int(beam), int(token)) for score, beam, token in found] for found in packed]


def refuse_beams(source: str, **asked: Any) -> None:
    """Refuse what beam search does not have; ``asked`` has it by name, false where nobody asked for it.

    Raises:
        ValueError: One of them was asked for; the message begins with ``source``.
    """
    for name, value in asked.items():
        if value:
            instead = "gives scores of whole sequences" if "logprobs" in name else "has none"
            raise ValueError(f"{source}: {name} with num_beams > 1; beam search {instead}")


def _refuse(largest: Sequence[float]) -> None:
    """Refuse rows of logits that no distribution can be made of, as sampling does, by their largest."""
    for beam, value in enumerate(largest):
        if value == -math.inf:
            raise ValueError(f"beam {beam}: the logits leave no token to choose: every one is -inf")
        if not math.isfinite(value):
            held = "NaN" if math.isnan(value) else "+inf"
            raise ValueError(f"beam {beam}: the logits hold {held}; numbers and -inf are accepted")


def _divide_rules(beams: Sequence[Beam], parents: Sequence[int]) -> None:
    """Give every beam its own rules: the last child of a parent takes over, the others copy."""
    left = Counter(parents)
    for beam, parent in zip(beams, parents, strict=True):
        left[parent] -= 1
        if beam.rules is not None and left[parent]:
            beam.rules = beam.rules.fork()
    for beam in beams:
        if beam.rules is not None:
            beam.rules.push(beam.tokens[-1])
