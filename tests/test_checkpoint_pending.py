"""Opening a folder changes nothing in it, whatever a save, or somebody else, left behind there."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptkern import GPTConfig
from gptkern import gpt as model_module
from gptkern.checkpoint import CheckpointError
from gptkern.checkpoint.pending import check_settled
from gptkern.cli.info import describe
from gptkern.gpt import GPT
from gptkern.tokenizer import Tokenizer

TINY = GPTConfig(vocab_size=256, n_positions=16, n_layer=2, n_head=2, n_embd=16, eos_token_id=None)
PENDING, MANIFEST = ".gptkern-pending", ".manifest.json"
READERS: list[Callable[[Path], object]] = [
    GPT.from_pretrained,
    lambda folder: describe(str(folder)),
    Tokenizer.find,
    Tokenizer.from_pretrained,
]


def build(seed: int, **changes: object) -> GPT:
    torch.manual_seed(seed)
    model = GPT(TINY.replace(**changes)).eval()
    model.tokenizer = Tokenizer.bytes()
    return model


def same(a: GPT, b: GPT) -> bool:
    tensors = dict(b.named_parameters())
    return a.config == b.config and all(torch.equal(p, tensors[name]) for name, p in a.named_parameters())


def tree(root: Path) -> dict[str, object]:
    """Everything below a folder, links as links."""
    return {
        str(path.relative_to(root)): os.readlink(path)
        if path.is_symlink()
        else (path.is_file() and path.read_bytes(), path.lstat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
    }


def entry(text: bytes) -> list[int]:
    return [len(text), zlib.crc32(text)]


def names_a_file(name: str) -> Callable[[Path], None]:
    """A manifest of which everything is right but the name."""

    def make(folder: Path) -> None:
        (folder / PENDING).mkdir()
        files = {name.format(tmp=folder.parent): {"new": None, "old": entry(b"mine")}}
        (folder / PENDING / MANIFEST).write_text(json.dumps({"format": 1, "files": files}))

    return make


def has_manifest(text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / PENDING).mkdir()
        (folder / PENDING / "config.json").write_text("{}")
        (folder / PENDING / MANIFEST).write_text(text.replace("TMP", str(folder.parent)))

    return make


def links_to_a_folder(folder: Path) -> None:
    (folder / PENDING).symlink_to(folder.parent / "victims")


def links_to_a_file(folder: Path) -> None:
    (folder / PENDING).mkdir()
    (folder / PENDING / "vocab.json").symlink_to(folder.parent / "victims" / "thesis.json")
    files = {"vocab.json": {"new": entry(b"mine"), "old": None}}
    (folder / PENDING / MANIFEST).write_text(json.dumps({"format": 1, "files": files}))


def links_to_a_manifest(folder: Path) -> None:
    names_a_file("config.json")(folder)
    os.rename(folder / PENDING / MANIFEST, folder.parent / "manifest")
    (folder / PENDING / MANIFEST).symlink_to(folder.parent / "manifest")


def as_in_the_hubs_cache(folder: Path) -> None:
    """Every file a link to a blob, as ``hf download`` lays out a snapshot."""
    names_a_file("{tmp}/victims/thesis.json")(folder)
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        os.rename(path, blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))


def is_a_file(folder: Path) -> None:
    (folder / PENDING).write_text("x")


def holds_a_folder(folder: Path) -> None:
    has_manifest('{"format": 1, "files": {}}')(folder)
    (folder / PENDING / "config.json").unlink()
    (folder / PENDING / "config.json").mkdir()


HOSTILE = {
    "old list, absolute": has_manifest('["TMP/victims/thesis.json"]'),
    "old list, parent": has_manifest('["../victims/thesis.json"]'),
    "absolute": names_a_file("{tmp}/victims/thesis.json"),
    "parent": names_a_file("../victims/thesis.json"),
    "in a folder": names_a_file("notes/thesis.json"),
    "another kind": names_a_file("thesis.tex"),
    "hidden": names_a_file(".thesis.json"),
    "no name": names_a_file(""),
    "zero byte": names_a_file("a\0.json"),
    "lone surrogate": names_a_file("\ud800.json"),
    "too long": names_a_file("x" * 300 + ".json"),
    "escape sequence": names_a_file("\x1b[2J.json"),
    "link to a folder": links_to_a_folder,
    "link to a file": links_to_a_file,
    "link to a manifest": links_to_a_manifest,
    "hub snapshot": as_in_the_hubs_cache,
    "a file": is_a_file,
    "a folder in it": holds_a_folder,
    "no manifest": lambda folder: (has_manifest("")(folder), (folder / PENDING / MANIFEST).unlink()),
    "broken": has_manifest('{"format": 1, "files": {'),
    "a number": has_manifest("3"),
    "numbers": has_manifest("[1, 2]"),
    "deep": has_manifest("[" * 100_000),
    "files a number": has_manifest('{"format": 1, "files": 5}'),
    "entry a number": has_manifest('{"format": 1, "files": {"config.json": 5}}'),
    "sizes text": has_manifest('{"format": 1, "files": {"config.json": {"new": ["2", "x"], "old": null}}}'),
    "other contents": has_manifest('{"format": 1, "files": {"config.json": {"new": [2, 1], "old": null}}}'),
    "not described": has_manifest('{"format": 1, "files": {}}'),
    "another format": has_manifest('{"format": 2, "files": {}}'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pending_folder_that_no_save_wrote(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build(0).save_pretrained(folder)
    (folder / "notes").mkdir()
    for place in (tmp_path / "victims", folder / "notes"):
        place.mkdir(exist_ok=True)
        (place / "thesis.json").write_text("mine")
    (folder / "thesis.tex").write_text("mine")
    (folder / ".thesis.json").write_text("mine")
    HOSTILE[name](folder)
    before = tree(tmp_path)
    for reader in READERS:
        with pytest.raises(CheckpointError, match=r"\.gptkern-pending: not what a save of gptkern leaves"):
            reader(folder)
        assert tree(tmp_path) == before
    new = build(1)
    new.tokenizer = None
    with pytest.warns(UserWarning, match=r"is kept as .*/\.gptkern-aside-"):
        new.save_pretrained(folder)
    assert same(GPT.from_pretrained(folder), new)
    after = tree(tmp_path)
    for path in before:
        kept = path.replace(PENDING, next(folder.glob(".gptkern-aside-*")).name)
        assert kept in after
        if "thesis" in path:
            assert after[kept] == before[path]


def test_reading_needs_no_permission_to_write(tmp_path: Path) -> None:
    """An empty pending folder is the last moment of a save: all is in its place."""
    model = build(0)
    model.save_pretrained(tmp_path)
    (tmp_path / PENDING).mkdir()
    before = tree(tmp_path)
    assert same(GPT.from_pretrained(tmp_path), model)
    assert tree(tmp_path) == before


def cut_off(monkeypatch: pytest.MonkeyPatch, model: GPT, folder: Path, moves: int) -> None:
    """Save, and stop after the save's rename and so many moves and removals."""
    replace, unlink, left = os.replace, Path.unlink, moves

    def count(path: Path) -> None:
        nonlocal left
        if path.parent not in (folder, folder / PENDING):
            return
        if left == 0:
            raise KeyboardInterrupt
        left -= 1

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target: (count(target), replace(source, target)))
        patch.setattr(Path, "unlink", lambda path, **options: (count(path), unlink(path, **options)))
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(folder)
    assert (folder / PENDING / MANIFEST).exists()


