"""A run's reports: log.jsonl, TensorBoard, lines and a bar on standard error."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from gptkern._visible import visible
from gptkern.durable import naming, no_link, write_file
from gptkern.train.errors import SettingsError

# Dense bf16 peaks, from the data sheets, by a part of the device's name.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def flops_per_token(parameters: int, layers: int, width: int, context: int) -> float:
    """Forward and backward, as nanoGPT counts: ``6 N + 12 L d T`` (Chowdhery et al. 2022, appendix B).

    ``parameters`` leaves out the position embedding; causal attention is counted whole.
    """
    return 6.0 * parameters + 12.0 * layers * width * context


class Log:
    """A run's log files; on resuming, lines beyond ``step`` are dropped, so that each is there once."""

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self.path = no_link(folder / "log.jsonl")
        _truncate(self.path, step)
        with naming(self.path):
            self._file = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, **values: Any) -> None:
        """A line of ``log.jsonl``, and the numbers to TensorBoard."""
        with naming(self.path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is buffered."""
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``log.jsonl``; a last line that a kill cut off is left out.

    Raises:
        SettingsError: A line is no object with a step.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and rows:
                break
            raise SettingsError(f"{path}, line {number}: not a line of a run's log: {error}") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise SettingsError(f"{path}, line {number}: not a line of a run's log: no step in it")
        rows.append(row)
    return rows


def _truncate(path: Path, step: int) -> None:
    rows = [row for row in read_log(path) if row["step"] <= step]
    if path.exists():
        write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


# Lines that a run without a moving bar writes on its way.
_LINES = 20


class Progress:
    """Lines on standard error, and below them a bar: loss, tokens a second, MFU, the time left.

    MFU is the model FLOP utilisation: the share of the GPU's peak that the model's operations take.

    Args:
        step, steps: How far the run is, and its end.
        shown: False prints nothing.
        bar: False prints the lines alone; so it is also where standard error is no terminal.
    """

    def __init__(self, step: int, steps: int, shown: bool, bar: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.console = Console(stderr=True, quiet=not shown)
        self._bar = Bar(
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (shown and bar and self.console.is_terminal),
        )
        self._task = self._bar.add_task("train", total=steps, completed=step, status="")
        self._steps, self._moves = steps, bar and self.console.is_terminal
        self._last_line_step = step

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float, speed: float, utilisation: float | None) -> None:
        """Move the bar; where none moves, a line at every twentieth of the run."""
        status = f"loss {loss:.4f}  {speed:,.0f} tokens/s"
        if utilisation is not None:
            status += f"  MFU {utilisation:.1%}"
        self._bar.update(self._task, completed=step, status=status)
        if not self._moves and step - self._last_line_step >= self._steps / _LINES:
            self._last_line_step = step
            self.say(f"step {step} of {self._steps}: {status}")

    def say(self, text: str) -> None:
        """A line above the bar. Paths and samples come from anywhere: they must not command a terminal."""
        text = visible(text, self.console.file)
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Speed:
    """Tokens a second since the last asking."""

    def __init__(self) -> None:
        self._tokens, self._since = 0, time.perf_counter()

    def add(self, tokens: int) -> None:
        """Count a step's tokens."""
        self._tokens += tokens

    def take(self) -> float:
        """The rate, and start again."""
        now = time.perf_counter()
        rate = self._tokens / max(now - self._since, 1e-9)
        self._tokens, self._since = 0, now
        return rate
