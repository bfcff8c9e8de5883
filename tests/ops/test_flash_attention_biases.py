"""Attention with ALiBi slopes, with an additive mask, and with values of a head dimension of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BF16, F16, F32, assert_close

import gptkern
from gptkern.ops import flash_attention, flash_attention_varlen, flash_attn_func, flash_attn_varlen_func
from gptkern.ops.decode_attention import flash_attn_with_kvcache
from gptkern.ops.flash_attention import launch, reference

SetTiles = Callable[[int, int], None]
NAMES = ("out", "lse", "dq", "dk", "dv")


@pytest.fixture
def set_tiles(monkeypatch: pytest.MonkeyPatch) -> SetTiles:
    def set_tiles(block_m: int, block_n: int) -> None:
        monkeypatch.setattr(launch, "_config", lambda *_: {"BLOCK_M": block_m, "BLOCK_N": block_n})

    return set_tiles


def inputs(
    device: torch.device,
    *,
    batch: int = 2,
    seq_q: int = 40,
    seq_k: int = 40,
    heads: int = 4,
    heads_k: int = 2,
    head_dim: int = 16,
    v_dim: int = 16,
    dtype: torch.dtype = F32,
) -> list[torch.Tensor]:
    shapes = ((seq_q, heads, head_dim), (seq_k, heads_k, head_dim), (seq_k, heads_k, v_dim))
    return [torch.randn(batch, *s, device=device).to(dtype).requires_grad_() for s in shapes]


def slopes(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.rand(shape, device=device) * 0.3


def check(qkv: list[torch.Tensor], **options: Any) -> None:
    """The kernels' results and gradients, to twice the plain expression's error."""
    generator = torch.Generator().manual_seed(3)

    def run(op: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in qkv]
        out, lse = op(*leaves)
        total = (out * do.to(dtype)).sum() + (
            lse.masked_fill(lse == -math.inf, 0.0) * dlse.to(lse.dtype)
        ).sum()
        grads = torch.autograd.grad(total, leaves)
        return dict(zip(NAMES, (out.detach(), lse.detach(), *grads), strict=True))

    q, _, v = qkv
    do = torch.randn((*q.shape[:-1], v.shape[-1]), generator=generator).to(q)
    dlse = torch.randn((q.shape[0], q.shape[2], q.shape[1]), generator=generator).to(q.device)
    window, causal = options.get("window"), options.get("causal", True)
    left = None if window is None else window - 1

    def plain(*leaves: torch.Tensor) -> Any:
        return reference.attention(
            *leaves, left, 0 if causal else left, options.get("scale"), options.get("softcap"), 0.0,
            options.get("alibi_slopes"), options.get("attn_bias"),
        )  # fmt: skip

    got = run(lambda *leaves: flash_attention(*leaves, **options, return_lse=True), q.dtype)
    assert_close(got, run(plain, torch.float64), run(plain, q.dtype))


ALIBI: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"dtype": BF16}, {"causal": False}),
    ({"seq_q": 33, "seq_k": 70}, {"scale": 0.5}),
    ({"seq_q": 70, "seq_k": 33, "dtype": F16}, {"causal": False}),
    ({"seq_q": 70, "seq_k": 33}, {}),
    ({"seq_q": 50, "seq_k": 60}, {"window": 20}),
    ({"heads": 2}, {"softcap": 2.0, "causal": False}),
]


@pytest.mark.parametrize("batched", [False, True], ids=["slopes a head", "slopes a row"])
@pytest.mark.parametrize(("sizes", "options"), ALIBI, ids=lambda value: str(value))
@pytest.mark.usefixtures("on_device")
def test_alibi(
    sizes: dict[str, Any], options: dict[str, Any], batched: bool, device: torch.device, set_tiles: SetTiles
) -> None:
    set_tiles(16, 32)
    heads = sizes.get("heads", 4)
    given = slopes(*((2, heads) if batched else (heads,)), device=device)
    check(inputs(device, **sizes), alibi_slopes=given, **options)


@pytest.mark.usefixtures("on_device")
def test_tiles_of_the_launch_table(device: torch.device) -> None:
    sizes = {"batch": 1, "seq_q": 130, "seq_k": 130, "heads": 2, "heads_k": 1, "head_dim": 64}
    bias = torch.randn(1, 2, 130, 130, device=device)
    check(inputs(device, **sizes, v_dim=64), alibi_slopes=slopes(2, device=device), attn_bias=bias)
    check(inputs(device, **sizes, v_dim=128, dtype=F16))


BIASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((33, 50), {}),
    ((1, 50), {"causal": False}),
    ((4, 33, 50), {"softcap": 3.0}),
    ((2, 1, 33, 50), {"causal": False}),
    ((2, 4, 33, 50), {"window": 11}),
    ((2, 1, 1, 50), {"causal": False}),
]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("shape", "options"), BIASES, ids=str)
@pytest.mark.usefixtures("on_device")
def test_additive_mask(
    shape: tuple[int, ...],
    options: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    set_tiles: SetTiles,
) -> None:
    set_tiles(32, 16)
    bias = torch.randn(shape, device=device)
    bias[torch.rand(shape, device=device) < 0.3] = -math.inf
    bias = bias.to(dtype)
    check(inputs(device, seq_q=33, seq_k=50, dtype=dtype), attn_bias=bias, **options)


@pytest.mark.usefixtures("on_device")
def test_a_mask_of_a_row_hides_all_of_it(device: torch.device) -> None:
    qkv = inputs(device, seq_q=20, seq_k=20)
    bias = torch.zeros(2, 1, 20, 20, device=device)
    bias[1, :, 7] = -math.inf
    out, lse = flash_attention(*qkv, attn_bias=bias, return_lse=True)
    grads = torch.autograd.grad((out, lse), qkv, (torch.ones_like(out), torch.ones_like(lse)))
    assert not out[1, 7].any()
    assert (lse[1, :, 7] == -math.inf).all()
    assert not grads[0][1, 7].any()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.usefixtures("on_device")
def test_as_pytorchs_attention_takes_it(backend: Any, device: torch.device) -> None:
    """ALiBi and a mask as one float mask of scaled_dot_product_attention; and a value head dimension."""
    q, k, v = (t.detach() for t in inputs(device, seq_q=21, seq_k=30, v_dim=24))
    bias, given = torch.randn(2, 4, 21, 30, device=device), slopes(4, device=device)
    places = torch.arange(21, device=device)[:, None] + 9
    keys = torch.arange(30, device=device)
    mask = bias - given[:, None, None] * (places - keys).abs()
    mask = mask.masked_fill(keys > places, -math.inf)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
    with gptkern.backend(backend):
        out = flash_attention(q, k, v, alibi_slopes=given, attn_bias=bias)
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("head_dim", "v_dim"), [(16, 40), (40, 16), (24, 64), (64, 17)])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.usefixtures("on_device")
def test_values_of_another_head_dimension(
    head_dim: int, v_dim: int, dtype: torch.dtype, device: torch.device, set_tiles: SetTiles
) -> None:
    set_tiles(32, 16)
    check(inputs(device, seq_k=50, head_dim=head_dim, v_dim=v_dim, dtype=dtype), window=30)


@pytest.mark.usefixtures("on_device")
def test_packed_equals_each_sequence_alone(device: torch.device, set_tiles: SetTiles) -> None:
    set_tiles(16, 16)
    lengths_q, lengths_k = [9, 0, 20, 5], [9, 4, 33, 7]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int().to(device) for n in (lengths_q, lengths_k))
    q = torch.randn(34, 2, 16, device=device, requires_grad=True)
    k = torch.randn(53, 1, 16, device=device, requires_grad=True)
    v = torch.randn(53, 1, 24, device=device, requires_grad=True)
    for given in (slopes(2, device=device), slopes(4, 2, device=device)):
        out = flash_attention_varlen(q, k, v, cu_q, cu_k, 20, 33, alibi_slopes=given)
        do = torch.randn_like(out)
        grads = torch.autograd.grad(out, (q, k, v), do)
        with gptkern.backend("reference"):
            plain = flash_attention_varlen(q, k, v, cu_q, cu_k, 20, 33, alibi_slopes=given)
        torch.testing.assert_close(out, plain)
        for i in range(4):
            rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
            alone = [t.detach()[None].requires_grad_() for t in (q[rows], k[keys], v[keys])]
            own = given[i] if given.dim() == 2 else given
            expected = flash_attention(*alone, alibi_slopes=own)
            assert torch.equal(expected[0], out[rows])
            parts = torch.autograd.grad(expected, alone, do[None, rows])
            for whole, part, where in zip(grads, parts, (rows, keys, keys), strict=True):
                assert torch.equal(whole[where], part[0])


@pytest.mark.usefixtures("on_device")
def test_registered_and_compiled(device: torch.device) -> None:
    q, k, v = inputs(device, seq_q=12, seq_k=14, v_dim=24)
    bias, given = torch.randn(2, 1, 12, 14, device=device), slopes(2, 4, device=device)
    settings = (12, 14, -1, 0, 0.25, 0.0, 0.0)
    arguments = (q, k, v, None, None, None, given, bias.expand(2, 4, 12, 14), *settings)
    torch.library.opcheck(torch.ops.gptkern.flash_attention.default, arguments)
    compiled = torch.compile(flash_attention, backend="aot_eager", fullgraph=True)
    for backend in ("kernel", "reference"):
        with gptkern.backend(backend):
            outs = [op(q, k, v, alibi_slopes=given, attn_bias=bias) for op in (flash_attention, compiled)]
            grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in outs]
        torch.testing.assert_close(outs[0], outs[1])
        torch.testing.assert_close(grads[0], grads[1])


def test_compiled_for_sizes_that_change() -> None:
    """Queries of sizes that the compiler holds open, with slopes and a bias of sizes that it knows."""
    q, k, v = (t.detach() for t in inputs(torch.device("cpu"), seq_q=12, seq_k=14))
    for tensor in (q, k, v):
        for axis in (0, 2):
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
    compiled = torch.compile(flash_attention, backend="eager", fullgraph=True)
    with gptkern.backend("reference"):
        for given in (torch.rand(2, 4), torch.rand(4)):
            options = {"alibi_slopes": given, "attn_bias": torch.randn(2, 1, 12, 14)}
            torch.testing.assert_close(compiled(q, k, v, **options), flash_attention(q, k, v, **options))


@pytest.mark.parametrize("seq_q", [1, 3])
def test_flash_attns_functions(seq_q: int) -> None:
    """The dense, the packed and the cached front say the same of ALiBi."""
    device = torch.device("cpu")
    q, k, v = (t.detach() for t in inputs(device, seq_q=seq_q, seq_k=9))
    given = slopes(2, 4, device=device)
    with gptkern.backend("reference"):
        expected = flash_attention(q, k, v, alibi_slopes=given)
        dense = flash_attn_func(q, k, v, causal=True, alibi_slopes=given)
        cu_q, cu_k = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (seq_q, 9))
        flat = [t.flatten(0, 1) for t in (q, k, v)]
        packed = flash_attn_varlen_func(*flat, cu_q, cu_k, seq_q, 9, causal=True, alibi_slopes=given)
        cached = flash_attn_with_kvcache(q, k, v, causal=True, alibi_slopes=given)
        # The same sequences further on in their rows of the cache.
        pad = torch.full((2,), 4, dtype=torch.int32)
        k_cache, v_cache = (F.pad(t, (0, 0, 0, 0, 4, 0)) for t in (k, v))
        padded = flash_attn_with_kvcache(
            q, k_cache, v_cache, causal=True, alibi_slopes=given, cache_leftpad=pad
        )
    for out in (dense, packed.view(expected.shape), cached, padded):
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_scores_are_not_rounded_on_a_cpu(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 200, 2, 64).to(dtype) for _ in range(3))
    given, bias = torch.tensor([0.5, 0.01]), torch.randn(200, 200).to(dtype)
    with gptkern.backend("reference"):
        for options in ({"alibi_slopes": given}, {"attn_bias": bias}):
            wide = {name: t if name == "alibi_slopes" else t.double() for name, t in options.items()}
            exact = flash_attention(q.double(), k.double(), v.double(), **wide)
            out = flash_attention(q, k, v, **options)
            assert (out.double() - exact).abs().max() <= 1.5 * torch.finfo(dtype).eps * exact.abs().max()
        narrow = v[..., :24].contiguous()
        exact, out = flash_attention(q.double(), k.double(), narrow.double()), flash_attention(q, k, narrow)
        assert (out.double() - exact).abs().max() <= 1.5 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes has shape \(3,\); \(4,\) or \(2, 4\)"),
        ({"alibi_slopes": torch.ones(4).half()}, TypeError, "alibi_slopes is float16"),
        ({"alibi_slopes": [0.1] * 4}, TypeError, "alibi_slopes is list"),
        ({"alibi_slopes": torch.ones(4, requires_grad=True)}, ValueError, "alibi_slopes requires a gradient"),
        ({"attn_bias": torch.zeros(40, 40).bool()}, TypeError, "attn_bias is bool; add 0 and -inf"),
        ({"attn_bias": torch.zeros(40, 1)}, ValueError, r"attn_bias has shape \(40, 1\); \(2, 4, 40, 40\)"),
        ({"attn_bias": torch.zeros(3, 1, 40, 40)}, ValueError, r"attn_bias has shape \(3, 1, 40, 40\)"),
        ({"attn_bias": torch.zeros(40)}, ValueError, r"attn_bias has shape \(40,\)"),
        ({"attn_bias": torch.zeros(40, 40).t()[:, :40]}, ValueError, "last dimension must be contiguous"),
        ({"attn_bias": torch.zeros(40, 40, requires_grad=True)}, ValueError, "attn_bias requires a gradient"),
        ({"v": torch.zeros(2, 40, 2, 264)}, ValueError, "v has head dimension 264"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(given: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = inputs(torch.device("cpu"))
    with pytest.raises(error, match="flash_attention: " + message if "last" not in message else message):
        flash_attention(**{"q": q, "k": k, "v": v, **given})


def test_a_bad_slope_changes_no_cache() -> None:
    q, k_cache, v_cache, new = (torch.randn(2, n, 2, 8) for n in (1, 10, 10, 1))
    before = k_cache.clone()
    with pytest.raises(ValueError, match=r"alibi_slopes has shape \(5,\)"):
        flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=3, alibi_slopes=torch.zeros(5))
    assert torch.equal(k_cache, before)
