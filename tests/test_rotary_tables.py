"""Rotary tables are those of transformers, for every way of scaling them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptkern.config import FamilyConfig
from gptkern.model.rotary import angular_frequencies, frequencies
from gptkern.model.spec import RotarySpec

transformers = pytest.importorskip("transformers")
rope = pytest.importorskip("transformers.modeling_rope_utils")

CONTEXT, ORIGINAL, HEAD_DIM = 96, 24, 16
LONG = [1.0 + 0.5 * pair for pair in range(HEAD_DIM // 2)]
SHORT = [1.0 + 0.1 * pair for pair in range(HEAD_DIM // 2)]
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
    "yarn, untruncated": {"factor": 4.0, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, mscale": {"factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn, attention factor": {"factor": 4.0, "attention_factor": 1.25},
    "longrope": {"long_factor": LONG, "short_factor": SHORT},
    "longrope, factor": {"long_factor": LONG, "short_factor": SHORT, "factor": 8.0},
    "longrope, attention factor": {"long_factor": LONG, "short_factor": SHORT, "attention_factor": 1.5},
}


def _fields(name: str) -> dict[str, Any]:
    kind = name.partition(",")[0]
    values = {"rope_type": kind, "rope_theta": 500.0, **SCALINGS[name]}
    if kind in ("llama3", "yarn", "longrope"):
        values["original_max_position_embeddings"] = ORIGINAL
    return {
        **{"model_type": "llama", "vocab_size": 11, "hidden_size": 32, "intermediate_size": 8},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": CONTEXT},
        "rope_parameters": values,
    }


def _rotary(fields: dict[str, Any]) -> RotarySpec:
    found = FamilyConfig.from_dict(fields).spec.layers[0].rotary
    assert found is not None
    return found


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_transformers(name: str) -> None:
    fields = _fields(name)
    config = transformers.LlamaConfig(**fields)
    function = rope.ROPE_INIT_FUNCTIONS[name.partition(",")[0]]
    expected, factor = function(config, torch.device("cpu"), seq_len=CONTEXT)
    turns, found_factor = angular_frequencies(_rotary(fields), CONTEXT)
    torch.testing.assert_close(turns.float(), expected.float(), rtol=2e-6, atol=0.0)
    assert found_factor == pytest.approx(factor, rel=1e-12)
    plain = RotarySpec(HEAD_DIM, 500.0)
    scaled = name.partition(",")[0] not in ("default", "dynamic")
    assert torch.equal(turns, angular_frequencies(plain, CONTEXT)[0]) is not scaled


def test_both_spellings_are_read() -> None:
    new = _fields("llama3")
    values = dict(new.pop("rope_parameters"))
    old = {**new, "rope_theta": values.pop("rope_theta"), "rope_scaling": values}
    assert _rotary(old) == _rotary(_fields("llama3"))
    values["type"] = values.pop("rope_type")
    assert _rotary(old) == _rotary(_fields("llama3"))


def test_tables_are_right_to_the_last_place_far_from_the_beginning() -> None:
    context = 1 << 17
    cos, sin = frequencies(RotarySpec(64, 1e4), context)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (context, 32)
    position, pair = context - 1, 3
    angle = torch.tensor(position, dtype=torch.float64) * 1e4 ** (-2 * pair / 64)
    assert cos[position, pair].item() == angle.cos().float().item()
    assert sin[position, pair].item() == angle.sin().float().item()


def test_the_attention_factor_is_in_the_table() -> None:
    cos, sin = frequencies(_rotary(_fields("yarn, attention factor")), CONTEXT)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, 1.25**2))


def test_short_contexts_take_the_short_factors() -> None:
    rotary = _rotary(_fields("longrope"))
    plain, _ = angular_frequencies(RotarySpec(HEAD_DIM, 500.0), ORIGINAL)
    torch.testing.assert_close(angular_frequencies(rotary, ORIGINAL)[0], plain / torch.tensor(SHORT).double())
    torch.testing.assert_close(
        angular_frequencies(rotary, ORIGINAL + 1)[0], plain / torch.tensor(LONG).double()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_type": "proportional"}, "rope_type 'proportional'; served are default, linear"),
        ({"rope_type": "linear", "factor": None}, "of type linear has no factor"),
        ({"rope_type": "linear", "factor": -1.0}, "factor -1.0; a number above 0 is needed"),
        ({"rope_type": "linear", "factor": "4"}, "factor '4'; a number above 0 is needed"),
        (
            {"rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT[1:]},
            "short_factor .* a list of 8",
        ),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "high_freq_factor 4.0 and low_freq_factor 4.0; the first must be the larger",
        ),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": 1}, "truncate 1; true or false is needed"),
    ],
)
def test_bad_scalings_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    fields = {**_fields("linear"), "rope_parameters": {"rope_theta": 500.0, **change}}
    with pytest.raises(
        ValueError, match=f"llama: rope_parameters has {message}|llama: rope_parameters {message}"
    ):
        FamilyConfig.from_dict(fields)
