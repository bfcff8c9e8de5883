"""``gptkern serve``: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from gptkern.cli import _options as o
from gptkern.serve.settings import ServeSettings

KEYS_VARIABLE = "GPTKERN_API_KEYS"


class _Form(NamedTuple):
    """The form in which a setting is typed, where it is not the setting's own.

    Attributes:
        name: The option's, with underscores.
        read: The setting of what was typed.
    """

    name: str
    type: Any
    default: Any
    read: Callable[[Any], Any]
    help: str | None = None
    metavar: str | None = None


def _keys(file: Path | None) -> tuple[str, ...]:
    """The API keys of the file and of the environment."""
    lines = [] if file is None else file.read_text(encoding="utf-8").splitlines()
    keys = [*lines, *os.environ.get(KEYS_VARIABLE, "").split(",")]
    return tuple(dict.fromkeys(key.strip() for key in keys if key.strip()))


def _path(file: Path | None) -> str | None:
    return None if file is None else str(file)


def _text(file: Path | None) -> str | None:
    return None if file is None else file.read_text(encoding="utf-8")


def _steering(typed: Sequence[str] | None) -> tuple[str, ...]:
    """The vectors' names and files; a file that is not there is refused before the model is read."""
    for entry in typed or ():
        file = entry.partition("=")[2]
        if file and not Path(file).is_file():
            raise typer.BadParameter(f"{entry!r}: there is no file {file!r}")
    return _several(typed)


def _several(typed: Sequence[str] | None) -> tuple[str, ...]:
    return tuple(typed or ())


def _deadline(seconds: float) -> float | None:
    return seconds or None


_FILE = Path | None
_FORMS = {
    "deadline": _Form(
        "deadline",
        float,
        600.0,
        _deadline,
        "Seconds after which a request ends with what it has (0 = never).",
    ),
    "api_keys": _Form(
        "api_key_file",
        _FILE,
        None,
        _keys,
        f"A file of API keys, one a line; or {KEYS_VARIABLE}, separated by commas.",
    ),
    "cors_origins": _Form(
        "cors_origin",
        list[str] | None,
        None,
        _several,
        "An origin whose pages may ask, * for any; repeatable.",
        "ORIGIN",
    ),
    "steering": _Form(
        "steering",
        list[str] | None,
        None,
        _steering,
        "Steering vectors that requests may name: a tensor for each layer; repeatable. The model's layers "
        "then run all requests one by one.",
        "NAME=FILE",
    ),
    "tls_certificate": _Form("tls_cert", _FILE, None, _path),
    "tls_key": _Form("tls_key", _FILE, None, _path),
    "chat_template": _Form("chat_template", _FILE, None, _text),
}


def _form(setting: Field[Any]) -> _Form:
    kinds = {"str": str, "int": int, "float": float, "bool": bool}
    own = _FORMS.get(setting.name)
    return own or _Form(setting.name, kinds[str(setting.type)], setting.default, lambda value: value)


def _parameter(setting: Field[Any]) -> inspect.Parameter:
    """The command's parameter for a setting."""
    form, about = _form(setting), setting.metadata
    # The command line's 0 is no deadline.
    least = 0 if setting.name == "deadline" else about["least"]
    declared = typer.Option(
        help=form.help or about["help"],
        rich_help_panel=about["panel"],
        min=least,
        max=65535 if setting.name == "port" else None,
        metavar=form.metavar,
        exists=form.type is _FILE,
        dir_okay=form.type is not _FILE,
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(form.name, kind, default=form.default, annotation=Annotated[form.type, declared])


def _with_settings(command: Callable[..., int]) -> Callable[..., int]:
    """Put an option for each setting but the model's name in the place of a command's ``**settings``."""
    signature = inspect.signature(command, eval_str=True)
    *own, _ = signature.parameters.values()
    options = [setting for setting in fields(ServeSettings) if setting.name != "model_name"]

    def run(**values: Any) -> int:
        settings = {}
        for setting in options:
            form = _form(setting)
            settings[setting.name] = form.read(values.pop(form.name))
        return command(**values, **settings)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
    parameters += [_parameter(setting) for setting in options]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@_with_settings
def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="A transformers folder, nanoGPT .pt, llm.c .bin, .gguf, hub id, or the embedded model."
        ),
    ] = "embedded",
    name: Annotated[
        str | None,
        typer.Option("--name", help="The model's name in requests; by default that of its folder."),
    ] = None,
    tokenizer: o.TokenizerPath = None,
    dtype: o.Dtype = None,
    weights: o.Weights = None,
    device: o.Device = None,
    max_seqs: Annotated[
        int, typer.Option(min=1, help="Most continuations that run at once.", rich_help_panel="Engine")
    ] = 32,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of all continuations whose keys and values are held; by default MAX_SEQS contexts.",
            rich_help_panel="Engine",
        ),
    ] = None,
    prefill_chunk: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens of prompts in one pass, a multiple of 64.", rich_help_panel="Engine"
        ),
    ] = 512,
    prefix_cache: Annotated[
        bool,
        typer.Option(
            help="Take over the keys and values of a prompt that began alike.", rich_help_panel="Engine"
        ),
    ] = True,
    **settings: Any,
) -> int:
    """Serve a model by OpenAI's HTTP interface, with a page to try it at /.

    A request gets the same tokens whatever else runs. Ctrl-C and SIGTERM let those in flight end; a second
    one ends that time at once.

    Examples:

    - `gptkern serve` serves the small model that comes with gptkern: open http://127.0.0.1:8000

    - `gptkern serve gpt2 --host 0.0.0.0 --api-key-file keys.txt`

    - `gptkern serve ./my-model --max-seqs 64 --dtype bfloat16`
    """
    # imported here: --help need not wait for it, and without the extra this is what fails
    from gptkern.serve.process import run

    folder = "gptkern" if model == "embedded" else Path(model).name or model
    chosen = ServeSettings(model_name=name or folder, **settings)
    gpt = o.load(model, device, dtype, weights, tokenizer)
    o.tokenizer_of(gpt)
    return run(
        gpt,
        chosen,
        max_seqs=max_seqs,
        cache_tokens=cache_tokens,
        prefill_chunk=prefill_chunk,
        prefix_cache=prefix_cache,
    )
