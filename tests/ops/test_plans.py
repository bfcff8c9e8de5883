"""Calls that are checked and laid out once: what they have in common, and what makes another call of one."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch

import gptkern
from gptkern import _native
from gptkern.ops import (
    _launch,
    _without_triton,
    add_layer_norm,
    append_kv,
    decode_attention,
    decode_embed,
    decode_linear,
    decode_qkv,
    flash_attention,
    flash_attention_varlen,
    gated_mlp,
    gelu_mlp,
    layer_norm,
    linear_residual,
    rms_norm,
    rotary,
)
from gptkern.ops._counters import counters
from gptkern.ops._dispatch import call_key
from gptkern.ops._launch import Again, Launch, Plans, launch, observe, repeated
from gptkern.ops._types import HeadNorm, Rotary
from gptkern.ops.layer_norm import op as norm_op

pytestmark = pytest.mark.skipif(_native.extension is None, reason="gptkern._C is not built")
needs_kernels = pytest.mark.usefixtures("on_device")
X, W = torch.randn(4, 64), torch.randn(64)


def test_what_decides_on_a_launch_is_in_the_key() -> None:
    storage = torch.zeros(4 * 64 + 1)
    others = [
        (X.half(), W),
        (X.bfloat16(), W),
        (X[:3], W),
        (X[:, ::2], W),
        (X.t(), W),
        (X.as_strided((4, 64), (0, 1)), W),
        (storage[1:].view(4, 64), W),  # at no multiple of 16 bytes
        (X, None),
        (X, W[:32]),
        (W, X),
    ]
    settings = (1, 2, 1.0, True, None)  # a kernel takes 1 and 1.0 apart, and a check may
    keys = [call_key((X, W)), *map(call_key, others), *(call_key((X, W), value) for value in settings)]
    with gptkern.backend("reference"):
        keys.append(call_key((X, W)))
    assert None not in keys and len(set(keys)) == len(keys)
    assert call_key((torch.zeros(4, 64), torch.nn.Parameter(W))) == keys[0]
    one_row = [torch.zeros(8).as_strided((1, 8), (step, 1)) for step in (8, 3)]
    assert call_key((one_row[0],)) != call_key((one_row[1],))


class OfItsOwn(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "value", [3, "x", X.to("meta"), X.to_sparse(), X.as_subclass(OfItsOwn)], ids=lambda value: type(value)
)
def test_what_is_no_plain_tensor_with_memory_has_no_key(value: Any) -> None:
    assert call_key((X, value)) is None


def test_calls_that_more_decides_on_have_no_key() -> None:
    keys: list[object] = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        keys.append(call_key((x, W)))
        keys.append(call_key((X, W)))
        return x.sum()

    torch.vmap(ask)(X)
    torch.func.grad(ask)(X)
    with torch.autocast("cpu", torch.bfloat16):
        ask(X)
    with observe(lambda launch: True):
        ask(X)
    assert keys == [None] * 8
    ask(X)
    assert None not in keys[8:]


def test_plans_are_bounded_and_go_with_the_launch_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "_MOST_PLANS", 3)
    plans: Plans[int] = Plans()
    assert plans.keep(None, 5) == 5 and plans.get(None) is None
    for number in range(10):
        plans.keep(number, number)
        assert plans.get(number) == number and len(plans._plans) <= 3
    _launch.forget()
    assert plans.get(9) is None


@needs_kernels
def test_a_call_like_one_before_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    check = norm_op.check

    def counted(*args: Any) -> None:
        checked.append(args)
        check(*args)

    monkeypatch.setattr(norm_op, "check", counted)
    _launch.forget()
    x, weight = tensors((4, 64), (64,), seed=0)
    for given in (x.clone().requires_grad_(), x, x * 2):
        assert torch.allclose(
            layer_norm(given, weight), torch.nn.functional.layer_norm(given, (64,), weight), atol=1e-5
        )
    assert len(checked) == 1
    layer_norm(x, weight, eps=1e-6)
    layer_norm(x[:2], weight)
    layer_norm(x, weight, weight)
    assert len(checked) == 4
    for _ in range(2):
        with pytest.raises(ValueError, match="weight has shape"):
            layer_norm(x, weight[:8])
        with pytest.raises(ValueError, match="eps is -1"):
            layer_norm(x, weight, eps=-1.0)


def tensors(*shapes: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _append(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    k_cache, v_cache = cache.clone(), cache.clone()
    append_kv(k, v, k_cache, v_cache, torch.tensor([3, 0]))
    return torch.stack((k_cache, v_cache))


def _packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, same: bool) -> torch.Tensor:
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    return flash_attention_varlen(q, k, v, cu, cu if same else cu.clone(), 3, 3)


def _attend(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
    table, lens = torch.tensor([[1, 0], [2, 3]], dtype=torch.int32), torch.tensor([5, 8], dtype=torch.int32)
    return decode_attention(q, k_cache, v_cache, table, lens)


def _embed(words: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    ids, live = torch.tensor([3, 1]), torch.ones(1, dtype=torch.int32)
    table, lens = torch.arange(4, dtype=torch.int32).view(2, 2), torch.tensor([2, 0], dtype=torch.int32)
    x, slots = decode_embed(ids, live, words, positions, table, lens, 4)
    return torch.cat((x.flatten(), slots, lens))


def _decode(x: torch.Tensor, weight: torch.Tensor, *norm: torch.Tensor) -> torch.Tensor:
    normed = torch.empty_like(x)
    out = decode_linear(x, weight, None, norm=(*norm, 1e-5), normed_out=normed, activation="relu")
    return torch.cat((out.flatten(), normed.flatten()))


def _qkv(x: torch.Tensor, weight: torch.Tensor, cache: torch.Tensor, *heads: torch.Tensor) -> torch.Tensor:
    k_cache, v_cache, (cos, sin, q_weight, k_weight) = cache.clone(), cache.clone(), heads
    lens, slots = torch.tensor([2, 4, 1], dtype=torch.int32), torch.tensor([0, 5, 3])
    q = decode_qkv(
        x, weight, None, k_cache, v_cache, slots,
        rotary=Rotary(cos, sin, lens), head_norm=HeadNorm(q_weight, k_weight, 1e-5),
    )  # fmt: skip
    return torch.cat((q.flatten(), k_cache.flatten(), v_cache.flatten()))


def _rotated(q: torch.Tensor, k: torch.Tensor, *tables: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    q, k = q.clone(), k.clone()
    turned = rotary(q, k, *tables, inplace=inplace)
    assert (turned[0] is q) == (turned[1] is k) == inplace
    return torch.stack(turned)


# The op, the shapes of its tensors.
CALLS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "layer_norm": (layer_norm, [(3, 64), (64,), (64,)]),
    "add_layer_norm": (lambda *t: torch.stack(add_layer_norm(*t)), [(3, 64), (3, 64), (64,), (64,)]),
    "rms_norm": (rms_norm, [(3, 64), (64,)]),
    "linear_residual": (linear_residual, [(3, 64), (32, 64), (32,), (3, 32)]),
    "linear_residual by columns": (
        lambda x, w, b, r: linear_residual(x, w.t(), b, r),
        [(3, 64), (64, 32), (32,), (3, 32)],
    ),
    "gelu_mlp": (gelu_mlp, [(3, 64), (32, 64), (32,), (64, 32), (64,)]),
    "gated_mlp": (lambda *t: gated_mlp(*t[:2], None, t[2], None), [(3, 64), (64, 64), (64, 32)]),
    "decode_linear": (_decode, [(3, 64), (32, 64), (64,), (64,)]),
    "decode_linear in splits": (decode_linear, [(3, 128), (32, 128), (32,)]),
    "decode_qkv": (_qkv, [(3, 64), (64, 64), (2, 4, 1, 16), (9, 8), (9, 8), (16,), (16,)]),
    "decode_attention": (_attend, [(2, 2, 16), (4, 4, 1, 16), (4, 4, 1, 16)]),
    "decode_embed": (_embed, [(8, 32), (16, 32)]),
    "rotary": (_rotated, [(5, 2, 16), (5, 2, 16), (5, 8), (5, 8)]),
    "rotary in place": (lambda *t: _rotated(*t, inplace=True), [(5, 2, 16), (5, 2, 16), (5, 8), (5, 8)]),
    "flash_attention": (flash_attention, [(1, 5, 2, 16)] * 3),
    "flash_attention, packed": (lambda *t: _packed(*t, same=True), [(5, 2, 16)] * 3),
    "flash_attention, lengths twice": (lambda *t: _packed(*t, same=False), [(5, 2, 16)] * 3),
    "append_kv": (_append, [(2, 2, 16), (2, 2, 16), (1, 4, 2, 16)]),
}


@pytest.mark.parametrize("name", CALLS)
@needs_kernels
def test_other_tensors_of_the_same_shapes_give_their_own_results(name: str) -> None:
    op, shapes = CALLS[name]
    first, second = (tensors(*shapes, seed=seed) for seed in (0, 1))
    _launch.forget()
    before = op(*first)
    again = op(*second)
    assert torch.equal(op(*first), before)
    _launch.forget()
    assert torch.equal(op(*second), again)
    assert not torch.equal(before, again)


@pytest.mark.parametrize("name", CALLS)
@needs_kernels
def test_a_call_like_one_before_is_launched_without_working_it_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, shapes = CALLS[name]
    first, second = (tensors(*shapes, seed=seed) for seed in (0, 1))
    _launch.forget()
    op(*first)

    def worked_out(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(_launch, "config", worked_out)
    op(*second)


@needs_kernels
def test_one_tensor_in_two_places_says_nothing_of_two_tensors() -> None:
    x, weight, bias, residual = tensors((3, 64), (64, 64), (64,), (3, 64), seed=0)
    _launch.forget()
    assert torch.equal(linear_residual(x, weight, bias, x), linear_residual(x, weight, bias, x.clone()))
    wanted = linear_residual(x, weight, bias, residual)
    _launch.forget()
    assert torch.equal(linear_residual(x, weight, bias, residual), wanted)
    assert torch.equal(
        linear_residual(x, weight, bias, x), linear_residual(x.clone(), weight, bias, x.clone())
    )


@needs_kernels
def test_values_of_a_call_on_a_cpu_are_checked_each_time(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("a GPU is not asked for values")
    q, k, v, cache = tensors(*[(5, 2, 16)] * 3, (1, 4, 2, 16), seed=0)
    cu, slots = torch.tensor([0, 2, 5], dtype=torch.int32), torch.arange(4)
    flash_attention_varlen(q, k, v, cu, cu, 3, 3)
    append_kv(k[:4], v[:4], cache, cache.clone(), slots)
    cu[1], slots[0] = 6, 4
    with pytest.raises(ValueError, match="cu_seqlens_q is"):
        flash_attention_varlen(q, k, v, cu, cu, 3, 3)
    with pytest.raises(ValueError, match="slots holds 4"):
        append_kv(k[:4], v[:4], cache, cache.clone(), slots)


def test_a_call_is_made_again_by_its_own_launch_and_not_by_another_threads() -> None:
    kernel = _without_triton.NamedKernel(linear_residual)
    x, y = tensors((3, 64), (3, 64), seed=0)
    plans: Plans[Again] = Plans()

    def other() -> None:
        launch(kernel, (1,), y)

    def make() -> None:
        thread = Thread(target=other)
        thread.start()
        thread.join()
        launch(kernel, (2,), x)

    seen: list[tuple[int, ...]] = []
    with observe(lambda item: bool(seen.append((*item.grid, item.args[0].data_ptr())))):
        repeated(plans, "a call", (x,), make)
        repeated(plans, "a call", (y,), lambda: None)
    assert seen == [(1, y.data_ptr()), (2, x.data_ptr()), (2, y.data_ptr())]
    assert _launch._collected == {}


def test_a_launch_of_a_tensor_that_is_not_the_calls_is_worked_out_each_time() -> None:
    kernel = _without_triton.NamedKernel(linear_residual)
    x, inner = tensors((3, 64), (3, 64), seed=0)
    plans: Plans[Again] = Plans()
    with observe(lambda item: False):
        for value in (inner, x.view(torch.int32)):
            repeated(plans, "a call", (x,), lambda value=value: launch(kernel, (1,), x, value))
            assert plans.get("a call") is None
        repeated(plans, "a call", (x,), lambda: launch(kernel, (1,), x, x[:2]))
    assert plans.get("a call") is not None


@needs_kernels
def test_a_bias_that_needs_a_gradient_is_refused_after_one_that_does_not() -> None:
    q, k, v = tensors(*[(1, 5, 2, 16)] * 3, seed=0)
    bias, slopes = torch.zeros(5, 5), torch.ones(2)
    for _ in range(2):
        for options in ({"attn_bias": bias}, {"alibi_slopes": slopes}):
            flash_attention(q, k, v, **options)
            (name, value), *_ = options.items()
            with pytest.raises(ValueError, match=f"{name} requires a gradient"):
                flash_attention(q, k, v, **{name: value.clone().requires_grad_()})


def test_a_launch_again_has_the_other_tensors_and_maps_of_them() -> None:
    x, weight, out = tensors((3, 64), (64, 32), (3, 32), seed=0)
    mapped = _without_triton.TensorDescriptor(weight.t(), [64, 32], [32, 1], [16, 16])
    kernel = _without_triton.NamedKernel(linear_residual)
    made = Launch(kernel, (2,), (x, mapped, None, out, 7), {"num_warps": 4})
    again, others = Again([made], (x, None, weight, out)), [t.clone() for t in (x, weight, out)]
    seen: list[Launch] = []
    with observe(lambda item: bool(seen.append(item))):
        again.launch((others[0], None, others[1], others[2]))
        again.launch((x, None, weight, out))
        launch(kernel, (2,), *made.args, num_warps=4)
    for item, (a, b, c) in zip(seen, (others, (x, weight, out), (x, weight, out)), strict=True):
        assert (item.kernel, item.grid, item.kwargs) == (kernel, (2,), {"num_warps": 4})
        first, tiles, *rest = item.args
        assert (
            first is a and tiles.base.data_ptr() == b.data_ptr() and rest[1] is c and rest[::2] == [None, 7]
        )
        assert type(tiles) is type(mapped)
        assert (tiles.shape, tiles.strides, tiles.block_shape, tiles.padding) == (
            [64, 32],
            [32, 1],
            [16, 16],
            "zero",
        )


def test_results_are_allocated_anew_and_counters_are_the_streams() -> None:
    kernel = _without_triton.NamedKernel(linear_residual)
    x, y = tensors((3, 64), (3, 64), seed=0)
    plans: Plans[Again] = Plans()

    def make() -> tuple[torch.Tensor | None, ...]:
        out, scratch = torch.empty(3, 5), torch.empty(7, dtype=torch.int32)
        launch(kernel, (1,), x, scratch, counters(x.device, 9))
        launch(kernel, (2,), scratch, out)
        return out, None, scratch

    seen: list[Launch] = []
    with observe(lambda item: bool(seen.append(item))):
        first = repeated(plans, "a call", (x,), make)
        again = repeated(plans, "a call", (y,), lambda: pytest.fail("worked out again"))
    assert again[1] is None and again[0].shape == (3, 5) and again[2].dtype == torch.int32
    assert not {t.data_ptr() for t in first[::2]} & {t.data_ptr() for t in again[::2]}
    assert [item.args[-1] is counters(x.device, 9) for item in seen] == [True, False] * 2
    assert (
        seen[2].args[0] is y
        and seen[2].args[1] is seen[3].args[0] is again[2]
        and seen[3].args[1] is again[0]
    )


def test_launches_within_a_call_that_is_noted_are_noted_twice() -> None:
    kernel = _without_triton.NamedKernel(linear_residual)
    x, y = tensors((3, 64), (3, 64), seed=0)
    inner: Plans[Again] = Plans()
    outer: Plans[Again] = Plans()

    def make() -> None:
        launch(kernel, (1,), x)
        repeated(inner, "within", (x,), lambda: launch(kernel, (2,), x))
        launch(kernel, (3,), x)

    seen: list[tuple[int, ...]] = []
    with observe(lambda item: bool(seen.append((*item.grid, item.args[0].data_ptr())))):
        repeated(outer, "a call", (x,), make)
        repeated(outer, "a call", (y,), make)
        repeated(inner, "within", (y,), make)
    grids = [(1, x), (2, x), (3, x), (1, y), (2, y), (3, y), (2, y)]
    assert seen == [(grid, t.data_ptr()) for grid, t in grids]


@needs_kernels
def test_a_layer_that_needs_a_gradient_is_refused_after_one_that_does_not() -> None:
    x, weight = tensors((3, 64), (32, 64), seed=0)
    decode_linear(x, weight)
    with pytest.raises(ValueError, match="requires grad"):
        decode_linear(x, weight.clone().requires_grad_())


@needs_kernels
def test_a_setting_that_may_change_its_value_is_read_each_time() -> None:
    x, *qkv = tensors((3, 64), *[(1, 5, 2, 16)] * 3, seed=0)
    eps, scale, causal = (torch.tensor(value, device="cpu") for value in (1e-5, 0.25, True))

    def calls(eps: Any, scale: Any, causal: Any) -> torch.Tensor:
        return torch.cat(
            [layer_norm(x, eps=eps).flatten(), flash_attention(*qkv, scale=scale, causal=causal).flatten()]
        )

    _launch.forget()
    assert torch.equal(calls(eps, scale, causal), calls(1e-5, 0.25, True))
    for setting, value in ((eps, 4.0), (scale, 2.0), (causal, False)):
        setting.fill_(value)
        assert torch.equal(calls(eps, scale, causal), calls(float(eps), float(scale), bool(causal)))
    assert call_key((X,), eps) is None and call_key((X,), [1]) is None


@needs_kernels
def test_no_scales_at_all_are_not_taken_for_none() -> None:
    k, v, cache = tensors((2, 2, 16), (2, 2, 16), (1, 4, 2, 16), seed=0)
    _launch.forget()
    append_kv(k, v, cache, cache.clone(), torch.tensor([3, 0]))
    with pytest.raises(TypeError, match="k_cache is float32"):
        append_kv(k, v, cache, cache.clone(), torch.tensor([3, 0]), scales=())  # type: ignore[arg-type]
