"""The command-line form of generation options, made from their table, and what a command gives."""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from gptkern.engine.options import TABLE, Option

if TYPE_CHECKING:
    from gptkern.gpt import GPT

Command = Callable[..., None]

Greedy = Annotated[
    bool,
    typer.Option(
        "--greedy",
        help="Take the most likely token each time instead of sampling.",
        rich_help_panel="Sampling",
    ),
]


def generation_options(
    fallback: Mapping[str, Any], *, without: Collection[str] = ()
) -> Callable[[Command], Command]:
    """Put the table's options in place of a command's ``**choices``: the options that the user typed.

    Args:
        fallback: The command's own defaults, which the help tells.
        without: Options that the command settles itself.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        *own, rest = signature.parameters.values()
        assert rest.kind is inspect.Parameter.VAR_KEYWORD
        options = [o for o in TABLE if o.flag is not None and o.name not in without]
        names = {option.name for option in options}

        def run(**values: Any) -> None:
            choices = {name: _plain(values.pop(name)) for name in names}
            command(**values, **{name: value for name, value in choices.items() if value not in (None, [])})

        run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
        parameters = sorted([*own, *(_parameter(option, fallback) for option in options)], key=_panel)
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _panel(parameter: inspect.Parameter) -> int:
    """The help's panel for a parameter: the command's own first."""
    declared = parameter.annotation.__metadata__[0]
    return (None, "Generation", "Sampling").index(declared.rich_help_panel)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, StrEnum) else value


def _parameter(option: Option, fallback: Mapping[str, Any]) -> inspect.Parameter:
    """The command's parameter for an option: None unless given."""
    flag = option.flag
    assert flag is not None
    default = fallback.get(option.name, option.default)
    shown: bool | str = False
    if default not in (None, ()):
        value = f"{default:g}" if isinstance(default, float) else str(default)
        shown = f"the checkpoint's, else {value}" if flag.panel == "Sampling" else value
    least = None if option.range is None or option.range.low < 0 else int(option.range.low)
    declared = typer.Option(
        *flag.names,
        metavar=flag.metavar,
        help=flag.help or option.help,
        # ``generate`` checks numbers of sampling: its errors name the option and the accepted range.
        min=least if flag.panel == "Generation" else None,
        show_default=shown,
        rich_help_panel=flag.panel,
    )
    return inspect.Parameter(
        option.name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=None,
        annotation=Annotated[_type(option) | None, declared],
    )


def _type(option: Option) -> Any:
    if option.flag is not None and option.flag.type is not None:
        return option.flag.type
    if get_origin(option.type) is Literal:
        return StrEnum(option.name, {choice: choice for choice in get_args(option.type)})
    return next(kind for kind in (*get_args(option.type), option.type) if kind is not type(None))


def generation(
    gpt: GPT, fallback: Mapping[str, Any], choices: Mapping[str, Any], *, greedy: bool
) -> dict[str, Any]:
    """Options for ``generate``: the caller's choices, else the checkpoint's, else ``fallback``.

    Args:
        fallback: The command's own defaults.
        choices: The options of ``generate`` that the user typed.
    """
    from gptkern.engine.settings import options_over

    choices = dict(choices)
    if "stop_strings" in choices:
        choices["stop_strings"] = list(map(unescape, choices["stop_strings"]))
    if choices.get("temperature") == 0:
        del choices["temperature"]
        greedy = True
    if greedy or choices.get("num_beams", 1) > 1:
        choices["do_sample"] = False
    seed = choices.pop("seed", None)
    options = options_over(fallback, gpt.generation_config, choices)
    if options.get("do_sample", gpt.generation_config.get("do_sample")):
        # Drawn here, so that it can be told.
        options["seed"] = secrets.randbits(32) if seed is None else seed
    return options


def unescape(text: str) -> str:
    r"""``\n``, ``\t`` and ``\\`` as shells pass them on."""
    parts = text.split("\\\\")
    return "\\".join(part.replace("\\n", "\n").replace("\\t", "\t") for part in parts)
