"""Uploads: the bodies of requests, bounded each and all together, in bytes and in time."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import Receive

from gptkern.serve.admission import RETRY_AFTER
from gptkern.serve.errors import ApiProblem, ClientGone

# So many of the longest bodies may be in memory at once.
_TOGETHER = 32
# So many times its limit is read, and thrown away, of a body that is too long: who still sends hears nothing.
_THROWN_AWAY = 4
BODY_SECONDS = 120.0


class Uploads:
    """The bodies of all requests that are being served.

    Args:
        most: Bytes of one body.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.size = 0

    def open(self) -> Upload:
        """The body of one more request."""
        return Upload(self)


class Upload:
    """The body of one request; it counts until it is closed."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads, self._size = uploads, 0

    async def read(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body.

        Raises:
            ApiProblem: It is too long or too slow, or there are too many.
            ClientGone: The client went away.
        """
        try:
            async with asyncio.timeout(BODY_SECONDS):
                return await self._read(headers, receive)
        except TimeoutError:
            message = f"the body did not end within {BODY_SECONDS:g} s"
            raise _last(408, message, code="request_timeout") from None

    def close(self) -> None:
        """Count no more."""
        self._uploads.size -= self._size
        self._size = 0

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        most = self._uploads.most
        length = headers.get("content-length", "0")
        declared = int(length[:20]) if length.isascii() and length.isdigit() else 0
        if declared > most and ("expect" in headers or declared > _THROWN_AWAY * most):
            raise _too_long(most)
        parts: list[bytes] = []
        more = True
        while more and self._size <= most:
            part, more = await _next(receive)
            self._take(len(part))
            parts.append(part)
        if self._size <= most:
            return b"".join(parts)
        thrown = 0
        while more and thrown < _THROWN_AWAY * most:
            part, more = await _next(receive)
            thrown += len(part)
        raise _too_long(most)

    def _take(self, size: int) -> None:
        self._size += size
        self._uploads.size += size
        if self._uploads.size > _TOGETHER * self._uploads.most:
            raise _last(429, "the server is busy: it holds too many long bodies", code="server_busy")


async def _next(receive: Receive) -> tuple[bytes, bool]:
    """The next part of a body, and whether more follows."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message.get("body", b""), message.get("more_body", False)


def _too_long(most: int) -> ApiProblem:
    message = f"the body is longer than {most} bytes, which is the most that is accepted"
    return _last(413, message, code="body_too_long")


def _last(status: int, message: str, *, code: str) -> ApiProblem:
    """An error before the body's end: the connection is of no further use."""
    headers = {"Connection": "close"} | (RETRY_AFTER if status == 429 else {})
    return ApiProblem(status, message, code=code, headers=headers)
