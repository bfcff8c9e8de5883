"""``gptkern serve``: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from gptkern.cli import _options as o

KEYS_VARIABLE = "GPTKERN_API_KEYS"


def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="A transformers folder, a nanoGPT .pt, an llm.c .bin, a hub id, or the embedded model."
        ),
    ] = "embedded",
    host: Annotated[
        str, typer.Option(help="The address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
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
    most_rows: Annotated[
        int,
        typer.Option(
            min=1,
            help="Most continuations that are admitted at once, waiting ones included; beyond it 429.",
            rich_help_panel="Limits",
        ),
    ] = 512,
    most_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Most tokens, prompts and new ones, that these come to; beyond it 429.",
            rich_help_panel="Limits",
        ),
    ] = 1 << 20,
    deadline: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds after which a request ends with what it has (0 = never).",
            rich_help_panel="Limits",
        ),
    ] = 600.0,
    body_bytes: Annotated[
        int, typer.Option(min=1, help="Most bytes of a request's body.", rich_help_panel="Limits")
    ] = 4 << 20,
    grammar_seconds: Annotated[
        float,
        typer.Option(
            min=0.001, help="Most seconds that a grammar takes to compile.", rich_help_panel="Limits"
        ),
    ] = 5.0,
    drain: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds that requests in flight have after SIGTERM.", rich_help_panel="Limits"
        ),
    ] = 30.0,
    stream_interval: Annotated[
        float,
        typer.Option(
            min=0,
            help="Fewest seconds between two chunks of a stream; tokens of the time between share one.",
            rich_help_panel="Streams",
        ),
    ] = 0.04,
    stream_tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens that make a chunk before that time.", rich_help_panel="Streams"),
    ] = 32,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help=f"A file of API keys, one a line; or {KEYS_VARIABLE}, separated by commas.",
            rich_help_panel="Access",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="An origin whose pages may ask, * for any; repeatable.",
            rich_help_panel="Access",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="The certificate, as PEM.", rich_help_panel="Access"),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Its key, as PEM.", rich_help_panel="Access"),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A Jinja chat template in place of the model's own."),
    ] = None,
    access_log: Annotated[
        bool, typer.Option(help="Write a line of JSON a request to standard error.")
    ] = True,
) -> int:
    """Serve a model by OpenAI's HTTP interface, with a page to try it at /.

    A request gets the same tokens whatever else runs. Ctrl-C and SIGTERM let those in flight end; a second
    one ends at once.

    Examples:

    - `gptkern serve` serves the small model that comes with gptkern: open http://127.0.0.1:8000

    - `gptkern serve gpt2 --host 0.0.0.0 --api-key-file keys.txt`

    - `gptkern serve ./my-model --max-seqs 64 --dtype bfloat16`
    """
    # imported here: --help need not wait for it, and without the extra this is what fails
    from gptkern.serve.process import run
    from gptkern.serve.settings import ServeSettings

    settings = ServeSettings(
        model_name=name or ("gptkern" if model == "embedded" else Path(model).name or model),
        host=host,
        port=port,
        most_rows=most_rows,
        most_tokens=most_tokens,
        deadline=deadline or None,
        drain=drain,
        body_bytes=body_bytes,
        stream_interval=stream_interval,
        stream_tokens=stream_tokens,
        grammar_seconds=grammar_seconds,
        api_keys=_keys(api_key_file),
        cors_origins=tuple(cors_origin or ()),
        tls_certificate=None if tls_cert is None else str(tls_cert),
        tls_key=None if tls_key is None else str(tls_key),
        chat_template=None if chat_template is None else chat_template.read_text(encoding="utf-8"),
        access_log=access_log,
    )
    gpt = o.load(model, device, dtype, weights, tokenizer)
    o.tokenizer_of(gpt)
    return run(
        gpt,
        settings,
        max_seqs=max_seqs,
        cache_tokens=cache_tokens,
        prefill_chunk=prefill_chunk,
        prefix_cache=prefix_cache,
    )


def _keys(file: Path | None) -> tuple[str, ...]:
    """The API keys of the file and of the environment."""
    lines = [] if file is None else file.read_text(encoding="utf-8").splitlines()
    keys = [*lines, *os.environ.get(KEYS_VARIABLE, "").split(",")]
    return tuple(dict.fromkeys(key.strip() for key in keys if key.strip()))
