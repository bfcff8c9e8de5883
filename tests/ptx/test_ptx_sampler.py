"""The CUDA sampler's machine code draws the CPU sampler's tokens, bit for bit; arithmetic of float64."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import cuda_sampler
import numpy as np
import ptx_forms
import pytest
import torch
from ptx_support import unary

from gptkern._native import COMMIT, KEEP_STATE
from gptkern.ops import SamplerState, SamplingParams
from gptkern.ops.sample import launch
from gptkern.ops.sample.launch import Drafts, Outputs
from gptkern.testing.ptx import Fault, double
from gptkern.testing.ptx.parse import parse

VOCAB, ROWS = 211, 2


# --- instructions that nvcc emits and Triton does not


def numbers(generator: np.random.Generator, scale: int) -> Any:
    exponents = generator.integers(-scale, scale, 4000).astype(np.float64)
    return generator.uniform(-2, 2, 4000) * 2.0**exponents


@pytest.mark.parametrize("scale", [3, 60, 500])
def test_products_of_float64_are_fused_and_rounded_once(scale: int) -> None:
    """Random operands, and addends that cancel the product but for its last bits."""
    generator = np.random.default_rng(scale)
    a, b, c = (numbers(generator, scale) for _ in range(3))
    c[::2] = -a[::2] * b[::2] * generator.choice([1, 1 + 2**-52, 1 - 2**-50, 2**-53], 2000)
    found = double.fma(a, b, c)
    for x, y, z, result in zip(a, b, c, found, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        if abs(exact) < Fraction(2) ** 1024 and exact != 0:
            assert result == exact.numerator / exact.denominator, (x, y, z)
    assert np.any(found != a * b + c)


def test_products_of_float64_at_the_edges() -> None:
    inf, nan, tiny = np.inf, np.nan, 5e-324
    a = np.array([inf, 0.0, nan, 1e308, tiny, 1e-200, -0.0, 2.0**-537])
    b = np.array([2.0, inf, 1.0, 10.0, 0.5, 1e-200, 1.0, 2.0**-538])
    c = np.array([-1.0, 1.0, 1.0, -inf, tiny, 0.0, 0.0, 0.0])
    found = double.fma(a, b, c)
    # The last is half of the least number: between two, the even one.
    np.testing.assert_array_equal(found, [inf, nan, nan, -inf, 2 * tiny, 0.0, 0.0, 0.0])


DOUBLES = torch.tensor(
    [0.0, 1.0, -1.0, 0.5, 3.0, 1e300, -1e300, 2.5, -2.5, 1e19, -1e19, 9e18, 4294967295.5, 1e-300, 7.25, -0.75]
    * 2,
    dtype=torch.float64,
)


def clamped(value: float, least: int, most: int) -> int:
    return max(least, min(most, int(value)))


@pytest.mark.parametrize(
    ("instruction", "result", "expected"),
    [
        ("cvt.rzi.u64.f64 OUT, IN", torch.int64, lambda x: clamped(x, 0, 2**64 - 1)),
        ("cvt.rzi.s64.f64 OUT, IN", torch.int64, lambda x: clamped(x, -(2**63), 2**63 - 1)),
        ("cvt.rzi.s32.f64 OUT, IN", torch.int32, lambda x: clamped(x, -(2**31), 2**31 - 1)),
        ("cvt.rni.s32.f64 OUT, IN", torch.int32, lambda x: clamped(round(x), -(2**31), 2**31 - 1)),
        ("mul.rn.f64 OUT, IN, 0d4008000000000000", torch.float64, lambda x: x * 3),
        ("div.rn.f64 OUT, IN, 0d4008000000000000", torch.float64, lambda x: x / 3),
        ("min.f64 OUT, IN, 0d4008000000000000", torch.float64, lambda x: min(x, 3.0)),
    ],
)
def test_instructions_of_float64(
    instruction: str, result: torch.dtype, expected: Callable[[float], Any]
) -> None:
    found = unary(instruction, DOUBLES, result).tolist()
    wanted = [expected(value) for value in DOUBLES.tolist()]
    unsigned = ".u64" in instruction
    assert found == [value - 2**64 if unsigned and value >= 2**63 else value for value in wanted]


def test_the_rough_reciprocal_has_half_of_the_bits() -> None:
    values = torch.tensor(
        [1.0, -2.0, 3.0, 1e300, 0.7, 2.0**-1030, np.inf, 1 + 2**-40] * 4, dtype=torch.float64
    )
    found = unary("rcp.approx.ftz.f64 OUT, IN", values, torch.float64)
    assert torch.all(found.view(torch.int64) & 0xFFFFFFFF == 0)
    assert found.tolist()[0] == 1.0 and found.tolist()[5] == np.inf and found.tolist()[6] == 0.0
    rest = torch.tensor([1, 2, 3, 4, 7])
    torch.testing.assert_close(
        found[rest] * values[rest], torch.ones(5, dtype=torch.float64), rtol=2**-19, atol=0
    )


WIDE = [0, 1, 2**32, 2**63, 2**64 - 1, 0x123456789ABCDEF0, 3, 2**33 + 5]


@pytest.mark.parametrize("factor", [3, 0xFEDCBA9876543210, 2**64 - 1])
def test_the_upper_half_of_wide_products(factor: int) -> None:
    signed = [value - 2**64 if value >= 2**63 else value for value in WIDE * 4]
    values = torch.tensor(signed, dtype=torch.int64)
    found = unary(f"mul.hi.u64 OUT, IN, {factor}", values, torch.int64).tolist()
    assert [value % 2**64 for value in found] == [value * factor >> 64 for value in WIDE * 4]
    other = factor - 2**64 if factor >= 2**63 else factor
    found = unary(f"mul.hi.s64 OUT, IN, {other}", values, torch.int64).tolist()
    assert found == [value * other >> 64 for value in signed]


# --- the sampler

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """The sampler's PTX by architecture, compiled once."""
    folder, found = tmp_path_factory.mktemp("sampler"), dict[int, str]()

    def text(arch: int) -> str:
        if arch not in found:
            found[arch] = cuda_sampler.compiled(arch, folder)
        return found[arch]

    return text


