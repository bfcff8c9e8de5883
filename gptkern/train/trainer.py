"""The training loop: step, log, evaluate, save; it stops when asked to, or when the loss is no number."""

from __future__ import annotations

import contextlib
import errno
import math
import shlex
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gptkern.durable import no_link
from gptkern.train.assemble import Objective, assemble
from gptkern.train.checkpoints import Store, check_writable, export, plain_model
from gptkern.train.data import Batch
from gptkern.train.errors import SettingsError
from gptkern.train.evaluate import computing, evaluate, sample_texts
from gptkern.train.lock import locked
from gptkern.train.logs import Log, Progress, Speed, flops_per_token, peak_flops
from gptkern.train.objective import Classification
from gptkern.train.optimizers import make_optimizers, set_learning_rate
from gptkern.train.processes import Processes, no_sync, processes, spread, whole
from gptkern.train.resume import check_same_model, check_same_run
from gptkern.train.schedule import share
from gptkern.train.settings import Settings

# What a run writes into, in its folder; none may lead elsewhere, to somebody's model or checkpoints.
_FOLDERS = ("model", "best", "tokens", "checkpoints")


class DivergedError(RuntimeError):
    """The loss or the gradient became NaN or infinite."""


@dataclass(frozen=True)
class Result:
    """The end of a run.

    Attributes:
        step: Steps that are done.
        finished: Whether these are all; if not, it was asked to stop.
        metrics: The last evaluation.
        signal: The signal that asked this process to stop; 0 where none did.
    """

    step: int
    finished: bool
    metrics: dict[str, float]
    signal: int = 0


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """The random numbers' seed of one step in one process, 64 bits, from a run's seed of 64 bits."""
    # The seed's 24 low bits have a place of their own; the rest are spread over all 64 (zero stays zero).
    packed = (seed << 40) + (step << 12) + rank
    spread_out = (seed >> 24) * 0x9E3779B97F4A7C15
    return (packed ^ spread_out) % (1 << 64)


class _Signals:
    """SIGTERM and Ctrl-C ask for a stop after the current step; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        except ValueError:  # not the main thread: whoever runs it there stops it
            pass
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class _Report:
    """A step's loss, gradient norm and wish to stop, still on the device."""

    step: int
    rows: list[int]
    values: torch.Tensor


class Trainer:
    """A run's parts, and one optimizer step. ``train`` is the whole of a run."""

    def __init__(self, settings: Settings, out: Path, group: Processes) -> None:
        self.settings, self.out, self.group = settings, out, group
        train = settings.train
        if train.batch_size % group.world:
            raise SettingsError(
                f"[train] batch_size is {train.batch_size}; a multiple of {group.world}, "
                "the number of processes, is needed"
            )
        if group.world > 1 and train.strategy == "fsdp" and settings.optimizer.name == "muon":
            raise SettingsError("[optimizer] muon needs whole matrices: use [train] strategy ddp")
        self.source, self.objective = assemble(settings, out, group)
        if train.compile:
            self.objective.compile()
        self.module: nn.Module = spread(self.objective, group, train.strategy)
        self.optimizers = make_optimizers(self.objective, settings.optimizer)
        self.trained = [p for p in self.objective.parameters() if p.requires_grad]

    def step(self, step: int, batch: Batch, stop: bool = False) -> _Report:
        """Train on one step's rows, all processes together."""
        settings, group = self.settings.train, self.group
        set_learning_rate(self.optimizers, share(self.settings.schedule, step, settings.steps))
        # Dropout depends on the step, not on what ran before: a resumed run draws the same.
        torch.manual_seed(dropout_seed(settings.seed, step, group.rank))
        counted = max(1, batch.counted)
        rows = len(batch.rows) // group.world
        mine = batch.part(group.rank * rows, (group.rank + 1) * rows)
        micro = settings.micro_batch_size or rows
        total = torch.zeros((), device=group.device)
        for start in range(0, rows, micro):
            part = mine.part(start, start + micro).to(group.device)
            with no_sync(self.module, start + micro < rows):
                with computing(settings.precision, group.device):
                    loss = self.module(part.ids, part.targets, part.last)
                # Wrappers average over the processes: their number makes a sum of it again.
                (loss * (group.world / counted)).backward()
            total += loss.detach()
        # An infinite bound measures the norm and clips nothing.
        norm = whole(nn.utils.clip_grad_norm_(self.trained, settings.grad_clip or math.inf))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        stopping = torch.tensor(float(stop), device=group.device)
        values = torch.stack([total / counted, norm.float() / group.world, stopping])
        if group.world > 1:
            dist.all_reduce(values)
        return _Report(step, batch.rows, values)


