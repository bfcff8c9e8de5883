"""The sampler's parameters and its state: tensors on the device, one row for each sequence."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gptkern._native import COUNTERS, IN_PROMPT, PARAMETERS
from gptkern.sampler_columns import COLUMNS

_COLUMNS = tuple(sorted(COLUMNS, key=lambda column: PARAMETERS.index(column.name)))

Number = float | Sequence[float] | torch.Tensor
Ids = Sequence[int] | Sequence[Sequence[int]]


def _per_row(name: str, value: Number, batch: int) -> torch.Tensor:
    column = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    if column.dim() and tuple(column.shape) != (batch,):
        raise ValueError(
            f"SamplingParams: {name} has shape {tuple(column.shape)}; "
            f"a number, or one for each of {batch} rows, shape ({batch},), is needed"
        )
    return column


def _id_rows(name: str, ids: Ids, batch: int, vocab: int) -> list[list[int]]:
    """The lists of ids, checked: one for all rows, or one for each."""
    entries: list[Any] = list(ids)
    nested = bool(entries) and not isinstance(entries[0], int)
    rows = [list(row) for row in entries] if nested else [entries]
    if nested and len(rows) != batch:
        raise ValueError(f"SamplingParams: {name} has {len(rows)} lists; one for each of {batch} rows")
    for row, tokens in enumerate(rows):
        for token in tokens:
            if not 0 <= token < vocab:
                raise ValueError(
                    f"SamplingParams: {name}[{row}] holds token {token}; 0 <= token < {vocab} is needed"
                )
        if len(set(tokens)) != len(tokens):
            raise ValueError(f"SamplingParams: {name}[{row}] holds a token twice")
    return rows


def _padded(rows: list[list[int]], batch: int, device: torch.device) -> torch.Tensor | None:
    width = max((len(row) for row in rows), default=0)
    if width == 0:
        return None
    lists = torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32, device=device)
    return lists.expand(batch, width).contiguous()


@dataclass
class SamplingParams:
    """The parameters of each row's draw. Make one with :meth:`make` and use it for every token.

    Attributes:
        values: ``(batch, 12)`` float64, the columns in the order of ``PARAMETERS``. ``column(name)``
            is one of them, a view: ``params.column("temperature")[3] = 0.7`` changes row 3.
        bias_ids, bias_values: ``(batch, n)`` int32 and fp32, ids padded with -1, or None. Ids of a
            row are distinct.
        banned_ids, eos_ids: ``(batch, n)`` int32, padded with -1, or None.
        bitmask: ``(batch, ceil(vocab / 32))`` int32, bit ``i % 32`` of word ``i // 32`` set where token
            ``i`` is allowed (xgrammar's layout), or None. A constrained caller rewrites it for every token.
        max_logprobs: The width of ``Sampled.top_logprobs``; None: no log-probabilities are computed.
    """

    values: torch.Tensor
    bias_ids: torch.Tensor | None = None
    bias_values: torch.Tensor | None = None
    banned_ids: torch.Tensor | None = None
    eos_ids: torch.Tensor | None = None
    bitmask: torch.Tensor | None = None
    max_logprobs: int | None = None

    @classmethod
    def make(
        cls,
        batch: int,
        vocab: int,
        *,
        temperature: Number = 1.0,
        top_k: Number = 0,
        top_p: Number = 1.0,
        min_p: Number = 0.0,
        typical_p: Number = 1.0,
        epsilon_cutoff: Number = 0.0,
        eta_cutoff: Number = 0.0,
        repetition_penalty: Number = 1.0,
        presence_penalty: Number = 0.0,
        frequency_penalty: Number = 0.0,
        min_new_tokens: Number = 0,
        eos_token_id: int | Ids | None = None,
        logit_bias: Mapping[int, float] | Sequence[Mapping[int, float]] | None = None,
        banned: Ids | None = None,
        bitmask: torch.Tensor | None = None,
        n_logprobs: int | Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> SamplingParams:
        """Parameters for ``batch`` rows; each may be one value for all rows or one for each.

        Args:
            temperature: Logits are divided by it; 0 takes the most likely token (lowest id on ties).
            top_k: Keep the k most likely tokens, exactly k: on a tie the lower id wins. 0: all.
            top_p: Nucleus sampling: keep the tokens with less than ``top_p`` of the mass ahead of them.
            min_p: Drop tokens less likely than ``min_p`` times the most likely one. 0: off.
            typical_p: Locally typical sampling: the mass of the tokens that it keeps. 1: off.
            epsilon_cutoff, eta_cutoff: As in ``transformers``; 0: off.
            repetition_penalty: Logits of tokens in the prompt or generated are divided (positive ones)
                or multiplied by it. Penalties need ``SamplerState.make(..., history=True)``.
            presence_penalty: Subtracted once from the logits of generated tokens.
            frequency_penalty: Subtracted from a token's logit for each time it was generated.
            min_new_tokens: Ban ``eos_token_id`` until so many tokens are generated.
            eos_token_id: One id, several, or several for each row.
            logit_bias: ``{token: bias}`` for all rows, or one such mapping for each; finite or -inf.
            banned: Tokens that are never chosen: one list for all rows, or one for each.
            bitmask: See the attribute.
            n_logprobs: None: no log-probabilities; 0: the chosen token's; n: also the n best tokens'.

        Raises:
            ValueError: A value is outside its range, or lists do not fit the batch.
        """
        on = torch.device(device)
        numbers = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "typical_p": typical_p,
            "epsilon_cutoff": epsilon_cutoff,
            "eta_cutoff": eta_cutoff,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "min_new_tokens": min_new_tokens,
            "n_logprobs": 0 if n_logprobs is None else n_logprobs,
        }
        values = torch.empty(batch, len(PARAMETERS), dtype=torch.float64, device="cpu")
        for index, name in enumerate(PARAMETERS):
            values[:, index] = _per_row(name, numbers[name], batch)
        alike = all(isinstance(number, (int, float)) for number in numbers.values())
        for row in range(min(batch, 1) if alike else batch):
            check_values("SamplingParams", values[row].tolist(), row, vocab)
        eos = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
        bias_rows, bias_values = _bias_rows(logit_bias, batch, vocab)
        return cls(
            values=values.to(on),
            bias_ids=_padded(bias_rows, batch, on),
            bias_values=bias_values.to(on) if bias_values is not None else None,
            banned_ids=_padded(_id_rows("banned", banned or [], batch, vocab), batch, on),
            eos_ids=_padded(_id_rows("eos_token_id", [] if eos is None else eos, batch, vocab), batch, on),
            bitmask=bitmask,
            max_logprobs=None if n_logprobs is None else int(values[:, -1].max().item()) if batch else 0,
        )

    def column(self, name: str) -> torch.Tensor:
        """One parameter's ``(batch,)`` values, a view."""
        return self.values[:, PARAMETERS.index(name)]

    @property
    def batch(self) -> int:
        return self.values.shape[0]


def _bias_rows(
    bias: Mapping[int, float] | Sequence[Mapping[int, float]] | None, batch: int, vocab: int
) -> tuple[list[list[int]], torch.Tensor | None]:
    if not bias:
        return [], None
    mappings = [bias] if isinstance(bias, Mapping) else list(bias)
    rows = _id_rows("logit_bias", [list(m) for m in mappings], len(mappings), vocab)
    if not isinstance(bias, Mapping) and len(rows) != batch:
        raise ValueError(f"SamplingParams: logit_bias has {len(rows)} mappings; one for each of {batch} rows")
    values = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.float32, device="cpu")
    for row, mapping in enumerate(mappings):
        for column, (token, value) in enumerate(mapping.items()):
            if not value < float("inf"):
                raise ValueError(
                    f"SamplingParams: logit_bias[{row}] gives token {token} {value}; finite or -inf is needed"
                )
            values[row, column] = value
    return rows, values.expand(batch, -1).contiguous() if values.shape[1] else None