def equal(found: Outputs, expected: Outputs) -> None:
    for name, tensor in vars(expected).items():
        if tensor is not None:
            assert torch.equal(getattr(found, name), tensor), name


def draws(
    ptx: str,
    blocks: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    few: int | None = None,
    spread: float = 3.0,
    history: bool = False,
    masked: bool = False,
    vocab: int = VOCAB,
    rows: int = ROWS,
    clusters: int | None = None,
    **options: Any,
) -> None:
    """Two draws, on the CPU and by the machine code, among the first ``few`` tokens: results are equal."""
    torch.manual_seed(seed)
    if masked:
        options["bitmask"] = torch.randint(-(2**31), 2**31, (rows, -(-vocab // 32)), dtype=torch.int32)
    params = SamplingParams.make(rows, vocab, **options)
    ours, theirs = (SamplerState.make(rows, vocab, seed=5, history=history) for _ in range(2))
    for step in range(2):
        logits = (torch.randn(rows, vocab) * spread).to(dtype)
        if few is not None:
            logits[:, few:] = -torch.inf
        expected, found = (launch.sample_outputs(logits, params.max_logprobs) for _ in range(2))
        assert launch.sample(logits, params, theirs, expected, COMMIT) == -1
        cuda_sampler.sample(ptx, logits, params, ours, found, blocks=blocks, clusters=clusters, seed=step)
        equal(found, expected)
        assert torch.equal(ours.counters, theirs.counters)
        if ours.counts is not None and theirs.counts is not None:
            assert torch.equal(ours.counts, theirs.counts)


# One block a row before sm_90; there 1, 2, 4 or 8 share it.
TEAMS = [(80, 1), (90, 1), (90, 2), (90, 8)]
ONE_IN_CI = [*TEAMS[:2], pytest.param(*TEAMS[2], marks=pytest.mark.ci), TEAMS[3]]
LISTED: dict[str, Any] = {
    "logit_bias": [{3: 4.0, 60: 1.0}, {5: -1.0, 210: 9.0}],
    "banned": [[1, 2, *range(20, 61)], [3]],  # more than a warp's, the last one biased as well
    "eos_token_id": 4,
    "min_new_tokens": 2,
}
PENALISED = {"history": True, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"top_k": 7, "top_p": 0.75},
    {"min_p": 0.1, "dtype": torch.bfloat16},
    {"typical_p": 0.5, "top_k": 30},
    {"epsilon_cutoff": 0.01, "dtype": torch.float16},
    {"eta_cutoff": 0.05},
    {"n_logprobs": 5, "few": 3},
    {"n_logprobs": 200, "few": 150},
    {"top_k": 50, "spread": 0.0},
    {"top_k": 20, "min_p": 0.1, "dtype": torch.bfloat16},
    {"top_k": 20, "few": 3},
    {"top_k": 150, "top_p": 0.9},
    {"top_k": 7, "top_p": 0.75, "history": True},
    {"temperature": 0.0, "history": True},
    PENALISED,
    {**LISTED, "n_logprobs": 5},
    {**LISTED, **PENALISED, "masked": True, "top_p": 0.9},
    {**LISTED, **PENALISED, "masked": True, "top_p": 0.9, "top_k": 7},
    {**LISTED, "temperature": 0.0, "dtype": torch.float16},
    {**PENALISED, "masked": True, "top_k": 7, "dtype": torch.bfloat16},
    {**PENALISED, "n_logprobs": 5, "dtype": torch.bfloat16},
]


@needs_nvcc
@pytest.mark.slow
@pytest.mark.ci
def test_a_cluster_draws_the_cpus_tokens(texts: Callable[[int], str]) -> None:
    draws(texts(90), 2, top_k=7, top_p=0.75)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.ci)])
