"""Every bad checkpoint gets one clear error: file, tensor, expected, found. Nothing in it is executed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import reference, write_llmc, write_nanogpt
from safetensors.torch import load_file, save_file

from gptkern.checkpoint import CheckpointError
from gptkern.gpt import GPT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    reference().save_pretrained(tmp_path)
    return tmp_path


def refuse(path: Path | str, message: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=message):
        GPT.from_pretrained(path, **options)


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path) -> Path:
    """Turn the folder into two shards; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in ("model-1.safetensors", "model-2.safetensors"):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def test_missing_files(folder: Path) -> None:
    refuse(folder / "nowhere", "nowhere: no such file or folder")
    refuse(str(folder / "nowhere"), "nowhere: no such file or folder")
    refuse(folder / "model.safetensors", "a part of a checkpoint: give its folder")
    (folder / "model.safetensors").unlink()
    refuse(folder, r"no weights here; one of model\.safetensors, .* is needed")
    (folder / "config.json").unlink()
    refuse(folder, r"holds no model: no config\.json, no ckpt\.pt")


@pytest.mark.parametrize("kept", [0, 4, 8, 500, -1])
def test_truncated_safetensors(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refuse(folder, r"model\.safetensors: .*(truncated|empty)")


def test_damaged_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole + b"more")
    refuse(folder, r"longer than its header says: [\d,]+ bytes of tensors expected, [\d,]+ found")
    path.write_bytes(whole[:8] + b"\xff" * 20 + whole[28:])
    refuse(folder, "the safetensors header is malformed")
    header = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}
    for entry, message in (
        ({"data_offsets": [0, 8]}, r"a: bytes 0 to 8 found; shape \(4,\) in F32 needs 16 bytes from 0"),
        ({"data_offsets": [-8, 8]}, r"a: data_offsets is \[-8, 8\]; integers from 0 to 2\^63 - 1 are needed"),
        ({"data_offsets": []}, r"a: data_offsets is \[\]; a begin and an end are needed"),
        ({"data_offsets": [0]}, r"a: data_offsets is \[0\]; a begin and an end are needed"),
        ({"data_offsets": [0, 8, 16]}, r"a: data_offsets is \[0, 8, 16\]; a begin and an end are needed"),
        ({"data_offsets": [0, float("inf")]}, r"a: data_offsets is \[0, inf\]; integers"),
        ({"data_offsets": [0, True]}, r"a: data_offsets is \[0, True\]; integers"),
        ({"data_offsets": "08"}, r"a: data_offsets is '08'; integers"),
        ({"dtype": ["F32"]}, r"a: dtype \['F32'\] found; supported are"),
        ({"dtype": {}}, "a: dtype {} found; supported are"),
        ({"shape": [0, 2**63], "data_offsets": [0, 0]}, r"a: shape is \[0, 9223372036854775808\]; integers"),
        ({"shape": [10**400]}, r"a: shape is \[1000+\.\.\.0+\]; integers"),
        ({"shape": [2**62, 2**62]}, r"needs [\d,]{50,} bytes from 0"),
        ({"shape": [1] * 65}, "a: shape is .* integers"),
        ({"data_offsets": [16, 32]}, "a: bytes 16 to 32 found"),
        ({"dtype": "F8_E4M3"}, "a: dtype 'F8_E4M3' found; supported are"),
        ({"shape": [-4]}, r"a: shape is \[-4\]; integers"),
        ({"shape": None}, "a: shape is None; integers"),
    ):
        encoded = json.dumps({"a": header["a"] | entry}).encode()
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(8))
        refuse(folder, message)


