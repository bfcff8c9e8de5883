"""What the sampler does not accept, by every way in: functions, registered operators, the extension."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gptkern
from gptkern import _C
from gptkern.ops import (
    SamplerState,
    SamplingParams,
    sample,
    sampling_probs,
    speculative_accept,
    top_k_logprobs,
)
from gptkern.ops.sample import launch
from gptkern.ops.sample.launch import Drafts, Machine, Outputs

BATCH, VOCAB, POSITIONS = 4, 40, 3
INF = float("inf")


def _name(argument: Any) -> str:
    """What a case is called. Elements are not looked at: not all of these tensors have any."""
    if isinstance(argument, torch.Tensor):
        return f"{argument.dtype} {tuple(argument.shape)}"
    if isinstance(argument, dict):
        return ", ".join(f"{key}: {_name(value)}" for key, value in argument.items())
    return str(argument)


def _freed(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.zeros(shape, dtype=dtype)
    tensor.untyped_storage().resize_(0)
    return tensor


def _shrunk(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.zeros(shape, dtype=dtype)
    tensor.untyped_storage().resize_(tensor.element_size())
    return tensor


def _ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def _expanded() -> torch.Tensor:
    return torch.zeros(1, VOCAB, dtype=torch.int32).expand(BATCH, VOCAB)


# What takes the place of right arguments. ``values`` to ``bitmask`` belong to the parameters, then the state.
BAD: list[tuple[str, dict[str, Any]]] = [
    ("values", {"values": torch.zeros(BATCH, 0, dtype=torch.float64)}),
    ("values", {"values": torch.zeros(BATCH, 1, dtype=torch.float64)}),
    ("values", {"values": torch.zeros(BATCH, 13, dtype=torch.float64)}),
    ("values", {"values": torch.zeros(1, dtype=torch.float64)}),
    ("values", {"values": torch.zeros(BATCH, 12)}),
    ("values", {"values": torch.zeros(12, BATCH, dtype=torch.float64).t()}),
    ("values|rows", {"values": torch.zeros(BATCH - 1, 12, dtype=torch.float64)}),
    ("values|one device", {"values": torch.zeros(BATCH, 12, dtype=torch.float64, device="meta")}),
    ("counters", {"counters": torch.zeros(BATCH, 0, dtype=torch.int64)}),
    ("counters", {"counters": torch.zeros(BATCH, 1, dtype=torch.int64)}),
    ("counters", {"counters": torch.zeros(BATCH, 3, dtype=torch.int32)}),
    ("counters", {"counters": torch.zeros(1, 3, dtype=torch.int64).expand(BATCH, 3)}),
    ("counters|rows", {"counters": torch.zeros(1, 3, dtype=torch.int64)}),
    ("counts", {"counts": _ids(BATCH, VOCAB - 1)}),
    ("counts", {"counts": _ids(1, VOCAB)}),
    ("counts", {"counts": torch.zeros(BATCH, VOCAB, dtype=torch.int64)}),
    ("counts", {"counts": _expanded()}),
    ("bias_values", {"bias_ids": _ids(BATCH, 2)}),
    ("bias_values", {"bias_values": torch.zeros(BATCH, 2)}),
    ("bias_values", {"bias_ids": _ids(BATCH, 3), "bias_values": torch.zeros(BATCH, 2)}),
    ("bias_values", {"bias_ids": _ids(BATCH, 3), "bias_values": torch.zeros(BATCH, 3).double()}),
    ("bias_ids", {"bias_ids": _ids(BATCH, 2).long(), "bias_values": torch.zeros(BATCH, 2)}),
    ("banned_ids", {"banned_ids": torch.zeros(BATCH, 100_000, dtype=torch.int8)}),
    ("banned_ids", {"banned_ids": _ids(BATCH, 2).long()}),
    ("banned_ids", {"banned_ids": _ids(2)}),
    ("eos_ids", {"eos_ids": _ids(BATCH, 2).float()}),
    ("bitmask", {"bitmask": _ids(BATCH, 1)}),
    ("bitmask", {"bitmask": _ids(BATCH, 2).bool()}),
]
# What only the extension can see.
MEMORY: list[tuple[str, dict[str, Any]]] = [
    ("values", {"values": _freed(BATCH, 12, dtype=torch.float64)}),
    ("counters", {"counters": _shrunk(BATCH, 3, dtype=torch.int64)}),
    ("counts", {"counts": _freed(BATCH, VOCAB, dtype=torch.int32)}),
    ("banned_ids", {"banned_ids": _shrunk(BATCH, 5, dtype=torch.int32)}),
    ("bitmask", {"bitmask": _freed(BATCH, 2, dtype=torch.int32)}),
]

Asked = tuple[SamplingParams, SamplerState]


def _asked(change: dict[str, Any]) -> Asked:
    params, state = SamplingParams.make(BATCH, VOCAB), SamplerState.make(BATCH, VOCAB, seed=0)
    in_state = {name: value for name, value in change.items() if name in ("counters", "counts")}
    in_params = {name: value for name, value in change.items() if name not in in_state}
    return dataclasses.replace(params, **in_params), dataclasses.replace(state, **in_state)


def _flat(asked: Asked) -> tuple[torch.Tensor | None, ...]:
    p, state = asked
    lists = (p.bias_ids, p.bias_values, p.banned_ids, p.eos_ids, p.bitmask)
    return p.values, *lists, state.counters, state.counts


def _drafts() -> tuple[torch.Tensor, None, torch.Tensor]:
    return torch.zeros(BATCH, POSITIONS - 1, dtype=torch.int64), None, torch.zeros(BATCH, POSITIONS, VOCAB)


def _extension(asked: Asked) -> None:
    out = Outputs(torch.empty(BATCH, dtype=torch.int32), torch.empty(BATCH, dtype=torch.int64))
    _C.sample(torch.zeros(BATCH, VOCAB), *asked, out, commit=1, machine=Machine(1))


WAYS: dict[str, Callable[[Asked], object]] = {
    "sample": lambda asked: sample(torch.zeros(BATCH, VOCAB), asked[0], state=asked[1]),
    "sampling_probs": lambda asked: sampling_probs(torch.zeros(BATCH, VOCAB), asked[0], state=asked[1]),
    "speculative_accept": lambda asked: speculative_accept(*_drafts(), asked[0], state=asked[1]),
    "ops.sample": lambda asked: torch.ops.gptkern.sample(torch.zeros(BATCH, VOCAB), *_flat(asked), -1),
    "ops.sampling_probs": lambda asked: torch.ops.gptkern.sampling_probs(
        torch.zeros(BATCH, VOCAB), *_flat(asked)
    ),
    "ops.speculative_accept": lambda asked: torch.ops.gptkern.speculative_accept(*_drafts(), *_flat(asked)),
    "_C": _extension,
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Callable[[Asked], object]:
    return WAYS[request.param]


@pytest.mark.parametrize(("name", "change"), BAD + MEMORY, ids=_name)
def test_what_does_not_fit_is_refused_by_name(way: Any, name: str, change: dict[str, Any]) -> None:
    asked = _asked(change)
    with pytest.raises((ValueError, TypeError), match=name):
        way(asked)
    if "counters" not in change:
        assert asked[1].steps.tolist() == [0] * BATCH


@pytest.mark.parametrize("way", ["sample", "sampling_probs", "speculative_accept", "_C"])
def test_opposites_in_memory_are_refused_by_name(way: str) -> None:
    """Registered operators are given the elements by PyTorch's dispatcher."""
    params = SamplingParams.make(BATCH, VOCAB)
    asked = _asked({"values": torch._neg_view(params.values)})
    with pytest.raises(ValueError, match="values has the negative bit"):
        WAYS[way](asked)


