"""The sampler of a running batch: rows join and leave, each with its own settings, history and rules.

A row's draws are a function of its settings, its own tokens and (seed, request, position) alone, whatever
rows stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from gptkern._native import COUNTERS, IN_PROMPT, INFINITE, NAN, NOTHING_ALLOWED, PARAMETERS
from gptkern.engine.constraint import Constraint, bitmask_of
from gptkern.engine.options import TABLE
from gptkern.engine.processors import LogitsProcessor, processed, with_raw_logprobs
from gptkern.engine.rules import RowRules, Rules, Verdict
from gptkern.engine.settings import Settings
from gptkern.ops.sample import Sampled, SamplerState, SamplingParams, sample
from gptkern.ops.sample.launch import Outputs, prepared, sample_outputs, serves
from gptkern.ops.sample.op import as_sampled, sample_into
from gptkern.sampler_columns import NEUTRAL

_REASONS = {
    NAN: "the logits hold NaN; numbers and -inf are accepted",
    INFINITE: "the logits hold +inf, with their biases; numbers and -inf are accepted",
    NOTHING_ALLOWED: "the logits leave no token to choose: every one is -inf or barred",
}
_ALL_BARRED = "bad_words_ids, suppress_tokens and no_repeat_ngram_size bar every token there is"
_OF_COLUMN = {option.column: option for option in TABLE if option.column is not None}
_STEP = COUNTERS.index("step")


class RowParams:
    """The settings of a request as the sampler takes them, for all its rows.

    Args:
        top_logprobs: None: no log-probabilities; 0: those of chosen tokens; n: also the n most likely
            tokens'.

    Attributes:
        vocab_size: Tokens there are.
        values: A number for each of the sampler's columns.
        eos: End-of-text tokens of the vocabulary.
        has_least_length: Whether these are banned from the first new tokens.
        verdict: Bans and biases that do not depend on a row's tokens.
        rules: Bans and biases, with those that depend on a row's tokens.
        penalised: Whether the sampler has to count a row's tokens.

    Raises:
        ValueError: The settings bar every token.
    """

    def __init__(self, settings: Settings, vocab_size: int, top_logprobs: int | None = None) -> None:
        self.rules = Rules(settings)
        if len(self.rules.banned) == vocab_size:
            raise ValueError(f"generate: {_ALL_BARRED}")
        self.vocab_size, self.top_logprobs = vocab_size, top_logprobs
        self.values = _values(settings, vocab_size, top_logprobs or 0)
        self.eos = sorted({token for token in settings.eos if token < vocab_size})
        self.has_least_length = settings.min_new > 0
        self.verdict = Verdict(self.rules.banned, self.rules.biases)
        penalties = (settings.presence_penalty, settings.frequency_penalty)
        self.penalised = settings.repetition_penalty != 1.0 or any(penalties)


def _values(settings: Settings, vocab_size: int, n_logprobs: int) -> list[float]:
    special = {
        "top_k": min(settings.top_k, vocab_size),
        "min_new_tokens": settings.min_new,
        "n_logprobs": n_logprobs,
    }
    greedy = NEUTRAL | {"temperature": 0.0}
    values: list[float] = []
    for column in PARAMETERS:
        option = _OF_COLUMN.get(column)
        if option is not None and option.draws and not settings.do_sample:
            values.append(greedy[column])
        else:
            values.append(float(special[column] if column in special else getattr(settings, column)))
    return values


class SamplerRow:
    """One row: its settings, its key among all draws, and its tokens so far.

    Args:
        prompt: Its tokens, without padding.
        seed, request: 64 bits each. A draw is a function of these and of the row's position alone.
        generated: New tokens that it has already, where it goes on with them.
        processors: Called one after another with its tokens and logits, before its settings apply.
        constraint: Bars tokens by those that came; it has none of this row's yet.
    """

    def __init__(
        self,
        params: RowParams,
        prompt: Sequence[int],
        *,
        seed: int,
        request: int,
        generated: Sequence[int] = (),
        processors: Sequence[LogitsProcessor] = (),
        constraint: Constraint | None = None,
    ) -> None:
        self.params, self.prompt, self.processors = params, prompt, processors
        self.constraint = constraint
        self.seed, self.request = seed, request
        self.generated: list[int] = []
        self.rules = RowRules(params.rules, prompt) if params.rules.changing else None
        for token in generated:
            self.push(token)

    def push(self, token: int) -> None:
        """Take the row's next token, before the next draw."""
        self.generated.append(token)
        if self.rules is not None:
            self.rules.push(token)
        if self.constraint is not None:
            self.constraint.push(token)


