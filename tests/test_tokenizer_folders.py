"""Folders of tokenizer files, as transformers writes them and as people do: AutoTokenizer's ids and texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, AutoTokenizer, GPT2Tokenizer, OpenAIGPTTokenizer, PreTrainedTokenizerFast

from gptkern import GPT, GPTConfig
from gptkern.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Once upon a time",
    " <user> Hello<user>there <|endoftext|> [PAD]x</s>",
    "<|endoftext|>a<|endoftext|><unk> <mask>",
    "  two  spaces\n\nand\tlines \r\n",
    "Don't WE'RE 3.14159, Crème brûlée 日本語 👍🏽",
]
# Texts that put special tokens and spaces next to each other, which is where rules about them differ.
PIECES = [
    "<user>",
    "<|endoftext|>",
    "[PAD]",
    "</s>",
    "<unk>",
    "<mask>",
    " ",
    "\n",
    "a",
    "The",
    "é",
    "日",
    "'s",
]
GPT2_CONFIG, GPT1_CONFIG = {"model_type": "gpt2"}, {"model_type": "openai-gpt"}
TEXT = "The cat sat on the mat. It's a user's mask, the end of text! Once upon a time 3.14 <pad> " * 3


@lru_cache
def vocabulary(kind: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A small vocabulary and its merges: GPT-2's kind (every byte, <|endoftext|>) or GPT-1's (</w>)."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token=None if kind == "gpt2" else "<unk>"))
    if kind == "gpt2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>"],
            show_progress=False,
        )
    else:
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.BpeTrainer(
            vocab_size=120, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
        )
    backend.train_from_iterator([TEXT], trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def write(folder: Path, files: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def bpe_files(kind: str = "gpt2") -> dict[str, Any]:
    vocab, merges = vocabulary(kind)
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    return {"vocab.json": vocab, "merges.txt": f"#version: 0.2\n{lines}"}


def json_files(**changes: Any) -> dict[str, Any]:
    """A byte-level ``tokenizer.json``, with some of its parts changed."""
    vocab, merges = vocabulary("gpt2")
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    for name, part in changes.items():
        if name == "added":
            backend.add_tokens(part)
        else:
            setattr(backend, name, part)
    return {"tokenizer.json": backend.to_str()}


USER = {"content": "<user>", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False}
BEGIN = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
HAND_MADE: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: bpe_files() | {"config.json": GPT2_CONFIG},
    "class alone": lambda: bpe_files() | {"tokenizer_config.json": {"tokenizer_class": "GPT2TokenizerFast"}},
    "class in config.json": lambda: (
        bpe_files() | {"config.json": GPT2_CONFIG | {"tokenizer_class": "GPT2TokenizerFast"}}
    ),
    "added_tokens.json": lambda: (
        bpe_files() | {"config.json": GPT2_CONFIG, "added_tokens.json": {"<user>": 301, "[PAD]": 300}}
    ),
    "added_tokens.json with a gap": lambda: (
        bpe_files() | {"config.json": GPT2_CONFIG, "added_tokens.json": {"<user>": 310}}
    ),
    "added_tokens_decoder": lambda: (
        bpe_files()
        | {
            "config.json": GPT2_CONFIG,
            "tokenizer_config.json": {
                "added_tokens_decoder": {"301": USER | {"special": False}, "300": {"content": "[PAD]"}},
                "pad_token": "[PAD]",
            },
            "special_tokens_map.json": {"eos_token": "</s>"},
            "added_tokens.json": {"<mask>": 302},
        }
    ),
    "additional_special_tokens": lambda: (
        bpe_files()
        | {
            "config.json": GPT2_CONFIG,
            "tokenizer_config.json": {
                "additional_special_tokens": ["<user>", "<mask>"],
                "pad_token": "[PAD]",
            },
        }
    ),
    "extra_special_tokens": lambda: (
        bpe_files()
        | {
            "config.json": GPT2_CONFIG,
            "tokenizer_config.json": {
                "extra_special_tokens": ["<user>"],
                "additional_special_tokens": ["<mask>"],
            },
            "special_tokens_map.json": {"extra_special_tokens": ["[PAD]", USER]},
        }
    ),
    "extra tokens with names": lambda: (
        bpe_files()
        | {
            "config.json": GPT2_CONFIG,
            "tokenizer_config.json": {"extra_special_tokens": {"user": "<user>"}, "image_token": "<mask>"},
        }
    ),
    "special_tokens_map.json": lambda: (
        bpe_files()
        | {
            "config.json": GPT2_CONFIG,
            "special_tokens_map.json": {
                "eos_token": USER | {"content": "</s>"},
                "pad_token": "[PAD]",
                "additional_special_tokens": ["<user>"],
            },
            "tokenizer_config.json": {"eos_token": "<mask>", "bos_token": None},
        }
    ),
    "map and additional tokens in both": lambda: (
        bpe_files()
        | {
            "config.json": GPT2_CONFIG,
            "special_tokens_map.json": {"additional_special_tokens": ["<user>"]},
            "tokenizer_config.json": {"additional_special_tokens": ["<mask>"]},
        }
    ),
    "objects with a type": lambda: (
        bpe_files()
        | {
            "config.json": GPT2_CONFIG,
            "tokenizer_config.json": {
                "eos_token": USER | {"content": "</s>", "__type": "AddedToken"},
                "additional_special_tokens": [USER | {"__type": "AddedToken"}],
            },
        }
    ),
    "add_prefix_space": lambda: (
        bpe_files() | {"config.json": GPT2_CONFIG, "tokenizer_config.json": {"add_prefix_space": True}}
    ),
    "add_bos_token": lambda: (
        bpe_files() | {"config.json": GPT2_CONFIG, "tokenizer_config.json": {"add_bos_token": True}}
    ),
    "add_bos_token of its own": lambda: (
        bpe_files()
        | {
            "config.json": GPT2_CONFIG,
            "tokenizer_config.json": {
                "add_bos_token": True,
                "add_eos_token": True,
                "bos_token": "<user>",
                "eos_token": "</s>",
            },
        }
    ),
    "add_bos_token of none": lambda: (
        bpe_files()
        | {"config.json": GPT2_CONFIG, "tokenizer_config.json": {"add_bos_token": True, "bos_token": None}}
    ),
    "split_special_tokens": lambda: (
        bpe_files() | {"config.json": GPT2_CONFIG, "tokenizer_config.json": {"split_special_tokens": True}}
    ),
    "json, plain": lambda: json_files() | {"config.json": GPT2_CONFIG},
    "json, add_prefix_space": lambda: (
        json_files() | {"config.json": GPT2_CONFIG, "tokenizer_config.json": {"add_prefix_space": True}}
    ),
    "json with a prefix space, none in the configuration": lambda: (
        json_files(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))
        | {"config.json": GPT2_CONFIG, "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}}
    ),
    "json with a prefix space, generic class": lambda: (
        json_files(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))
        | {
            "config.json": GPT2_CONFIG,
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "add_prefix_space": False,
            },
        }
    ),
    "json with a normalizer": lambda: (
        json_files(normalizer=normalizers.Lowercase()) | {"config.json": GPT2_CONFIG}
    ),
    "json that begins": lambda: (
        json_files(post_processor=BEGIN)
        | {"config.json": GPT2_CONFIG, "tokenizer_config.json": {"add_bos_token": False}}
    ),
    "json with added tokens": lambda: (
        json_files(added=[AddedToken("<user>", rstrip=True), "[PAD]"])
        | {"config.json": GPT2_CONFIG, "added_tokens.json": {"<mask>": 305}}
    ),
    "json and added_tokens_decoder": lambda: (
        json_files(added=[AddedToken("<user>", rstrip=True), "[PAD]"])
        | {
            "config.json": GPT2_CONFIG,
            "tokenizer_config.json": {"added_tokens_decoder": {"301": USER}, "pad_token": "[PAD]"},
        }
    ),
    "json, generic, more tokens": lambda: (
        json_files(added=["<user>"])
        | {
            "tokenizer_config.json": {
                "tokenizer_class": "TokenizersBackend",
                "pad_token": "[PAD]",
                "eos_token": "</s>",
                "extra_special_tokens": ["<mask>"],
            }
        }
    ),
    "GPT-1": lambda: bpe_files("gpt1") | {"config.json": GPT1_CONFIG},
    "GPT-1 with tokens": lambda: (
        bpe_files("gpt1")
        | {
            "config.json": GPT1_CONFIG,
            "special_tokens_map.json": {"unk_token": "<unk>", "pad_token": "[PAD]", "bos_token": "<user>"},
            "tokenizer_config.json": {"add_bos_token": True},
            "added_tokens.json": {"</s>": 120},
        }
    ),
    "GPT-1 of another unknown token": lambda: (
        bpe_files("gpt1") | {"config.json": GPT1_CONFIG, "tokenizer_config.json": {"unk_token": "a"}}
    ),
}


def saved(theirs: Any, folder: Path, config: dict[str, Any]) -> None:
    theirs.save_pretrained(folder)
    write(folder, {"config.json": config})


def gpt2_of(folder: Path, **options: Any) -> GPT2Tokenizer:
    write(folder, bpe_files())
    return GPT2Tokenizer.from_pretrained(folder, **options)


def gpt1_of(folder: Path, **options: Any) -> OpenAIGPTTokenizer:
    write(folder, bpe_files("gpt1"))
    return OpenAIGPTTokenizer.from_pretrained(folder, **options)


def with_tokens(theirs: Any) -> Any:
    theirs.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<user>"]})
    theirs.add_tokens(["<mask>", AddedToken("</s>", lstrip=True)])
    return theirs


def generic_of(folder: Path) -> PreTrainedTokenizerFast:
    write(folder, json_files(post_processor=BEGIN))
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")


LIBRARY_MADE: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "saved GPT-2": (gpt2_of, GPT2_CONFIG),
    "saved GPT-2 with tokens": (lambda folder: with_tokens(gpt2_of(folder)), GPT2_CONFIG),
    "saved GPT-2 that begins": (
        lambda folder: gpt2_of(folder, add_bos_token=True, add_prefix_space=True),
        GPT2_CONFIG,
    ),
    "saved GPT-1": (gpt1_of, GPT1_CONFIG),
    "saved GPT-1 with tokens": (lambda folder: with_tokens(gpt1_of(folder)), GPT1_CONFIG),
    "saved generic": (lambda folder: with_tokens(generic_of(folder)), GPT2_CONFIG),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    found = {name: root / str(number) for number, name in enumerate([*HAND_MADE, *LIBRARY_MADE])}
    for name, files in HAND_MADE.items():
        write(found[name], files())
    for name, (make, config) in LIBRARY_MADE.items():
        saved(make(root / "source"), found[name], config)
        shutil.rmtree(root / "source")
    return found


def same(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", [*HAND_MADE, *LIBRARY_MADE])
def test_folders_are_read_as_by_transformers(folders: dict[str, Path], name: str) -> None:
    ours, theirs = Tokenizer.from_pretrained(folders[name]), AutoTokenizer.from_pretrained(folders[name])
    assert ours.vocab_size == len(theirs)
    for token in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(ours, token) == getattr(theirs, token), token
        assert getattr(ours, f"{token}_id") == getattr(theirs, f"{token}_id"), token
    for text in TEXTS:
        same(ours, theirs, text)


@lru_cache
def pair(folder: Path) -> tuple[Tokenizer, Any]:
    return Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | st.text(max_size=12))
def test_any_text_is_read_as_by_transformers(folders: dict[str, Path], text: str) -> None:
    for folder in folders.values():
        same(*pair(folder), text)


FACTS = ("special_tokens_map", "extra_special_tokens", "chat_template", "model_max_length", "padding_side")


@pytest.mark.parametrize("name", [*HAND_MADE, *LIBRARY_MADE])
def test_saved_folders_are_the_same_to_transformers(
    folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    source, again = folders[name], tmp_path / "again"
    before = AutoTokenizer.from_pretrained(source)
    Tokenizer.from_pretrained(source).save(again)
    if (source / "config.json").exists():
        shutil.copy(source / "config.json", again)
    after, ours = AutoTokenizer.from_pretrained(again), Tokenizer.from_pretrained(again)
    assert type(after) is type(before)
    assert len(after) == len(before)
    for fact in FACTS:
        assert getattr(after, fact) == getattr(before, fact), fact
    for text in TEXTS:
        same(ours, before, text)
        same(ours, after, text)


@pytest.mark.parametrize("template", ["in a file", "in the configuration", "both"])
def test_saving_keeps_what_is_not_used_here(tmp_path: Path, template: str) -> None:
    told = {
        "model_max_length": 77,
        "padding_side": "left",
        "pad_token": "[PAD]",
        "unk_token": "<mask>",
        "additional_special_tokens": ["<user>"],
        "unheard_of": {"nested": [1, None, "é"]},
    }
    if template != "in a file":
        told["chat_template"] = "{{ configuration }}"
    source = tmp_path / "source"
    write(source, bpe_files() | {"config.json": GPT2_CONFIG, "tokenizer_config.json": told})
    if template != "in the configuration":
        (source / "chat_template.jinja").write_text("{{ file }}\r\né", newline="")
    before = AutoTokenizer.from_pretrained(source)
    again = tmp_path / "again"
    write(again, {"config.json": GPT2_CONFIG, "special_tokens_map.json": {"pad_token": "x"}})
    Tokenizer.from_pretrained(source).save(again)
    after = AutoTokenizer.from_pretrained(again)
    for fact in FACTS:
        assert getattr(after, fact) == getattr(before, fact), fact
    assert after.init_kwargs["unheard_of"] == told["unheard_of"]
    # and once more, over another tokenizer's files, by a model's save
    model = GPT(GPTConfig(vocab_size=310, n_positions=8, n_layer=1, n_head=1, n_embd=8))
    model.tokenizer = Tokenizer.from_pretrained(again)
    (source / "vocab.json").unlink()
    model.save_pretrained(source)
    assert AutoTokenizer.from_pretrained(source).chat_template == before.chat_template
    Tokenizer.bytes().save(source)
    assert sorted(path.name for path in source.glob("*token*")) == ["tokenizer.json", "tokenizer_config.json"]
    assert not (source / "chat_template.jinja").exists()
