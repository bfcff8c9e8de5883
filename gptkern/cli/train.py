"""``gptkern train``: pre-train and fine-tune from a configuration file."""

from __future__ import annotations

import signal
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptkern.cli import terminal
from gptkern.durable import no_link

if TYPE_CHECKING:
    from gptkern.train import Settings


def _show_settings(value: bool) -> None:
    if value:
        from gptkern.train.reference import reference

        print(reference(), end="")
        raise typer.Exit


def train(
    config: Annotated[
        Path,
        typer.Argument(
            help="A TOML file, or one that comes with gptkern: shakespeare_char_cpu, shakespeare_char_gpu, "
            "gpt2_124m."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The run's folder: log, checkpoints, model.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(help="The data, in place of [data] path: files (repeatable) or a folder of shards."),
    ] = None,
    val_data: Annotated[
        list[Path] | None, typer.Option(help="Held-out data, in place of [data] val_path.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Train steps, in place of [train] steps.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N, in place of [train] device.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="Only find a learning rate: a range test and its plot.")
    ] = False,
    find_batch: Annotated[
        bool, typer.Option("--find-batch", help="Only find the largest and the fastest batch that fits.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print evaluations as lines, without a progress bar.")
    ] = False,
    show_settings: Annotated[
        bool,
        typer.Option(
            "--show-settings",
            is_eager=True,
            callback=_show_settings,
            help="Print every key of a TOML file with its default and meaning, and exit.",
        ),
    ] = False,
) -> None:
    """Train a model as CONFIG says, into the folder --out.

    The folder gets log.jsonl, checkpoints, model (the newest weights) and best (those of the lowest held-out
    loss); both open with `gptkern generate --model`. SIGTERM and Ctrl-C save and exit (143 and 130);
    --resume goes on.

    Examples:

    - `gptkern train shakespeare_char_cpu --data story.txt --out runs/story` takes any text; below
      about 100 kB it learns little

    - `gptkern train --show-settings > my.toml` begins a configuration of your own

    - `gptkern train CONFIG.toml --out runs/a --find-lr` recommends a learning rate

    - `torchrun --nproc-per-node 8 -m gptkern train CONFIG.toml --out runs/a` trains on eight GPUs
    """
    from gptkern.train import Settings
    from gptkern.train import train as run
    from gptkern.train.shipped import config_file

    settings = _changed(Settings.from_file(config_file(config)), data, val_data, steps, device)
    if find_lr:
        _find_lr(settings, out)
    if find_batch:
        _find_batch(settings, out)
    if not (find_lr or find_batch):
        result = run(settings, out, resume=resume, shown=True, bar=not quiet)
        if not result.finished:
            # As a shell tells a program that a signal ended, so that `train && next` does not go on.
            raise typer.Exit(128 + (result.signal or signal.SIGINT))


def _changed(
    settings: Settings,
    data: list[Path] | None,
    val_data: list[Path] | None,
    steps: int | None,
    device: str | None,
) -> Settings:
    if data:
        settings = settings.replace("data", path=[str(path) for path in data])
    if val_data:
        settings = settings.replace("data", val_path=[str(path) for path in val_data])
    if steps is not None:
        settings = settings.replace("train", steps=steps)
    if device is not None:
        settings = settings.replace("train", device=device)
    return settings


def _find_lr(settings: Settings, out: Path) -> None:
    from gptkern.train.find import TRIES, find_lr
    from gptkern.train.plot import plot_lr

    out.mkdir(parents=True, exist_ok=True)
    picture = no_link(out / "find_lr.png")
    with terminal.progress("range test", TRIES) as advance:
        found = find_lr(settings, out, advance=advance)
    where = "no plot of the test, which needs matplotlib: pip install 'gptkern[train]'"
    if find_spec("matplotlib") is not None:
        plot_lr(found.rates, found.losses, found.suggestion, picture)
        where = f"the test: {picture}"
    terminal.write(f"recommended: [optimizer] lr = {found.suggestion:.1e} ({where})")


def _find_batch(settings: Settings, out: Path) -> None:
    from gptkern.train.find import find_batch

    out.mkdir(parents=True, exist_ok=True)
    found = find_batch(settings, out, tell=print)
    largest = max(found.speeds)
    reasons = {
        "memory": "the largest that fits",
        "batch_size": "[train] batch_size, beyond which a step has no sequences",
        "time": "where the search ended, after a minute; larger ones may fit",
    }
    print(f"recommended: [train] micro_batch_size = {found.suggestion}; {largest} is {reasons[found.limit]}")