@pytest.mark.parametrize("moves", [0, 1, 3, 6, 9])
def test_a_save_that_was_cut_off_is_read_through(
    moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, copy = tmp_path / "model", tmp_path / "copy"
    # shards go, and the new config needs the new weights
    build(0).save_pretrained(folder, max_shard_size="8KB")
    new = build(1, n_embd=24, n_layer=1)
    cut_off(monkeypatch, new, folder, moves)
    before = tree(folder)
    assert same(GPT.from_pretrained(folder), new)
    assert describe(str(folder))["config"]["n_embd"] == 24
    found = Tokenizer.find(folder)
    assert found is not None
    assert found.encode("ab") == [97, 98]
    assert tree(folder) == before
    # transformers would take the half that is in its place
    with pytest.raises(CheckpointError, match="a save was cut off there when it was complete"):
        check_settled(folder)
    assert tree(folder) == before
    # a copy is as good: nothing depends on times or inodes
    shutil.copytree(folder, copy)
    assert same(GPT.from_pretrained(copy), new)
    last = build(2)
    last.tokenizer = None
    last.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert same(GPT.from_pretrained(folder), last)


@pytest.mark.parametrize("moves", [0, 1])
def test_a_newer_model_is_never_overwritten(
    moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GPT2LMHeadModel

    build(0).save_pretrained(tmp_path)
    cut_off(monkeypatch, build(1), tmp_path, moves)
    other = tmp_path / "other"
    newer = build(2)
    newer.save_pretrained(other)
    GPT2LMHeadModel.from_pretrained(other).save_pretrained(tmp_path)
    shutil.rmtree(other)
    with pytest.warns(UserWarning, match="is passed over: other files were saved here since"):
        found = GPT.from_pretrained(tmp_path)
    assert torch.equal(found.transformer.wte.weight, newer.transformer.wte.weight)
    weights = (tmp_path / "model.safetensors").read_bytes()
    with pytest.warns(UserWarning, match="other files were saved here since. It is kept as"):
        found.save_pretrained(tmp_path)
    assert len(weights) > 1000
    assert torch.equal(GPT.from_pretrained(tmp_path).transformer.wte.weight, newer.transformer.wte.weight)
    assert len(list(tmp_path.glob(".gptkern-aside-*/model.safetensors"))) == 1


def test_weights_and_tokenizer_are_of_one_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = build(0), build(1)
    new.tokenizer = Tokenizer.characters({chr(65 + number): number for number in range(26)})
    old.save_pretrained(tmp_path)
    find, saves = model_module.tokenizer_for, [new]

    def save_first(*args: object, **options: object) -> object:
        if saves:
            saves.pop().save_pretrained(tmp_path)
        return find(*args, **options)

    monkeypatch.setattr(model_module, "tokenizer_for", save_first)
    found = GPT.from_pretrained(tmp_path)
    assert found.tokenizer is not None
    assert found.tokenizer.encode("C") == [2]
    assert same(found, new)


def test_a_damaged_pending_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(0).save_pretrained(tmp_path)
    cut_off(monkeypatch, build(1), tmp_path, 0)
    path = tmp_path / PENDING / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"'model\.safetensors' is not the file that its manifest"):
        GPT.from_pretrained(tmp_path)


def hold(folder: Path, kind: int) -> int:
    """Somebody's lock on the folder, until the descriptor is closed."""
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, kind)
    return descriptor