def test_logits_of_opposites_in_memory_are_refused() -> None:
    logits, asked = torch._neg_view(torch.zeros(BATCH, VOCAB)), _asked({})
    for op in (sample, sampling_probs):
        with pytest.raises(ValueError, match="logits has the negative bit"):
            op(logits, asked[0], state=asked[1])
    with pytest.raises(ValueError, match="logits has the negative bit"):
        top_k_logprobs(logits[:, None], 3)


@pytest.mark.parametrize(("name", "change"), BAD, ids=_name)
@pytest.mark.parametrize("way", ["sample", "sampling_probs", "speculative_accept"])
def test_the_reference_refuses_the_same(way: str, name: str, change: dict[str, Any]) -> None:
    with gptkern.backend("reference"), pytest.raises((ValueError, TypeError), match=name):
        WAYS[way](_asked(change))


def test_what_is_no_tensor_is_refused(way: Any) -> None:
    for change in ({"values": [[1.0] * 12] * BATCH}, {"banned_ids": [[1]] * BATCH}, {"counters": None}):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            way(_asked(change))


LOGITS = [
    torch.zeros(BATCH, VOCAB).double(),
    torch.zeros(BATCH, VOCAB).long(),
    torch.zeros(VOCAB, BATCH).t(),
    torch.zeros(BATCH),
    torch.zeros(BATCH, 0),
    torch.zeros(BATCH, 2**19 + 1, dtype=torch.float16),
    torch.zeros(BATCH - 1, VOCAB),
    _freed(BATCH, VOCAB, dtype=torch.float32),
    _shrunk(BATCH, VOCAB, dtype=torch.float16),
    torch.zeros(BATCH, VOCAB).to_sparse(),
]


