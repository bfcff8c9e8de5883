"""The interpreter that stands in for a GPU: bf16 by value, sums alike everywhere, and only where wanted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

import gptkern
from gptkern.ops import _dispatch

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not _dispatch.INTERPRETED, reason="kernels are compiled here, not interpreted"),
]

SIZE = 256


@triton.jit
def _binary_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offsets)
    y = tl.load(y_ptr + offsets)
    if OP == "add":
        result = x + y
    elif OP == "sub":
        result = x - y
    elif OP == "mul":
        result = x * y
    elif OP == "div":
        result = x / y
    elif OP == "fma":
        result = tl.fma(x, y, x)
    elif OP == "maximum":
        result = tl.maximum(x, y)
    elif OP == "minimum":
        result = tl.minimum(x, y)
    elif OP == "neg":
        result = -x
    elif OP == "abs":
        result = tl.abs(x)
    elif OP == "scaled":
        result = x * 1.7 + 3
    elif OP == "where":
        result = tl.where(x < y, x, y)
    elif OP == "ge":
        result = (x >= y).to(tl.bfloat16)
    elif OP == "eq":
        result = (x == y).to(tl.bfloat16) - (x != y).to(tl.bfloat16)
    elif OP == "full":
        result = tl.full((SIZE,), 1.1, tl.bfloat16) + x
    tl.store(out_ptr + offsets, result)


EXPECTED = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "fma": lambda x, y: (x.float() * y.float() + x.float()).bfloat16(),
    "maximum": torch.fmax,
    "minimum": torch.fmin,
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "scaled": lambda x, y: x * torch.tensor(1.7).bfloat16() + 3,
    "where": lambda x, y: torch.where(x < y, x, y),
    "ge": lambda x, y: (x >= y).bfloat16(),
    "eq": lambda x, y: (x == y).bfloat16() - (x != y).bfloat16(),
    "full": lambda x, y: torch.tensor(1.1).bfloat16() + x,
}


def _values() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(SIZE) * torch.exp2(torch.randint(-20, 20, (SIZE,)).float())
    y = torch.randn(SIZE) * torch.exp2(torch.randint(-20, 20, (SIZE,)).float())
    x[:6] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3.3e38])
    y[6:10] = x[6:10]
    return x.bfloat16(), y.bfloat16()


@pytest.mark.parametrize("op", EXPECTED)
def test_elementwise(op: str) -> None:
    x, y = _values()
    out = torch.empty_like(x)
    _binary_kernel[(1,)](x, y, out, OP=op, SIZE=SIZE)
    torch.testing.assert_close(out, EXPECTED[op](x, y), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _cast_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int32], ids=str)
def test_casts_round_to_nearest_even(dtype: torch.dtype) -> None:
    x, _ = _values()
    x = (x[6:].float() * (1 + torch.randn(SIZE - 6) * 2**-8)).clamp(-6e4, 6e4).to(dtype)
    if dtype == torch.float32:
        ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF], dtype=torch.int32)
        x[:4] = ties.view(torch.float32)
    x = torch.cat([x, x[:6]])
    narrow = torch.empty(SIZE, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, narrow, SIZE=SIZE)
    assert torch.equal(narrow, x.to(torch.bfloat16))
    wide = torch.empty(SIZE, dtype=dtype)
    source = narrow.clamp(-6e4, 6e4)
    _cast_kernel[(1,)](source, wide, SIZE=SIZE)
    assert torch.equal(wide, source.to(dtype))


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, OP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    x = tl.load(x_ptr + rows[:, None] * COLS + tl.arange(0, COLS)[None, :])
    if OP == "sum":
        result = tl.sum(x, axis=1)
    elif OP == "max":
        result = tl.max(x, axis=1)
    elif OP == "min":
        result = tl.min(x, axis=1)
    elif OP == "argmax":
        result = tl.argmax(x, axis=1).to(tl.float32)
    elif OP == "cumsum":
        result = tl.sum(tl.cumsum(x, axis=1), axis=1)
    tl.store(out_ptr + rows, result)


@pytest.mark.parametrize("op", ["sum", "max", "min", "argmax", "cumsum"])
def test_reductions(op: str) -> None:
    x = torch.randn(8, 64).bfloat16()
    out = torch.empty(8, dtype=torch.float32)
    _reduce_kernel[(1,)](x, out, OP=op, ROWS=8, COLS=64)
    wide = x.float()
    if op == "cumsum":
        expected = wide.cumsum(1).sum(1)
    elif op in ("max", "min"):
        expected = getattr(wide, op)(dim=1).values
    else:
        expected = getattr(wide, op)(dim=1).float()
    if op == "sum":  # the result is bf16, rounded once
        expected = expected.bfloat16().float()
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a = tl.load(a_ptr + i[:, None] * SIZE + i[None, :])
    b = tl.load(b_ptr + i[:, None] * SIZE + i[None, :])
    tl.store(out_ptr + i[:, None] * SIZE + i[None, :], tl.dot(a, b))


def test_dot_accumulates_in_fp32() -> None:
    a, b = torch.randn(2, 32, 32).bfloat16()
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, out, SIZE=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


@triton.jit
def _rows_dot_kernel(a_ptr, b_ptr, out_ptr, stride_b, stride_bt, ROWS: tl.constexpr, SIZE: tl.constexpr):
    rows, i = tl.arange(0, ROWS), tl.arange(0, SIZE)
    a = tl.load(a_ptr + rows[:, None] * SIZE + i[None, :])
    b = tl.load(b_ptr + i[:, None] * stride_b + i[None, :] * stride_bt)
    tl.store(out_ptr + rows[:, None] * SIZE + i[None, :], tl.dot(a, b, input_precision="ieee"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_dot_does_not_depend_on_rows_or_layout(dtype: torch.dtype) -> None:
    a, b = torch.randn(64, 128).to(dtype), torch.randn(128, 128).to(dtype)
    expected = (a.double() @ b.double()).float()
    for rows in (16, 32, 64):
        for matrix in (b, b.T.contiguous().T):
            out = torch.empty(rows, 128)
            _rows_dot_kernel[(1,)](a, matrix, out, *matrix.stride(), ROWS=rows, SIZE=128)
            assert torch.equal(out, expected[:rows])


@triton.jit
def _sum_of_squares(x):
    return tl.sum(x * x, axis=0)


@triton.jit
def _calls_kernel(x_ptr, out_ptr, CALLS: tl.constexpr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    total = 0.0
    for _ in tl.static_range(CALLS):
        total += _sum_of_squares(x)
    tl.store(out_ptr, total)


def test_the_language_is_replaced_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a kernel calls device functions; after the launch it is Triton's again."""
    searched: list[object] = []
    original = interpreter._patch_builtin

    def count(owner: object, *rest: object) -> None:
        searched.append(owner)
        original(owner, *rest)

    monkeypatch.setattr(interpreter, "_patch_builtin", count)
    x, out, counts = torch.ones(SIZE), torch.zeros(1), []
    for calls in (1, 1, 20):
        searched.clear()
        _calls_kernel[(1,)](x, out, CALLS=calls, SIZE=SIZE)
        assert out.item() == calls * SIZE
        counts.append(len(searched))
    assert counts[1] == counts[2] > 0
    assert tl.core.is_builtin(tl.load) and tl.core.is_builtin(tl.tensor.__add__)