def row_keys(settings: Settings, prompts: int) -> list[tuple[int, int]]:
    """(seed, request) of each row of one call: every prompt's copies, prompt after prompt.

    A seed that was given makes a prompt's tokens its own: no draw knows where in the batch it stands. Without
    one, no two rows are to draw alike, equal prompts included.
    """
    copies = settings.num_return_sequences
    rows = range(prompts * copies)
    if settings.seed is not None:
        return [(settings.seed, row % copies) for row in rows]
    seed = int(torch.randint(2**62, (), device="cpu").item())
    return [(seed, row) for row in rows]


class RowDraw(NamedTuple):
    """A row's new tokens, on the host.

    Attributes:
        tokens: One, or with drafts those that held and one more.
        logprobs: The model's log-probability of each; None where not asked for.
        top_logprobs: Of each token's place the most likely tokens, best first, with their log-probabilities.
        failure: Why no further token could be drawn; None: all is well.
    """

    tokens: list[int]
    logprobs: list[float] | None
    top_logprobs: list[list[tuple[int, float]]] | None
    failure: Exception | None


class Drawn:
    """The draws of one pass, on the device until they are read.

    Attributes:
        tokens: ``(positions,)`` int64, every row's own and those after its drafts. The token of a row that
            failed is 0.
    """

    def __init__(
        self,
        sampler: Sampler,
        rows: Sequence[SamplerRow],
        drafts: Sequence[Sequence[int]],
        sampled: Sampled,
        failures: dict[int, Exception],
        all_good: bool = False,
    ) -> None:
        self._sampler, self._rows, self._drafts, self._sampled = sampler, rows, drafts, sampled
        self._drafted, self._failures = any(drafts), failures
        self.tokens = sampled.tokens
        # Known already, and nothing but tokens was asked for.
        self._tokens_alone = all_good and sampled.logprobs is None

    def read(self) -> list[RowDraw]:
        """Wait for the device, and let drafts that held count as drawn. To be called once."""
        sampled = self._sampled
        if self._tokens_alone:
            return [RowDraw([token], None, None, None) for token in sampled.tokens.tolist()]
        if sampled.tokens.device.type == "cpu":
            tokens, statuses = sampled.tokens.tolist(), sampled.status.tolist()
        else:
            # Both at once: each reading waits for the device.
            tokens, statuses = torch.stack([sampled.tokens, sampled.status.long()]).tolist()
        logprobs = None if sampled.logprobs is None else sampled.logprobs.tolist()
        top = None if sampled.top_logprobs is None else [part.tolist() for part in sampled.top_logprobs]
        if logprobs is None and not self._drafted and not any(statuses):
            return [RowDraw([token], None, None, None) for token in tokens]
        draws: list[RowDraw] = []
        start = 0
        for row, draft in zip(self._rows, self._drafts, strict=True):
            count, failure = _accepted(tokens, statuses, start, draft)
            if failure is not None:
                failure = self._failures.get(start + count, failure)
            asked = row.params.top_logprobs
            places = range(start, start + count)
            draws.append(
                RowDraw(
                    tokens[start : start + count],
                    None if asked is None or logprobs is None else [logprobs[place] for place in places],
                    [_pairs(top, place, asked) for place in places] if asked and top else None,
                    failure,
                )
            )
            start += len(draft) + 1
        if self._drafted:
            self._sampler._advance([draw.tokens for draw in draws])
        return draws


