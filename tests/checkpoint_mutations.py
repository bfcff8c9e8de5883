"""Damages checkpoints at random and opens each in a process of its own: it loads right, or says why not.

    python tests/checkpoint_mutations.py --count 10000 --seed 1 [--kind config] [--keep FOLDER]

A case fails where the child ends in anything but a load or a ``CheckpointError``, takes more than 1 GB or 5
seconds of processor time, or loads other weights than safetensors or ``torch.load`` read from the same file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoint_files import reference, write_llmc, write_nanogpt
from safetensors.torch import load_file

import gptkern
from gptkern.checkpoint import CheckpointError
from gptkern.checkpoint.contents import BLOCK_MATRICES
from gptkern.checkpoint.nanogpt import read_meta
from gptkern.cli.info import describe

MEMORY, SECONDS, PATIENCE = 1 << 30, 5, 90
# a forked child has none of its parent's threads, and waits for them for ever
torch.set_num_threads(1)
_FILES = {
    "config": "hf/config.json",
    "generation_config": "hf/generation_config.json",
    "safetensors": "hf/model.safetensors",
    "tokenizer": "hf/tokenizer.json",
    "tokenizer_config": "hf/tokenizer_config.json",
    "special_tokens_map": "bpe/special_tokens_map.json",
    "added_tokens": "bpe/added_tokens.json",
    "vocab": "bpe/vocab.json",
    "merges": "bpe/merges.txt",
    "index": "shards/model.safetensors.index.json",
    "pytorch_model": "pickle/pytorch_model.bin",
    "old_pytorch_model": "old_pickle/pytorch_model.bin",
    "ckpt": "nanogpt/ckpt.pt",
    "meta": "nanogpt/meta.pkl",
    "llmc": "gpt2_124M.bin",
    "quantized_config": "int8/config.json",
    "quantized": "int8/model.safetensors",
}
KINDS = tuple(_FILES)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**400, -(10**400)),
    *(
        0.0,
        -0.5,
        1.5,
        1e308,
        float("inf"),
        float("nan"),
        "",
        "x",
        "gpt2",
        "x" * 100_000,
        "\ud800",
        "\x1b]0;\x07",
    ),
    *("../x", "/etc/passwd", [], {}, [[]], [0], [0, 0, 0], ["F32"], {"content": 3}, {"content": "a"}),
)


def write_originals(folder: Path) -> None:
    """A whole checkpoint of each kind."""
    torch.manual_seed(1)
    hf = reference(vocab_size=300, initializer_range=0.4, pad_token_id=0, activation_function="gelu")
    hf.save_pretrained(folder / "hf")
    gptkern.Tokenizer.bytes().save(folder / "hf")
    for name in ("bpe", "shards", "pickle", "old_pickle"):
        (folder / name).mkdir()
        shutil.copy(folder / "hf/config.json", folder / name)
    shutil.copy(folder / "hf/model.safetensors", folder / "bpe")
    vocab = {chr(97 + i): i for i in range(26)} | {"Ġ": 26, "th": 27, "the": 28, "<|endoftext|>": 29}
    (folder / "bpe/vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "bpe/merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    (folder / "bpe/added_tokens.json").write_text(json.dumps({"<user>": 30, "<end>": 31}))
    special = {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False}
    (folder / "bpe/special_tokens_map.json").write_text(
        json.dumps(
            {"bos_token": special, "eos_token": "<|endoftext|>", "additional_special_tokens": ["<user>"]}
        )
    )
    hf.save_pretrained(folder / "shards", max_shard_size="40KB")
    torch.save(hf.state_dict(), folder / "pickle/pytorch_model.bin")
    torch.save(hf.state_dict(), folder / "old_pickle/pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "nanogpt").mkdir()
    write_nanogpt(folder / "nanogpt/ckpt.pt", hf, bias=True)
    characters = [chr(c) for c in range(32, 332)]
    stoi = {c: i for i, c in enumerate(characters)}
    meta = {"vocab_size": 300, "stoi": stoi, "itos": dict(enumerate(characters))}
    (folder / "nanogpt/meta.pkl").write_bytes(pickle.dumps(meta))
    write_llmc(folder / "gpt2_124M.bin", reference(), 3)
    model = gptkern.GPT.from_pretrained(folder / "hf", weights="int8")
    model.save_pretrained(folder / "int8")


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bits, bytes or a block otherwise, or the end missing."""
    changed = bytearray(data)
    # headers lie at the beginning, a zip's directory at the end
    where = rng.choice(("anywhere", "first bytes", "header", "end"))
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not changed:
            break
        size = len(changed)
        reach = {"anywhere": size, "first bytes": min(size, 64)}.get(where, min(size, 4096))
        at = rng.randrange(reach)
        at = size - 1 - at if where == "end" else at
        how = rng.randrange(7)
        if how < 3:
            changed[at] ^= 1 << rng.randrange(8)
        elif how == 3:
            changed[at] = rng.choice((0, 255, rng.randrange(256)))
        elif how == 4:
            changed[at : at + 8] = rng.choice((0, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little")[
                : len(changed) - at
            ]
        elif how == 5:
            block = changed[at : at + rng.choice((1, 16, 512))]
            changed[at:at] = block
        else:
            del changed[at : at + rng.choice((1, 16, 512))]
    return bytes(changed[: rng.randrange(len(changed) + 1)] if rng.random() < 0.15 else changed)


def damaged_json(text: str, rng: random.Random) -> str:
    """One field of another type or size, missing, renamed or twice there."""
    data = json.loads(text)
    spots = list(_spots(data))
    owner, key = rng.choice(spots)
    how = rng.random()
    if how < 0.15:
        del owner[key]
    elif how < 0.25 and isinstance(owner, dict):
        owner[
            rng.choice(("x", "", "\ud800", "y" * 1000, *(name for _, name in spots if isinstance(name, str))))
        ] = owner.pop(key)
    elif how < 0.35:
        other, other_key = rng.choice(spots)
        owner[key] = json.loads(json.dumps(other[other_key])) if other_key in _keys(other) else None
    elif how < 0.45:
        return json.dumps(data).replace(json.dumps(owner[key]), _nested(rng), 1)
    else:
        owner[key] = rng.choice(_VALUES)
    return json.dumps(data)


def _keys(value: Any) -> Any:
    return value.keys() if isinstance(value, dict) else range(len(value))


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _spots(inner)


def _nested(rng: random.Random) -> str:
    depth = rng.choice((2, 200, 900, 5000, 100_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"content":', "}]")))
    return opening * depth + "1" + closing * depth


def damaged(kind: str, data: bytes, rng: random.Random) -> bytes:
    """A damaged copy of a file of that kind, as bytes."""
    if kind == "merges" or rng.random() < 0.4:
        return damaged_bytes(data, rng)
    if data.startswith(b"{"):
        return damaged_json(data.decode(), rng).encode("utf-8", "surrogatepass")
    if kind in ("safetensors", "quantized"):
        end = 8 + int.from_bytes(data[:8], "little")
        header = damaged_json(data[8:end].decode(), rng).encode("utf-8", "surrogatepass")
        return len(header).to_bytes(8, "little") + header + data[end:]
    if data.startswith(b"PK"):
        return _damaged_zip(data, rng)
    if kind == "llmc":
        at = 4 * rng.randrange(8)
        value = rng.choice((0, -1, 1, 2**31 - 1, -(2**31), rng.randrange(2**31), 122_000))
        return data[:at] + value.to_bytes(4, "little", signed=True) + data[at + 4 :]
    return damaged_bytes(data, rng)


def _damaged_zip(data: bytes, rng: random.Random) -> bytes:
    """A whole archive with one damaged record, the pickle mostly."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(result, "w") as new:
        names = old.namelist()
        chosen = next(n for n in names if n.endswith("data.pkl")) if rng.random() < 0.8 else rng.choice(names)
        for name in names:
            content = old.read(name)
            new.writestr(name, damaged_bytes(content, rng) if name == chosen and content else content)
    return result.getvalue()


def open_all(kind: str, path: Path) -> None:
    """Read that file in every way there is; raise if the result is wrong."""
    if kind == "meta":
        assert sorted(read_meta(path).values()) == list(range(len(read_meta(path))))
        return
    target = path if kind in ("llmc", "ckpt") else path.parent
    model = gptkern.GPT.from_pretrained(target)
    if model.tokenizer is not None:
        model.tokenizer.decode(model.tokenizer.encode("the end"))
    compare(kind, path, model)
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.long))
    if kind == "generation_config":
        with contextlib.suppress(ValueError, TypeError):  # an option that is none is told of where it is used
            model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=1)
    assert describe(str(target))["config"]["n_layer"] == len(model.transformer.h)


def compare(kind: str, path: Path, model: gptkern.GPT) -> None:
    """Compare the weights with those that another library reads from the same file, if it can."""
    try:
        if kind == "safetensors":
            expected = load_file(path)
        elif kind in ("pytorch_model", "old_pytorch_model", "ckpt"):
            expected = torch.load(path, weights_only=True, map_location="cpu")
            expected = expected["model"] if kind == "ckpt" else expected
        else:
            return
    except Exception:
        return
    for name, parameter in model.named_parameters():
        stored = expected.get(name)
        if stored is not None:
            stored = stored.t() if kind != "ckpt" and name.endswith(BLOCK_MATRICES) else stored
            assert torch.equal(parameter.nan_to_num(), stored.to(parameter.dtype).nan_to_num()), (
                f"{name} is wrong"
            )


def in_a_child(action: Callable[[], None]) -> str:
    """The outcome in a process of its own: "loaded", "refused: ...", or what went wrong."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        report = "no report"
        try:
            os.close(reading)
            limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(PATIENCE)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # panics of other libraries
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                action()
            report = "loaded"
        except CheckpointError as error:
            fine = len(str(error)) < 2500 and str(error).strip()
            report = f"refused: {error}" if fine else f"WRONG: a message of {len(str(error))} characters"
        except BaseException:
            report = f"WRONG: {traceback.format_exc(limit=-3)[-1500:]}"
        finally:
            os.write(writing, report.encode("utf-8", "backslashreplace")[:4000])
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        report = pipe.read().decode("utf-8", "replace")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"WRONG: ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return report


def run(
    count: int,
    seed: int,
    kinds: tuple[str, ...] = KINDS,
    keep: Path | None = None,
    until: float | None = None,
) -> tuple[int, int, list[str]]:
    """Open ``count`` damaged checkpoints, or as many as there is time for.

    Returns:
        How many were opened, how many of them loaded, and a report of each that went wrong.
    """
    loaded, wrong, opened = 0, [], 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_originals(folder)
        for kind in kinds:  # in this process, so that its children have everything imported
            open_all(kind, folder / _FILES[kind])
        for number in range(count):
            if until is not None and time.monotonic() > until:
                break
            kind = kinds[number % len(kinds)]
            rng = random.Random(f"{seed} {number} {kind}")
            path = folder / _FILES[kind]
            whole = path.read_bytes()
            path.write_bytes(damaged(kind, whole, rng))
            report = in_a_child(lambda kind=kind, path=path: open_all(kind, path))  # type: ignore[misc]
            opened += 1
            loaded += report == "loaded"
            if not report.startswith(("loaded", "refused")):
                wrong.append(f"{kind}, number {number} of seed {seed}: {report}")
                if keep is not None:
                    keep.mkdir(exist_ok=True)
                    shutil.copy(path, keep / f"{seed}-{number}-{path.name}")
            path.write_bytes(whole)
    return opened, loaded, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS, action="append", help="repeatable; all of them by default")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--keep", type=Path, help="a folder for the files that went wrong")
    arguments = parser.parse_args()
    until = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    kinds = tuple(arguments.kind or KINDS)
    opened, loaded, wrong = run(arguments.count, arguments.seed, kinds, arguments.keep, until)
    print("\n".join(wrong))
    print(
        f"{opened} opened: {loaded} loaded, {opened - loaded - len(wrong)} refused, {len(wrong)} went wrong"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
