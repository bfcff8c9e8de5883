"""The CPU's decode step of decoders beyond GPT-2, switch by switch: against float64, and in any company."""

from __future__ import annotations

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
HALVES, NEIGHBOURS = RotarySpec(22, 100.0), RotarySpec(22, 100.0, "interleaved")
RMS = NormSpec("rms", 1e-5)
# No width of it is a multiple of what a pass over the weights takes.
LLAMA = DecoderSpec(
    vocab_size=71,
    context=40,
    width=45,
    heads=6,
    kv_heads=2,
    head_dim=22,
    inner=61,
    layers=(LayerSpec(0.2, rotary=HALVES),) * 2,
    norm=RMS,
    activation="silu",
    gated=True,
)
MIXED = (LayerSpec(0.2, window=3, rotary=HALVES), LayerSpec(0.3), LayerSpec(0.2, window=9, rotary=NEIGHBOURS))
SPECS = {
    "llama": LLAMA,
    "one key head, untied": LLAMA.replace(kv_heads=1, tied=False),
    "layers of several kinds": LLAMA.replace(layers=MIXED),
    "partial rotary": LLAMA.replace(layers=(LayerSpec(0.2, rotary=RotarySpec(6, 50.0)),) * 2),
    "every bias": LLAMA.replace(
        qkv_bias=True, out_bias=True, fc_bias=True, proj_bias=True, head_bias=True, tied=False
    ),
    "a norm of each head": LLAMA.replace(qk_norm="head"),
    "a norm of all heads, on branches": LLAMA.replace(qk_norm="whole", norm_place="branch"),
    "norms on both sides, offset, caps, scales": LLAMA.replace(
        norm=NormSpec("rms", 1e-6, unit_offset=True),
        norm_place="both",
        qk_norm="head",
        activation="gelu_tanh",
        attention_softcap=2.0,
        logits_softcap=3.0,
        embedding_scale=6.7,
        residual_scale=0.4,
        logits_scale=0.3,
    ),
    "scales of embeddings, branches and logits": LLAMA.replace(
        embedding_scale=3.0, residual_scale=0.3, logits_scale=0.2, tied=False
    ),
    "parallel": LLAMA.replace(
        parallel=True, gated=False, norm=NormSpec("layer", 1e-5, bias=True), activation="gelu", fc_bias=True
    ),
    "parallel, one norm": LLAMA.replace(
        parallel=True, shared_norm=True, layers=(LayerSpec(0.2, rotary=RotarySpec(8, 90.0, "interleaved")),)
    ),
    "positions with an offset": LLAMA.replace(
        learned_positions=True,
        position_offset=2,
        layers=(LayerSpec(0.2),),
        gated=False,
        activation="relu",
        norm=NormSpec("layer", 1e-5),
    ),
    "wide": LLAMA.replace(width=160, head_dim=64, heads=4, inner=320, vocab_size=130),
}


def _stepped(model: Decoder, rows: int, fast: bool = True, steps: int = 12) -> tuple[torch.Tensor, KVCache]:
    """Logits of every step, ``(steps, rows, vocab)``, and the cache."""
    config: Any = model.config
    with torch.inference_mode():
        cache = KVCache.for_config(config, max_seqs=rows, max_len=24, page_size=5, dtype=model.dtype)
        cache.allocate(rows)
        draw = torch.Generator().manual_seed(1)
        fed = torch.randint(model.spec.vocab_size, (steps, 13), generator=draw)[:, :rows]
        if fast:
            assert CpuExecutor.serves(model, cache.dtype) is None
            step: Any = CpuExecutor(model, cache)
        else:
            step = lambda tokens: model(tokens[:, None], cache=cache).logits[:, -1]  # noqa: E731
        logits = torch.stack([step(tokens) for tokens in fed])
    return logits, cache


@pytest.mark.usefixtures("decode_path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    model = small_decoder(SPECS[name], dtype, transposed=name in ("llama", "every bias", "parallel"))
    config: Any = model.config
    exact = Decoder(config).double().eval()
    exact.load_state_dict(model.state_dict())
    (found, cache), (plain, plain_cache) = _stepped(model, 3), _stepped(model, 3, fast=False)
    truth, true_cache = _stepped(exact, 3, fast=False)
    assert_accurate(found, plain, truth)
    assert_accurate(cache.k, plain_cache.k, true_cache.k, "the keys")
    assert_accurate(cache.v, plain_cache.v, true_cache.v, "the values")


@pytest.mark.usefixtures("decode_path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["layers of several kinds", "norms on both sides, offset, caps, scales"])
def test_a_row_is_bitwise_the_same_in_any_batch_and_with_any_threads(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_decoder(SPECS[name], dtype)
    whole, _ = _stepped(model, 13)
    for number in (1, 2, 3):
        monkeypatch.setenv(VARIABLE, str(number))
        for rows in (1, 2, 5, 13):
            found, _ = _stepped(model, rows)
            assert torch.equal(found, whole[:, :rows]), (number, rows)
