"""``gptkern profile``: where a token's time goes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptkern.cli import _options as o
from gptkern.cli import terminal

if TYPE_CHECKING:
    from gptkern.bench.profile import Profile

DEFAULT_TOKENS = 32


def profile(
    prompt: Annotated[str, typer.Argument(help="A text; its continuation is measured.")],
    model: o.Model = "embedded",
    tokenizer: o.TokenizerPath = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens to measure.")] = DEFAULT_TOKENS,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace to this file, for chrome://tracing or Perfetto.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Operators to list.")] = 12,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; by default as many as PyTorch takes.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object, times in seconds.")] = False,
    dtype: o.Dtype = None,
    weights: o.Weights = None,
    device: o.Device = None,
) -> None:
    """Print where the time of one generated token goes.

    The floor is the least time to read what a token needs, all weights and the sequence's keys and values,
    at this machine's measured copy rate. On a GPU an operator's time is its kernels'; on a CPU its own.

    Examples:

    - `gptkern profile "ROMEO:"`

    - `gptkern profile "Once upon a time" --model gpt2 --dtype bfloat16 --trace token.json`
    """
    import torch

    from gptkern.bench.profile import profile as measure

    if threads is not None:
        torch.set_num_threads(threads)
    gpt = o.load(model, device, dtype, weights, tokenizer)
    ids = o.tokenizer_of(gpt).encode(prompt)
    if not ids:
        raise typer.BadParameter("the prompt is empty")
    costs = measure(gpt, ids, tokens, trace)
    if json_:
        print(json.dumps({**asdict(costs), "floor": costs.floor}))
    else:
        terminal.write("\n".join(_lines(costs, rows)))


def _lines(costs: Profile, rows: int) -> list[str]:
    from gptkern.bench.tables import seconds_text

    made = ", ".join(f"{count} {name}" for name, count in costs.launches.items())
    total = sum(operator.seconds for operator in costs.operators)
    share = costs.floor / costs.per_token
    cached = " (more than 100%: data lay in the cache)" if share > 1 else ""
    lines = [
        f"prompt     {seconds_text(costs.prefill)}",
        f"token      {seconds_text(costs.per_token)}, median of {costs.tokens} at {costs.context} tokens "
        f"and more, on {costs.device}",
        f"bytes      {costs.bytes_moved / 1e6:.4g} MB: weights, keys and values",
        f"floor      {seconds_text(costs.floor)} at {costs.copy / 1e9:.4g} GB/s, this machine's copy: "
        f"{share:.0%} of the token{cached}",
        f"launches   {sum(costs.launches.values())} by the kernels on a GPU: {made}",
        "",
        f"{'calls':>8}  {'time':>9}  {'share':>5}  of a token under the profiler, which takes longer: "
        f"{seconds_text(total)}",
    ]
    for operator in costs.operators[:rows]:
        lines.append(
            f"{operator.calls:8.4g}  {seconds_text(operator.seconds):>9}  "
            f"{operator.seconds / total:5.0%}  {operator.name}"
        )
    others = costs.operators[rows:]
    if others:
        seconds = sum(operator.seconds for operator in others)
        lines.append(f"{'':8}  {seconds_text(seconds):>9}  {seconds / total:5.0%}  {len(others)} others")
    return lines
