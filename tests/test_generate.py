"""``generate`` against transformers, option by option."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from generate_support import CONFIGS, VOCAB, left_padded, pair, prompts

from gptkern import _native
from gptkern.config import GPTConfig
from gptkern.engine import engine
from gptkern.engine.executors import choose
from gptkern.engine.executors.torch import TorchExecutor
from gptkern.engine.settings import Settings
from gptkern.generate import GenerateOptions, GenerateOutput
from gptkern.generate.run import prepare
from gptkern.gpt import GPT
from gptkern.model.layers import Attention
from gptkern.ops.sample import launch
from gptkern.tokenizer import Tokenizer


def same(name: str, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """gptkern's result, after comparing it with transformers'."""
    theirs, ours = pair(name)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options)
    found = ours.generate(ids, mask, **options)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.int64
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    found = same(name, prompts(1, 7), max_new_tokens=64, eos_token_id=None)
    assert found.shape == (1, 71)
    assert len(found[0, 7:].unique()) > 8
    same(name, prompts(3, 5, seed=1), max_new_tokens=64, eos_token_id=None)
    ids, mask = left_padded()
    same(name, ids, mask, max_new_tokens=64, eos_token_id=None, pad_token_id=1)


def test_lengths_follow_transformers() -> None:
    ids = prompts(2, 6)
    assert same("head dim 8", ids).shape[1] == 26
    assert same("head dim 8", ids, max_length=13).shape[1] == 13
    assert same("head dim 8", ids, max_length=50, max_new_tokens=3).shape[1] == 9
    # without a length, the context is the limit
    assert same("head dim 8", prompts(1, 90)).shape[1] == 96
    assert same("head dim 8", prompts(1, 90), max_new_tokens=6).shape[1] == 96


def greedy_token(name: str, ids: torch.Tensor, step: int, row: int = 0) -> int:
    out = pair(name)[1].generate(ids, max_new_tokens=step + 1, eos_token_id=None)
    assert isinstance(out, torch.Tensor)
    return int(out[row, -1])


def test_rows_end_at_any_of_the_end_tokens_and_are_filled_up() -> None:
    ids = prompts(3, 5, seed=1)
    stops = [greedy_token("head dim 64", ids, 4), greedy_token("head dim 64", ids, 9, row=1)]
    found = same("head dim 64", ids, max_new_tokens=30, eos_token_id=stops, pad_token_id=7)
    assert (found[0] == 7).any()
    # the filling token is the first end-of-text token by default
    same("head dim 64", ids, max_new_tokens=30, eos_token_id=stops)
    alone = same("head dim 64", ids[:1], max_new_tokens=30, eos_token_id=stops[0])
    assert alone.shape[1] <= 10


def test_minimum_lengths() -> None:
    ids = prompts(2, 5, seed=1)
    stop = greedy_token("head dim 64", ids, 2)
    for options in ({"min_new_tokens": 10}, {"min_length": 12}, {"min_length": 9, "min_new_tokens": 2}):
        same("head dim 64", ids, max_new_tokens=20, eos_token_id=stop, pad_token_id=7, **options)


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
def test_repetition_penalty(penalty: float) -> None:
    same("head dim 64", prompts(2, 20), max_new_tokens=40, repetition_penalty=penalty, eos_token_id=None)
    ids, mask = left_padded()
    same("gelu", ids, mask, max_new_tokens=20, repetition_penalty=penalty, eos_token_id=None, pad_token_id=1)


def test_padding_is_inferred_from_the_pad_token_as_in_transformers() -> None:
    theirs, ours = pair("untied")
    ids, mask = left_padded()
    expected = theirs.generate(ids, max_new_tokens=12, pad_token_id=1, eos_token_id=0)
    assert torch.equal(ours.generate(ids, max_new_tokens=12, pad_token_id=1, eos_token_id=0), expected)
    assert torch.equal(ours.generate(ids, mask, max_new_tokens=12, pad_token_id=1, eos_token_id=0), expected)
    # a pad token that may end a text says nothing
    expected = theirs.generate(ids, max_new_tokens=12, pad_token_id=1, eos_token_id=1)
    assert torch.equal(ours.generate(ids, max_new_tokens=12, pad_token_id=1, eos_token_id=1), expected)


def test_padding_on_the_right_changes_nothing() -> None:
    ours = pair("odd width")[1]
    ids, mask = left_padded()
    right, right_mask = torch.full_like(ids, VOCAB + 5), mask.flip(1)
    right[right_mask.bool()] = ids[mask.bool()]
    options: dict[str, Any] = {"max_new_tokens": 15, "eos_token_id": None, "pad_token_id": 1}
    left = ours.generate(ids, mask, **options)[:, 9:]
    assert torch.equal(left, ours.generate(right, right_mask, **options)[:, 9:])
    for row, padding in enumerate((0, 4, 8)):
        alone = ours.generate(ids[row : row + 1, padding:], **options)[0, 9 - padding :]
        assert torch.equal(left[row], alone)


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert not self.ended
        self.values.append(value)

    def end(self) -> None:
        self.ended += 1


def test_streamers_are_told_what_transformers_tells_them() -> None:
    theirs, ours = pair("head dim 64")
    ids = prompts(2, 5, seed=1)
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "eos_token_id": greedy_token("head dim 64", ids, 4),
        "pad_token_id": 7,
    }
    expected, found = Recorder(), Recorder()
    theirs.generate(ids, attention_mask=torch.ones_like(ids), streamer=expected, **options)
    ours.generate(ids, streamer=found, **options)
    assert found.ended == expected.ended == 1
    assert len(found.values) == len(expected.values)
    for ours_value, theirs_value in zip(found.values, expected.values, strict=True):
        assert torch.equal(ours_value, theirs_value)


def detailed(
    model: GPT, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any
) -> GenerateOutput:
    out = model.generate(ids, mask, return_dict_in_generate=True, **options)
    assert isinstance(out, GenerateOutput)
    return out


@pytest.mark.parametrize("sampled", [False, True])
def test_logprobs_are_those_of_a_forward_pass(sampled: bool) -> None:
    ours = pair("silu, epsilon")[1]
    ids = prompts(2, 5, seed=3)
    out = detailed(
        ours,
        ids,
        max_new_tokens=20,
        output_logprobs=True,
        do_sample=sampled,
        num_return_sequences=2 if sampled else 1,
        temperature=2.5 if sampled else 1.0,
        repetition_penalty=1.2,
        seed=4,
        eos_token_id=None,
    )
    assert out.logprobs is not None
    with torch.no_grad():
        logits = ours(out.sequences).logits[:, 4:-1].double().log_softmax(-1)
    expected = logits.gather(2, out.sequences[:, 5:, None])[..., 0]
    torch.testing.assert_close(out.logprobs.double(), expected, atol=1e-4, rtol=0)


def test_asking_for_logprobs_is_enough() -> None:
    ours = pair("silu, epsilon")[1]
    out = ours.generate(prompts(1, 5), max_new_tokens=3, output_logprobs=True)
    assert isinstance(out, GenerateOutput)
    assert out.logprobs is not None
    assert out.logprobs.shape == (1, 3)
    for name in ("output_logprobs", "return_dict_in_generate"):
        for value in (5, 1, "yes"):
            with pytest.raises(TypeError, match=f"{name} is {value!r}; True or False"):
                ours.generate(prompts(1, 5), max_new_tokens=3, **{name: value})


def test_finish_reasons_and_the_fill_of_logprobs() -> None:
    ours = pair("head dim 64")[1]
    ids = prompts(3, 5, seed=1)
    out = detailed(
        ours,
        ids,
        max_new_tokens=12,
        eos_token_id=greedy_token("head dim 64", ids, 4),
        pad_token_id=7,
        output_logprobs=True,
    )
    assert out.finish_reasons[0] == "stop"
    assert "length" in out.finish_reasons
    assert out.logprobs is not None
    assert out.logprobs.shape == (3, 12)
    ended = [(row == 7).nonzero()[0, 0].item() if (row == 7).any() else 12 for row in out.sequences[:, 5:]]
    for row, end in enumerate(ended):
        assert (out.logprobs[row, int(end) :] == 0).all()
        assert (out.logprobs[row, : int(end)] < 0).all()


def test_seeds_decide_the_draws() -> None:
    ours = pair("gelu")[1]
    ids = prompts(2, 4)

    def draw(**options: Any) -> list[list[int]]:
        out = ours.generate(ids, do_sample=True, max_new_tokens=24, eos_token_id=None, **options)
        assert isinstance(out, torch.Tensor)
        rows: list[list[int]] = out[:, 4:].tolist()
        return rows

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    torch.manual_seed(5)
    first = draw()
    assert draw() != first
    torch.manual_seed(5)
    assert draw() == first


def test_a_row_is_drawn_alike_whatever_runs_beside_it() -> None:
    ours = pair("gelu")[1]
    ids = prompts(4, 6)
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 24, "seed": 3, "top_p": 0.95}
    together = ours.generate(ids, eos_token_id=None, **options)
    alone = ours.generate(ids[:1], eos_token_id=None, **options)
    assert torch.equal(together[:1], alone)
    # rows that end early, and leave, change nothing either
    ending = [int(together[1, 10]), int(together[2, 15])]
    ended = ours.generate(ids, eos_token_id=ending, pad_token_id=1, **options)
    for row, expected in zip(ended.tolist(), together.tolist(), strict=True):
        new = row[6 : row.index(1, 6)] if 1 in row[6:] else row[6:]
        assert new == expected[6 : 6 + len(new)]


@pytest.mark.parametrize("speculate", [None, 3])
def test_a_seed_s_tokens_are_the_prompt_s_own(speculate: int | None) -> None:
    ours = pair("gelu")[1]
    ids, mask = left_padded()
    options: dict[str, Any] = {
        "do_sample": True,
        "max_new_tokens": 12,
        "eos_token_id": None,
        "pad_token_id": 1,
    }
    options |= {"seed": 2**64 - 3, "speculate": speculate}

    def drawn(rows: list[int], copies: int = 1) -> list[list[int]]:
        out = ours.generate(ids[rows], mask[rows], num_return_sequences=copies, **options)
        assert isinstance(out, torch.Tensor)
        new: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return new

    alone = [drawn([row])[0] for row in range(3)]
    assert len({tuple(row) for row in alone}) == 3
    assert drawn([0, 1, 2]) == alone
    assert drawn([2, 0, 1]) == [alone[2], alone[0], alone[1]]
    assert drawn([1, 1, 2, 1]) == [alone[1], alone[1], alone[2], alone[1]]
    # copies differ, and those of a prompt are its own too
    copies = drawn([1], copies=3)
    assert copies[0] == alone[1]
    assert len({tuple(row) for row in copies}) == 3
    assert drawn([2, 1], copies=3)[3:] == copies
    # the same 64 bits, signed
    options["seed"] = -3
    assert drawn([0, 1, 2]) == alone


def test_without_a_seed_equal_prompts_draw_apart() -> None:
    ids = prompts(1, 4).repeat(4, 1)
    out = pair("gelu")[1].generate(ids, do_sample=True, max_new_tokens=12, eos_token_id=None)
    assert isinstance(out, torch.Tensor)
    assert len({tuple(row) for row in out.tolist()}) == 4


def test_return_sequences_share_a_prefill_and_differ() -> None:
    ours = pair("odd width")[1]
    ids = prompts(2, 6)
    calls: list[int] = []
    hook = ours.transformer.register_forward_pre_hook(lambda _, args: calls.append(args[0].numel()))
    try:
        out = ours.generate(
            ids, do_sample=True, num_return_sequences=3, max_new_tokens=9, seed=0, eos_token_id=None
        )
    finally:
        hook.remove()
    assert isinstance(out, torch.Tensor)
    assert out.shape == (6, 15)
    assert torch.equal(out[:, :6], ids.repeat_interleave(3, 0))
    assert len({tuple(row) for row in out.tolist()}) == 6
    assert calls[:2] == [6, 6]


def dropping(**changes: Any) -> tuple[GPT, GPT]:
    """(a model in training mode with dropout in every place, the same weights in evaluation mode)."""
    torch.manual_seed(1)
    fields = {"vocab_size": VOCAB, "n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
    drops = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    training = GPT(GPTConfig(**(fields | drops | {"initializer_range": 0.4} | changes)))
    evaluated = GPT(training.config).eval()
    evaluated.load_state_dict(training.state_dict())
    training.tokenizer = evaluated.tokenizer = Tokenizer.bytes()
    return training, evaluated


WAYS: dict[str, Callable[[GPT], Any]] = {
    "generate": lambda m: m.generate(prompts(2, 5), max_new_tokens=20, eos_token_id=None).tolist(),
    "draws": lambda m: m.generate(
        prompts(2, 5), do_sample=True, seed=3, max_new_tokens=9, eos_token_id=None
    ).tolist(),
    "beams": lambda m: m.generate(prompts(2, 5), max_new_tokens=6, num_beams=3).tolist(),
    "speculation": lambda m: m.generate(prompts(1, 5), max_new_tokens=20, speculate=3).tolist(),
    "text": lambda m: m.generate_text([[5, 6], [7]], max_new_tokens=6, eos_token_id=None),
    "stream": lambda m: list(m.stream([5, 6], max_new_tokens=6, eos_token_id=None)),
    "score": lambda m: m.score([[5, 6, 7], [8, 9]]),
}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_dropout_is_off_and_the_mode_never_touched(
    way: str, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr(choose, "EXECUTORS", (TorchExecutor,))
    training, evaluated = dropping(model_type="openai-gpt" if plain else "gpt2")
    modes: dict[bool, set[bool]] = {True: set(), False: set()}
    assert WAYS[way](training) == WAYS[way](evaluated)
    for model in (training, evaluated):
        for module in model.modules():
            module.register_forward_pre_hook(lambda m, _, seen=modes[model.training]: seen.add(m.training))
    expected = WAYS[way](evaluated)
    assert WAYS[way](training) == expected
    assert modes == {True: {True}, False: {False}}
    assert all(module.training for module in training.modules())
    evaluated.transformer.h[1].train()
    assert WAYS[way](evaluated) == expected


def test_dropout_stays_off_with_recomputed_activations() -> None:
    training, evaluated = dropping()
    training.gradient_checkpointing_enable()
    assert WAYS["generate"](training) == WAYS["generate"](evaluated)
    assert WAYS["score"](training) == WAYS["score"](evaluated)


def test_threads_generate_alike_from_a_model_in_training_mode() -> None:
    training, evaluated = dropping()
    ways = ["beams", "text", "score", "draws"]
    expected = [WAYS[way](evaluated) for way in ways]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: WAYS[ways[i % 4]](training), range(32)))
    assert all(out == expected[i % 4] for i, out in enumerate(found))
    assert training.training


def test_a_training_step_amid_a_stream_has_its_dropout() -> None:
    training, evaluated = dropping()
    ids = prompts(2, 9)

    def loss() -> float:
        torch.manual_seed(7)
        return training(ids, labels=ids).loss.item()

    with_dropout = loss()
    assert with_dropout != evaluated(ids, labels=ids).loss.item()
    stream = training.stream([5, 6], max_new_tokens=12, eos_token_id=None)
    pieces = [next(stream)]
    assert training.training
    assert loss() == with_dropout
    half_read = training.stream([8], max_new_tokens=12)
    next(half_read)
    assert loss() == with_dropout
    assert pieces + list(stream) == list(evaluated.stream([5, 6], max_new_tokens=12, eos_token_id=None))
    assert training.training


def test_results_can_be_trained_on() -> None:
    ours = GPT(GPTConfig(vocab_size=VOCAB, n_positions=32, n_layer=1, n_head=2, n_embd=16))
    out = ours.generate(prompts(2, 5), max_new_tokens=4)
    ours(out, labels=out).loss.backward()


@pytest.mark.parametrize("plain", [False, True])
def test_the_default_device_is_no_matter(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr(choose, "EXECUTORS", (TorchExecutor,))
    ours = dropping(initializer_range=1.0)[1]
    ids, repeated = prompts(2, 5), torch.tensor([[5, 6, 5, 6, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    penalties = {"repetition_penalty": 1.1, "frequency_penalty": 0.1, "presence_penalty": 0.1}
    rules = {"no_repeat_ngram_size": 2, "sequence_bias": {(5,): 1.0, (6, 7): 2.0}, "logit_bias": {4: 1.0}}
    streamers = [Recorder(), Recorder()]
    calls: list[Callable[[], Any]] = [
        lambda: ours.generate(ids, mask, max_new_tokens=5, pad_token_id=1, **penalties, **rules),
        lambda: ours.generate(ids, do_sample=True, num_return_sequences=2, seed=3, output_logprobs=True),
        lambda: ours.generate(ids, do_sample=True, max_new_tokens=3).shape,
        lambda: ours.generate(ids, num_beams=3, **penalties, **rules, return_dict_in_generate=True),
        lambda: ours.generate(repeated, max_new_tokens=20, speculate=3, frequency_penalty=0.1),
        lambda: ours.generate_text(["ab", "cde"], max_new_tokens=5, stop_strings="x"),
        lambda: list(ours.stream("ab", max_new_tokens=5)),
        lambda: ours.score(["abc", "de"])[0].perplexity,
        lambda: ours.generate(ids, streamer=streamers[-1], max_new_tokens=3),
        lambda: ours(ids, attention_mask=mask, labels=ids).loss.item(),
    ]
    expected = [str(call()) for call in calls]
    other = streamers.pop()
    torch.set_default_device("meta")
    try:
        found = [str(call()) for call in calls]
    finally:
        torch.set_default_device(None)
    assert found == expected
    assert str(streamers[0].values) == str(other.values)


def test_tensors_and_numpy_s_numbers_are_options() -> None:
    ours = pair("head dim 64")[1]
    ids = prompts(2, 6, seed=3)
    plain: dict[str, Any] = {
        "max_new_tokens": 12,
        "eos_token_id": [3, 4],
        "pad_token_id": 1,
        "seed": 7,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 9,
        "bad_words_ids": [[9], [5, 6]],
        "suppress_tokens": [8, 10],
        "sequence_bias": {(7,): 1.5, (7, 8): -2.5},
        "logit_bias": {11: 1.5},
    }
    expected = ours.generate(ids, **plain)
    tensors = plain | {
        "max_new_tokens": torch.tensor(12),
        "eos_token_id": torch.tensor([3, 4]),
        "pad_token_id": torch.tensor(1),
        "seed": torch.tensor(7),
        "do_sample": torch.tensor(True),
        "temperature": torch.tensor(0.5),
        "bad_words_ids": [torch.tensor([9]), torch.tensor([5, 6])],
        "suppress_tokens": torch.tensor([8, 10]),
        "sequence_bias": [(torch.tensor([7]), torch.tensor(1.5)), (torch.tensor([7, 8]), -2.5)],
        "logit_bias": {11: torch.tensor(1.5)},
    }
    arrays = plain | {
        "max_new_tokens": np.int64(12),
        "eos_token_id": np.array([3, 4]),
        "pad_token_id": np.uint8(1),
        "seed": np.uint64(7),
        "do_sample": np.bool_(True),
        "temperature": np.float32(0.5),
        "top_k": np.int32(9),
        "bad_words_ids": [np.array([9]), [np.int64(5), np.int64(6)]],
        "suppress_tokens": np.array([8, 10]),
        "sequence_bias": {(np.int64(7),): np.float32(1.5), (np.int64(7), 8): -2.5},
        "logit_bias": {np.int64(11): np.float64(1.5)},
    }
    for given in (tensors, arrays):
        assert torch.equal(ours.generate(ids, **given), expected)
    for one in (4, torch.tensor(4), torch.tensor([4]), np.int64(4)):
        assert torch.equal(
            ours.generate(ids, **plain | {"eos_token_id": one}),
            ours.generate(ids, **plain | {"eos_token_id": [4]}),
        )
    with pytest.raises(TypeError, match=r"max_new_tokens is \[12\]; a whole number"):
        ours.generate(ids, max_new_tokens=torch.tensor([12]))
    with pytest.raises(TypeError, match=r"top_k is 2\.0; a whole number"):
        ours.generate(ids, top_k=np.float64(2.0))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_new_token": 4}, TypeError, "'max_new_token' is no option; did you mean 'max_new_tokens'?"),
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0; 1 or more"),
    ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens is 2.5; a whole number"),
    ({"max_new_tokens": 91}, ValueError, "prompt has 6 tokens, the model's context is 96: at most 90 is"),
    ({"max_length": 97}, ValueError, "max_length is 97.*at most 96 is possible"),
    ({"max_length": 6}, ValueError, "max_length is 6, the prompt has 6 tokens already"),
    ({"temperature": 0.0, "do_sample": True}, ValueError, "temperature is 0.0; a number above 0"),
    ({"temperature": "hot"}, TypeError, "temperature is 'hot'; a number"),
    ({"top_k": -1, "do_sample": True}, ValueError, "top_k is -1; 0 or more"),
    ({"top_p": 0.0, "do_sample": True}, ValueError, "top_p is 0.0; 0 < top_p <= 1"),
    ({"min_p": 1.5, "do_sample": True}, ValueError, "min_p is 1.5"),
    ({"repetition_penalty": -1.0}, ValueError, "repetition_penalty is -1.0"),
    ({"num_return_sequences": 2}, ValueError, "num_return_sequences is 2, num_beams 1"),
    ({"num_return_sequences": 3, "num_beams": 2}, ValueError, "num_return_sequences is 3, num_beams 2"),
    ({"num_beams": 2, "do_sample": True}, ValueError, "beam search does not sample"),
    ({"early_stopping": "soon"}, ValueError, "early_stopping is 'soon'"),
    ({"eos_token_id": [1, -2]}, TypeError, "eos_token_id"),
    ({"seed": -(2**63) - 1}, ValueError, "seed is -9223372036854775809; 64 bits"),
    ({"seed": 2**64}, ValueError, "seed is 18446744073709551616; 64 bits"),
    ({"length_penalty": 1e5, "num_beams": 2}, ValueError, "length_penalty is 100000.0; -50 to 50"),
    ({"length_penalty": float("nan"), "num_beams": 2}, ValueError, "length_penalty is nan; -50 to 50"),
    ({"early_stopping": 1, "num_beams": 2}, ValueError, "early_stopping is 1"),
    ({"eos_token_id": 2.5}, TypeError, "eos_token_id is 2.5"),
    ({"eos_token_id": 2**63}, TypeError, "eos_token_id is 9223372036854775808"),
    ({"pad_token_id": 2**63}, ValueError, r"pad_token_id is 9223372036854775808; 0 to 2\*\*63 - 1"),
    ({"temperature": 10**400, "do_sample": True}, ValueError, "temperature is a number of 1329 bits"),
    ({"stop_strings": [""]}, ValueError, "none empty"),
    ({"stop_strings": "x"}, ValueError, "without a tokenizer"),
    ({"do_sample": 1}, TypeError, "do_sample is 1"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pair("odd width")[1].generate(prompts(1, 6), **options)


ANYTHING: list[Any] = [
    True, -1, 0, 3, 1.5, math.nan, -math.inf, 10**400, -(10**400), 2**63, 2**64, "x", "", b"x", object(), 1j,
    [], {}, [[1]], [1, 2], [[]], [None], [[None]], [10**400], [[10**400]], [([1], 2.0)], [([1], None)],
    {1: 2.0}, {1: 10**400}, {(1, 2): -(10**400)}, {(1,): "x"}, {"a": 1.0}, {1, 2}, range(3), iter([1]),
    torch.tensor([3, 4]), torch.tensor([]), torch.tensor([[1, 2]]), torch.tensor(math.nan), np.array([3, 4]),
]  # fmt: skip


@pytest.mark.parametrize("name", sorted(GenerateOptions.__annotations__))
@pytest.mark.filterwarnings("ignore:generate:UserWarning")
def test_whatever_is_given_is_taken_or_refused_by_name(name: str) -> None:
    ours = dropping(n_layer=1)[1]
    ids = prompts(1, 4)
    for value in ANYTHING:
        for source in ("generate", "generation_config"):
            ours.generation_config = {name: value} if source == "generation_config" else {}
            refusal = "generate: none"
            try:
                prepare(ours, ids, None, {name: value} if source == "generate" else {})  # type: ignore[misc]
            except (TypeError, ValueError) as error:
                refusal = str(error)
            assert refusal.startswith(("generate: ", f"{source}: ")), value


def test_bad_prompts() -> None:
    ours = pair("odd width")[1]
    ids = prompts(2, 6)
    with pytest.raises(ValueError, match="prompt has 96 tokens, the model's context is 96"):
        ours.generate(prompts(1, 96))
    with pytest.raises(ValueError, match="prompt has 200 tokens"):
        ours.generate(prompts(1, 200), max_new_tokens=1)
    with pytest.raises(ValueError, match=rf"holds {VOCAB}; token ids from 0 to {VOCAB - 1}"):
        ours.generate(torch.full((1, 3), VOCAB))
    with pytest.raises(ValueError, match="shape"):
        ours.generate(ids[0])
    with pytest.raises(ValueError, match="shape"):
        ours.generate(ids[:, :0])
    with pytest.raises(TypeError, match="list"):
        ours.generate(ids.tolist())
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 5\)"):
        ours.generate(ids, torch.ones(2, 5))
    with pytest.raises(ValueError, match="row 1 of the prompt is all padding"):
        ours.generate(ids, torch.tensor([[1] * 6, [0] * 6]))
    with pytest.raises(ValueError, match="other values than 0 and 1"):
        ours.generate(ids, torch.full((2, 6), 2))


def test_idle_sampling_options_are_not_silent() -> None:
    with pytest.warns(UserWarning, match="temperature, top_p have no effect without do_sample=True"):
        pair("odd width")[1].generate(prompts(1, 4), temperature=0.5, top_p=0.5, max_new_tokens=1)


def test_every_option_is_settled() -> None:
    renamed = {"max_length", "max_new_tokens", "min_length", "min_new_tokens", "eos_token_id", "pad_token_id"}
    renamed.add("logit_bias")  # joins sequence_bias
    fields = set(Settings.__dataclass_fields__) - {"max_new", "min_new", "eos", "pad"}
    assert set(GenerateOptions.__annotations__) - renamed == fields


def test_beam_search_refuses_what_it_cannot_do() -> None:
    ours = pair("odd width")[1]
    with pytest.raises(ValueError, match="streamer"):
        ours.generate(prompts(1, 4), num_beams=2, streamer=Recorder())
    with pytest.raises(ValueError, match="output_logprobs"):
        ours.generate(prompts(1, 4), num_beams=2, output_logprobs=True)


@pytest.mark.parametrize("name", ["head dim 64", "gpt-1"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 4, "num_return_sequences": 4},
        {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
        {"num_beams": 3, "early_stopping": "never", "length_penalty": 3.0},
        {"num_beams": 3, "early_stopping": "never", "length_penalty": -1.0, "repetition_penalty": 1.3},
        {"num_beams": 5, "min_new_tokens": 12, "length_penalty": 0.0, "num_return_sequences": 2},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()),
)
def test_beam_search_is_that_of_transformers(name: str, options: dict[str, Any]) -> None:
    theirs, ours = pair(name)
    common: dict[str, Any] = {
        "max_new_tokens": 24,
        "pad_token_id": 7,
        "return_dict_in_generate": True,
        **options,
    }
    ids, mask = left_padded()
    # end-of-text tokens that do come up
    stops = ours.generate(ids, mask, max_new_tokens=12, num_beams=4, eos_token_id=None)[:, -1].tolist()
    for given, given_mask in ((ids[:1], mask[:1]), (ids, mask)):
        for eos in (None, stops) if len(given) > 1 else (stops[0],):
            expected = theirs.generate(
                given, attention_mask=given_mask, eos_token_id=eos, output_scores=True, **common
            )
            found = ours.generate(given, given_mask, eos_token_id=eos, **common)
            assert isinstance(found, GenerateOutput)
            torch.testing.assert_close(found.sequences, expected.sequences, rtol=0, atol=0)
            assert found.sequences_scores is not None
            torch.testing.assert_close(
                found.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4
            )
            assert len(found.finish_reasons) == len(found.sequences)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (math.nan, "NaN"),
        (math.inf, r"\+inf"),
        (-math.inf, "no token to choose: every one is -inf"),
    ],
)
@pytest.mark.parametrize("at", [0, 2])
def test_logits_that_are_no_numbers_are_refused(bad: float, message: str, at: int, beams: int) -> None:
    model = dropping()[1]
    calls: list[int] = []
    # Each prompt is one call of the head, and after them each row.
    spoilt = 2 + 2 * beams * (at - 1) + beams if at else 1

    def spoil(module: torch.nn.Module, args: Any, logits: torch.Tensor) -> torch.Tensor:
        if len(calls) == spoilt:
            # the second prompt's first row
            logits[-1, ..., slice(None) if bad == -math.inf else 7] = bad
        calls.append(len(logits))
        return logits

    model.lm_head.register_forward_hook(spoil)
    where = "row 1: beam 0: the logits" if beams > 1 else "row 1: the logits"
    with pytest.raises(ValueError, match=f"{where}.*{message}"):
        model.generate(prompts(2, 5), max_new_tokens=6, num_beams=beams, eos_token_id=None)
    assert len(calls) == 2 + 2 * beams * at


@pytest.mark.parametrize("speculate", [None, 2])
def test_what_a_gpu_tells_by_a_status_is_raised(
    speculate: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if _native.extension is None:
        pytest.skip("gptkern._C is not built")
    monkeypatch.setattr(launch, "serves", lambda logits: True)
    ours = dropping()[1]
    ids = prompts(3, 5)
    options: dict[str, Any] = {"max_new_tokens": 20, "pad_token_id": 0, "speculate": speculate}
    expected = ours.generate(ids, eos_token_id=None, **options)
    # the first row leaves before the second meets what is no number
    eos = int(expected[0, 6])
    assert eos not in expected[1:, 5:]
    at = next(i for i in range(9, 25) if expected[1, i] not in expected[1, :i])
    assert int(expected[1, at]) not in expected[2]
    ours.lm_head.weight = torch.nn.Parameter(ours.lm_head.weight.detach().clone())
    ours.transformer.wte.weight.data[int(expected[1, at])] = math.nan
    with pytest.raises(ValueError, match="generate: row 1: the logits hold NaN"):
        ours.generate(ids, eos_token_id=eos, **options)


def test_beams_of_a_tiny_vocabulary_are_the_best_of_all_sequences() -> None:
    torch.manual_seed(0)
    fields = {
        "vocab_size": 3,
        "n_positions": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 8,
        "eos_token_id": None,
    }
    for seed in range(5):
        torch.manual_seed(seed)
        ours = GPT(GPTConfig(**fields, initializer_range=1.0)).eval()
        ids = torch.randint(0, 3, (1, 4))
        every = torch.cartesian_prod(*[torch.arange(3)] * 4)
        with torch.no_grad():
            whole = torch.cat([ids.expand(len(every), -1), every], 1)
            logprobs = ours(whole).logits[:, 3:-1].double().log_softmax(-1)
        scores = logprobs.gather(2, every[..., None])[..., 0].sum(1)
        # 27 beams keep every beginning; the best five of all 81 are found
        out = detailed(ours, ids, num_beams=27, num_return_sequences=5, max_new_tokens=4, length_penalty=0.0)
        best = scores.topk(5)
        assert out.sequences[:, 4:].tolist() == every[best.indices].tolist()
        assert out.sequences_scores is not None
        torch.testing.assert_close(out.sequences_scores.double(), best.values, atol=1e-4, rtol=0)
        # 5 beams: what an exhaustive search that keeps 5 at each step keeps
        kept: list[tuple[float, list[int]]] = [(0.0, [])]
        for step in range(4):
            grown = []
            for _, tokens in kept:
                for token in range(3):
                    new = [*tokens, token]
                    row = int((every[:, : step + 1] == torch.tensor(new)).all(1).nonzero()[0])
                    total = logprobs[row, range(step + 1), every[row, : step + 1]].sum().item()
                    grown.append((total, new))
            kept = sorted(grown, reverse=True)[:5]
        out = detailed(ours, ids, num_beams=5, num_return_sequences=5, max_new_tokens=4)
        assert out.sequences[:, 4:].tolist() == [tokens for _, tokens in kept]


@pytest.mark.parametrize("extension", [False, True])
def test_temperatures_near_nothing_are_greedy(extension: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if extension:
        if _native.extension is None:
            pytest.skip("gptkern._C is not built")
        monkeypatch.setattr(launch, "serves", lambda logits: True)
    ours = pair("head dim 64")[1]
    ids = prompts(2, 6, seed=3)
    expected = ours.generate(ids, max_new_tokens=16, eos_token_id=None)
    for temperature in (1e-3, 1e-10, 1e-45, 1e-310, 5e-324):
        found = ours.generate(
            ids, max_new_tokens=16, eos_token_id=None, do_sample=True, temperature=temperature, seed=1
        )
        assert torch.equal(found, expected), temperature


def test_beam_search_with_more_beams_than_tokens() -> None:
    ours = GPT(GPTConfig(vocab_size=3, n_positions=16, n_layer=1, n_head=1, n_embd=8, eos_token_id=2)).eval()
    out = detailed(ours, torch.tensor([[0, 1]]), num_beams=8, num_return_sequences=8, max_new_tokens=4)
    assert len(out.sequences) == 8
    assert out.sequences_scores is not None
    assert all(math.isfinite(score) for score in out.sequences_scores.tolist())


def test_the_fast_step_is_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("odd width", "untied", "gpt-1", "relu, inner 40"):
        ours = pair(name)[1]
        ids, mask = left_padded()
        for dtype in (torch.float32, torch.bfloat16):
            model = GPT(ours.config).to(dtype).eval()
            model.load_state_dict(ours.state_dict())
            fast = detailed(model, ids, mask, max_new_tokens=20, pad_token_id=1, output_logprobs=True)
            with monkeypatch.context() as patched:
                patched.setattr(choose, "EXECUTORS", (TorchExecutor,))
                plain = detailed(model, ids, mask, max_new_tokens=20, pad_token_id=1, output_logprobs=True)
            assert fast.logprobs is not None
            assert plain.logprobs is not None
            if dtype == torch.float32:
                assert torch.equal(fast.sequences, plain.sequences)
                torch.testing.assert_close(fast.logprobs, plain.logprobs, atol=1e-4, rtol=0)
            else:
                # the first token of a step; later ones may come of another choice
                torch.testing.assert_close(fast.logprobs[:, :2], plain.logprobs[:, :2], atol=0.3, rtol=0.1)


def test_replaced_layers_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    source = pair("odd width")[1]
    model = GPT(source.config).eval()
    model.load_state_dict(source.state_dict())
    usual = model.generate(prompts(1, 5), max_new_tokens=30)
    attention = model.transformer.h[0].attn
    assert isinstance(attention, Attention)
    replaced = Doubled(attention.c_proj.in_features, attention.c_proj.out_features)
    replaced.load_state_dict(attention.c_proj.state_dict())
    attention.c_proj = replaced
    found = model.generate(prompts(1, 5), max_new_tokens=30)
    with monkeypatch.context() as patched:
        patched.setattr(choose, "EXECUTORS", (TorchExecutor,))
        assert torch.equal(found, model.generate(prompts(1, 5), max_new_tokens=30))
    assert not torch.equal(found, usual)


def test_changed_weights_are_never_missed() -> None:
    source = pair("odd width")[1]
    model = GPT(source.config).eval()
    model.load_state_dict(source.state_dict())
    before = model.generate(prompts(1, 5), max_new_tokens=30)
    model.transformer.wte.weight.data.copy_(model.transformer.wte.weight.data.flip(0))
    after = model.generate(prompts(1, 5), max_new_tokens=30)
    assert not torch.equal(before, after)
    restored = model.transformer.wte.weight.data.flip(0)
    model.transformer.wte.weight.data.copy_(restored)
    assert torch.equal(model.generate(prompts(1, 5), max_new_tokens=30), before)


@pytest.mark.kernels
def test_the_kernels_step_makes_the_same_tokens(device: torch.device) -> None:
    source = pair("head dim 16, one head")[1]
    model = GPT(source.config).to(device).eval()
    model.load_state_dict(source.state_dict())
    ids, mask = left_padded()
    options: dict[str, Any] = {"max_new_tokens": 4, "pad_token_id": 1}
    found = model.generate(ids, mask, **options).cpu()
    assert torch.equal(found, pair("head dim 16, one head")[0].generate(ids, attention_mask=mask, **options))


def test_looking_ahead_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = pair("head dim 64")[1]
    ids, mask = left_padded()
    options: dict[str, Any] = {"max_new_tokens": 24, "pad_token_id": 7, "repetition_penalty": 1.1}
    for steps in (24, 3):
        options["max_new_tokens"] = steps
        free = ours.generate(ids, mask, eos_token_id=None, **options)
        ends = free[:, 9 + steps // 2].tolist()
        for eos in (None, ends[0], ends):
            for sampling in ({}, {"do_sample": True, "seed": 1, "num_return_sequences": 2}):
                expected = ours.generate(ids, mask, eos_token_id=eos, **options, **sampling)
                with monkeypatch.context() as patched:
                    patched.setattr(engine, "AHEAD_ON", ("cpu",))
                    found = ours.generate(ids, mask, eos_token_id=eos, **options, **sampling)
                assert torch.equal(found, expected)
