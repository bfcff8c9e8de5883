"""Attention's kernel for Hopper as it is launched; tests/ptx/test_ptx_attention_hopper.py executes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptkern.ops._launch import Launch, record
from gptkern.ops.flash_attention import flash_attention, flash_attention_varlen

HOPPER, OTHER = "flash_attention_forward_hopper", "flash_attention_forward"


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
    (launch,) = launches
    q, k = launch.args[:2]
    assert (launch.name, q.shape, k.shape) == (HOPPER, [1, 500, 4, 64], [1, 600, 2, 64])
    assert (q.block_shape, k.block_shape) == ([1, 64, 1, 64], [1, 128, 1, 64])
    assert launch.grid == (3 * 4 * 2,)
