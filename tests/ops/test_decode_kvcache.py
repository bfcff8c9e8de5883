"""flash-attn's cached attention against plain attention over what each sequence holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gptkern
from gptkern.ops import rotary
from gptkern.ops.decode_attention import flash_attn_with_kvcache


@pytest.fixture(autouse=True)
def references() -> Any:
    """The kernels beneath have their own tests."""
    with gptkern.backend("reference"):
        yield


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    left: int,
    right: int,
    scale: float | None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """One sequence; the last query is its last token."""
    return plain_and_lse(q, k, v, causal, left, right, scale, softcap)[0]


def plain_and_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    left: int,
    right: int,
    scale: float | None,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    places = torch.arange(len(q))[:, None] + len(k) - len(q)
    keys = torch.arange(len(k))[None]
    seen = torch.ones(len(q), len(k), dtype=torch.bool)
    if causal:
        seen &= keys <= places
    if left >= 0:
        seen &= keys >= places - left
    if right >= 0:
        seen &= keys <= places + right
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("seq_q", [1, 3])
@pytest.mark.parametrize("window", [(-1, -1), (4, 4), (5, 1), (-1, 2), (3, -1)])
@pytest.mark.parametrize("causal", [False, True])
def test_contiguous_cache(seq_q: int, window: tuple[int, int], causal: bool) -> None:
    q, k_cache, v_cache = random(3, seq_q, 4, 8), random(3, 20, 2, 8), random(3, 20, 2, 8)
    lens = torch.tensor([3, 20, 11], dtype=torch.int32)
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lens, causal=causal, window_size=window, softmax_scale=0.4
    )
    for i, n in enumerate(lens.tolist()):
        expected = plain(q[i], k_cache[i, :n], v_cache[i, :n], causal, *window, 0.4)
        torch.testing.assert_close(out[i], expected)


@pytest.mark.parametrize("seq_q", [1, 2])
def test_new_keys_are_written_before_they_are_attended(seq_q: int) -> None:
    k_cache, v_cache = random(5, 4, 1, 8), random(5, 4, 1, 8)
    table = torch.tensor([[3, 0], [1, 4]], dtype=torch.int32)
    q, k, v = random(2, seq_q, 2, 8), random(2, seq_q, 1, 8), random(2, seq_q, 1, 8)
    before = k_cache.clone(), v_cache.clone()
    lens = torch.tensor([3, 5], dtype=torch.int32)
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lens, block_table=table, causal=True
    )
    assert lens.tolist() == [3, 5]
    for i, n in enumerate(lens.tolist()):
        past = [cache[table[i].long()].flatten(0, 1)[:n] for cache in before]
        keys, values = torch.cat([past[0], k[i]]), torch.cat([past[1], v[i]])
        torch.testing.assert_close(out[i], plain(q[i], keys, values, True, -1, -1, None))
        assert torch.equal(k_cache[table[i].long()].flatten(0, 1)[: n + seq_q], keys)
        assert torch.equal(v_cache[table[i].long()].flatten(0, 1)[: n + seq_q], values)


@pytest.mark.parametrize("seq_q", [1, 2])
def test_left_padding_rows_and_an_integer_length(seq_q: int) -> None:
    q, k_cache, v_cache = random(2, seq_q, 2, 8), random(4, 10, 2, 8), random(4, 10, 2, 8)
    rows = torch.tensor([2, 0], dtype=torch.int32)
    leftpad = torch.tensor([0, 5], dtype=torch.int32)
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=9, cache_batch_idx=rows, cache_leftpad=leftpad, causal=True
    )
    for i, (row, start) in enumerate(zip(rows.tolist(), leftpad.tolist(), strict=True)):
        keys, values = k_cache[row, start:9], v_cache[row, start:9]
        torch.testing.assert_close(out[i], plain(q[i], keys, values, True, -1, -1, None))


def test_whole_cache_when_no_length_is_given() -> None:
    q, k_cache, v_cache = random(2, 1, 2, 8), random(2, 10, 2, 8), random(2, 10, 2, 8)
    out = flash_attn_with_kvcache(q, k_cache, v_cache)
    for i in range(2):
        torch.testing.assert_close(out[i], plain(q[i], k_cache[i], v_cache[i], False, -1, -1, None))


@pytest.mark.parametrize("seq_q", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_lse_and_softcap(seq_q: int, causal: bool) -> None:
    q, k_cache, v_cache = random(3, seq_q, 4, 8), random(3, 20, 2, 8), random(3, 20, 2, 8)
    lens = torch.tensor([3, 20, 11], dtype=torch.int32)
    options = {"cache_seqlens": lens, "causal": causal, "softcap": 1.5}
    out, lse = flash_attn_with_kvcache(q, k_cache, v_cache, **options, return_softmax_lse=True)
    torch.testing.assert_close(flash_attn_with_kvcache(q, k_cache, v_cache, **options), out)
    for i, n in enumerate(lens.tolist()):
        expected = plain_and_lse(q[i], k_cache[i, :n], v_cache[i, :n], causal, -1, -1, None, 1.5)
        torch.testing.assert_close(out[i], expected[0])
        torch.testing.assert_close(lse[i], expected[1])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seq_q", [1, 3])
def test_rotary(seq_q: int, causal: bool, interleaved: bool) -> None:
    q, k_cache, v_cache = random(2, seq_q, 4, 8), random(2, 20, 2, 8), random(2, 20, 2, 8)
    k, v, lens = random(2, seq_q, 2, 8), random(2, seq_q, 2, 8), torch.tensor([3, 7], dtype=torch.int32)
    angles = torch.arange(20.0)[:, None] * torch.tensor([1.0, 0.1, 0.01])
    tables = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    pairs = "interleaved" if interleaved else "halves"
    before = k_cache.clone()
    options = {"cache_seqlens": lens, "causal": causal, "rotary_interleaved": interleaved}
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **tables, **options)
    for i, n in enumerate(lens.tolist()):
        places = torch.arange(n, n + seq_q)
        q_places = places if causal else places[:1].expand(seq_q).contiguous()
        turned_q, _ = rotary(q[i], None, *tables.values(), q_places, pairs=pairs)
        turned_k, _ = rotary(k[i], None, *tables.values(), places, pairs=pairs)
        keys = torch.cat([before[i, :n], turned_k])
        assert torch.equal(k_cache[i, : n + seq_q], keys)
        expected = plain(turned_q, keys, v_cache[i, : n + seq_q], causal, -1, -1, None)
        torch.testing.assert_close(out[i], expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rotary_cos": torch.zeros(1)}, "rotary_cos and rotary_sin must be given together"),
        ({f"rotary_{name}": torch.zeros(10, 4) for name in ("cos", "sin")}, "rotary_cos is given without k"),
        ({"softcap": -5.0}, "softcap is -5.0; a positive, finite number is needed"),
        ({"cache_seqlens": 11}, "cache_seqlens is 11; the cache holds 0 to 10 tokens"),
        (
            {"cache_seqlens": torch.tensor([2, 11], dtype=torch.int32)},
            "cache_seqlens goes from 2 to 11; the cache holds 0 to 10 tokens",
        ),
        ({"alibi_slopes": torch.zeros(5)}, r"alibi_slopes has shape \(5,\)"),
        ({"k": torch.zeros(2, 1, 2, 8)}, "k and v must be given together"),
        (
            {name: torch.zeros(2, 1, 2, 8, dtype=torch.float64) for name in "kv"},
            "k brings a sequence to 11 tokens; the cache holds 10",
        ),
        ({"cache_seqlens": torch.zeros(3, dtype=torch.int32)}, "cache_seqlens has shape"),
        (
            {"cache_batch_idx": torch.zeros(2), "block_table": torch.zeros(2, 1)},
            "cache_batch_idx and block_table cannot be given together",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    q, k_cache, v_cache = random(2, 1, 2, 8), random(2, 10, 2, 8), random(2, 10, 2, 8)
    before = k_cache.clone()
    with pytest.raises(ValueError, match=message):
        flash_attn_with_kvcache(q, k_cache, v_cache, **given)
    assert torch.equal(k_cache, before)
