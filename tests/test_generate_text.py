"""Text in, text out: streams, stop strings, completions, scores."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from gptkern.config import GPTConfig
from gptkern.engine.stop_strings import PlainText, RowText
from gptkern.gpt import GPT
from gptkern.tokenizer import Tokenizer


def byte_model(**changes: Any) -> GPT:
    """A tiny random model over bytes."""
    torch.manual_seed(3)
    fields = {"vocab_size": 256, "n_positions": 48, "n_layer": 2, "n_head": 2, "n_embd": 32}
    config = GPTConfig(
        **(fields | {"initializer_range": 0.5, "bos_token_id": None, "eos_token_id": None} | changes)
    )
    model = GPT(config).eval()
    model.tokenizer = Tokenizer.bytes()
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return byte_model()


@pytest.fixture(scope="module")
def gpt2_tokenizer(shared_data: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(shared_data / "gpt2-tokenizer")


def row_text(tokenizer: Tokenizer, stops: Sequence[str], prompt: str, text: str) -> tuple[list[str], RowText]:
    """(what is settled after each token of ``text``, the row at its end)."""
    row = RowText(tokenizer, stops, tokenizer.encode(prompt))
    settled = []
    for token in tokenizer.encode(text):
        row.push(token)
        settled.append(row.text)
    row.end()
    return settled, row


def test_characters_come_whole() -> None:
    settled, row = row_text(Tokenizer.bytes(), [], "", "naïve 🙂 漢")
    assert row.text == "naïve 🙂 漢"
    assert not any("\ufffd" in text for text in settled)
    assert len(set(settled)) == 9


@pytest.mark.parametrize(
    ("stops", "prompt", "text", "expected", "stopped"),
    [
        (["\n"], "", "one\ntwo", "one", True),
        (["END", "\n\n"], "", "a\nb\n\nc END", "a\nb", True),
        (["aab"], "", "xaaab", "xa", True),
        (["abc", "bc"], "", "zabc", "z", True),
        (["stop"], "", "sto", "sto", False),
        (["stop"], "", "stotop", "stotop", False),
        (["🙂"], "", "a🙃b🙂c", "a🙃b", True),
        # begun by the prompt, completed by the text: as transformers does
        (["\n\n"], "end\n", "\nmore", "", True),
        (["User:"], "say Us", "er: hello", "", True),
        # complete in the prompt: no reason to stop
        (["User:"], "User:", " hello", " hello", False),
        (["aa"], "aa", "ba", "ba", False),
        (["never that", "aa"], "xaa", "ba", "ba", False),
        (["aa"], "xa", "ab", "", True),
    ],
)
def test_stop_strings(stops: list[str], prompt: str, text: str, expected: str, stopped: bool) -> None:
    settled, row = row_text(Tokenizer.bytes(), stops, prompt, text)
    assert (row.text, row.stopped) == (expected, stopped)
    # nothing is ever taken back, and nothing of a stop string is let out before
    assert all(expected.startswith(part) for part in settled)


END, START, LONE = "<|im_end|>", "<|im_start|>", "<|é end|>"


@pytest.fixture(scope="module")
def marked(shared_data: Path) -> tuple[Any, Tokenizer]:
    """(transformers' GPT-2 tokenizer with special tokens of its own, gptkern's)."""
    import transformers

    theirs = transformers.GPT2Tokenizer.from_pretrained(shared_data / "gpt2-tokenizer")
    theirs.add_special_tokens({"additional_special_tokens": [END, START, LONE]})
    backend = tokenizers.Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    return theirs, Tokenizer(backend, eos_token="<|endoftext|>")


@pytest.mark.parametrize(
    ("stops", "prompt", "text", "expected", "stopped"),
    [
        ([END], "", f"yes{END} no", "yes", True),
        ([LONE], "", f"yes{LONE} no", "yes", True),
        (["s<|im_"], "", f"yes{END}", "ye", True),
        ([f"s{END}\n"], "", f"yes{END}\nmore", "ye", True),
        ([f"{START}user"], "", f"a{END}{START}user", "a", True),
        ([f"{START}user"], f"a{START}", "user", "", True),
        # complete in the prompt: no reason to stop
        ([END], f"a{END}", "b", "b", False),
        # what stands on both sides of a special token is not one text
        ([" yes yes"], "", f" yes{END} yes", " yes yes", False),
        ([" yes yes"], f" yes{END}", " yes no", " yes no", False),
        # a beginning of a stop string that comes to nothing is text after all
        ([f"s{END}{END}"], "", f"yes{END}no", "yesno", False),
        (["never that", f"{END}\n"], "", f"one{END} two{END}\n", "one two", True),
    ],
)
def test_stop_strings_see_special_tokens(
    marked: tuple[Any, Tokenizer],
    stops: list[str],
    prompt: str,
    text: str,
    expected: str,
    stopped: bool,
) -> None:
    settled, row = row_text(marked[1], stops, prompt, text)
    assert (row.text, row.stopped) == (expected, stopped)
    assert all(expected.startswith(part) for part in settled)


def test_stop_strings_are_those_of_transformers(marked: tuple[Any, Tokenizer]) -> None:
    from transformers.generation import StopStringCriteria

    theirs, ours = marked
    choose = random.Random(0)
    words = [" yes", "yes", " no", "\n", "\n\n", "é", "st", "op", "stop", " 🙂", END, START, LONE, "<|", "|>"]
    pieces = [ours.encode(word) for word in words] + [[byte] for byte in range(188, 256)]
    ids = torch.tensor([[t for _ in range(30) for t in choose.choice(pieces)][:30] for _ in range(400)])
    text_of = ["".join(choose.choices(words, k=choose.randint(1, 3))) for _ in range(40)]
    stops = [text[at : at + choose.randint(1, 9)] for text in text_of for at in [choose.randrange(len(text))]]
    ended = 0
    for some in (stops[0:3], stops[3:6], stops[6:9], [END], [f"yes{END}"]):
        criterion = StopStringCriteria(theirs, some)
        stop = torch.stack([criterion(ids[:, :end], None) for end in range(11, 31)], 1)
        for row, expected in zip(ids.tolist(), stop.tolist(), strict=True):
            text = RowText(ours, some, row[:10])
            found = []
            for token in row[10:]:
                text.push(token)
                found.append(text.stopped)
            first = expected.index(True) if True in expected else 20
            assert found == [False] * first + [True] * (20 - first), (some, row)
            ended += first < 20
            text.end()
            if first == 20:
                assert ours.decode(row, skip_special_tokens=True).endswith(text.text), (some, row)
            else:
                # half characters may be whole only with what is not shown
                shown = ours.decode(row[: 11 + first], skip_special_tokens=True)
                assert text.text.rstrip("\ufffd") in shown, (some, row)
    assert 300 < ended < 1900


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_text_that_nothing_stops_is_the_same_text(name: str, gpt2_tokenizer: Tokenizer) -> None:
    tokenizer = Tokenizer.bytes() if name == "bytes" else gpt2_tokenizer
    choose = random.Random(5)
    ids = [
        *range(tokenizer.vocab_size if name == "bytes" else 260),
        *tokenizer.encode("né 🙂 漢<|endoftext|>"),
    ]
    for _ in range(200):
        row = choose.choices(ids, k=20)
        watched, plain = RowText(tokenizer, [], row[:8]), PlainText(tokenizer, row[:8])
        for token in row[8:]:
            hidden = choose.random() < 0.1
            watched.push(token, hidden=hidden)
            plain.push(token, hidden=hidden)
            assert plain.fresh() == watched.fresh()
        watched.end()
        plain.end()
        assert plain.fresh() == watched.fresh()


def test_ids_without_a_token_part_a_stop_string() -> None:
    row = RowText(Tokenizer.bytes(), ["ab"], [])
    for token in (97, 300, 98):
        row.push(token)
    row.end()
    assert (row.text, row.stopped) == ("ab", False)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_stop_string_that_ends_in_the_end_of_text_is_not_shown(model: GPT, beams: int) -> None:
    # x after b, y after x
    options: dict[str, Any] = {
        "sequence_bias": {(98, 120): 1e4, (120, 121): 1e4},
        "eos_token_id": 121,
        "num_beams": beams,
    }
    (ended,) = model.generate_text("ab", **options)
    assert (ended.text, ended.token_ids) == ("x", [120, 121])
    (cut,) = model.generate_text("ab", stop_strings="xy", **options)
    assert (cut.text, cut.token_ids, cut.finish_reason) == ("", [120, 121], "stop")
    if beams == 1:
        assert "".join(model.stream("ab", stop_strings="xy", **options)) == ""


def test_gpt1_words_are_set_apart_from_the_prompt(shared_data: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(shared_data / "gpt1-tokenizer")
    _, row = row_text(tokenizer, [], "once upon", "a time")
    assert row.text == " a time"


def test_a_stream_is_the_completion(model: GPT) -> None:
    (whole,) = model.generate_text("ab", max_new_tokens=40)
    stream = model.stream("ab", max_new_tokens=40)
    pieces = list(stream)
    assert "".join(pieces) == whole.text == stream.completion.text
    assert all(pieces)
    assert stream.completion == whole
    assert whole.finish_reason == "length"
    assert whole.logprobs is not None
    assert len(whole.token_ids) == len(whole.logprobs) == 40
    ids = model.generate(torch.tensor([[97, 98]]), max_new_tokens=40)
    assert ids[0, 2:].tolist() == whole.token_ids


def test_streams_and_completions_end_before_stop_strings(model: GPT) -> None:
    (whole,) = model.generate_text("ab", max_new_tokens=40)
    # the first printable pair of characters that the text holds further on
    at = next(i for i in range(8, len(whole.text) - 1) if "\ufffd" not in whole.text[i : i + 2])
    stop = whole.text[at : at + 2]
    expected = whole.text[: whole.text.index(stop)]
    (cut,) = model.generate_text("ab", max_new_tokens=40, stop_strings=["never that", stop])
    assert (cut.text, cut.finish_reason) == (expected, "stop")
    assert len(cut.token_ids) < 40
    assert "".join(model.stream("ab", max_new_tokens=40, stop_strings=stop)) == expected


def test_generate_stops_where_transformers_does(
    gpt2_tokenizer: Tokenizer, shared_data: Path, tmp_path: Path
) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=64, n_layer=1, n_head=2, n_embd=16, initializer_range=0.5)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(shared_data / "gpt2-tokenizer")
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    ids = torch.tensor([[464, 3290], [1212, 318]])
    mask = torch.ones_like(ids)
    free = theirs.generate(ids, attention_mask=mask, max_new_tokens=30, pad_token_id=0)
    texts = tokenizer.batch_decode(free[:, 2:])
    stops = [next(t for t in (texts[0][i : i + 3] for i in range(20, 60)) if "\ufffd" not in t)]
    expected = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=30, pad_token_id=0, stop_strings=stops, tokenizer=tokenizer
    )
    assert expected.ne(free[:, : expected.shape[1]]).any() or expected.shape[1] < free.shape[1]
    found = ours.generate(
        ids, max_new_tokens=30, pad_token_id=0, stop_strings=stops, tokenizer=gpt2_tokenizer
    )
    assert torch.equal(found, expected)
    expected = theirs.generate(
        ids[:1],
        attention_mask=mask[:1],
        num_beams=3,
        max_new_tokens=20,
        stop_strings=stops,
        tokenizer=tokenizer,
    )
    found = ours.generate(
        ids[:1], num_beams=3, max_new_tokens=20, stop_strings=stops, tokenizer=gpt2_tokenizer
    )
    assert torch.equal(found, expected)


def test_prompts_of_a_batch_do_not_disturb_each_other(model: GPT) -> None:
    prompts = ["a much longer prompt", "b", [99, 100, 101]]
    together = model.generate_text(prompts, max_new_tokens=20)
    apart = [model.generate_text([prompt], max_new_tokens=20)[0] for prompt in prompts]
    assert [c.token_ids for c in together] == [c.token_ids for c in apart]
    for one, other in zip(together, apart, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert model.generate_text([]) == []


def test_samples_and_beams_of_a_text(model: GPT) -> None:
    made = model.generate_text(["ab", "c"], do_sample=True, num_return_sequences=3, seed=1, max_new_tokens=8)
    assert len(made) == 6
    assert len({c.text for c in made}) == 6
    assert made == model.generate_text(
        ["ab", "c"], do_sample=True, num_return_sequences=3, seed=1, max_new_tokens=8
    )
    best, second = model.generate_text("ab", num_beams=4, num_return_sequences=2, max_new_tokens=8)
    assert best.logprobs is None
    assert best.token_ids != second.token_ids
    assert best.text == Tokenizer.bytes().decode(best.token_ids)


def test_a_seed_gives_a_prompt_the_same_text_in_every_call(model: GPT) -> None:
    options: dict[str, Any] = {"do_sample": True, "seed": 5, "max_new_tokens": 10}
    (alone,) = model.generate_text("ab", **options)
    for texts in (["ab", "c", "a longer one"], ["a longer one", "ab"], ["c", "ab", "ab"]):
        made = model.generate_text(texts, **options)
        assert all(m.token_ids == alone.token_ids for m, t in zip(made, texts, strict=True) if t == "ab")
    assert "".join(model.stream("ab", **options)) == alone.text


def test_texts_that_stop_at_different_places_need_no_filling(model: GPT) -> None:
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 4, "seed": 1, "max_new_tokens": 20}
    free = model.generate_text("ab", **options)
    stop = next(c for c in free[0].text if c.isascii())
    made = model.generate_text("ab", stop_strings=stop, **options)
    assert [c.text for c in made] == [c.text.split(stop)[0] for c in free]
    assert len({len(c.token_ids) for c in made}) > 1
    with pytest.raises(ValueError, match="give pad_token_id"):
        model.generate(torch.tensor([[97, 98]]), stop_strings=stop, **options)


def test_text_ends_before_the_end_of_text_token(gpt2_tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    config = GPTConfig(n_positions=64, n_layer=1, n_head=2, n_embd=16, initializer_range=0.5)
    model = GPT(config).eval()
    model.tokenizer = gpt2_tokenizer
    (free,) = model.generate_text("Hello", max_new_tokens=12)
    (ended,) = model.generate_text("Hello", max_new_tokens=12, eos_token_id=free.token_ids[5])
    end = free.token_ids.index(free.token_ids[5])
    assert ended.token_ids == free.token_ids[: end + 1]
    assert ended.text == gpt2_tokenizer.decode(free.token_ids[:end])
    assert ended.finish_reason == "stop"
    # empty text is the beginning of a text
    (begun,) = model.generate_text("", max_new_tokens=4)
    assert begun == model.generate_text([[50256]], max_new_tokens=4)[0]


def test_token_ids_may_be_tensors_and_arrays(model: GPT) -> None:
    expected = model.generate_text([[97, 98], [99, 100]], max_new_tokens=4)
    one = model.generate_text([[97, 98]], max_new_tokens=4)
    for ids in (torch.tensor([[97, 98], [99, 100]]), np.array([[97, 98], [99, 100]])):
        assert model.generate_text(ids, max_new_tokens=4) == expected  # type: ignore[arg-type]
        assert model.generate_text([ids[0]], max_new_tokens=4) == one  # type: ignore[list-item]
        assert model.generate_text([[*ids[0]]], max_new_tokens=4) == one
        stream = model.stream(ids[0], max_new_tokens=4)  # type: ignore[arg-type]
        assert "".join(stream) == one[0].text
        assert model.score(ids[0]) == model.score([[97, 98]])  # type: ignore[arg-type]
        assert model.score(ids, ids[1]) == model.score([[97, 98], [99, 100]], [99, 100])  # type: ignore[arg-type]
    for prompts in (None, 5, b"abc"):
        with pytest.raises(TypeError, match=f"prompts is {type(prompts).__name__}"):
            model.generate_text(prompts)  # type: ignore[arg-type]


def test_text_errors(model: GPT) -> None:
    with pytest.raises(ValueError, match="a prompt is empty"):
        model.generate_text("")
    with pytest.raises(TypeError, match="a prompt is float"):
        model.generate_text([1.5])  # type: ignore[list-item]
    # at once, not when the first piece is asked for
    with pytest.raises(ValueError, match="max_new_tokens is 100"):
        model.stream("ab", max_new_tokens=100)
    with pytest.raises(ValueError, match="must be 1"):
        model.stream("ab", num_beams=2)
    bare = byte_model()
    bare.tokenizer = None
    with pytest.raises(ValueError, match="without a tokenizer"):
        bare.stream("ab")
    assert list(bare.stream([97], tokenizer=Tokenizer.bytes(), max_new_tokens=3))


def expected_logprobs(model: GPT, ids: list[int], first: int) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [logits[i - 1, ids[i]].item() for i in range(first, len(ids))]


def test_scores_are_a_forward_pass_s(model: GPT) -> None:
    texts = ["hello there", "hi", [104, 105, 106]]
    for score, text in zip(model.score(texts), texts, strict=True):
        ids = list(text.encode()) if isinstance(text, str) else text
        assert score.token_ids == ids[1:]
        assert score.logprobs == pytest.approx(expected_logprobs(model, ids, 1), abs=1e-4)
        assert score.total == pytest.approx(sum(score.logprobs))
        assert score.perplexity == pytest.approx(math.exp(-score.total / len(score.logprobs)), rel=1e-5)


def test_scores_of_choices_after_a_context(model: GPT) -> None:
    choices = [" yes", " no"]
    for shared in ("Is it?", ["Is it?", "Is it?"]):
        for score, choice in zip(model.score(choices, shared), choices, strict=True):
            ids = list(f"Is it?{choice}".encode())
            assert score.token_ids == list(choice.encode())
            assert score.logprobs == pytest.approx(expected_logprobs(model, ids, 6), abs=1e-4)
    (best,) = model.generate_text("Is it?", max_new_tokens=3)
    (score,) = model.score([best.token_ids], "Is it?")
    assert score.greedy
    assert not model.score(" yes", "Is it?")[0].greedy


def test_scores_from_the_beginning_of_a_text() -> None:
    model = byte_model(bos_token_id=7)
    (score,) = model.score("ab", "")
    assert score.logprobs == pytest.approx(expected_logprobs(model, [7, 97, 98], 1), abs=1e-4)
    with pytest.raises(ValueError, match="no beginning-of-text token"):
        byte_model().score("ab", "")


def test_a_text_without_a_scorable_token_is_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match="score: text 1 is one token with none before it"):
        model.score(["ab", "a"])


def test_text_in_place_of_ids_is_refused_by_name(model: GPT) -> None:
    with pytest.raises(TypeError, match=r"input_ids is str.*for text there is generate_text or stream"):
        model.generate("ROMEO:")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"GPT: input_ids is str; a torch\.Tensor is needed"):
        model("hello")


@pytest.mark.parametrize("length", [48, 49, 50, 96, 131])
@pytest.mark.parametrize("stride", [1, 10, 47])
def test_long_texts_are_scored_in_windows(model: GPT, length: int, stride: int) -> None:
    ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    (score,) = model.score([ids], stride=stride)
    assert score.token_ids == ids[1:]
    assert len(score.logprobs) == length - 1
    # the first window sees everything; each later token sees all that its window holds
    assert score.logprobs[:48] == pytest.approx(
        expected_logprobs(model, ids[:49][:48], 1) + score.logprobs[47:48], abs=1e-4
    )
    end = min(49, length)
    while end < length:
        begun, end = end, min(end + stride, length)
        window = ids[max(0, end - 49) : end - 1]
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].double().log_softmax(-1)
        offset = end - 49
        expected = [logits[i - 1 - offset, ids[i]].item() for i in range(begun, end)]
        assert score.logprobs[begun - 1 : end - 1] == pytest.approx(expected, abs=1e-4)


def test_score_errors(model: GPT) -> None:
    with pytest.raises(ValueError, match="text 0 has 60 tokens with its context, the model's context is 48"):
        model.score("x" * 60)
    with pytest.raises(ValueError, match="text 1 is empty"):
        model.score(["ab", ""])
    with pytest.raises(ValueError, match="token id 256 found"):
        model.score([[1, 256]])
    with pytest.raises(ValueError, match="2 contexts for 3 texts"):
        model.score(["a", "b", "c"], ["x", "y"])
    with pytest.raises(ValueError, match="stride is 48"):
        model.score("a", stride=48)
