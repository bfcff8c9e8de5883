"""Choosing each row's next token: one call's settings, put to ``ops.sample``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from gptkern._native import INFINITE, NAN, NOTHING_ALLOWED
from gptkern.engine.settings import Settings
from gptkern.generate.prompt import Prompts
from gptkern.generate.rules import RowRules, Rules
from gptkern.ops.sample import Sampled, SamplerState, SamplingParams, sample

_STATUSES_AT_ONCE = 64
_REASONS = {
    NAN: "hold NaN; numbers and -inf are accepted",
    INFINITE: "hold +inf, with their biases; numbers and -inf are accepted",
    NOTHING_ALLOWED: "leave no token to choose: every one is -inf or barred",
}


class Picker:
    """The sampler of one call.

    Args:
        rows: Which of ``batch * num_return_sequences`` rows each row of logits is.
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
        penalties = (settings.presence_penalty, settings.frequency_penalty)
        penalised = settings.repetition_penalty != 1.0 or any(penalties)
        sampling = settings.do_sample
        rules = Rules(settings)
        _check_some_left(len(rules.banned), vocab_size)
        self._params = SamplingParams.make(
            len(rows),
            vocab_size,
            temperature=settings.temperature if sampling else 0.0,
            top_k=min(settings.top_k, vocab_size) if sampling else 0,
            top_p=settings.top_p if sampling else 1.0,
            min_p=settings.min_p if sampling else 0.0,
            typical_p=settings.typical_p if sampling else 1.0,
            epsilon_cutoff=settings.epsilon_cutoff if sampling else 0.0,
            eta_cutoff=settings.eta_cutoff if sampling else 0.0,
            repetition_penalty=settings.repetition_penalty,
            presence_penalty=settings.presence_penalty,
            frequency_penalty=settings.frequency_penalty,
            min_new_tokens=settings.min_new,
            eos_token_id=sorted({token for token in settings.eos if token < vocab_size}),
            logit_bias=rules.biases,
            banned=sorted(rules.banned),
            n_logprobs=0 if logprobs else None,
            device=device,
        )
        copies = settings.num_return_sequences
        # A seed that was given makes a prompt's tokens its own: no draw knows where in the batch it stands.
        # Without one, no two rows are to draw alike, equal prompts included.
        requests = list(rows) if settings.seed is None else [row % copies for row in rows]
        self._state = SamplerState.make(
            len(rows), vocab_size, seed=settings.seed, request=requests, history=penalised, device=device
        )
        if penalised:
            source = torch.tensor([row // copies for row in rows], device=device)
            mask = None if prompts.mask is None else prompts.mask[source]
            self._state.add_prompt(prompts.ids[source], mask)

        self._vocab_size, self._device = vocab_size, device
        self._numbers = list(rows)
        self._unread: list[tuple[list[int], torch.Tensor]] = []
        self._rules = [RowRules(rules, prompts.rows[row // copies]) for row in rows] if rules.changing else []

    def __call__(self, logits: torch.Tensor) -> Sampled:
        """Choose from ``(rows, vocab_size)`` logits."""
        if self._rules:
            self._follow_rules()
        return self._noted(self._numbers, _draw(logits, self._params, self._state))

    def check(self) -> None:
        """Look whether every draw since the last look could be made. To be called when all are done.

        Raises:
            ValueError: A row of logits held NaN or +inf, or left no token.
        """
        statuses = torch.cat([status for _, status in self._unread]).tolist() if self._unread else []
        rows = [row for some, _ in self._unread for row in some]
        self._unread = []
        for row, status in zip(rows, statuses, strict=True):
            if status:
                raise ValueError(f"generate: row {row}: the logits {_REASONS[status]}")

    def _noted(self, rows: list[int], picked: Sampled) -> Sampled:
        # On a GPU a bad row is told by its status alone. Each look at one waits for the GPU: one for many.
        self._unread.append((rows, picked.status))
        if len(self._unread) == _STATUSES_AT_ONCE:
            self.check()
        return picked

    def push(self, tokens: Sequence[int]) -> None:
        """Tell the rules what came of the last call, one token a row."""
        for row, token in zip(self._rules, tokens, strict=bool(self._rules)):
            row.push(token)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        self._params, self._state = self._chosen(list(rows))
        self._numbers = [self._numbers[row] for row in rows]
        if self._rules:
            self._rules = [self._rules[row] for row in rows]

    @property
    def ruled(self) -> bool:
        """Whether the host has to see each token before the next can be chosen."""
        return bool(self._rules)

    def verify(self, logits: torch.Tensor, drafts: Sequence[Sequence[int]]) -> Sampled:
        """What plain steps would draw before, and after each of, every row's drafted tokens.

        Args:
            logits: ``(rows and drafted tokens, vocab_size)``: a row's first, then those after its drafts.
        """
        owners = [row for row, draft in enumerate(drafts) for _ in range(len(draft) + 1)]
        params, state = self._chosen(owners)
        ahead = [index for draft in drafts for index in range(len(draft) + 1)]
        state.counters[:, 2] += torch.tensor(ahead, device=self._device)
        if state.counts is not None:
            heads = [draft[:index] for draft in drafts for index in range(len(draft) + 1)]
            _count(state.counts, heads)
        rows = [self._numbers[owner] for owner in owners]
        return self._noted(rows, _draw(logits, params, replace(state, workspace=None)))

    def advance(self, tokens: Sequence[Sequence[int]]) -> None:
        """Count what came of ``verify``, each row's tokens."""
        self._state.counters[:, 2] += torch.tensor([len(row) for row in tokens], device=self._device)
        if self._state.counts is not None:
            _count(self._state.counts, tokens)

    def _chosen(self, chosen: list[int]) -> tuple[SamplingParams, SamplerState]:
        params, state = self._params, self._state

        def kept(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[chosen]

        params = replace(
            params,
            values=params.values[chosen],
            bias_ids=kept(params.bias_ids),
            bias_values=kept(params.bias_values),
            banned_ids=kept(params.banned_ids),
            eos_ids=kept(params.eos_ids),
        )
        return params, replace(state, counters=state.counters[chosen], counts=kept(state.counts))

    def _follow_rules(self) -> None:
        banned = [sorted(row.banned()) for row in self._rules]
        _check_some_left(max(map(len, banned)), self._vocab_size)
        biases = [row.biases() for row in self._rules]
        self._params = replace(
            self._params,
            banned_ids=self._rows(banned, -1, torch.int32),
            bias_ids=self._rows([list(row) for row in biases], -1, torch.int32),
            bias_values=self._rows([list(row.values()) for row in biases], 0.0, torch.float32),
        )

    def _rows(
        self, rows: Sequence[Sequence[float]], filling: float, dtype: torch.dtype
    ) -> torch.Tensor | None:
        width = max(map(len, rows))
        if not width:
            return None
        filled = [[*row, *[filling] * (width - len(row))] for row in rows]
        return torch.tensor(filled, dtype=dtype, device=self._device)


def _draw(logits: torch.Tensor, params: SamplingParams, state: SamplerState) -> Sampled:
    """Choose in at most fp32, as transformers does: the sampler takes no float64."""
    if logits.dtype == torch.float64:
        logits = logits.float()
    return sample(logits, params, state=state)


def _count(counts: torch.Tensor, tokens: Sequence[Sequence[int]]) -> None:
    rows = [row for row, ids in enumerate(tokens) for _ in ids]
    ids = [token for ids in tokens for token in ids]
    ones = torch.ones(len(ids), dtype=counts.dtype, device=counts.device)
    where = tuple(torch.tensor(ids, dtype=torch.int64, device=counts.device) for ids in (rows, ids))
    counts.index_put_(where, ones, accumulate=True)


def _check_some_left(banned: int, vocab_size: int) -> None:
    # The sampler tells on the CPU; on a GPU it gives a status, which would cost a wait for each token.
    if banned == vocab_size:
        raise ValueError(
            "generate: bad_words_ids, suppress_tokens and no_repeat_ngram_size bar every token there is"
        )
