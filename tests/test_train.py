"""Training: settings, data, schedules, optimizers, the loop against transformers, resuming, stopping."""

from __future__ import annotations

import dataclasses
import fcntl
import inspect
import io
import json
import math
import os
import pickle
import platform
import re
import resource
import shutil
import signal
import sys
import tomllib
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

import gptkern.cli
from gptkern.checkpoint.errors import CheckpointError
from gptkern.cli.train import train as train_command
from gptkern.config import GPTConfig
from gptkern.gpt import GPT
from gptkern.tokenizer import Tokenizer
from gptkern.train import (
    DivergedError,
    Lion,
    Settings,
    SettingsError,
    Trainer,
    make_optimizers,
    shipped,
    train,
)
from gptkern.train import checkpoints as checkpoints_module
from gptkern.train.assemble import assemble
from gptkern.train.data import Examples, Windows, load_classes, load_pairs, pair_ids, shuffled
from gptkern.train.evaluate import evaluate
from gptkern.train.lock import locked
from gptkern.train.logs import read_log
from gptkern.train.processes import Processes, processes
from gptkern.train.schedule import share
from gptkern.train.settings import DataSettings, EvalSettings, OptimizerSettings, ScheduleSettings
from gptkern.train.tokens import (
    char_tokenizer,
    check_ids,
    encode_all,
    load_split,
    pieces,
    read_jsonl,
    read_text,
)
from gptkern.train.trainer import dropout_seed

ALONE = Processes(0, 1, torch.device("cpu"))
TEXT = "To be, or not to be: that is the question.\n" * 60


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def tiny(path: Path, **tables: dict[str, Any]) -> Settings:
    """A run of a few seconds; ``tables`` change some keys."""
    base: dict[str, dict[str, Any]] = {
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.0},
        "data": {"path": str(path), "tokenizer": "char", "context": 16},
        "train": {"steps": 6, "batch_size": 4, "device": "cpu", "seed": 3},
        "optimizer": {"lr": 1e-2},
        "eval": {"every": 3},
        "checkpoint": {"every": 2},
        "log": {"every": 1},
    }
    for name, table in tables.items():
        base[name] = base.get(name, {}) | table
    return Settings.from_dict(base)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return GPT.from_pretrained(folder).state_dict()


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"optimiser": {}}, "optimiser is not a setting; did you mean 'optimizer'"),
        ({"train": {"step": 5}}, r"\[train\] step is not a setting; did you mean 'steps'"),
        ({"train": {"steps": 0}}, r"\[train\] steps is 0; 1 or more"),
        ({"train": {"steps": 2.5}}, r"\[train\] steps is 2.5; a whole number is needed"),
        ({"train": {"seed": -1}}, r"\[train\] seed is -1; 0 or more"),
        ({"train": {"seed": 1 << 64}}, r"\[train\] seed is 18446744073709551616; a number below 2\^64"),
        ({"train": {"device": "gpu"}}, r"device is 'gpu'; 'cuda', 'cuda:N', 'cpu' or '' is needed"),
        ({"train": {"device": "cuda:x"}}, "device is 'cuda:x'"),
        ({"train": {"z_loss": math.inf}}, r"\[train\] z_loss is inf; a finite number"),
        ({"optimizer": {"lr": math.inf}}, r"\[optimizer\] lr is inf; a finite number"),
        ({"optimizer": {"eps": math.nan}}, r"\[optimizer\] eps is nan"),
        ({"schedule": {"final": math.inf}}, r"\[schedule\] final is inf"),
        ({"lora": {"alpha": math.nan}}, r"\[lora\] alpha is nan; a finite number"),
        ({"lora": {"targets": []}}, r"\[lora\] targets is empty"),
        ({"model": {"from": 3}}, r"\[model\] from is 3; a folder or a hub id"),
        ({"model": {"from": ""}}, r"\[model\] from is ''"),
        ({"model": {"dropout": "much"}}, r"\[model\] dropout is 'much'; 0 <= dropout < 1"),
        ({"model": {"vocab_size": 0}}, r"\[model\] vocab_size is 0; a positive integer"),
        ({"train": {"batch_size": 10**30}}, r"batch_size is 10+; a number below 2\^53"),
        ({"data": {"context": 1 << 53}}, r"context is 9007199254740992; a number below 2\^53"),
        ({"train": {"steps": True}}, r"\[train\] steps is True"),
        ({"train": 3}, "a table"),
        ({"optimizer": {"name": "adamx"}}, "accepted are adamw"),
        ({"schedule": {"name": "cos"}}, "accepted are constant"),
        ({"data": {"path": 3}}, r"\[data\] path is 3; text, or a list of texts"),
        ({"data": {"val_fraction": 1.0}}, "val_fraction"),
        ({"model": {"layers": 2}}, r"\[model\] layers is not a setting"),
        ({"model": {"from": "x", "n_layer": 2}}, "remove n_layer"),
        ({"lora": {"rank": 4}}, r"\[model\] from is needed"),
    ],
)
def test_settings_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings.from_dict(data)