@pytest.mark.parametrize("logits", LOGITS, ids=_name)
def test_logits_that_do_not_fit_are_refused_by_name(logits: torch.Tensor) -> None:
    params, state = asked = _asked({})
    vocab = logits.shape[-1]
    ways: list[Callable[[], object]] = [
        lambda: sample(logits, params, state=state),
        lambda: sampling_probs(logits, params, state=state),
        lambda: torch.ops.gptkern.sample(logits, *_flat(asked), -1),
        lambda: torch.ops.gptkern.sampling_probs(logits, *_flat(asked)),
    ]
    if (logits.shape[0], vocab > 2**19) == (BATCH, False):  # rows are its own, and a vocabulary may be longer
        ways += [
            lambda: torch.ops.gptkern.top_k_rows(logits, 1),
            lambda: _C.top_k(
                logits,
                1,
                Outputs(
                    tokens=torch.empty(BATCH, 1, dtype=torch.int64),
                    logprobs=torch.empty(BATCH, 1),
                    status=torch.empty(BATCH, dtype=torch.int32),
                ),
                machine=Machine(1),
            ),
        ]
    for call in ways:
        # Of a sparse tensor, torch says itself that there is no kernel.
        with pytest.raises((ValueError, TypeError, NotImplementedError, RuntimeError)):
            call()


def _outputs(**change: Any) -> Outputs:
    right = Outputs(
        status=torch.empty(BATCH, dtype=torch.int32),
        tokens=torch.empty(BATCH, dtype=torch.int64),
        logprobs=torch.empty(BATCH),
        top_tokens=torch.empty(BATCH, 2, dtype=torch.int64),
        top_logprobs=torch.empty(BATCH, 2),
    )
    return dataclasses.replace(right, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"status": torch.empty(BATCH - 1, dtype=torch.int32)},
        {"status": torch.empty(BATCH, dtype=torch.int8)},
        {"tokens": torch.empty(BATCH, dtype=torch.int32)},
        {"tokens": torch.empty(0, dtype=torch.int64)},
        {"tokens": torch.empty(1, dtype=torch.int64).expand(BATCH)},
        {"tokens": None},
        {"logprobs": torch.empty(BATCH - 1)},
        {"logprobs": None},
        {"top_tokens": torch.empty(BATCH, 1, dtype=torch.int64)},
        {"top_logprobs": torch.empty(BATCH, 2).half()},
        {"probs": torch.empty(BATCH, VOCAB - 1)},
        {"accepted": torch.empty(BATCH, dtype=torch.int64)},
    ],
    ids=_name,
)
def test_outputs_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    asked = _asked({"max_logprobs": 2})
    call = partial(_C.sample, torch.zeros(BATCH, VOCAB), *asked, commit=1, machine=Machine(1))
    with pytest.raises((ValueError, TypeError), match=r"sample: (outputs\.|outputs has|logits)"):
        call(_outputs(**change))
    assert call(_outputs()) == -1