def test_every_form_of_its_instructions_has_an_answer(texts: Callable[[int], str], arch: int) -> None:
    kernels = ("sample_kernel", "draw_kernel", "speculate_kernel", "top_k_kernel", "commit_kernel")
    programs = [parse(texts(arch), kernel) for kernel in kernels]
    forms = {instruction.opcode for program in programs for instruction in program.instructions}
    assert len(forms) > 100 and forms - ptx_forms.known() == set()


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "blocks"), TEAMS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "plain")
def test_every_option_draws_the_cpus_tokens(
    texts: Callable[[int], str], arch: int, blocks: int, options: dict[str, Any]
) -> None:
    draws(texts(arch), blocks, **options)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "blocks"), TEAMS)
@pytest.mark.parametrize("options", [{"top_k": 5}, {"temperature": 0.0}, {}], ids=str)
def test_rows_that_cannot_be_drawn_have_the_cpus_status(
    texts: Callable[[int], str], arch: int, blocks: int, options: dict[str, Any]
) -> None:
    torch.manual_seed(3)
    logits = torch.randn(4, VOCAB)
    logits[0, 150], logits[1, 3], logits[2] = torch.nan, torch.inf, -torch.inf
    params = SamplingParams.make(4, VOCAB, **options)
    expected, found = (launch.sample_outputs(logits, None) for _ in range(2))
    launch.sample(logits, params, SamplerState.make(4, VOCAB, seed=5), expected, COMMIT)
    state = SamplerState.make(4, VOCAB, seed=5)
    cuda_sampler.sample(texts(arch), logits, params, state, found, blocks=blocks)
    equal(found, expected)
    assert found.status.tolist()[3] == 0 and state.counters[:, 2].tolist() == [0, 0, 0, 1]


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "blocks"), [(80, 1), (90, 2)])
@pytest.mark.parametrize("options", [{"top_k": 5}, {}], ids=str)
def test_an_id_outside_the_vocabulary_is_the_cpus_status(
    texts: Callable[[int], str], arch: int, blocks: int, options: dict[str, Any]
) -> None:
    refuses_an_id(texts(arch), blocks, **options)


