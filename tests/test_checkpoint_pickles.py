"""Pickles are read to the values that torch.load gives, or refused; nothing in them runs."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import reference, write_nanogpt
from torch import nn

from gptkern.checkpoint import CheckpointError
from gptkern.checkpoint.nanogpt import read_meta
from gptkern.checkpoint.pickles import LARGEST_PICKLE, read_torch, state_dict_tensors
from gptkern.gpt import GPT


def read(path: Path) -> dict[str, torch.Tensor]:
    tensors = state_dict_tensors(path, read_torch(path, "c"))
    result = {name: stored.data.clone() for name, stored in tensors.items()}
    for stored in tensors.values():
        stored.release()
    for name, stored in tensors.items():
        same(stored.data, result[name])  # dropped pages come back from the file as they were
    return result


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    whole = (
        found.contiguous().flatten().view(torch.uint8),
        expected.contiguous().flatten().view(torch.uint8),
    )
    assert torch.equal(*whole)


def tensors() -> dict[str, torch.Tensor]:
    base = torch.randn(6, 8)
    kinds = {
        str(dtype): (torch.randn(3, 5) * 9).to(dtype)
        for dtype in (
            *(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16),
            *(torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128),
            *(torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
        )
    }
    return kinds | {
        "base": base,
        "shared": base,
        "row": base[2],
        "offset": base[1:4, 2:5],
        "transposed": base.t(),
        "reversed strides": torch.randn(2, 3, 4).permute(2, 0, 1),
        "every other": base[::2, 1::3],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 7),
        "no rows": base[3:3],
        "odd": torch.randn(3).to(torch.float16),
        "after odd": torch.randn(5),
        "parameter": nn.Parameter(torch.randn(4)),
        "trained": torch.randn(4, requires_grad=True),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_every_kind_of_tensor(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    saved = tensors()
    if not zipped:  # torch.load cannot read these dtypes of the old format itself
        for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2):
            del saved[str(dtype)]
    torch.save(collections.OrderedDict(saved), path, _use_new_zipfile_serialization=zipped, pickle_protocol=2)
    expected = torch.load(path, weights_only=True)
    found = read(path)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        same(found[name], tensor.detach())


def test_a_module_s_state_dict_and_what_stands_beside_one(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    others = {
        "optimizer": torch.optim.AdamW(module.parameters()).state_dict(),
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "set": {1},
        "bytes": b"\x00\xff",
        "complex": 1j,
        "counter": collections.Counter("aab"),
        "rng": torch.get_rng_state(),
    }
    torch.save(others | {"model": module.state_dict()}, path)
    found = read_torch(path, "c")
    assert isinstance(found, dict)
    assert (found["size"], found["dtype"]) == ((1, 2), torch.bfloat16)
    for name, stored in state_dict_tensors(path, found["model"]).items():
        same(stored.data, module.state_dict()[name])


def rewritten(path: Path, change: Callable[[str, bytes], bytes], how: int = zipfile.ZIP_STORED) -> None:
    """The same zip archive with its records changed, packed anew: their data then begin anywhere."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))