@pytest.mark.parametrize("name", ["params", "state", "outputs", "drafts", "machine"])
@pytest.mark.parametrize("wrong", [None, 3, "x", {"tokens": 1}])
def test_records_of_another_type_are_refused_by_name(name: str, wrong: Any) -> None:
    params, state = _asked({})
    call = {
        "params": params,
        "state": state,
        "outputs": launch.accept_outputs(torch.zeros(BATCH, POSITIONS, VOCAB)),
        "drafts": Drafts(torch.zeros(BATCH, POSITIONS - 1, dtype=torch.int64), None, None),
        "machine": Machine(1),
    }
    logits = torch.zeros(BATCH, POSITIONS, VOCAB)
    assert _C.sample(logits, **call, commit=0) == -1
    with pytest.raises(TypeError, match=f"sample: {name} is of type {type(wrong).__name__}"):
        _C.sample(logits, **call | {name: wrong}, commit=0)


@pytest.mark.parametrize(
    "change", [{"commit": 3}, {"commit": -1}, {"commit": 2}, {"threads": 0}, {"threads": -1}]
)
def test_numbers_out_of_range_are_refused(change: dict[str, int]) -> None:
    numbers = {"commit": 1, "threads": 1} | change
    with pytest.raises(ValueError, match=next(iter(change))):
        _C.sample(
            torch.zeros(BATCH, VOCAB),
            *_asked({}),
            _outputs(),
            commit=numbers["commit"],
            machine=Machine(numbers["threads"]),
        )


@pytest.mark.parametrize("k", [-1, VOCAB + 1, 2**40])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="k is"):
        torch.ops.gptkern.top_k_rows(torch.zeros(BATCH, VOCAB), k)
    with pytest.raises(ValueError, match="k is"):
        top_k_logprobs(torch.zeros(1, 1, VOCAB), k)


BAD_DRAFTS = [
    (torch.zeros(BATCH, POSITIONS - 2, dtype=torch.int64), None),
    (torch.zeros(BATCH, POSITIONS, dtype=torch.int64), None),
    (torch.zeros(BATCH, 0, dtype=torch.int64), None),
    (torch.zeros(1, POSITIONS - 1, dtype=torch.int64), None),
    (torch.zeros(BATCH, POSITIONS - 1, dtype=torch.int16), None),
    (torch.zeros(BATCH, POSITIONS - 1, dtype=torch.int64), torch.zeros(BATCH, POSITIONS - 1, VOCAB - 1)),
    (torch.zeros(BATCH, POSITIONS - 1, dtype=torch.int64), torch.zeros(BATCH, 1, VOCAB)),
    (torch.zeros(BATCH, POSITIONS - 1, dtype=torch.int64), torch.zeros(BATCH, POSITIONS - 1, VOCAB).double()),
]


