"""What callers may ask beside options: most likely tokens, logits processors, stopping criteria."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from generate_support import VOCAB, left_padded, pair, prompts

from gptkern.engine.engine import Engine
from gptkern.engine.request import Request
from gptkern.generate import GenerateOutput


@pytest.mark.parametrize("speculate", [None, 3])
def test_top_logprobs_are_the_models(speculate: int | None) -> None:
    ours = pair("odd width")[1]
    ids, mask = left_padded()
    eos = int(ours.generate(ids, mask, max_new_tokens=4, eos_token_id=None)[0, -1])
    out = ours.generate(
        ids,
        mask,
        max_new_tokens=8,
        eos_token_id=eos,
        pad_token_id=0,
        do_sample=True,
        seed=3,
        repetition_penalty=1.3,
        top_logprobs=4,
        speculate=speculate,
    )
    assert isinstance(out, GenerateOutput) and out.top_logprobs is not None and out.logprobs is not None
    tokens, logprobs = out.top_logprobs
    new = out.sequences.shape[1] - ids.shape[1]
    assert tokens.shape == logprobs.shape == (3, new, 4) and out.logprobs.shape == (3, new)
    for row in range(3):
        own = ids[row][mask[row] == 1].tolist()
        for place, token in enumerate(out.sequences[row, ids.shape[1] :].tolist()):
            if eos in out.sequences[row, ids.shape[1] : ids.shape[1] + place].tolist():
                assert tokens[row, place].tolist() == [-1] * 4
                assert logprobs[row, place].tolist() == [-math.inf] * 4
                continue
            with torch.no_grad():
                exact = ours(torch.tensor([own])).logits[0, -1].log_softmax(-1)
            assert tokens[row, place].tolist() == exact.topk(4).indices.tolist()
            torch.testing.assert_close(logprobs[row, place], exact.topk(4).values, atol=1e-4, rtol=0)
            torch.testing.assert_close(out.logprobs[row, place], exact[token], atol=1e-4, rtol=0)
            own.append(token)


def test_processors_and_criteria_of_transformers_do_as_there() -> None:
    from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
    from transformers.generation import SuppressTokensAtBeginLogitsProcessor

    theirs, ours = pair("head dim 64")
    ids = prompts(1, 6)
    plain = ours.generate(ids, max_new_tokens=20, eos_token_id=None)[0, 6:].tolist()

    class Holds(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return (input_ids[:, 6:] == plain[9]).any(1)

    for options in (
        {"logits_processor": LogitsProcessorList([SuppressTokensAtBeginLogitsProcessor(plain[:1], 6)])},
        {"stopping_criteria": StoppingCriteriaList([Holds()])},
    ):
        common: dict[str, Any] = {"max_new_tokens": 20, "pad_token_id": 7} | options
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **common)
        found = ours.generate(ids, eos_token_id=None, return_dict_in_generate=True, **common)
        assert torch.equal(found.sequences, expected)
        assert found.sequences[0, 6:].tolist() != plain
        assert found.finish_reasons == ["stop" if "stopping_criteria" in options else "length"]


@pytest.mark.parametrize("speculate", [None, 4])
def test_rows_are_called_with_their_own_tokens_and_end_by_themselves(speculate: int | None) -> None:
    ours = pair("head dim 64")[1]
    ids, mask = left_padded()
    options: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 5, "eos_token_id": None}
    plain = ours.generate(ids, mask, **options, speculate=speculate)
    shown: list[list[int]] = []

    def watch(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        assert logits.shape == (1, VOCAB)
        shown.append(tokens[0].tolist())
        return logits

    same = ours.generate(ids, mask, **options, speculate=speculate, logits_processor=watch)
    assert torch.equal(same, plain)
    rows = [ids[row][mask[row] == 1].tolist() + plain[row, 9:].tolist() for row in range(3)]
    for row, own in enumerate(rows):
        start = int(mask[row].sum())
        assert all(own[: start + made] in shown for made in range(12))
    assert speculate is not None or len(shown) == 3 * 12
    lengths = [len(own) - 12 for own in rows]

    def ended(tokens: torch.Tensor, logits: None) -> bool:
        return tokens.shape == (1, lengths[1] + 5) and tokens[0].tolist() == rows[1][: lengths[1] + 5]

    out = ours.generate(
        ids, mask, **options, speculate=speculate, stopping_criteria=[ended], return_dict_in_generate=True
    )
    assert isinstance(out, GenerateOutput)
    assert out.finish_reasons == ["length", "stop", "length"]
    assert torch.equal(out.sequences[[0, 2]], plain[[0, 2]])
    assert out.sequences[1, 9:].tolist() == [*plain[1, 9:14].tolist(), *[5] * 7]


def test_exceptions_of_callbacks_are_the_callers() -> None:
    ours = pair("odd width")[1]

    class MineError(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(one, two)

    def broken(*_: Any) -> Any:
        raise MineError(1, 2)

    for name in ("logits_processor", "stopping_criteria"):
        with pytest.raises(MineError):
            ours.generate(prompts(2, 4), max_new_tokens=4, pad_token_id=0, **{name: broken})
    with pytest.raises(
        ValueError, match=rf"row 0: a logits processor returned \({VOCAB},\); a tensor of shape"
    ):
        ours.generate(prompts(1, 4), max_new_tokens=4, logits_processor=lambda ids, logits: logits[0])
    # The next call is as ever.
    assert ours.generate(prompts(2, 4), max_new_tokens=4, pad_token_id=0).shape == (2, 8)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"top_logprobs": 0}, ValueError, f"top_logprobs is 0; 1 to the vocabulary's {VOCAB}"),
    ({"top_logprobs": VOCAB + 1}, ValueError, f"top_logprobs is {VOCAB + 1}; 1 to"),
    ({"top_logprobs": True}, TypeError, "top_logprobs is True; a whole number"),
    ({"top_logprobs": 2, "num_beams": 2}, ValueError, "top_logprobs with num_beams > 1"),
    ({"logits_processor": 3}, TypeError, "logits_processor is or holds 3; a callable"),
    ({"stopping_criteria": [None]}, TypeError, "stopping_criteria is or holds None; a callable"),
    ({"logits_processor": print, "num_beams": 2}, ValueError, "logits_processor with num_beams > 1"),
    ({"stopping_criteria": print, "num_beams": 2}, ValueError, "stopping_criteria with num_beams > 1"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pair("odd width")[1].generate(prompts(1, 4), max_new_tokens=2, **options)


def test_requests_have_callbacks_and_one_that_raises_ends_alone() -> None:
    ours = pair("odd width")[1]
    engine = Engine(ours, max_seqs=4, cache_tokens=1024)
    options = {"max_new_tokens": 6, "eos_token_id": None}
    plain = ours.generate(torch.tensor([[3, 4]]), **options)[0, 2:].tolist()

    def barred(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logits[0, plain[0]] = -math.inf
        return logits

    def broken(tokens: torch.Tensor, _: Any) -> Any:
        if tokens.shape[1] == 5:
            raise KeyError("mine")
        return False

    asked = [
        {},
        {"logits_processor": barred},
        {"stopping_criteria": lambda tokens, _: tokens.shape[1] == 4},
        {"stopping_criteria": broken},
    ]
    numbers = [engine.add(Request(prompt=[3, 4], options=options, **more)) for more in asked]
    events: dict[int, list[Any]] = {number: [] for number in numbers}
    while engine.has_work:
        for event in engine.step():
            events[event.request].append(event)
    first, second, third, fourth = events.values()
    assert [event.token for event in first] == plain
    assert len(second) == 6 and plain[0] not in [event.token for event in second]
    assert [event.token for event in third] == plain[:2] and third[-1].finish_reason == "stop"
    assert [event.token for event in fourth] == [*plain[:2], None]
    assert isinstance(fourth[-1].error, KeyError) and fourth[-1].finish_reason == "error"
    assert engine.cache.free_pages == engine.cache.num_pages
    with pytest.raises(TypeError, match="Request: logits_processor is or holds 3; a callable"):
        Request(prompt=[1], logits_processor=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"Engine.add: logprobs is {VOCAB + 1}; at most the vocabulary's"):
        engine.add(Request(prompt=[1], logprobs=VOCAB + 1))