def refuses_an_id(ptx: str, blocks: int, **options: Any) -> None:
    """Two rows, the first with an id outside the vocabulary: the CPU's status, and a draw of the second."""
    logits = torch.randn(2, VOCAB)
    params = SamplingParams.make(2, VOCAB, banned=list(range(40)), **options)
    assert params.banned_ids is not None
    params.banned_ids[0, 39] = VOCAB  # another warp's than the first id
    expected, found = (launch.sample_outputs(logits, None) for _ in range(2))
    assert launch.sample(logits, params, SamplerState.make(2, VOCAB, seed=5), expected, COMMIT) == 0
    state = SamplerState.make(2, VOCAB, seed=5)
    cuda_sampler.sample(ptx, logits, params, state, found, blocks=blocks)
    equal(found, expected)
    assert state.counters[:, 2].tolist() == [0, 1]


# Rows of every kind, which few clusters take one after another.
IN_TURN: dict[str, Any] = {
    "rows": 5,
    "clusters": 2,
    "temperature": [1.0, 0.7, 1.0, 0.0, 0.0],
    "top_k": [7, 0, 150, 0, 20],
    "top_p": [0.75, 0.9, 1.0, 1.0, 0.9],
    "min_p": [0.0, 0.0, 0.05, 0.0, 0.0],
}
PENALISED_IN_TURN = {
    "history": True,
    "masked": True,
    "repetition_penalty": [1.3, 1.0, 1.3, 1.0, 1.0],
    "frequency_penalty": [0.0, 0.2, 0.0, 0.0, 0.2],
    "banned": [[3, 7], [], list(range(50)), [], [0]],
}


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "blocks"), ONE_IN_CI)
@pytest.mark.parametrize(
    "options",
    [
        IN_TURN,
        IN_TURN | PENALISED_IN_TURN,
        IN_TURN | PENALISED_IN_TURN | {"n_logprobs": [5, 0, 3, 5, 1], "dtype": torch.bfloat16},
    ],
    ids=["plain", "edited", "scored"],
)
def test_clusters_take_rows_in_turn(
    texts: Callable[[int], str], arch: int, blocks: int, options: dict[str, Any]
) -> None:
    draws(texts(arch), blocks, **options)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 2, "dtype": torch.bfloat16},
        {"temperature": 0.0},
        {"top_p": 0.5, "n_logprobs": 1, "dtype": torch.float16},
        {"top_k": 1, "history": True, "repetition_penalty": 2.0},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_few_tokens_leave_blocks_without_a_part(
    texts: Callable[[int], str], blocks: int, options: dict[str, Any]
) -> None:
    for vocab in (2, 3, 9, 33):
        draws(texts(90), blocks, vocab=vocab, **options)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "blocks"), TEAMS)
@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.9}, {"top_k": 20, "dtype": torch.bfloat16}, {"temperature": 0.0}, LISTED | PENALISED],
    ids=lambda options: " ".join(options),
)
def test_distributions_are_the_cpus(
    texts: Callable[[int], str], arch: int, blocks: int, options: dict[str, Any]
) -> None:
    """Written and not drawn from. A row that cannot be is all 0; the state does not change."""
    torch.manual_seed(6)
    options = dict(options)
    dtype, history = options.pop("dtype", torch.float32), options.pop("history", False)
    logits = (torch.randn(ROWS, VOCAB) * 3).to(dtype)
    logits[1, 100] = torch.nan
    params = SamplingParams.make(ROWS, VOCAB, **options)
    state = SamplerState.make(ROWS, VOCAB, seed=5, history=history)
    if state.counts is not None:
        state.counts.copy_(torch.randint(0, 3, state.counts.shape))
    before = state.counters.clone()
    expected, found = (launch.probs_outputs(logits) for _ in range(2))
    assert launch.sample(logits, params, state, expected, KEEP_STATE) == 1
    cuda_sampler.sample(texts(arch), logits, params, state, found, blocks=blocks, commit=KEEP_STATE)
    equal(found, expected)
    assert found.probs is not None and found.probs[1].count_nonzero() == 0
    assert torch.equal(state.counters, before)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("options", [{"top_k": 7}, {"top_p": 0.9}], ids=str)
