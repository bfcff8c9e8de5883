"""``generate`` as a front of the engine: which calls become requests, and that tokens are the library's."""

from __future__ import annotations

import copy
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
from scipy import stats
from test_transformers_generate import FALLBACKS, VOCAB, RecordingStreamer, build, prompt
from transformers.generation import logits_process as library

import gptkern
from gptkern.engine.cache import KVCache
from gptkern.engine.engine import Engine
from gptkern.generate.prompt import Prompts
from gptkern.transformers import explain, options
from gptkern.transformers.parts import CACHE
from gptkern.transformers.view import view

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 59}
SAMPLING: dict[str, Any] = {"do_sample": True, "pad_token_id": 59}


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of copies of each request that an engine was given."""
    copies: list[int] = []
    submit = Engine.submit

    def counted(self: Engine, request: Any, settings: Any, keys: Any, tokenizer: Any = None) -> int:
        copies.append(len(keys))
        return submit(self, request, settings, keys, tokenizer)

    monkeypatch.setattr(Engine, "submit", counted)
    return copies


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """A model of the library's, and the same accelerated."""
    torch.manual_seed(3)
    theirs = build()
    return theirs, gptkern.accelerate(copy.deepcopy(theirs), rng="philox")


@pytest.fixture
def fast(pair: tuple[Any, Any]) -> Any:
    return pair[1]


