"""The decode kernels run every family's program: against the decoder's modules, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CONFIGS
from family_models import library_model, our_model

from gptkern import GPT, backend
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.graph import GraphExecutor
from gptkern.engine.executors.persistent import PersistentExecutor

TOKENS = [1, 2, 3, 4, 5, 6, 7, 8]
# One of each kind of part; the others take some seconds each.
TELLING = (
    *("qwen3, windows", "granite", "gemma3, cap", "gpt_neox", "gptj, one head", "opt, untied"),
    *("gpt_bigcode", "phi3, partial"),
)


def _served(name: str) -> bool:
    return not name.startswith("olmo2")


@pytest.mark.kernels
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in TELLING else pytest.mark.slow)
        for name in CONFIGS
        if _served(name)
    ],
)
def test_logits_are_those_of_the_modules(name: str, device: torch.device) -> None:
    model = our_model(library_model(CONFIGS[name])).to(device)
    with torch.no_grad(), backend("reference"):
        expected = model(torch.tensor([TOKENS], device=device)).logits[0]
    # A sequence of other tokens beside it: a row sees its own pages alone.
    with backend("kernel"), torch.inference_mode():
        assert GraphExecutor.serves(model, torch.float32) is None
        step = _step(model)
        step._cache.allocate(2)
        found = torch.stack([step(torch.tensor([3, token], device=device))[1] for token in TOKENS])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CONFIGS if not _served(name)][:1])
def test_a_norm_of_all_heads_is_a_reason(name: str) -> None:
    model = our_model(library_model(CONFIGS[name]))
    with backend("kernel"):
        reason = GraphExecutor.serves(model, torch.float32)
    assert reason is not None and "norms all heads at once" in reason


def test_the_persistent_step_says_what_it_lacks() -> None:
    model = our_model(library_model(CONFIGS["qwen3"]))
    with backend("kernel"):
        assert GraphExecutor.serves(model, torch.float32) is None
        reason: Any = PersistentExecutor.serves(model, torch.float32)
    assert reason == "this model's RMS norms are not among what it computes"


def _step(model: GPT) -> GraphExecutor:
    cache = KVCache.for_config(model.config, max_seqs=2, max_len=32, page_size=16, device=model.device)
    return GraphExecutor(model, cache, 4)
