"""``gptkern verify``: the drop-in for transformers against the library, on a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from gptkern.cli import _options as o
from gptkern.cli import terminal


def verify(
    model: Annotated[str, typer.Argument(help="A GPT-2 or GPT-1 checkpoint: folder, hub id, or embedded.")],
    cases: Annotated[int, typer.Option(min=1, help="Number of random settings to compare.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of those settings.")] = 0,
    dtype: o.Dtype = None,
    device: o.Device = None,
    speed: Annotated[bool, typer.Option(help="Also time both, and this machine's copy rate.")] = True,
    json_: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, when all is compared.")
    ] = False,
) -> int:
    """Compare a checkpoint under gptkern with the same under transformers: logits, tokens, gradients, speed.

    Errors are measured against the same computation in a wider dtype; gptkern's may be twice the library's.
    The exit code is 1 where one is larger.

    Examples:

    - `gptkern verify gpt2`

    - `gptkern verify ./my-model --dtype bfloat16 --cases 50`
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from gptkern.transformers import verify as proof

    where = torch.device(o.chosen_device(device))
    kind = None if dtype is None else getattr(torch, dtype.value)
    loaded = proof.load(model, dtype=kind, device=where)
    try:
        verification = proof.Verification(loaded, seed)
    except TypeError as error:
        # The model's fault, which the command line tells in one line, and not the program's.
        raise ValueError(str(error)) from None
    console = Console(highlight=False, soft_wrap=True, quiet=json_)
    console.print(str(verification.routes()), markup=False)
    checks = []
    with terminal.progress("comparing", 3 * cases) as advance:
        for check in verification.checks(cases):
            checks.append(check)
            advance(1)
    table = Table("case", "what", "error", "allowed", "", box=None, padding=(0, 2, 0, 0))
    for check in checks:
        verdict = "[green]ok[/]" if check.ok else "[red]off[/]"
        table.add_row(check.case, check.what, f"{check.error:.1e}", f"{check.allowed:.1e}", verdict)
    console.print(table)
    failed = sum(not check.ok for check in checks)
    console.print(f"{len(checks) - failed} of {len(checks)} comparisons agree")
    found = verification.speed() if speed else None
    if found is not None:
        ratio = found.library / found.gptkern
        console.print(
            f"one token, batch 1: transformers {found.library * 1e3:.2f} ms, gptkern "
            f"{found.gptkern * 1e3:.2f} ms ({ratio:.2f} x); "
            f"reading the weights at this machine's copy rate takes {found.floor * 1e3:.2f} ms"
        )
    if json_:
        times = None if found is None else {"unit": "seconds a token", **asdict(found)}
        print(json.dumps({"checks": [{**asdict(check), "ok": check.ok} for check in checks], "speed": times}))
    return int(failed > 0)