def test_a_text_in_place_of_a_configuration_is_refused_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("Once upon a time")
    with pytest.raises(SettingsError, match=r"no TOML: .*; a text to train on is given by --data"):
        Settings.from_file(tmp_path / "story.txt")


def test_a_text_too_short_to_hold_some_of_it_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("abcdefgh")
    data = DataSettings(path=[str(tmp_path / "story.txt")], tokenizer="bytes")
    with pytest.raises(SettingsError, match=r"has 8 tokens; the last 0.1 of it, 1, is held out.*--val-data"):
        load_split(data, None, tmp_path / "cache", writer=True)
    with pytest.raises(SettingsError, match=r'a new model needs .data. tokenizer = "char"'):
        load_split(DataSettings(path=data.path), None, tmp_path / "cache", writer=True)
    with pytest.raises(SettingsError, match=r"one\.txt has 1 tokens; 2 or more are needed"):
        (tmp_path / "one.txt").write_text("a")
        held_out = dataclasses.replace(data, val_path=[str(tmp_path / "one.txt")])
        load_split(held_out, None, tmp_path / "cache", writer=True)


def test_settings_read_back(tmp_path: Path) -> None:
    settings = tiny(tmp_path / "a", optimizer={"lr": 1})
    assert settings.optimizer.lr == 1.0
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_shipped_configurations_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(shipped.names()) >= 3
    for name in shipped.names():
        Settings.from_file(shipped.config_file(name))
        assert (Path(__file__).parent.parent / "configs" / f"{name}.toml").samefile(shipped.config_file(name))
        assert name in (train_command.__doc__ or "") + str(inspect.signature(train_command))
    with pytest.raises(SettingsError, match="mine: no such file; the configurations of gptkern: gpt2_124m"):
        shipped.config_file("mine")
    monkeypatch.chdir(tmp_path)
    Path("gpt2_124m").write_text("")
    assert shipped.config_file("gpt2_124m") == Path("gpt2_124m")


def test_the_reference_explains_every_key_and_is_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert gptkern.cli.run(["train", "--show-settings"]) == 0
    text = capsys.readouterr().out
    assert Settings.from_dict(tomllib.loads(text)) == Settings()
    assert max(map(len, text.splitlines())) <= 100
    for section, cls in get_type_hints(Settings).items():
        keys = dataclasses.fields(GPTConfig if section == "model" else cls)
        part = text.partition(f"\n[{section}]\n")[2].partition("\n[")[0]
        for key in keys:
            line = re.search(rf"^(# )?{key.name} = .*$", part, re.MULTILINE)
            assert line is not None, key.name
            paragraph = part[: line.start()].rpartition("\n\n")[2]
            assert paragraph.startswith("# "), f"[{section}] {key.name} is not explained"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "sample_prompt is empty"), ("a" * 16, "has 16 tokens; fewer than the context, 16"), ("é", "'é'")],
)
def test_a_sample_prompt_is_checked_at_the_start(
    prompt: str, message: str, text_file: Path, tmp_path: Path
) -> None:
    settings = tiny(text_file, eval={"samples": 1, "sample_prompt": prompt})
    with pytest.raises(SettingsError, match=message):
        train(settings, tmp_path / "run")


def test_settings_file_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[train\n")
    with pytest.raises(SettingsError, match=r"broken\.toml"):
        Settings.from_file(path)
    with pytest.raises(SettingsError, match=r"missing.toml"):
        Settings.from_file(tmp_path / "missing.toml")


def test_schedules() -> None:
    def rates(name: str, **more: Any) -> list[float]:
        return [share(ScheduleSettings(name=name, **more), step, 100) for step in range(100)]

    assert set(rates("constant")) == {1.0}
    cosine = rates("cosine", warmup=10, final=0.1)
    assert cosine[0] == pytest.approx(1 / 11)
    assert cosine[10] == 1.0
    assert cosine[55] == pytest.approx(0.55)
    assert cosine[99] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 89 / 90)))
    linear = rates("linear", final=0.0)
    assert linear[50] == pytest.approx(0.5)
    assert linear[99] == pytest.approx(0.01)
    wsd = rates("wsd", warmup=10, decay=20, final=0.0)
    assert wsd[10:81] == [1.0] * 71
    assert wsd[90] == pytest.approx(0.5)