def test_config(folder: Path) -> None:
    path = folder / "config.json"
    for changes, message in (
        ({"model_type": "bert"}, r"config\.json: .*model_type is 'bert'; supported are gpt2, openai-gpt"),
        ({"n_head": 5}, r"config\.json: .*n_embd is 32, n_head 5"),
        ({"n_layer": 3}, "3 layers expected, 2 found"),
        ({"n_layer": 10**9}, "1000000000 layers expected, 2 found"),
        ({"n_layer": "2"}, "n_layer is '2'; a positive integer is needed"),
        ({"activation_function": "mish"}, "activation_function is 'mish'; accepted are"),
        ({"add_cross_attention": True}, "add_cross_attention is true"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"n_layer": 2**32}, "n_layer is 4294967296; a positive integer is needed, 2\\^31 - 1 at most"),
        ({"n_embd": 2**31}, "n_embd is 2147483648; a positive integer"),
        ({"n_embd": 2**30}, r"wte\.weight: shape \(115, 1073741824\) expected, \(115, 32\) found"),
        ({"vocab_size": 2**62}, "vocab_size is 4611686018427387904; a positive integer"),
        ({"vocab_size": 2**31 - 1}, r"wte\.weight: shape \(2147483647, 32\) expected"),
        ({"n_positions": 2**31 - 1}, r"wpe\.weight: shape \(2147483647, 32\) expected"),
        ({"n_inner": 2**31 - 1}, r"c_fc\.weight: shape \(32, 2147483647\) expected"),
        ({"n_positions": 10**400}, r"n_positions is 1000+\.\.\.0+; a positive integer"),
        ({"layer_norm_epsilon": 10**400}, r"layer_norm_epsilon is 1000+\.\.\.0+; a finite number"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon is inf; a finite number"),
        ({"resid_pdrop": 10**400}, r"resid_pdrop is 1000+\.\.\.0+; a finite number"),
        ({"resid_pdrop": [0.1]}, r"resid_pdrop is \[0\.1\]; a finite number"),
        ({"eos_token_id": 1.5}, "eos_token_id is 1.5; a token id"),
        ({"eos_token_id": {"1": 2}}, "eos_token_id is {'1': 2}; a token id"),
        ({"eos_token_id": [10**400]}, r"eos_token_id is \(1000+\.\.\.0+,\); a token id"),
        ({"model_type": ["gpt2"] * 1000}, r"model_type is \['gpt2', .*\.\.\.\]; supported"),
        ({"model_type": "\x1b]52;c;x\x07\ud800" + "x" * 10**5}, r"model_type is '.{,90}'; supported"),
        ({"vocab_size": 116}, r"wte\.weight: shape \(116, 32\) expected, \(115, 32\) found"),
    ):
        before = path.read_text()
        edit_json(path, **changes)
        refuse(folder, message)
        path.write_text(before)
    path.write_text(path.read_text()[:-20])
    refuse(folder, r"config\.json: not readable as JSON, or truncated")
    path.write_text("[]")
    refuse(folder, r"config\.json: a JSON object is needed, list found")