def check_values(op: str, values: list[float], row: int, vocab: int, max_logprobs: int | None = None) -> None:
    """Raise for the first of one row's parameters that is outside its range."""
    if max_logprobs is not None and values[-1] > max_logprobs:
        raise ValueError(f"{op}: n_logprobs[{row}] is {values[-1]:g}; at most max_logprobs, {max_logprobs}")
    for column, value in zip(_COLUMNS, values, strict=True):
        accepted = column.range.accepts(value) and (not column.within_vocab or value <= vocab)
        if not accepted or (column.whole and value != int(value)):
            words = f"a whole number, {column.range.words}" if column.whole else column.range.words
            most = f", at most the vocabulary's {vocab}," if column.within_vocab else ""
            raise ValueError(f"{op}: {column.name}[{row}] is {value:g}; {words}{most} is needed")


def _row_numbers(name: str, value: Any, batch: int) -> list[int]:
    """The seed or request of each row, of 64 bits; tensors and NumPy's numbers are taken too."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    if plain is None:
        return list(range(batch))
    single = not isinstance(plain, Iterable) or isinstance(plain, str)
    rows: list[Any] = [plain] * batch if single else list(plain)
    for row in rows:
        try:
            number = operator.index(row)
        except TypeError:
            raise TypeError(f"SamplerState: {name} is or holds {row!r}; a whole number is needed") from None
        if not -(2**63) <= number < 2**64:
            raise ValueError(f"SamplerState: {name} is {number}; 64 bits, -2**63 to 2**64 - 1, are needed")
    return [operator.index(row) for row in rows]


@dataclass
class SamplerState:
    """The memory of the sampler from token to token. Every call advances it in place, on the device.

    Attributes:
        counters: ``(batch, 3)`` int64: seed, request, step. A draw is a function of these three alone,
            whatever else is in the batch. ``step`` counts the tokens generated.
        counts: ``(batch, vocab)`` int32: how often the row generated each token, plus ``2**30`` where
            its prompt holds it; None where no penalty is used.
        workspace: Memory for the CUDA path, made by the first call.
    """

    counters: torch.Tensor
    counts: torch.Tensor | None = None
    workspace: torch.Tensor | None = None

    @classmethod
    def make(
        cls,
        batch: int,
        vocab: int,
        *,
        seed: int | Sequence[int] | None = None,
        request: Sequence[int] | None = None,
        history: bool = False,
        device: torch.device | str = "cpu",
    ) -> SamplerState:
        """State for ``batch`` new sequences.

        Args:
            seed: One for all rows or one for each; None takes one from torch's generator.
            request: What distinguishes rows of the same seed; the row's number if None.
            history: Keep token counts, which penalties need; see :meth:`add_prompt`.
        """
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu").item())
        counters = torch.zeros(batch, len(COUNTERS), dtype=torch.int64, device="cpu")
        for index, (name, value) in enumerate((("seed", seed), ("request", request))):
            rows = _row_numbers(name, value, batch)
            if len(rows) != batch:
                raise ValueError(f"SamplerState: {name} has {len(rows)} values; one for each of {batch} rows")
            # Seeds are 64 bits, signed or not.
            wrapped = [(x + 2**63) % 2**64 - 2**63 for x in rows]
            counters[:, index] = torch.tensor(wrapped, dtype=torch.int64, device="cpu")
        counts = torch.zeros(batch, vocab, dtype=torch.int32, device=device) if history else None
        return cls(counters.to(device), counts)

    def add_prompt(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Note ``ids`` ``(batch, seq)`` as the rows' prompts, where ``mask`` (same shape) is not 0."""
        if self.counts is None:
            raise ValueError("SamplerState: add_prompt needs SamplerState.make(..., history=True)")
        batch, vocab = self.counts.shape
        if ids.dim() != 2 or ids.shape[0] != batch:
            raise ValueError(f"SamplerState: ids has shape {tuple(ids.shape)}; ({batch}, seq) is needed")
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(
                f"SamplerState: mask has shape {tuple(mask.shape)}; ids' shape {tuple(ids.shape)} is needed"
            )
        keep = (ids >= 0) & (ids < vocab)
        if mask is not None:
            keep = keep & (mask != 0)
        present = torch.zeros(batch, vocab + 1, dtype=torch.bool, device=ids.device)
        present.scatter_(1, torch.where(keep, ids, vocab).long(), True)
        self.counts |= present[:, :vocab].to(device=self.counts.device, dtype=torch.int32) * IN_PROMPT

    @property
    def steps(self) -> torch.Tensor:
        """``(batch,)`` tokens generated so far, a view."""
        return self.counters[:, 2]