def test_lion_follows_the_paper() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Lion([parameter], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    value, momentum = parameter.detach().double(), torch.zeros(2, dtype=torch.float64)
    for gradient in (torch.tensor([3.0, -1.0]), torch.tensor([-50.0, 0.2])):
        parameter.grad = gradient.clone()
        optimizer.step()
        direction = torch.sign(0.9 * momentum + 0.1 * gradient)
        value = value - 0.1 * (direction + 0.5 * value)
        momentum = 0.99 * momentum + 0.01 * gradient
        torch.testing.assert_close(parameter.double(), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion", "muon"])
def test_optimizers_learn_and_decay_matrices_alone(name: str, text_file: Path, tmp_path: Path) -> None:
    rate = {"sgd": 0.1, "lion": 1e-3}.get(name, 1e-2)
    settings = tiny(
        text_file, optimizer={"name": name, "lr": rate}, train={"steps": 30}, checkpoint={"every": 0}
    )
    result = train(settings, tmp_path / "run")
    assert result.metrics["val_loss"] < 2.8  # the uniform guess over 19 characters: 2.94
    model = GPT(GPTConfig(vocab_size=11, n_positions=4, n_layer=1, n_head=1, n_embd=4))
    for optimizer in make_optimizers(model, OptimizerSettings(name=name)):
        for group in optimizer.param_groups:
            assert all((p.dim() == 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_char_tokenizer_is_nanogpts() -> None:
    tokenizer = char_tokenizer("hello\nwörld")
    assert tokenizer.encode("hello") == [sorted(set("hello\nwörld")).index(c) for c in "hello"]
    assert tokenizer.decode(tokenizer.encode("wörld\nhello")) == "wörld\nhello"


def test_pieces_tokenise_as_the_whole(shared_data: Path) -> None:
    text = (shared_data / "tinyshakespeare.txt").read_text()[:200_000] + "\n\n  odd \n\t spaces\n \n\nx\n y"
    tokenizer = Tokenizer.from_pretrained(shared_data / "gpt2-tokenizer")
    parts = pieces(text, 1000)
    assert len(parts) > 50
    assert "".join(parts) == text
    assert [i for ids in encode_all(tokenizer, parts, 1) for i in ids] == tokenizer.encode(text)


@pytest.mark.slow
def test_parallel_tokenising_equals_serial(shared_data: Path) -> None:
    text = (shared_data / "tinyshakespeare.txt").read_text() * 3
    tokenizer = Tokenizer.from_pretrained(shared_data / "gpt2-tokenizer")
    parts = pieces(text)
    assert list(encode_all(tokenizer, parts, 2)) == [tokenizer.encode(part) for part in parts]


def test_text_split_is_nanogpts(shared_data: Path, tmp_path: Path) -> None:
    settings = DataSettings(path=[str(shared_data / "tinyshakespeare.txt")], tokenizer="char")
    split = load_split(settings, None, tmp_path, writer=True)
    assert (len(split.train[0]), len(split.val[0])) == (1003854, 111540)
    assert split.train[0].dtype == np.uint16
    assert split.tokenizer is not None
    assert split.tokenizer.vocab_size == 65
    stamp = (tmp_path / "train.bin").stat().st_mtime_ns
    load_split(settings, None, tmp_path, writer=True)
    assert (tmp_path / "train.bin").stat().st_mtime_ns == stamp  # not tokenised again


def test_bin_shards(tmp_path: Path) -> None:
    """nanoGPT's bare uint16 ids, and llm.c's with a header."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, 40
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "train_0.bin")
    (tmp_path / "train_1.bin").write_bytes(header.tobytes() + np.arange(40, dtype=np.uint16).tobytes())
    np.arange(30, dtype=np.uint16).tofile(tmp_path / "val.bin")
    split = load_split(DataSettings(kind="bin", path=[str(tmp_path)]), None, tmp_path / "c", writer=True)
    assert [len(shard) for shard in split.train] == [50, 40]
    assert split.train[1][:3].tolist() == [0, 1, 2]
    with pytest.raises(SettingsError, match="tokenizer is 'char', which is made of a text"):
        load_split(
            DataSettings(kind="bin", path=[str(tmp_path)], tokenizer="char"), None, tmp_path, writer=True
        )
    with pytest.raises(SettingsError, match="no token shards"):
        load_split(DataSettings(kind="bin", path=[str(tmp_path.parent)]), None, tmp_path, writer=True)


def test_bin_shards_are_as_wide_as_the_vocabulary(tmp_path: Path) -> None:
    """Bare ids of a vocabulary beyond 65,536 take 32 bits without a tokenizer; llm.c says it in a header."""
    ids = np.array([70_001, 5, 3, 100_000] * 20, dtype=np.uint32)
    ids.tofile(tmp_path / "train_0.bin")
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240801, 7, len(ids)
    (tmp_path / "train_1.bin").write_bytes(header.tobytes() + ids.tobytes())
    ids.tofile(tmp_path / "val.bin")
    settings = DataSettings(kind="bin", path=[str(tmp_path)])
    split = load_split(settings, None, tmp_path / "c", writer=True, vocab_size=100_001)
    assert [shard.tolist() for shard in split.train + split.val] == [ids.tolist()] * 3
    check_ids(split.train, 100_001)
    run = tiny(tmp_path, model={"vocab_size": 100_001}, data={"kind": "bin", "tokenizer": ""})
    assert set(Trainer(run, tmp_path, ALONE).source.training_batch(0, 4).ids.unique().tolist()) <= set(ids)
    with pytest.raises(SettingsError, match=r"train_0\.bin: every second number is 0.*uint16 is needed"):
        np.arange(50, dtype=np.uint32).tofile(tmp_path / "train_0.bin")
        load_split(settings, None, tmp_path / "c", writer=True, vocab_size=50_257)
    ids.tofile(tmp_path / "train_0.bin")
    # llm.c's other shard beside a narrow vocabulary: its header is what counts
    split = load_split(settings, None, tmp_path / "c", writer=True, vocab_size=50_257)
    assert split.train[1].tolist() == ids.tolist()
    header[2] = len(ids) + 1
    (tmp_path / "train_1.bin").write_bytes(header.tobytes() + ids.tobytes())
    with pytest.raises(SettingsError, match=r"train_1\.bin: its header says 81 tokens, it holds 80"):
        load_split(settings, None, tmp_path / "c", writer=True, vocab_size=100_001)


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_ids_beyond_the_vocabulary_are_named(name: str, tmp_path: Path) -> None:
    for file in ("train.bin", "val.bin"):
        ids = np.arange(80, dtype=np.uint16) % 11
        ids[7] = 11 if file == name else 0
        ids.tofile(tmp_path / file)
    settings = tiny(tmp_path, model={"vocab_size": 11}, data={"kind": "bin", "tokenizer": ""})
    with pytest.raises(SettingsError, match=rf"{name}: token 7 is 11, beyond the model's vocabulary of 11"):
        train(settings, tmp_path / "run")
    larger = settings.model | {"vocab_size": 12}
    assert train(dataclasses.replace(settings, model=larger), tmp_path / "run").finished


def test_jsonl_documents_end_in_end_of_text(shared_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": f"Document {i}."}) + "\n" for i in range(10)))
    settings = DataSettings(
        kind="jsonl", path=[str(path)], tokenizer=str(shared_data / "gpt2-tokenizer"), val_fraction=0.2
    )
    split = load_split(settings, None, tmp_path / "tokens", writer=True)
    assert (split.train[0] == 50256).sum() == 8
    assert split.train[0][-1] == 50256
    path.write_text('{"txt": 1}\n')
    with pytest.raises(SettingsError, match=r"docs\.jsonl:1: no 'text'"):
        load_split(settings, None, tmp_path / "tokens", writer=True)


def read_documents(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return [row["text"] for row in read_jsonl([str(path)], ["text"], "path")]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\ufeff"])
def test_jsonl_lines_end_at_line_breaks_alone(mark: str, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"a{mark}b"}, ensure_ascii=False), '{"text": "last"}']
    found = read_documents(tmp_path / "a.jsonl", "\r\n".join(lines).encode("utf-8-sig"))
    assert found == [f"a{mark}b", "last"]


def test_jsonl_files_are_read_one_by_one(tmp_path: Path) -> None:
    """The last line of a file needs no line break, each file may have its byte order mark."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(f'{{"text": "{name}"}}'.encode("utf-8-sig"))
    rows = read_jsonl([str(tmp_path / "a"), str(tmp_path / "b")], ["text"], "path")
    assert [row["text"] for row in rows] == ["a", "b"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("null", "'text' is null; a string is needed"),
        ('["a", "b"]', "'text' is a list; a string is needed"),
        ('{"a": 1}', "'text' is an object; a string is needed"),
        ("3", "'text' is a number; a string is needed"),
        ("false", "'text' is true or false; a string is needed"),
        ('"a\\ud800b"', r"'text' holds \\ud800, half of a surrogate pair"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),
    ],
)
def test_jsonl_fields_are_named(value: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=rf"a\.jsonl:3: {message}"):
        read_documents(tmp_path / "a.jsonl", f'{{"text": "x"}}\n\n{{"text": {value}}}\n'.encode())


def test_jsonl_labels(tmp_path: Path) -> None:
    """Words, numbers and truth values; nothing else."""
    path = tmp_path / "a.jsonl"
    rows = [{"text": "x", "label": label} for label in ("good", 1, 0.5, True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DataSettings(kind="classes", path=[str(path)])
    assert load_classes(settings, Tokenizer.bytes(), 0)[1] == ["0.5", "1", "True", "good"]
    path.write_text('{"text": "x", "label": null}\n')
    with pytest.raises(SettingsError, match=r"a\.jsonl:1: 'label' is null; a string or a number is needed"):
        load_classes(settings, Tokenizer.bytes(), 0)


def test_text_files(tmp_path: Path) -> None:
    """A byte order mark is no text; what is not UTF-8 is named with its place."""
    for name, content in (("a", b"\xef\xbb\xbfone\r\ntwo\r"), ("b", b"\xef\xbb\xbfthree"), ("c", b"ab\xffc")):
        (tmp_path / name).write_bytes(content)
    assert read_text([str(tmp_path / "a"), str(tmp_path / "b")], "path") == "one\ntwo\nthree"
    with pytest.raises(SettingsError, match=r"\[data\] path: .*/c: not UTF-8: byte 0xff at offset 2$"):
        read_text([str(tmp_path / "c")], "path")


def test_char_tokenizer_knows_escaped_characters(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "caf\\u00e9?", "answer": "\\u65e5"}\n' * 10)
    settings = tiny(path, data={"kind": "pairs"})
    tokenizer = Trainer(settings, tmp_path / "run", ALONE).objective.model.tokenizer
    assert tokenizer.decode(tokenizer.encode("café? 日")) == "café? 日"


def test_characters_that_the_tokenizer_lacks_are_told_at_the_start(text_file: Path, tmp_path: Path) -> None:
    """A text for a model of other characters, and a prompt for samples: neither loses any in silence."""
    samples = {"eval": {"samples": 1, "sample_prompt": "é"}}
    with pytest.raises(
        SettingsError, match=r"\[eval\] sample_prompt: .* holds 'é', for which the vocabulary"
    ):
        assemble(tiny(text_file, **samples), tmp_path / "run", ALONE)
    model = GPT(GPTConfig(vocab_size=3, n_positions=16, n_layer=1, n_head=1, n_embd=8))
    model.tokenizer = char_tokenizer("abc")
    model.save_pretrained(tmp_path / "model")
    other = tiny(text_file, data={"tokenizer": ""})
    other = dataclasses.replace(other, model={"from": str(tmp_path / "model")})
    with pytest.raises(ValueError, match=r"the text holds '\\n', ' ', ',', '.', ':', 'T', 'e', 'h' and"):
        assemble(other, tmp_path / "run", ALONE)


@pytest.mark.parametrize("seed", [2**24, 2**32, 2**63 - 1, 2**64 - 1])
def test_every_64_bit_seed_works(seed: int, text_file: Path, tmp_path: Path) -> None:
    settings = tiny(text_file, train={"seed": seed, "steps": 2}, model={"dropout": 0.5})
    train(settings, tmp_path / "a")
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))).train.seed == seed
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "1", "answer": "2"}\n' * 20)
    train(tiny(pairs, data={"kind": "pairs"}, train={"seed": seed, "steps": 1}), tmp_path / "pairs")


def test_dropout_seeds() -> None:
    """Below 2**24 what they have always been; beyond, another for every seed, step and process."""
    assert dropout_seed(1337, 500, 3) == (1337 << 40) + (500 << 12) + 3
    assert dropout_seed(2**24 - 1, 7, 0) == ((2**24 - 1) << 40) + (7 << 12)
    seeds = [0, 1, 2**24, 2**24 + 1, 2**25, 2**32, 2**48, 2**63 - 1, 2**63, 2**64 - 1]
    drawn = [dropout_seed(seed, step, rank) for seed in seeds for step in (0, 1, 99) for rank in (0, 1)]
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= value < 2**64 for value in drawn)


