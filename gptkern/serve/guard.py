"""Guard: what every request meets first: its id, its key, the size of its body; and a line of the log."""

from __future__ import annotations

import hmac
import json
import logging
import re
import secrets
import sys
import time
import traceback
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptkern.serve.admission import RETRY_AFTER
from gptkern.serve.errors import ApiProblem, ClientGone, bad_field
from gptkern.serve.service import Service

_LOGGER = logging.getLogger("uvicorn.error")
REQUEST_ID = "x-request-id"
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# These need no key: they tell nothing of what is asked, and load balancers and browsers ask for them.
OPEN = frozenset(
    {"/", "/health", "/metrics", "/version", "/playground.css", "/playground.js", "/openapi.json"}
)
# Answered to the end of a drain.
ALWAYS = OPEN


class Guard:
    """ASGI middleware around the application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service, self._settings = app, service, service.settings
        self._keys = [key.encode() for key in service.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        scope.setdefault("state", {})
        request_id, wrong_id = _request_id(Headers(scope=scope))
        scope["state"] |= {"request_id": request_id, "usage": None}
        status = 499

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            if wrong_id is not None:
                raise wrong_id
            self._check(scope)
            body = await self._body(Headers(scope=scope), receive)
            await self._app(scope, _replayed(body, receive), sending)
        except ApiProblem as error:
            await error.response(request_id)(scope, receive, sending)
        except ClientGone:
            pass
        except Exception as error:
            # Whatever it is, it is told by its kind: its words may hold what was asked.
            _LOGGER.error("%s: %s", request_id, "".join(traceback.format_tb(error.__traceback__)))
            if status != 499:
                raise
            fault = ApiProblem(500, f"a fault of the server: {type(error).__name__}")
            await fault.response(request_id)(scope, receive, sending)
        finally:
            if status >= 400:
                self._service.metrics.refused(status)
            if self._settings.access_log:
                _log(scope, status, time.monotonic() - began)

    def _check(self, scope: Scope) -> None:
        """Refuse whoever has no key, and whoever comes when the server is about to end."""
        path = scope["path"]
        if self._keys and path not in OPEN and scope["method"] != "OPTIONS":
            self._check_key(Headers(scope=scope).get("authorization", ""))
        if self._service.draining and path not in ALWAYS:
            raise ApiProblem(503, "the server is about to end", code="draining", headers=RETRY_AFTER)

    def _check_key(self, header: str) -> None:
        scheme, _, key = header.partition(" ")
        given = key.strip().encode()
        # All of them are compared, so that the time tells nothing.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiProblem(
                401,
                "an API key is needed, as the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body.

        Raises:
            ApiProblem: It is longer than is accepted; no more of it is read.
            ClientGone: The client went away.
        """
        limit = self._settings.body_bytes
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > limit:
            raise _too_long(limit)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise _too_long(limit)
            if not message.get("more_body", False):
                return b"".join(parts)


def _request_id(headers: Headers) -> tuple[str, ApiProblem | None]:
    """The request's id: the client's own, or a new one; with an error where the client's is none."""
    given = headers.get(REQUEST_ID)
    new = f"req-{secrets.token_hex(12)}"
    if given is None:
        return new, None
    if not _ID.fullmatch(given):
        accepted = "1 to 128 letters, digits and characters of ._:- are accepted"
        return new, bad_field(REQUEST_ID, given, accepted)
    return given, None


def _too_long(limit: int) -> ApiProblem:
    # The rest of the body is not read: the connection is of no further use.
    return ApiProblem(
        413,
        f"the body is longer than {limit} bytes, which is the most that is accepted",
        code="body_too_long",
        headers={"Connection": "close"},
    )


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body first, then what comes."""
    parts: list[bytes] = [body]

    async def replay() -> Message:
        if parts:
            return {"type": "http.request", "body": parts.pop(), "more_body": False}
        return await receive()

    return replay


def _log(scope: Scope, status: int, seconds: float) -> None:
    """One line: no query, no header but the id, nothing of the body."""
    client: Sequence[object] = scope.get("client") or ("",)
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "request_id": scope["state"]["request_id"],
        "client": client[0],
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "seconds": round(seconds, 4),
        **(scope["state"]["usage"] or {}),
    }
    print(json.dumps(line), file=sys.stderr, flush=True)