def _accepted(
    tokens: list[int], statuses: list[int], start: int, draft: Sequence[int]
) -> tuple[int, Exception | None]:
    """The number of a row's draws that hold, all drafts before them included, and the next one's error."""
    for ahead in range(len(draft) + 1):
        if status := statuses[start + ahead]:
            return ahead, ValueError(_REASONS.get(status, f"the sampler's status is {status}"))
        if ahead == len(draft) or tokens[start + ahead] != draft[ahead]:
            return ahead + 1, None
    raise AssertionError  # the loop returns at its last turn


def _pairs(top: list[list[list[float]]], place: int, asked: int) -> list[tuple[int, float]]:
    tokens, logprobs = top[0][place][:asked], top[1][place][:asked]
    return [(int(token), logprob) for token, logprob in zip(tokens, logprobs, strict=True) if token >= 0]


class Sampler:
    """Draws the next tokens of whichever rows a pass has."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._rows: list[SamplerRow] = []
        self._params: SamplingParams
        self._state: SamplerState
        # Where the extension writes, from draw to draw of the same rows: it is read before the next one.
        self._outputs: Outputs | None = None
        # Whether one of the rows has rules that depend on its tokens, processors, or a constraint.
        self._ruled = self._processed = self._constrained = False

    def draw(
        self,
        rows: list[SamplerRow],
        logits: torch.Tensor,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> Drawn:
        """Draw from ``logits`` ``(positions, vocab_size)``: each row's next token, and one after each draft.

        Rows may be others, or in another order, than at the last call; all its draws were read and pushed.
        Drafts are drawn at as plain passes would draw there: they hold while they equal the draws.

        Args:
            drafts: The drafted tokens of each row, whose logits follow its own; None for none.
        """
        self._arrange(rows)
        if logits.dtype == torch.float64:
            # The sampler takes no float64; transformers draws in at most fp32 too.
            logits = logits.float()
        drafts = [()] * len(rows) if drafts is None else drafts
        drafted = any(drafts)
        params, state = self._expanded(drafts) if drafted else (self._params, self._state)
        failures: dict[int, Exception] = {}
        raw = logits
        places: list[int] = []
        if self._processed:
            logits, places = processed(rows, raw, drafts, failures)
        if self._ruled:
            params = self._with_rules(params, rows, drafts, failures)
        if self._constrained:
            # Rows with a constraint draft nothing: a draft's places have no mask of their own.
            owners = [
                row.constraint for row, draft in zip(rows, drafts, strict=True) for _ in range(len(draft) + 1)
            ]
            bitmask = bitmask_of(owners, self._vocab_size, failures)
            params = replace(params, bitmask=bitmask.to(self._device))
        if serves(logits):
            outputs = None if drafted else self._outputs
            if outputs is None:
                outputs = sample_outputs(logits, params.max_logprobs)
            if not drafted:
                self._outputs = outputs
            sampled = sample_into(outputs, logits, params, state=state)
        else:
            sampled = _sample_by_pytorch(logits, params, state)
        if not drafted and logits.device.type != "cuda" and any(sampled.status.tolist()):
            self._advance_good(sampled)
        sampled = with_raw_logprobs(sampled, raw, places)
        return Drawn(self, self._rows, drafts, sampled, failures)

    def tokens_of(self, rows: int) -> torch.Tensor | None:
        """The last draw's tokens, ``(rows,)`` int64, which ``repeated`` replaces; None: it has none."""
        tokens = None if self._outputs is None else self._outputs.tokens
        return tokens if tokens is not None and len(tokens) == len(self._rows) == rows else None

    def repeated(self, logits: torch.Tensor) -> Callable[[], Drawn] | None:
        """A draw of the last draw's rows from these logits, whose numbers are others in each call.

        None where something has to be worked out for every token: rules, processors, a constraint.
        """
        outputs = self._outputs
        if outputs is None or self._ruled or self._processed or self._constrained or not serves(logits):
            return None
        draw, width = prepared(logits, self._params, self._state, outputs), self._params.max_logprobs
        sampled, drafts = as_sampled(width, outputs), [()] * len(self._rows)

        def drawn() -> Drawn:
            bad = draw()
            if bad >= 0:
                with torch.inference_mode():
                    self._advance_good(sampled)
            return Drawn(self, self._rows, drafts, sampled, {}, all_good=bad < 0)

        return drawn

    def _advance_good(self, sampled: Sampled) -> None:
        """Count the tokens of rows that could be drawn: on a CPU one bad row keeps every row from it."""
        rest = zip(sampled.tokens.tolist(), sampled.status.tolist(), strict=True)
        self._advance([[] if status else [token] for token, status in rest])

    def forget(self) -> None:
        """Take the device's state for unknown: draws were made that nobody read."""
        self._rows = []

    def _arrange(self, rows: list[SamplerRow]) -> None:
        """Bring together all that follows from which rows these are; their state where the device has it."""
        if rows == self._rows:
            return
        own = [row.params for row in rows]
        asked = [p.top_logprobs for p in own if p.top_logprobs is not None]
        biases = [p.verdict.biases for p in own]
        self._params = SamplingParams(
            values=torch.tensor([p.values for p in own], dtype=torch.float64, device=self._device),
            bias_ids=padded([list(b) for b in biases], -1, torch.int32, self._device),
            bias_values=padded([list(b.values()) for b in biases], 0.0, torch.float32, self._device),
            banned_ids=padded([sorted(p.verdict.banned) for p in own], -1, torch.int32, self._device),
            # Only where they are banned for a time: a call without lists takes the kernel that only draws.
            eos_ids=padded([p.eos if p.has_least_length else [] for p in own], -1, torch.int32, self._device),
            max_logprobs=max(asked) if asked else None,
        )
        before = {id(row): place for place, row in enumerate(self._rows)}
        stay = [(place, before[id(row)]) for place, row in enumerate(rows) if id(row) in before]
        self._state = self._moved(rows, stay)
        self._outputs = None
        self._ruled = any(row.rules is not None for row in rows)
        self._processed = any(row.processors for row in rows)
        self._constrained = any(row.constraint is not None for row in rows)
        self._rows = list(rows)

    def _moved(self, rows: Sequence[SamplerRow], stay: Sequence[tuple[int, int]]) -> SamplerState:
        """The state of ``rows``; ``stay`` holds (place, place before) of those that the device knows."""
        keys = [[_signed(row.seed), _signed(row.request), len(row.generated)] for row in rows]
        state = SamplerState(torch.tensor(keys, dtype=torch.int64, device=self._device))
        if any(row.params.penalised for row in rows):
            shape = (len(rows), self._vocab_size)
            state.counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
        known = {place for place, _ in stay}
        if stay:
            to, source = (torch.tensor(places, device=self._device) for places in zip(*stay, strict=True))
            if state.counts is not None and self._state.counts is not None:
                state.counts[to] = self._state.counts[source]
            state.workspace = self._state.workspace
        for place, row in enumerate(rows):
            if state.counts is not None and row.params.penalised and place not in known:
                prompt = torch.tensor(sorted(set(row.prompt)), device=self._device)
                state.counts[place, prompt] = IN_PROMPT
                _count(state.counts[place : place + 1], [row.generated])
        return state

    def _with_rules(
        self,
        params: SamplingParams,
        rows: Sequence[SamplerRow],
        drafts: Sequence[Sequence[int]],
        failures: dict[int, Exception],
    ) -> SamplingParams:
        """The parameters with each position's own bans and biases; ``failures`` takes where none is left."""
        verdicts = [v for row, draft in zip(rows, drafts, strict=True) for v in _verdicts(row, draft)]
        for place, verdict in enumerate(verdicts):
            if len(verdict.banned) == self._vocab_size:
                failures[place] = ValueError(_ALL_BARRED)
        banned, biases = [sorted(v.banned) for v in verdicts], [v.biases for v in verdicts]
        return replace(
            params,
            banned_ids=padded(banned, -1, torch.int32, self._device),
            bias_ids=padded([list(b) for b in biases], -1, torch.int32, self._device),
            bias_values=padded([list(b.values()) for b in biases], 0.0, torch.float32, self._device),
        )

    def _expanded(self, drafts: Sequence[Sequence[int]]) -> tuple[SamplingParams, SamplerState]:
        """Parameters and state of every position: each row's, and as they are after each of its drafts."""
        owners = [row for row, draft in enumerate(drafts) for _ in range(len(draft) + 1)]
        ahead = [index for draft in drafts for index in range(len(draft) + 1)]
        params, state = _chosen(self._params, self._state, torch.tensor(owners, device=self._device))
        state.counters[:, _STEP] += torch.tensor(ahead, device=self._device)
        if state.counts is not None:
            _count(state.counts, [draft[:index] for draft in drafts for index in range(len(draft) + 1)])
        return params, state

    def _advance(self, tokens: Sequence[Sequence[int]]) -> None:
        """Count each row's new tokens."""
        drawn = torch.tensor([len(row) for row in tokens], device=self._device)
        self._state.counters[:, _STEP] += drawn
        if self._state.counts is not None:
            _count(self._state.counts, tokens)


