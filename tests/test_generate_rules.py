"""Penalties, biases and what is barred from coming: against transformers, and against plain loops."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from generate_support import VOCAB, left_padded, pair, prompts

from gptkern import _native
from gptkern.generate import GenerateOutput
from gptkern.ops.sample import launch

NAME = "head dim 64"


def both(ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(gptkern's tokens, transformers')."""
    theirs, ours = pair(NAME)
    given: dict[str, Any] = {"max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 1, **options}
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **given)
    found = ours.generate(ids, **given)
    assert isinstance(found, torch.Tensor)
    return found, expected


def greedy(ids: torch.Tensor, count: int = 30, **options: Any) -> list[list[int]]:
    """New tokens of every row."""
    out = pair(NAME)[1].generate(ids, max_new_tokens=count, eos_token_id=None, **options)
    assert isinstance(out, torch.Tensor)
    new: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return new


def few_tokens(batch: int, seq: int) -> torch.Tensor:
    """Prompts that repeat themselves."""
    return torch.randint(2, 8, (batch, seq))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_no_ngram_comes_twice(size: int) -> None:
    ids = few_tokens(3, 20)
    found, expected = both(ids, no_repeat_ngram_size=size)
    assert torch.equal(found, expected)
    new = found[0].tolist()
    grams = [tuple(new[i : i + size]) for i in range(21 - size, len(new) - size + 1)]
    assert len(set(grams)) == len(grams)


def test_the_rule_of_ngrams_changes_something() -> None:
    ids = torch.tensor(few_tokens(1, 10).tolist()[0] * 3)[None]
    for size in (1, 2):
        assert greedy(ids, no_repeat_ngram_size=size) != greedy(ids)


def test_ngrams_of_padded_rows_are_those_of_the_rows_alone() -> None:
    ours = pair(NAME)[1]
    ids, mask = left_padded()
    options: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": None, "no_repeat_ngram_size": 1}
    together = ours.generate(ids, mask, pad_token_id=1, **options)
    assert isinstance(together, torch.Tensor)
    for row, padding in enumerate((0, 4, 8)):
        alone = ours.generate(ids[row : row + 1, padding:], **options)
        assert isinstance(alone, torch.Tensor)
        assert torch.equal(together[row, padding:], alone[0])


def test_words_and_tokens_are_barred() -> None:
    ids = prompts(2, 6, seed=3)
    plain = greedy(ids)
    # what would come first; what would come tenth after the ninth; what would begin with the prompt's end
    words = [[plain[0][0]], plain[0][8:10], [int(ids[1, -1]), plain[1][0]], plain[1][4:8]]
    found, expected = both(ids, bad_words_ids=words)
    assert torch.equal(found, expected)
    assert words[0][0] not in found[0, 6:]
    found, expected = both(ids, suppress_tokens=[plain[0][0], plain[1][3], 9])
    assert torch.equal(found, expected)
    assert found[0, 6] != plain[0][0]
    # a word longer than what there is to look at
    assert torch.equal(*both(ids[:, :1], bad_words_ids=[[*range(2, 40)]]))


def test_all_of_a_word_must_have_come() -> None:
    ids = prompts(2, 6, seed=3)
    plain = greedy(ids)
    assert 199 not in [*plain[0], *ids[0].tolist()]
    other = [199, *plain[0][3:5]]
    assert greedy(ids, bad_words_ids=[other], sequence_bias={tuple(other): -99.0}) == plain
    assert greedy(ids, bad_words_ids=[plain[0][2:5]])[0] != plain[0]
    assert greedy(ids, sequence_bias={tuple(plain[0][2:5]): -99.0})[0] != plain[0]


def test_end_of_text_is_no_bad_word() -> None:
    ids = prompts(1, 6, seed=3)
    eos = greedy(ids)[0][4]
    found, expected = both(ids, bad_words_ids=[[eos], [3]], eos_token_id=eos)
    assert torch.equal(found, expected)
    assert found.shape[1] <= 6 + 5
    found, expected = both(ids, suppress_tokens=[eos], eos_token_id=eos)
    assert torch.equal(found, expected)
    assert found.shape[1] == 6 + 30


def test_biases() -> None:
    ids = prompts(2, 6, seed=3)
    plain = greedy(ids)
    bias = {(plain[0][0],): -9.0, (plain[0][1], plain[0][2]): float("-inf"), (plain[1][0], 33): 1000.0}
    found, expected = both(ids, sequence_bias=bias)
    assert torch.equal(found, expected)
    assert found[1, 6:8].tolist() == [plain[1][0], 33]
    pairs = [([*sequence], value) for sequence, value in bias.items()]
    more = greedy(ids, sequence_bias=bias | {(44,): 9.0, (45,): 8.0})
    assert more != found[:, 6:].tolist()
    assert more == greedy(ids, sequence_bias=pairs, logit_bias={44: 9.0, 45: 8.0})
    assert greedy(ids, logit_bias={50: 1000.0}) == [[50] * 30] * 2
    assert greedy(ids, logit_bias={50: 1000.0}, sequence_bias={(50,): -2000.0}) == greedy(
        ids, logit_bias={50: -1000.0}
    )


