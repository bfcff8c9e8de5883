"""Work for a client that may go away: it ends at once with the connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from gptkern.serve.errors import ClientGone

T = TypeVar("T")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``.

    Args:
        receive: The connection's, whose body has been read.

    Raises:
        ClientGone: The client went away; the work was cancelled and has ended.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer of server-sent events, as they come.

    Args:
        opening: Bytes that are sent at once.
        events: The bytes of one event or of several; it is closed when nobody reads on.
        end: Called at the end, whatever happens; it may have been called before.
    """

    media_type = "text/event-stream"

    def __init__(self, opening: bytes, events: AsyncIterator[bytes], end: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._opening, self._events, self._end = opening, events, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        try:
            await while_connected(receive, self._send_all(send))
        finally:
            self._end()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await send(_part(self._opening))
            async for events in self._events:
                # It returns when the client has taken enough of what came before: a slow reader waits here.
                await send(_part(events))
            await send(_part(b"", more=False))
        finally:
            await self._events.aclose()  # type: ignore[attr-defined]


def _part(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}