def test_windows() -> None:
    source = Windows([np.arange(20), np.arange(100, 115)], [np.arange(30)], 8, 0)
    starts = set()
    for step in range(80):
        batch = source.training_batch(step, 4)
        assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
        assert all(row[-1] - row[0] == 7 for row in batch.ids)
        starts |= {int(row[0]) for row in batch.ids}
    assert starts == set(range(12)) | set(range(100, 107))
    wide = Windows([np.arange(1000)], [np.arange(30)], 10, 0)
    for epoch in range(3):
        batches = [wide.training_batch(step, 9) for step in range(11 * epoch, 11 * epoch + 11)]
        seen = torch.cat([batch.targets.flatten() for batch in batches])
        assert len(seen.unique()) == len(seen) == 990
    assert wide.training_batch(5, 4).rows == wide.training_batch(5, 4).rows
    assert wide.training_batch(5, 4).rows != wide.training_batch(6, 4).rows
    targets = [t for batch in source.held_out(0, 2) for t in batch.targets.flatten().tolist()]
    assert targets == list(range(1, 30))
    assert sum(batch.counted for batch in source.held_out(13, 2)) == 13
    with pytest.raises(SettingsError, match="context is 40"):
        Windows([np.arange(20)], [np.arange(30)], 40, 0)