@pytest.mark.parametrize("presence,frequency", [(30.0, 0.0), (0.0, 11.0), (-25.0, 9.0)])  # noqa: PT006
def test_presence_and_frequency_count_new_tokens(presence: float, frequency: float) -> None:
    ours = pair(NAME)[1]
    ids = few_tokens(1, 12)
    options: dict[str, Any] = {"presence_penalty": presence, "frequency_penalty": frequency}
    new: list[int] = []
    for _ in range(40):
        logits = ours(torch.tensor([ids[0].tolist() + new])).logits[0, -1].double()
        for token in set(new):
            logits[token] -= presence + frequency * new.count(token)
        new.append(int(logits.argmax()))
    assert greedy(ids, 40, **options)[0] == new
    assert greedy(ids, 40)[0] != new


def random_options(choose: random.Random, likely: list[int]) -> dict[str, Any]:
    """Rules about tokens that are likely to come."""
    words = [[choose.choice(likely) for _ in range(choose.randint(1, 3))] for _ in range(8)]
    every: dict[str, Any] = {
        "repetition_penalty": choose.choice([0.8, 1.2, 2.0]),
        "no_repeat_ngram_size": choose.randint(1, 4),
        "bad_words_ids": words,
        "suppress_tokens": choose.sample(likely, 3),
        "min_new_tokens": choose.randint(1, 20),
        "min_length": choose.randint(10, 30),
        "eos_token_id": choose.sample(likely, 2),
        "sequence_bias": {tuple(word): choose.uniform(-9, 9) for word in words[:4]},
    }
    return {name: value for name, value in every.items() if choose.random() < 0.6}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("seed", range(12))
def test_random_rules_are_those_of_transformers(seed: int, beams: int) -> None:
    choose = random.Random(seed)
    ids = few_tokens(3, 14)
    likely = sorted({token for row in greedy(ids) for token in row} | {2, 3, 4, 5})
    options = random_options(choose, likely) | ({"num_beams": beams} if beams > 1 else {})
    found, expected = both(ids, **options)
    assert torch.equal(found, expected), options


def test_draws_keep_to_the_rules() -> None:
    from transformers.generation import logits_process as their

    ours = pair(NAME)[1]
    ids = few_tokens(1, 10)
    out = ours.generate(
        ids,
        max_new_tokens=25,
        do_sample=True,
        top_k=0,
        num_return_sequences=8,
        seed=3,
        eos_token_id=None,
        temperature=30.0,
        no_repeat_ngram_size=2,
        bad_words_ids=[[9], [5, 6]],
        epsilon_cutoff=5e-3,
        eta_cutoff=4e-3,
    )
    assert isinstance(out, torch.Tensor)
    rules = [
        their.NoRepeatNGramLogitsProcessor(2),
        their.NoBadWordsLogitsProcessor([[9], [5, 6]]),
        their.TemperatureLogitsWarper(30.0),
        their.EpsilonLogitsWarper(5e-3),
        their.EtaLogitsWarper(4e-3),
    ]
    logits = ours(out).logits.detach()
    kept = []
    for end in range(10, 35):
        scores = logits[:, end - 1]
        for rule in rules:
            scores = rule(out[:, :end], scores)
        assert scores.gather(1, out[:, end, None]).isfinite().all()
        kept.append(scores.isfinite().sum(1).float().mean().item())
    # the cut-offs leave a choice, and not every token
    assert 5 < sum(kept) / len(kept) < 0.9 * VOCAB


@pytest.mark.parametrize("cutoff", ["epsilon_cutoff", "eta_cutoff"])
def test_cut_offs_reach_the_sampler(cutoff: str) -> None:
    ids = prompts(2, 6, seed=3)
    drawn = greedy(ids, do_sample=True, temperature=30.0, top_k=0, seed=1)
    assert drawn != greedy(ids)
    options: dict[str, Any] = {"do_sample": True, "temperature": 30.0, "top_k": 0, "seed": 1, cutoff: 0.99}
    kept = greedy(ids, **options)
    if cutoff == "epsilon_cutoff":
        assert kept == greedy(ids)
    else:
        assert kept != drawn
    with pytest.warns(UserWarning, match=f"{cutoff} has no effect without do_sample=True"):
        greedy(ids, 1, **{cutoff: 0.5})


