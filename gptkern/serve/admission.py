"""Admission: how much work is let in, counted and reserved in one go by the event loop."""

from __future__ import annotations

from gptkern.serve.errors import ApiProblem

# A row ends in a second or so on most machines; who comes earlier is sent away again at no cost.
RETRY_AFTER = {"Retry-After": "1"}


class Admission:
    """Counts of rows and tokens, never above their limits.

    It belongs to one event loop: between a check and its count nothing else can run.
    """

    def __init__(self, most_rows: int, most_tokens: int) -> None:
        self._most_rows, self._most_tokens = most_rows, most_tokens
        self.rows = self.tokens = 0

    def reserve(self, rows: int) -> Ticket:
        """A place for so many continuations, before anybody knows their tokens.

        Raises:
            ApiProblem: 400 where there can never be room, 429 where there is none now.
        """
        if rows > self._most_rows:
            raise ApiProblem(
                400,
                f"the request asks for {rows} continuations; at most {self._most_rows} are admitted at once",
                param="n",
                code="request_too_large",
            )
        if self.rows + rows > self._most_rows:
            raise _busy(
                f"{self.rows} of {self._most_rows} continuations are taken, {rows} more are asked for"
            )
        self.rows += rows
        return Ticket(self, rows)

    def _take(self, tokens: int) -> None:
        if tokens > self._most_tokens:
            raise ApiProblem(
                400,
                f"the request comes to {tokens} tokens; at most {self._most_tokens} are admitted at once",
                param="max_tokens",
                code="request_too_large",
            )
        if self.tokens + tokens > self._most_tokens:
            raise _busy(f"{self.tokens} of {self._most_tokens} tokens are taken, {tokens} more are asked for")
        self.tokens += tokens


class Ticket:
    """The share that one request has of an ``Admission`` until it is closed."""

    def __init__(self, admission: Admission, rows: int) -> None:
        self._admission, self._rows, self._tokens = admission, rows, 0

    def take(self, tokens: int) -> None:
        """Reserve tokens too.

        Raises:
            ApiProblem: As ``Admission.reserve``.
        """
        self._admission._take(tokens)
        self._tokens += tokens

    def close(self) -> None:
        """Give everything back; once is enough."""
        self._admission.rows -= self._rows
        self._admission.tokens -= self._tokens
        self._rows = self._tokens = 0


def _busy(reason: str) -> ApiProblem:
    return ApiProblem(429, f"the server is busy: {reason}", code="server_busy", headers=RETRY_AFTER)
