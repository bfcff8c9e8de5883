"""The CPU's attention over several blocks of tokens: against float64, and bitwise the same in any chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cpu_decoders import small_decoder

from gptkern import _C
from gptkern.cpu_threads import VARIABLE
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.cpu import CpuExecutor
from gptkern.model.decoder import Decoder
from gptkern.model.spec import DecoderSpec, LayerSpec, NormSpec, RotarySpec
from gptkern.testing import assert_accurate

pytestmark = pytest.mark.skipif(not _C.has_decoder, reason="this processor has no AVX2")

DTYPES = [torch.float32, torch.bfloat16]
TOKENS = 150  # two whole blocks of 64 tokens, and a part of a third
ROTARY = RotarySpec(22, 100.0)
# No width of it is a multiple of what a pass over the weights takes.
GROUPED = DecoderSpec(
    vocab_size=515,
    context=TOKENS,
    width=45,
    heads=6,
    kv_heads=2,
    head_dim=22,
    inner=61,
    layers=(LayerSpec(0.2, window=71, rotary=ROTARY), LayerSpec(0.3), LayerSpec(0.2, window=5)),
    norm=NormSpec("rms", 1e-5),
    activation="silu",
    gated=True,
)
SPECS = {
    "heads in groups, windows": GROUPED,
    "heads of 90, capped scores": GROUPED.replace(
        heads=2, head_dim=90, layers=(LayerSpec(0.2),) * 2, attention_softcap=2.0
    ),
    "one key head, a norm of all heads": GROUPED.replace(
        heads=7, kv_heads=1, head_dim=16, layers=(LayerSpec(0.2),) * 2, qk_norm="whole"
    ),
    # A thread's smallest part of a sequence is a 64th of the context: here two blocks, above one.
    "a context of 8000": GROUPED.replace(
        context=8000, heads=5, kv_heads=5, layers=(LayerSpec(0.2, window=71), LayerSpec(0.3, rotary=ROTARY))
    ),
}


def _cache(model: Decoder, page_size: int = 7) -> KVCache:
    config: Any = model.config
    cache = KVCache.for_config(config, max_seqs=1, max_len=TOKENS, page_size=page_size, dtype=model.dtype)
    cache.allocate(1)
    return cache


def _tokens(model: Decoder) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(model.spec.vocab_size - 1, (TOKENS,), generator=draw)


def _by_layers(model: Decoder) -> torch.Tensor:
    """Logits of all tokens by the model's own layers, ``(TOKENS, vocab)``."""
    with torch.inference_mode():
        return model(_tokens(model)[None], cache=_cache(model)).logits[0]


def _in_chunks(
    model: Decoder, chunks: Sequence[int], tokens: torch.Tensor | None = None, page_size: int = 7
) -> tuple[torch.Tensor, KVCache]:
    """Logits of all tokens, so many in each pass, and the cache."""
    tokens = _tokens(model) if tokens is None else tokens
    logits, start = [], 0
    with torch.inference_mode():
        cache = _cache(model, page_size)
        cache.reserve([TOKENS])
        executor = CpuExecutor(model, cache)
        for chunk in chunks:
            lengths = torch.arange(start, start + chunk, dtype=torch.int32)
            table = cache.page_table[:1].expand(chunk, -1).contiguous()
            logits.append(executor.logits(tokens[start : start + chunk], table, lengths))
            start += chunk
    assert start == TOKENS
    return torch.cat(logits), cache


@pytest.mark.usefixtures("decode_path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_a_prompt_against_float64(name: str, dtype: torch.dtype) -> None:
    model = small_decoder(SPECS[name], dtype)
    config: Any = model.config
    exact = Decoder(config).double().eval()
    exact.load_state_dict(model.state_dict())
    assert_accurate(_in_chunks(model, [TOKENS])[0], _by_layers(model), _by_layers(exact))


@pytest.mark.usefixtures("decode_path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_every_division_into_passes_gives_the_same_bits(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_decoder(SPECS[name], dtype)
    monkeypatch.setenv(VARIABLE, "1")
    expected, whole = _in_chunks(model, [1] * TOKENS)
    for threads, page_size, chunks in (
        (1, 7, [TOKENS]),
        (3, 64, [TOKENS]),
        (2, 64, [64, 64, 22]),
        (2, 5, [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 40, 30, 20]),
        (5, 16, [63, 2, 63, 22]),
        (2, 64, [100, *[1] * 50]),
        (3, 7, [60, *[1] * 90]),
        (16, 64, [130, *[1] * 20]),
    ):
        monkeypatch.setenv(VARIABLE, str(threads))
        found, cache = _in_chunks(model, chunks, page_size=page_size)
        assert torch.equal(found, expected), chunks
        for one, other in ((cache.k, whole.k), (cache.v, whole.v)):
            held = [kept.flatten(1, 2)[:, :TOKENS] for kept in (one, other)]
            assert torch.equal(*held), chunks


@pytest.mark.usefixtures("decode_path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_that_are_not_finite_reach_none_before_them(dtype: torch.dtype) -> None:
    """Queries of a tile see different numbers of tokens: a weight of 0 would not keep a NaN out."""
    model = small_decoder(GROUPED, dtype)
    with torch.no_grad():
        model.transformer.wte.weight[-1] = torch.nan
    tokens = _tokens(model)
    expected, _ = _in_chunks(model, [TOKENS])
    for first in (64, 65, 97, 141):
        tokens[first] = model.spec.vocab_size - 1
        found, _ = _in_chunks(model, [TOKENS], tokens)
        assert torch.equal(found[:first, :-1], expected[:first, :-1]), first
        assert found[first].isnan().all()
        tokens = _tokens(model)


@pytest.mark.usefixtures("decode_path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_window_ends_what_a_token_that_is_not_finite_reaches(dtype: torch.dtype) -> None:
    model = small_decoder(GROUPED.replace(layers=(LayerSpec(0.2, window=5),)), dtype)
    with torch.no_grad():
        model.transformer.wte.weight[-1] = torch.nan
    tokens = _tokens(model)
    tokens[70] = model.spec.vocab_size - 1
    for chunks in ([TOKENS], [1] * TOKENS):
        found, _ = _in_chunks(model, chunks, tokens)
        gone = found[:, :-1].isnan().all(1).nonzero().flatten().tolist()
        assert gone == [70, 71, 72, 73, 74]
        assert found[:70, :-1].isfinite().all() and found[75:, :-1].isfinite().all()