def test_a_draw_may_leave_the_state(texts: Callable[[int], str], options: dict[str, Any]) -> None:
    torch.manual_seed(7)
    logits, params = torch.randn(ROWS, VOCAB), SamplingParams.make(ROWS, VOCAB, **options)
    ours, theirs = (SamplerState.make(ROWS, VOCAB, seed=5, history=True) for _ in range(2))
    expected, found = (launch.sample_outputs(logits, None) for _ in range(2))
    assert launch.sample(logits, params, theirs, expected, KEEP_STATE) == -1
    cuda_sampler.sample(texts(90), logits, params, ours, found, blocks=2, commit=KEEP_STATE)
    equal(found, expected)
    assert ours.counts is not None
    assert ours.counters[:, 2].tolist() == [0, 0] and ours.counts.count_nonzero() == 0


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_a_state_advances_after_a_look_at_statuses(texts: Callable[[int], str], arch: int) -> None:
    """Rows that were drawn advance by their token, rows with drafts by as many as were accepted."""
    rows, vocab = cuda_sampler.COMMITTERS + 2, 5
    torch.manual_seed(8)
    params = SamplingParams.make(rows, vocab)
    for positions in (1, 3):
        logits = torch.randn(rows, positions, vocab) if positions > 1 else torch.randn(rows, vocab)
        outputs = launch.accept_outputs(logits) if positions > 1 else launch.sample_outputs(logits, None)
        assert outputs.tokens is not None
        outputs.tokens.random_(vocab)
        outputs.status.zero_()
        outputs.status[[0, rows - 1]] = 1
        taken = torch.ones(rows, dtype=torch.int64)
        if outputs.accepted is not None:
            outputs.accepted.random_(positions)
            taken += outputs.accepted
        taken[outputs.status != 0] = 0
        state = SamplerState.make(rows, vocab, seed=5, history=True)
        cuda_sampler.commit_only(texts(arch), logits, params, state, outputs)
        assert state.counts is not None
        assert torch.equal(state.counters[:, 2], taken)
        there = torch.arange(positions) < taken[:, None]
        counts = torch.zeros(rows, vocab, dtype=torch.int32)
        counts.scatter_add_(1, outputs.tokens.view(rows, positions), there.int())
        assert torch.equal(state.counts, counts)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("blocks", "options"),
    [
        (1, {"temperature": 0.0, "dtype": torch.float16}),
        (8, {"temperature": 0.0, "dtype": torch.bfloat16}),
        (8, {"dtype": torch.bfloat16}),
        (8, {"top_k": 50, "top_p": 0.9, "dtype": torch.bfloat16}),
        (8, {"top_k": 128}),
        (8, {"top_k": 1000, "top_p": 0.95, "dtype": torch.bfloat16}),
        (8, {"top_p": 0.9, "temperature": 0.7}),
        (8, {"min_p": 0.05, "dtype": torch.float16}),
        (8, {"typical_p": 0.9, "top_k": 200, "dtype": torch.bfloat16}),
        (8, {"top_k": 50, "top_p": 0.9, "n_logprobs": 20, "dtype": torch.bfloat16}),
        (8, {"top_k": 50, "top_p": 0.9, **PENALISED, **LISTED, "masked": True, "dtype": torch.bfloat16}),
        (8, {"top_p": 0.9, **PENALISED, **LISTED, "n_logprobs": 5}),
        (8, {"top_k": 50, "spread": 0.0}),
    ],
    ids=lambda value: " ".join(value) or "plain" if isinstance(value, dict) else str(value),
)
def test_gpt2s_vocabulary(texts: Callable[[int], str], blocks: int, options: dict[str, Any]) -> None:
    """Rows begin between multiples of 16 bytes; a part is longer than its threads ask for at once."""
    draws(texts(90), blocks, vocab=50257, seed=4, **options)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("options", "meetings"),
    [
        ({"top_k": 50, "top_p": 0.9}, 2),
        ({"temperature": 0.0}, 2),
        ({"top_p": 0.9}, 13),
        ({"top_k": 150}, 9),
        ({"top_k": 50, "top_p": 0.9, **PENALISED, **LISTED}, 2),
        ({"top_k": 150, **PENALISED}, 9),
        ({"typical_p": 0.9}, 13),
        ({"eta_cutoff": 0.1}, 9),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else str(value),
)
def test_a_cluster_meets_seldom(texts: Callable[[int], str], options: dict[str, Any], meetings: int) -> None:
    """Barriers of the cluster that a row takes. Blocks that have no row more do not meet again."""
    blocks, met = 2, cuda_sampler.Meetings()
    logits = torch.randn(1, VOCAB)
    history = "history" in options
    options = {
        name: value[:1] if name in ("logit_bias", "banned") else value for name, value in options.items()
    }
    options.pop("history", None)
    params = SamplingParams.make(1, VOCAB, **options)
    state = SamplerState.make(1, VOCAB, seed=5, history=history)
    outputs = launch.sample_outputs(logits, None)
    cuda_sampler.sample(texts(90), logits, params, state, outputs, blocks=blocks, counters=met)
    assert met.of_cluster / (blocks * cuda_sampler.THREADS // 32) == meetings


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("blocks", "orders"), [(2, 50), (4, 50), (8, 50), pytest.param(8, 3, marks=pytest.mark.ci)]
)
def test_orders_of_a_clusters_blocks(texts: Callable[[int], str], blocks: int, orders: int) -> None:
    torch.manual_seed(0)
    params, logits = SamplingParams.make(ROWS, VOCAB, top_k=20, top_p=0.9), torch.randn(ROWS, VOCAB) * 3
    expected = launch.sample_outputs(logits, params.max_logprobs)
    assert launch.sample(logits, params, SamplerState.make(ROWS, VOCAB, seed=5), expected, COMMIT) == -1
    for seed in range(orders):
        found, state = (
            launch.sample_outputs(logits, params.max_logprobs),
            SamplerState.make(ROWS, VOCAB, seed=5),
        )
        cuda_sampler.sample(texts(90), logits, params, state, found, blocks=blocks, seed=seed)
        equal(found, expected)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "blocks"), TEAMS)
