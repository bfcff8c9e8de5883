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
from typing import Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptkern.serve.admission import RETRY_AFTER
from gptkern.serve.errors import ApiProblem, ClientGone, bad_field
from gptkern.serve.settings import ServeSettings
from gptkern.serve.uploads import Uploads

_LOGGER = logging.getLogger("uvicorn.error")
REQUEST_ID = "x-request-id"
# Bytes of the request line and the headers: keys, ids and the cookies of proxies have room.
HEAD_BYTES = 1 << 16
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# These need no key: they tell nothing of what is asked, and load balancers and browsers ask for them.
OPEN = frozenset(
    {"/", "/health", "/metrics", "/version", "/playground.css", "/playground.js", "/openapi.json"}
)
# Answered to the end of a drain.
ALWAYS = OPEN


class Gate(Protocol):
    """A server, as its guard sees it.

    Attributes:
        draining: Nothing more is taken.
    """

    draining: bool

    def refused(self, status: int) -> None:
        """Take note of a request that was not served."""


class Guard:
    """ASGI middleware around an application."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, gate: Gate) -> None:
        self._app, self._gate, self._settings = app, gate, settings
        self._keys = [key.encode() for key in settings.api_keys]
        self._uploads = Uploads(settings.body_bytes)

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
        upload = self._uploads.open()

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
            body = await upload.read(Headers(scope=scope), receive)
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
            upload.close()
            if status >= 400:
                self._gate.refused(status)
            if self._settings.access_log:
                _log(scope, status, time.monotonic() - began)

    def _check(self, scope: Scope) -> None:
        """Refuse whoever has no key or a long head, and whoever comes when the server is about to end."""
        path = scope["path"]
        if _head_bytes(scope) > HEAD_BYTES:
            raise head_too_long()
        if self._keys and path not in OPEN and scope["method"] != "OPTIONS":
            self._check_key(Headers(scope=scope).get("authorization", ""))
        if self._gate.draining and path not in ALWAYS:
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


def guarded(app: ASGIApp, settings: ServeSettings, gate: Gate) -> ASGIApp:
    """An application behind its guard, and behind what browsers ask about origins."""
    inner: ASGIApp = Guard(app, settings, gate)
    if not settings.cors_origins:
        return inner
    return CORSMiddleware(
        inner,
        allow_origins=list(settings.cors_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", REQUEST_ID],
        expose_headers=[REQUEST_ID, "retry-after"],
    )


def new_id() -> str:
    """The id of a request that brings none."""
    return f"req-{secrets.token_hex(12)}"


def _request_id(headers: Headers) -> tuple[str, ApiProblem | None]:
    """The request's id: the client's own, or a new one; with an error where the client's is none."""
    given = headers.get(REQUEST_ID)
    if given is None:
        return new_id(), None
    if not _ID.fullmatch(given):
        accepted = "1 to 128 letters, digits and characters of ._:- are accepted"
        return new_id(), bad_field(REQUEST_ID, given, accepted)
    return given, None


def head_too_long() -> ApiProblem:
    """The error of a request whose head is too long."""
    message = f"the request line and the headers are longer than {HEAD_BYTES} bytes together"
    return ApiProblem(431, message, code="headers_too_long", headers={"Connection": "close"})


def _head_bytes(scope: Scope) -> int:
    line = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    return line + sum(len(name) + len(value) + 4 for name, value in scope["headers"])


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
