"""The decode kernels run every family's program: against the decoder's modules, token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import CONFIGS
from family_models import TINY, library_model, our_model
from transformers import LlamaConfig

from gptkern import GPT, backend
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.graph import GraphExecutor
from gptkern.engine.executors.persistent import PersistentExecutor
from gptkern.ops import _launch
from gptkern.quantization import Quantization
from gptkern.quantize import QuantizedLinear, quantize_model

TOKENS = [1, 2, 3, 4, 5, 6, 7, 8]
# So many of them are in the cache: more than windows hold.
SHARED = 6
# Of each kind of part one; the others take some seconds each.
TELLING = ("qwen3, windows", "granite", "gemma3, cap", "gptj, one head", "olmo2")


@pytest.mark.kernels
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in TELLING else pytest.mark.slow) for name in CONFIGS],
)
def test_logits_are_those_of_the_modules(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph's, to rounding; the persistent step's are the graph's to the bit, and so is its cache."""
    model = our_model(library_model(CONFIGS[name])).to(device)
    with torch.no_grad(), backend("reference"):
        expected = model(torch.tensor([TOKENS], device=device)).logits[0]
    # Fewer programs take as many items in fewer turns, and the interpreter runs one after another.
    monkeypatch.setattr(_launch, "multiprocessors", lambda _: 1)
    graph = _step(GraphExecutor, model)
    with backend("kernel"), torch.inference_mode():
        assert GraphExecutor.serves(model, torch.float32) is None
        reason = PersistentExecutor.serves(model, torch.float32)
        found = _logits(graph, device)
        torch.testing.assert_close(found, expected[SHARED:], rtol=0, atol=1e-4)
        if model.spec.norm_place in ("branch", "both"):
            assert reason is not None and "no phase for norms of branches' outputs" in reason
            return
        assert reason is None
        persistent = _step(PersistentExecutor, model)
        assert torch.equal(_logits(persistent, device), found)
        assert torch.equal(persistent._cache.k, graph._cache.k)
        assert torch.equal(persistent._cache.v, graph._cache.v)


@pytest.mark.slow
@pytest.mark.kernels
def test_each_matrix_may_have_a_format_of_its_own(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some packed and some floats, as a GGUF file may have them."""
    config = {**TINY, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    model = our_model(library_model(LlamaConfig(**config, num_key_value_heads=2, head_dim=16))).to(device)
    floats = ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj", "lm_head")
    quantize_model(model, replace(Quantization.make(model.config, "int4"), floats=floats))
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 3 * 4 - 2
    with torch.no_grad(), backend("reference"):
        expected = model(torch.tensor([TOKENS], device=device)).logits[0]
    monkeypatch.setattr(_launch, "multiprocessors", lambda _: 1)
    graph = _step(GraphExecutor, model)
    with backend("kernel"), torch.inference_mode():
        assert GraphExecutor.serves(model, torch.float32) is None
        found = _logits(graph, device)
        torch.testing.assert_close(found, expected[SHARED:], rtol=0, atol=1e-4)
        assert torch.equal(_logits(_step(PersistentExecutor, model), device), found)


def _step(kind: type[GraphExecutor], model: GPT) -> GraphExecutor:
    """Over two sequences, whose first tokens the modules have computed."""
    cache = KVCache.for_config(model.config, max_seqs=2, max_len=32, page_size=16, device=model.device)
    cache.k.zero_()
    cache.v.zero_()
    cache.allocate(2)
    first = torch.tensor([[3] * SHARED, TOKENS[:SHARED]], device=model.device)
    with backend("reference"), torch.inference_mode():
        model(first, cache=cache)
    with backend("kernel"):
        return kind(model, cache, 4)


def _logits(step: GraphExecutor, device: torch.device) -> torch.Tensor:
    """After each of the last tokens, beside a sequence of other ones: a row sees its own pages alone."""
    return torch.stack([step(torch.tensor([3, token], device=device))[1] for token in TOKENS[SHARED:]])
