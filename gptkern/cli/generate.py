"""``gptkern generate``: a prompt in, text out, as it is made."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptkern.cli import _generation as g
from gptkern.cli import _options as o
from gptkern.cli import terminal

if TYPE_CHECKING:
    from gptkern.generate import Completion
    from gptkern.gpt import GPT

DEFAULT_NEW_TOKENS = 256
FALLBACK = {"do_sample": True, "temperature": 0.8, "top_k": 50}


@g.generation_options(FALLBACK)
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - reads it from standard input.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Read the prompt from a file.", exists=True, dir_okay=False),
    ] = None,
    model: o.Model = "embedded",
    tokenizer: o.TokenizerPath = None,
    greedy: g.Greedy = False,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its continuation.")] = False,
    json_: Annotated[
        bool, typer.Option("--json", help="One JSON object a continuation, when all are made.")
    ] = False,
    dtype: o.Dtype = None,
    weights: o.Weights = None,
    device: o.Device = None,
    **choices: Any,
) -> None:
    """Continue a text, printing it as it is made.

    Examples:

    - `gptkern generate "ROMEO:"` uses the small model that comes with gptkern

    - `gptkern generate "Once upon a time" --model gpt2 -n 100 --top-p 0.9 --seed 1`

    - `cat story.txt | gptkern generate --model ./my-model --greedy`

    - `gptkern generate "ROMEO:" --num-samples 3 --json | jq .text`

    The text goes to standard output, seed and speed to standard error. A prompt from a file or a pipe is
    UTF-8; one final line break is dropped. On a terminal, control characters
    that a model writes are spelled out (`\\x1b`); pipes and files get them as they are.
    """
    text = _prompt(prompt, file)
    gpt = o.load(model, device, dtype, weights, tokenizer)
    _warn_of_a_classifier(model)
    fallback = {**FALLBACK, "max_new_tokens": o.fitting(gpt, text, DEFAULT_NEW_TOKENS)}
    samples = choices.setdefault("num_return_sequences", 1)
    options = g.generation(gpt, fallback, choices, greedy=greedy)
    begin = time.perf_counter()
    beams = options.get("num_beams", gpt.generation_config.get("num_beams")) or 1
    if samples == 1 and beams == 1 and not json_:
        made = [_streamed(gpt, text, options, echo)]
    else:
        made = gpt.generate_text(text, **options)
        _print(text if echo else "", text, made, as_json=json_)
    seconds = time.perf_counter() - begin
    tokens = sum(len(completion.token_ids) for completion in made)
    seeded = f", seed {options['seed']}" if "seed" in options else ""
    print(
        f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s on {gpt.device}{seeded}",
        file=sys.stderr,
    )


def _warn_of_a_classifier(model: str) -> None:
    """A classifier's folder holds the language model, too, which writes text all the same."""
    from gptkern.checkpoint.locate import LABELS, locate

    if Path(model).is_dir() and (locate(model, revision=None, local_files_only=True) / LABELS).exists():
        terminal.tell(
            f"warning: {model} is a classifier, and its language model alone writes this: "
            f'gptkern.train.Classification.from_pretrained("{model}").classify(texts) gives the labels'
        )


def _prompt(prompt: str | None, file: Path | None) -> str:
    if file is not None:
        if prompt is not None:
            raise typer.BadParameter("a prompt and --file: give one of them")
        return terminal.read_prompt(file)
    if prompt is not None and prompt != "-":
        # The locale C knows no character beyond ASCII: Python keeps such bytes aside.
        return os.fsencode(prompt).decode("utf-8", errors="replace")
    text = "" if terminal.waits_for_a_person() and prompt is None else terminal.read_prompt(None)
    if not text:
        raise typer.BadParameter("no prompt: gptkern generate 'ROMEO:', or --file, or text on standard input")
    return text


def _streamed(gpt: GPT, text: str, options: dict[str, Any], echo: bool) -> Completion:
    pieces = gpt.stream(text, **options)
    if echo:
        terminal.write(text, end="")
    for piece in pieces:
        terminal.write(piece, end="")
    terminal.write("")
    return pieces.completion


def _print(echoed: str, prompt: str, made: list[Completion], *, as_json: bool) -> None:
    for number, completion in enumerate(made, 1):
        if as_json:
            fields = {"prompt": prompt, **asdict(completion)}
            print(json.dumps(fields, ensure_ascii=False))
        else:
            heading = f"--- {number} of {len(made)} ---\n" if len(made) > 1 else ""
            terminal.write(f"{heading}{echoed}{completion.text}")
