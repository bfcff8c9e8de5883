"""Where a checkpoint's tokenizer is looked for: beside it, nanoGPT's meta.pkl, the hub's cache, by name."""

from __future__ import annotations

import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoint_files import VOCAB, reference, write_llmc, write_nanogpt

from gptkern import GPT, Tokenizer
from gptkern.checkpoint import CheckpointError
from gptkern.cli import run

CHARACTERS = {chr(32 + i): i for i in range(VOCAB)}


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the hub's."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def nanogpt(path: Path, vocab_size: int = VOCAB, **settings: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nanogpt(path, reference(vocab_size=vocab_size), bias=True)
    checkpoint = torch.load(path, weights_only=False)
    torch.save(checkpoint | {"config": settings}, path)
    return path


def meta(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    itos = {number: character for character, number in CHARACTERS.items()}
    path.write_bytes(pickle.dumps({"vocab_size": VOCAB, "itos": itos, "stoi": CHARACTERS}))


@pytest.mark.parametrize("name", ["ckpt.pt", "gpt2.bin"])
def test_files_find_the_tokenizer_beside(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "ckpt.pt":
        nanogpt(path)
    else:
        write_llmc(path, reference(), 3)
    assert GPT.from_pretrained(path).tokenizer is None
    Tokenizer.characters(CHARACTERS).save(tmp_path)
    assert GPT.from_pretrained(path).tokenizer.encode("ab") == [65, 66]
    Tokenizer.bytes().save(tmp_path)
    with pytest.warns(UserWarning, match="passed over: it has 256 tokens, the model 115"):
        model = GPT.from_pretrained(path)
    assert model.tokenizer is None
    with pytest.raises(
        CheckpointError, match="the tokenizer has ids up to 255, the model's vocab_size is 115"
    ):
        GPT.from_pretrained(path, tokenizer=tmp_path)


def test_nanogpts_characters(tmp_path: Path) -> None:
    """meta.pkl beside the checkpoint, or in the data set's folder as nanoGPT's own scripts leave it."""
    path = nanogpt(tmp_path / "out" / "ckpt.pt", dataset="shakespeare_char")
    meta(tmp_path / "data" / "other" / "meta.pkl")
    assert GPT.from_pretrained(path).tokenizer is None
    meta(tmp_path / "data" / "shakespeare_char" / "meta.pkl")
    for model in (GPT.from_pretrained(path), GPT.from_pretrained(path.parent)):
        assert model.tokenizer.encode("ROMEO") == [CHARACTERS[c] for c in "ROMEO"]
        with pytest.raises(ValueError, match="'日', for which the vocabulary of 115 tokens has none"):
            model.tokenizer.encode("日")
    elsewhere = nanogpt(tmp_path / "elsewhere" / "runs" / "ckpt.pt", dataset="shakespeare_char")
    named = tmp_path / "data" / "shakespeare_char" / "meta.pkl"
    assert GPT.from_pretrained(elsewhere).tokenizer is None
    assert GPT.from_pretrained(elsewhere, tokenizer=named).tokenizer.decode([50, 47]) == "RO"
    shutil.rmtree(tmp_path / "data")
    meta(tmp_path / "out" / "meta.pkl")
    assert GPT.from_pretrained(path).tokenizer.decode([50, 47]) == "RO"
    (tmp_path / "out" / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(CheckpointError, match=r"meta\.pkl: plain values are needed"):
        GPT.from_pretrained(path)
    assert GPT.from_pretrained(path, tokenizer=Tokenizer.characters(CHARACTERS)).tokenizer is not None


@pytest.mark.parametrize("data_set", ["../out", "..", "/etc", "", 5, None, "a/b"])
def test_data_sets_are_plain_names(tmp_path: Path, data_set: object) -> None:
    path = nanogpt(tmp_path / "out" / "ckpt.pt", dataset=data_set)
    meta(tmp_path / "data" / "out" / "meta.pkl")
    meta(tmp_path / "meta.pkl")
    meta(tmp_path / "data" / "meta.pkl")
    meta(tmp_path / "data" / "a" / "b" / "meta.pkl")
    (tmp_path / "out" / "meta.pkl").unlink(missing_ok=True)
    assert GPT.from_pretrained(path).tokenizer is None


@pytest.mark.parametrize("vocab_size", [50257, 50304, 50300])
def test_gpt2s_tokenizer_of_the_cache(
    tmp_path: Path, no_cache: Path, shared_data: Path, vocab_size: int
) -> None:
    path = nanogpt(tmp_path / "ckpt.pt", vocab_size=vocab_size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert GPT.from_pretrained(path).tokenizer is None
    repository = no_cache / "models--gpt2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(shared_data / "gpt2-tokenizer", repository / "snapshots" / ("0" * 40))
    if vocab_size == 50300:
        assert GPT.from_pretrained(path).tokenizer is None
        return
    with pytest.warns(UserWarning, match="no tokenizer beside it; GPT-2's is taken, from the hub's cache"):
        model = GPT.from_pretrained(path)
    assert model.tokenizer.encode("Hello world") == [15496, 995]


def test_the_command_line_names_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = nanogpt(tmp_path / "out" / "ckpt.pt")
    Tokenizer.characters(CHARACTERS).save(tmp_path / "tokens")
    text, model = tmp_path / "text.txt", ["--model", str(path)]
    text.write_text("ROMEO, ROMEO")
    for command in (
        ["generate", "ROMEO", *model, "-n", "2"],
        ["profile", "ROMEO", *model, "-n", "2"],
        ["quantize", str(path), "--weights", "int8", "--out", str(tmp_path / "small"), "--text", str(text)],
    ):
        assert run([*command, "--device", "cpu"]) == 1
        assert "no tokenizer beside it" in capsys.readouterr().err
        assert run([*command, "--device", "cpu", "--tokenizer", str(tmp_path / "tokens")]) == 0, command
        capsys.readouterr()
    assert (tmp_path / "small" / "tokenizer.json").exists()
