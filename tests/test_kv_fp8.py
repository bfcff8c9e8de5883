"""The fp8 cache: what it keeps, attention over it, and what it costs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from generate_support import pair, prompts

from gptkern import cli, ops
from gptkern.checkpoint.errors import CheckpointError
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.graph import GraphExecutor
from gptkern.gpt import GPT
from gptkern.ops import _launch, append_kv, decode_attention
from gptkern.ops._types import FP8
from gptkern.ops.decode_attention import reference
from gptkern.ops.decode_linear import decode_linear, decode_qkv
from gptkern.quantize import kv_scales
from gptkern.testing import assert_accurate

PATHS = pytest.mark.parametrize("backend", ["reference", pytest.param("kernel", marks=pytest.mark.kernels)])


def filled(pages: int, size: int, heads: int, dim: int) -> tuple[Any, Any]:
    """(an fp8 cache of keys and of values, their scales)."""
    scales = tuple(torch.rand(heads) * 0.05 + 0.01 for _ in range(2))
    kept = tuple(reference.to_fp8(torch.randn(pages, size, heads, dim), scale) for scale in scales)
    return kept, scales


@PATHS
@pytest.mark.usefixtures("on_device")
def test_every_number_is_kept_rounded_to_even_and_the_rest_saturates(backend: Any) -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8)
    exact = bytes_.view(FP8).float()
    finite = exact[exact.isfinite()].sort().values
    between = (finite[1:] + finite[:-1]) / 2
    odd = [449.0, 1e9, -1e9, float("inf"), -float("inf"), float("nan")]
    values = torch.cat([finite, between, torch.tensor(odd)])
    values = torch.nn.functional.pad(values, (0, -len(values) % 8)).view(-1, 2, 4)
    scale = torch.tensor([1.0, 1.0])
    caches = [torch.zeros(1, len(values), 2, 4, dtype=FP8) for _ in range(2)]
    with ops.backend(backend):
        append_kv(values, values, *caches, torch.arange(len(values)), scales=(scale, scale))
    expected = values.clamp(-448, 448).to(FP8)
    for cache in caches:
        found = cache[0].float()
        assert torch.equal(found.nan_to_num(7.0), expected.float().nan_to_num(7.0))
        assert torch.equal(found.isnan(), values.isnan())


@PATHS
@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 3, 16), (4, 2, 40)])
def test_attention_is_that_of_the_widened_cache(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, backend: Any
) -> None:
    (k, v), scales = filled(9, 16, kv_heads, dim)
    q = torch.randn(3, heads, dim).to(dtype)
    table = torch.randperm(9).view(3, 3).int()
    lens = torch.tensor([1, 33, 48], dtype=torch.int32)
    with ops.backend(backend):
        found = decode_attention(q, k, v, table, lens, scales=scales)
        alone = decode_attention(q[1:2], k, v, table[1:2], lens[1:2], scales=scales)
    assert torch.equal(found[1], alone[0])
    wide = [
        reference.from_fp8(kept, scale, torch.float64) for kept, scale in zip((k, v), scales, strict=True)
    ]
    exact = reference.decode_attention(q.double(), *wide, table, lens)
    plain = reference.decode_attention(q, *(kept.to(dtype) for kept in wide), table, lens)
    assert_accurate(found, plain, exact)


@PATHS
@pytest.mark.usefixtures("on_device")
def test_queries_keys_and_values_reach_the_cache(backend: Any) -> None:
    x, weight = torch.randn(4, 48), torch.randn(3 * 48, 48) * 0.3
    caches = [torch.zeros(2, 8, 3, 16, dtype=FP8) for _ in range(2)]
    scales = (torch.tensor([0.01, 0.02, 0.5]), torch.tensor([0.03, 1.0, 0.005]))
    slots = torch.tensor([3, -1, 9, 15])
    with ops.backend(backend):
        q = decode_qkv(x, weight, None, *caches, slots, scales=scales)
        expected = decode_linear(x, weight)
    assert torch.equal(q, expected[:, :48])
    for cache, part, scale in zip(caches, expected[:, 48:].split(48, 1), scales, strict=True):
        flat = cache.view(torch.uint8).view(16, 3, 16)
        right = reference.to_fp8(part.unflatten(1, (3, 16)), scale).view(torch.uint8)
        assert torch.equal(flat[[3, 9, 15]], right[[0, 2, 3]])
        assert not flat[[0, 1, 2, 4, 8, 14]].any()


@pytest.mark.parametrize("name", ["head dim 64", "gpt-1"])
def test_generating_and_forking_with_it(name: str) -> None:
    gpt = pair(name)[1]
    options = {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0, "kv_cache_dtype": "fp8"}
    with ops.backend("reference"):
        gpt.kv_scales = kv_scales(gpt, prompts(2, 20))
        try:
            found = gpt.generate(prompts(2, 7), num_return_sequences=2, do_sample=True, seed=1, **options)
            again = gpt.generate(prompts(2, 7), num_return_sequences=2, do_sample=True, seed=1, **options)
            alone = gpt.generate(prompts(2, 7)[:1], num_return_sequences=2, do_sample=True, seed=1, **options)
            beams = gpt.generate(prompts(1, 7), num_beams=2, **options)
        finally:
            gpt.kv_scales = None
    assert torch.equal(found, again) and torch.equal(found[:2], alone)
    assert beams.shape == (1, 27)


def test_a_checkpoint_keeps_the_scales(tmp_path: Path) -> None:
    gpt = GPT(pair("gpt-1")[1].config).to(torch.bfloat16)
    gpt.save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).kv_scales is None
    with ops.backend("reference"):
        gpt.kv_scales = kv_scales(gpt, prompts(2, 20))
    gpt.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path).kv_scales
    assert loaded is not None
    for found, expected in zip(loaded, gpt.kv_scales, strict=True):
        assert torch.equal(found, expected) and found.dtype == torch.float32
    assert not torch.equal(*loaded)


@pytest.mark.parametrize("scales", [3, {"k": [[1.0]]}, "one head too few", float("nan"), 0.0, -1.0, "many"])
def test_a_checkpoints_scales_that_do_not_fit_are_named(tmp_path: Path, scales: Any) -> None:
    gpt = GPT(pair("gpt-1")[1].config)
    layers, heads = gpt.config.n_layer, gpt.config.n_head
    gpt.save_pretrained(tmp_path)
    if scales == "one head too few":
        scales = {name: [[1.0] * (heads - 1)] * layers for name in "kv"}
    elif isinstance(scales, float | str):
        scales = {"k": [[1.0] * heads] * layers, "v": [[scales] * heads] * layers}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"kv_scales": scales}))
    with pytest.raises(CheckpointError, match=r"config\.json: kv_scales: .*positive numbers"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.kernels
def test_the_decode_step_steps_as_the_model_does(device: torch.device) -> None:
    gpt = copy.deepcopy(pair("head dim 64")[1]).to(device)
    ids = prompts(2, 9).to(device)
    shape = {"max_seqs": 2, "max_len": 16, "page_size": 4}
    with torch.no_grad():
        held = [KVCache.for_config(gpt.config, **shape, dtype=FP8, device=device) for _ in range(2)]
        assert held[0].bytes_per_token * 4 == 2 * 4 * gpt.config.n_layer * gpt.config.n_embd
        for cache in held:
            gpt(ids[:, :8], cache=cache)
        assert torch.equal(*(cache.k.view(torch.uint8) for cache in held))
        found = GraphExecutor(gpt, held[0])(ids[:, 8])
        with ops.backend("reference"):
            expected = gpt(ids[:, 8:], cache=held[1]).logits[:, -1]
            plain = gpt(ids).logits[:, -1]
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
    # It is fp8: not the same, and not far.
    assert 1e-4 < (found - plain).norm() / plain.norm() < 0.3


def test_pages_that_are_shared_are_copied() -> None:
    cache = KVCache.for_config(pair("one layer")[1].config, max_seqs=3, max_len=16, page_size=4, dtype=FP8)
    with ops.backend("reference"), torch.no_grad():
        pair("one layer")[1](prompts(1, 6), cache=cache)
        (shared,) = cache.page_table[:1, 1].tolist()
        copy = cache.fork(cache.sequences[0])
        before = cache.k.view(torch.uint8).clone()
        pair("one layer")[1](prompts(2, 1), cache=cache)
    pages = cache.page_table[:2].tolist()
    assert pages[0][0] == pages[1][0] and pages[0][1] != pages[1][1]
    for row in range(2):
        assert torch.equal(cache.k.view(torch.uint8)[:, pages[row][1], :2], before[:, shared, :2])
    cache.truncate(copy, 3)
    assert cache.lengths == [7, 3]


def test_the_command_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    with ops.backend("reference"):
        assert cli.run(["generate", "ROMEO:", "--kv-cache-dtype", "fp8", "-n", "8", "--seed", "1"]) == 0
    assert capsys.readouterr().out.strip()


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = pair("one layer")[1]
    with pytest.raises(ValueError, match="kv_cache_dtype is 'int8'; 'auto' or 'fp8' is needed"):
        gpt.generate(prompts(1, 4), kv_cache_dtype="int8")
    shape = {"max_seqs": 1, "max_len": 8}
    with pytest.raises(ValueError, match=r"k_scale is given, but dtype is torch\.float32"):
        KVCache.for_config(gpt.config, **shape, k_scale=torch.ones(1, 4))
    for scale in (torch.ones(4), torch.zeros(1, 4), torch.full((1, 4), torch.nan)):
        with pytest.raises(ValueError, match=r"v_scale has shape .*of numbers above 0, is needed"):
            KVCache.for_config(gpt.config, **shape, dtype=FP8, v_scale=scale)
    monkeypatch.setattr(_launch, "arch", lambda device: 80 if device.type == "cuda" else 90)
    with pytest.raises(ValueError, match=r"needs compute capability 8\.9 or newer"):
        KVCache.for_config(gpt.config, **shape, dtype=FP8, device="cuda")
    (k, v), scales = filled(1, 4, 2, 16)
    q, table, lens = torch.randn(1, 2, 16), torch.zeros(1, 1).int(), torch.ones(1).int()
    with pytest.raises(TypeError, match="k_cache is float8_e4m3fn; accepted are"):
        decode_attention(q, k, v, table, lens)
    with pytest.raises(TypeError, match="k_cache is float32; accepted are float8_e4m3fn"):
        decode_attention(q, k.float(), v.float(), table, lens, scales=scales)
    with pytest.raises(ValueError, match="k_scale has shape"):
        decode_attention(q, k, v, table, lens, scales=(scales[0][:1], scales[1]))


@pytest.mark.timeout(1200)  # bf16 on a processor without such instructions
@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("calibrated", [False, True])
def test_perplexity_hardly_changes(calibrated: bool, shared_data: Path) -> None:
    model = GPT.from_pretrained(dtype=torch.bfloat16)
    text = (shared_data / "tinyshakespeare.txt").read_bytes()
    held_out = torch.tensor(list(text[len(text) * 9 // 10 :][: 64 * 256])).view(64, 256)
    losses = []
    with ops.backend("reference"), torch.inference_mode():
        if calibrated:
            model.kv_scales = kv_scales(model, torch.tensor(list(text[: 8 * 256])).view(8, 256))
        for kind in ("auto", "fp8"):
            cache = KVCache.for_config(model.config, max_seqs=64, max_len=256, **model.cache_options(kind))
            # Chunks that go on from a cache read what it kept.
            logits = [model(held_out[:, at : at + 16], cache=cache).logits for at in range(0, 256, 16)]
            scores = torch.cat(logits, 1)[:, :-1].float().log_softmax(-1)
            losses.append(-scores.gather(2, held_out[:, 1:, None]).mean().double())
    change = float((losses[1] - losses[0]).exp() - 1)
    print(f"perplexity with an fp8 cache: {change:+.3%}")
    assert change != 0 and abs(change) < 0.005
