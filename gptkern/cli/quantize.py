"""``gptkern quantize``: a checkpoint in fewer bits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptkern.cli import _options as o
from gptkern.cli import terminal

if TYPE_CHECKING:
    from gptkern.gpt import GPT

# Of the text: two passes over so many take GPT-2 124M about a minute on two CPU cores.
DEFAULT_TEXT_TOKENS = 20_000
# Of the texts by which weights are rounded, and of one row of them.
READ_TOKENS, ROW_TOKENS = 8_192, 512
_MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt")


def quantize(
    model: Annotated[
        str, typer.Argument(help="A checkpoint's folder or file, a hub id, or the embedded model.")
    ],
    weights: Annotated[o.Format, typer.Option(help="Format of the weights: int8, fp8 (e4m3) or int4.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale in int4: 128, 64 or 32; by default the largest that fits."
        ),
    ] = None,
    zero_point: Annotated[
        bool | None,
        typer.Option(help="Whether inputs of a group share a zero point, too, in int4; they do by default."),
    ] = None,
    int8: Annotated[
        list[str] | None,
        typer.Option(
            "--int8-layer",
            help="A layer that gets int8 where the others get int4, as lm_head; several may be named.",
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Round int8 and int4 weights so that what the layers make of this text file changes least. "
            f"Its first {READ_TOKENS:,} tokens are read."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Measure the perplexity of this text file before and after.")
    ] = None,
    text_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of the text to measure, from its beginning; 0 for all.")
    ] = DEFAULT_TEXT_TOKENS,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object, when all is done.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model that --out holds already.")
    ] = False,
    tokenizer: o.TokenizerPath = None,
    dtype: o.Dtype = None,
    device: o.Device = None,
) -> None:
    """Write a model whose linear layers take fewer bits: there is less to read for every token.

    int8 and fp8 halve bf16 and hardly change what the model says; int4 quarters it at some cost. --text
    measures it; --texts, --int8-layer lm_head and smaller groups lessen it. The embeddings keep their dtype.
    What is written loads as any other checkpoint of gptkern's; other programs do not read it.

    Examples:

    - `gptkern quantize gpt2 --weights int8 --out gpt2-int8`

    - `gptkern quantize gpt2-xl --weights int4 --group-size 64 --text held-out.txt --out gpt2-xl-int4`,
      then `gptkern generate "Once upon a time" --model gpt2-xl-int4`
    """
    from gptkern.quantization import Quantization
    from gptkern.quantize import quantize_model

    _check_out(out, model, overwrite)
    body, read = (None if path is None else terminal.read_text(path) for path in (text, texts))
    gpt = o.load(model, device, dtype, tokenizer=tokenizer)
    quantization = Quantization.make(gpt.config, weights.value, group_size, zero_point, tuple(int8 or ()))
    ids = [] if body is None else _ids(gpt, "--text", text, body, text_tokens)
    rows = None if read is None else _rows(gpt, _ids(gpt, "--texts", texts, read, READ_TOKENS))
    before = _bytes(gpt)
    quantize_model(gpt, quantization, rows)
    after = _bytes(gpt)
    # The work is saved before anything is measured: measuring can take long, and be stopped.
    gpt.save_pretrained(out)
    facts: dict[str, Any] = {
        "out": str(out),
        "weights": weights.value,
        "bytes": after,
        "bytes_before": before,
    }
    if not json_:
        terminal.write(f"{out}: {after / 1e6:.4g} MB, {before / 1e6:.4g} MB before{_grown(before, after)}")
    if ids:
        now, then = _both(gpt, lambda: o.load(model, device, dtype, tokenizer=tokenizer), ids)
        facts |= {"perplexity": now, "perplexity_before": then, "tokens": len(ids)}
        if not json_:
            print(f"perplexity {now:.4f}, {then:.4f} before ({now / then - 1:+.2%}), of {len(ids):,} tokens")
    if json_:
        print(json.dumps(facts))


def _both(quantised: GPT, original: Callable[[], GPT], ids: Sequence[int]) -> tuple[float, float]:
    """The perplexity of both models, with a bar while it is measured."""
    with terminal.progress("perplexity", 2 * len(ids)) as advance:
        now = _perplexity(quantised, ids, advance)
        return now, _perplexity(original(), ids, advance)


def _check_out(out: Path, model: str, overwrite: bool) -> None:
    """Refuse a folder in which something would be lost, before minutes of work."""
    if Path(model).exists() and out.resolve() == Path(model).resolve():
        raise ValueError(f"quantize: --out is {out}, the model's own folder: the original would be lost")
    if out.exists() and not out.is_dir():
        raise ValueError(f"quantize: --out is {out}, a file; a folder is needed")
    if not overwrite and any(next(out.glob(pattern), None) for pattern in _MODEL_FILES):
        raise ValueError(f"quantize: {out} holds a model already; --overwrite replaces it")


def _ids(gpt: GPT, option: str, path: Path | None, body: str, most: int) -> list[int]:
    """The text's tokens, of which there must be two: the first is not scored."""
    ids = o.tokenizer_of(gpt).encode(body)
    if len(ids) < 2:
        raise ValueError(f"quantize: {option} {path} has {len(ids)} tokens; at least 2 are needed")
    return ids[:most] if most else ids


def _rows(gpt: GPT, ids: Sequence[int]) -> Any:
    """Whole rows of ``ids``, ``(rows, ROW_TOKENS)``; what does not fill one is left out."""
    import torch

    width = min(ROW_TOKENS, gpt.spec.context, len(ids))
    return torch.tensor(ids[: len(ids) // width * width]).view(-1, width)


def _grown(before: int, after: int) -> str:
    """A word where the copy of a tied head, packed beside the embeddings, takes more than was saved."""
    return "" if after < before else " (larger: the packed head stands beside the embeddings that it shared)"


def _bytes(gpt: GPT) -> int:
    return sum(t.numel() * t.element_size() for t in (*gpt.parameters(), *gpt.buffers()))


def _perplexity(gpt: GPT, ids: Sequence[int], advance: Callable[[int], None]) -> float:
    """exp(-mean log-probability) of all tokens but the first.

    Each sees half a context before it at least, or all that there is.
    """
    stride = max(gpt.spec.context // 2, 1)
    total, count = 0.0, 0
    for begin in range(0, len(ids), stride):
        part = list(ids[begin : begin + stride])
        context = list(ids[max(0, begin - (gpt.spec.context - stride)) : begin])
        (found,) = gpt.score([part], context=[context] if context else None)
        total, count = total + found.total, count + len(found.logprobs)
        advance(len(part))
    return math.exp(-total / count)