@pytest.mark.parametrize(
    ("case", "padded", "taken"),
    [
        ({}, True, True),
        ({"min_new_tokens": 3, "suppress_tokens": [4]}, True, True),
        ({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, False, True),
        ({"bad_words_ids": [[3], [4, 5]], "sequence_bias": [[[7], 9.0], [[7, 8], -20.0]]}, False, True),
        ({"stopping_criteria": [lambda ids, scores: ids[:, -1] % 5 == 0]}, True, True),
        # The library counts padding as text.
        ({"repetition_penalty": 1.3}, True, False),
        ({"no_repeat_ngram_size": 1}, True, False),
        ({"logits_processor": [lambda ids, scores: scores.roll(1, -1)]}, False, False),
        ({"forced_eos_token_id": 60}, False, False),
        ({"return_dict_in_generate": True, "output_scores": True}, False, False),
        (
            {"num_beams": 4, "num_return_sequences": 4, "eos_token_id": [5, 6, 7, 8], "pad_token_id": 0},
            True,
            True,
        ),
        ({"num_beams": 2, "no_repeat_ngram_size": 2, "length_penalty": 0.5, "pad_token_id": 0}, False, True),
        ({"num_beams": 2, "stopping_criteria": [lambda ids, scores: ids[:, -1] % 5 == 0]}, False, False),
        ({CACHE: transformers.DynamicCache}, False, False),
    ],
)
def test_a_call_becomes_requests_where_the_sampler_computes_it(
    pair: tuple[Any, Any], requests: list[int], case: dict[str, Any], padded: bool, taken: bool
) -> None:
    ids, mask = prompt(3, 6, padded)
    ids[~mask.bool()] = 59
    found = []
    for model in pair:
        made = {name: value() if isinstance(value, type) else value for name, value in case.items()}
        output = model.generate(ids, attention_mask=mask, max_new_tokens=12, **GREEDY | made)
        found.append(output if isinstance(output, torch.Tensor) else output.sequences)
    assert requests == ([case.get("num_return_sequences", 1)] * 3 if taken else [])
    assert found[1].dtype == torch.int64 and torch.equal(*found)
    assert not found[1].is_inference()
    found[1].add_(0)


@pytest.mark.parametrize("seed", range(12))
def test_random_ends_of_rows(pair: tuple[Any, Any], seed: int) -> None:
    """Rows that end by tokens, by criteria of a row and of the batch, and by length; some without eos."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    ids, mask = prompt(draw.randint(1, 4), draw.randint(2, 9), draw.random() < 0.5)
    eos = draw.choice([None, draw.sample(range(VOCAB), 8)])
    ends = draw.choice([3, 7, 100])
    found = []
    for model in pair:
        calls: list[list[list[int]]] = []

        def criterion(tokens: torch.Tensor, scores: Any, calls: Any = calls) -> torch.Tensor:
            calls.append(tokens.tolist())
            return (tokens[:, -1] % ends == 0) | (tokens[:, -1].sum() % 41 == 0)

        tokens = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=15,
            eos_token_id=eos,
            stopping_criteria=[criterion],
            **GREEDY,
        )
        found.append((tokens.tolist(), calls))
    assert found[0] == found[1]


@pytest.mark.parametrize("seed", range(12))
def test_random_beam_searches(pair: tuple[Any, Any], requests: list[int], seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    padded, beams = draw.random() < 0.5, draw.randint(2, 5)
    ids, mask = prompt(draw.randint(1, 3), draw.randint(2, 9), padded)
    given: dict[str, Any] = {
        "num_beams": beams,
        "num_return_sequences": draw.randint(1, beams),
        "max_new_tokens": draw.randint(1, 20),
        "early_stopping": draw.choice([True, False, "never", None]),
        "length_penalty": draw.choice([1.0, 0.0, -1.0, 2.0]),
        "eos_token_id": draw.choice([None, 60, draw.sample(range(VOCAB), draw.randint(2, 12))]),
        "pad_token_id": draw.choice([0, 59, None]),
        "min_new_tokens": draw.choice([None, 5]),
    }
    if not padded:
        given |= {"repetition_penalty": draw.uniform(0.7, 1.6), "no_repeat_ngram_size": draw.choice([0, 2])}
    theirs, ours = (model.generate(ids, attention_mask=mask, do_sample=False, **given) for model in pair)
    assert torch.equal(theirs, ours)
    assert requests == [given["num_return_sequences"]] * len(ids)


def test_stop_strings(pair: tuple[Any, Any], requests: list[int], shared_data: Path) -> None:
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(shared_data / "gpt2-tokenizer")
    torch.manual_seed(1)
    theirs = build(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
    ours = gptkern.accelerate(copy.deepcopy(theirs))
    ids, mask = torch.randint(1, len(tokenizer), (3, 5)), torch.ones(3, 5)
    call: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 20, **GREEDY, "pad_token_id": 0}
    whole = theirs.generate(ids, **call)
    stops = tokenizer.batch_decode([whole[0, 10:11], whole[1, 12:13]])
    expected, found = (
        model.generate(ids, tokenizer=tokenizer, stop_strings=stops, **call) for model in (theirs, ours)
    )
    assert torch.equal(found, expected)
    assert requests == [1, 1, 1] and (expected == 0).sum(1).tolist() == [14, 12, 0]


def test_a_streamer_gets_what_the_librarys_gives(pair: tuple[Any, Any], requests: list[int]) -> None:
    ids, mask = prompt(2, 5, True)
    streams = []
    for model in pair:
        streamer = RecordingStreamer()
        model.double().generate(
            ids,
            attention_mask=mask,
            streamer=streamer,
            max_new_tokens=9,
            eos_token_id=list(range(9)),
            **GREEDY,
        )
        streams.append(streamer.seen)
    assert streams[0] == streams[1] and requests == [1, 1]


def test_the_second_call_makes_no_cache(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    init = KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda self, **given: (made.append(1), init(self, **given))[1])
    ids, mask = prompt(2, 6, True)
    modes = (
        GREEDY,
        GREEDY | {"num_beams": 2},
        SAMPLING | {"top_k": 4},
        GREEDY | {"return_dict_in_generate": True},
    )
    for _ in range(2):
        for mode in modes:
            pair[1].generate(ids, attention_mask=mask, max_new_tokens=9, **mode)
    # The beams, which are more rows, want a larger one.
    assert len(made) == 2
    engine = weakref.ref(view(pair[1]).engines)
    gptkern.restore(pair[1])
    assert engine() is None


def test_pytorch_has_one_thread_between_passes_unless_the_callers_own_code_runs(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads that wake for a row of logits would poll on the cores of the next pass."""
    counts: list[tuple[str, int]] = []

    def spied(owner: Any, name: str, label: str) -> None:
        plain = getattr(owner, name)

        def spy(*args: Any, **given: Any) -> Any:
            counts.append((label, torch.get_num_threads()))
            return plain(*args, **given)

        monkeypatch.setattr(owner, name, spy)

    def mine(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts.append(("mine", torch.get_num_threads()))
        return scores

    spied(library.TopKLogitsWarper, "__call__", "between")
    spied(KVCache, "reserve", "pass")
    ours = gptkern.accelerate(pair[1])
    ids, _ = prompt(2, 5, False)
    call = {"max_new_tokens": 3, "do_sample": True, "top_k": 5, "pad_token_id": 0, "eos_token_id": None}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        ours.generate(ids, **call)
        assert set(counts) == {("between", 1), ("pass", 2)}
        assert torch.get_num_threads() == 2
        counts.clear()
        ours.generate(ids, logits_processor=[mine], **call)
        assert set(counts) == {("between", 2), ("pass", 2), ("mine", 2)}
        counts.clear()
        ours.generate(ids.repeat(2, 1), **call)
        assert set(counts) == {("between", 2), ("pass", 2)}
    finally:
        torch.set_num_threads(before)


def test_a_call_that_fails_leaves_the_next_one_alone(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    ids, mask = prompt(2, 6, True)

    def fails(tokens: torch.Tensor, scores: Any) -> Any:
        raise ZeroDivisionError

    for name in ("stopping_criteria", "logits_processor"):
        with pytest.raises(ZeroDivisionError):
            ours.generate(ids, attention_mask=mask, **GREEDY, **{name: [fails]})
        expected = theirs.generate(ids, attention_mask=mask, **GREEDY)
        assert torch.equal(ours.generate(ids, attention_mask=mask, **GREEDY), expected)


def _options(processors: Any, padded: bool = False) -> Any:
    ids, mask = prompt(1, 4, False)
    given = Prompts(ids, mask.bool() if padded else None, ids.tolist())
    config = transformers.GenerationConfig(do_sample=True, num_return_sequences=1, max_length=9)
    return options.request_options(processors, [], config, given)


def test_processors_that_the_engine_computes_otherwise() -> None:
    given = [library.TopKLogitsWarper(5), library.TemperatureLogitsWarper(0.5)]
    assert "order" in _options(given)
    given.reverse()
    assert _options(given).items() >= {"temperature": 0.5, "top_k": 5, "max_new_tokens": 5}.items()
    assert "min_tokens_to_keep" in _options([library.TopPLogitsWarper(0.9, min_tokens_to_keep=2)])
    assert "order" in _options([given[0], given[0]])
    ignoring = library.RepetitionPenaltyLogitsProcessor(1.2, prompt_ignore_length=2)
    assert "prompt_ignore_length" in _options([ignoring])
    other = library.MinNewTokensLengthLogitsProcessor(4, 3, eos_token_id=5, device="cpu")
    assert "least length" in _options([other])


def test_sampling_draws_the_librarys_tokens_unless_it_is_told_otherwise(requests: list[int]) -> None:
    theirs = build()
    ours = gptkern.accelerate(copy.deepcopy(theirs))
    ids, mask = prompt(2, 6, False)
    results = []
    for model in (theirs, ours):
        torch.manual_seed(5)
        results.append(model.generate(ids, attention_mask=mask, **SAMPLING))
    assert torch.equal(*results) and not requests


def test_philox_draws_follow_torchs_seed_and_the_librarys_distribution(
    fast: Any, requests: list[int]
) -> None:
    ids, _ = prompt(1, 6, False)
    options = {"do_sample": True, "top_k": 7, "top_p": 0.95, "temperature": 1.5, "max_new_tokens": 1}
    torch.manual_seed(1)
    first = fast.generate(ids, num_return_sequences=4000, **options)
    torch.manual_seed(1)
    assert torch.equal(first, fast.generate(ids, num_return_sequences=4000, **options))
    assert not torch.equal(first, fast.generate(ids, num_return_sequences=4000, **options))
    # Copies share one prefill.
    assert requests == [4000] * 3
    plain = gptkern.restore(fast).generate(ids, output_scores=True, return_dict_in_generate=True, **options)
    probabilities = plain.scores[0][0].double().softmax(-1)
    likely = probabilities > 0
    exact = probabilities[likely] / probabilities[likely].sum()
    counts = torch.bincount(first[:, -1], minlength=len(probabilities))
    assert not counts[~likely].any()
    assert stats.chisquare(counts[likely], 4000 * exact).pvalue > 1e-4


@pytest.mark.parametrize("case", sorted(set(FALLBACKS) - {"static"}))
def test_strict_mode_refuses_what_the_library_computes_alone_unless_it_was_asked_for(
    fast: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setenv("GPTKERN_STRICT", "1")
    ids = torch.randint(0, VOCAB - 1, (1, 7))
    with pytest.raises(RuntimeError, match="generate runs on transformers' own code"):
        fast.generate(ids, max_new_tokens=4, **GREEDY, **FALLBACKS[case])
    gptkern.accelerate(fast, generation="library").generate(
        ids, max_new_tokens=4, **GREEDY, **FALLBACKS[case]
    )


def test_what_is_asked_for_is_checked_and_told(fast: Any) -> None:
    with pytest.raises(ValueError, match="rng is 'dice'; 'torch' or 'philox' is needed"):
        gptkern.accelerate(build(), rng="dice")

    def told(model: Any, **config: Any) -> str:
        return str(explain(model, transformers.GenerationConfig(**config))[-1].reason)

    assert "its loop and sampler" in told(fast, do_sample=True)
    assert "rng='philox' is faster" in told(gptkern.accelerate(fast), do_sample=True)
    assert "its loop and sampler" in told(fast, num_beams=3)
    assert "beam search" in told(fast, num_beams=3, do_sample=True)
    assert "cache" in told(fast, return_dict_in_generate=True)
    assert not {"_gptkern_rng", "_gptkern_generation"} & vars(gptkern.restore(fast)).keys()