def test_nobodys_lock_stops_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(0)
    model.save_pretrained(tmp_path)
    descriptor = hold(tmp_path, fcntl.LOCK_EX)
    assert same(GPT.from_pretrained(tmp_path), model)
    os.close(descriptor)
    new = build(1)
    cut_off(monkeypatch, new, tmp_path, 1)
    monkeypatch.setattr("gptkern.checkpoint.pending._MOVES", 0.05)
    descriptor = hold(tmp_path, fcntl.LOCK_EX)
    assert same(GPT.from_pretrained(tmp_path), new)
    os.close(descriptor)


def test_a_save_waits_with_a_word_and_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(0)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("gptkern.checkpoint.replace._SILENCE", 0.02)
    monkeypatch.setattr("gptkern.checkpoint.replace._PATIENCE", 0.1)
    descriptor = hold(tmp_path, fcntl.LOCK_SH)
    with (
        pytest.warns(UserWarning, match="waiting for another program that holds its lock"),
        pytest.raises(CheckpointError, match=f"{tmp_path}: another program has held its lock"),
    ):
        build(1).save_pretrained(tmp_path)
    os.close(descriptor)
    assert same(GPT.from_pretrained(tmp_path), model)


def test_a_saver_in_a_loop_starves_no_reader(tmp_path: Path) -> None:
    """Two models in turn, one of another shape: what is read is always one of them."""
    models = [build(0), build(1, n_embd=24, n_layer=1)]
    models[0].save_pretrained(tmp_path)
    child = os.fork()
    while child == 0:
        for model in models:
            model.save_pretrained(tmp_path)
    try:
        seen = [GPT.from_pretrained(tmp_path) for _ in range(40)]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert all(any(same(found, model) for model in models) for found in seen)
