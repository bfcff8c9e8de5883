"""Attention's kernels for Hopper as they are launched; tests/ptx/ptx_attention_hopper*.py execute them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptkern.ops._launch import Launch, record
from gptkern.ops.flash_attention import flash_attention, flash_attention_varlen

HOPPER, OTHER = "flash_attention_forward_hopper", "flash_attention_forward"
BACKWARD = ["flash_attention_delta", "flash_attention_backward_hopper"]
OTHER_BACKWARD = ["flash_attention_dq", "flash_attention_dkdv"]


def heads(*shape: int, dtype: torch.dtype = torch.bfloat16, room: int | None = None) -> torch.Tensor:
    """A tensor without numbers, whose heads are ``room`` elements apart."""
    whole = torch.empty(*shape[:-1], room or shape[-1], device="meta", dtype=dtype)
    return whole[..., : shape[-1]]


def launched(arch: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Launch:
    with record(arch) as launches:
        flash_attention(q, k, v, **options)
    (launch,) = launches
    return launch


SERVED: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp16": {"dtype": torch.float16},
    "head dim 128": {"dim": 128},
    "one query": {"seq": 1},
    "heads of one tensor": {"room": 3 * 64},
    "window": {"window": 7},
    "not causal": {"causal": False},
}
NOT_SERVED: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "head dim 80": {"dim": 80},
    "soft cap": {"softcap": 5.0},
    "dropout": {"dropout_p": 0.1},
    "slopes": {"alibi_slopes": torch.empty(4, device="meta")},
    "bias": {"attn_bias": torch.empty(40, 40, device="meta", dtype=torch.bfloat16)},
    "heads 130 bytes apart": {"room": 65},
    "values of another head dim": {"v_dim": 128},
}


def _call(arch: int, spec: dict[str, Any]) -> str:
    options = dict(spec)
    dim, seq = options.pop("dim", 64), options.pop("seq", 40)
    dtype, room = options.pop("dtype", torch.bfloat16), options.pop("room", None)
    v_dim = options.pop("v_dim", dim)
    q, k = (heads(2, length, 4, dim, dtype=dtype, room=room) for length in (seq, 40))
    return launched(arch, q, k, heads(2, 40, 4, v_dim, dtype=dtype, room=room), **options).name


@pytest.mark.parametrize("spec", SERVED.values(), ids=SERVED)
def test_calls_that_it_serves(spec: dict[str, Any]) -> None:
    assert [_call(arch, spec) for arch in (80, 90, 100)] == [OTHER, HOPPER, OTHER]


@pytest.mark.parametrize("spec", NOT_SERVED.values(), ids=NOT_SERVED)
def test_calls_that_it_leaves_to_the_other_kernel(spec: dict[str, Any]) -> None:
    assert _call(90, spec) == OTHER


def test_no_keys_are_left_to_the_other_kernel() -> None:
    assert launched(90, heads(1, 5, 2, 64), heads(1, 0, 2, 64), heads(1, 0, 2, 64)).name == OTHER


def test_queries_expanded_over_the_batch_are_left_to_the_other_kernel() -> None:
    q = heads(1, 40, 2, 64).expand(3, -1, -1, -1)
    assert launched(90, q, heads(3, 40, 2, 64), heads(3, 40, 2, 64)).name == OTHER


def test_the_grid_has_a_program_for_each_multiprocessor() -> None:
    few, many = (launched(90, *(heads(batch, 300, 2, 64) for _ in range(3))) for batch in (3, 40))
    assert (few.grid, many.grid) == ((18,), (132,))  # an H100's, where no GPU is asked
    section, blocks, total, programs = many.args[-4:]
    assert (blocks, total, programs) == (3, 240, 132)
    # Keys and values of 300 x 64 in two bytes: so many heads in 16 MB.
    assert section == (16 << 20) // (2 * 300 * 64 * 2)


def test_sections_hold_whole_groups_of_heads() -> None:
    launch = launched(90, heads(1, 9, 8, 128), *(heads(1, 1 << 17, 2, 128) for _ in range(2)))
    assert launch.args[-4] == 4


def test_packed_sequences_are_one_batch_of_tokens() -> None:
    starts = torch.empty(4, dtype=torch.int32, device="meta")
    with record(90) as launches:
        flash_attention_varlen(
            heads(500, 4, 64), *(heads(600, 2, 64) for _ in range(2)), starts, starts, 200, 300
        )
    launch, outside = launches
    assert (outside.name, outside.grid) == ("flash_attention_outside", (8,))  # 64 tokens each
    q, k = launch.args[:2]
    assert (launch.name, q.shape, k.shape) == (HOPPER, [1, 500, 4, 64], [1, 600, 2, 64])
    assert (q.block_shape, k.block_shape) == ([1, 64, 1, 64], [1, 128, 1, 64])
    assert launch.grid == (3 * 4 * 2,)


# --- backward


def differentiated(arch: int, do: torch.Tensor, *qkv: torch.Tensor, **options: Any) -> list[Launch]:
    """The launches of backward."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    with record(arch) as launches:
        out = flash_attention(*leaves, **options)
        del launches[:]
        torch.autograd.grad(out, leaves, do)
    return launches


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dim", [64, 128])
def test_backward_has_kernels_for_hopper(arch: int, dim: int) -> None:
    found = differentiated(arch, *(heads(2, 40, 4, dim) for _ in range(4)))
    assert [launch.name for launch in found] == (BACKWARD if arch == 90 else OTHER_BACKWARD)


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"dropout_p": 0.1}], ids=str)
def test_backward_of_other_calls_has_the_other_kernels(options: dict[str, Any]) -> None:
    found = differentiated(90, *(heads(2, 40, 4, 64) for _ in range(4)), **options)
    assert [launch.name for launch in found] == OTHER_BACKWARD


