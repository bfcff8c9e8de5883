"""``gptkern info``: what a checkpoint holds, without reading its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from gptkern.cli import terminal

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


def info(
    model: Annotated[
        str, typer.Argument(help="A checkpoint's folder or file, a hub id, or the embedded model.")
    ] = "embedded",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print a model's configuration, parameters, bytes, and what its KV cache takes.

    Examples:

    - `gptkern info` for the small model that comes with gptkern

    - `gptkern info gpt2-xl --json`
    """
    facts = describe(model)
    if json_:
        print(json.dumps(facts))
        return
    terminal.facts(_rows(facts))


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, object]]:
    yield from facts["config"].items()
    quantization = facts["quantization"]
    how = "" if quantization is None else f", linear layers in {quantization['format']}"
    yield "weights as stored", f"{readable(facts['stored_bytes'])}{how}"
    if facts["blocks"]:
        counts = ", ".join(f"{format} ({count} tensors)" for format, count in facts["blocks"].items())
        use = "floats once they are loaded" if quantization is None else "packed once they are loaded"
        if quantization is not None and "floats" in quantization:
            use = f"once they are loaded {len(quantization['floats'])} matrices are floats, the others packed"
        yield "GGUF blocks", f"{counts}; {use}"
    yield "parameters", f"{facts['parameters']:,}"
    yield "without embeddings", f"{facts['parameters_without_embeddings']:,}"
    for name, size in facts["bytes"].items():
        yield f"weights in {name}", readable(size)
    for name, size in facts["kv_bytes_per_token"].items():
        full = size * facts["context"]
        yield f"KV cache in {name}", f"{size:,} bytes a token, {readable(full)} a full context"


def describe(model: str) -> dict[str, Any]:
    """The facts that ``info`` prints."""
    from dataclasses import asdict

    from gptkern.checkpoint.gguf import formats
    from gptkern.checkpoint.load import open_checkpoint
    from gptkern.checkpoint.locate import locate
    from gptkern.config import GPTConfig

    path = locate(model, revision=None, local_files_only=False)
    contents = open_checkpoint(path)
    config, quantization = contents.config, contents.quantization
    parameters = config.parameters
    spec = config.spec
    rows = spec.vocab_size + spec.learned_positions * (spec.context + spec.position_offset)
    embeddings = rows * spec.width
    kv = 2 * len(spec.layers) * spec.kv_width
    return {
        "model": str(path),
        "config": asdict(config) if isinstance(config, GPTConfig) else config.to_dict(),
        "context": spec.context,
        "quantization": None if quantization is None else quantization.to_dict(),
        "stored_bytes": contents.stored_bytes,
        "blocks": formats(contents),
        "parameters": parameters,
        "parameters_without_embeddings": parameters - embeddings,
        "bytes": {name: parameters * size for name, size in DTYPES.items()},
        "kv_bytes_per_token": {name: kv * size for name, size in DTYPES.items()},
    }


def readable(size: float) -> str:
    """Bytes as people read them."""
    if size < 1000:
        return f"{size:,.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000:
            return f"{size:,.1f} {unit}"
    return f"{size / 1000:,.1f} TB"
