"""A run's settings: a TOML file, checked before anything starts.

Each table of the file is a dataclass here, each key a field. A key that is not known, a value of
another type or out of its range stops the run with its name and what is accepted.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from gptkern.train.errors import SettingsError, check_names
from gptkern.train.shape import check_model

Section = TypeVar("Section")

KINDS = ("text", "jsonl", "bin", "pairs", "classes")
OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "muon")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
STRATEGIES = ("ddp", "fsdp")
PRECISIONS = ("float32", "bfloat16")
_TYPES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_DEVICE = re.compile(r"(cpu|cuda(:\d{1,3})?)?")


def _one_of(section: str, name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise SettingsError(f"[{section}] {name} is {value!r}; accepted are {', '.join(accepted)}")


def _at_least(section: str, name: str, value: float, least: float, bits: int = 53) -> None:
    if not value >= least:
        raise SettingsError(f"[{section}] {name} is {value}; {least} or more is needed")
    # Whole numbers go into arithmetic of 64 bits, products of two of them too.
    if isinstance(value, int) and value >= 1 << bits:
        raise SettingsError(f"[{section}] {name} is {value}; a number below 2^{bits} is needed")


def _finite(section: str, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise SettingsError(f"[{section}] {name} is {value}; a finite number is needed")


def _share(section: str, name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise SettingsError(f"[{section}] {name} is {value}; 0 <= {name} < 1 is needed")


@dataclass(frozen=True)
class DataSettings:
    """The training data.

    Attributes:
        kind: What the files are: ``text`` (plain text), ``jsonl`` (a document a line), ``bin`` (shards of
            token ids, nanoGPT's or llm.c's), ``pairs`` (JSONL of prompts and answers; the loss is that of the
            answers alone), ``classes`` (JSONL of texts and labels; trains a classifier).
        path: The files, or a folder of ``train*.bin`` and ``val*.bin``. ``--data`` stands in for it.
        val_path: Held-out files. Without them the last ``val_fraction`` of the data is held out.
        val_fraction: Share of the data that is held out where ``val_path`` is empty.
        tokenizer: ``char`` (one token a character of the text), ``bytes``, a folder or a hub id; ``""`` takes
            the tokenizer of the model that [model] from names; a new model needs one of the others.
        context: Tokens of one training sequence.
        text_key, prompt_key, answer_key, label_key: Names in the lines of JSONL.
        separator: Text between a prompt and its answer.
        end: Text after an answer where the tokenizer has no end-of-text token.
        workers: Processes that tokenise; 0 starts one for each core.
    """

    kind: str = "text"
    path: list[str] = field(default_factory=list)
    val_path: list[str] = field(default_factory=list)
    val_fraction: float = 0.1
    tokenizer: str = ""
    context: int = 1024
    text_key: str = "text"
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    label_key: str = "label"
    separator: str = "\n"
    end: str = "\n"
    workers: int = 0

    def __post_init__(self) -> None:
        _one_of("data", "kind", self.kind, KINDS)
        _share("data", "val_fraction", self.val_fraction)
        _at_least("data", "context", self.context, 1)
        _at_least("data", "workers", self.workers, 0)


@dataclass(frozen=True)
class TrainSettings:
    """Length, batches and arithmetic of the run.

    Attributes:
        steps: Train steps: updates of the weights.
        batch_size: Sequences of one step, all processes together.
        micro_batch_size: Sequences of one forward pass in one process; a step adds up as many passes as it
            needs. 0 takes all of a process's share at once. ``--find-batch`` tries sizes out.
        precision: ``float32``, or ``bfloat16``: computes in it (autocast); weights and optimizer stay fp32.
        grad_clip: Largest norm of the gradient; 0 does not clip.
        z_loss: Weight of ``logsumexp(logits)**2`` in the loss (``ops.linear_cross_entropy``); 0 is off.
        label_smoothing: Share of each target that is spread over the vocabulary; 0 is off.
        gradient_checkpointing: Recompute each block in the backward pass: less memory, more time.
        compile: Pass the model through ``torch.compile``.
        device: ``cuda``, ``cuda:N`` (one GPU of several) or ``cpu``; ``""`` takes a GPU where there is one.
        seed: Seed of the weights, the order of the data and dropout, from 0 to 2^64 - 1.
        strategy: With several processes, ``ddp`` (each holds the whole model) or ``fsdp`` (each a part).
    """

    steps: int = 1000
    batch_size: int = 32
    micro_batch_size: int = 0
    precision: str = "float32"
    grad_clip: float = 1.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    gradient_checkpointing: bool = False
    compile: bool = False
    device: str = ""
    seed: int = 0
    strategy: str = "ddp"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            _at_least("train", name, getattr(self, name), 1)
        for name in ("micro_batch_size", "grad_clip", "z_loss"):
            _at_least("train", name, getattr(self, name), 0)
        _finite("train", "z_loss", self.z_loss)
        _at_least("train", "seed", self.seed, 0, bits=64)
        _share("train", "label_smoothing", self.label_smoothing)
        if not _DEVICE.fullmatch(self.device):
            raise SettingsError(f"[train] device is {self.device!r}; 'cuda', 'cuda:N', 'cpu' or '' is needed")
        _one_of("train", "precision", self.precision, PRECISIONS)
        _one_of("train", "strategy", self.strategy, STRATEGIES)


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer: how a gradient becomes an update.

    Attributes:
        name: ``adamw``, ``adam``, ``sgd``, ``lion``, or ``muon`` (the blocks' matrices; AdamW the rest).
        lr: Peak learning rate; under ``muon`` that of AdamW's part. ``--find-lr`` tries rates out.
        muon_lr: Peak learning rate of the matrices under ``muon``.
        weight_decay: Decay of matrices and embeddings; biases and norms have none.
        beta1: Decay of the gradient's mean in ``adamw`` and ``adam``; momentum's share in ``lion``'s update.
        beta2: Decay of the squared gradient's mean in ``adamw`` and ``adam``; of the momentum in ``lion``.
        eps: Added to the denominator in ``adamw`` and ``adam``.
        momentum: Momentum of ``sgd`` and ``muon``.
    """

    name: str = "adamw"
    lr: float = 3e-4
    muon_lr: float = 0.02
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95

    def __post_init__(self) -> None:
        _one_of("optimizer", "name", self.name, OPTIMIZERS)
        for name in ("lr", "muon_lr", "weight_decay", "eps"):
            _at_least("optimizer", name, getattr(self, name), 0)
            _finite("optimizer", name, getattr(self, name))
        for name in ("beta1", "beta2", "momentum"):
            _share("optimizer", name, getattr(self, name))


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate over the run.

    Attributes:
        name: ``constant``, ``linear``, ``cosine``, or ``wsd`` (warm up, stay, decay linearly at the end).
        warmup: Steps in which the rate rises from 0 to its peak.
        final: Last learning rate, as a share of the peak.
        decay: Steps of the decay in ``wsd``; 0 takes a fifth of the run.
    """

    name: str = "cosine"
    warmup: int = 0
    final: float = 0.1
    decay: int = 0

    def __post_init__(self) -> None:
        _one_of("schedule", "name", self.name, SCHEDULES)
        for name in ("warmup", "final", "decay"):
            _at_least("schedule", name, getattr(self, name), 0)
        _finite("schedule", "final", self.final)


@dataclass(frozen=True)
class EvalSettings:
    """Evaluation on held-out data while training.

    Attributes:
        every: Steps from one evaluation to the next; 0 evaluates at the end only.
        tokens: Held-out tokens that are scored, from the beginning; 0 scores all of them.
        batch_size: Sequences that are scored at once.
        samples: Texts to generate at each evaluation; they are shown and logged.
        sample_tokens: Tokens of each of these texts.
        sample_prompt: Text that they continue.
    """

    every: int = 250
    tokens: int = 0
    batch_size: int = 64
    samples: int = 0
    sample_tokens: int = 64
    sample_prompt: str = "\n"

    def __post_init__(self) -> None:
        for name in ("every", "tokens", "samples", "sample_tokens"):
            _at_least("eval", name, getattr(self, name), 0)
        _at_least("eval", "batch_size", self.batch_size, 1)


@dataclass(frozen=True)
class CheckpointSettings:
    """Saved states of the run; ``--resume`` goes on from the newest.

    Attributes:
        every: Steps from one checkpoint to the next; 0 saves only at the end and when the run is stopped.
        keep: Checkpoints that stay on the disk, the newest ones.
        best: Also keep the model with the lowest held-out loss, in the folder ``best``.
    """

    every: int = 500
    keep: int = 2
    best: bool = True

    def __post_init__(self) -> None:
        _at_least("checkpoint", "every", self.every, 0)
        _at_least("checkpoint", "keep", self.keep, 1)


@dataclass(frozen=True)
class LogSettings:
    """The run's log.

    Attributes:
        every: Steps from one line of ``log.jsonl`` to the next.
        tensorboard: Also write TensorBoard's events, into the folder ``tensorboard``; needs its package:
            ``pip install 'gptkern[train]'``.
    """

    every: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _at_least("log", "every", self.every, 1)


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adaptation of a trained model: [model] from must name one.

    Attributes:
        rank: Rank of the update; 0 is off and trains all weights.
        alpha: Scale of the update, which is ``alpha / rank * B @ A``.
        targets: Ends of the names of the matrices that are adapted.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: ["attn.c_attn", "attn.c_proj"])

    def __post_init__(self) -> None:
        _at_least("lora", "rank", self.rank, 0)
        _finite("lora", "alpha", self.alpha)
        if not self.targets:
            raise SettingsError("[lora] targets is empty; ends of matrices' names are needed, as attn.c_attn")


@dataclass(frozen=True)
class Settings:
    """A run's settings, a table of its TOML file each; ``gptkern train --show-settings`` explains every key.

    Attributes:
        model: ``from``, the checkpoint to begin with; or the shape of a new model: fields of ``GPTConfig``,
            or ``family`` and fields of that family's ``config.json``; and ``dropout`` for all its rates.
        data: The training data.
        train: Length, batches and arithmetic.
        optimizer: How a gradient becomes an update.
        schedule: The learning rate over the run.
        eval: Evaluation on held-out data.
        checkpoint: Saved states of the run.
        log: The run's log.
        lora: Low-rank adaptation.

    Raises:
        SettingsError: A value is out of its range, or two exclude each other; the message names them.
    """

    model: dict[str, Any] = field(default_factory=dict)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    log: LogSettings = field(default_factory=LogSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)

    def __post_init__(self) -> None:
        check_model(self.model, self.data.context)
        if "from" not in self.model and self.lora.rank:
            raise SettingsError("[lora] adapts a trained model: [model] from is needed")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Settings:
        """Settings from nested tables.

        Raises:
            SettingsError: An unknown name, a wrong type or a value out of range.
        """
        hints = get_type_hints(cls)
        check_names("", data, set(hints))
        for name, table in data.items():
            if not isinstance(table, dict):
                raise SettingsError(f"{name} is {table!r}; a table [{name}] is needed")
        tables: dict[str, Any] = {
            name: dict(table) if name == "model" else _section(hints[name], name, table)
            for name, table in data.items()
        }
        return cls(**tables)

    @classmethod
    def from_file(cls, path: str | Path) -> Settings:
        """Settings from a TOML file.

        Raises:
            SettingsError: It cannot be read; see ``from_dict`` for the rest.
        """
        try:
            return cls.from_dict(tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise SettingsError(f"{path}: {error.strerror or error}") from error
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            hint = "" if Path(path).suffix == ".toml" else "; a text to train on is given by --data"
            raise SettingsError(f"{path}: no TOML: {error}{hint}") from error
        except SettingsError as error:
            raise SettingsError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """``from_dict`` reads it back to equal settings."""
        return dataclasses.asdict(self)

    def replace(self, section: str, **changes: Any) -> Settings:
        """A copy with some keys of one table changed."""
        return dataclasses.replace(self, **{section: dataclasses.replace(getattr(self, section), **changes)})


def _section(cls: type[Section], name: str, table: dict[str, Any]) -> Section:
    hints = get_type_hints(cls)
    check_names(f"[{name}] ", table, set(hints))
    return cls(**{key: _typed(f"[{name}] {key}", value, hints[key]) for key, value in table.items()})


def _typed(where: str, value: Any, kind: Any) -> Any:
    if get_origin(kind) is list:
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list) and all(isinstance(item, get_args(kind)[0]) for item in value):
            return value
        raise SettingsError(f"{where} is {value!r}; text, or a list of texts, is needed")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise SettingsError(f"{where} is {value!r}; {_TYPES[kind]} is needed")
    return value
