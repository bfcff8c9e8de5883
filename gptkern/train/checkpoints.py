"""A run's checkpoints: each a folder that appears whole or not at all.

``checkpoints/step-00000500`` holds the model (``config.json``, ``model.safetensors``, the tokenizer: what
``GPT.from_pretrained`` and transformers open), ``state`` (weights and optimizer as they are trained, by
torch.distributed.checkpoint: any number of processes can read it) and ``run.json``. It is written
under another name, flushed, and renamed. The data's position and the random numbers follow from the
seed and the step, so the step is all that has to be kept of them.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from gptkern.model import GPT
from gptkern.train.processes import Processes, whole
from gptkern.train.settings import SettingsError

_STEP, _WRITING, _NOTES, _STATE = "step-", "writing-", "run.json", "state"


@dataclass(frozen=True)
class Checkpoint:
    """One that was written whole."""

    folder: Path
    step: int
    notes: dict[str, Any]


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
    copy.tokenizer = model.tokenizer
    return copy


def state_tensors(objective: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Everything that training changes, by name: trained weights, and the optimizers' tensors."""
    names: dict[torch.Tensor, str] = {
        parameter: name for name, parameter in objective.named_parameters() if parameter.requires_grad
    }
    tensors = {f"weights.{name}": parameter.detach() for parameter, name in names.items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{names[parameter]}.{key}"] = value
    return tensors


def _materialise(optimizers: list[torch.optim.Optimizer]) -> None:
    """Give every optimizer its state tensors, as a first step does; weights do not move.

    Their values are read from the checkpoint right after.
    """
    for optimizer in optimizers:
        kept = [(group, group["lr"]) for group in optimizer.param_groups]
        for group, _ in kept:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for group, rate in kept:
            group["lr"] = rate


class Store:
    """The checkpoints in a run's folder."""

    def __init__(self, folder: Path, keep: int, group: Processes) -> None:
        self.root, self.keep, self.group = folder / "checkpoints", keep, group

    def all(self) -> list[Checkpoint]:
        """Oldest first."""
        return sorted(self._found(), key=lambda checkpoint: checkpoint.step)

    def _found(self) -> Iterator[Checkpoint]:
        for folder in self.root.glob(f"{_STEP}*"):
            notes = json.loads((folder / _NOTES).read_text())
            yield Checkpoint(folder, int(notes["step"]), notes)

    def newest(self) -> Checkpoint | None:
        """The one to go on from; None where there is none."""
        found = self.all()
        return found[-1] if found else None

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
            staging.mkdir(parents=True)
        self.group.barrier()
        try:
            _write_state(staging / _STATE, state_tensors(objective, optimizers), self.group)
            export(objective, staging, self.group)
            if self.group.first:
                (staging / _NOTES).write_text(json.dumps({"step": step, **notes}, indent=1))
                _flush_tree(staging)
                if final.exists():
                    shutil.rmtree(final)
                os.rename(staging, final)
                _flush(self.root)
        except OSError:
            if self.group.first:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        if self.group.first:
            for old in self.all()[: -self.keep]:
                # Renamed first: a folder half removed must not look like a checkpoint.
                os.rename(old.folder, gone := self.root / f"{_WRITING}{old.folder.name}")
                shutil.rmtree(gone)
        self.group.barrier()
        return final

    def load(
        self, checkpoint: Checkpoint, objective: nn.Module, optimizers: list[torch.optim.Optimizer]
    ) -> None:
        """Put a checkpoint's state into place; saved by however many processes."""
        _materialise(optimizers)
        with _quiet():
            dcp.load(
                state_tensors(objective, optimizers),
                checkpoint_id=checkpoint.folder / _STATE,
                no_dist=self.group.world == 1,
            )

    def clear_unfinished(self) -> None:
        """Remove what a kill left half written."""
        if self.group.first:
            for folder in self.root.glob(f"{_WRITING}*"):
                shutil.rmtree(folder)


def _write_state(folder: Path, tensors: dict[str, torch.Tensor], group: Processes) -> None:
    with _quiet():
        dcp.save(dict(tensors), checkpoint_id=folder, no_dist=group.world == 1)


def export(objective: nn.Module, folder: Path, group: Processes) -> None:
    """Write the model as ``GPT.from_pretrained`` opens it, with a classifier's head beside it."""
    model = objective.model
    assert isinstance(model, GPT)
    copy = plain_model(model)
    head = getattr(objective, "head", None)
    weights = {} if head is None else {n: whole(p).detach().cpu() for n, p in head.named_parameters()}
    if not group.first:
        return
    copy.save_pretrained(folder)
    if weights:
        from safetensors.torch import save_file

        save_file(weights, str(folder / "classifier.safetensors"))
        (folder / "labels.json").write_text(json.dumps(getattr(objective, "labels", [])))


def check_writable(folder: Path, bytes_needed: int) -> None:
    """Say at the start that a run could not be saved.

    Raises:
        SettingsError: ``folder`` cannot be made or written, or its disk has less than ``bytes_needed`` free.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise SettingsError(f"{folder} cannot be written: {error}") from error
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise SettingsError(
            f"{folder}: {free / 1e9:.1f} GB are free; the run's checkpoints need "
            f"{bytes_needed / 1e9:.1f} GB: free some, or keep fewer ([checkpoint] keep)"
        )


class _quiet(warnings.catch_warnings):
    """torch.distributed.checkpoint warns of running without a process group, which is meant."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", module="torch.distributed")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _flush(path)
    _flush(folder)
