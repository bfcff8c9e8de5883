"""Beam search, with the scores and the stopping rules of transformers: logits in, beams to continue out.

A beam's history is a chain of tokens, and its text, rules and token counts grow by one token a pass: a pass
costs the same however long the beams are.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from gptkern._native import IN_PROMPT
from gptkern.engine.rules import RowRules
from gptkern.engine.sampling import RowParams, padded
from gptkern.engine.settings import Settings
from gptkern.engine.stop_strings import StopWatch
from gptkern.ops.sample import reference, top_k_logprobs

if TYPE_CHECKING:
    from gptkern.tokenizer import Tokenizer

Chain = tuple[int, "Chain"] | None


@dataclass(slots=True)
class Beam:
    """One way on from a prompt.

    Attributes:
        chain: New tokens, the latest first.
        length: How many they are.
        score: Sum of their log-probabilities; of a complete beam, divided by its length penalty.
        finish_reason: Why it is complete; None while it runs.
        rules: Its rules; None where they do not depend on its tokens.
        watch: Its text; None where there are no stop strings.
    """

    chain: Chain = None
    length: int = 0
    score: float = 0.0
    finish_reason: Literal["stop", "length"] | None = None
    rules: RowRules | None = None
    watch: StopWatch | None = None

    @property
    def tokens(self) -> list[int]:
        """New tokens, in order."""
        tokens: list[int] = []
        chain = self.chain
        while chain is not None:
            token, chain = chain
            tokens.append(token)
        return tokens[::-1]


@dataclass
class _Search:
    """The search from one prompt: running beams, best first, and the best complete ones."""

    prompt: int
    running: list[Beam]
    complete: list[Beam] = field(default_factory=list)


class _Candidate(NamedTuple):
    """A token after one of a search's running beams."""

    score: float
    beam: int
    token: int


