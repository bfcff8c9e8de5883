"""Files are written whole and to the disk, or an error names them."""

from __future__ import annotations

import ast
import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gptkern import GPTConfig
from gptkern.durable import identity, make_folder, naming, new_file, write_file
from gptkern.gpt import GPT
from gptkern.tokenizer import Tokenizer
from gptkern.train.tokens import write_tokens

TINY = GPTConfig(vocab_size=300, n_positions=16, n_layer=2, n_head=2, n_embd=18)


def under_limit(size: int, write: Callable[[], object]) -> str:
    """The error that ``write`` raises in a process whose files may have ``size`` bytes; empty for none."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        message = ""
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            write()
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        os.write(write_end, message.encode())
        os._exit(0)
    os.close(write_end)
    with open(read_end) as told:
        message = told.read()
    os.waitpid(child, 0)
    return message


def build(seed: int) -> GPT:
    torch.manual_seed(seed)
    return GPT(TINY).eval()


def test_a_save_that_does_not_fit_says_so(tmp_path: Path) -> None:
    """The last bytes of a tensor are those that a library's buffer holds back."""
    build(0).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    size = len(before["model.safetensors"])
    for missing in (1, 37, 500, 1000, 4000, size // 2):
        message = under_limit(size - missing, lambda: build(1).save_pretrained(tmp_path))
        assert "the file would be larger than the limit on file sizes" in message
        assert "model.safetensors" in message
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert under_limit(size, lambda: build(1).save_pretrained(tmp_path)) == ""
    found = GPT.from_pretrained(tmp_path)
    assert torch.equal(found.lm_head.weight, build(1).lm_head.weight)


def test_token_shards_that_do_not_fit_say_so(tmp_path: Path) -> None:
    ids = [list(range(100)) for _ in range(30)]

    def write() -> None:
        with new_file(tmp_path / "train.bin") as file:
            assert write_tokens(file, ids, np.dtype(np.uint16)) == 3000

    for missing in (1, 178, 4000):
        assert "train.bin" in under_limit(6000 - missing, write)
        assert not (tmp_path / "train.bin").exists()
    write()
    assert np.fromfile(tmp_path / "train.bin", dtype=np.uint16).tolist() == [i for row in ids for i in row]


def test_no_empty_list_of_ids_is_too_short(tmp_path: Path) -> None:
    with new_file(tmp_path / "train.bin") as file:
        assert write_tokens(file, [[], [5], []], np.dtype(np.uint32)) == 1
    assert (tmp_path / "train.bin").read_bytes() == b"\5\0\0\0"


def test_a_file_that_does_not_read_back(tmp_path: Path) -> None:
    """A disk that loses what it was given."""
    with (
        pytest.raises(OSError, match="what was written does not read back") as caught,
        new_file(tmp_path / "x") as file,
    ):
        file.write(b"abc")
        file._file.flush()
        (tmp_path / "x").write_bytes(b"abd")
    assert caught.value.filename == str(tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EIO, "the disk reports an error"),
        (errno.EROFS, "the file system is read-only"),
    ],
)
def test_errors_in_plain_words(number: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=words) as caught, naming(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "x"))


def test_writing_in_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "a", tmp_path / "link"
    write_file(path, "first: é")
    assert path.read_text(encoding="utf-8") == "first: é"
    path.chmod(0o640)
    link.symlink_to("a")
    write_file(link, b"second")
    assert link.is_symlink()
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"second", 0o640)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for broken in ("os.fsync", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(broken, full)
            with pytest.raises(OSError, match="the disk is full"):
                write_file(path, b"third")
        assert path.read_bytes() == b"second"
        assert sorted(os.listdir(tmp_path)) == ["a", "link"]


def test_what_is_no_file_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "pipe", b"abc")
    assert os.read(reader, 10) == b"abc"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_folders_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new folder is a name in the one above, which has to be flushed too."""
    flushed = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (flushed.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    make_folder(tmp_path / "a" / "b")
    assert set(flushed) == {str(tmp_path), str(tmp_path / "a")}
    flushed.clear()
    build(0).save_pretrained(tmp_path / "new")
    assert str(tmp_path) in flushed
    # the files, then the folder that holds their names, then the rename
    staging = next(path for path in flushed if "/.gptkern-staging-" in path)
    names = [path.rpartition("/")[2] for path in flushed]
    for name in ("config.json", "model.safetensors", ".manifest.json"):
        assert names.index(name) < len(names) - names[::-1].index("new") - 1
    assert staging.startswith(str(tmp_path / "new"))
    assert names[-1] == "new"
    flushed.clear()
    write_file(tmp_path / "report.json", "{}")
    assert flushed[-1] == str(tmp_path)


def test_identity_is_of_regular_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123456789")
    # the check value of CRC-32
    assert identity(tmp_path / "a") == (9, 0xCBF43926)
    assert identity(tmp_path / "none") is None
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match=r"regular file|directory"):
            identity(path)


def test_permissions_stay(tmp_path: Path) -> None:
    """Weights that others may not read do not become readable, under another name either."""
    model = build(0)
    model.tokenizer = Tokenizer.bytes()
    model.save_pretrained(tmp_path)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask()}
    for path in tmp_path.iterdir():
        path.chmod(0o600)
    (tmp_path / "config.json").chmod(0o640)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert len(modes) > 5
    assert modes.pop("config.json") == 0o640
    assert set(modes.values()) == {0o600}


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_no_name_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"save_pretrained: folder is ''; a folder's name is needed"):
        build(0).save_pretrained("")
    with pytest.raises(ValueError, match=r"Tokenizer\.save: folder is ''"):
        Tokenizer.bytes().save("")
    assert not list(tmp_path.iterdir())
    build(0).save_pretrained(".")
    assert (tmp_path / "config.json").is_file()


def test_where_a_file_is_to_be_there_is_a_folder(tmp_path: Path) -> None:
    """Seen before anything is replaced."""
    build(0).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "config.json").rename(tmp_path / "kept")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config\.json: cannot be replaced"):
        build(1).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".gptkern-*"))
    shutil.rmtree(tmp_path / "config.json")


WRITERS = {"copyfile", "copy", "dump", "save", "savez"}
LIBRARIES = {"torch", "np", "numpy", "json", "pickle", "shutil"}


def test_every_writer_is_checked() -> None:
    """Nothing in the package writes a file but through ``durable``."""
    package = Path(__file__).parents[1] / "gptkern"
    found = [
        f"{path.relative_to(package)}, line {node.lineno}: {ast.unparse(node)}"
        for path in package.rglob("*.py")
        if path.name != "durable.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in ("tofile", "write_text", "write_bytes", "save_file")
        or (node.func.attr in WRITERS and ast.unparse(node.func.value) in LIBRARIES)
    ]
    assert found == []
