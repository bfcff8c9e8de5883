"""Bodies of requests: JSON read strictly, and the mistake of a body by its field."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from gptkern.serve.errors import ApiProblem, shown

_MOST_LEVELS = 128


class StrictRoute(APIRoute):
    """A route whose bodies are read by ``read_json``."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """FastAPI's handler, given a request that reads strictly."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            answer: Response = await handler(_StrictRequest(request.scope, request.receive))
            return answer

        return strict


class _StrictRequest(Request):
    async def json(self) -> Any:
        return read_json(await self.body())


def read_json(content: bytes) -> Any:
    """A body's value.

    Raises:
        json.JSONDecodeError: No JSON, or what not everybody reads alike: a number beyond a float's range,
            NaN, half of a surrogate pair, more levels than Python reads.
    """
    try:
        value = json.loads(content, parse_float=_finite, parse_constant=_no_number)
        if _is_deep(value):
            raise ValueError("it is nested too deeply")
        if b"\\u" in content:
            # Escapes may write half of a pair, which is in no text.
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise _wrong("it is nested too deeply") from None
    except UnicodeError:
        raise _wrong("it holds what is no Unicode text") from None
    except ValueError as error:
        raise _wrong(str(error)) from None
    return value


def _is_deep(value: Any) -> bool:
    """True if containers lie in each other beyond what every later reader stands."""
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(_MOST_LEVELS):
        parts = (one.values() if isinstance(one, dict) else one for one in level)
        level = [inner for part in parts for inner in part if type(inner) in (list, dict)]
        if not level:
            return False
    return True


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("it holds a number that is too large")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _wrong(reason: str) -> json.JSONDecodeError:
    return json.JSONDecodeError(reason, "", 0)


_KINDS = {
    type(None): "null",
    bool: "true or false",
    str: "a string",
    list: "an array",
    dict: "an object",
}


def mistake(error: RequestValidationError) -> ApiProblem:
    """The first of a body's mistakes, by its field."""
    errors = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiProblem(400, f"the body is no JSON: {first['ctx']['error']}", code="invalid_json")
    place = first["loc"][1:]
    if not place:
        kind = "the body is no JSON object; a Content-Type of application/json and an object are needed"
        return ApiProblem(400, kind, code="invalid_body")
    param = str(place[0])
    own = [error for error in errors if error["loc"][1:2] == place[:1]]
    # Where a field has several forms, the one that the value came furthest in.
    deepest = max(own, key=lambda one: (len(one["loc"]), _index(one["loc"][-1])))
    name, value = _path(deepest["loc"][1:]), deepest.get("input")
    if deepest["type"] == "extra_forbidden":
        return ApiProblem(400, f"{name} is not served; leave it out", param=param, code="unknown_field")
    if deepest["type"] == "missing":
        return ApiProblem(400, f"{name} is missing", param=param, code="missing_field")
    # A prompt is no part of a message, only its kind; but one of few words is, or what came in its place.
    hidden = param in ("prompt", "messages") and deepest["type"] != "literal_error"
    found = _KINDS.get(type(value), "a number") if hidden else shown(value)
    words = "; or: ".join(dict.fromkeys(one["msg"] for one in own if _path(one["loc"][1:]) == name))
    return ApiProblem(400, f"{name} is {found}; {words}", param=param, code="invalid_field")


def _index(part: str | int) -> int:
    return part if isinstance(part, int) else -1


def _path(place: Sequence[str | int]) -> str:
    """A field's place without the names that pydantic gives to the forms of a field."""
    return ".".join(
        str(part) for part in place if isinstance(part, int) or (part.isidentifier() and part != "str")
    )