def test_rows_keep_their_own_rules_when_others_end() -> None:
    ids = few_tokens(4, 14)
    plain = greedy(ids)
    stops = [plain[0][2], plain[2][5]]
    found, expected = both(ids, no_repeat_ngram_size=2, eos_token_id=stops, bad_words_ids=[[4, 5]])
    assert torch.equal(found, expected)
    assert len({int((row == 1).sum()) for row in found}) > 1


def test_the_extension_follows_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    if _native.extension is None:
        pytest.skip("gptkern._C is not built")
    ids = few_tokens(3, 14)
    options: dict[str, Any] = {
        "no_repeat_ngram_size": 1,
        "bad_words_ids": [[4, 5], [17]],
        "sequence_bias": {(3, 9): 4.0, (20,): 3.0},
        "presence_penalty": 2.0,
        "repetition_penalty": 1.1,
    }
    plain, drawn = greedy(ids, **options), greedy(ids, do_sample=True, seed=2, temperature=9.0, **options)
    monkeypatch.setattr(launch, "serves", lambda logits: True)
    assert greedy(ids, **options) == plain
    assert greedy(ids, do_sample=True, seed=2, temperature=9.0, **options) == drawn
    assert plain != drawn


def test_logprobs_are_those_before_the_rules() -> None:
    ours = pair(NAME)[1]
    ids = few_tokens(1, 14)
    out = ours.generate(
        ids,
        max_new_tokens=9,
        eos_token_id=None,
        no_repeat_ngram_size=1,
        output_logprobs=True,
        return_dict_in_generate=True,
    )
    assert isinstance(out, GenerateOutput)
    assert out.logprobs is not None
    expected = ours(out.sequences).logits.log_softmax(-1)[0, 13:-1].gather(1, out.sequences[0, 14:, None])
    torch.testing.assert_close(out.logprobs[0], expected[:, 0].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 2])
def test_nothing_left_to_choose_is_an_error(beams: int) -> None:
    ids = prompts(1, 6)
    with pytest.raises(ValueError, match="bar every token"):
        greedy(ids, 1, suppress_tokens=list(range(VOCAB)), num_beams=beams)
    others = [t for t in range(VOCAB) if t not in ids]
    with pytest.raises(ValueError, match="bar every token"):
        greedy(ids, 1, suppress_tokens=others, no_repeat_ngram_size=1, num_beams=beams)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"no_repeat_ngram_size": -1}, ValueError, "no_repeat_ngram_size is -1; 0 or more"),
    ({"no_repeat_ngram_size": 2.0}, TypeError, "no_repeat_ngram_size is 2.0; a whole number"),
    ({"presence_penalty": float("inf")}, ValueError, "presence_penalty is inf; a finite number"),
    ({"frequency_penalty": float("nan")}, ValueError, "frequency_penalty is nan; a finite number"),
    ({"frequency_penalty": "much"}, TypeError, "frequency_penalty is 'much'; a number"),
    ({"epsilon_cutoff": 1.0, "do_sample": True}, ValueError, "epsilon_cutoff is 1.0"),
    ({"eta_cutoff": -0.1, "do_sample": True}, ValueError, "eta_cutoff is -0.1"),
    ({"bad_words_ids": [3]}, TypeError, "bad_words_ids is or holds 3; a list"),
    ({"bad_words_ids": "no"}, TypeError, "bad_words_ids is or holds 'no'; a list"),
    ({"bad_words_ids": [[]]}, ValueError, "bad_words_ids holds an empty list"),
    ({"bad_words_ids": [[3, VOCAB]]}, ValueError, f"bad_words_ids holds {VOCAB}; token ids from 0 to"),
    ({"bad_words_ids": [["no"]]}, TypeError, "bad_words_ids holds 'no'; token ids"),
    ({"suppress_tokens": [-1]}, ValueError, "suppress_tokens holds -1; token ids from 0 to"),
    ({"suppress_tokens": 5}, TypeError, "suppress_tokens is or holds 5; a list"),
    ({"logit_bias": [1.0]}, TypeError, "logit_bias is list; a mapping"),
    ({"logit_bias": {VOCAB: 1.0}}, ValueError, f"logit_bias holds {VOCAB}"),
    ({"logit_bias": {5: float("inf")}}, ValueError, "logit_bias gives 5 inf; a finite number or -inf"),
    ({"logit_bias": {5: float("nan")}}, ValueError, "logit_bias gives 5 nan; a finite number or -inf"),
    ({"sequence_bias": {(5,): "up"}}, TypeError, r"sequence_bias gives \(5,\) 'up'; a number"),
    ({"sequence_bias": {5: 1.0}}, TypeError, "sequence_bias is or holds 5; a list"),
    ({"sequence_bias": [([5], 1.0, 2)]}, ValueError, "sequence_bias holds .*token ids and a bias"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_rules(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pair(NAME)[1].generate(prompts(1, 6), **options)