def test_pairs_count_the_answer_alone() -> None:
    tokenizer = Tokenizer.bytes()
    settings = DataSettings(context=64)
    ids, targets = pair_ids(tokenizer, "2+2", "4", settings)
    assert bytes(ids) == b"2+2\n4"
    assert targets == [-100] * 3 + [ord("4"), ord("\n")]
    ids, targets = pair_ids(tokenizer, "x" * 100, "answer", DataSettings(context=16))
    assert len(ids) == len(targets) == 16
    assert bytes(t for t in targets if t >= 0) == b"answer\n"


def test_examples_visit_every_row_each_epoch() -> None:
    source = Examples([([i], [i]) for i in range(10)], [], 0)
    epochs = [[i for s in range(5 * e, 5 * e + 5) for i in source.training_batch(s, 2).rows] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("count", [1, 2, 5, 64, 1000])
def test_shuffled_is_a_permutation(count: int) -> None:
    orders = [shuffled(np.arange(count), count, 7, epoch) for epoch in range(4)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(count))
    if count == 1000:
        assert len({tuple(order.tolist()) for order in orders}) == 4
        for order in orders:
            # near no correlation with the order it began in
            assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.15


def test_equals_transformers_with_adamw(text_file: Path, tmp_path: Path) -> None:
    """The same batches through transformers' GPT-2 and PyTorch's AdamW: the same losses over 50 steps."""
    transformers = pytest.importorskip("transformers")
    settings = tiny(
        text_file,
        model={"n_embd": 32},
        train={"steps": 50, "grad_clip": 1.0},
        optimizer={"lr": 3e-3, "weight_decay": 0.1},
        schedule={"name": "constant"},
    )
    trainer = Trainer(settings, tmp_path, ALONE)
    ours = trainer.objective.model
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**{k: v for k, v in ours.config.to_dict().items() if k != "architectures"})
    ).train()
    ours.save_pretrained(tmp_path / "start")
    theirs.load_state_dict(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "start").state_dict())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in theirs.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    for step in range(50):
        batch = trainer.source.training_batch(step, 4)
        loss = torch.nn.functional.cross_entropy(
            theirs(batch.ids).logits.flatten(0, 1), batch.targets.flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        found = float(trainer.step(step, batch).values[0])
        assert abs(found - loss.item()) < 1e-4, f"step {step}"
    assert loss.item() < 2.0


def test_plain_loop() -> None:
    model = GPT(GPTConfig(vocab_size=20, n_positions=16, n_layer=1, n_head=2, n_embd=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(16).repeat(4, 1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("change", [{"micro_batch_size": 1}, {"gradient_checkpointing": True}])
def test_accumulation_and_checkpointing_change_nothing(
    change: dict[str, Any], text_file: Path, tmp_path: Path
) -> None:
    first, second = (Trainer(tiny(text_file, train=more), tmp_path, ALONE) for more in ({}, change))
    for step in range(4):
        batch = first.source.training_batch(step, 4)
        one, other = first.step(step, batch).values, second.step(step, batch).values
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiled_equals_eager(text_file: Path, tmp_path: Path) -> None:
    eager, compiled = (Trainer(tiny(text_file, train={"compile": c}), tmp_path, ALONE) for c in (False, True))
    for step in range(3):
        batch = eager.source.training_batch(step, 4)
        one, other = eager.step(step, batch).values, compiled.step(step, batch).values
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_master_weights(text_file: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny(text_file, train={"precision": "bfloat16"}), tmp_path, ALONE)
    losses = [
        float(trainer.step(step, trainer.source.training_batch(step, 4)).values[0]) for step in range(15)
    ]
    assert losses[-1] < losses[0]
    assert {p.dtype for p in trainer.objective.parameters()} == {torch.float32}


def test_evaluation(text_file: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny(text_file), tmp_path, ALONE)
    found = evaluate(trainer.objective, trainer.source, EvalSettings(batch_size=3), "float32", ALONE)
    again = evaluate(trainer.objective, trainer.source, EvalSettings(batch_size=50), "float32", ALONE)
    assert found["val_loss"] == pytest.approx(again["val_loss"], rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["val_loss"]))
    # one byte a character here
    assert found["bits_per_byte"] == pytest.approx(found["val_loss"] / math.log(2))


def test_a_run_and_its_folder(text_file: Path, tmp_path: Path) -> None:
    settings = tiny(text_file, eval={"samples": 1, "sample_tokens": 5}, log={"tensorboard": True})
    result = train(settings, tmp_path / "run")
    assert result.finished
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    rows = read_log(tmp_path / "run" / "log.jsonl")
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000006"]
    assert_same_weights(tmp_path / "run" / "model", tmp_path / "run" / "checkpoints" / names[-1])
    model = GPT.from_pretrained(tmp_path / "run" / "best")
    assert model.tokenizer is not None
    with pytest.raises(SettingsError, match="holds a run, step-00000006: --resume"):
        train(tiny(text_file), tmp_path / "run")
    assert train(tiny(text_file), tmp_path / "run", resume=True).step == 6


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon"])
def test_resumed_equals_unbroken(name: str, text_file: Path, tmp_path: Path) -> None:
    """Interrupted after step 3 and gone on with: the same weights and the same log, to the last bit."""
    settings = tiny(text_file, optimizer={"name": name, "lr": 1e-3}, model={"dropout": 0.1})
    train(settings, tmp_path / "whole")

    def interrupt(trainer: Trainer) -> None:
        step = trainer.step

        def counted(number: int, *rest: Any) -> Any:
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(number, *rest)

        trainer.step = counted  # type: ignore[method-assign]

    stopped = train(settings, tmp_path / "broken", started=interrupt)
    assert (stopped.finished, stopped.step) in [(False, 3), (False, 4)]
    assert train(settings, tmp_path / "broken", resume=True).finished
    assert_same_weights(tmp_path / "whole" / "model", tmp_path / "broken" / "model")
    logs = [read_log(tmp_path / folder / "log.jsonl") for folder in ("whole", "broken")]
    for row in logs[0] + logs[1]:
        row.pop("tokens_per_s", None)
    assert logs[0] == logs[1]


def test_another_model_is_not_resumed(text_file: Path, tmp_path: Path) -> None:
    train(tiny(text_file, train={"steps": 2}), tmp_path / "run")
    with pytest.raises(SettingsError, match=r"n_embd is 32.*began with 16"):
        train(tiny(text_file, model={"n_embd": 32}), tmp_path / "run", resume=True)


def test_another_text_is_not_resumed(text_file: Path, tmp_path: Path) -> None:
    """Characters are the vocabulary: of another number, or others of that number."""
    train(tiny(text_file, train={"steps": 2}), tmp_path / "run")
    before = weights(tmp_path / "run" / "model")
    for text, message in (
        (TEXT + "%", r"vocab_size is 19 .*began with 18: --resume"),
        (TEXT.replace("q", "%"), r"token \d+ is '.*began with '"),
    ):
        text_file.write_text(text)
        with pytest.raises(SettingsError, match=message):
            train(tiny(text_file), tmp_path / "run", resume=True)
    assert all(
        torch.equal(before[name], value) for name, value in weights(tmp_path / "run" / "model").items()
    )
    text_file.write_text(TEXT * 2)
    assert train(tiny(text_file), tmp_path / "run", resume=True).finished


def test_other_labels_are_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"

    def run(*labels: str, **more: Any) -> Any:
        path.write_text("".join(json.dumps({"text": "x", "label": w}) + "\n" for w in labels * 9))
        settings = tiny(path, data={"kind": "classes", "tokenizer": "bytes"}, train={"steps": 2})
        return train(settings, tmp_path / "run", **more)

    run("good", "bad")
    with pytest.raises(SettingsError, match=r"labels are \['fine', 'good'\].*began with \['bad', 'good'\]"):
        run("good", "fine", resume=True)
    with pytest.raises(SettingsError, match="labels are"):
        run("good", "bad", "odd", resume=True)


def test_shapes_beyond_memory_are_refused(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"\[model\] of this shape cannot be made"):
        train(tiny(text_file, model={"n_embd": (1 << 31) - 2, "vocab_size": (1 << 31) - 1}), tmp_path / "run")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1"):
        with pytest.raises(SettingsError, match="PyTorch finds no GPU"), processes(name):
            pass
    with processes("") as group:
        assert group.device == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with processes("cuda:1") as group:
        assert group.device == torch.device("cuda:1")
    with pytest.raises(SettingsError, match="cuda:2 is wanted, PyTorch finds 2"), processes("cuda:2"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SettingsError, match="3 processes take a GPU each"), processes("cuda:1"):
        pass
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SettingsError, match="cuda:2 is wanted, PyTorch finds 2"), processes("cuda"):
        pass


def test_one_trainer_a_folder(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        who = f"process {os.getpid()} on '{platform.node()}', since '20"
        with pytest.raises(SettingsError, match=rf"run: {who}.* trains into this folder"):
            train(tiny(text_file), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    # of one that was killed while it held the lock, the file alone is left
    (tmp_path / "run" / ".lock").write_text('{"pid": 1, "host": "elsewhere", "since": "yesterday"}')
    assert train(tiny(text_file, train={"steps": 1}), tmp_path / "run").finished


def test_the_lock_is_no_way_to_other_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "file")
    with pytest.raises(OSError, match=r"\.lock"), locked(tmp_path):
        pass
    assert (tmp_path / "file").read_text() == "precious"


def test_divergence_names_step_rows_and_checkpoint(text_file: Path, tmp_path: Path) -> None:
    def poison(trainer: Trainer) -> None:
        step = trainer.step

        def poisoned(number: int, *rest: Any) -> Any:
            if number == 4:
                with torch.no_grad():
                    trainer.trained[0][0] = float("nan")
            return step(number, *rest)

        trainer.step = poisoned  # type: ignore[method-assign]

    with pytest.raises(DivergedError, match=r"step 5: the loss is nan.*rows \[\d+, .*step-00000004"):
        train(tiny(text_file), tmp_path / "run", started=poison)
    assert all(value.isfinite().all() for value in weights(tmp_path / "run" / "model").values())


def test_paths_that_are_no_files_are_named(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"\[data\] path: /nowhere: No such file or directory$"):
        train(tiny(Path("/nowhere")), tmp_path / "run")
    with pytest.raises(SettingsError, match=r"text\.txt is a file; the run needs a folder"):
        train(tiny(text_file), text_file)


def test_a_run_without_a_terminal_writes_lines(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny(text_file, train={"steps": 40}, log={"every": 1}, eval={"every": 0})
    train(settings, tmp_path / "run", shown=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in lines[:-1]] == [f"step {n} of 40" for n in range(2, 41, 2)]
    assert "tokens/s" in lines[0] and lines[-1].startswith("step 40: val_loss")


def test_a_learning_rate_is_found_without_matplotlib(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        '[model]\nn_layer = 1\nn_head = 1\nn_embd = 16\n[data]\ntokenizer = "char"\ncontext = 8\n'
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["train", str(config), "--data", str(text_file), "--out", str(tmp_path / "out"), "--find-lr"]
    assert gptkern.cli.run([*arguments, "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("recommended: [optimizer] lr = ")
    assert "needs matplotlib: pip install 'gptkern[train]'" in told


def test_unwritable_folder_is_said_at_the_start(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cannot be written"):
        train(tiny(text_file), tmp_path / "file" / "run")


def test_too_small_a_disk_is_said_at_the_start(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoints_module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(SettingsError, match=r"are free; the run's checkpoints need"):
        train(tiny(text_file), tmp_path / "run")


def test_full_disk_leaves_the_old_checkpoint(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoints_module.write_state
    calls = []

    def full(folder: Path, *rest: Any) -> None:
        calls.append(folder)
        if len(calls) == 2:
            (folder / "half").write_text("x")
            raise OSError(28, "No space left on device")
        write(folder, *rest)

    monkeypatch.setattr(checkpoints_module, "write_state", full)
    with pytest.raises(OSError, match=r"No space left on device; the last checkpoint, .*02, is whole"):
        train(tiny(text_file), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert train(tiny(text_file), tmp_path / "run", resume=True).finished


def test_files_that_cannot_grow_leave_no_remains(text_file: Path, tmp_path: Path) -> None:
    """As a full disk: the system refuses the state's file, and the message names it."""
    settings = tiny(text_file, eval={"every": 0})
    train(settings.replace("train", steps=2), tmp_path / "run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"file sizes.*step-00000002, is whole: '.*/checkpoints/writing-"):
            train(
                settings,
                tmp_path / "run",
                resume=True,
                started=lambda trainer: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1])),
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert train(settings, tmp_path / "run", resume=True).finished


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state/rank-00000.safetensors", "flipped"),
        ("run.json", "cut"),
        ("contents.json", "gone"),
        ("config.json", "gone"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    file: str, damage: str, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny(text_file)
    train(settings.replace("train", steps=4), tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"

    def harm(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content[:-1] if damage == "cut" else content)
        if damage == "gone":
            path.unlink()

    harm(newest / file)
    assert train(settings, tmp_path / "run", resume=True, shown=True).finished
    told = capsys.readouterr().err
    assert "a checkpoint is passed over, and put aside" in told
    assert "steps 3 to 6" in told
    names = sorted(path.name for path in newest.parent.iterdir())
    assert names == ["damaged-step-00000004", "step-00000004", "step-00000006"]
    for folder in newest.parent.glob("step-*"):
        harm(folder / file)
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*step-00000006.*; .*step-00000004"):
        train(settings, tmp_path / "run", resume=True)


def test_tokenising_leaves_the_staging_folders_of_others(text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokens" / ".gptkern-staging-other"
    other.mkdir(parents=True)
    held = os.open(other, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    settings = DataSettings(path=[str(text_file)], tokenizer="char")
    assert len(load_split(settings, None, tmp_path / "tokens", writer=True).train[0])
    assert other.is_dir()
    os.close(held)


class Marker:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_resuming_runs_no_code_of_the_folder(text_file: Path, tmp_path: Path) -> None:
    """A pickle in place of each file of a run, and beside them: it stays shut, and the error names it."""
    settings = tiny(text_file, train={"steps": 2}, checkpoint={"every": 0})
    train(settings, tmp_path / "run")
    files = [path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*") if path.is_file()]
    checkpoint = Path("checkpoints") / "step-00000002"
    # torch.distributed.checkpoint's names: its own reader would run them
    files[:0] = [checkpoint / "state" / name for name in (".metadata", "__0_0.distcp")]
    for place in (pickle.dumps, torch_bytes):
        for number, file in enumerate(files):
            folder, marker = tmp_path / f"{place.__name__}{number}", tmp_path / "ran"
            shutil.copytree(tmp_path / "run", folder)
            (folder / file).write_bytes(place(Marker(marker)))
            error = ""
            try:
                train(settings, folder, resume=True)
            except (SettingsError, CheckpointError) as raised:
                error = str(raised)
            assert not marker.exists(), file
            # Tokens are made anew and the newest model is written anew: the rest is read.
            if file.is_relative_to(checkpoint) and file not in files[:2]:
                assert file.name in error
    assert checkpoint / "state" / "rank-00000.safetensors" in files


def torch_bytes(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_load_pairs_reads_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(i), "answer": "yes"}) + "\n" for i in range(10)))
    source = load_pairs(DataSettings(kind="pairs", path=[str(path)]), Tokenizer.bytes(), 0)
    batch = source.training_batch(0, 3)
    assert batch.counted == 3 * 4
    assert len(list(source.held_out(0, 8))) == 1


@pytest.mark.parametrize("name", ["model", "best", "tokens", "checkpoints"])
def test_a_runs_folders_lead_nowhere_else(name: str, text_file: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "mine"
    elsewhere.mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(elsewhere)
    with pytest.raises(OSError, match="nothing is written through it"):
        train(tiny(text_file), run)
    assert not list(elsewhere.iterdir())
