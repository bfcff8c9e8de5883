"""The OpenAPI document: what a server answers, and every limit of a body that a JSON schema can say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

from gptkern.serve.protocol import MOST_COPIES, MOST_PROMPTS, TOKEN_FORMAT
from gptkern.serve.service import Service

_STATUSES = {
    400: "The request is wrong: the error names the field.",
    401: "An API key is needed.",
    404: "There is no such model.",
    413: "The body is too long.",
    429: "The server is busy: ask again after Retry-After.",
    500: "A fault of the server.",
    503: "The server is about to end, or not ready.",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code", "request_id"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
                "request_id": {"type": "string"},
            },
        }
    },
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
    for status, text in _STATUSES.items()
}


class DocumentedApp(FastAPI):
    """FastAPI, whose document says what this server answers, and with this model's limits.

    ``state.service`` is the server's.
    """

    def openapi(self) -> dict[str, Any]:
        """The document."""
        if self.openapi_schema is not None:
            return dict(self.openapi_schema)
        document: dict[str, Any] = super().openapi()
        _say_statuses(document)
        _say_limits(document["components"]["schemas"], self.state.service)
        return document


def _say_statuses(document: dict[str, Any]) -> None:
    """Take out what FastAPI says of itself: bodies are refused by 400, not by 422."""
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _say_limits(schemas: dict[str, Any], service: Service) -> None:
    settings, spec = service.settings, service.model.spec
    for name in ("CompletionRequest", "ChatRequest"):
        fields = schemas[name]["properties"]
        fields["model"]["enum"] = [settings.model_name]
        most = min(MOST_COPIES, service.inner.cache.max_seqs, settings.most_rows)
        _number(fields["n"])["maximum"] = most
        # FastAPI's bounds are doubles: 2**63 is written 9.223372036854776e+18, which readers take for more.
        seed = _number(fields["seed"])
        del seed["exclusiveMaximum"]
        seed |= {"minimum": -(2**63), "maximum": 2**63 - 1}
        for limit in ("max_tokens", "max_completion_tokens", "min_tokens"):
            if limit in fields:
                number = _number(fields[limit])
                number.pop("exclusiveMaximum")
                number["maximum"] = spec.context - 1
        keys = {"type": "string", "pattern": f"^({_pattern_below(spec.vocab_size)})$"}
        fields["logit_bias"]["anyOf"][0]["propertyNames"] = keys
        fields["steering"]["anyOf"][0]["propertyNames"] = {"enum": service.steering.names}
    for form in schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]:
        if form.get("maxItems") == MOST_PROMPTS:
            form["maxItems"] = min(MOST_PROMPTS, settings.most_rows)
        if form["type"] == "string" and service.opening is None:
            form["minLength"] = 1
    for token in _tokens(schemas):
        del token["exclusiveMaximum"]
        token["maximum"] = spec.vocab_size - 1


def _number(field: dict[str, Any]) -> dict[str, Any]:
    """A number's own schema, beside which null stands."""
    found: dict[str, Any] = next(form for form in field["anyOf"] if form["type"] == "integer")
    return found


def _tokens(schema: Any) -> Iterator[dict[str, Any]]:
    """The places at which schemas speak of a token's id."""
    if isinstance(schema, list):
        for part in schema:
            yield from _tokens(part)
    elif isinstance(schema, dict):
        if schema.get("format") == TOKEN_FORMAT:
            yield schema
        for part in schema.values():
            yield from _tokens(part)


def _pattern_below(bound: int) -> str:
    """A regular expression of the whole numbers from 0 to below ``bound``."""
    last = str(bound - 1)
    forms = ["0"] if bound == 1 else ["0", *(f"[1-9][0-9]{{{size}}}" for size in range(len(last) - 1))]
    for place, digit in enumerate(last):
        least = 1 if place == 0 else 0
        if int(digit) > least:
            rest = len(last) - place - 1
            forms.append(f"{last[:place]}[{least}-{int(digit) - 1}][0-9]{{{rest}}}")
    return "|".join([*forms, last])
