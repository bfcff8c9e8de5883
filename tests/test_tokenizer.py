"""Tokenizers: the ids of transformers', exact text back, and streams that never print half a character."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, GPT2TokenizerFast, OpenAIGPTTokenizer

from gptkern import GPTConfig
from gptkern.checkpoint import CheckpointError
from gptkern.gpt import GPT
from gptkern.tokenizer import Tokenizer
from gptkern.train import tokens
from gptkern.train.data import pair_ids
from gptkern.train.settings import DataSettings

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
    # as transformers has it: the map is older than the configuration, and stands above it
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (257, 256)
    (tmp_path / "special_tokens_map.json").unlink()
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    assert Tokenizer.from_pretrained(tmp_path).eos_token_id == 258
    with pytest.raises(CheckpointError, match="eos_token is '<end>', which is not in its vocabulary"):
        Tokenizer(backend, eos_token="<end>")


def test_bad_arguments(gpt2: Tokenizer) -> None:
    for call in (gpt2.encode, gpt2):
        with pytest.raises(TypeError, match="add_special_tokens is 'x'; True or False is needed"):
            call("a", add_special_tokens="x")
    with pytest.raises(TypeError, match="text is bytes; a str is needed"):
        gpt2.encode(b"abc")
    with pytest.raises(ValueError, match="not valid Unicode"):
        gpt2.encode("\ud83d")
    with pytest.raises(ValueError, match="token id -1 found; the vocabulary has 50257 tokens"):
        gpt2.decode([-1])
    with pytest.raises(ValueError, match="token id 99999 found; the vocabulary has 50257 tokens"):
        gpt2.decode([99999])
    with pytest.raises(ValueError, match=r"ids has shape \(2, 3\); one sequence of ids is needed"):
        gpt2.decode(torch.zeros(2, 3, dtype=torch.int64))
    for ids in ("abc", [[1, 2]], [1.5], 3, torch.zeros(2), None):
        with pytest.raises(TypeError, match=r"ids is .*; a sequence of whole numbers is needed"):
            gpt2.decode(ids)
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
    with pytest.raises(CheckpointError, match=r"vocab\.json: not readable as JSON, or truncated"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_bytes(whole)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not readable as JSON, or truncated"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    merges = (tmp_path / "merges.txt").read_text()
    (tmp_path / "merges.txt").write_text(merges + "one two three\n")
    with pytest.raises(
        CheckpointError, match=r"merges\.txt, line 50002: two tokens .* 'one two three' found"
    ):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "merges.txt").write_text(merges + "unheard of\n")
    with pytest.raises(CheckpointError, match=r"vocab\.json, merges\.txt: not a BPE vocabulary .*unheard"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", [-1, 1.5, "1", None, True, 1 << 40, [0]])
def test_vocabularies_of_other_ids_are_refused(tmp_path: Path, damage: object) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": damage}))
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"vocab\.json: not a vocabulary: the id of 'b' is"):
        Tokenizer.from_pretrained(tmp_path)


def test_vocabularies_with_an_id_twice_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "c": 0}))
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"vocab\.json: not a vocabulary: 'a' and 'c' have one id, 0"):
        Tokenizer.from_pretrained(tmp_path)


DEEP = '{"a": ' * 1000 + "1" + "}" * 1000
BAD_TOKENS = ["5", "[5]", "true", '"\\ud800"', '{"content": 5}', '{"content": "<s>", "lstrip": "x"}', "{}"]
BAD_CONFIGURATIONS = {
    **{f'{{"eos_token": {token}}}': "eos_token" for token in BAD_TOKENS},
    **{f'{{"additional_special_tokens": [{token}]}}': "extra_special_tokens" for token in BAD_TOKENS},
    '{"extra_special_tokens": "<s>"}': "extra_special_tokens",
    '{"added_tokens_decoder": []}': "added_tokens_decoder",
    '{"added_tokens_decoder": {"x": {"content": "<s>"}}}': "added_tokens_decoder",
    '{"added_tokens_decoder": {"300": "<s>"}}': "added_tokens_decoder",
    '{"add_prefix_space": "yes"}': "add_prefix_space",
    '{"add_bos_token": [1]}': "add_bos_token",
    '{"tokenizer_class": 5}': "tokenizer_class",
    '{"unheard": ' + DEEP + "}": "tokenizer_config.json",
    "[]": "object is needed",
    '{"eos_token": ' + "9" * 5000 + "}": "tokenizer_config.json",
}


@pytest.mark.parametrize("files", ["json", "vocabulary"])
def test_bad_configurations_are_named(tmp_path: Path, files: str) -> None:
    if files == "json":
        Tokenizer.bytes()._backend.save(str(tmp_path / "tokenizer.json"))
    else:
        (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
        (tmp_path / "merges.txt").write_text("")
    for content, named in BAD_CONFIGURATIONS.items():
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json") as caught:
            Tokenizer.from_pretrained(tmp_path)
        assert named in str(caught.value), content
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": 5}')
    with pytest.raises(CheckpointError, match=r"special_tokens_map\.json: eos_token is 5"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "added_tokens.json").write_text('{"<s>": "x"}')
    with pytest.raises(CheckpointError, match=r"added_tokens\.json: the id of '<s>' is 'x'"):
        Tokenizer.from_pretrained(tmp_path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "a", "\x00", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["content", "__type", "lstrip", "0", "257", "x"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
FIELDS = ["bos_token", "x_token", "extra_special_tokens", "additional_special_tokens", "added_tokens_decoder"]
FIELDS += ["add_bos_token", "add_prefix_space", "tokenizer_class", "chat_template", "model_max_length"]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]),
    st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, min_size=1, max_size=3) | JSON_VALUES,
)
def test_any_configuration_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: object
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "vocab.json").write_text('{"a": 0, "b": 1}')
    (folder / "merges.txt").write_text("")
    (folder / name).write_text(json.dumps(content))
    with contextlib.suppress(CheckpointError):
        tokenizer = Tokenizer.from_pretrained(folder)
        tokenizer.save(folder / "again")
        assert Tokenizer.from_pretrained(folder / "again").encode("ab") == tokenizer.encode("ab")


PANICS = {
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {},
    },
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    "decoder": {"type": "Strip", "content": "a", "start": 5, "stop": 5},
}


@pytest.mark.parametrize("part", PANICS)
def test_what_panics_in_the_library_is_an_error(tmp_path: Path, part: str) -> None:
    described = json.loads(Tokenizer.bytes()._backend.to_str()) | {part: PANICS[part]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*the tokenizers library failed"):
        Tokenizer.from_pretrained(tmp_path)


def test_panics_of_single_texts_are_errors() -> None:
    tokenizer = word_level("none")
    tokenizer._backend.decoder = decoders.Strip("s", 1, 1)
    for call in (lambda: tokenizer.decode([2]), lambda: tokenizer.stream().push(2)):
        with pytest.raises(CheckpointError, match="cannot decode the ids: the tokenizers library failed"):
            call()


def test_unknown_classes_are_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    with pytest.raises(CheckpointError, match=r"tokenizer_class is 'RobertaTokenizer'; with vocab\.json"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json"]
)
def test_only_regular_files_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: a regular file is needed, a FIFO found"):
        Tokenizer.from_pretrained(tmp_path)
    assert Tokenizer.find(tmp_path / "absent") is None


def test_nothing_of_a_tokenizer_can_be_set(gpt2: Tokenizer) -> None:
    for name in ("pad_token", "pad_token_id", "eos_token", "padding_side", "vocab_size"):
        with pytest.raises(AttributeError, match=f"{name} cannot be set: a tokenizer does not change"):
            setattr(gpt2, name, gpt2.eos_token)


def test_characters_without_a_token_are_named() -> None:
    tokenizer = Tokenizer.characters({char: i for i, char in enumerate("\n ,:EMOR")})
    assert tokenizer.decode(tokenizer.encode("ROME, ROMEO:")) == "ROME, ROMEO:"
    with pytest.raises(
        ValueError, match="the text holds 'é', 'ü', '日', for which the vocabulary of 8 tokens"
    ):
        tokenizer.encode("ROMEO: é ü 日 é")
    with pytest.raises(ValueError, match="'h' and 18 more, for which"):
        tokenizer.encode("abcdefghijklmnopqrstuvwxyz")
    tokenizer._backend.add_tokens(["<é>"])
    assert tokenizer.encode("RO<é>") == [7, 6, 8]
    with pytest.raises(ValueError, match="the text holds 'é', for"):
        tokenizer.encode("RO<é>é")
    with pytest.raises(ValueError, match="the text holds 'é', for"):
        pickle.loads(pickle.dumps(tokenizer)).encode("é")


def begins_and_ends(add_prefix_space: bool = False) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(Tokenizer.bytes()._backend.to_str())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s> </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    return Tokenizer(backend, bos_token="<s>", eos_token="</s>")


def test_special_tokens_around_a_text(gpt2: Tokenizer) -> None:
    tokenizer = begins_and_ends()
    assert tokenizer.encode("ab") == [256, 97, 98, 257, 257]
    assert tokenizer.encode("ab", add_special_tokens=False) == [97, 98]
    assert tokenizer.encode("", add_special_tokens=False) == []
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ([256], [257, 257])
    assert (gpt2.prefix_ids, gpt2.suffix_ids) == ([], [])
    assert Tokenizer.characters({"x": 0}).prefix_ids == []


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


def test_texts_in_parts_begin_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring after a context, questions with answers, and long documents: one beginning, one end."""
    tokenizer = begins_and_ends()
    model = GPT(
        GPTConfig(vocab_size=258, n_positions=16, n_layer=1, n_head=1, n_embd=8, bos_token_id=3)
    ).eval()
    model.tokenizer = tokenizer
    (whole,) = model.score("ab")
    assert whole.token_ids == [97, 98, 257, 257]
    (after,) = model.score("b", context="a")
    assert after.token_ids == [98]
    assert after.logprobs == pytest.approx(whole.logprobs[1:2])
    (begun,) = model.score("a", context="")
    assert begun.token_ids == [97]
    assert begun.logprobs == pytest.approx(whole.logprobs[:1])
    (given,) = model.score("b", context=[256, 97])
    assert given.logprobs == pytest.approx(after.logprobs)

    pairs = DataSettings(context=8)
    assert pair_ids(tokenizer, "Q", "A", pairs) == ([256, 81, 10, 65], [-100, -100, 65, 257])
    ids, targets = pair_ids(tokenizer, "x" * 20, "ABCD", pairs)
    assert ids == [256, *b"xx\nABCD"]
    assert targets == [-100, -100, -100, *b"ABCD", 257]
    ids, targets = pair_ids(tokenizer, "x" * 20, "A" * 20, pairs)
    assert (ids, targets) == ([256, *b"A" * 7], [*b"A" * 8])

    def document(text: str, tokenizer: Tokenizer, others: int = 0) -> list[int]:
        found = list(tokens._document_ids(tokenizer, [text, *["x"] * others], DataSettings(workers=1)))
        assert len(found) > 1 + others
        return [token for ids in found for token in ids]

    monkeypatch.setattr(tokens, "pieces", functools.partial(tokens.pieces, size=20))
    text = "word of\n" * 16
    assert document(text, tokenizer) == tokenizer.encode(text)
    assert document(text, tokenizer, others=2) == tokenizer.encode(text) + tokenizer.encode("x") * 2
    spaced = begins_and_ends(add_prefix_space=True)
    assert document(text, spaced) == spaced.encode(text)


