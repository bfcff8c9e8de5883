"""A check for schemathesis: what the document allows is served, unless no JSON schema could have said it."""

from __future__ import annotations

from typing import Any

import schemathesis

# Refusals that depend on how a text falls into tokens, on a grammar's own syntax, or on sums of fields.
BEYOND_A_SCHEMA = {
    "conflicting_fields",
    "context_length_exceeded",
    "grammar_too_complex",
    "invalid_grammar",
    "request_failed",
    "request_too_large",
}


@schemathesis.check
def valid_data_is_accepted(ctx: Any, response: Any, case: Any) -> None:
    """Fail where a body that follows the document is refused, by whatever code a schema could have said."""
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code != 400:
        return
    error = response.json()["error"]
    assert error["code"] in BEYOND_A_SCHEMA, error
