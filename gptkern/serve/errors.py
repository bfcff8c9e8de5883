"""Errors as OpenAI's interface has them: a status, a type, a message, and the field that is at fault."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
_LONGEST_SHOWN = 80
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


class ApiProblem(Exception):
    """An answer that is an error.

    Attributes:
        status: The HTTP status.
        message: A sentence for whoever asked.
        param: The field at fault; None where it is none.
        code: A word for programs.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self, request_id: str) -> dict[str, Any]:
        """The error as JSON has it."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
                "request_id": request_id,
            }
        }

    def response(self, request_id: str) -> Response:
        """The answer."""
        return json_response(self.body(request_id), self.status, self.headers)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def bad_field(param: str, value: Any, accepted: str, *, code: str | None = None) -> ApiProblem:
    """The error of one field: its name, the value that came, and what is accepted."""
    return ApiProblem(400, f"{param} is {shown(value)}; {accepted}", param=param, code=code)


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    if isinstance(value, list | dict) and len(value) > _LONGEST_SHOWN:
        return f"a {type(value).__name__} of {len(value)} entries"
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
    return repr(text) if isinstance(value, str) else text


def json_bytes(value: Any) -> bytes:
    """JSON in ASCII: text may hold half of a surrogate pair, which no other encoding can express."""
    return _ENCODER.encode(value).encode()


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer of JSON."""
    return Response(json_bytes(value), status, headers, media_type="application/json")
