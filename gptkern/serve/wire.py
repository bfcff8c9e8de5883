"""The wire: uvicorn's HTTP on a socket, with bounds on the head of a request, where uvicorn has none."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gptkern.serve.errors import ApiProblem, json_bytes
from gptkern.serve.guard import HEAD_BYTES, head_too_long, new_id

# From the first byte, or from the connection, to the empty line.
HEAD_SECONDS = 30.0


class BoundedProtocol(HttpToolsProtocol):
    """One connection. A head that is too long, too slow or malformed ends it, with an error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head, self._head_bytes = False, 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._refuse(head_too_long())

    def on_message_begin(self) -> None:
        """Begin a request, the first or a further one."""
        super().on_message_begin()
        self._begin_head()

    def on_headers_complete(self) -> None:
        """End a request's head: what follows is its body, which ``Guard`` bounds."""
        self._end_head()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(ApiProblem(400, "the request is no HTTP/1.1 request", code="invalid_http"))

    def _begin_head(self) -> None:
        if not self._in_head:
            self._in_head, self._head_bytes = True, 0
            self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _end_head(self) -> None:
        self._in_head = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        if self._head_bytes:
            message = f"the request's head did not end within {HEAD_SECONDS:g} s"
            self._refuse(ApiProblem(408, message, code="request_timeout"))
        else:
            self.transport.close()

    def _refuse(self, problem: ApiProblem) -> None:
        """End the connection, with an error unless an answer has begun."""
        self._end_head()
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            content = json_bytes(problem.body(new_id()))
            lines = (
                f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}",
                "Content-Type: application/json",
                f"Content-Length: {len(content)}",
                "Connection: close",
            )
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + content)
        self.transport.close()
