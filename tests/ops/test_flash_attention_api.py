"""Flash attention as PyTorch sees it: registration, compile, autocast, errors, flash-attn's names."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch

import gptkern
from gptkern.ops import (
    flash_attention,
    flash_attention_varlen,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from gptkern.ops._launch import record
from gptkern.ops.flash_attention import reference


def qkv(device: torch.device, *shape: int, **kwargs: Any) -> list[torch.Tensor]:
    shape = shape or (2, 20, 2, 16)
    return [torch.randn(shape, device=device, **kwargs).requires_grad_() for _ in range(3)]


def starts(device: torch.device, *lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def dense_arguments(seq: int, left: int = -1) -> tuple[Any, ...]:
    return None, None, None, None, None, seq, seq, left, 0, 0.25, 0.0, 0.0


def test_opcheck(device: torch.device) -> None:
    op = torch.ops.gptkern.flash_attention.default
    torch.library.opcheck(op, (*qkv(device), *dense_arguments(20, left=6)))
    packed = [t.flatten(0, 1).detach().requires_grad_() for t in qkv(device)]
    cu = starts(device, 13, 27)
    torch.library.opcheck(op, (*packed, cu, cu, None, None, None, 27, 27, -1, 0, 0.25, 0.0, 0.0))


def test_opcheck_backward(device: torch.device) -> None:
    q, k, v = (t.detach() for t in qkv(device))
    out, lse = torch.ops.gptkern.flash_attention(q, k, v, *dense_arguments(20))
    op = torch.ops.gptkern.flash_attention_backward.default
    arguments = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *dense_arguments(20))
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_compiles_without_graph_break(implementation: Any, device: torch.device) -> None:
    q, k, v = qkv(device)
    packed = [t.flatten(0, 1).detach().requires_grad_() for t in (q, k, v)]
    cu = starts(device, 13, 27)

    def model(q: Any, k: Any, v: Any, pq: Any, pk: Any, pv: Any) -> torch.Tensor:
        first = flash_attention(q * 1.0, k, v, window=7)
        second = flash_attention_varlen(pq * 1.0, pk, pv, cu, cu, 27, 27)
        return first.sum() + (second * second).sum()  # type: ignore[union-attr, operator]

    leaves = (q, k, v, *packed)
    with gptkern.backend(implementation):
        torch.compiler.reset()
        expected = torch.autograd.grad(model(*leaves), leaves)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(*leaves), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_dropout_matches_its_backward(device: torch.device) -> None:
    """With v the identity, out is the dropped weights, and dv of a constant gradient their column sums."""
    q, k, _ = qkv(device, 1, 16, 1, 16)
    v = torch.eye(16, device=device)[None, :, None].requires_grad_()
    for implementation in ("auto", "reference"):
        with gptkern.backend(implementation):  # type: ignore[arg-type]
            torch.compiler.reset()

            @torch.compile(fullgraph=True, backend="aot_eager")
            def model(q: Any, k: Any, v: Any) -> Any:
                cu = torch.tensor([0, 16], dtype=torch.int32, device=q.device)
                return flash_attention_varlen(q[0], k[0], v[0], cu, cu, 16, 16, dropout_p=0.5, causal=False)

            out = model(q, k, v)
            assert 0.2 < (out == 0).double().mean() < 0.8
            (dv,) = torch.autograd.grad(out.sum(), v)
            torch.testing.assert_close(dv[0, :, 0], out[:, 0].sum(0)[:, None].expand(16, 16))


def test_compiled_dynamic_shapes(device: torch.device) -> None:
    compiled = torch.compile(flash_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for seq in (16, 19):
        q, k, v = qkv(device, 1, seq, 2, 16)
        torch.testing.assert_close(compiled(q, k, v), flash_attention(q, k, v))


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_autocast(implementation: Any, device: torch.device) -> None:
    q, k, v = qkv(device)
    with gptkern.backend(implementation), torch.autocast(device.type, torch.bfloat16):
        out = flash_attention(q, k, v)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_gradient_of_an_expanded_sum(device: torch.device) -> None:
    """``out.sum()`` sends a gradient with strides of 0."""
    q, k, v = qkv(device)
    out = flash_attention(q, k, v)
    expected = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    got = torch.autograd.grad(flash_attention(q, k, v).sum(), (q, k, v))  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_only_lse_is_differentiated(device: torch.device) -> None:
    q, k, v = qkv(device)
    _, lse = flash_attention(q, k, v, return_lse=True)
    got = torch.autograd.grad(lse.sum(), (q, k, v), allow_unused=True)
    _, exact = reference.attention(q, k, v)
    expected = torch.autograd.grad(exact.sum(), (q, k))
    torch.testing.assert_close(got[:2], expected)
    assert got[2] is None or not got[2].any()


def test_gradient_check(device: torch.device) -> None:
    """Numerical differentiation in float64 of the reference, whose gradients the kernels' are held to."""
    with gptkern.backend("reference"):
        inputs = qkv(device, 1, 5, 2, 4, dtype=torch.float64)
        for kwargs in ({}, {"window": 2}, {"softcap": 2.0}, {"causal": False}):
            torch.autograd.gradcheck(lambda *t, kw=kwargs: flash_attention(*t, **kw, return_lse=True), inputs)


