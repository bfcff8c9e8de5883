"""Tokenizers of the families, in the files that their checkpoints have: AutoTokenizer's ids and texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from gptkern.checkpoint.errors import CheckpointError
from gptkern.tokenizer import Tokenizer

CORPUS = [
    "In 1999 and 2024, 2024 was 1999 + 25; 12345 678 3.14159 2024-2025 x1x2 2024",
    "The quick brown fox jumps over 13 lazy dogs, don't you know? I'll say: 3.14159!",
    "Ein größerer Bär läuft über die Straße.",
    "Привет, как дела? Это тест.",
    "こんにちは世界。日本語のテスト",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "안녕하세요 세계",
    "def f(x):\n    return x ** 2  # ok\n\n\tindent",
    "שלום עולם",
    "你好,世界",
] * 3
TEXTS = [
    *("", " ", "a", " a", "  lead", "trail  ", "x" * 50),
    "  two  spaces\n\nand\tlines \r\n",
    "Hello world 12345 don't WE'RE 1 22 333 2024",
    "Größe Crème brûlée e\u0301 é \ufb01 ½ Å",
    *("Привет мир", "日本語のテスト 世界", "مرحبا", "नमस्ते दुनिया", "안녕", "שלום"),
    "👍🏽👨\u200d👩\u200d👧 \U0001f600 x a\u00a0b\u3000c",
    "<s>a</s> b<unk> c<bos>",
    "<|im_start|>user\nhi<|im_end|>\n<think> x",
    "<|endoftext|> z <pad>\x00\x01",
]
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_END, _BEGIN3 = "<|endoftext|>", ("<|begin_of_text|>", "<|end_of_text|>")


def around(backend: Backend, bos: str) -> Any:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )


@lru_cache
def byte_level(kind: str, specials: tuple[str, ...] = (_END,), bos: str = "", nfc: bool = False) -> Backend:
    """A byte-level BPE with words as in GPT-2 ("plain"), with single digits, or as in "qwen" or "llama3"."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = {
        "plain": plain,
        "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), plain]),
        "qwen": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN), "isolated"), whole]),
        "llama3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), whole]),
    }[kind]
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC() if nfc else None
    backend.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(specials),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.Sequence([processors.ByteLevel(), around(backend, bos)])
    return backend


@lru_cache
def sentencepiece(gemma: bool = False) -> Backend:
    """Llama 2's or Gemma's: characters that it does not know become bytes."""
    names = ("<pad>", "<eos>", "<bos>", "<unk>") if gemma else ("<unk>", "<s>", "</s>")
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if gemma:
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[*names, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
        limit_alphabet=60,
    )
    backend.train_from_iterator(CORPUS, trainer)
    described = json.loads(backend.to_str())
    # The trainer adds what it is given as special tokens; bytes are none.
    described["added_tokens"] = [t for t in described["added_tokens"] if t["content"] in names]
    backend = Backend.from_str(json.dumps(described))
    strip = [] if gemma else [decoders.Strip(" ", 1, 0)]
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(parts)
    backend.post_processor = around(backend, "<bos>" if gemma else "<s>")
    return backend


@dataclass
class Case:
    """A folder: its tokenizer.json, the model type and ``tokenizer_config.json``.

    Attributes:
        added: Tokens added to those of the backend.
        ordinary: An added token of the backend that is no special one.
    """

    backend: Callable[[], Backend]
    model_type: str
    configuration: dict[str, Any] = field(default_factory=dict)
    added: tuple[AddedToken, ...] = ()
    ordinary: str = ""

    def write(self, folder: Path) -> None:
        described = json.loads(self.backend().to_str())
        for token in described["added_tokens"]:
            token["special"] = token["special"] and token["content"] != self.ordinary
        backend = Backend.from_str(json.dumps(described))
        backend.add_tokens(list(self.added))
        backend.save(str(folder / "tokenizer.json"))
        (folder / "config.json").write_text(json.dumps({"model_type": self.model_type}))
        if self.configuration:
            (folder / "tokenizer_config.json").write_text(json.dumps(self.configuration))