@pytest.mark.parametrize(("tokens", "probs"), BAD_DRAFTS, ids=_name)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_drafts_that_do_not_fit_are_refused(tokens: Any, probs: Any, backend: Any) -> None:
    params, state = asked = _asked({})
    logits = torch.zeros(BATCH, POSITIONS, VOCAB)
    with gptkern.backend(backend), pytest.raises((ValueError, TypeError), match="draft_"):
        speculative_accept(tokens, probs, logits, params, state=state)
    with pytest.raises((ValueError, TypeError), match="draft_"):
        torch.ops.gptkern.speculative_accept(tokens, probs, logits, *_flat(asked))
    with pytest.raises((ValueError, TypeError), match="no position"):
        speculative_accept(tokens, None, logits[:, :0], params, state=state)


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_drafted_token_is_a_plain_draw(history: bool, backend: Any) -> None:
    logits = torch.randn(BATCH, VOCAB)
    params = SamplingParams.make(BATCH, VOCAB, presence_penalty=0.5 if history else 0.0)
    plain, ahead = (SamplerState.make(BATCH, VOCAB, seed=3, history=history) for _ in range(2))
    nothing = torch.zeros(BATCH, 0, dtype=torch.int64)
    for probs in (None, torch.zeros(BATCH, 0, VOCAB)):
        expected = sample(logits, params, state=plain)
        with gptkern.backend(backend):
            found = speculative_accept(nothing, probs, logits[:, None], params, state=ahead)
        assert found.tokens.tolist() == expected.tokens[:, None].tolist()
        assert found.n_accepted.tolist() == [0] * BATCH and found.status.tolist() == [0] * BATCH
        assert torch.equal(ahead.counters, plain.counters)
        assert plain.counts is None or torch.equal(plain.counts, ahead.counts)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_rows_and_one_token(backend: Any) -> None:
    with gptkern.backend(backend):
        for batch in (0, 2):
            params = SamplingParams.make(batch, 1, top_p=0.5, n_logprobs=1)
            state = SamplerState.make(batch, 1, seed=0, history=True)
            out = sample(torch.zeros(batch, 1), params, state=state)
            assert out.tokens.tolist() == [0] * batch and out.logprobs is not None
            assert out.logprobs.tolist() == [0.0] * batch
            assert sampling_probs(torch.zeros(batch, 1), params, state=state).tolist() == [[1.0]] * batch
            for n in (0, 2):
                drafts = torch.zeros(batch, n, dtype=torch.int64)
                given = speculative_accept(drafts, None, torch.zeros(batch, n + 1, 1), params, state=state)
                assert given.tokens.tolist() == [[0] * (n + 1)] * batch
                assert given.n_accepted.tolist() == [n] * batch
            assert state.steps.tolist() == [1 + 1 + 3] * batch
            best = top_k_logprobs(torch.zeros(batch, 2, 1), 2)
            assert [t.tolist() for t in best] == [[[0.0] * 2] * batch, [[0, 1]] * batch, [[0, 0]] * batch]


@pytest.mark.parametrize("vocab", [2**19, 2**20, 2**22])
def test_the_best_of_a_very_long_vocabulary(vocab: int) -> None:
    """Equal logits: each has the probability 1 / vocab. Weights of more than 2^19 tokens pass 64 bits."""
    logits = torch.zeros(1, 1, vocab)
    values, beams, tokens = top_k_logprobs(logits, 3)
    expected = torch.full((1, 3), -float(torch.log(torch.tensor(vocab, dtype=torch.float64))))
    assert tokens.tolist() == [[0, 1, 2]] and beams.tolist() == [[0, 0, 0]]
    torch.testing.assert_close(values, expected, rtol=1e-7, atol=0)
    logits = torch.randn(1, 1, vocab)
    values, _, tokens = top_k_logprobs(logits, 5)
    expected, best = torch.log_softmax(logits[0].double(), -1).topk(5)
    assert torch.equal(tokens, best)
    torch.testing.assert_close(values, expected.float(), rtol=1e-6, atol=0)


def test_a_vocabulary_beyond_the_limit_is_refused() -> None:
    logits = torch.zeros(1, 1, 2**24 + 1, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"16777217 tokens; 1 to 16777216 are accepted"):
        top_k_logprobs(logits, 1)