@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 50},
        {"temperature": 0.0, "dtype": torch.bfloat16},
        {"top_p": 0.9, **PENALISED, **LISTED, "masked": True, "dtype": torch.float16},
    ],
    ids=lambda options: " ".join(options),
)
def test_drafts_are_verified_alike(
    texts: Callable[[int], str], arch: int, blocks: int, certain: bool, options: dict[str, Any]
) -> None:
    verifies(texts(arch), blocks, certain, **options)


def verifies(
    ptx: str,
    blocks: int,
    certain: bool,
    dtype: torch.dtype = torch.float32,
    history: bool = False,
    masked: bool = False,
    clusters: int | None = None,
    **options: Any,
) -> None:
    """Drafts of two rows, the first of likely tokens, verified twice: results are equal."""
    torch.manual_seed(1)
    drafted = 2
    if masked:
        options["bitmask"] = torch.randint(-(2**31), 2**31, (ROWS, -(-VOCAB // 32)), dtype=torch.int32)
    params = SamplingParams.make(ROWS, VOCAB, **options)
    ours, theirs = (SamplerState.make(ROWS, VOCAB, seed=5, history=history) for _ in range(2))
    for step in range(2):
        logits = torch.randn(ROWS, drafted + 1, VOCAB).to(dtype)
        probs = None if certain else torch.softmax(torch.randn(ROWS, drafted, VOCAB), dim=-1)
        tokens = torch.randint(VOCAB, (ROWS, drafted))
        tokens[0] = logits[0, :drafted].argmax(-1)
        drafts = Drafts(tokens, probs, torch.tensor([2, 1]))
        expected, found = (launch.accept_outputs(logits) for _ in range(2))
        assert launch.sample(logits, params, theirs, expected, COMMIT, drafts) == -1
        cuda_sampler.sample(
            ptx, logits, params, ours, found, drafts, blocks=blocks, clusters=clusters, seed=step
        )
        equal(found, expected)
        assert torch.equal(ours.counters, theirs.counters)
        if ours.counts is not None and theirs.counts is not None:
            assert torch.equal(ours.counts, theirs.counts)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "blocks"), ONE_IN_CI)
def test_a_cluster_verifies_drafts_of_rows_in_turn(
    texts: Callable[[int], str], arch: int, blocks: int
) -> None:
    verifies(texts(arch), blocks, certain=False, clusters=1, top_p=[0.9, 1.0], **PENALISED)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "blocks"), ONE_IN_CI)