def test_backward_waits_between_programs_in_a_cooperative_launch() -> None:
    delta, main = differentiated(90, *(heads(40, 300, 2, 64) for _ in range(4)))
    assert main.kwargs["launch_cooperative_grid"] and "launch_cooperative_grid" not in delta.kwargs
    # 128 queries a program before, a program for each multiprocessor of an H100.
    assert (delta.grid, main.grid) == ((3 * 2 * 40,), (132,))
    section, blocks, total, programs, padded = main.args[-5:]
    assert (blocks, total, programs, padded) == (3, 240, 132, 384)
    # Keys, values, queries and their gradients in two bytes, sums of dq in four.
    assert section == (16 << 20) // (300 * 64 * (4 * 2 + 4))


def test_an_expanded_gradient_is_copied_for_the_copy_engine() -> None:
    qkv = [heads(2, 40, 4, 64) for _ in range(3)]
    do = torch.empty((), device="meta", dtype=torch.bfloat16).expand(2, 40, 4, 64)
    _delta, main = differentiated(90, do, *qkv)
    assert main.args[3].base.is_contiguous()


def test_rows_of_packed_queries_have_room_for_every_sequence() -> None:
    starts = torch.empty(4, dtype=torch.int32, device="meta")
    leaves = [heads(rows, n, 128).requires_grad_() for rows, n in ((500, 4), (600, 2), (600, 2))]
    with record(90) as launches:
        out = flash_attention_varlen(*leaves, starts, starts, 200, 300)
        torch.autograd.grad(out, leaves, heads(500, 4, 128))
    _forward, _outside, delta, main, *_outside_of_gradients = launches
    # 64 queries each at a head dimension of 128: of 500 tokens 8, and one a sequence.
    stats, turns, sums = main.args[7:10]
    assert (stats.numel(), turns.numel(), sums.shape) == (4 * 11 * 128, 4 * 11, (4 * 11 * 64, 128))
    assert delta.grid == (4 * 4 * 3,) and main.grid == (3 * 2 * 3,)