def test_subprocesses_do_not_inherit_the_interpreter() -> None:
    assert "TRITON_INTERPRET" not in os.environ
    assert triton.knobs.runtime.interpret


def test_kernels_are_chosen_by_the_marker() -> None:
    x = torch.empty(1)
    assert _dispatch.use_kernel(x)
    with gptkern.backend("reference"):
        assert not _dispatch.use_kernel(x)


@triton.jit
def _through_e4m3(x_ptr, kept_ptr, back_ptr, N: tl.constexpr):
    places = tl.arange(0, N)
    kept = tl.load(x_ptr + places).to(tl.float8e4nv)
    tl.store(kept_ptr + places, kept)
    tl.store(back_ptr + places, kept.to(back_ptr.dtype.element_ty))


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_e4m3_is_rounded_and_widened_by_value(dtype: torch.dtype) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = numbers[numbers.isfinite()].sort().values
    x = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, torch.tensor([float("nan"), 1e-9, 0.001])])
    x = torch.nn.functional.pad(x, (0, 512 - len(x)))
    kept, back = torch.zeros(512, dtype=torch.float8_e4m3fn), torch.zeros(512, dtype=dtype)
    _through_e4m3[(1,)](x, kept, back, N=512)
    expected = x.to(torch.float8_e4m3fn)
    assert torch.equal(kept.float().nan_to_num(9.0), expected.float().nan_to_num(9.0))
    assert torch.equal(back.nan_to_num(9.0), expected.to(dtype).nan_to_num(9.0))
    assert back.isnan().equal(x.isnan())


READ = """
from gptkern.ops._dispatch import INTERPRETED
from triton import knobs
assert knobs.runtime.interpret == INTERPRETED
"""
OUTSIDE = """
import torch
import gptkern
from gptkern import ops
from gptkern.testing import Call, check_values

def leaf(*shape):
    return torch.randn(shape).bfloat16().requires_grad_()

layer = leaf(3, 24), leaf(40, 24), leaf(40)
check_values(ops.linear, Call(layer))
check_values(ops.gelu_mlp, Call((*layer, leaf(24, 40), leaf(24))))
check_values(ops.flash_attention, Call((leaf(1, 9, 2, 16), leaf(1, 9, 2, 16), leaf(1, 9, 2, 16))))

torch.manual_seed(0)
sizes = dict(vocab_size=61, n_positions=32, n_layer=1, n_head=2, n_embd=32, initializer_range=0.4)
config = gptkern.GPTConfig(**sizes)
model = gptkern.GPT(config).bfloat16().eval()
prompt = torch.tensor([[5, 9, 33, 12, 7]])
tokens = model.generate(prompt, max_new_tokens=3, do_sample=False)
with gptkern.backend("reference"):
    assert torch.equal(tokens, model.generate(prompt, max_new_tokens=3, do_sample=False)), tokens
"""


def _run(code: str, setting: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": setting}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.ci
def test_bf16_is_right_outside_the_test_suite() -> None:
    """The variable alone, as people set it: the package mends the interpreter."""
    _run(OUTSIDE, "1")


def test_the_variable_is_read_as_triton_reads_it() -> None:
    _run(READ, "True")
