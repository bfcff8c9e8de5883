"""Flash attention's kernels against the float64 reference, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from attention_cases import BF16, F16, F32, Case, assert_close, inputs, plain, span
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptkern.ops import flash_attention, flash_attention_varlen
from gptkern.ops.flash_attention import launch, reference
from gptkern.testing import assert_accurate, attention_terms

SetTiles = Callable[[int, int], None]


@pytest.fixture
def set_tiles(monkeypatch: pytest.MonkeyPatch) -> SetTiles:
    """Small tiles, so that short sequences have full, masked and skipped ones."""

    def set_tiles(block_m: int, block_n: int) -> None:
        tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n}
        monkeypatch.setattr(launch, "_config", lambda *_: tiles)

    return set_tiles


def run(
    case: Case, qkv: list[torch.Tensor], scale: float | None = None
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The kernels' results and the gradients of out and lse that were sent back."""
    out, lse = flash_attention(
        *qkv, causal=case.causal, window=case.window, softcap=case.softcap, scale=scale, return_lse=True
    )
    do, dlse = torch.randn_like(out), torch.randn_like(lse)
    total = (out * do).sum() + (lse.masked_fill(lse == -math.inf, 0.0) * dlse).sum()
    grads = torch.autograd.grad(total, qkv)
    names = ("out", "lse", "dq", "dk", "dv")
    return dict(zip(names, (out.detach(), lse.detach(), *grads), strict=True)), do, dlse


def check(case: Case, qkv: list[torch.Tensor], scale: float | None = None) -> None:
    got, do, dlse = run(case, qkv, scale)
    sides = span(case.causal, case.window)
    exact, rough = (
        plain(qkv, dtype, do, dlse, sides=sides, scale=scale, softcap=case.softcap)
        for dtype in (torch.float64, case.dtype)
    )
    assert_close(got, exact, rough)


CASES = [
    Case(2, 1, 1, 2, 1, 16, tiles=(16, 16)),
    Case(1, 2, 2, 2, 2, 40, BF16),
    Case(2, 17, 17, 2, 1, 64, F16),
    Case(1, 63, 63, 2, 2, 80, BF16),
    Case(1, 64, 64, 2, 1, 96, F16),
    Case(1, 65, 65, 2, 2, 128, BF16),
    Case(1, 127, 127, 2, 1, 16, F16),
    Case(1, 200, 200, 1, 1, 64, tiles=(64, 64)),
    Case(1, 200, 200, 1, 1, 64, BF16, tiles=(64, 32)),
    Case(1, 64, 64, 1, 1, 256, F16),
    Case(1, 33, 33, 8, 2, 16),
    Case(1, 1, 127, 2, 2, 64, F16),
    Case(1, 17, 200, 2, 1, 40, BF16),
    Case(1, 64, 65, 2, 2, 16, tiles=(16, 32)),
    Case(1, 65, 64, 2, 2, 16, tiles=(32, 16)),
    Case(1, 127, 40, 2, 1, 16),
    Case(1, 65, 65, 2, 1, 24, causal=False),
    Case(1, 40, 100, 1, 1, 64, BF16, causal=False),
    Case(1, 100, 40, 1, 1, 64, F16, causal=False),
    Case(1, 100, 100, 2, 1, 16, window=1, tiles=(16, 16)),
    Case(1, 100, 100, 1, 1, 16, window=20, tiles=(16, 16)),
    Case(1, 100, 100, 1, 1, 16, window=64, tiles=(16, 16)),
    Case(1, 60, 100, 1, 1, 32, BF16, window=33, tiles=(16, 32)),
    Case(1, 100, 60, 1, 1, 32, F16, window=33, tiles=(32, 16)),
    Case(1, 70, 100, 1, 1, 16, causal=False, window=17, tiles=(16, 16)),
    Case(1, 100, 50, 1, 1, 16, causal=False, window=17, tiles=(16, 32)),
    Case(1, 60, 60, 2, 1, 16, softcap=3.0),
    Case(1, 60, 90, 1, 1, 40, BF16, window=40, softcap=20.0),
    Case(1, 40, 40, 1, 1, 16, softcap=50.0, causal=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case, device: torch.device, set_tiles: SetTiles) -> None:
    set_tiles(*case.tiles)
    check(case, inputs(case, device))


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_tiles_of_the_launch_table(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    case = Case(1, 200, 200, 1, 1, head_dim, dtype)
    check(case, inputs(case, device))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [16, 40, 64, 80, 96, 128])
@pytest.mark.parametrize("seq", [1, 2, 17, 63, 64, 65, 127, 200])
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_full_grid(
    seq: int, head_dim: int, dtype: torch.dtype, device: torch.device, set_tiles: SetTiles
) -> None:
    for heads, heads_k, causal in ((8, 2, True), (2, 2, False)):
        set_tiles(32, 32)
        case = Case(2, seq, seq, heads, heads_k, head_dim, dtype, causal)
        check(case, inputs(case, device))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_and_mask(data: st.DataObject, device: torch.device, set_tiles: SetTiles) -> None:
    draw = data.draw
    heads_k = draw(st.integers(1, 2))
    case = Case(
        batch=draw(st.integers(1, 2)),
        seq_q=draw(st.integers(1, 36)),
        seq_k=draw(st.integers(1, 36)),
        heads=heads_k * draw(st.integers(1, 2)),
        heads_k=heads_k,
        head_dim=draw(st.sampled_from([8, 16, 24])),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 40)),
        softcap=draw(st.none() | st.just(4.0)),
    )
    set_tiles(*draw(st.sampled_from([(16, 16), (32, 16), (16, 32)])))
    qkv = inputs(case, device)
    got, do, dlse = run(case, qkv)
    exact = plain(qkv, torch.float64, do, dlse, sides=span(case.causal, case.window), softcap=case.softcap)
    # Of a handful of elements the plain expression's own error is luck: the bound is fp32's.
    for name, value in got.items():
        torch.testing.assert_close(value.double(), exact[name], atol=1e-5, rtol=1e-5)


