"""The command line. One module a command, each with one function of the command's name.

A command's module imports torch and whatever is heavy inside its function, so that ``--help`` is quick.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import typer

# name -> the extra of the package that its further dependencies come with
COMMANDS = {
    "generate": "",
    "chat": "",
    "info": "",
    "doctor": "",
    "serve": "serve",
    "train": "train",
    "plot": "train",
    "quantize": "",
    "bench": "bench",
    "profile": "bench",
    "tune": "",
    "inspect": "",
    "verify": "",
}
_INTERRUPTED = 130
# typer carries a copy of click in newer versions, which has no public name.
_UsageProblem: Any = typer.BadParameter.__mro__[2]


def build() -> typer.Typer:
    """The application, with every command whose module is there."""
    app = typer.Typer(
        name="gptkern",
        help="A kernel-accelerated GPT runtime. Start with: gptkern generate 'ROMEO:'",
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
    )
    for name in COMMANDS:
        if find_spec(f"gptkern.cli.{name}") is None:
            continue
        command = getattr(import_module(f"gptkern.cli.{name}"), name)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0, 1 for what could not be done, 2 for a command that makes no sense."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run a command; its exit code. What the user can put right is told in one line."""
    try:
        result = build()(args=arguments or ["--help"], prog_name="gptkern", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except _UsageProblem as error:
        _tell(f"{error.format_message()} (gptkern --help tells more)")
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone: there is nobody to tell, and nothing to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("gptkern"):
            raise
        extra = COMMANDS.get(arguments[0], "")
        package = f"'gptkern[{extra}]'" if extra else error.name
        _tell(f"{arguments[0]} needs {error.name}: pip install {package}")
        return 1
    except (ValueError, OSError, MemoryError) as error:
        _tell(str(error))
        return 1
    except RuntimeError as error:
        # A plain RuntimeError is a fault of the program; those with a name of their own say what is wrong.
        if type(error) is RuntimeError and "GPTKERN_STRICT" not in str(error):
            raise
        _tell(str(error))
        return 1


def _tell(message: str) -> None:
    print(f"gptkern: {' '.join(message.split())}", file=sys.stderr)
