"""Copy: one copy of a request while it runs, from tokens drawn to the events that tell of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptkern.engine.lookup import Lookup
from gptkern.engine.processors import Callbacks
from gptkern.engine.prompt_logprobs import PromptLogprobs, prompt_logprobs
from gptkern.engine.request import FinishReason, TokenEvent
from gptkern.engine.sampling import RowDraw, SamplerRow
from gptkern.engine.scheduler import Row
from gptkern.engine.settings import Settings
from gptkern.engine.stop_strings import PlainText, RowText
from gptkern.model.decoder import Decoder


@dataclass(eq=False)
class Copy:
    """One copy of a request while it runs.

    Attributes:
        row: What the scheduler knows of it.
        sampler: What the sampler knows of it.
        text: Its text, which watches for stop strings; None where nobody asked for text.
        lookup: Drafts its next tokens; None where none are drafted.
        prompt_logprobs: How many of the likeliest tokens to tell at each of the prompt's; None: nothing.
        callbacks: The caller's own.
    """

    row: Row
    settings: Settings
    sampler: SamplerRow
    text: RowText | PlainText | None
    lookup: Lookup | None
    prompt_logprobs: int | None = None
    callbacks: Callbacks = Callbacks()  # noqa: RUF009  (frozen)

    def take(self, draw: RowDraw, drafted: int, model: Decoder) -> list[TokenEvent]:
        """Take what was drawn; an event for each token, and one more where it fails.

        Args:
            drafted: Tokens that were drafted for the pass.
            model: For log-probabilities of the prompt.
        """
        events: list[TokenEvent] = []
        accepted = len(draw.tokens) - 1 if drafted else 0
        of_prompt: PromptLogprobs | None = None
        try:
            if self.prompt_logprobs is not None and not self.row.generated:
                of_prompt = prompt_logprobs(model, self.row.prompt, self.prompt_logprobs, self.row.steering)
            for place, token in enumerate(draw.tokens):
                reason = self._push(token)
                events.append(
                    TokenEvent(
                        self.row.request,
                        self.row.copy,
                        token,
                        None if draw.logprobs is None else draw.logprobs[place],
                        () if draw.top_logprobs is None else tuple(draw.top_logprobs[place]),
                        of_prompt if place == 0 else None,
                        reason,
                        drafted=drafted if place == 0 else 0,
                        accepted=accepted if place == 0 else 0,
                        text=self._fresh(reason is not None),
                    )
                )
                if reason is not None:
                    return events
            if draw.failure is not None:
                raise draw.failure
        except Exception as error:  # whatever a tokenizer raises is its request's alone
            events.append(TokenEvent(self.row.request, self.row.copy, finish_reason="error", error=error))
        return events

    def ended(self, reason: FinishReason, error: BaseException | None = None) -> TokenEvent:
        """The event of an end without one more token."""
        text = ""
        try:
            text = self._fresh(end=True)
        except Exception as failure:
            reason, error = "error", failure
        return TokenEvent(self.row.request, self.row.copy, finish_reason=reason, error=error, text=text)

    def _push(self, token: int) -> FinishReason | None:
        """Take the next token; why the copy ends with it, None where it goes on."""
        self.row.generated.append(token)
        self.sampler.push(token)
        if self.lookup is not None:
            self.lookup.push(token)
        ended = token in self.settings.eos
        if self.text is not None:
            self.text.push(token, hidden=ended)
            ended |= self.text.stopped
        if self.sampler.constraint is not None:
            ended |= self.sampler.constraint.complete
        if self.callbacks.criteria:
            ended |= self.callbacks.end([*self.row.prompt, *self.row.generated])
        if ended:
            return "stop"
        return "length" if len(self.row.generated) >= self.settings.max_new else None

    def _fresh(self, end: bool) -> str:
        """The text that has become final; all of it at the end."""
        if self.text is None:
            return ""
        if end:
            self.text.end()
        return self.text.fresh()


def draft_tokens(copies: Sequence[Copy], most: int) -> None:
    """Draft tokens of copies for a pass of at most ``most`` tokens; those that have some share its room."""
    # Rows that compute their tokens anew draft none.
    ready = [c for c in copies if c.row.generated and c.row.computed + 1 == c.row.total]
    drafts: dict[Copy, list[int]] = {}
    for copy in ready:
        room = copy.row.max_new - len(copy.row.generated) - 1
        if copy.lookup is not None:
            drafts[copy] = copy.lookup.draft(min(copy.settings.speculate, room))
    wanted = sum(map(bool, drafts.values()))
    share = max((most - len(ready)) // wanted, 0) if wanted else 0
    for copy, draft in drafts.items():
        copy.row.draft = draft[:share]
