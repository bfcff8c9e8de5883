"""The standard streams: text that a command reads, and text that a person may see."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from gptkern._visible import visible as visible


def write(text: str, end: str = "\n") -> None:
    """Print at once, control characters visible on a terminal."""
    print(visible(text), end=end, flush=True)


def tell(message: object) -> None:
    """Print a message on standard error, in one line."""
    line = " ".join(str(message).split())
    print(f"gptkern: {visible(line, sys.stderr)}", file=sys.stderr, flush=True)


def facts(rows: Iterable[tuple[str, object]]) -> None:
    """Print names and values in two columns; where the terminal is too narrow, a value below its name."""
    pairs = [(name, str(value)) for name, value in rows]
    first = max(len(name) for name, _ in pairs) + 2
    room = shutil.get_terminal_size().columns if _is_terminal(sys.stdout) else None
    if room is None or first + max(len(value) for _, value in pairs) <= room:
        for name, value in pairs:
            write(f"{name:{first}}{value}")
        return
    for name, value in pairs:
        whole = f"{name}: {value}"
        lines = [whole] if len(whole) <= room else [f"{name}:", *textwrap.wrap(value, max(room - 2, 10))]
        write("\n  ".join(lines))


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, where that is a terminal; calling what it yields moves the bar on."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda more: bar.advance(task, more)


def read_text(path: Path) -> str:
    """The text of a file or of a named pipe, without a byte order mark."""
    return _decoded(path.read_bytes(), str(path))


def read_prompt(source: Path | None) -> str:
    """A prompt from a file, or from standard input when None, without the line break that ends its last line.

    Editors and ``echo`` end a text with one; the model is to go on where the words end.

    Raises:
        ValueError: It is not UTF-8.
    """
    text = _decoded(sys.stdin.buffer.read(), "standard input") if source is None else read_text(source)
    return text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")


def waits_for_a_person() -> bool:
    """True if standard input is a terminal."""
    return _is_terminal(sys.stdin)


def open_streams() -> bool:
    """Make the standard streams safe to use; False where there is no standard output.

    A stream that the shell has closed is None in Python, and ``print`` then writes an error message to
    standard output. Characters that a stream's encoding lacks become question marks: they must not end an
    answer half-way.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    return sys.stdout is not None


def flush() -> None:
    """Write what is buffered to standard output, so that a failure is seen before the process ends."""
    try:
        sys.stdout.flush()
    except OSError:
        discard()
        raise


def discard() -> None:
    """Send further output nowhere: Python flushes at exit, and would fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _is_terminal(stream: IO[str] | Any) -> bool:
    return bool(stream.isatty())


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: not UTF-8 text: byte {data[error.start]:#04x} at offset {error.start:,}"
        ) from None
