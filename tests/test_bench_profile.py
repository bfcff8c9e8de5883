"""``gptkern profile``: where a token's time goes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import gptkern.cli
from gptkern.bench.profile import PROFILED, REST, launches, profile
from gptkern.config import GPTConfig
from gptkern.gpt import GPT
from gptkern.tokenizer import Tokenizer

CONFIG = GPTConfig(vocab_size=256, n_positions=64, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="module")
def model() -> GPT:
    return GPT(CONFIG).eval()


def test_a_tokens_launches_are_five_a_layer_between_embeddings_and_head(model: GPT) -> None:
    assert launches(model) == {
        "decode_embed_kernel": 1,
        "decode_linear_kernel": 2 * 4 + 1,
        "decode_attention_kernel": 2,
    }


def test_bytes_times_and_operators(model: GPT, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    found = profile(model, list(range(10)), 4, trace)
    # Two layers of 12 x 32^2 weights, the tied head, keys and values of 10 + 3 + 2 tokens: 4 bytes each.
    assert found.bytes_moved == 4 * (2 * 12 * 32**2 + 256 * 32 + 2 * 2 * 32 * 15)
    assert found.floor == found.bytes_moved / found.copy
    assert found.context == 13 and found.tokens == 4
    assert found.per_token > 0 and found.prefill > 0
    times = [operator.seconds for operator in found.operators]
    assert times == sorted(times, reverse=True) and times[-1] > 0
    # What is no operator's is there, too: the shares are of the token and not of a small part of it.
    assert REST in {operator.name for operator in found.operators}
    # One choice a token.
    assert next(o.calls for o in found.operators if o.name == "aten::argmax") == 1
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::argmax" for event in events) == PROFILED


def test_what_does_not_fit_is_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match=r"profile: 40 tokens of prompt, 20 measured and 11 more do not fit"):
        profile(model, [0] * 40, 20)


def test_the_command_prints_and_writes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    model.tokenizer = Tokenizer.bytes()
    model.save_pretrained(tmp_path / "model")
    arguments = ["-m", str(tmp_path / "model"), "-n", "3", "--device", "cpu"]
    assert gptkern.cli.run(["profile", "To be", *arguments, "--rows", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["prompt", "token", "bytes", "floor", "launches"]
    assert lines[4].startswith("launches   12 by the kernels on a GPU: 1 decode_embed_kernel")
    assert len(lines) == 10
    assert lines[9].endswith("others")
    shares = [int(re.search(r"(\d+)%", line)[1]) for line in lines[7:]]
    assert abs(sum(shares) - 100) <= 2
    assert gptkern.cli.run(["profile", "To be", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 3
    assert gptkern.cli.run(["profile", "", *arguments]) == 2
    assert "the prompt is empty" in capsys.readouterr().err
