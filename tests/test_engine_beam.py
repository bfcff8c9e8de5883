"""Beam search alone, on logits of the test's own: its cost does not grow with the beams' length."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch

from gptkern.config import GPTConfig
from gptkern.engine import beam as beams
from gptkern.engine.beam import BeamSearch
from gptkern.engine.rules import RowRules
from gptkern.engine.settings import Settings, merged, settle
from gptkern.engine.stop_strings import RowText, StopWatch
from gptkern.tokenizer import Tokenizer, streams

VOCAB = 256
CPU = torch.device("cpu")
CONFIG = GPTConfig(vocab_size=VOCAB, n_positions=2048, n_layer=1, n_head=1, n_embd=8)


def settings(**options: Any) -> Settings:
    asked = merged({"num_beams": 4} | options, {})
    return settle(asked, CONFIG, width=2, longest=2, lengths_given=True)


def searched(prompts: list[list[int]], asked: Settings, tokenizer: Tokenizer | None = None) -> BeamSearch:
    """A whole search; logits are random, and letters are likelier than other bytes."""
    search = BeamSearch(prompts, asked, VOCAB, CPU, tokenizer)
    rows = len(prompts)
    generator = torch.Generator().manual_seed(len(prompts))
    while rows:
        logits = torch.randn(rows, VOCAB, generator=generator)
        logits[:, 97:123] += 6
        parents, _ = search.advance(logits)
        rows = len(parents)
    return search


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
        search = searched([[104, 105]], settings(max_new_tokens=length, **options), Tokenizer.bytes())
        assert [beam.length for beam in search.best()] == [length]
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
    search = BeamSearch([[1], [2, 3]], asked, VOCAB, CPU)
    rows = 2
    for row in logits:
        parents, tokens = search.advance(row.expand(rows, -1))
        assert len(parents) == len(tokens)
        rows = len(parents)
    assert rows == 0
    expected = reference(logits, 4)
    for prompt in range(2):
        found = search.best()[prompt * 4 : prompt * 4 + 4]
        assert [beam.tokens for beam in found] == [tokens for _, tokens in expected]
        assert [beam.score for beam in found] == pytest.approx([score for score, _ in expected], rel=1e-5)
        assert all(beam.finish_reason == "length" for beam in found)


def test_equal_scores_go_to_the_lower_beam_and_token() -> None:
    search = BeamSearch([[1]], settings(max_new_tokens=2, eos_token_id=None), VOCAB, CPU)
    logits = torch.full((1, VOCAB), -9.0)
    logits[0, [40, 7, 99, 200, 150]] = 0.0
    assert search.advance(logits) == ([0, 0, 0, 0], [7, 40, 99, 150])


def test_a_beam_without_a_token_left_ends_and_the_others_go_on() -> None:
    # After 5 comes nothing; the beam that ends in it is the better one.
    asked = settings(
        num_beams=2,
        max_new_tokens=3,
        eos_token_id=None,
        bad_words_ids=[[5, token] for token in range(VOCAB)],
    )
    search = BeamSearch([[1]], asked, VOCAB, CPU)
    logits = torch.full((1, VOCAB), -20.0)
    logits[0, 5], logits[0, 6] = 3.0, 2.0
    search.advance(logits)
    parents, tokens = search.advance(torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0)))
    assert parents == [1, 1] and len(set(tokens)) == 2
    with pytest.raises(ValueError, match="row 0 of the prompts: the options bar every token there is"):
        BeamSearch([[5]], asked, VOCAB, CPU).advance(logits)


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
