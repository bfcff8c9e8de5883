"""Beam search alone, on logits of the test's own: its cost does not grow with the beams' length."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch

from gptkern.config import GPTConfig
from gptkern.engine import beam as beams
from gptkern.engine.beam import BeamSearch, advance
from gptkern.engine.rules import RowRules
from gptkern.engine.sampling import RowParams
from gptkern.engine.settings import Settings, merged, settle
from gptkern.engine.stop_strings import RowText, StopWatch
from gptkern.tokenizer import Tokenizer, streams

VOCAB = 256
CPU = torch.device("cpu")
CONFIG = GPTConfig(vocab_size=VOCAB, n_positions=2048, n_layer=1, n_head=1, n_embd=8)


def settings(**options: Any) -> Settings:
    asked = merged({"num_beams": 4} | options, {})
    return settle(asked, CONFIG, width=2, longest=2, lengths_given=True)


def begun(prompt: list[int], asked: Settings, tokenizer: Tokenizer | None = None) -> BeamSearch:
    return BeamSearch(prompt, asked, RowParams(asked, VOCAB), CPU, tokenizer)


def step(search: BeamSearch, logits: torch.Tensor) -> tuple[list[int], list[int]]:
    """The beams that go on and their new tokens."""
    (parents,) = advance([search], logits)
    if isinstance(parents, Exception):
        raise parents
    return parents, [beam.tokens[-1] for beam in search.running]


def searched(
    prompts: list[list[int]], asked: Settings, tokenizer: Tokenizer | None = None
) -> list[BeamSearch]:
    """Whole searches; logits are random, and letters are likelier than other bytes."""
    searches = [begun(prompt, asked, tokenizer) for prompt in prompts]
    running = list(searches)
    generator = torch.Generator().manual_seed(len(prompts))
    while running:
        rows = sum(max(len(search.running), 1) for search in running)
        logits = torch.randn(rows, VOCAB, generator=generator)
        logits[:, 97:123] += 6
        advance(running, logits)
        running = [search for search in running if search.running]
    return searches


@pytest.mark.parametrize("stops", [[], ["abcdefgh"], ["xyzxyzxyz", "qqqqqq", "zzzzzz\n"]])
def test_text_and_rules_are_read_once_a_token(stops: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def counted(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def call(self: Any, *args: Any) -> Any:
            calls[name if owner is not streams.ByteStream else "decode"] += 1
            return real(self, *args)

        monkeypatch.setattr(owner, name, call)

    counted(streams.ByteStream, "push")
    counted(RowRules, "push")
    options = {"no_repeat_ngram_size": 3, "stop_strings": stops or None, "eos_token_id": None}
    made = {}
    for length in (100, 200, 400):
        calls.clear()
        (search,) = searched([[104, 105]], settings(max_new_tokens=length, **options), Tokenizer.bytes())
        assert len(search.complete[0].tokens) == length
        made[length] = dict(calls)
    for length, found in made.items():
        # As many tokens are read as there are beams, and in the last pass as there are candidates.
        assert found.get("decode", 0) <= (4 * (length - 1) + 8 + 2 if stops else 0)
        assert found["push"] <= 4 * length + 2


def test_rules_are_copied_where_a_beam_has_several_children(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    real = RowRules.fork
    monkeypatch.setattr(RowRules, "fork", lambda self: (copies.append(1), real(self))[1])
    children: list[int] = []
    divide = beams._divide_rules

    def divided(running: Any, parents: Any) -> None:
        children.append(len(parents) - len(set(parents)))
        divide(running, parents)

    monkeypatch.setattr(beams, "_divide_rules", divided)
    searched([[1, 2], [3]], settings(max_new_tokens=30, no_repeat_ngram_size=2, eos_token_id=None))
    assert sum(copies) == sum(children) > 0


def reference(logits: list[torch.Tensor], width: int) -> list[tuple[float, list[int]]]:
    """Beams over logits that no history changes: by the definition, in float64."""
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    for row in logits:
        logprobs = row.double().log_softmax(-1).tolist()
        grown = [
            (score + logprob, [*tokens, token])
            for score, tokens in running
            for token, logprob in enumerate(logprobs)
        ]
        grown.sort(key=lambda beam: -beam[0])
        running = grown[:width]
    return running


def test_beams_are_the_best_by_the_definition() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(VOCAB, generator=generator) * 3 for _ in range(6)]
    asked = settings(max_new_tokens=6, num_return_sequences=4, length_penalty=0.0, eos_token_id=None)
    searches = [begun([1], asked), begun([2, 3], asked)]
    rows = 2
    for row in logits:
        outcomes = advance(searches, row.expand(rows, -1))
        rows = sum(len(parents) for parents in outcomes if isinstance(parents, list))
    assert rows == 0
    expected = reference(logits, 4)
    for search in searches:
        assert [beam.tokens for beam in search.complete] == [tokens for _, tokens in expected]
        assert [beam.score for beam in search.complete] == pytest.approx([s for s, _ in expected], rel=1e-5)


def test_equal_scores_go_to_the_lower_beam_and_token() -> None:
    search = begun([1], settings(max_new_tokens=2, eos_token_id=None))
    logits = torch.full((1, VOCAB), -9.0)
    logits[0, [40, 7, 99, 200, 150]] = 0.0
    assert step(search, logits) == ([0, 0, 0, 0], [7, 40, 99, 150])


def test_a_beam_without_a_token_left_ends_and_the_others_go_on() -> None:
    # After 5 comes nothing; the beam that ends in it is the better one.
    asked = settings(
        num_beams=2,
        max_new_tokens=3,
        eos_token_id=None,
        bad_words_ids=[[5, token] for token in range(VOCAB)],
    )
    search = begun([1], asked)
    logits = torch.full((1, VOCAB), -20.0)
    logits[0, 5], logits[0, 6] = 3.0, 2.0
    step(search, logits)
    parents, tokens = step(search, torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0)))
    assert parents == [1, 1] and len(set(tokens)) == 2
    with pytest.raises(ValueError, match="the options bar every token there is"):
        step(begun([5], asked), logits)


def test_a_search_that_cannot_go_on_ends_alone() -> None:
    asked = settings(num_beams=2, max_new_tokens=3, eos_token_id=None)
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[1, 7] = float("nan")
    searches = [begun([1], asked) for _ in range(3)]
    first, failure, last = advance(searches, logits)
    assert (first, last) == ([0, 0], [0, 0])
    assert str(failure) == "beam 0: the logits hold NaN; numbers and -inf are accepted"
    twin = begun([1], asked)
    step(twin, logits[2:])
    assert [beam.tokens for beam in searches[2].running] == [beam.tokens for beam in twin.running]


@pytest.mark.parametrize("seed", range(20))
def test_a_watch_stops_where_the_text_stops(seed: int) -> None:
    rng = random.Random(seed)
    letters = [*"ab", "é", "\n"]
    tokenizer = Tokenizer.bytes()
    stops = ["".join(rng.choices(letters, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
    prompt = tokenizer.encode("".join(rng.choices(letters, k=rng.randint(1, 6))))
    text, watch = RowText(tokenizer, stops, prompt), StopWatch(tokenizer, stops, prompt)
    seen: list[int] = []
    for token in tokenizer.encode("".join(rng.choices(letters, k=40))):
        seen.append(token)
        twin = watch.fork()
        twin.push(rng.choice([97, 98, 0xC3]))
        text.push(token)
        watch.push(token)
        assert watch.stopped == text.stopped
        if watch.stopped:
            break
    assert "".join(text._settled) == text.text
    again = StopWatch(tokenizer, stops, prompt)
    for token in seen:
        again.push(token)
    assert again.stopped == watch.stopped


def test_fresh_text_is_told_once() -> None:
    row = RowText(Tokenizer.bytes(), ["ab"], [])
    pieces = []
    for token in b"xaxab":
        row.push(token)
        pieces.append(row.fresh())
    assert pieces == ["x", "", "ax", "", ""] and row.fresh() == "" and row.text == "xax"