def test_tensors(folder: Path) -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    whole = (folder / "model.safetensors").read_bytes()

    def check(edit: Callable[[dict[str, torch.Tensor]], object], message: str, **options: Any) -> None:
        edit_tensors(folder, edit)
        refuse(folder, message, **options)
        (folder / "model.safetensors").write_bytes(whole)

    check(lambda t: t.pop(name), rf"27 tensors expected; 1 missing: {name}$".replace("27", r"\d+"))
    check(
        lambda t: t.update({"scores.weight": torch.ones(2)}),
        r"1 not of a gpt2 model: scores\.weight \(in model\.safetensors\)",
    )
    check(
        lambda t: t.update({name: t[name].t().contiguous()}),
        rf"{name}: shape \(32, 128\) expected, \(128, 32\) found",
    )
    check(lambda t: t.update({name: t[name].int()}), rf"{name}: dtype float32, .* expected, int32 found")
    check(lambda t: t.update({"wte.weight": torch.ones(2)}), r"wte\.weight .* are one tensor of the model")
    check(
        lambda t: t.update({"lm_head.weight": torch.ones(115, 32)}),
        r"lm_head\.weight differs from transformer\.wte\.weight",
    )

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] = float("nan")
        tensors[name][4, 6] = float("-inf")

    check(spoil, rf"{name}: finite values expected, 2 of 4096 are NaN or infinite", check_finite=True)
    check(
        lambda t: t[name].mul_(1e6), "are NaN or infinite in float16", check_finite=True, dtype=torch.float16
    )
    GPT.from_pretrained(folder, check_finite=True)
    for dtype in (torch.int8, "int8", "fp16", "", 16):
        with pytest.raises(ValueError, match=re.escape(f"dtype is {dtype!r}; accepted are float32, float16")):
            GPT.from_pretrained(folder, dtype=dtype)
    assert GPT.from_pretrained(folder, dtype="bfloat16").dtype == torch.bfloat16
    for device in ("gpu", "cuda:99", "cuda:-1", 3.5):
        with pytest.raises(ValueError, match=re.escape(f"device is {device!r}")):
            GPT.from_pretrained(folder, device=device)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("torch_dtype", "dtype is its name here"),
        ("device_map", "device is its name here"),
        ("load_in_8bit", "weights='int8' does this"),
        ("trust_remote_code", "code of a checkpoint never runs"),
        ("devise", "did you mean 'device'?"),
        ("xyz", "options: dtype, device, revision"),
    ],
)
def test_options_of_transformers_have_their_names_here(name: str, hint: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"GPT.from_pretrained: {name} is no option; {hint}")):
        GPT.from_pretrained("nowhere", **{name: None})


def test_files_of_other_programs_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hi")
    refuse(tmp_path / "notes.txt", "a transformers folder, nanoGPT's ckpt.pt or llm.c's .bin is needed")
    refuse("", "the checkpoint's name is empty text")


def test_untied_head_is_missing(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=False)
    refuse(folder, r"1 missing: lm_head\.weight")


def test_biases_of_a_model_without(folder: Path) -> None:
    edit_json(folder / "config.json", bias=False)
    refuse(folder, "zeros expected, as bias is false, others found")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", 3, None]
)
def test_an_index_that_points_outside(folder: Path, name: object) -> None:
    index = shard(folder)
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"transformer.wte.weight": name})
    refuse(folder, r"index\.json: transformer\.wte\.weight: the index points outside its folder")


def test_index(folder: Path) -> None:
    index = shard(folder)
    weight_map = json.loads(index.read_text())["weight_map"]
    moved = {"model-1.safetensors": "model-2.safetensors", "model-2.safetensors": "model-1.safetensors"}
    first = next(iter(weight_map))
    for changed, message in (
        (weight_map | {first: moved[weight_map[first]]}, f"not in the file the index names for it: {first}"),
        (weight_map | {"ghost": "model-1.safetensors"}, "not in the file the index names for it: ghost"),
        ({n: f for n, f in weight_map.items() if n != first}, f"in a shard but not in the index: {first}"),
        (weight_map | {first: "model-3.safetensors"}, r"model-3\.safetensors, which it names, is missing"),
        ({}, "weight_map, an object from tensor names to file names, is needed"),
        ([], "weight_map, an object from tensor names to file names, is needed"),
    ):
        edit_json(index, weight_map=changed)
        refuse(folder, message)


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_not_executed(folder: Path, tmp_path: Path, zipped: bool) -> None:
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "executed"
    for path, target in ((folder / "pytorch_model.bin", folder), (folder / "ckpt.pt", folder / "ckpt.pt")):
        torch.save({"model": Evil(marker)}, path, _use_new_zipfile_serialization=zipped)
        refuse(
            target, rf"{path.name}: not a plain state dict, and opening it could run code: .*posix.*system"
        )
    assert not marker.exists()


