"""Tokenizers: the ids of transformers', exact text back, and streams that never print half a character."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2TokenizerFast, OpenAIGPTTokenizer

from gptkern import GPTConfig
from gptkern.checkpoint import CheckpointError
from gptkern.model import GPT
from gptkern.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Once upon a time",
    "  two  spaces\n\nand\tlines \r\n",
    "Don't you'll WE'RE it's 3.14159, 2+2=4!?",
    "Crème brûlée, naïve façade; Ångström, ŁÓDŹ",
    "日本語のテキスト。中文字符 한국어",
    "Привет, мир! γειά σου שלום مرحبا",
    "👩‍👩‍👧‍👦 family, 🇫🇷 flag, 👍🏽 thumb, ✍️",
    "e\u0301 combining, \u200b zero width, \ufeff mark, \x00\x1b control",
    "<|endoftext|>a<|endoftext|>",
    "def f(x):\n    return x**2  # code",
]
DECODERS = ("gpt2", "gpt1", "bytes", "metaspace", "wordpiece", "byte_fallback", "none")


@pytest.fixture(scope="session")
def gpt2(shared_data: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(shared_data / "gpt2-tokenizer")


@pytest.fixture(scope="session")
def gpt1(shared_data: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(shared_data / "gpt1-tokenizer")


@pytest.fixture(params=DECODERS)
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param in ("gpt1", "gpt2"):
        tokenizer: Tokenizer = request.getfixturevalue(request.param)
        return tokenizer
    return Tokenizer.bytes() if request.param == "bytes" else word_level(request.param)


def word_level(kind: str) -> Tokenizer:
    """A small vocabulary with a decoder that is neither GPT's."""
    words = [
        "▁the",
        "▁cat",
        "s",
        "▁",
        "##ing",
        "sat",
        ".",
        "'s",
        "é",
        "日",
        *(f"<0x{byte:02X}>" for byte in range(256)),
    ]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="."))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "metaspace":
        backend.decoder = decoders.Metaspace()
    elif kind == "wordpiece":
        backend.decoder = decoders.WordPiece(cleanup=True)
    elif kind == "byte_fallback":
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    return Tokenizer(backend)


def streamed(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    stream = tokenizer.stream(**options)
    return [*(stream.push(token_id) for token_id in ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_is_transformers(gpt2: Tokenizer, shared_data: Path, text: str) -> None:
    theirs = gpt2_of_transformers(shared_data)
    ids = gpt2.encode(text)
    assert ids == theirs.encode(text)
    assert gpt2.decode(ids) == text == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert gpt2.decode(ids, skip_special_tokens=True) == text.replace("<|endoftext|>", "")


@pytest.mark.parametrize("text", TEXTS)
def test_gpt1_is_transformers(gpt1: Tokenizer, shared_data: Path, text: str) -> None:
    theirs = gpt1_of_transformers(shared_data)
    ids = gpt1.encode(text)
    assert ids == theirs.encode(text)
    assert gpt1.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


_made: dict[str, object] = {}


def gpt2_of_transformers(shared_data: Path) -> GPT2TokenizerFast:
    if "gpt2" not in _made:
        _made["gpt2"] = GPT2TokenizerFast.from_pretrained(shared_data / "gpt2-tokenizer")
    return _made["gpt2"]


def gpt1_of_transformers(shared_data: Path) -> OpenAIGPTTokenizer:
    if "gpt1" not in _made:
        _made["gpt1"] = OpenAIGPTTokenizer.from_pretrained(shared_data / "gpt1-tokenizer")
    return _made["gpt1"]


def test_real_text(gpt2: Tokenizer, gpt1: Tokenizer, shared_data: Path) -> None:
    text = (shared_data / "tinyshakespeare.txt").read_text()[:20_000]
    assert gpt2.encode(text) == gpt2_of_transformers(shared_data).encode(text)
    assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt1.encode(text) == gpt1_of_transformers(shared_data).encode(text)


def test_special_tokens(gpt2: Tokenizer, gpt1: Tokenizer) -> None:
    assert (gpt2.vocab_size, gpt2.eos_token_id, gpt2.bos_token_id) == (50257, 50256, 50256)
    assert gpt2.special_tokens == {"<|endoftext|>": 50256}
    assert (gpt1.vocab_size, gpt1.eos_token_id, gpt1.bos_token_id) == (40478, None, None)
    assert gpt1.special_tokens == {"<unk>": 0}


def test_bytes() -> None:
    tokenizer = Tokenizer.bytes()
    assert tokenizer.vocab_size == 256
    for text in TEXTS:
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.decode(tokenizer.encode(text)) == text
    everything = list(range(256))
    assert tokenizer.decode(everything) == bytes(everything).decode(errors="replace")


@pytest.mark.parametrize("kind", ["gpt2", "gpt1", "bytes"])
def test_saved_and_read_back(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer = Tokenizer.bytes() if kind == "bytes" else request.getfixturevalue(kind)
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    again = Tokenizer.from_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.eos_token_id, again.special_tokens) == (tokenizer.eos_token_id, tokenizer.special_tokens)
    assert theirs.eos_token_id == tokenizer.eos_token_id
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == again.encode(text) == theirs.encode(text)
        assert tokenizer.decode(ids) == again.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_stream_is_decode(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text)
    assert "".join(streamed(any_tokenizer, ids)) == any_tokenizer.decode(ids)


@pytest.mark.parametrize(
    "any_tokenizer", [name for name in DECODERS if name != "byte_fallback"], indirect=True
)
def test_stream_of_random_ids_is_decode(any_tokenizer: Tokenizer) -> None:
    for length in [*range(12), 200]:
        for _ in range(8):
            ids = random.choices(range(any_tokenizer.vocab_size), k=length)
            for skip in (False, True):
                pieces = streamed(any_tokenizer, ids, skip_special_tokens=skip)
                assert "".join(pieces) == any_tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 255), st.sampled_from([0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80]))))