def said(class_name: str, *names: str | None, **more: Any) -> dict[str, Any]:
    """A ``tokenizer_config.json``: the class, the begin, end, unknown and padding tokens, and more."""
    named = zip(("bos_token", "eos_token", "unk_token", "pad_token"), names, strict=False)
    return {"tokenizer_class": class_name, **dict(named), **more}


_IM = tuple(AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>"))
_SPACES = (*(AddedToken(" " * n, normalized=True) for n in (2, 4)), AddedToken("<pad>", special=True))
_DECODER = {
    "2": {"content": "</s>", "rstrip": True, "special": False, "normalized": False},
    "420": {"content": _END, "special": True, "normalized": False},
}
_LLAMA2 = said("LlamaTokenizer", "<s>", "</s>", "<unk>", legacy=False, add_bos_token=True)
_GENERIC = "PreTrainedTokenizerFast"
CASES = {
    "llama 2": Case(sentencepiece, "llama", _LLAMA2),
    "llama 2, legacy": Case(sentencepiece, "llama", {**_LLAMA2, "legacy": True}),
    "llama 2, no space": Case(sentencepiece, "llama", {**_LLAMA2, "add_prefix_space": False}),
    "llama 2, no class": Case(sentencepiece, "llama"),
    "llama 2, generic class": Case(sentencepiece, "llama", said(_GENERIC, "<s>", "</s>", "<unk>")),
    "llama 3": Case(lambda: byte_level("llama3", _BEGIN3, _BEGIN3[0]), "llama", said(_GENERIC, *_BEGIN3)),
    "llama 3, llama's class": Case(
        lambda: byte_level("llama3", _BEGIN3, _BEGIN3[0]), "llama", said("LlamaTokenizerFast", *_BEGIN3)
    ),
    "smollm 2": Case(
        lambda: byte_level("digits", (_END, "<|im_start|>", "<|im_end|>")),
        "llama",
        said("GPT2Tokenizer", "<|im_start|>", "<|im_end|>", _END, "<|im_end|>"),
    ),
    "smollm 3": Case(
        lambda: byte_level("llama3", _BEGIN3, _BEGIN3[0]), "smollm3", said(_GENERIC, None, _BEGIN3[1])
    ),
    "mistral": Case(sentencepiece, "mistral", {**_LLAMA2, "legacy": True}),
    "mistral, byte level": Case(
        lambda: byte_level("llama3", ("<unk>", "<s>", "</s>"), "<s>"),
        "mistral",
        said(_GENERIC, "<s>", "</s>"),
    ),
    "phi 3": Case(
        sentencepiece,
        "phi3",
        said("LlamaTokenizer", "<s>", _END, "<unk>", _END, legacy=False, added_tokens_decoder=_DECODER),
        ordinary="</s>",
    ),
    "qwen 2": Case(
        lambda: byte_level("qwen", nfc=True),
        "qwen2",
        said("Qwen2Tokenizer", None, "<|im_end|>", None, _END, additional_special_tokens=["<|im_start|>"]),
        _IM,
    ),
    "qwen 2, no class": Case(lambda: byte_level("qwen", nfc=True), "qwen2", {}, _IM),
    "qwen 2, another class": Case(
        lambda: byte_level("llama3"), "qwen2", said(_GENERIC, None, "<|im_end|>"), _IM
    ),
    "qwen 2, llama's class": Case(
        lambda: byte_level("llama3", bos=_END), "qwen2", said("LlamaTokenizerFast", _END, "<|im_end|>"), _IM
    ),
    "qwen 3": Case(
        lambda: byte_level("qwen", nfc=True),
        "qwen3",
        said("Qwen2Tokenizer", None, "<|im_end|>", None, _END),
        (*_IM, AddedToken("<think>", special=False, normalized=False)),
    ),
    "pythia": Case(
        lambda: byte_level("plain", nfc=True),
        "gpt_neox",
        said("GPTNeoXTokenizer", _END, _END, _END, "<pad>"),
        _SPACES,
    ),
    "pythia, a beginning": Case(
        lambda: byte_level("plain", nfc=True, bos=_END),
        "gpt_neox",
        said("GPTNeoXTokenizer", _END, _END, _END, "<pad>", add_bos_token=True),
        _SPACES,
    ),
    "gpt-j": Case(lambda: byte_level("plain"), "gptj", said("GPT2Tokenizer", _END, _END, _END)),
    "opt": Case(
        lambda: byte_level("plain", ("<s>", "<pad>", "</s>", "<unk>"), "</s>"),
        "opt",
        said("GPT2Tokenizer", "</s>", "</s>", "</s>", "<pad>", add_bos_token=True),
    ),
    "opt, no class": Case(lambda: byte_level("plain", ("<s>", "<pad>", "</s>", _END), "</s>"), "opt"),
    "gemma 3": Case(
        lambda: sentencepiece(True), "gemma3_text", said("GemmaTokenizer", "<bos>", "<eos>", "<unk>", "<pad>")
    ),
    "gemma 3, no class": Case(lambda: sentencepiece(True), "gemma3_text"),
    "granite": Case(lambda: byte_level("digits"), "granite", said("GPT2Tokenizer", _END, _END, _END)),
    "olmo 2": Case(lambda: byte_level("llama3"), "olmo2", said("GPT2Tokenizer", _END, _END, _END)),
    "starcoder": Case(
        lambda: byte_level("digits"), "gpt_bigcode", said("GPT2TokenizerFast", _END, _END, _END)
    ),
    "starcoder 2": Case(lambda: byte_level("digits"), "starcoder2", said("GPT2Tokenizer", _END, _END, _END)),
    "starcoder 2, no class": Case(lambda: byte_level("digits"), "starcoder2"),
}


def assert_alike(theirs: Any, ours: Tokenizer) -> None:
    """The same ids, decoded texts, special tokens and padded rows; the same text piece by piece."""
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        # A class's default that the vocabulary lacks is no token here: no model has a row for it.
        expected = getattr(theirs, name)
        assert getattr(ours, name) == expected, name
    for text in TEXTS:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special).input_ids
            assert ours.encode(text, add_special_tokens=special) == ids, text
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected, text
            stream = ours.stream(skip_special_tokens=skip)
            assert "".join(map(stream.push, ids)) + stream.finish() == expected, text
    if theirs.pad_token_id is not None:
        batch, rows = theirs(TEXTS, padding=True), ours(TEXTS, padding=True)
        assert (rows.input_ids, rows.attention_mask) == (batch.input_ids, batch.attention_mask)