def test_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    for content, message in (
        ([torch.ones(2)], "a state dict is needed, list found"),
        ({"a": 3}, "'a' is int; names with tensors are needed"),
        ({3: torch.ones(2)}, "3 is Tensor; names with tensors are needed"),
        ({"a": torch.eye(2).to_sparse()}, "a: a dense tensor is needed"),
    ):
        torch.save(content, path)
        refuse(folder, message)
    torch.save(reference().state_dict(), path)
    whole = path.read_bytes()
    for damaged in (b"", b"\x80", whole[:40], whole[: len(whole) // 2], whole[:-1], bytes(100), b"text"):
        path.write_bytes(damaged)
        refuse(folder, r"pytorch_model\.bin: (not a PyTorch checkpoint, or )?truncated")


def test_nanogpt(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    write_nanogpt(path, reference(), bias=True, use_rmsnorm=True)
    refuse(path, r"ckpt\.pt: model_args has use_rmsnorm: an unknown architecture")
    write_nanogpt(path, reference(), bias=True, n_head=3)
    refuse(path, r"ckpt\.pt: model_args: .*n_embd is 32, n_head 3")
    write_nanogpt(path, reference(), bias=True, bias_=None, vocab_size=115)
    refuse(path, "model_args has bias_")
    write_nanogpt(path, reference(), bias=False)
    whole = path.read_bytes()
    torch.save({"model": {}, "epoch": 3}, path)
    refuse(path, r"a nanoGPT checkpoint with model and model_args is needed, \['model', 'epoch'\] found")
    path.write_bytes(whole[:-100])
    refuse(path, "not a PyTorch checkpoint, or truncated")
    write_nanogpt(path, reference(), bias=True, block_size=25)
    refuse(path, r"transformer\.wpe\.weight: shape \(25, 32\) expected, \(24, 32\) found")


def test_llmc(tmp_path: Path) -> None:
    path = tmp_path / "gpt2_124M.bin"
    write_llmc(path, reference(), 3)
    whole = path.read_bytes()

    def with_header(position: int, value: int) -> bytes:
        return whole[: 4 * position] + value.to_bytes(4, "little", signed=True) + whole[4 * position + 4 :]

    for content, message in (
        (whole[:-1], r"truncated: .*: [\d,]+ bytes expected, [\d,]+ found"),
        (whole + b"0", "longer than its header says"),
        (whole[:1000], "truncated: a header of 1024 bytes expected, 1000 found"),
        (with_header(0, 20240520), "magic 20240326 expected, 20240520 found"),
        (with_header(1, 1), r"version 3 \(fp32\) or 5 \(bf16\) expected, 1 found"),
        (with_header(4, -1), "n_layer is -1"),
        (with_header(4, 2 ^ 1 << 24), "truncated: num_layers is 16,777,218"),
        (with_header(4, 122_000), "truncated: num_layers is 122,000"),
        (with_header(3, 2**31 - 1), "padded_vocab_size is 128, vocab_size 2147483647"),
        (with_header(6, 2**30), "truncated: .* channels 1,073,741,824"),
        (with_header(4, 2**31 - 1), r"truncated: num_layers is 2,147,483,647, .*: [\d,]+ bytes expected"),
        (with_header(7, 7), "padded_vocab_size is 7, vocab_size 115"),
        (b"", "magic 20240326 expected, 0 found"),
    ):
        path.write_bytes(content)
        refuse(path, message)


def test_no_network_says_how_to_get_the_model(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from gptkern.gpt import GPT; GPT.from_pretrained('openai-community/gpt2', revision='v1')",
        ],
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    message = done.stderr.splitlines()[-1]
    assert message.startswith("gptkern.checkpoint.errors.CheckpointError: openai-community/gpt2: ")
    assert "offline mode is enabled" in message
    assert "`hf download openai-community/gpt2 --revision v1`" in message


def test_json_that_no_configuration_is(folder: Path) -> None:
    path = folder / "config.json"
    for content, message in (
        ("[" * 100_000, "not readable as JSON"),
        ('{"a":' * 50_000, "not readable as JSON"),
        ('{"n_layer": ' + "9" * 5000 + "}", "not readable as JSON"),
        ('{"model_type": "gpt2", "n_embd": 1e400}', "n_embd is inf; a positive integer"),
        ('{"model_type": "gpt2", "eos_token_id": ' + "[" * 50 + "]" * 50 + "}", "eos_token_id is"),
        ('{"model_type": "gpt2", "x": ' + "[" * 400 + "]" * 400 + "}", "more than 100 deep"),
        ("\x00", "not readable as JSON"),
        (" " * ((16 << 20) + 1), "16,777,217 bytes found; at most 16,777,216 are read"),
    ):
        path.write_text(content)
        refuse(folder, message)
    path.write_bytes(b"\xff\xfe{}")
    refuse(folder, "not readable as JSON")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "ckpt.pt", "gpt2.bin"])
def test_only_regular_files_are_opened(folder: Path, name: str) -> None:
    """A FIFO would wait for ever, a device never end."""
    path = folder / name
    target = path if name in ("ckpt.pt", "gpt2.bin") else folder
    # a weights file that is none is not there, as in transformers
    messages = "a regular file is needed|no weights here|cannot be opened|no such file"
    path.unlink(missing_ok=True)
    for make in (
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("/dev/random"),
        lambda: path.symlink_to(path),
    ):
        make()
        refuse(target, messages)
        path.unlink()


def test_index_names(folder: Path) -> None:
    index = shard(folder)
    weight_map = json.loads(index.read_text())["weight_map"]
    first = next(iter(weight_map))
    for name, message in (
        ("x" * 100_000, "points outside its folder, to 'x+...x+'; a plain file name"),
        ("\ud800.safetensors", "points outside its folder"),
        ("a\x00b.safetensors", "points outside its folder"),
        ("\x1b]0;t\x07.safetensors", "points outside its folder"),
    ):
        edit_json(index, weight_map=weight_map | {first: name})
        with pytest.raises(CheckpointError, match=message) as error:
            GPT.from_pretrained(folder)
        assert len(str(error.value)) < 500
        assert str(error.value).isprintable()


def test_paths() -> None:
    refuse("~nosuchuser/x", "nosuchuser/x.*: cannot be opened: Could not determine home directory")
    refuse("a/" * 50_000, "cannot be opened: .*File name too long")
    refuse("/" + "x" * 100_000, "cannot be opened: .*File name too long")
    refuse("a\x00b", "no such file or folder")


def test_messages_are_short_and_show_no_control_characters() -> None:
    message = str(CheckpointError("a\x1b]52;c;x\x07\ud800b\n" + "é" * 10_000 + "end"))
    assert message.startswith("a\\x1b]52;c;x\\x07\\ud800b\né") and message.endswith("end")
    assert len(message) < 2100


def test_many_tensors(folder: Path) -> None:
    """Empty tensors by the thousand are refused at once; a header beyond its limit is not read."""
    path = folder / "model.safetensors"
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for count, message in ((20_000, "2 layers expected, 0 found"), (300_000, "at most 16,777,216 are read")):
        encoded = json.dumps({f"transformer.x{i}": entry for i in range(count)}).encode()
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded)
        began = time.process_time()
        refuse(folder, message)
        assert time.process_time() - began < 5
    path.write_bytes((2).to_bytes(8, "little") + b"[]")
    refuse(folder, "the safetensors header is malformed: an object is needed, list found")
    twice = b'{"a":' + json.dumps(entry).encode() + b',"a":' + json.dumps(entry).encode() + b"}"
    path.write_bytes(len(twice).to_bytes(8, "little") + twice)
    refuse(folder, "a name is in it twice")


def test_info_of_a_bomb(folder: Path) -> None:
    """``gptkern info`` makes no model of so many layers, and says so."""
    from gptkern.cli.info import describe

    facts = describe(str(folder))
    assert facts["parameters"] == sum(p.numel() for p in reference().parameters())
    edit_json(folder / "config.json", n_layer=2**31 - 1)
    with pytest.raises(CheckpointError, match="2147483647 layers expected, 2 found"):
        describe(str(folder))
