"""``gptkern pack``: the kernels' machine code, compiled ahead of time for a GPU that need not be there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from gptkern.cli import _options as o
from gptkern.cli import terminal


def pack(
    out: Annotated[Path, typer.Option(help="The folder to write: one file an architecture.")],
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Checkpoints whose generation is packed; every op's cases and GPT-2 if none."),
    ] = None,
    arch: Annotated[
        list[int] | None, typer.Option(help="Compute capability: 80, 89, 90 or 100; repeatable.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes that compile; as many as processors if not given.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object a file.")] = False,
    weights: o.Weights = None,
    dtype: o.Dtype = None,
) -> None:
    """Compile what a GPU would launch and write it to a file, without a GPU.

    Where `GPTKERN_PACK` names that file or its folder, its kernels are launched as they are: nothing is
    compiled at the first token, and Triton need not be installed. What a pack lacks, Triton compiles, with
    a warning; with `GPTKERN_STRICT=1` nothing is compiled, and that is an error. A pack serves the gptkern
    and the Triton that made it.
    What was compiled before an interruption is in Triton's cache: the same command goes on from there.

    Examples:

    - `gptkern pack gpt2 --dtype bfloat16 --arch 90 --out packs`, then, on the machine with the GPU,
      `GPTKERN_PACK=packs gptkern generate "Once upon a time" --model gpt2`

    - `gptkern pack --arch 80 --arch 90 --arch 100 --out gptkern/ops/pack/files` makes what a wheel carries
    """
    from gptkern import packing
    from gptkern.ops import _launch
    from gptkern.ops.pack import build
    from gptkern.ops.pack.file import SUFFIX, write

    loaded = [o.load(model, "cpu", dtype, weights=weights) for model in models or ()]
    out.mkdir(parents=True, exist_ok=True)
    for each in arch or _launch.ARCHS:
        terminal.tell(f"sm_{each}: looking at what is launched")
        if loaded:
            launches = build.unique(item for model in loaded for item in packing.model_launches(model, each))
        else:
            launches = build.unique(packing.standard_launches(each))
        with terminal.progress(f"sm_{each}: compiling", len(launches)) as advance:
            binaries = build.binaries(launches, each, jobs or len(os.sched_getaffinity(0)), advance)
        path = out / f"sm{each}{SUFFIX}"
        write(path, build.made(each), binaries)
        size = path.stat().st_size
        if json_:
            print(json.dumps({"path": str(path), "arch": each, "binaries": len(launches), "bytes": size}))
        else:
            terminal.write(f"{path}: {len(launches)} binaries, {size / 1e6:.3g} MB")
