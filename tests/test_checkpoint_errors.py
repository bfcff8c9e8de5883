"""Every bad checkpoint gets one clear error: file, tensor, expected, found. Nothing in it is executed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import reference, write_llmc, write_nanogpt
from safetensors.torch import load_file, save_file

from gptkern.checkpoint import CheckpointError
from gptkern.model import GPT


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
    refuse(folder, r"config\.json: no such file")


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
        ({"data_offsets": [-8, 8]}, "a: bytes -8 to 8 found"),
        ({"data_offsets": [16, 32]}, "a: bytes 16 to 32 found"),
        ({"dtype": "F8_E4M3"}, "a: dtype F8_E4M3 found; supported are"),
        ({"shape": [-4]}, "a: bytes 0 to 8 found"),
        ({"shape": None}, "malformed"),
    ):
        encoded = json.dumps({"a": header["a"] | entry}).encode()
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(8))
        refuse(folder, message)


def test_config(folder: Path) -> None:
    path = folder / "config.json"
    for changes, message in (
        ({"model_type": "llama"}, r"config\.json: .*model_type is 'llama'; supported are gpt2, openai-gpt"),
        ({"n_head": 5}, r"config\.json: .*n_embd is 32, n_head 5"),
        ({"n_layer": 3}, "3 layers expected, 2 found"),
        ({"n_layer": 10**9}, "1000000000 layers expected, 2 found"),
        ({"n_layer": "2"}, "n_layer is '2'; a positive integer is needed"),
        ({"activation_function": "mish"}, "activation_function is 'mish'; accepted are"),
        ({"add_cross_attention": True}, "add_cross_attention is true"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
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
        lambda t: t.update({"score.weight": torch.ones(2)}),
        r"1 not of a gpt2 model: score\.weight \(in model\.safetensors\)",
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
    refuse(folder, "dtype torch.int8 asked for", dtype=torch.int8)


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
        (whole[:-1], r"truncated: [\d,]+ bytes expected, [\d,]+ found"),
        (whole + b"0", "longer than its header says"),
        (whole[:1000], "truncated: a header of 1024 bytes expected, 1000 found"),
        (with_header(0, 20240520), "magic 20240326 expected, 20240520 found"),
        (with_header(1, 1), r"version 3 \(fp32\) or 5 \(bf16\) expected, 1 found"),
        (with_header(4, -1), "n_layer is -1"),
        (with_header(4, 2**31 - 1), "truncated: num_layers is 2,147,483,647"),
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
            "from gptkern.model import GPT; GPT.from_pretrained('openai-community/gpt2', revision='v1')",
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
