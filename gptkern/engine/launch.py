"""A pass under way: what the scheduler chose, run by the executors; whose next tokens it brings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from gptkern.engine.executors.base import Executor
from gptkern.engine.executors.prompt import PromptExecutor
from gptkern.engine.rows import Rows
from gptkern.engine.scheduler import Part, Row, Scheduler

Ahead = tuple[Sequence[Row], torch.Tensor]


@dataclass(frozen=True)
class Launch:
    """The logits of a pass, perhaps still being computed.

    Attributes:
        rows: Rows whose next token is to be drawn.
        logits: ``(positions, vocab_size)``: after each row's last token and after each of its drafts.
        drafts: The drafted tokens of each row.
        parts: Of rows with a draft the part that verifies it: how much of it is computed is known once the
            draws are. None for any other.
        expired: Rows that ended because their deadline had passed.
        one_each: The pass was of one token of each of ``rows`` and of nothing else.
    """

    rows: list[Row]
    logits: torch.Tensor
    drafts: list[list[int]]
    parts: list[Part | None]
    expired: list[Row] = field(default_factory=list)
    one_each: bool = False

    def where(self, wanted: Callable[[Row], bool]) -> Launch:
        """This launch with those rows alone that are wanted."""
        stay = [place for place, row in enumerate(self.rows) if wanted(row)]
        if len(stay) == len(self.rows):
            return self
        ends = [0]
        for draft in self.drafts:
            ends.append(ends[-1] + len(draft) + 1)
        positions = [position for place in stay for position in range(ends[place], ends[place + 1])]
        return replace(
            self,
            rows=[self.rows[place] for place in stay],
            logits=self.logits[positions],
            drafts=[self.drafts[place] for place in stay],
            parts=[self.parts[place] for place in stay],
        )


class Launcher:
    """Runs what the scheduler chooses."""

    def __init__(self, device: torch.device, scheduler: Scheduler) -> None:
        self._device, self._scheduler = device, scheduler

    def launch(
        self, now: float, decode: Executor, prefill: Executor | PromptExecutor, ahead: Ahead | None
    ) -> Launch:
        """Begin the next pass.

        Args:
            now: The engine's clock.
            decode, prefill: Run rows that have their prompt behind them, and prompts.
            ahead: Rows whose last token is on the device alone, and these tokens.
        """
        chosen = self._scheduler.plan(now)
        if prefill is decode:
            logits = [decode.forward(self._rows(chosen.parts, ahead))] if chosen.parts else []
            return self._launched(chosen.parts, logits, chosen.expired)
        decodes = [part for part in chosen.parts if part.start >= len(part.row.prompt)]
        prefills = [part for part in chosen.parts if part.start < len(part.row.prompt)]
        logits = []
        if decodes:
            logits.append(decode.forward(self._rows(decodes, ahead)))
        if prefills:
            logits.append(prefill.forward(self._rows(prefills, None)))
        return self._launched(decodes + prefills, logits, chosen.expired)

    def _launched(self, parts: Sequence[Part], logits: Sequence[torch.Tensor], expired: list[Row]) -> Launch:
        rows: list[Row] = []
        drafts: list[list[int]] = []
        unsettled: list[Part | None] = []
        positions: list[int] = []
        end = 0
        for part in parts:
            draft, owners = part.row.draft if part.samples else [], [part.row]
            if not draft:
                owners = self._scheduler.computed(part)
            if not part.samples:
                continue
            for row in owners:
                positions += range(end, end + len(draft) + 1)
                rows.append(row)
                drafts.append(draft)
                unsettled.append(part if draft else None)
            end += len(draft) + 1
        if not positions:
            return Launch([], torch.empty(0), [], [], expired)
        joined = logits[0] if len(logits) == 1 else torch.cat(list(logits))
        if positions != list(range(end)):
            joined = joined[positions]
        one_each = len(rows) == len(parts) and all(p.count == 1 and not p.prefill for p in parts)
        return Launch(rows, joined, drafts, unsettled, expired, one_each)

    def _rows(self, parts: Sequence[Part], ahead: Ahead | None) -> Rows:
        sequences = [part.row.sequence for part in parts if part.row.sequence is not None]
        counts = [part.count for part in parts]
        wanted = [len(part.row.draft) + 1 if part.samples else 0 for part in parts]
        steering = [part.row.steering for part in parts] if any(p.row.steering for p in parts) else []
        if ahead is None:
            tokens = [token for part in parts for token in part.row.tokens(part.start, part.count)]
            return Rows(sequences, counts, torch.tensor(tokens, device=self._device), wanted, steering)
        return Rows(sequences, counts, self._tokens_ahead(parts, ahead), wanted, steering)

    def _tokens_ahead(self, parts: Sequence[Part], ahead: Ahead) -> torch.Tensor:
        """The parts' tokens, where some are on the device alone."""
        rows, drawn = ahead
        source = {row: place for place, row in enumerate(rows)}
        if [part.row for part in parts] == list(rows):
            return drawn
        tokens: list[int] = []
        places: list[tuple[int, int]] = []
        for part in parts:
            if part.row.ahead:
                places.append((len(tokens), source[part.row]))
                tokens.append(0)
            else:
                tokens += part.row.tokens(part.start, part.count)
        flat = torch.tensor(tokens, device=self._device)
        if places:
            to, taken = torch.tensor(places, device=self._device).unbind(1)
            flat[to] = drawn[taken]
        return flat
