"""Requests: what they hold, and what they refuse by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gptkern.engine.request import Request


@pytest.mark.parametrize("prompt", [[1, 2], (1, 2), torch.tensor([1, 2]), np.array([1, 2])])
def test_a_prompt_is_token_ids_of_any_kind(prompt: Any) -> None:
    assert Request(prompt=prompt).prompt == (1, 2)


def test_options_are_the_requests_own() -> None:
    options = {"max_new_tokens": 3}
    request = Request(prompt=[1], options=options)
    options["max_new_tokens"] = 4
    assert request.options == {"max_new_tokens": 3}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"prompt": "text"}, TypeError, "prompt is str; a sequence of token ids"),
        ({"prompt": 3}, TypeError, "prompt is int"),
        ({"prompt": []}, ValueError, "prompt is empty"),
        ({"prompt": [1, True]}, TypeError, "prompt holds True"),
        ({"prompt": [1.0]}, TypeError, "prompt holds 1.0"),
        ({"prompt": [[1, 2]]}, TypeError, "prompt holds"),
        ({"prompt": [1, -1]}, ValueError, "prompt holds -1; token ids from 0 on"),
        ({"options": [1]}, TypeError, "options is list; a mapping"),
        ({"options": {"max_new_token": 3}}, TypeError, "'max_new_token' is no option; did you mean"),
        ({"options": {"top_p": 2.0}}, ValueError, "Request: top_p is 2.0"),
        ({"options": {"num_beams": 0}}, ValueError, "num_beams is 0"),
        ({"priority": 1.5}, TypeError, "priority is 1.5; a whole number"),
        ({"priority": True}, TypeError, "priority is True"),
        ({"deadline": 0}, ValueError, "deadline is 0; a finite number of seconds above 0"),
        ({"deadline": float("nan")}, ValueError, "deadline is nan"),
        ({"deadline": "1s"}, TypeError, "deadline is '1s'"),
        ({"logprobs": -1}, ValueError, "logprobs is -1; 0 or more"),
        ({"logprobs": True}, TypeError, "logprobs is True"),
        ({"prompt_logprobs": 1.0}, TypeError, "prompt_logprobs is 1.0"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Request(**{"prompt": [1], **fields})