@pytest.mark.parametrize("name", CASES)
def test_ids_and_texts_are_those_of_autotokenizer(name: str, tmp_path: Path) -> None:
    CASES[name].write(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(tmp_path)
    assert_alike(theirs, ours)
    # Written back beside the model, and read again by both
    ours.save(tmp_path)
    assert_alike(AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(tmp_path))
    alone = tmp_path / "alone"
    ours.save(alone)
    assert_alike(theirs, Tokenizer.from_pretrained(alone))


def test_a_padding_token_that_the_vocabulary_lacks_is_none(tmp_path: Path) -> None:
    Case(lambda: byte_level("plain", nfc=True), "gpt_neox").write(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == 420
    assert Tokenizer.from_pretrained(tmp_path).pad_token_id is None


def test_vocabularies_and_merges_alone(tmp_path: Path) -> None:
    model = json.loads(byte_level("qwen", nfc=True).to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("".join(f"{left} {right}\n" for left, right in model["merges"]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert_alike(AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(tmp_path))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "tokenizer_class": "LlamaTokenizer"})
    )
    with pytest.raises(
        CheckpointError, match=r"LlamaTokenizer'; with .* GPTNeoXTokenizer, Qwen2Tokenizer are read"
    ):
        Tokenizer.from_pretrained(tmp_path)
