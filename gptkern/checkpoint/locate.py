"""Finding a checkpoint: a path, a hub id (downloaded once, then cached), or the embedded model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from gptkern.checkpoint.errors import CheckpointError, first_line, shown
from gptkern.checkpoint.hf import (
    CONFIG,
    GENERATION_CONFIG,
    PICKLE,
    PICKLE_INDEX,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    WEIGHTS,
    shard_names,
)

EMBEDDED = "embedded"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)

# Beside a classifier's model: the labels that it tells apart.
LABELS = "labels.json"

_EMBEDDED_FOLDER = Path(__file__).parents[1] / "assets" / "embedded"
_PATIENCE = 10.0  # seconds until the hub counts as out of reach
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FILES = (".pt", ".bin", ".safetensors", ".pkl", ".json", ".gguf", ".toml", ".txt")


def locate(
    path_or_hub_id: str | Path, *, revision: str | None, local_files_only: bool, weights: bool = True
) -> Path:
    """The local folder or file; files of a hub id are fetched first, those alone that are needed.

    Args:
        path_or_hub_id: What exists on this disk is meant before a hub id; ``"embedded"`` is always the
            package's own model.
        revision: Branch, tag or commit of a hub id.
        local_files_only: Look in the hub's cache only, as HF_HUB_OFFLINE=1 does.
        weights: False fetches configuration and tokenizer alone.

    Raises:
        TypeError: The name is no text and no path.
        CheckpointError: It is nowhere; the message says how to get it.
    """
    given: object = path_or_hub_id
    if not isinstance(given, str | os.PathLike):
        kind = type(given).__name__
        raise TypeError(f"the checkpoint's name is {kind}; a folder, a file or a hub id is needed")
    if path_or_hub_id == EMBEDDED:
        if not _EMBEDDED_FOLDER.is_dir():
            raise CheckpointError(f"{_EMBEDDED_FOLDER}: the embedded model is missing: install gptkern again")
        return _EMBEDDED_FOLDER
    if path_or_hub_id == "":
        raise CheckpointError("the checkpoint's name is empty text: give a folder, a file or a hub id")
    try:
        path = Path(path_or_hub_id).expanduser()
        if path.exists():
            return _model_of_run(path)
    # a user that is not there (RuntimeError), a name too long for any file
    except (RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{shown(str(path_or_hub_id))}: cannot be opened: {first_line(error)}"
        ) from error
    name = str(path_or_hub_id)
    if isinstance(path_or_hub_id, Path) or not _HUB_ID.fullmatch(name) or path.suffix in _FILES:
        raise CheckpointError(f"{path}: no such file or folder")
    return _Hub(name, revision, local_files_only).fetch(weights)


def _model_of_run(path: Path) -> Path:
    """A training run's folder stands for its best model, or the newest where no best one is kept."""
    if (path / CONFIG).exists() or not (path / "checkpoints").is_dir():
        return path
    return next((path / name for name in ("best", "model") if (path / name / CONFIG).exists()), path)


class _Hub:
    """One repository of the hub at one revision."""

    def __init__(self, repo_id: str, revision: str | None, local_files_only: bool) -> None:
        self.repo_id, self.revision, self.local_files_only = repo_id, revision, local_files_only

    def fetch(self, weights: bool) -> Path:
        """The folder with the repository's files in the cache."""
        # imported here: it takes as long as all the rest of the package
        import huggingface_hub
        from huggingface_hub.errors import (
            HFValidationError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        self._present: set[str] | None = None
        unreachable: Exception = OfflineModeIsEnabled("local_files_only is set")
        if not self.local_files_only:
            try:
                info = huggingface_hub.model_info(self.repo_id, revision=self.revision, timeout=_PATIENCE)
                self._present = {file.rfilename for file in info.siblings or ()}
            except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
                raise CheckpointError(self._how_to_get(error)) from error
            # no network, or offline mode: each network library and version has errors of its own
            except Exception as error:
                unreachable = error
        config = self._file(CONFIG)
        if config is None:
            if self._present is None:
                raise CheckpointError(self._how_to_get(unreachable)) from unreachable
            raise CheckpointError(f"hub {self.repo_id}: it has no {CONFIG}: not a transformers model")
        self._files((GENERATION_CONFIG, *TOKENIZER_FILES))
        if weights:
            self._fetch_weights()
        return config.parent

    def _fetch_weights(self) -> None:
        for whole, sharded in ((SAFETENSORS, SAFETENSORS_INDEX), (PICKLE, PICKLE_INDEX)):
            if self._file(whole):
                return
            if index := self._file(sharded):
                self._files(shard_names(index))
                return
        place = "in the cache, and the hub is not to be reached" if self._present is None else "there"
        raise CheckpointError(
            f"hub {self.repo_id}: no weights {place}: one of {', '.join(WEIGHTS)} is needed"
        )

    def _files(self, names: Iterable[str]) -> None:
        for name in names:
            self._file(name)

    def _file(self, name: str) -> Path | None:
        """The file in the cache; None where there is none of that name."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        local = self._present is None
        if self._present is not None and name not in self._present:
            return None
        try:
            return Path(hf_hub_download(self.repo_id, name, revision=self.revision, local_files_only=local))
        except LocalEntryNotFoundError as error:
            if local:
                return None
            raise CheckpointError(self._how_to_get(error)) from error
        except Exception as error:
            raise CheckpointError(self._how_to_get(error)) from error

    def _how_to_get(self, error: Exception) -> str:
        revision = f" --revision {self.revision}" if self.revision else ""
        return (
            f"{self.repo_id}: no such file or folder here, and not to be had from the hub "
            f"({type(error).__name__}: {first_line(error)}). On a machine with network, run `hf download "
            f"{self.repo_id}{revision}`; without one, copy the model's folder ({CONFIG}, {SAFETENSORS}, "
            "tokenizer files) from elsewhere and give its path"
        )
