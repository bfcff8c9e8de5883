"""A tokenizer that is called: rows of one length, as transformers' tokenizers make them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import pre_tokenizers, processors
from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

from gptkern import GPT, GPTConfig, Tokenizer

TEXTS = ["Once upon a time", "", "Crème brûlée, naïve", "a b c d e f g h i j k l m n o p"]


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    return shared_data / "gpt2-tokenizer"


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    tokenizer = GPT2TokenizerFast.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.mark.parametrize(
    ("padding", "truncation", "side"),
    itertools.product([True, "longest", "max_length", False], [True, False], ["left", "right"]),
)
def test_rows_are_transformers(
    ours: Tokenizer, theirs: Any, padding: Any, truncation: bool, side: str
) -> None:
    options = {"padding": padding, "truncation": truncation, "max_length": 7, "padding_side": side}
    expected = theirs(TEXTS, **options)
    found = ours(TEXTS, **options)
    assert found["input_ids"] == expected["input_ids"]
    assert found.attention_mask == expected["attention_mask"]
    one = ours(TEXTS[0], **options)
    assert one == dict(theirs(TEXTS[0], **options))


def test_tensors_go_into_generate(ours: Tokenizer, theirs: Any) -> None:
    found = ours(TEXTS, padding=True, return_tensors="pt", padding_side="left")
    expected = theirs(TEXTS, padding=True, return_tensors="pt", padding_side="left")
    assert torch.equal(found.input_ids, expected.input_ids) and found.input_ids.dtype == torch.int64
    assert torch.equal(found.attention_mask, expected.attention_mask)
    assert ours("hi", return_tensors="pt").input_ids.shape == (1, 1)
    assert ours([], return_tensors="pt").input_ids.shape == (0, 0)
    assert found.to("meta").input_ids.device.type == "meta"
    model = GPT(GPTConfig(vocab_size=256, n_positions=32, n_layer=1, n_head=2, n_embd=16)).eval()
    model.tokenizer = Tokenizer.bytes()
    batch = model.tokenizer(["To be", "or"], padding=True, padding_side="left", return_tensors="pt")
    made = model.generate(**batch, max_new_tokens=4)
    for row, text in zip(made, ["To be", "or"], strict=True):
        alone = model.generate(**model.tokenizer(text, return_tensors="pt"), max_new_tokens=4)
        assert torch.equal(row[-4:], alone[0, -4:])
    texts = model.tokenizer.batch_decode(made[:, -4:])
    assert texts == [model.tokenizer.decode(row) for row in made[:, -4:]]


def test_special_tokens_and_sides_are_the_files(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(Tokenizer.bytes()._backend.to_str())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<s>", "</s>", "[PAD]"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    library = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="[PAD]",
        padding_side="left",
        truncation_side="left",
        model_max_length=5,
    )
    library.save_pretrained(tmp_path)
    found = Tokenizer.from_pretrained(tmp_path)(["abcdefgh", "x"], padding=True, truncation=True)
    assert found == dict(library(["abcdefgh", "x"], padding=True, truncation=True))
    assert found.input_ids == [[256, 102, 103, 104, 257], [258, 258, 256, 120, 257]]
    bare = Tokenizer.from_pretrained(tmp_path)("ab", add_special_tokens=False)
    assert bare.input_ids == library("ab", add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (3, {}, "texts is int; a str or a sequence of str is needed"),
        ([3], {}, "texts is list; a str or"),
        ("a", {"padding": "yes"}, "padding is 'yes'; True, False, 'longest'"),
        ("a", {"return_tensors": "np"}, "return_tensors is 'np'; 'pt' or None is needed"),
        ("a", {"padding_side": "up"}, "padding_side is 'up'; 'left' or 'right' is needed"),
        ("a", {"max_length": 0}, "max_length is 0; 1 or more is needed"),
        ("a", {"truncation": True}, "need max_length: the tokenizer names none"),
        (
            ["a", "bcd"],
            {"return_tensors": "pt"},
            "the texts have 1 to 3 tokens, and return_tensors",
        ),
    ],
)
def test_mistakes_are_named(texts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        Tokenizer.bytes()(texts, **options)
    with pytest.raises(AttributeError, match="Encoding has no 'ids'; it has input_ids, attention_mask"):
        Tokenizer.bytes()("a").ids  # noqa: B018
