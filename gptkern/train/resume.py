"""Checks that a run may go on from a checkpoint: the same model, data and LoRA settings as it began with."""

from __future__ import annotations

import json
from pathlib import Path

from gptkern.checkpoint.errors import CheckpointError
from gptkern.checkpoint.files import read_json
from gptkern.checkpoint.locate import LABELS
from gptkern.tokenizer import Tokenizer
from gptkern.train.assemble import Objective
from gptkern.train.checkpoints import NOTES, Checkpoint
from gptkern.train.errors import SettingsError
from gptkern.train.objective import Classification
from gptkern.train.settings import Settings


def check_same_run(settings: Settings, checkpoint: Checkpoint) -> None:
    """A run goes on with the settings of model and data that it began with, and to more steps.

    Raises:
        SettingsError: They differ; the message says in what.
    """
    if settings.train.steps < checkpoint.step:
        raise SettingsError(
            f"{checkpoint.folder}: the run is at step {checkpoint.step} already; [train] steps is "
            f"{settings.train.steps}: give more (--steps) to go on"
        )
    now = settings.to_dict()
    for section in ("model", "data", "lora"):
        before = checkpoint.settings.get(section)
        if not isinstance(before, dict):
            raise CheckpointError(f"{checkpoint.folder / NOTES}: settings have no table {section}")
        for key in (before.keys() | now[section].keys()) - {"path", "val_path", "workers"}:
            began, asked = before.get(key), now[section].get(key)
            if began != asked:
                raise SettingsError(
                    f"[{section}] {key} is {asked!r}; the run of {checkpoint.folder} began with {began!r}"
                )


def check_same_model(objective: Objective, checkpoint: Checkpoint) -> None:
    """The data gives the vocabulary and the labels: they must be those that the weights were trained for.

    Raises:
        SettingsError: They differ; the message says in what.
        CheckpointError: What the run began with cannot be read.
    """
    model, folder = objective.model, checkpoint.folder
    began = read_json(folder / "config.json")
    for name, now in json.loads(json.dumps(model.config.to_dict())).items():
        if name in began and began[name] != now:
            raise _other_data(f"{name} is {now!r}", f"{began[name]!r}", folder)
    before = Tokenizer.find(folder)
    if before is not None and model.tokenizer is not None:
        old, new = _tokens(before), _tokens(model.tokenizer)
        for number in sorted(old.keys() | new.keys()):
            if old.get(number) != new.get(number):
                raise _other_data(f"token {number} is {new.get(number)!r}", f"{old.get(number)!r}", folder)
    if isinstance(objective, Classification):
        try:
            labels = json.loads((folder / LABELS).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{folder / LABELS}: not a classifier's labels: {error}") from error
        if labels != objective.labels:
            raise _other_data(f"labels are {objective.labels}", f"{labels}", folder)


def _tokens(tokenizer: Tokenizer) -> dict[int, str]:
    return {number: token for token, number in tokenizer._backend.get_vocab().items()}


def _other_data(now: str, before: str, folder: Path) -> SettingsError:
    return SettingsError(
        f"{now} with this data and model; the run of {folder} began with {before}: "
        "--resume goes on with the vocabulary and shape that a run began with"
    )
