"""The command line. One module a command, each with one function of the command's name.

A command's module imports torch and whatever is heavy inside its function, so that ``--help`` is quick.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated

import typer

from gptkern.cli import terminal
from gptkern.cli.usage import UsageProblem, in_flags, usage_message

# name -> the extra of the package that its further dependencies come with
COMMANDS = {
    "generate": "",
    "chat": "",
    "serve": "serve",
    "info": "",
    "models": "",
    "doctor": "",
    "train": "train",
    "plot": "train",
    "quantize": "",
    "bench": "bench",
    "profile": "bench",
    "tune": "",
    "inspect": "",
    "pack": "",
    "verify": "transformers",
}
_INTERRUPTED = 130


def _show_version(value: bool) -> None:
    if value:
        import gptkern

        print(f"gptkern {gptkern.__version__}")
        raise typer.Exit


def build() -> typer.Typer:
    """The application, with every command whose module is there."""
    app = typer.Typer(
        name="gptkern",
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name in COMMANDS:
        if find_spec(f"gptkern.cli.{name}") is None:
            continue
        command = getattr(import_module(f"gptkern.cli.{name}"), name)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and exit."),
    ] = False,
) -> None:
    """A kernel-accelerated GPT runtime. Start with: gptkern generate 'ROMEO:'

    Results go to standard output, everything else to standard error. Exit codes: 0 it is done; 1 it could not
    be done, or a check failed; 2 the command line makes no sense; 130 Ctrl-C stopped it, 143 SIGTERM a
    training run.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit.

    The code is 0; 1 for what could not be done; 2 for a command line that makes no sense; 130 for one that
    Ctrl-C ended. Whoever reads the output may go at any time (``| head``): that is no failure.
    """
    if not terminal.open_streams():
        terminal.tell("standard output is closed: there is nowhere to write")
        sys.exit(1)
    warnings.showwarning = _show_warning
    code = run(sys.argv[1:] if arguments is None else arguments)
    try:
        terminal.flush()
    except BrokenPipeError:
        pass
    except OSError as error:
        if code == 0:
            terminal.tell(f"standard output: {error.strerror}")
        code = code or 1
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run a command; its exit code. An error that the user can put right is one line."""
    try:
        result = build()(args=_with_help(arguments), prog_name="gptkern", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        return _interrupted() if code == _INTERRUPTED else code
    except UsageProblem as error:
        command = next((name for name in arguments[:1] if name in COMMANDS), None)
        terminal.tell(usage_message(error, command))
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except SystemExit as error:
        # typer and rich end the process where whoever read the output has gone: there is nobody to tell.
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        terminal.discard()
        return 0
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("gptkern"):
            raise
        extra = COMMANDS.get(arguments[0], "")
        package = f"'gptkern[{extra}]'" if extra else error.name
        terminal.tell(f"{arguments[0]} needs {error.name}: pip install {package}")
        return 1
    except ImportError as error:
        # An extension of another version of gptkern: the message says what to type.
        if not str(error).startswith("gptkern._C"):
            raise
        terminal.tell(error)
        return 1
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        terminal.tell(f"{error.filename}: {error.strerror}" if named else error.strerror or error)
        return 1
    except (ValueError, MemoryError) as error:
        terminal.tell(in_flags(str(error)))
        return 1
    except RuntimeError as error:
        # A plain RuntimeError is a fault of the program; those with a name of their own say what is wrong.
        if type(error) is RuntimeError and "GPTKERN_STRICT" not in str(error):
            raise
        terminal.tell(error)
        return 1


def _with_help(arguments: list[str]) -> list[str]:
    """``gptkern`` and ``gptkern help`` show the help, ``gptkern help COMMAND`` that command's."""
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    return arguments or ["--help"]


def _interrupted() -> int:
    """Ctrl-C's exit code. On a terminal ``^C`` stands in the line, and the shell's prompt begins another."""
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return _INTERRUPTED


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    terminal.tell(f"warning: {in_flags(str(message).removeprefix('gptkern: '))}")
