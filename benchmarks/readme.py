"""README's performance section, made from the results in ``benchmarks/results/``: no number is typed.

    python benchmarks/readme.py            # write it
    python benchmarks/readme.py --check    # exit with 1 if README says anything else: for CI

A result is a folder ``benchmarks/results/NAME/`` with the ``results.json`` of ``gptkern bench --out``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gptkern.bench import results, tables
from gptkern.bench.run import Results, Row
from gptkern.durable import write_file

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- performance: python benchmarks/readme.py -->", "<!-- end of performance -->"
UNMEASURED = (
    "GPU: not yet measured. The kernels have been run under Triton's interpreter and compiled to machine\n"
    "code for sm_80, sm_90 and sm_100; no timing on a GPU has been made, and none is claimed."
)
MEANING = """Times are medians. "peer 1.16 x" means that the peer takes 1.16 times as long as gptkern; below 1
it is faster. The floor is the least time that the machine could need, by its measured rates of copying and of
multiplying matrices; "80%" in that column means that the floor is 80% of the time taken. More than 100% is
possible where data stays in the processor's cache."""
# Suites that measure whole models and sampling, which people wait for.
WHOLE = ("generate", "decode_step", "prefill", "train_step", "sample")


def section(folder: Path) -> str:
    """The text of the section: a table for each result, GPUs first.

    Raises:
        ValueError: A results file cannot be read.
    """
    runs = [(path.parent, results.load(path)) for path in sorted(folder.glob("*/results.json"))]
    on_gpu = [each for each in runs if each[1].environment["device_type"] == "cuda"]
    on_cpu = [each for each in runs if each not in on_gpu]
    tables_ = [_device(place, result) for place, result in [*on_gpu, *on_cpu]]
    return "\n\n".join([*([] if on_gpu else [UNMEASURED]), MEANING, *tables_])


def _device(folder: Path, result: Results) -> str:
    where = result.environment
    torch = where["versions"]["torch"]
    on_cpu = where["device_type"] == "cpu"
    threads = (
        f", {where['threads']} thread{'s' * (where['threads'] != 1)}, {where['clock']}" if on_cpu else ""
    )
    rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in result.ceilings.matmul.items())
    ours = [line for line in tables.lines(result) if line.row.provider == tables.OURS and line.row.rounds]
    whole = [line for line in ours if line.row.suite in WHOLE]
    single = [line for line in ours if line not in whole]
    note = ": on a CPU PyTorch's operators for the most part" if on_cpu else ""
    return f"""{where["device"]}{threads}, PyTorch {torch}, {where["time"][:10]}, commit {where["commit"]}.
This machine copies {result.ceilings.copy / 1e9:.4g} GB/s (read + written).
Its TFLOP/s of matrix products: {rates}.

{_table(result, whole)}

<details><summary>Single ops{note}</summary>

{_table(result, single)}

</details>

All figures, with their spread: `benchmarks/results/{folder.name}/`."""


def _table(result: Results, lines: list[tables.Line]) -> str:
    rows = ["| | gptkern | of the floor | peers |", "|---|---|---|---|"]
    for line in lines:
        floor = "" if line.of_floor is None else f"{line.of_floor:.0%}"
        rows.append(f"| {line.row.title} | {line.time} | {floor} | {_peers(result, line.row)} |")
    return "\n".join(rows)


def _peers(result: Results, ours: Row) -> str:
    return ", ".join(
        f"{line.row.provider} {line.ratio:.2f} x"
        for line in tables.lines(result)
        if line.row.key[:-1] == ours.key[:-1] and line.row is not ours and line.ratio is not None
    )


def renewed(readme: str, text: str) -> str:
    """``readme`` with ``text`` between the markers.

    Raises:
        ValueError: The markers are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md: the performance section stands between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Write the section, or with ``--check`` compare it."""
    if arguments not in ([], ["--check"]):
        print("usage: python benchmarks/readme.py [--check]", file=sys.stderr)
        return 2
    path = ROOT / "README.md"
    old = path.read_text()
    new = renewed(old, section(ROOT / "benchmarks" / "results"))
    if arguments and old != new:
        print("README.md: the performance section is not what python benchmarks/readme.py writes")
        return 1
    if not arguments:
        write_file(path, new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