@pytest.mark.parametrize(("vocab", "k", "dtype"), [(VOCAB, 9, torch.float32), (5, 5, torch.bfloat16)])
def test_the_most_likely_tokens_are_the_cpus(
    texts: Callable[[int], str], arch: int, blocks: int, vocab: int, k: int, dtype: torch.dtype
) -> None:
    """One row a cluster, and rows that one cluster takes in turn."""
    torch.manual_seed(2)
    logits = torch.randn(ROWS, vocab).round(decimals=1).to(dtype)  # with ties
    expected = launch.top_k_outputs(logits, k)
    assert launch.top_k(logits, k, expected) == -1
    for clusters in (ROWS, 1):
        found = launch.top_k_outputs(logits, k)
        cuda_sampler.top_k(texts(arch), logits, k, found, blocks=blocks, clusters=clusters)
        equal(found, expected)


# --- faults planted in its source

TEAM, FEW, EDITS = "cuda_team.cuh", "few_tokens.cuh", "edits.h"
# What is wrong: a file, a line, and the barrier behind it that is taken away.
BARRIERS = {
    "no meeting at the end of a row": (TEAM, "void sync() {", "cluster_sync();"),
    "a sum is read before all have written it": (
        TEAM,
        "((memory_.partial[turn_][i++] = numbers.value), ...);",
        "cluster_sync();",
    ),
    "warps' sums are combined too early": (
        TEAM,
        "((memory_.of_warps[i++][warp] = numbers.value), ...);",
        "__syncthreads();",
    ),
    "sums before a thread are added up too early": (
        TEAM,
        "memory.of_warps[0][warp] = through;",
        "__syncthreads();",
    ),
    "a part is read before it is known": (
        TEAM,
        "memory_.part = RowPart(logits, n, rank(), blocks());",
        "__syncthreads();",
    ),
    "a row is read before it is rewritten": (TEAM, "void sync_after_rewrite() {", "__syncthreads();"),
    "an id outside is counted too early": (TEAM, "memory_.outside = 0;", "__syncthreads();"),
    "ids outside are added up too early": (TEAM, "atomicAdd(&memory_.outside, 1u);", "__syncthreads();"),
    "listed ids are edited before the row": (EDITS, "if (is_listed(row)) {", "team.sync_here();"),
    "ids are banned before they are biased": (EDITS, "id);\n        });", "team.sync_here();"),
    "an edited part is sought too early": (FEW, "memory_.part = part_;", "__syncthreads();"),
    "bins are added up before all have counted": (TEAM, "find_bin(uint64_t target) {", "cluster_sync();"),
    "a crossing is read before it is written": (TEAM, "find_combined_bin(target);", "cluster_sync();"),
    "bins are counted before they are cleared": (TEAM, "memory_.bins[i] = 0;", "__syncthreads();"),
    "a list is added to before it is empty": (TEAM, "memory_.list_length = 0;", "cluster_sync();"),
    "a list is read before it is closed": (TEAM, "void close_list() {", "cluster_sync();"),
    "a selection is read before it is made": (
        TEAM,
        "memory_.selection = selection;\n        }",
        "cluster_sync();",
    ),
    "digits are added before they are cleared": (
        TEAM,
        "memory_.digit_counts[i] = 0;\n        }",
        "__syncthreads();",
    ),
    "a digit is sought before all are counted": (TEAM, "find_digit(uint64_t target) {", "__syncthreads();"),
    "a digit is read before it is written": (
        TEAM,
        "memory_.digit_counts[i]};\n        }",
        "__syncthreads();",
    ),
    "an id is read before it is published": (TEAM, "published() const {", "__syncthreads();"),
    "one place for all sums": (TEAM, "", "turn_ ^= 1;"),
    "a block need not have begun": (FEW, "", "cluster_wait();"),
    "runs are merged before all are there": (FEW, "memory_of(memory_, 0).few, rank);", "cluster_sync();"),
    "tokens are drawn before they are merged": (FEW, "count = merge();", "__syncthreads();"),
    "a part's largest is sought too early": (FEW, "= inverted_low;\n        }", "__syncthreads();"),
    "one token is given before it is written": (FEW, "few_.found[0] = best;", "__syncthreads();"),
    "counts are added up too early": (FEW, "lane = threadIdx.x % 32;", "__syncthreads();"),
    "sums of warps are read too early": (FEW, "few_.sums[warp] = through;", "__syncthreads();"),
    "the last bin is read too early": (FEW, "few_.last = kCoarseBins - 1;", "__syncthreads();"),
    "a list is sorted before it is whole": (
        FEW,
        "list(entry_of(id, value(id)));\n            }\n        });",
        "__syncthreads();",
    ),
    "an exact list begins before the other has ended": (FEW, "few_.length = 0;", "__syncthreads();"),
    "an exact list is sorted before it is whole": (
        FEW,
        "if (entry >= least) list(entry);\n        }",
        "__syncthreads();",
    ),
}


