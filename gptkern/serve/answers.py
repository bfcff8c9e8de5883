"""One continuation as it grows: its text, its tokens with their log-probabilities, why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from gptkern.engine.prompt_logprobs import PromptLogprobs
from gptkern.engine.request import FinishReason, TokenEvent
from gptkern.serve.errors import ApiProblem
from gptkern.tokenizer import Tokenizer

# The reasons under OpenAI's names. A deadline, and the end of a drain, are vLLM's "abort".
_REASONS: dict[FinishReason, str] = {
    "stop": "stop",
    "length": "length",
    "cancelled": "abort",
    "deadline": "abort",
}


# The tables of a prompt's tokens, by token id; None for the first token.
PromptTables = list[dict[str, Any] | None]
# JSON has no infinity; this is what OpenAI writes in its place.
_LEAST = -9999.0


class TokenEntry(NamedTuple):
    """A token with its log-probability, None for a prompt's first; and where its text begins.

    Attributes:
        likeliest: The likeliest tokens in its place, best first, with theirs.
        offset: Characters of the answer before it.
    """

    token: int
    logprob: float | None
    likeliest: tuple[tuple[int, float], ...]
    offset: int


class Delta(NamedTuple):
    """The new part of an answer since the last one."""

    text: str
    entries: list[TokenEntry]
    finish_reason: str | None


class Answer:
    """One copy of one prompt's continuation.

    Args:
        index: Its place among the choices.
        prompt: The prompt's tokens.
        echo: The prompt's text, with which the answer begins; None: it does not.
        hidden: No token of it is shown: only the prompt was asked for.

    Attributes:
        count: New tokens so far.
        finish_reason: Why it ended, as OpenAI says it; None while it goes on.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        echo: str | None = None,
        logprobs: bool = False,
        hidden: bool = False,
    ) -> None:
        self.index, self.count = index, 0
        self.finish_reason: str | None = None
        self.prompt_logprobs: PromptLogprobs | None = None
        self._prompt, self._hidden = prompt, hidden
        self._text = ""
        # Whether the prompt's tokens, and its text, are in what was given out.
        self._echo, self._has_echo_entries, self._has_echo_text = echo, echo is None, echo is None
        self._offsets = tokenizer.stream(skip_special_tokens=True) if logprobs else None
        self._length = 0
        self._entries: list[TokenEntry] = []

    def take(self, event: TokenEvent) -> None:
        """Take the next event.

        Raises:
            ApiProblem: The event is an error.
        """
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        if self._offsets is not None and not self._has_echo_entries:
            self._has_echo_entries = True
            self._echo_entries()
        if event.token is not None and not self._hidden:
            self.count += 1
            if self._offsets is not None:
                self._add(event.token, event.logprob, event.top_logprobs)
        if not self._hidden:
            self._text += event.text
        if event.finish_reason == "error":
            status = 500 if _is_fault(event.error) else 400
            raise ApiProblem(status, f"the request failed: {event.error}", code="request_failed")
        if event.finish_reason is not None:
            self.finish_reason = "length" if self._hidden else _REASONS[event.finish_reason]

    def _echo_entries(self) -> None:
        found = [(None, ()), *(self.prompt_logprobs or ())]
        for token, (logprob, likeliest) in zip(self._prompt, found, strict=True):
            self._add(token, logprob, likeliest)

    def _add(self, token: int, logprob: float | None, likeliest: Sequence[tuple[int, float]]) -> None:
        assert self._offsets is not None
        pairs = tuple((one, max(value, _LEAST)) for one, value in likeliest)
        own = None if logprob is None else max(logprob, _LEAST)
        self._entries.append(TokenEntry(token, own, pairs, self._length))
        self._length += len(self._offsets.push(token))

    def delta(self) -> Delta:
        """The part since the last call."""
        text, self._text = self._text, ""
        if not self._has_echo_text:
            self._has_echo_text = True
            text = (self._echo or "") + text
        entries, self._entries = self._entries, []
        return Delta(text, entries, self.finish_reason)


def _is_fault(error: BaseException | None) -> bool:
    """True if an error is not the request's own: a constraint or a value that nothing satisfies is."""
    return not isinstance(error, ValueError)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as a text; one of part of a character as "bytes:" and its bytes, as OpenAI writes it."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def completion_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenEntry]) -> dict[str, Any]:
    """Tokens with their log-probabilities, in the form of completions."""
    return {
        "tokens": [token_text(tokenizer, entry.token) for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [
            None
            if entry.logprob is None
            else {token_text(tokenizer, token): logprob for token, logprob in entry.likeliest}
            for entry in entries
        ],
        "text_offset": [entry.offset for entry in entries],
    }


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenEntry]) -> dict[str, Any]:
    """Tokens with their log-probabilities, in the form of chat completions."""

    def one(token: int, logprob: float | None) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": token_text(tokenizer, token), "logprob": logprob, "bytes": list(raw)}

    content = [
        one(entry.token, entry.logprob) | {"top_logprobs": [one(*likely) for likely in entry.likeliest]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs_json(
    tokenizer: Tokenizer, prompt: Sequence[int], logprobs: PromptLogprobs
) -> PromptTables:
    """A prompt's log-probabilities, in vLLM's form: None for the first token, then a table by token id."""
    tables: PromptTables = [None]
    for token, (logprob, likeliest) in zip(prompt[1:], logprobs, strict=True):
        table = {one: max(value, _LEAST) for one, value in ((token, logprob), *likeliest)}
        tables.append(
            {
                str(one): {"logprob": value, "decoded_token": token_text(tokenizer, one)}
                for one, value in table.items()
            }
        )
    return tables