def test_stream_of_any_bytes_is_decode(ids: list[int]) -> None:
    tokenizer = Tokenizer.bytes()
    text = bytes(ids).decode(errors="replace")
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_stream_never_splits_a_character(text: str) -> None:
    tokenizer = Tokenizer.bytes()
    pieces = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_stream_shows_each_character_at_once(gpt2: Tokenizer) -> None:
    assert streamed(gpt2, gpt2.encode("日本 𝔘x")) == ["", "日", "", "本", " ", "", "", "𝔘", "x", ""]
    assert streamed(Tokenizer.bytes(), list("é🙂".encode())) == ["", "é", "", "", "", "🙂", ""]
    assert streamed(Tokenizer.bytes(), [0xF0, 0x9F]) == ["", "", "\ufffd"]


def test_stream_of_gpt1_keeps_spaces_for_the_next_word(gpt1: Tokenizer) -> None:
    ids = gpt1.encode("Hello world")
    assert streamed(gpt1, ids) == ["hello", " world", ""]


def test_stream_costs_the_same_for_every_token(gpt2: Tokenizer) -> None:
    """No call decodes more than a few tokens, however long the text is."""

    class Counting:
        decoded = 0

        def __init__(self, backend: tokenizers.Tokenizer) -> None:
            self._backend = backend

        def __getattr__(self, name: str) -> object:
            return getattr(self._backend, name)

        def decode(self, ids: list[int], **options: bool) -> str:
            Counting.decoded = max(Counting.decoded, len(ids))
            return self._backend.decode(ids, **options)

    for tokenizer in (gpt2, word_level("metaspace"), word_level("wordpiece")):
        text = "the cats sat . the cat ' s " * 60
        ids = tokenizer.encode(text)
        counting = Tokenizer(Counting(tokenizer._backend))
        assert "".join(streamed(counting, ids)) == tokenizer.decode(ids)
    assert 0 < Counting.decoded <= 4


def test_padding_ids_have_no_text(gpt2: Tokenizer) -> None:
    assert gpt2.decode([15496, 50300, 995]) == "Hello world"
    assert streamed(gpt2, [15496, 50300, 995]) == ["Hello", "", " world", ""]


def test_never_truncates_or_pads(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(Tokenizer.bytes()._backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_pretrained(tmp_path / "tokenizer.json").encode("abcdefgh") == list(b"abcdefgh")


def test_named_special_tokens(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(Tokenizer.bytes()._backend.to_str())
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "</s>", "eos_token": "<s>"}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    )
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    with pytest.raises(CheckpointError, match="eos_token is '<end>', which is not in its vocabulary"):
        Tokenizer.from_pretrained(tmp_path)


def test_bad_arguments(gpt2: Tokenizer) -> None:
    with pytest.raises(TypeError, match="text is bytes; a str is needed"):
        gpt2.encode(b"abc")
    with pytest.raises(ValueError, match="not valid Unicode"):
        gpt2.encode("\ud83d")
    with pytest.raises(ValueError, match="token id -1 found"):
        gpt2.decode([-1])
    with pytest.raises(ValueError, match="token id -1 found"):
        gpt2.stream().push(-1)


def test_bad_files(shared_data: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer here"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        Tokenizer.from_pretrained(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model":')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer, or truncated"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(shared_data / "gpt2-tokenizer" / name, tmp_path / name)
    whole = (tmp_path / "vocab.json").read_bytes()
    (tmp_path / "vocab.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"vocab\.json, merges\.txt: not a BPE vocabulary"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_bytes(whole)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not a tokenizer's configuration"):
        Tokenizer.from_pretrained(tmp_path)


def test_model_and_tokenizer_must_fit(tmp_path: Path) -> None:
    model = GPT(GPTConfig(vocab_size=256, n_positions=8, n_layer=1, n_head=1, n_embd=8))
    model.tokenizer = Tokenizer.bytes()
    model.save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).tokenizer.encode("é") == [0xC3, 0xA9]
    small = GPT(model.config.replace(vocab_size=255))
    with pytest.raises(
        CheckpointError, match="the tokenizer has ids up to 255, the model's vocab_size is 255"
    ):
        small.save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).config.vocab_size == 256
    small.save_pretrained(tmp_path / "small")
    Tokenizer.bytes().save(tmp_path / "small")
    with pytest.raises(CheckpointError, match="vocabularies do not match"):
        GPT.from_pretrained(tmp_path / "small")