STRIDES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "heads before seq": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda t: torch.cat([t, t], dim=1)[:, 1 : t.shape[1] + 1],
    "part of a wider row": lambda t: torch.cat([t, t], dim=3)[..., : t.shape[3]],
    "one batch row for all": lambda t: t[:1].expand(t.shape),
    "one position for all": lambda t: t[:, :1].expand(t.shape),
    "one head for all": lambda t: t[:, :, :1].expand(t.shape),
    "seq before batch": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES.keys())
def test_strides(strides: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
    case = Case(2, 20, 20, 2, 2, 16)
    views = [strides(t.detach()).requires_grad_() for t in inputs(case, device)]
    check(case, views)


@pytest.mark.parametrize(("rows", "stride"), [(5, 2**29), (17, 2**27)])
def test_offsets_beyond_int32(
    rows: int, stride: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last row lies 2^31 elements in: inside the first tile, and as the start of the second."""
    if device.type == "cuda":
        pytest.skip("the buffer is only virtual on a CPU")
    head_dim = 16
    storage = torch.empty(rows * stride, dtype=F16)
    q = storage.as_strided((1, rows, 1, head_dim), (0, stride, head_dim, 1))
    q.copy_(torch.randn(q.shape))
    monkeypatch.setattr(launch, "_config", lambda *_: {"BLOCK_M": 16, "BLOCK_N": 16})
    expected = flash_attention(*[q.contiguous()] * 3)
    assert torch.equal(flash_attention(q, q, q), expected)


def test_packed_equals_each_sequence_alone(device: torch.device, set_tiles: SetTiles) -> None:
    """Bit for bit, forward and backward, whatever the neighbours."""
    set_tiles(16, 16)
    lengths_q, lengths_k = [9, 0, 20, 5], [9, 4, 33, 0]
    starts_q, starts_k = (torch.tensor([0, *n]).cumsum(0).int().to(device) for n in (lengths_q, lengths_k))
    q = torch.randn(sum(lengths_q), 2, 16, device=device, requires_grad=True)
    k, v = (torch.randn(sum(lengths_k), 1, 16, device=device, requires_grad=True) for _ in range(2))
    out, lse = flash_attention_varlen(q, k, v, starts_q, starts_k, 20, 40, window=19, return_lse=True)
    do, dlse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), (q, k, v), (do, dlse))
    for i in range(len(lengths_q)):
        rows, keys = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        alone = [q[None, rows].detach(), k[None, keys].detach(), v[None, keys].detach()]
        alone = [t.requires_grad_() for t in alone]
        out_i, lse_i = flash_attention(*alone, window=19, return_lse=True)
        assert torch.equal(out_i[0], out[rows])
        assert torch.equal(lse_i[0], lse[:, rows])
        expected = torch.autograd.grad((out_i, lse_i), alone, (do[None, rows], dlse[None, :, rows]))
        for whole, part, where in zip(grads, expected, (rows, keys, keys), strict=True):
            assert torch.equal(whole[where], part[0])


def test_packed_tokens_of_no_sequence(device: torch.device) -> None:
    starts = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)
    q, k, v = (torch.randn(20, 2, 16, device=device, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        k[12:], v[12:] = math.nan, math.nan
    out = flash_attention_varlen(q, k, v, starts, starts, 7, 7)
    assert isinstance(out, torch.Tensor)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    for value in (out, *grads):
        assert value[:12].isfinite().all()
        assert torch.equal(value[12:], torch.zeros_like(value[12:]))


def test_queries_that_see_nothing(device: torch.device, set_tiles: SetTiles) -> None:
    set_tiles(16, 16)
    case = Case(1, 40, 10, 2, 1, 16)
    q, k, v = inputs(case, device)
    out, lse = flash_attention(q, k, v, return_lse=True)
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (torch.randn_like(out), torch.randn_like(lse)))
    assert torch.equal(out[:, :30], torch.zeros_like(out[:, :30]))
    assert (lse[:, :, :30] == -math.inf).all()
    assert lse[:, :, 30:].isfinite().all()
    assert torch.equal(dq[:, :30], torch.zeros_like(dq[:, :30]))
    assert dk.isfinite().all()
    assert dv.isfinite().all()


@pytest.mark.parametrize(
    ("shape_q", "shape_k"),
    [((0, 5, 2, 16), (0, 5, 2, 16)), ((2, 0, 2, 16), (2, 5, 2, 16)), ((2, 5, 2, 16), (2, 0, 2, 16))],
)
def test_empty(shape_q: tuple[int, ...], shape_k: tuple[int, ...], device: torch.device) -> None:
    q = torch.randn(shape_q, device=device, requires_grad=True)
    k, v = (torch.randn(shape_k, device=device, requires_grad=True) for _ in range(2))
    out, lse = flash_attention(q, k, v, return_lse=True)
    assert torch.equal(out, torch.zeros_like(q))
    assert (lse == -math.inf).all()
    for grad, value in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert torch.equal(grad, torch.zeros_like(value))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_large_logits(dtype: torch.dtype, device: torch.device, set_tiles: SetTiles) -> None:
    """Scores of 1e4 and beyond: a maximum that moves by thousands from tile to tile.

    Scores are exact and multiples of 32, keys come in equal pairs: weights are 0, 1/2 or 1. Rounded scores
    of this size would leave a near tie to the order of the processor's sums.
    """
    set_tiles(16, 16)
    case = Case(1, 48, 48, 1, 1, 16, dtype)
    q, k, v = (t.detach() for t in inputs(case, device))
    q, k = ((t * 12).round() * 8 for t in (q, k))
    k[:, 1::2] = k[:, ::2]
    qkv = [t.requires_grad_() for t in (q, k, v)]
    check(case, qkv, scale=0.5)


def test_values_near_the_fp16_limit(device: torch.device) -> None:
    q, k = (torch.randn(1, 20, 1, 16, device=device, dtype=F16) for _ in range(2))
    v = torch.full((1, 20, 1, 16), 65504.0, device=device, dtype=F16)
    assert torch.equal(flash_attention(q, k, v), v)


def test_scores_of_minus_infinity_weigh_nothing(device: torch.device) -> None:
    q, k, v = (torch.rand(1, 20, 1, 16, device=device) + 0.1 for _ in range(3))
    k[:, 3] = -math.inf
    out, lse = flash_attention(q, k, v, return_lse=True)
    kept = [i for i in range(20) if i != 3]
    exact, _ = reference.attention(q.double(), k.double(), v.double())
    assert out.isfinite().all()
    assert lse.isfinite().all()
    torch.testing.assert_close(out[:, kept].double(), exact[:, kept], atol=1e-6, rtol=1e-5)


def test_nan_stays_in_its_row(device: torch.device, set_tiles: SetTiles) -> None:
    set_tiles(16, 16)
    q, k, v = (torch.randn(2, 40, 2, 16, device=device) for _ in range(3))
    clean = flash_attention(q, k, v)
    assert isinstance(clean, torch.Tensor)
    q[1, 21, 1] = math.nan
    out = flash_attention(q, k, v)
    assert isinstance(out, torch.Tensor)
    assert out[1, 21, 1].isnan().all()
    clean[1, 21, 1] = math.nan
    assert torch.equal(out.nan_to_num(1e30), clean.nan_to_num(1e30))
    k[0, 5, 0] = math.nan
    out = flash_attention(q, k, v)
    assert isinstance(out, torch.Tensor)
    assert out[0, 5:, 0].isnan().all()
    assert out[0, :5].isfinite().all()
    assert out[0, :, 1].isfinite().all()


def dropout_weights(q: torch.Tensor, k: torch.Tensor, p: float, seed: int, **kwargs: float) -> torch.Tensor:
    """The dropped weights, ``(batch, seq_q, heads, seq_k)``: v is the identity."""
    seq_k = k.shape[1]
    v = torch.eye(seq_k, device=q.device)[None, :, None].expand(q.shape[0], -1, k.shape[2], -1)
    torch.manual_seed(seed)
    weights = flash_attention(q, k, v, dropout_p=p, causal=False, **kwargs)  # type: ignore[arg-type]
    assert isinstance(weights, torch.Tensor)
    return weights.detach()


def test_dropout_drops_the_asked_share(device: torch.device, set_tiles: SetTiles) -> None:
    set_tiles(32, 32)
    q, k = (torch.zeros(2, 64, 2, 64, device=device) for _ in range(2))
    weights = dropout_weights(q, k, 0.3, seed=1)
    dropped = weights == 0
    # Six standard deviations of a mean of 16384 draws.
    assert abs(dropped.double().mean() - 0.3) < 6 * math.sqrt(0.3 * 0.7 / dropped.numel())
    assert torch.allclose(weights[~dropped], torch.tensor(1 / 64 / 0.7, device=device), rtol=1e-5)
    for axis in range(4):
        along = dropped.transpose(0, axis)
        assert not torch.equal(along[0], along[1]), f"the mask repeats along axis {axis}"
    assert torch.equal(weights, dropout_weights(q, k, 0.3, seed=1))
    assert not torch.equal(weights, dropout_weights(q, k, 0.3, seed=2))


def test_dropout_mask_does_not_depend_on_tiles(device: torch.device, set_tiles: SetTiles) -> None:
    q, k = (torch.zeros(1, 64, 1, 64, device=device) for _ in range(2))
    set_tiles(16, 32)
    first = dropout_weights(q, k, 0.5, seed=1) == 0
    set_tiles(32, 16)
    assert torch.equal(first, dropout_weights(q, k, 0.5, seed=1) == 0)


@pytest.mark.parametrize(("heads", "heads_k", "softcap"), [(2, 2, None), (4, 2, 3.0)])
def test_dropout_gradients(
    heads: int, heads_k: int, softcap: float | None, device: torch.device, set_tiles: SetTiles
) -> None:
    """Against autograd through the plain expression with the mask that forward drew."""
    set_tiles(16, 32)
    p, seq = 0.4, 32
    q = torch.randn(2, seq, heads, seq, device=device)
    k = torch.randn(2, seq, heads_k, seq, device=device)
    keep = dropout_weights(q, k, p, seed=5, softcap=softcap) != 0  # type: ignore[arg-type]
    v = torch.randn(k.shape, device=device)
    qkv = [t.requires_grad_() for t in (q, k, v)]
    torch.manual_seed(5)
    out = flash_attention(*qkv, dropout_p=p, causal=False, softcap=softcap)
    assert isinstance(out, torch.Tensor)
    do = torch.randn_like(out)
    got = (out, *torch.autograd.grad(out, qkv, do))

    leaves = [t.detach().double().requires_grad_() for t in qkv]
    full_k, full_v = (t.repeat_interleave(heads // heads_k, dim=2) for t in leaves[1:])
    scores = torch.einsum("bqhd,bkhd->bhqk", leaves[0], full_k) / math.sqrt(seq)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.softmax(-1) * keep.transpose(1, 2) / (1 - p)
    exact_out = torch.einsum("bhqk,bkhd->bqhd", weights, full_v)
    exact = (exact_out, *torch.autograd.grad(exact_out, leaves, do.double()))
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_same_bits_every_time_and_in_any_batch(device: torch.device) -> None:
    case = Case(3, 40, 40, 2, 1, 16)
    qkv = inputs(case, device)

    def run(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = flash_attention(*leaves)
        assert isinstance(out, torch.Tensor)
        return out, *torch.autograd.grad(out.sum(), leaves)

    whole = run(qkv)
    for again, alone, first in zip(run(qkv), run([t[1:2] for t in qkv]), whole, strict=True):
        assert torch.equal(again, first)
        assert torch.equal(alone[0], first[1])


@pytest.mark.parametrize("level", [1.0, 30.0, 200.0, 1e4])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gradients_at_large_scores(
    dtype: torch.dtype, level: float, device: torch.device, set_tiles: SetTiles
) -> None:
    """Within the bound that ``gptkern.testing`` states; for scores of size 1 that is the common one."""
    set_tiles(32, 32)
    qkv = inputs(Case(1, 40, 40, 2, 1, 16, dtype), device)
    q, k, _ = (t.detach().float() for t in qkv)
    scores = torch.einsum("bqhd,bkgd->bhqk", q, k) / 4
    qkv[0] = (q * (level / scores.abs().max())).to(dtype).requires_grad_()
    do = torch.randn(qkv[0].shape, device=device).to(dtype)
    exact, rough = plain(qkv, torch.float64, do), plain(qkv, dtype, do)
    out = flash_attention(*qkv)
    assert isinstance(out, torch.Tensor)
    terms = attention_terms(*qkv, do, exact["lse"])
    assert_accurate(out, rough["out"], exact["out"], "out")
    for name, got in zip(("dq", "dk", "dv"), torch.autograd.grad(out, qkv, do), strict=True):
        assert_accurate(got, rough[name], exact[name], name, terms=terms[name])


def test_expanded_keys_and_an_expanded_gradient(device: torch.device, set_tiles: SetTiles) -> None:
    """k, v and the gradient of stride 0 are as their copies."""
    set_tiles(32, 32)
    q, k, v = inputs(Case(2, 33, 20, 2, 2, 16), device)
    k, v, do = k[:1, :, :1], v[:1, :, :1], torch.randn(1, 1, 2, 16, device=device)

    def grads(copy: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        wide = [copy(t.expand(2, 20, 2, 16)) for t in (k, v)]
        out = flash_attention(q, *wide)
        return torch.autograd.grad(out, (q, *wide), copy(do.expand(2, 33, 2, 16)))

    for got, expected in zip(grads(lambda t: t), grads(torch.Tensor.contiguous), strict=True):
        assert torch.equal(got, expected)