def test_records_that_are_not_aligned(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    torch.save(tensors(), path)
    rewritten(path, lambda _, content: content)
    expected = torch.load(path, weights_only=True)
    for name, tensor in read(path).items():
        same(tensor, expected[name].detach())


@pytest.mark.parametrize("how", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_archives_are_refused(how: int, tmp_path: Path) -> None:
    """torch.load reads deflated ones right; mapped, their compressed bytes would pass for weights."""
    path = tmp_path / "ckpt.pt"
    write_nanogpt(path, reference(activation_function="gelu"), bias=True)
    rewritten(path, lambda _, content: content, how)
    with pytest.raises(CheckpointError, match=r"ckpt\.pt: '.*' in it is compressed .* `zip -0`"):
        GPT.from_pretrained(path)


def test_big_endian_files(tmp_path: Path) -> None:
    hf = reference(activation_function="gelu")
    path = tmp_path / "ckpt.pt"
    write_nanogpt(path, hf, bias=True)
    plain = GPT.from_pretrained(path)

    def big(name: str, content: bytes) -> bytes:
        if name.endswith("/byteorder"):
            return b"big"
        return np.frombuffer(content, "<f4").astype(">f4").tobytes() if "/data/" in name else content

    rewritten(path, big)
    expected = torch.load(path, weights_only=True)["model"]
    model = GPT.from_pretrained(path)
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, other) and torch.equal(parameter, expected[name])


def test_big_endian_complex_numbers(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    torch.save({"c": torch.randn(3, dtype=torch.complex64)}, path)
    rewritten(path, lambda name, content: b"big" if name.endswith("/byteorder") else content)
    same(read(path)["c"], torch.load(path, weights_only=True)["c"])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_other_layouts_are_refused_by_name(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    for value, kind in (
        (torch.eye(3).to_sparse(), "a sparse one"),
        (torch.eye(3).to_sparse_csr(), "a sparse one"),
        (torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8), "a quantised one"),
        (torch.ones(2, device="meta"), "one without data"),
        (torch.randn(3, dtype=torch.complex64).conj(), "another kind"),
        (torch.ones(1).expand(1000, 1000), r"has 1 elements, each of which may be used once"),
    ):
        torch.save({"a": value}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=f"t.bin: a: .*{kind}"):
            read(path)
    torch.save({"beside": torch.eye(3).to_sparse(), "model": {"a": torch.ones(3)}}, path)
    found = read_torch(path, "c")
    assert isinstance(found, dict)
    same(state_dict_tensors(path, found["model"])["a"].data, torch.ones(3))


@pytest.mark.parametrize(
    "value", [np.float64(0.5), argparse.Namespace(lr=1e-3), Path("out"), nn.Linear(2, 2)]
)
def test_values_that_need_code_and_the_way_out(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    write_nanogpt(path, reference(activation_function="gelu"), bias=True)
    whole = torch.load(path)
    torch.save(whole | {"args": value}, path)
    with pytest.raises(
        CheckpointError, match=r"opening it could run code: it names .*weights_only=False"
    ) as error:
        GPT.from_pretrained(path)
    way_out = str(error.value).split("keep what is needed: ")[1]
    exec(way_out.replace("'clean.pt'", repr(str(tmp_path / "clean.pt"))), {"torch": torch})
    model = GPT.from_pretrained(tmp_path / "clean.pt")
    assert torch.equal(model.transformer.wte.weight, whole["model"]["transformer.wte.weight"])


def pickled(*operations: bytes) -> bytes:
    return b"\x80\x02" + b"".join(operations) + b"."


def torch_call(function: str, arguments: bytes) -> bytes:
    module, _, name = function.rpartition(".")
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n" + arguments + b"R"


def storage(count: bytes, key: bytes = b"X\x01\x00\x00\x000") -> bytes:
    return b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + key + b"X\x03\x00\x00\x00cpu" + count + b"tQ"


def tensor(count: bytes, *layout: bytes) -> bytes:
    offset, shape, stride = layout
    call = torch_call(
        "torch._utils._rebuild_tensor_v2", b"(" + storage(count) + offset + shape + stride + b"\x89Nt"
    )
    return pickled(b"}", b"X\x01\x00\x00\x00a", call, b"s")


FOUR = b"K\x04"
HUGE = b"\x8a\x08" + (2**62).to_bytes(8, "little")


# (), ((), ()), ... each holding the one before twice: short in memory, 2^80 in text and in hashing
DOUBLED = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(80))
DOUBLES = b"]" + b"".join(
    b"q" + bytes([i]) + b"0]h" + bytes([i]) + b"ah" + bytes([i]) + b"a" for i in range(80)
)
REPEATED = b"X" + (1 << 20).to_bytes(4, "little") + b"x" * (1 << 20) + b"q\x000]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickled(b"}", DOUBLED, b"Ns"), "keys of text or numbers are needed, tuple found"),
        (pickled(b"}(", DOUBLED, b"Nu"), "keys of text or numbers are needed, tuple found"),
        (pickled(b"(", DOUBLED, b"Nd"), "keys of text or numbers are needed, tuple found"),
        (b"\x80\x04\x8f(" + DOUBLED + b"\x90.", "keys of text or numbers are needed, tuple found"),
        (b"\x80\x04(" + DOUBLED + b"\x91.", "keys of text or numbers are needed, tuple found"),
        (pickled(b"}\x8a\xff" + b"\x7f" * 255 + b"Ns"), "keys of text or numbers are needed, int found"),
        (pickled(torch_call("collections.OrderedDict", b"(" + DOUBLES + b"t")), "truncated"),
        (pickled(b"}", storage(FOUR, DOUBLED), b"Ns"), "a storage's key, text, is needed"),
        (tensor(FOUR, b"K\x00", DOUBLED, b"K\x01\x85"), r"shape is .*\.\.\..*; integers"),
        (tensor(DOUBLES, b"K\x00", b"K\x04\x85", b"K\x01\x85"), r"offset and length is .*; integers"),
        (pickled(b"}X\x01\x00\x00\x00a", DOUBLES, b"s"), "'a' is list; names with tensors are needed"),
        (
            pickled(REPEATED, (torch_call("_codecs.encode", b"(h\x00Nt") + b"a") * 20_000),
            "a state dict is needed, list",  # 20 GB, were they copied
        ),
        (tensor(FOUR, b"K\x00", b"K\x04\x85", b"K\x01\x85"), None),
        (tensor(FOUR, b"K\x00", b"K\x04\x85", b"K\x01\x85").replace(b"ctorch\n", b"ctorch.cuda\n"), None),
        (tensor(FOUR, b"K\x01", b"K\x04\x85", b"K\x01\x85"), "from element 1 found; its data has 4 elements"),
        (tensor(FOUR, b"K\x00", HUGE + b"\x85", b"K\x00\x85"), "each of which may be used once"),
        (tensor(FOUR, b"K\x00", HUGE + HUGE + b"\x86", b"K\x00K\x00\x86"), "each of which may be used once"),
        (tensor(FOUR, b"K\x00", b"K\x04\x85", HUGE + b"\x85"), "its data has 4 elements"),
        (tensor(HUGE, b"K\x00", b"K\x04\x85", b"K\x01\x85"), "bytes of data expected, 16 found"),
        (
            tensor(FOUR, b"J\xff\xff\xff\xff", b"K\x04\x85", b"K\x01\x85"),
            r"offset and length is \(-1, 4\); integers",
        ),
        (tensor(FOUR, b"K\x00", b"G" + b"\x00" * 8 + b"\x85", b"K\x01\x85"), r"shape is \(0\.0,\); integers"),
        (tensor(FOUR, b"K\x00", b"K\x04\x85", b")"), "1 sizes and 0 strides"),
        (tensor(FOUR, b"N", b"N", b"N"), "shape is None; integers"),
        (pickled(torch_call("builtins.bytearray", b"(I10000000000\nt")), "a state dict is needed, Opaque"),
        (pickled(torch_call("os.system", b"(X\x04\x00\x00\x00truet")), "it names os.system"),
        (pickled(b"ctorch\nhub.load\n"), "it names torch.hub.load"),
        (pickled(b"\x93"), "truncated"),
        (pickled(b"]r\xff\xff\xff\xff"), "a state dict is needed, list"),  # a memo of 34 GB in C
        (b"\x80\x04\x95" + b"\xff" * 8 + b".", "truncated"),
        (b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b".", "truncated"),
        (b"\x80\x04" + b"(" * 100000 + b".", "truncated"),
        (b"\x80\x04" + b"]" * 100000 + b"a" * 99999 + b".", "a state dict is needed, list"),
        (bytes(LARGEST_PICKLE + 1), "at most 4,194,304 are read"),
    ],
)
def test_hostile_pickles(content: bytes, message: str | None, tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    torch.save({"a": torch.arange(4.0)}, path)
    rewritten(path, lambda name, old: content if name.endswith("data.pkl") else old)
    if message is None:
        same(read(path)["a"], torch.arange(4.0))
        return
    with pytest.raises(CheckpointError, match=message):
        read(path)


def test_hostile_archives(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    torch.save({"a": torch.arange(4.0)}, path)
    whole = path.read_bytes()

    def check(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            read(path)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("a/constants.pkl", b"")
    check("a TorchScript program found")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b", b"")
    check("a zip archive without data.pkl")
    path.write_bytes(whole)
    rewritten(path, lambda name, content: b"middle" if name.endswith("byteorder") else content)
    check("byteorder is b'middle'; little or big is needed")
    path.write_bytes(whole)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("t/data/0", b"\x00" * 16)
    check("'t/data/0' is in it twice")
    path.write_bytes(whole)
    rewritten(path, lambda name, content: content[:8] if name.endswith("data/0") else content)
    check("a: 16 bytes of data expected, 8 found")


def test_a_legacy_file_s_claims(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    torch.save({"a": torch.arange(4.0)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    assert whole[-24:-16] == (4).to_bytes(8, "little")
    for count in (5, 2**40, 2**62):
        path.write_bytes(whole[:-24] + count.to_bytes(8, "little") + whole[-16:])
        with pytest.raises(CheckpointError, match=r"truncated: .* bytes of '.*' from byte"):
            read(path)


def test_meta_of_characters(tmp_path: Path) -> None:
    path = tmp_path / "meta.pkl"
    characters = sorted("\n !abcé\U0001f600")
    stoi = {character: i for i, character in enumerate(characters)}
    itos = dict(enumerate(characters))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"vocab_size": 8, "itos": itos, "stoi": stoi}, protocol))
        assert read_meta(path) == stoi

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    for content, message in (
        ({"stoi": Evil()}, "could run code: posix.mkdir"),
        ({"stoi": collections.OrderedDict(stoi)}, "could run code: collections.OrderedDict"),
        ({"itos": itos}, "stoi, a dict from characters to ids, is needed"),
        ([stoi], "stoi, a dict from characters to ids, is needed"),
        ({"stoi": {}}, "stoi, a dict from characters to ids, is needed"),
        ({"stoi": {"a": 1.5}}, r"text with an integer is needed, 'a': 1\.5 found"),
        ({"stoi": {1: 1}}, "text with an integer is needed, 1: 1 found"),
        ({"stoi": {"a": 10**5000}}, "each id from 0 to 0 is needed once"),
        ({"stoi": {"a": 1, "b": 1}}, "each id from 0 to 1 is needed once"),
    ):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError, match=message):
            read_meta(path)
    assert not (tmp_path / "executed").exists()
    path.write_bytes(pickle.dumps({"stoi": stoi})[:-3])
    with pytest.raises(CheckpointError, match=r"meta\.pkl: not a pickle, or truncated"):
        read_meta(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="a regular file is needed, a FIFO found"):
        read_meta(path)


def test_nothing_is_imported_or_called(tmp_path: Path) -> None:
    """A name of a module that exists and was never imported stays a name."""
    path = tmp_path / "t.bin"
    torch.save({}, path)
    rewritten(path, lambda name, old: pickled(b"cthis\ns\n") if name.endswith("data.pkl") else old)
    sys.modules.pop("this", None)
    with pytest.raises(CheckpointError, match=r"it names this\.s"):
        read_torch(path, "c")
    assert "this" not in sys.modules
