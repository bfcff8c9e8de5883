"""Calls at the edges of every op, drawn by seed: values and gradients beside the reference's."""

from __future__ import annotations

import pytest
import torch
from exact_faults import planted

from gptkern import ops
from gptkern.ops.decode_attention.kernels import attend_split
from gptkern.ops.flash_attention.kernels import hide
from gptkern.ops.linear.kernels import product_tile
from gptkern.testing.shapes import FAMILIES, Trial, check, distant, trial

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy tells of infinities, which are meant
]
FAST, ALL, PART = 50, 1000, 25


@pytest.fixture(autouse=True)
def interpreted(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("strides beyond 2^31 are virtual memory, which a GPU has not")


@pytest.mark.parametrize("seed", range(FAST))
def test_an_edge(seed: int) -> None:
    check(trial(seed))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FAST, ALL, PART))
def test_edges_of_a_night(first: int) -> None:
    """A part of the seeds: whoever was interrupted goes on with -k at the first that is missing."""
    failures = []
    for seed in range(first, first + PART):
        try:
            check(trial(seed))
        except AssertionError as failure:
            failures.append(str(failure))
    assert not failures, "\n".join(failures)


def test_all_public_ops_take_part() -> None:
    elsewhere = {
        *(
            "SamplerState",
            "SamplingParams",
            "sample",
            "sampling_probs",
            "speculative_accept",
            "top_k_logprobs",
        ),
        "backend",
        # Other layouts of flash attention's arguments, and what its tests say of pages.
        *("flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func"),
        *("flash_attn_varlen_func", "flash_attn_with_kvcache"),
    }
    assert set(ops.__all__) - elsewhere == set(FAMILIES)


def test_every_kind_is_drawn() -> None:
    drawn = [trial(seed) for seed in range(ALL)]
    assert {(t.op, t.values) for t in drawn} >= {
        (op, kind) for op in FAMILIES for kind in ("inf", "nan", "low")
    }
    assert {t.op for t in drawn if t.far} == {op for op, family in FAMILIES.items() if family.far}
    assert trial(123) == trial(123)
    assert all(eval(repr(t)) == t for t in drawn)


def test_distant_rows() -> None:
    x = torch.randn(3, 5).half()
    far = distant(x)
    assert torch.equal(far, x)
    assert far.stride(0) * 2 > 2**31


# Masks that are one off, and a finite number in place of -inf. An offset in int32 would end this process.
FAULTS = {
    "a key too many": (hide, "cols < seq_k", "cols <= seq_k", "flash_attention"),
    "an input too few": (product_tile, "offs_k < K - first", "offs_k < K - first - 1", "linear"),
    "a token too few": (attend_split, "(tokens < end)", "(tokens < end - 1)", "decode_attention"),
    "-1e4 for a hidden key": (hide, 'float("-inf")', "-1e4", "flash_attention"),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_planted_faults_are_seen(name: str) -> None:
    kernel, old, new, op = FAULTS[name]
    seeds = range(list(FAMILIES).index(op), 36 * len(FAMILIES), len(FAMILIES))
    with planted(kernel, old, new), pytest.raises(AssertionError, match=r"check\(Trial"):
        for seed in seeds:
            check(trial(seed))


def test_relu_passes_the_gradient_of_nan_on() -> None:
    """As PyTorch has it, and the kernels did not before a trial showed it."""
    pre = torch.tensor([[float("nan"), -1.0, 2.0]], requires_grad=True)
    (right,) = torch.autograd.grad(pre.relu(), pre, torch.ones(1, 3))
    assert right.tolist() == [[1.0, 0.0, 1.0]]
    x, weight = torch.ones(1, 1), torch.tensor([[float("nan")], [-1.0], [2.0]], requires_grad=True)
    (got,) = torch.autograd.grad(ops.linear_act(x, weight, activation="relu"), weight, torch.ones(1, 3))
    assert got.T.tolist() == right.tolist()


def test_nan_stays_nan_without_a_gpu() -> None:
    """PyTorch's attention on a CPU gives 0 where all scores are NaN; a padding row is 0 beside NaN."""
    check(Trial("flash_attention", (2, 1, 1, 2, 1, 24), "float16", "nan", seed=288))
    check(Trial("decode_embed", (2, 1, 128), "float32", "nan", seed=89))


def test_a_trial_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match="op is 'sample'; one of flash_attention, "):
        check(Trial("sample", sizes=(1,)))
    with pytest.raises(ValueError, match="values is 'big'; one of normal, "):
        check(Trial("layer_norm", sizes=(2, 17), values="big"))
