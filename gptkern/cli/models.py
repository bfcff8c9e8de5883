"""``gptkern models``: what is on this machine, and what can be opened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from gptkern.cli import terminal
from gptkern.cli.info import readable


@dataclass(frozen=True)
class Cached:
    """A model on this machine.

    Attributes:
        name: What ``--model`` takes.
        bytes: What its files take on the disk.
        problem: Why it cannot be opened; "" where nothing speaks against it.
    """

    name: str
    bytes: int
    problem: str


def models(
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the models in the hub's cache, and the kinds of checkpoints that gptkern opens.

    Nothing is downloaded. `gptkern info NAME` tells more of one, `hf download NAME` fetches one.

    Example: `gptkern models`
    """
    found = [_embedded(), *_in_cache()]
    if json_:
        print(json.dumps({"models": [asdict(model) for model in found], "supported": _supported()}))
        return
    width = max(len(model.name) for model in found)
    for model in found:
        note = f"  not supported: {model.problem}" if model.problem else ""
        terminal.write(f"{model.name:{width}}  {readable(model.bytes):>9}{note}")
    terminal.write("\ngptkern opens:")
    for line in _supported():
        terminal.write(f"- {line}")


def _supported() -> list[str]:
    from gptkern.config import MODEL_TYPES
    from gptkern.model.families import FAMILIES

    return [
        f"transformers folders and hub ids of model_type {', '.join((*MODEL_TYPES, *FAMILIES))}",
        "folders that gptkern quantize wrote",
        "nanoGPT's ckpt.pt",
        "llm.c's GPT-2 .bin",
        "GGUF files of gpt2 and llama",
        "folders of gptkern train",
    ]


def _embedded() -> Cached:
    from gptkern.checkpoint.locate import EMBEDDED, locate

    folder = locate(EMBEDDED, revision=None, local_files_only=True)
    return Cached(EMBEDDED, sum(file.stat().st_size for file in folder.iterdir()), "")


def _in_cache() -> Iterator[Cached]:
    # imported here: it takes as long as all the rest of the package
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda repository: repository.repo_id):
        if repository.repo_type == "model":
            snapshots = [revision.snapshot_path for revision in repository.revisions]
            yield Cached(repository.repo_id, repository.size_on_disk, _problem(snapshots))


def _problem(snapshots: list[Path]) -> str:
    """The reason why none of a repository's snapshots can be opened; "" where one can."""
    from gptkern.checkpoint.hf import CONFIG, WEIGHTS
    from gptkern.config import MODEL_TYPES

    problem = f"no {CONFIG} in the cache"
    for folder in snapshots:
        try:
            config = json.loads((folder / CONFIG).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        kind = config.get("model_type", "gpt2") if isinstance(config, dict) else None
        if kind not in MODEL_TYPES:
            problem = f"model_type {kind!r}"
        elif not any((folder / name).exists() for name in WEIGHTS):
            problem = "no weights in the cache"
        else:
            return ""
    return problem