class _Run:
    """A trainer with its files."""

    def __init__(
        self, settings: Settings, out: Path, group: Processes, resume: bool, shown: bool, bar: bool
    ) -> None:
        self.settings, self.out, self.group = settings, out, group
        self.store = Store(out, settings.checkpoint.keep, group)
        if not resume and (begun := self.store.folders()):
            raise SettingsError(
                f"{out} holds a run, {begun[-1].name}: --resume goes on with it; else give another folder"
            )
        newest = self.store.newest()
        if resume and newest is None:
            raise SettingsError(f"{out}: no checkpoint to go on from: begin the run without --resume")
        if newest is not None:
            check_same_run(settings, newest)
        self.trainer = Trainer(settings, out, group)
        if newest is not None:
            check_same_model(self.trainer.objective, newest)
        self.start, self.best = 0, math.inf
        self.store.clear_unfinished()
        if newest is not None:
            self.store.load(newest, self.trainer.objective, self.trainer.optimizers)
            self.start, self.best = newest.step, newest.best
        if group.first:
            check_writable(out, self._bytes_needed())
        self.saved = newest.folder if newest is not None else None
        self.log = Log(out, self.start, settings.log.tensorboard) if group.first else None
        self.progress = Progress(self.start, settings.train.steps, shown and group.first, bar)
        self.speed = Speed()
        self.metrics: dict[str, float] = {}
        self.pending: _Report | None = None
        self.loss = math.nan

    def _bytes_needed(self) -> int:
        """Bytes of the checkpoints to come: trained weights and two optimizer tensors each, and the model."""
        objective = self.trainer.objective
        trained = sum(p.numel() * p.element_size() for p in self.trainer.trained)
        model = sum(p.numel() * p.element_size() for p in objective.parameters())
        missing = max(0, self.settings.checkpoint.keep + 1 - len(self.store.folders()))
        return missing * (3 * trained + model) + 2 * model

    def loop(self) -> Result:
        """Train to the end, or until asked to stop."""
        steps = self.settings.train.steps
        if self.start == steps:
            self.progress.say(f"{self.out} is at step {steps} of {steps}: nothing is left to do")
            return Result(steps, True, self.metrics)
        for problem in self.store.passed_over.values():
            self.progress.say(f"a checkpoint is passed over, and put aside: {problem}")
        self._tell_start()
        self.trainer.objective.train()
        try:
            with _Signals() as signals, self.progress:
                result = self._steps(signals)
        except KeyboardInterrupt:
            self.progress.say(f"stopped at once; {self._last_checkpoint()}")
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(
                error.errno or errno.EIO, f"{reason}; {self._last_checkpoint()}", error.filename
            ) from error
        self._tell_end(result)
        return result

    def _steps(self, signals: _Signals) -> Result:
        steps = self.settings.train.steps
        for step in range(self.start, steps):
            batch = self.trainer.source.training_batch(step, self.settings.train.batch_size)
            report = self.trainer.step(step, batch, bool(signals.received))
            self.speed.add(batch.ids.numel())
            stop = self._read(report)
            self._after(step + 1, stop)
            if stop:
                return Result(step + 1, step + 1 == steps, self.metrics, signals.received)
        return Result(steps, True, self.metrics, signals.received)

    def _last_checkpoint(self) -> str:
        return f"the last checkpoint, {self.saved}, is whole" if self.saved else "there is no checkpoint yet"

    def _tell_start(self) -> None:
        settings, objective = self.settings, self.trainer.objective
        everything = sum(p.numel() for p in objective.parameters())
        trained = sum(p.numel() for p in self.trainer.trained)
        part = "" if trained == everything else f", {trained:,} of them trained"
        processes = f", {self.group.world} processes" if self.group.world > 1 else ""
        context = min(settings.data.context, objective.model.spec.context)
        where = f"on {self.group.device}{processes} in {settings.train.precision}"
        self.progress.say(f"{everything:,} parameters{part}, {where}")
        self.progress.say(f"{self.trainer.source.describe()}; {settings.train.batch_size} x {context} a step")
        self.progress.say(f"steps {self.start + 1:,} to {settings.train.steps:,}, into {self.out}")

    def _tell_end(self, result: Result) -> None:
        if not result.finished:
            self.progress.say(f"stopped at step {result.step} and saved: {self.saved}")
            self.progress.say("to go on: the same command with --resume")
            return
        self.progress.say(f"done: {result.step} steps; the newest weights: {self.out / 'model'}")
        model = self.out / "model"
        if self.settings.checkpoint.best and (self.out / "best").is_dir():
            model = self.out / "best"
            self.progress.say(f"those of the lowest held-out loss, {self.best:.4f}: {model}")
        if isinstance(self.trainer.objective, Classification):
            self.progress.say(f'to classify: gptkern.train.Classification.from_pretrained("{model}")')
        elif self.trainer.objective.model.tokenizer is not None:
            self.progress.say(f"to try it: gptkern generate --model {shlex.quote(str(model))} 'Once'")

    def _read(self, report: _Report) -> bool:
        """Look at a step's numbers; on a GPU at those of the step before, so that it need not wait.

        Returns whether any process was asked to stop.
        """
        if self.group.device.type == "cuda":
            report, self.pending = self.pending or report, report
        return self._look(report)

    def _look(self, report: _Report) -> bool:
        loss, norm, stop = report.values.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
            good = self.saved or "none yet"
            raise DivergedError(
                f"step {report.step + 1}: {what}, with the data's rows {report.rows}; "
                f"nothing of it was saved; the last good checkpoint: {good}"
            )
        self.loss, self.norm = loss, norm
        return bool(stop)

    def _after(self, done: int, stop: bool) -> None:
        """Log, evaluate and save, as far as it is due once ``done`` steps are done."""
        settings = self.settings
        last = done == settings.train.steps

        def due(every: int) -> bool:
            return last or (every > 0 and done % every == 0)

        if due(settings.log.every):
            self._report_step(done)
        if due(settings.eval.every):
            self._evaluate(done)
        if stop or due(settings.checkpoint.every):
            if self.pending is not None:
                self._look(self.pending)
            self._save(done)

    def _report_step(self, done: int) -> None:
        rate = self.speed.take()
        model = self.trainer.objective.model
        spec = model.spec
        positions = (spec.context + spec.position_offset) * spec.width if spec.learned_positions else 0
        parameters = sum(p.numel() for p in model.parameters()) - positions
        peak = peak_flops(self.group.device)
        flops = flops_per_token(parameters, len(spec.layers), spec.q_width, self.settings.data.context)
        utilisation = None if peak is None else rate * flops / (peak * self.group.world)
        self.progress.update(done, self.loss, rate, utilisation)
        if self.log is not None:
            rates = [group["lr"] for o in self.trainer.optimizers for group in o.param_groups]
            extra = {} if utilisation is None else {"mfu": utilisation}
            self.log.write(
                done, loss=self.loss, lr=max(rates), grad_norm=self.norm, tokens_per_s=round(rate, 1), **extra
            )

    def _evaluate(self, done: int) -> None:
        settings, objective = self.settings, self.trainer.objective
        self.metrics = evaluate(
            objective, self.trainer.source, settings.eval, settings.train.precision, self.group
        )
        texts = self._samples(objective)
        if self.metrics:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
            self.progress.say(f"step {done}: {shown}")
            if settings.checkpoint.best and self.metrics["val_loss"] < self.best:
                self.best = self.metrics["val_loss"]
                export(objective, self.out / "best", self.group)
        for text in texts:
            self.progress.say(text)
        if self.log is not None and (self.metrics or texts):
            self.log.write(done, **self.metrics, **({"samples": texts} if texts else {}))
        self.speed.take()

    def _samples(self, objective: Objective) -> list[str]:
        if not self.settings.eval.samples:
            return []
        if self.group.world > 1 and self.settings.train.strategy == "fsdp":
            model = plain_model(objective.model)
            objective = type(objective)(model)  # type: ignore[call-arg]
        texts = sample_texts(objective, self.settings.eval) if self.group.first else []
        self.group.barrier()
        return texts

    def _save(self, done: int) -> None:
        notes = {"best": self.best, "settings": self.settings.to_dict()}
        self.saved = self.store.save(done, self.trainer.objective, self.trainer.optimizers, notes)
        export(self.trainer.objective, self.out / "model", self.group)
        self.speed.take()


