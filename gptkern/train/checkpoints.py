"""A run's checkpoints: each a folder that appears whole or not at all.

``checkpoints/step-00000500`` holds the model (``config.json``, ``model.safetensors``, the tokenizer: what
``GPT.from_pretrained`` and transformers open), ``state`` (weights and optimizer as they are trained; any
number of processes can read it), ``run.json``, and ``contents.json``: the other files' sizes and
checksums, which show a damaged checkpoint. It is written under another name, flushed, and renamed.
The data's position and the random numbers follow from the seed and the step, so the step is all that has
to be kept of them.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptkern.checkpoint.errors import CheckpointError
from gptkern.checkpoint.files import LARGEST_JSON, read_bytes, read_json
from gptkern.checkpoint.locate import LABELS
from gptkern.checkpoint.save import save
from gptkern.checkpoint.storage import write_safetensors
from gptkern.durable import flush, identity, make_folder, naming, new_file, write_file
from gptkern.gpt import GPT
from gptkern.train.errors import SettingsError
from gptkern.train.processes import Processes, whole
from gptkern.train.state import read_state, state_tensors, write_state

NOTES = "run.json"
_CONTENTS = "contents.json"
_STEP, _WRITING, _DAMAGED, _STATE = "step-", "writing-", "damaged-", "state"


@dataclass(frozen=True)
class Checkpoint:
    """One that was written whole."""

    folder: Path
    step: int
    best: float
    settings: dict[str, Any]


def plain_model(model: GPT) -> GPT:
    """A copy on the CPU with low-rank updates merged and shards gathered; every process must ask."""
    with torch.device("meta"):
        copy = GPT(model.config)
    for name, _ in list(copy.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        with torch.no_grad():
            value = whole(getattr(model.get_submodule(owner), leaf)).detach().cpu()
        setattr(copy.get_submodule(owner), leaf, nn.Parameter(value))
    if model.config.tie_word_embeddings:
        copy.lm_head.weight = copy.transformer.wte.weight
    copy.take_settings(model)
    return copy


def _materialise(optimizers: list[torch.optim.Optimizer]) -> None:
    """Give every optimizer its state tensors, as a first step does; weights do not move.

    Their values are read from the checkpoint right after.
    """
    for optimizer in optimizers:
        peak_rates = [(group, group["lr"]) for group in optimizer.param_groups]
        for group, _ in peak_rates:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for group, rate in peak_rates:
            group["lr"] = rate


class Store:
    """The checkpoints in a run's folder."""

    def __init__(self, folder: Path, keep: int, group: Processes) -> None:
        self.root, self.keep, self.group = folder / "checkpoints", keep, group
        self.passed_over: dict[Path, str] = {}

    def folders(self) -> list[Path]:
        """The checkpoints' folders, oldest first."""
        found = [folder for folder in self.root.glob(f"{_STEP}*") if _number(folder) >= 0]
        return sorted(found, key=_number)

    def newest(self) -> Checkpoint | None:
        """The newest that is whole, by its files' sizes and checksums; None where there is none at all.

        ``passed_over`` then says which newer ones are not; every process must ask.

        Raises:
            CheckpointError: There are checkpoints, and none is whole.
        """
        folders = self.folders()
        if not folders:
            return None
        chosen = 0
        if self.group.first:
            for folder in reversed(folders):
                try:
                    _check_whole(folder)
                    chosen = _number(folder)
                    break
                except CheckpointError as error:
                    self.passed_over[folder] = str(error)
            else:
                reasons = "; ".join(self.passed_over.values())
                raise CheckpointError(f"{self.root}: no checkpoint is whole: {reasons}")
        number = int(self.group.total(float(chosen))[0])
        return _read_notes(next(folder for folder in folders if _number(folder) == number))

    def save(
        self,
        step: int,
        objective: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        notes: dict[str, Any],
    ) -> Path:
        """Write a checkpoint; every process must call. Old ones beyond ``keep`` go once it is whole.

        Raises:
            OSError: It could not be written (a full disk); those before it are untouched.
        """
        final = self.root / f"{_STEP}{step:08}"
        staging = self.root / f"{_WRITING}{step:08}"
        if self.group.first:
            shutil.rmtree(staging, ignore_errors=True)
            make_folder(staging / _STATE)
        self.group.barrier()
        try:
            self._write_state(staging / _STATE, state_tensors(objective, optimizers))
            export(objective, staging, self.group)
            if self.group.first:
                write_file(staging / NOTES, json.dumps({"step": step, **notes}, indent=1))
                write_file(staging / _CONTENTS, json.dumps(_identities(staging), indent=1))
                flush(staging / _STATE)
                flush(staging)
                self._put(staging, final)
        except BaseException:
            if self.group.first:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        if self.group.first:
            for old in self.folders()[: -self.keep]:
                # Renamed first: a folder half removed must not look like a checkpoint.
                with naming(old):
                    os.rename(old, gone := self.root / f"{_WRITING}{old.name}")
                    shutil.rmtree(gone)
        self.group.barrier()
        return final

    def _write_state(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Every process's part; where one could not write its own, all of them say so."""
        problem = None
        try:
            write_state(folder, tensors, self.group.rank)
        except OSError as error:
            problem = error
        if self.group.total(float(problem is not None))[0]:
            raise problem or OSError(errno.EIO, "another process could not write its part", str(folder))

    def _put(self, staging: Path, final: Path) -> None:
        """Give a whole checkpoint its name; one that has it, and was passed over for damage, goes."""
        before = self.root / f"{_WRITING}{final.name}"
        with naming(final):
            if final.exists():
                shutil.rmtree(before, ignore_errors=True)
                os.rename(final, before)
            os.rename(staging, final)
            flush(self.root)
            shutil.rmtree(before, ignore_errors=True)

    def load(
        self, checkpoint: Checkpoint, objective: nn.Module, optimizers: list[torch.optim.Optimizer]
    ) -> None:
        """Put a checkpoint's state into place; saved by however many processes."""
        _materialise(optimizers)
        read_state(checkpoint.folder / _STATE, state_tensors(objective, optimizers))

    def clear_unfinished(self) -> None:
        """Remove what a kill left half written, and put aside what was passed over."""
        if self.group.first:
            for folder in self.root.glob(f"{_WRITING}*"):
                shutil.rmtree(folder)
            for folder in self.passed_over:
                aside = self.root / f"{_DAMAGED}{folder.name}"
                shutil.rmtree(aside, ignore_errors=True)
                with naming(folder):
                    os.rename(folder, aside)


def export(objective: nn.Module, folder: Path, group: Processes) -> None:
    """Write the model as ``GPT.from_pretrained`` opens it, with a classifier's head beside it."""
    model = objective.model
    assert isinstance(model, GPT)
    copy = plain_model(model)
    head = getattr(objective, "head", None)
    weights = {} if head is None else {n: whole(p).detach().cpu() for n, p in head.named_parameters()}
    if not group.first:
        return
    beside = {}
    if weights:
        packed = io.BytesIO()
        write_safetensors(packed, [(name, tensor, None) for name, tensor in weights.items()])
        labels = json.dumps(getattr(objective, "labels", [])).encode()
        beside = {"classifier.safetensors": packed.getvalue(), LABELS: labels}
    save(copy, folder, max_shard_size="5GB", beside=beside)


def _number(folder: Path) -> int:
    """The step in a checkpoint's name; -1 where there is none."""
    digits = folder.name.removeprefix(_STEP)
    return int(digits) if digits.isascii() and digits.isdigit() else -1


def _identities(folder: Path) -> dict[str, list[int]]:
    """Sizes and checksums of the files in a folder and those below it, by relative name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and (known := identity(path)) is not None:
            found[str(path.relative_to(folder))] = list(known)
    return found


def _check_whole(folder: Path) -> None:
    """Compare a checkpoint's files with what it says of them.

    Raises:
        CheckpointError: One is missing or another; the message names it.
    """
    wanted = read_json(folder / _CONTENTS)
    try:
        found = _identities(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error
    for name, written in wanted.items():
        if name not in found:
            raise CheckpointError(f"{folder / name}: missing")
        if found[name] != written:
            raise CheckpointError(
                f"{folder / name}: damaged: size and checksum are {found[name]}; {written} were written"
            )


def _read_notes(folder: Path) -> Checkpoint:
    path = folder / NOTES
    try:
        notes = json.loads(read_bytes(path, LARGEST_JSON))
        step, best, settings = notes["step"], notes["best"], notes["settings"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not the notes of a run: {error!r}") from error
    if type(step) is not int or type(best) is not float or not isinstance(settings, dict):
        raise CheckpointError(f"{path}: not the notes of a run: step {step!r}, best {best!r}")
    return Checkpoint(folder, step, best, settings)


def check_writable(folder: Path, bytes_needed: int) -> None:
    """Say at the start that a run could not be saved.

    Raises:
        SettingsError: ``folder`` cannot be made or written, or its disk has less than ``bytes_needed`` free.
    """
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"{folder} is a file; the run needs a folder")
    try:
        make_folder(folder)
        probe = folder / f".probe-{os.getpid()}"
        with new_file(probe) as file:
            file.write(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise SettingsError(f"{folder} cannot be written: {error.strerror or error}") from error
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise SettingsError(
            f"{folder}: {free / 1e9:.1f} GB are free; the run's checkpoints need "
            f"{bytes_needed / 1e9:.1f} GB: free some, or keep fewer ([checkpoint] keep)"
        )
