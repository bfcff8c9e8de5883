"""``gptkern quantize``: a checkpoint in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptkern.cli import _options as o

if TYPE_CHECKING:
    from gptkern.model import GPT


def quantize(
    model: Annotated[
        str, typer.Argument(help="A checkpoint's folder or file, a hub id, or the embedded model.")
    ],
    weights: Annotated[o.Format, typer.Option(help="int8, fp8 (e4m3) or int4.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    group_size: Annotated[
        int | None,
        typer.Option(help="int4: inputs that share a scale, 128, 64 or 32; by default the most that fit."),
    ] = None,
    zero_point: Annotated[
        bool | None, typer.Option(help="int4: whether they share a zero too; they do by default.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text file: its perplexity before and after is told.")
    ] = None,
    dtype: o.Dtype = None,
    device: o.Device = None,
) -> None:
    """Write a model whose linear layers take fewer bits: a decode step is as fast as its weights are read.

    int8 and fp8 halve bf16 and hardly change what the model says; int4 quarters it at some cost, which
    --text measures. The embeddings keep their dtype. What is written loads as any other checkpoint of
    gptkern's; other programs do not read it.

    Examples:

    - `gptkern quantize gpt2 --weights int8 --out gpt2-int8`

    - `gptkern quantize gpt2-xl --weights int4 --group-size 64 --text held-out.txt --out gpt2-xl-int4`,
      then `gptkern generate "Once upon a time" --model gpt2-xl-int4`
    """
    from rich.console import Console

    from gptkern.quantize import Quantization, quantize_model

    if Path(model).exists() and out.resolve() == Path(model).resolve():
        raise ValueError(f"quantize: --out is {out}, the model's own folder: the original would be lost")
    body = None if text is None else text.read_text(encoding="utf-8")
    console = Console(stderr=True)
    with console.status("reading the model") as status:
        gpt = o.load(model, device, dtype)
        quantization = Quantization.make(gpt.config, weights.value, group_size, zero_point)
        sizes, perplexities = [_bytes(gpt)], []
        if body is not None:
            status.update("perplexity before")
            perplexities.append(_perplexity(gpt, body))
        status.update("quantising")
        quantize_model(gpt, quantization)
        sizes.append(_bytes(gpt))
        if body is not None:
            status.update("perplexity after")
            perplexities.append(_perplexity(gpt, body))
        status.update(f"writing {out}")
        gpt.save_pretrained(out)
    print(f"{out}: {sizes[1] / 1e6:.4g} MB, {sizes[0] / 1e6:.4g} MB before")
    if perplexities:
        change = perplexities[1] / perplexities[0] - 1
        print(f"perplexity {perplexities[1]:.4f}, {perplexities[0]:.4f} before ({change:+.2%})")


def _bytes(gpt: GPT) -> int:
    return sum(t.numel() * t.element_size() for t in (*gpt.parameters(), *gpt.buffers()))


def _perplexity(gpt: GPT, text: str) -> float:
    """Of every token but the first, each seeing at least half a context before it."""
    return gpt.score(text, stride=max(gpt.config.n_positions // 2, 1))[0].perplexity