class BeamSearch:
    """The searches from some prompts, which share every pass. A search that cannot improve leaves.

    Args:
        prompts: The tokens of each, without padding.
        tokenizer: Needed where there are stop strings.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Settings,
        vocab_size: int,
        device: torch.device,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self._settings, self._vocab_size, self._device = settings, vocab_size, device
        self._params = params = RowParams(settings, vocab_size)
        self._altered = bool(params.penalised or params.rules.active or (settings.min_new and params.eos))
        self._searches = [
            _Search(number, [self._first(prompt, tokenizer)]) for number, prompt in enumerate(prompts)
        ]
        self._active = list(self._searches)
        self._counts: torch.Tensor | None = None
        if params.penalised:
            self._counts = torch.zeros(len(prompts), vocab_size, dtype=torch.int32, device=device)
            for row, prompt in enumerate(prompts):
                self._counts[row, torch.tensor(sorted(set(prompt)), device=device)] = IN_PROMPT

    def _first(self, prompt: Sequence[int], tokenizer: Tokenizer | None) -> Beam:
        rules, watch = self._params.rules, None
        if self._settings.stop_strings:
            assert tokenizer is not None
            watch = StopWatch(tokenizer, self._settings.stop_strings, prompt)
        return Beam(rules=RowRules(rules, prompt) if rules.changing else None, watch=watch)

    def advance(self, logits: torch.Tensor) -> tuple[list[int], list[int]]:
        """Take every search one token on.

        Args:
            logits: ``(rows, vocab_size)``, a row for each running beam, search after search; at first one for
                each prompt.

        Returns:
            (parents, tokens): for each beam that runs now, the row of ``logits`` that it continues and its
            new token. Both are empty when all searches have ended.

        Raises:
            ValueError: Logits that no distribution can be made of, or options that bar every token.
        """
        self._check(logits)
        parents: list[int] = []
        start = 0
        for search, candidates in zip(self._active, self._candidates(logits), strict=True):
            beams = len(search.running)
            parents += [start + row for row in self._extend(search, candidates)]
            start += beams
        self._active = [search for search in self._active if search.running]
        tokens = [beam.chain[0] for beam in self._beams() if beam.chain is not None]
        if self._counts is not None and parents:
            self._counts = self._counts[torch.tensor(parents, device=self._device)]
            rows = torch.arange(len(tokens), device=self._device)
            self._counts[rows, torch.tensor(tokens, device=self._device)] += 1
        return parents, tokens

    def best(self) -> list[Beam]:
        """The ``num_return_sequences`` best beams of each prompt, best first, once all have ended."""
        most = self._settings.num_return_sequences
        return [beam for search in self._searches for beam in search.complete[:most]]

    def _beams(self) -> list[Beam]:
        return [beam for search in self._active for beam in search.running]

    def _check(self, logits: torch.Tensor) -> None:
        """Refuse rows of logits that no distribution can be made of, as sampling does."""
        rows = [(search.prompt, beam) for search in self._active for beam in range(len(search.running))]
        # The largest is NaN where one is.
        for (prompt, beam), largest in zip(rows, logits.amax(-1).tolist(), strict=True):
            if math.isfinite(largest):
                continue
            where = f"generate: row {prompt} of the prompts, beam {beam}: the logits"
            if largest == -math.inf:
                raise ValueError(f"{where} leave no token to choose: every one is -inf")
            held = "NaN" if math.isnan(largest) else "+inf"
            raise ValueError(f"{where} hold {held}; numbers and -inf are accepted")

    def _candidates(self, logits: torch.Tensor) -> list[list[_Candidate]]:
        """The best tokens after each search's beams: enough that ``num_beams`` can go on whichever end."""
        most = max(2, 1 + len(self._settings.eos)) * self._settings.num_beams
        scores = torch.tensor([beam.score for beam in self._beams()], device=self._device)
        if logits.dtype == torch.float64:
            logits = logits.float()
        if self._altered:
            logits, scores = self._processed(logits, scores)
        candidates: list[list[_Candidate]] = [[] for _ in self._active]
        for beams, members in self._by_beams().items():
            rows = torch.tensor(
                [row for _, start in members for row in range(start, start + beams)], device=self._device
            )
            shape = (len(members), beams)
            best = top_k_logprobs(
                logits[rows].reshape(*shape, self._vocab_size),
                min(most, beams * self._vocab_size),
                scores=scores[rows].reshape(shape),
            )
            # One wait for the device.
            packed = torch.stack([part.double() for part in best], dim=-1).tolist()
            for (place, _), found in zip(members, packed, strict=True):
                candidates[place] = [_Candidate(score, int(beam), int(token)) for score, beam, token in found]
                if candidates[place][0].score == -math.inf:
                    row = self._active[place].prompt
                    raise ValueError(
                        f"generate: row {row} of the prompts: the options bar every token there is"
                    )
        return candidates

    def _by_beams(self) -> dict[int, list[tuple[int, int]]]:
        """By how many beams they run, the searches' places and first rows."""
        groups: dict[int, list[tuple[int, int]]] = defaultdict(list)
        start = 0
        for place, search in enumerate(self._active):
            groups[len(search.running)].append((place, start))
            start += len(search.running)
        return groups

    def _processed(self, logits: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities after biases, penalties, bans and the minimum length, as logits and scores.

        They are processed as they are, without being normalised again: what a row lacks to a sum of 1 goes
        into its score.
        """
        beams, params = self._beams(), self._params
        verdicts = [params.verdict if beam.rules is None else beam.rules.verdict() for beam in beams]
        bias_ids = padded([list(v.biases) for v in verdicts], -1, torch.int32, self._device)
        amounts = padded([list(v.biases.values()) for v in verdicts], 0.0, torch.float32, self._device)
        x = reference.processed(
            logits.float().log_softmax(-1),
            torch.tensor([params.values] * len(beams), dtype=torch.float64, device=self._device),
            torch.tensor([beam.length for beam in beams], device=self._device),
            self._counts,
            None if bias_ids is None or amounts is None else (bias_ids, amounts),
            padded([sorted(v.banned) for v in verdicts], -1, torch.int32, self._device),
            padded([params.eos] * len(beams), -1, torch.int32, self._device),
        )
        totals = x.logsumexp(-1)
        # A beam without a token left: its candidates come last.
        over = totals == -math.inf
        return x.masked_fill(over[:, None], 0.0), torch.where(over, -math.inf, scores + totals)

    def _extend(self, search: _Search, candidates: Sequence[_Candidate]) -> list[int]:
        """Take one search on; which of its beams each one that runs then continues."""
        width = self._settings.num_beams
        running: list[Beam] = []
        parents: list[int] = []
        for rank, candidate in enumerate(candidates):
            if len(running) == width and rank >= width:
                break
            beam = self._grown(search.running[candidate.beam], candidate)
            if beam.finish_reason is None and len(running) < width:
                running.append(beam)
                parents.append(candidate.beam)
            elif beam.finish_reason is not None and rank < width:
                beam.score /= beam.length**self._settings.length_penalty
                beam.rules = beam.watch = None
                search.complete.append(beam)
        search.complete.sort(key=lambda beam: -beam.score)
        del search.complete[width:]
        search.running = running
        if self._closed(search):
            search.running, parents = [], []
        _divide_rules(search.running, parents)
        return parents

    def _grown(self, parent: Beam, candidate: _Candidate) -> Beam:
        """A beam and one token more; its rules are still its parent's."""
        beam = Beam((candidate.token, parent.chain), parent.length + 1, candidate.score, rules=parent.rules)
        if candidate.token in self._settings.eos:
            beam.finish_reason = "stop"
            return beam
        if parent.watch is not None:
            beam.watch = parent.watch.fork()
            beam.watch.push(candidate.token)
            if beam.watch.stopped:
                beam.finish_reason = "stop"
                return beam
        if beam.length == self._settings.max_new:
            beam.finish_reason = "length"
        return beam

    def _closed(self, search: _Search) -> bool:
        """True if no running beam can beat the complete ones, by the ``early_stopping`` rule."""
        settings = self._settings
        if len(search.complete) < settings.num_beams or not search.running:
            return False
        if settings.early_stopping is True:
            return True
        best = search.running[0]
        longest = settings.early_stopping == "never" and settings.length_penalty > 0
        length = settings.max_new if longest else best.length
        return bool(best.score / length**settings.length_penalty <= search.complete[-1].score)


def _divide_rules(beams: Sequence[Beam], parents: Sequence[int]) -> None:
    """Give every beam its own rules: the last child of a parent takes over, the others copy."""
    left = Counter(parents)
    for beam, parent in zip(beams, parents, strict=True):
        left[parent] -= 1
        if beam.rules is not None and left[parent]:
            beam.rules = beam.rules.fork()
    for beam in beams:
        if beam.rules is not None and beam.chain is not None:
            beam.rules.push(beam.chain[0])
