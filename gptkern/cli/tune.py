"""``gptkern tune``: find faster launch configurations for this GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def tune(
    ops: Annotated[
        list[str] | None, typer.Argument(help="Ops to tune; all of them if none is named.")
    ] = None,
    table: Annotated[
        Path, typer.Option(help="File to write; it begins as a copy of the package's table.")
    ] = Path("launch.toml"),
    again: Annotated[
        bool, typer.Option("--again", help="Also measure rows that were measured on this kind of GPU before.")
    ] = False,
) -> int:
    """Measure the launch table's rows against their neighbours on this GPU, and write the faster ones.

    Block sizes, warps and stages of every row are varied one at a time. A configuration is taken if it is
    faster by more than the noise, gives the same results and compiles without a spill. Each row is
    written as soon as it is done: an interrupted run goes on where it stopped.

    Nothing changes until you put the table in the package's place (gptkern/ops/tables/ in a checkout):
    its rows say where they were measured.

    Examples:

    - `gptkern tune decode_linear --table sm90.toml` tunes one op

    - `gptkern tune --table sm90.toml` tunes all of them: an hour
    """
    import torch
    from rich.progress import Progress

    from gptkern.bench import tune as tuning
    from gptkern.durable import write_file
    from gptkern.ops import _cases, _launch

    known = _cases.ops()
    for op in ops or ():
        if op not in known:
            raise ValueError(f"tune: there is no op {op!r}; there are {', '.join(known)}")
    if not torch.cuda.is_available():
        raise ValueError("tune: a CUDA GPU is needed; without one, gptkern inspect shows the machine code")
    device = torch.device("cuda")
    arch = _launch.arch(device)
    if not table.exists():
        write_file(table, _launch.table_file(arch).read_bytes())
    found = tuning.pending(tuning.places(ops or known, arch), table, device, again)
    with Progress() as progress:
        task = progress.add_task("rows", total=len(found))
        for place, _, ratio in tuning.tune(found, table, device):
            progress.advance(task)
            progress.console.print(
                f"{place.name}: {'as it was' if ratio == 1 else f'{ratio:.2f} x the time'}"
            )
    print(table)
    return 0
