"""ops.sample against its float64 reference: kept sets, draws, ties, penalties, state, bad input."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import gptkern
from gptkern import _C
from gptkern.cpu_threads import VARIABLE
from gptkern.ops import SamplerState, SamplingParams, sample, sampling_probs
from gptkern.ops.sample import reference

INF = float("inf")


@pytest.fixture(autouse=True, params=["portable", "best"])
def cpu_path(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs on each build of the CPU path."""
    best = _C.cpu_path()
    _C.use_cpu_path("portable" if request.param == "portable" else best)
    yield
    _C.use_cpu_path(best)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the number of threads, which may be more than there are cores."""
    return lambda number: monkeypatch.setenv(VARIABLE, str(number))


def rows(vocab: int) -> dict[str, torch.Tensor]:
    """Rows that are hard to cut exactly."""
    halves = torch.where(torch.arange(vocab) % 2 == 0, 1.0, 0.0)
    one_hot = torch.full((vocab,), -INF)
    one_hot[vocab // 2] = 3.0
    subnormal = torch.arange(vocab).flip(0).float() * 1e-42
    extreme = torch.linspace(-65504, 65504, vocab) if vocab > 1 else torch.tensor([65504.0])
    huge = torch.randn(vocab)
    huge[0], huge[-1] = 1e30, -1e30
    masked = torch.randn(vocab)
    masked[::3] = -INF
    if vocab == 1:
        masked[0] = 0.0
    return {
        "equal": torch.zeros(vocab),
        "two_valued": halves,
        "one_hot": one_hot,
        "subnormal": subnormal,
        "extreme": extreme,
        "huge": huge,
        "masked": masked,
        "normal": torch.randn(vocab) * 3,
        "coarse": (torch.randn(vocab) * 4).round(),
        "signed_zeros": torch.where(torch.arange(vocab) % 2 == 0, 0.0, -0.0),
    }


SETTINGS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.5},
    {"top_p": 0.25, "temperature": 0.7},
    {"top_p": 0.999},
    {"top_k": 20, "top_p": 0.75},
    {"min_p": 0.1},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.02, "temperature": 1.3},
    {"typical_p": 0.5},
    {"typical_p": 0.9, "top_k": 30},
    {"epsilon_cutoff": 0.01},
    {"eta_cutoff": 0.05},
    {"temperature": 0.0},
    {"temperature": 1e-30, "top_p": 0.9},
    {},
]


def both(logits: torch.Tensor, **setting: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, vocab = logits.shape
    setting = {k: min(v, vocab) if k == "top_k" else v for k, v in setting.items()}
    params = SamplingParams.make(batch, vocab, **setting)
    state = SamplerState.make(batch, vocab, seed=0)
    got = sampling_probs(logits, params, state=state)
    with gptkern.backend("reference"):
        return got, sampling_probs(logits, params, state=state)


def assert_same_distribution(got: torch.Tensor, expected: torch.Tensor, rtol: float = 3e-7) -> None:
    # What has less than 2^-45 of the largest probability has no weight; nothing else may differ.
    assert (got[expected > 1e-12] > 0).all()
    assert not got[expected == 0].any()
    torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-10)


@pytest.mark.parametrize("vocab", [1, 2, 31, 4099])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_adversarial_rows(vocab: int, setting: dict[str, Any]) -> None:
    # Tokens at the same distance from the mean are ordered by float64's rounding in the reference.
    tied = {"two_valued", "coarse", "equal", "subnormal", "signed_zeros"}
    skipped = tied if "typical_p" in setting else set()
    logits = torch.stack([row for name, row in rows(vocab).items() if name not in skipped])
    assert_same_distribution(*both(logits, **setting))


@pytest.mark.parametrize("vocab", [50257, 151936, 262144])
@pytest.mark.parametrize("setting", [SETTINGS[5], SETTINGS[2], SETTINGS[8]], ids=str)
def test_large_vocabularies(vocab: int, setting: dict[str, Any]) -> None:
    logits = torch.stack([torch.randn(vocab) * 2, rows(vocab)["extreme"]])
    assert_same_distribution(*both(logits, **setting))


@pytest.mark.parametrize("p", [0.125, 0.25, 0.5, 0.75, 0.1, 0.3, 1 - 2**-20])
def test_p_on_a_boundary(p: float) -> None:
    """Of n equal tokens exactly ceil(p n) are kept, the first ones."""
    for n in (1, 8, 10, 64, 100):
        got = sampling_probs(
            torch.zeros(1, n), SamplingParams.make(1, n, top_p=p), state=SamplerState.make(1, n)
        )
        kept = math.ceil(p * n)
        assert torch.equal(got[0] > 0, torch.arange(n) < kept), (p, n)


def test_ties_go_to_the_lower_id() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 5.0, 5.0, 0.0, -INF]])
    for k in range(1, 5):
        got, _ = both(logits, top_k=k)
        assert got[0].nonzero()[:, 0].tolist() == list(range(1, 1 + k))
    greedy = sample(logits, SamplingParams.make(1, 7, temperature=0), state=SamplerState.make(1, 7))
    first = sample(logits, SamplingParams.make(1, 7, top_k=1), state=SamplerState.make(1, 7))
    assert greedy.tokens.item() == first.tokens.item() == 1


def test_greedy_is_argmax() -> None:
    logits = (torch.randn(64, 5000) * 3).round()
    params = SamplingParams.make(64, 5000, temperature=0)
    tokens = sample(logits, params, state=SamplerState.make(64, 5000)).tokens
    best = logits.amax(-1, keepdim=True)
    assert torch.equal(tokens, (logits == best).int().argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_widened_exactly(dtype: torch.dtype) -> None:
    logits = torch.cat([torch.randn(3, 999) * 4, torch.full((3, 1), 1e-7)], 1).to(dtype)
    params = SamplingParams.make(3, 1000, top_k=50, top_p=0.9, n_logprobs=4)
    narrow = sample(logits, params, state=SamplerState.make(3, 1000, seed=5))
    wide = sample(logits.float(), params, state=SamplerState.make(3, 1000, seed=5))
    assert torch.equal(narrow.tokens, wide.tokens)
    assert narrow.top_logprobs is not None and wide.top_logprobs is not None
    assert torch.equal(narrow.top_logprobs.tokens, wide.top_logprobs.tokens)
    assert torch.equal(narrow.top_logprobs.logprobs, wide.top_logprobs.logprobs)
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    finite = everything[everything.isfinite()][None].contiguous()
    state = SamplerState.make(1, finite.shape[1])
    params = SamplingParams.make(1, finite.shape[1], temperature=3e4)
    assert torch.equal(
        sampling_probs(finite, params, state=state), sampling_probs(finite.float(), params, state=state)
    )


def test_draws_are_those_of_the_reference() -> None:
    batch, vocab = 64, 512
    logits = torch.randn(batch, vocab) * 2
    params = SamplingParams.make(batch, vocab, temperature=0.9, top_k=100, top_p=0.95, n_logprobs=3)
    fast, slow = (SamplerState.make(batch, vocab, seed=range(batch)) for _ in range(2))
    for _ in range(8):
        got = sample(logits, params, state=fast)
        with gptkern.backend("reference"):
            expected = sample(logits, params, state=slow)
        assert torch.equal(got.tokens, expected.tokens)
        assert got.top_logprobs is not None and expected.top_logprobs is not None
        assert torch.equal(got.top_logprobs.tokens, expected.top_logprobs.tokens)
        torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=2e-7, atol=0)
        torch.testing.assert_close(
            got.top_logprobs.logprobs, expected.top_logprobs.logprobs, rtol=2e-7, atol=0
        )
        assert torch.equal(fast.counters, slow.counters)


def test_results_do_not_depend_on_batch_threads_or_row(threads: Any) -> None:
    vocab = 70_000  # more than one thread's share
    logits = torch.randn(5, vocab) * 2
    make = {"temperature": 1.1, "top_p": 0.98, "typical_p": 0.9}
    chosen = []
    for n_threads, order in ((1, range(5)), (2, range(5)), (4, reversed(range(5))), (64, range(1, 5))):
        threads(n_threads)
        order = list(order)
        params = SamplingParams.make(len(order), vocab, **make)
        state = SamplerState.make(len(order), vocab, seed=7, request=order)
        first, second = (sample(logits[order], params, state=state).tokens for _ in range(2))
        chosen.append(dict(zip(order, zip(first.tolist(), second.tolist(), strict=True), strict=True)))
    threads(1)
    alone = SamplerState.make(1, vocab, seed=7, request=[3])
    params = SamplingParams.make(1, vocab, **make)
    lone = tuple(sample(logits[3:4], params, state=alone).tokens.item() for _ in range(2))
    assert all(c[row] == chosen[0][row] for c in chosen for row in c)
    assert chosen[0][3] == lone


def test_one_row_over_many_threads(threads: Any) -> None:
    vocab = 151_936
    logits = torch.randn(1, vocab) * 2
    seen = []
    for n_threads in (1, 2, 3):
        threads(n_threads)
        params = SamplingParams.make(1, vocab, top_k=50, top_p=0.9, n_logprobs=5)
        state = SamplerState.make(1, vocab, seed=3)
        out = sample(logits, params, state=state)
        assert out.top_logprobs is not None
        seen.append((out.tokens, out.logprobs, *out.top_logprobs))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_strided_rows() -> None:
    wide = torch.randn(4, 2, 300)
    params = SamplingParams.make(4, 300, top_k=20)
    view = sample(wide[:, 1], params, state=SamplerState.make(4, 300, seed=1)).tokens
    copy = sample(wide[:, 1].contiguous(), params, state=SamplerState.make(4, 300, seed=1)).tokens
    assert torch.equal(view, copy)


def test_penalties_bias_and_bans() -> None:
    batch, vocab = 3, 200
    logits = torch.randn(batch, vocab) * 3
    params = SamplingParams.make(
        batch, vocab, temperature=0.8, repetition_penalty=[1.0, 1.3, 0.8], presence_penalty=[0.5, 0, -0.2],
        frequency_penalty=[0, 0.25, 0.1], min_new_tokens=[0, 2, 40], eos_token_id=[5, 9],
        logit_bias=[{0: 2.0, 7: -INF}, {}, {199: 1.5}], banned=[[1, 2], [], [3]],
        bitmask=torch.randint(-(2**31), 2**31 - 1, (batch, 7)).int(),
    )  # fmt: skip
    fast, slow = (SamplerState.make(batch, vocab, seed=11, history=True) for _ in range(2))
    prompt = torch.randint(vocab, (batch, 60))
    mask = (torch.arange(60) >= torch.tensor([[0], [10], [59]])).long()
    for state in (fast, slow):
        state.add_prompt(prompt, mask)
    for step in range(6):
        got_probs = sampling_probs(logits, params, state=fast)
        tokens = sample(logits, params, state=fast).tokens
        with gptkern.backend("reference"):
            # Penalised logits are rounded to fp32, thrice: 3 * 2^-24 of up to 15, over the temperature.
            assert_same_distribution(got_probs, sampling_probs(logits, params, state=slow), rtol=4e-6)
            assert torch.equal(tokens, sample(logits, params, state=slow).tokens)
        assert torch.equal(fast.counts, slow.counts)
        assert fast.steps.tolist() == [step + 1] * batch
    assert got_probs[0, [1, 2, 7]].tolist() == [0, 0, 0]
    assert got_probs[2, [5, 9]].tolist() == [0, 0]


def test_prompt_counts_for_repetition_alone() -> None:
    state = SamplerState.make(1, 4, history=True)
    state.add_prompt(torch.tensor([[1, 1, 2]]), torch.tensor([[1, 1, 0]]))
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    presence = sampling_probs(logits, SamplingParams.make(1, 4, presence_penalty=1.0), state=state)
    assert presence.tolist() == [[0.25] * 4]
    repetition = sampling_probs(logits, SamplingParams.make(1, 4, repetition_penalty=2.0), state=state)
    expected = torch.softmax(torch.tensor([[1.0, 0.5, 1.0, 1.0]]), -1)
    torch.testing.assert_close(repetition, expected)


def test_parameters_can_change_in_place() -> None:
    logits = torch.randn(2, 50)
    params = SamplingParams.make(2, 50)
    params.column("temperature")[1] = 0.0
    for _ in range(5):
        assert sample(logits, params, state=SamplerState.make(2, 50)).tokens[1] == logits[1].argmax()


def test_top_logprobs_of_rows_that_ask_for_fewer() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -INF], [0.0, -INF, -INF, -INF]])
    params = SamplingParams.make(2, 4, n_logprobs=[2, 3])
    top = sample(logits, params, state=SamplerState.make(2, 4)).top_logprobs
    assert top is not None
    assert top.tokens.tolist() == [[1, 2, -1], [0, -1, -1]]
    expected = torch.log_softmax(logits[0], -1)[[1, 2]]
    torch.testing.assert_close(top.logprobs[0, :2], expected)
    assert top.logprobs[1].tolist() == [0.0, -INF, -INF]


def test_torch_rng_draws_as_multinomial() -> None:
    logits = torch.randn(4, 100)
    params = SamplingParams.make(4, 100, temperature=0.7, top_k=10)
    torch.manual_seed(3)
    got = sample(logits, params, state=SamplerState.make(4, 100, seed=0), rng="torch").tokens
    torch.manual_seed(3)
    scores = logits / 0.7
    scores = scores.masked_fill(scores < scores.topk(10).values[:, -1:], -INF)
    assert torch.equal(got, torch.multinomial(torch.softmax(scores, -1), 1)[:, 0])


def test_philox_known_answers() -> None:
    """The vectors published with Random123 (kat_vectors: philox4x32 10)."""
    ones = 2**64 - 1
    assert reference.philox4x32(0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert reference.philox4x32(ones, ones, ones) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = reference.philox4x32(0x299F31D0A4093822, 0x85A308D3243F6A88, 0x0370734413198A2E)
    assert pi == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_the_extension_draws_the_same_uniforms() -> None:
    for seed, request, step in ((0, 0, 0), (-1, -1, -1), (2**62 + 5, 7, 2**40), (123, -9, 1)):
        w = reference.philox4x32(seed, step, request)
        assert _C.uniforms(seed, request, step) == (w[0] | w[1] << 32, w[2] | w[3] << 32)


def test_weights_are_accurate_and_exact_where_they_must_be() -> None:
    assert [_C.weight(float(n)) for n in range(46)] == [2**44 >> n if n < 45 else 0 for n in range(46)]
    for x in torch.rand(2000, dtype=torch.float64).mul(45).tolist():
        assert abs(_C.weight(x) - 2.0 ** (44 - x)) <= 0.75
    assert _C.weight(INF) == 0


BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.5}, r"temperature\[1\] is -0.5"),
    ({"temperature": INF}, "temperature"),
    ({"temperature": math.nan}, "temperature"),
    ({"top_k": -1}, r"top_k\[1\] is -1"),
    ({"top_k": 33}, r"top_k\[1\] is 33"),
    ({"top_k": 2.5}, "top_k"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"min_p": -0.1}, "min_p"),
    ({"typical_p": 0.0}, "typical_p"),
    ({"epsilon_cutoff": 1.0}, "epsilon_cutoff"),
    ({"eta_cutoff": -1.0}, "eta_cutoff"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"presence_penalty": math.nan}, "presence_penalty"),
    ({"frequency_penalty": INF}, "frequency_penalty"),
    ({"min_new_tokens": -1}, "min_new_tokens"),
    ({"n_logprobs": 3}, "n_logprobs"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda x: str(x))
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_parameters_name_row_and_value(change: dict[str, Any], message: str, backend: Any) -> None:
    name, value = next(iter(change.items()))
    if name != "n_logprobs":
        with pytest.raises(ValueError, match=message):
            SamplingParams.make(2, 32, **{name: [1 if name != "min_p" else 0, value]})
    params = SamplingParams.make(2, 32, n_logprobs=2)
    params.column(name)[1] = value
    state = SamplerState.make(2, 32, history=True)
    before = state.counters.clone()
    with gptkern.backend(backend), pytest.raises(ValueError, match=message):
        sample(torch.randn(2, 32), params, state=state)
    assert torch.equal(state.counters, before)
    assert state.counts is not None and not state.counts.any()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("value", "message"), [(math.nan, r"logits\[1\] holds NaN"), (INF, r"logits\[1\].* holds \+inf")]
)
def test_bad_logits(value: float, message: str, backend: Any) -> None:
    for place in (0, 500):
        logits = torch.randn(2, 1000)
        logits[1, place] = value
        with gptkern.backend(backend), pytest.raises(ValueError, match=message):
            sample(logits, SamplingParams.make(2, 1000), state=SamplerState.make(2, 1000))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nothing_left_to_choose(backend: Any) -> None:
    empty = torch.full((1, 64), -INF)
    none_allowed = SamplingParams.make(1, 64, bitmask=torch.zeros(1, 2, dtype=torch.int32))
    greedy = SamplingParams.make(1, 64, temperature=0.0)
    cases = ((empty, SamplingParams.make(1, 64)), (torch.randn(1, 64), none_allowed), (empty, greedy))
    for logits, params in cases:
        with gptkern.backend(backend), pytest.raises(ValueError, match=r"logits\[0\] leaves no token"):
            sample(logits, params, state=SamplerState.make(1, 64))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_foreign_token_ids(backend: Any) -> None:
    for name in ("banned", "eos_token_id"):
        with pytest.raises(ValueError, match=name):
            SamplingParams.make(1, 10, **{name: [10]})
    for field in ("banned_ids", "eos_ids"):
        params = SamplingParams.make(1, 10, min_new_tokens=1)
        setattr(params, field, torch.tensor([[3, 12]], dtype=torch.int32))
        with gptkern.backend(backend), pytest.raises(ValueError, match="outside the vocabulary of 10"):
            sample(torch.randn(1, 10), params, state=SamplerState.make(1, 10))


def test_penalties_need_counts() -> None:
    params = SamplingParams.make(1, 10, repetition_penalty=1.2)
    with pytest.raises(ValueError, match="history=True"):
        sample(torch.randn(1, 10), params, state=SamplerState.make(1, 10))


def test_without_validation_a_status_tells() -> None:
    logits = torch.randn(3, 10)
    logits[1, 2] = math.nan
    state = SamplerState.make(3, 10)
    out = sample(logits, SamplingParams.make(3, 10, n_logprobs=2), state=state, validate=False)
    assert out.status.tolist() == [0, 1, 0]
    assert out.tokens[1] == 0


def test_tensors_that_do_not_fit() -> None:
    params, state = SamplingParams.make(2, 10), SamplerState.make(2, 10)
    with pytest.raises(ValueError, match="3 rows"):
        sample(torch.randn(3, 10), params, state=state)
    with pytest.raises(TypeError, match="float64"):
        sample(torch.randn(2, 10).double(), params, state=state)
    with pytest.raises(ValueError, match="2 dimensions"):
        sample(torch.randn(2, 1, 10), params, state=state)
    with pytest.raises(ValueError, match="contiguous"):
        sample(torch.randn(10, 2).t(), params, state=state)
    with pytest.raises(ValueError, match="rng"):
        sample(torch.randn(2, 10), params, state=state, rng="numpy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bitmask"):
        short = SamplingParams.make(2, 33, bitmask=torch.zeros(2, 1, dtype=torch.int32))
        sample(torch.randn(2, 33), short, state=SamplerState.make(2, 33))
    with pytest.raises(ValueError, match="counts"):
        sample(torch.randn(2, 10), params, state=SamplerState.make(2, 11, history=True))


def test_an_empty_batch() -> None:
    out = sample(torch.empty(0, 10), SamplingParams.make(0, 10), state=SamplerState.make(0, 10))
    assert out.tokens.shape == (0,)


def test_registered_operators() -> None:
    logits = torch.randn(2, 40)
    params = SamplingParams.make(2, 40, top_k=5, n_logprobs=2)
    state = SamplerState.make(2, 40, seed=0, history=True)
    none = (None,) * 5
    for width in (-1, 2):
        args = (logits, params.values, *none, state.counters, state.counts, width)
        torch.library.opcheck(torch.ops.gptkern.sample.default, args)
    drafts = (torch.zeros(2, 1, dtype=torch.int64), None, torch.randn(2, 2, 40))
    args = (*drafts, params.values, *none, state.counters, state.counts)
    torch.library.opcheck(torch.ops.gptkern.speculative_accept.default, args)
    lengths = torch.tensor([0, 1])
    torch.library.opcheck(torch.ops.gptkern.speculative_accept.default, (*args, lengths))
    torch.library.opcheck(torch.ops.gptkern.top_k_rows.default, (logits, 3))


def test_torch_compile() -> None:
    params = SamplingParams.make(3, 40, top_k=5, n_logprobs=2)
    logits = torch.randn(3, 40)
    states = [SamplerState.make(3, 40, seed=4, history=True) for _ in range(2)]
    compiled = torch.compile(sample, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        expected = sample(logits, params, state=states[0])
        got = compiled(logits, params, state=states[1])
        assert torch.equal(got.tokens, expected.tokens)
        assert torch.equal(got.top_logprobs.tokens, expected.top_logprobs.tokens)
    assert torch.equal(states[0].counters, states[1].counters)
    assert torch.equal(states[0].counts, states[1].counts)