def test_added_tokens_without_a_row_are_told(tmp_path: Path) -> None:
    """As with transformers a model loads whose embedding was not resized for them; using them is an error."""
    model = GPT(GPTConfig(vocab_size=256, n_positions=8, n_layer=1, n_head=1, n_embd=8))
    model.save_pretrained(tmp_path)
    backend = tokenizers.Tokenizer.from_str(Tokenizer.bytes()._backend.to_str())
    backend.add_special_tokens(["[PAD]"])
    Tokenizer(backend, pad_token="[PAD]").save(tmp_path)
    with pytest.warns(
        UserWarning, match="ids up to 256, the model's vocab_size is 256: texts with the added"
    ):
        again = GPT.from_pretrained(tmp_path)
    assert again.tokenizer.encode("a[PAD]") == [97, 256]
    assert len(again.generate_text("a", max_new_tokens=1)) == 1
    with pytest.raises(ValueError, match="holds 256; token ids from 0 to 255 are accepted"):
        again.generate_text("a[PAD]", max_new_tokens=1)


def test_saving_replaces_links_and_writes_through_none(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_text("somebody's")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(blob)
    Tokenizer.bytes().save(folder)
    assert blob.read_text() == "somebody's"
    assert Tokenizer.from_pretrained(folder).encode("a") == [97]


def test_token_bytes_are_the_text_in_parts() -> None:
    whole = Tokenizer.from_pretrained()
    assert b"".join(map(whole.token_bytes, whole.encode("né 😀"))) == "né 😀".encode()
    assert whole.token_bytes(10**6) == b""
    pieces = tokenizers.Tokenizer(
        models.BPE(vocab={"<0xC3>": 0, "\u2581the": 1, "a": 2}, merges=[], byte_fallback=True)
    )
    pieces.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    assert [Tokenizer(pieces).token_bytes(token) for token in range(3)] == [b"\xc3", b" the", b"a"]
    words = tokenizers.Tokenizer(models.BPE(vocab={"a</w>": 0, "b": 1}, merges=[]))
    words.decoder = decoders.BPEDecoder(suffix="</w>")
    assert [Tokenizer(words).token_bytes(token) for token in range(2)] == [b"a ", b"b"]