def padded(
    rows: Sequence[Sequence[float]], filling: float, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """Lists as a tensor ``(rows, longest)``, filled up; None where all are empty."""
    width = max(map(len, rows), default=0)
    if not width:
        return None
    filled = [[*row, *[filling] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=dtype, device=device)


def _signed(number: int) -> int:
    """64 bits as torch holds them."""
    return (number + 2**63) % 2**64 - 2**63


def _verdicts(row: SamplerRow, draft: Sequence[int]) -> list[Verdict]:
    if row.rules is not None:
        return row.rules.ahead(draft)
    return [row.params.verdict] * (len(draft) + 1)


def _chosen(
    params: SamplingParams, state: SamplerState, rows: torch.Tensor
) -> tuple[SamplingParams, SamplerState]:
    """Copies of some rows."""

    def some(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[rows]

    params = replace(
        params,
        values=params.values[rows],
        bias_ids=some(params.bias_ids),
        bias_values=some(params.bias_values),
        banned_ids=some(params.banned_ids),
        eos_ids=some(params.eos_ids),
        bitmask=some(params.bitmask),
    )
    return params, SamplerState(state.counters[rows], some(state.counts))


def _sample_by_pytorch(logits: torch.Tensor, params: SamplingParams, state: SamplerState) -> Sampled:
    """Draw; a row that cannot be drawn gets a status, and no error."""
    try:
        return sample(logits, params, state=state)
    except ValueError:
        return _without_bad_rows(logits, params, state)


def _without_bad_rows(logits: torch.Tensor, params: SamplingParams, state: SamplerState) -> Sampled:
    """Draw where plain PyTorch refuses the whole batch for some rows; nothing is counted."""
    statuses: dict[int, int] = {}
    for row, values in enumerate(logits):
        own = _chosen(params, state, torch.tensor([row], device=logits.device))
        try:
            sample(values[None], own[0], state=own[1])
        except ValueError:
            infinite = INFINITE if bool((values == float("inf")).any()) else NOTHING_ALLOWED
            statuses[row] = NAN if bool(values.isnan().any()) else infinite
    bad = torch.tensor(list(statuses), device=logits.device)
    params, state = _chosen(params, state, torch.arange(len(logits), device=logits.device))
    for ids in (params.banned_ids, params.bias_ids, params.eos_ids):
        if ids is not None:
            ids[bad] = -1
    if params.bitmask is not None:
        params.bitmask[bad] = -1
    sampled = sample(logits.index_fill(0, bad, 0.0), params, state=state)
    sampled.tokens[bad] = 0
    sampled.status[bad] = torch.tensor(list(statuses.values()), dtype=torch.int32, device=logits.device)
    return sampled


def _count(counts: torch.Tensor, tokens: Sequence[Sequence[int]]) -> None:
    """Count each row's tokens in ``counts`` ``(rows, vocab_size)``."""
    rows = [row for row, ids in enumerate(tokens) for _ in ids]
    flat = [token for ids in tokens for token in ids]
    ones = torch.ones(len(flat), dtype=counts.dtype, device=counts.device)
    where = tuple(torch.tensor(ids, dtype=torch.int64, device=counts.device) for ids in (rows, flat))
    counts.index_put_(where, ones, accumulate=True)