def train(
    settings: Settings,
    out: str | Path,
    *,
    resume: bool = False,
    shown: bool = False,
    bar: bool = True,
    started: Callable[[Trainer], None] | None = None,
) -> Result:
    """Run ``settings`` into the folder ``out``.

    It gets ``log.jsonl``, ``checkpoints``, ``model`` (the newest weights) and ``best`` (those of the lowest
    held-out loss), both as ``GPT.from_pretrained`` opens them. SIGTERM and Ctrl-C save and return.

    Args:
        settings: What to do.
        out: The run's folder.
        resume: Go on from its newest checkpoint, which must be there.
        shown: Print progress on standard error.
        bar: With ``shown``, also a bar that moves, where standard error is a terminal.
        started: Called with the trainer before the first step.

    Raises:
        SettingsError: The run cannot start, or another one trains into ``out``; nothing was changed.
        DivergedError: The loss or gradient became NaN or infinite; the last checkpoint is whole.
        CheckpointError: The run's checkpoints are damaged, all of them.
        OSError: A file of the run could not be written; the last checkpoint is whole.
    """
    out = Path(out)
    with processes(settings.train.device) as group, contextlib.ExitStack() as held:
        if group.first:
            check_writable(out, 0)
            held.enter_context(locked(out))
            for name in _FOLDERS:
                no_link(out / name)
        group.barrier()
        # In a call of its own: the model is gone when the group is left.
        return _trained(_Run(settings, out, group, resume, shown, bar), started)


def _trained(run: _Run, started: Callable[[Trainer], None] | None) -> Result:
    try:
        if started is not None:
            started(run.trainer)
        return run.loop()
    finally:
        if run.log is not None:
            run.log.close()
