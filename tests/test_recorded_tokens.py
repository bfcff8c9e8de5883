"""``generate`` gives for a seed what it gave when ``recorded_tokens`` was last run."""

from __future__ import annotations

import json

import pytest
import recorded_tokens

import gptkern
from gptkern import GPT
from gptkern.ops import _dispatch

RECORDED = json.loads(recorded_tokens.FILE.read_text())


@pytest.mark.parametrize("name", RECORDED)
def test_a_seed_gives_the_tokens_that_it_gave(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    model = GPT.from_pretrained() if name == "embedded" else recorded_tokens.random_model(int(name))
    with gptkern.backend("auto"):
        for call in RECORDED[name]:
            assert recorded_tokens.run(model, call["prompts"], call["options"]) == call["tokens"], call