def test_cpu_path_equals_the_specification() -> None:
    """PyTorch's own attention stands in for the plain expression wherever it can say the same."""
    with gptkern.backend("reference"):
        for seq_q, seq_k in ((5, 5), (1, 7), (4, 9), (9, 4)):
            for causal in (True, False):
                q = torch.randn(2, seq_q, 4, 16, dtype=torch.float64)
                k, v = (torch.randn(2, seq_k, 2, 16, dtype=torch.float64) for _ in range(2))
                out = flash_attention(q, k, v, causal=causal)
                torch.testing.assert_close(out, reference.attention(q, k, v, None, 0 if causal else None)[0])


def test_one_launch_forward_two_backward() -> None:
    with record(90) as launches:
        q, k, v = (torch.empty(2, 128, 4, 64, device="meta", requires_grad=True) for _ in range(3))
        out = flash_attention(q, k, v)
        assert isinstance(out, torch.Tensor)
        out.backward(torch.empty_like(out))
    names = [launch.name for launch in launches]
    assert names == ["flash_attention_forward", "flash_attention_dq", "flash_attention_dkdv"]


def test_tiles_outside_the_mask_are_not_visited(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that no query sees may hold anything: they are never read into a product."""
    from gptkern.ops.flash_attention import launch

    monkeypatch.setattr(launch, "_config", lambda *_: {"BLOCK_M": 16, "BLOCK_N": 16})
    q, k, v = (t.detach() for t in qkv(device, 1, 64, 1, 16))
    k[:, :16], v[:, :16] = math.nan, math.nan
    out = flash_attention(q, k, v, window=16)
    assert isinstance(out, torch.Tensor)
    assert out[:, 32:].isfinite().all()
    k[:, 48:], v[:, 48:] = math.nan, math.nan
    out = flash_attention(q[:, :], k, v, window=16)
    assert isinstance(out, torch.Tensor)
    assert out[:, 32:48].isfinite().all()


def good(**changes: Any) -> dict[str, Any]:
    q, k, v = (torch.randn(2, 8, 4, 16) for _ in range(3))
    return {"q": q, "k": k, "v": v, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1]}, TypeError, "q is list"),
        ({"k": torch.randn(2, 8, 16)}, ValueError, "k has shape"),
        ({"q": torch.zeros(2, 8, 4, 16, dtype=torch.int32)}, TypeError, "q is int32"),
        ({"v": torch.randn(2, 8, 4, 16).half()}, TypeError, "v is torch.float16, q is torch.float32"),
        (
            {"k": torch.randn(2, 8, 3, 16), "v": torch.randn(2, 8, 3, 16)},
            ValueError,
            "k has 3 heads, q has 4",
        ),
        ({"k": torch.randn(2, 8, 4, 8)}, ValueError, "k has head dimension 8, q has 16"),
        ({"k": torch.randn(3, 8, 4, 16)}, ValueError, "k has batch size 3, q has 2"),
        ({"v": torch.randn(2, 9, 4, 16)}, ValueError, "v has shape"),
        ({"q": torch.randn(2, 8, 16, 4).transpose(2, 3)}, ValueError, "last dimension must be contiguous"),
        ({"scale": 0.0}, ValueError, "scale is 0.0"),
        ({"scale": math.nan}, ValueError, "scale is nan"),
        ({"scale": "a"}, TypeError, "scale is 'a'; a number is needed"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"window": 0}, ValueError, "window is 0"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0"),
        ({name: torch.randn(1, 4, 1, 264) for name in "qkv"}, ValueError, "head dimension 264"),
        ({name: torch.randn(1, 4, 1, 16).double() for name in "qkv"}, TypeError, "q is float64"),
    ],
    ids=lambda value: None if isinstance(value, dict | type) else value,
)
def test_bad_arguments(
    changes: dict[str, Any], error: type[Exception], message: str, device: torch.device
) -> None:
    given = good(**changes)
    given |= {name: value.to(device) for name, value in given.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(error, match=message) as raised:
        flash_attention(**given)
    assert str(raised.value).startswith("flash_attention: ")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 8])}, TypeError, "cu_seqlens_q is int64"),
        ({"cu_seqlens_k": torch.zeros(3, dtype=torch.int32)}, ValueError, "cu_seqlens_k has 3"),
        ({"cu_seqlens_q": [0, 8]}, TypeError, "cu_seqlens_q is list"),
        ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q is -1"),
        ({"max_seqlen_k": torch.tensor(8)}, TypeError, "max_seqlen_k is tensor"),
        ({"q": torch.randn(1, 8, 4, 16)}, ValueError, "q has shape"),
    ],
)
def test_bad_packing(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = (torch.randn(8, 4, 16) for _ in range(3))
    cu = torch.tensor([0, 8], dtype=torch.int32)
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    with pytest.raises(error, match=message):
        flash_attention_varlen(**{**arguments, "max_seqlen_q": 8, "max_seqlen_k": 8, **changes})


def test_flash_attn_signatures() -> None:
    rest = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
    dense = f"q k v {rest}"
    packed = f"q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {rest} block_table"
    assert " ".join(inspect.signature(flash_attn_func).parameters) == dense
    assert " ".join(inspect.signature(flash_attn_varlen_func).parameters) == packed


@pytest.mark.parametrize(
    ("kwargs", "sides"),
    [
        ({}, (None, None)),
        ({"causal": True}, (None, 0)),
        ({"window_size": (5, 3)}, (5, 3)),
        ({"window_size": (5, -1)}, (5, None)),
        ({"window_size": (-1, 2)}, (None, 2)),
        ({"window_size": (6, 4), "causal": True, "softcap": 3.0, "softmax_scale": 0.3}, (6, 0)),
    ],
)
def test_flash_attn_func(
    kwargs: dict[str, Any], sides: tuple[int | None, int | None], device: torch.device
) -> None:
    q, k, v = qkv(device, 1, 20, 2, 16)
    softcap, scale = kwargs.get("softcap"), kwargs.get("softmax_scale")
    exact, exact_lse = reference.attention(q.double(), k.double(), v.double(), *sides, scale, softcap)
    out, lse, mask = flash_attn_func(q, k, v, **kwargs, deterministic=True, return_attn_probs=True)
    assert mask is None
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)
    cu = starts(device, 20)
    packed = flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 20, 20, **kwargs)
    assert torch.equal(packed, out[0])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes has shape \(3,\); \(2,\) or \(2, 2\) is needed"),
        ({"dropout_p": 0.1, "return_attn_probs": True}, "return_attn_probs"),
        ({"window_size": (-2, 0)}, "window_size"),
    ],
)
def test_flash_attn_refuses_by_name(kwargs: dict[str, Any], message: str, device: torch.device) -> None:
    q, k, v = qkv(device)
    with pytest.raises(ValueError, match=message):
        flash_attn_func(q, k, v, **kwargs)


def test_flash_attn_varlen_reads_a_block_table(device: torch.device) -> None:
    k, v = (torch.randn(18, 2, 16, device=device) for _ in range(2))
    q, cu_q, cu_k = torch.randn(9, 4, 16, device=device), starts(device, 5, 1, 3), starts(device, 7, 1, 10)
    table = torch.tensor([[6, 2, 9], [4, 9, 9], [0, 5, 1]], dtype=torch.int32, device=device)
    blocks = [torch.full((7, 4, 2, 16), math.nan, device=device) for _ in range(2)]
    for row, (first, length) in enumerate(((0, 7), (7, 1), (8, 10))):
        for token in range(length):
            for cache, values in zip(blocks, (k, v), strict=True):
                cache[int(table[row, token // 4]), token % 4] = values[first + token]
    expected = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 10, causal=True)
    got = flash_attn_varlen_func(q, *blocks, cu_q, cu_k, 5, 10, causal=True, block_table=table)
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="max_seqlen_k is 13; block_table holds 12 tokens a row"):
        flash_attn_varlen_func(q, *blocks, cu_q, cu_k, 5, 13, block_table=table)
    with pytest.raises(ValueError, match="block_table has 2 rows, cu_seqlens_k 4 entries"):
        flash_attn_varlen_func(q, *blocks, cu_q, cu_k, 5, 10, block_table=table[:2])


def test_flash_attn_packed_fronts(device: torch.device) -> None:
    qkv_packed = torch.randn(2, 20, 3, 2, 16, device=device, requires_grad=True)
    options = {"causal": True, "window_size": (5, 0), "softmax_scale": 0.3}
    expected = flash_attn_func(*qkv_packed.unbind(2), **options)
    assert torch.equal(flash_attn_qkvpacked_func(qkv_packed, **options), expected)
    (gradient,) = torch.autograd.grad(flash_attn_qkvpacked_func(qkv_packed, **options).sum(), qkv_packed)
    assert gradient.shape == qkv_packed.shape
    q, kv = torch.randn(2, 9, 4, 16, device=device), torch.randn(2, 20, 2, 2, 16, device=device)
    got = flash_attn_kvpacked_func(q, kv, return_attn_probs=True, **options)
    expected = flash_attn_func(q, *kv.unbind(2), return_attn_probs=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(got[:2], expected[:2], strict=True))
    with pytest.raises(ValueError, match=r"flash_attn_kvpacked_func: kv has shape \(2, 20, 3, 2, 16\)"):
        flash_attn_kvpacked_func(q, qkv_packed)


def _packed_call(dtype: torch.dtype, window: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    cu_q, cu_k = (
        torch.tensor(t, dtype=torch.int32) for t in ([0, 300, 300, 301, 341], [0, 300, 305, 345, 385])
    )
    q = torch.randn(345, 4, 16).to(dtype)
    k, v = (torch.randn(385, 2, 16).to(dtype) for _ in range(2))
    return (q, k, v, cu_q, cu_k, 300, 300), {"window": window}


@pytest.mark.parametrize("window", [None, 1, 7, 280])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_packed_on_a_cpu_is_pytorchs_attention(dtype: torch.dtype, window: int | None) -> None:
    """Without a matrix of scores, with the error of one rounding, each sequence by itself."""
    args, options = _packed_call(dtype, window)
    with gptkern.backend("reference"):
        out = flash_attention_varlen(*args, **options)
        left = None if window is None else window - 1
        wide = [t.double() for t in args[:3]]
        exact, _ = reference.attention_varlen(*wide, *args[3:5], left)
        torch.testing.assert_close(
            out.double(), exact, rtol=0, atol=1.5 * torch.finfo(dtype).eps * exact.abs().max().item()
        )
        assert not out[341:].any()
        one = torch.tensor([0, 40], dtype=torch.int32)
        last = (args[0][301:341], args[1][345:], args[2][345:])
        alone = flash_attention_varlen(*last, one, one, 40, 40, **options)
        assert torch.equal(alone, out[301:341])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_are_not_rounded_on_a_cpu(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 200, 2, 64).to(dtype) for _ in range(3))
    wide = [t.double() for t in (q, k, v)]
    with gptkern.backend("reference"):
        for options in ({"return_lse": True}, {"softcap": 20.0}, {"window": 50}):
            out, exact = flash_attention(q, k, v, **options), flash_attention(*wide, **options)
            out, exact = (t[0] if isinstance(t, tuple) else t for t in (out, exact))
            assert (out.double() - exact).abs().max() <= 1.5 * torch.finfo(dtype).eps * exact.abs().max()