@pytest.mark.parametrize(
    "value", [torch.ones(4, 1), torch.ones(1, 4), torch.ones(1), [1.0], torch.ones(3), torch.ones(4, 4), []]
)
def test_parameters_of_another_shape_are_refused(value: Any) -> None:
    for name in ("temperature", "top_p", "presence_penalty"):
        with pytest.raises(ValueError, match=rf"{name} has shape .*; a number, or one for each of 4 rows"):
            SamplingParams.make(4, 10, **{name: value})
    assert (
        SamplingParams.make(4, 10, temperature=torch.tensor(0.5)).column("temperature").tolist() == [0.5] * 4
    )
    assert SamplingParams.make(1, 10, temperature=[0.5]).column("temperature").tolist() == [0.5]


def test_a_mask_of_another_shape_is_refused() -> None:
    state = SamplerState.make(2, 10, history=True)
    for mask in (torch.ones(2, 1), torch.ones(3), torch.ones(1, 3)):
        with pytest.raises(ValueError, match=r"mask has shape .* ids' shape \(2, 3\) is needed"):
            state.add_prompt(torch.zeros(2, 3, dtype=torch.int64), mask)


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


@pytest.mark.usefixtures("fake")
def test_fake_tensors_give_fake_results() -> None:
    params = SamplingParams(torch.ones(BATCH, 12, dtype=torch.float64), max_logprobs=2)
    state = SamplerState(torch.zeros(BATCH, 3, dtype=torch.int64))
    logits = torch.randn(BATCH, VOCAB)
    out = sample(logits, params, state=state)
    assert out.tokens.shape == (BATCH,) and out.top_logprobs is not None
    assert out.top_logprobs.tokens.shape == (BATCH, 2)
    assert sampling_probs(logits, params, state=state).shape == (BATCH, VOCAB)
    drafts = torch.zeros(BATCH, 2, dtype=torch.int64)
    given = speculative_accept(drafts, None, torch.randn(BATCH, 3, VOCAB), params, state=state)
    assert given.tokens.shape == (BATCH, 3)
    values, beams, tokens = top_k_logprobs(torch.randn(BATCH, 2, VOCAB), 5)
    assert values.shape == beams.shape == tokens.shape == (BATCH, 5)
    with pytest.raises(TypeError, match="float32"):
        sample(logits, SamplingParams(torch.ones(BATCH, 12)), state=state)


def test_fake_tensors_among_real_ones_are_refused() -> None:
    with FakeTensorMode():
        values = torch.ones(BATCH, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"values is .* a storage that holds all of it"):
        sample(torch.zeros(BATCH, VOCAB), SamplingParams(values), state=SamplerState.make(BATCH, VOCAB))


def test_probabilities_compile_as_a_whole() -> None:
    params, state = SamplingParams.make(3, VOCAB, top_k=5), SamplerState.make(3, VOCAB, seed=4)
    logits = torch.randn(3, VOCAB)
    compiled = torch.compile(sampling_probs, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(logits, params, state=state), sampling_probs(logits, params, state=state))
    args = (logits, params.values, *(None,) * 5, state.counters, None)
    torch.library.opcheck(torch.ops.gptkern.sampling_probs.default, args)


def test_meta_tensors_have_no_memory_to_write() -> None:
    params, state = SamplingParams.make(2, VOCAB, device="meta"), SamplerState.make(2, VOCAB, device="meta")
    assert sample(torch.zeros(2, VOCAB, device="meta"), params, state=state).tokens.is_meta


@pytest.mark.parametrize("seed", [np.int64(-3), np.uint64(2**64 - 3), torch.tensor(-3), [-3, np.int32(-3)]])
def test_a_seed_may_be_a_number_of_numpy_or_a_tensor(seed: Any) -> None:
    state = SamplerState.make(2, VOCAB, seed=seed)
    assert torch.equal(state.counters, SamplerState.make(2, VOCAB, seed=-3).counters)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.5, "1", [1, None]])
def test_a_seed_of_more_than_64_bits_or_no_whole_number_is_refused(seed: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="SamplerState: seed is"):
        SamplerState.make(2, VOCAB, seed=seed)