def planted(fault: str, source: Path) -> None:
    """Plant a fault in the source."""
    name, line, barrier = BARRIERS[fault]
    file = source / "sampling" / name
    pattern = re.escape(line) + r"\s*" + re.escape(barrier)
    changed, count = re.subn(pattern, lambda _: line, file.read_text())
    assert count == 1
    if barrier == "cluster_wait();":
        changed = changed.replace("cluster_arrive();", "")
    file.write_text(changed)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", BARRIERS)
def test_faults_planted_in_the_sampler_are_found(fault: str, tmp_path: Path) -> None:
    source = tmp_path / "csrc"
    shutil.copytree(cuda_sampler.CSRC, source)
    planted(fault, source)
    ptx = cuda_sampler.compiled(90, tmp_path, source)
    with pytest.raises(Fault, match=r"^(race|ended|uninitialised)"):
        if BARRIERS[fault][0] == FEW:
            draws(ptx, 2, top_k=7, top_p=0.75)
            draws(ptx, 2, temperature=0.0)
            draws(ptx, 1, top_k=50, spread=0.0)
        draws(ptx, 2, top_k=7, top_p=0.75, n_logprobs=5)
        draws(ptx, 2, n_logprobs=200, few=150)  # fewer than are asked for, in every block
        draws(ptx, 2, top_k=50, spread=0.0, history=True)
        draws(ptx, 2, top_k=7, **PENALISED, **LISTED)
        draws(ptx, 1, **PENALISED, **LISTED)
        refuses_an_id(ptx, 2)
        draws(ptx, 1, dtype=torch.bfloat16, vocab=900, n_logprobs=5)
