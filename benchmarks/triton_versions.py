"""The machine code of all kernels by several versions of Triton, side by side, without a GPU.

    python benchmarks/triton_versions.py 3.6.0 3.7.1 3.8.0 3.9.0 --arch 90 --out benchmarks/triton_versions.md

Each version is installed beside the environment, not in it (``build/triton/VERSION``), and compiles in a
process of its own; what it compiled of the same kernels before is not compiled again. The table says of each
version what is different from the installed one: spills, blocks a multiprocessor holds, matrix instructions,
widths of loads, registers, code size. What matters is listed by kernel. Text after the mark in the file,
written by people, stays when it is made anew.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean

import triton

from gptkern.bench import inspect
from gptkern.bench.inspect import Key, Report
from gptkern.ops import _launch
from gptkern.ops.pack import signature

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "triton"
MARK = "<!-- written by people from here on -->"
# Differences in these decide about speed; those in registers and size alone are counted.
_TELLING = ("local_bytes", "blocks_per_sm", "matrix", "serialised", "widest_load", "bulk")


def installed(version: str) -> Path | None:
    """The folder that holds a version; None for the environment's own."""
    if version == triton.__version__:
        return None
    folder = FOLDER / version
    if not (folder / "triton").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, f"triton=={version}"], check=True)
    return folder


def saved(version: str, archs: Sequence[int], ops: Sequence[str], per: str) -> Path:
    """The file of what a version compiles of the kernels and launch rows as they are now."""
    digest = hashlib.sha256(signature.sources().encode() + repr((archs, ops, per)).encode())
    for arch in archs:
        digest.update(_launch.table_file(arch).read_bytes())
    return FOLDER / f"{version}-{digest.hexdigest()[:12]}.json"


def reports(version: str, archs: Sequence[int], ops: Sequence[str], per: str) -> list[Report]:
    """What a version compiles: anew, or as it did before where nothing has changed since."""
    out = saved(version, archs, ops, per)
    if out.exists():
        return inspect.load(out)[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(path) for path in (installed(version), ROOT) if path is not None]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "gptkern", "inspect", *ops, "--per", per, "--save", str(out)]
    for arch in archs:
        command += ["--arch", str(arch)]
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if not out.exists():
        raise SystemExit(f"triton {version}: the kernels do not compile:\n{done.stdout}")
    found, compiled_by = inspect.load(out)
    if compiled_by != version:
        raise SystemExit(f"triton {version} was asked for, and {compiled_by} compiled")
    return found


def telling(before: Report, after: Report) -> dict[str, tuple[object, object]]:
    """The differences that decide about speed."""
    pairs = {name: (getattr(before, name), getattr(after, name)) for name in _TELLING}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _line(version: str, base: dict[Key, Report], found: dict[Key, Report]) -> str:
    shared = [name for name in base if name in found]
    differ = [telling(base[name], found[name]) for name in shared]
    count = {name: sum(name in changes for changes in differ) for name in _TELLING}
    sizes = geometric_mean(found[name].code_bytes / base[name].code_bytes for name in shared)
    registers = geometric_mean(found[name].registers / base[name].registers for name in shared)
    spilling = sum(report.local_bytes > 0 for report in found.values())
    serialised = sum(report.serialised for report in found.values())
    cells = (
        *(version, len(found), spilling, serialised, count["blocks_per_sm"], count["matrix"]),
        *(count["widest_load"] + count["bulk"], f"{registers:.3f}", f"{sizes:.3f}"),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def page(results: dict[str, list[Report]], archs: Sequence[int]) -> str:
    """The table and the list, as Markdown."""
    base_version = triton.__version__
    base = inspect.index(results[base_version])
    names = ", ".join(f"sm_{arch}" for arch in archs)
    lines = [
        "# One source, several compilers",
        "",
        f"Each launch row's kernels for {names}, compiled without a GPU; all against {base_version}.",
        "",
        "| triton | binaries | that spill | wgmma serialised | other blocks a multiprocessor | other matrix "
        "instruction | other loads | registers, geometric mean | code size, geometric mean |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(version, base, inspect.index(found)) for version, found in results.items()]
    for version, found in results.items():
        after = inspect.index(found)
        differ = {name: telling(base[name], after[name]) for name in base if name in after}
        told = [
            f"- {name[3]}, {name[1]}, {name[2]}, sm_{name[4]}: "
            + "; ".join(f"{what.replace('_', ' ')} {a} -> {b}" for what, (a, b) in changes.items())
            for name, changes in differ.items()
            if changes
        ]
        if version != base_version:
            lines += [
                "",
                f"## {base_version} to {version}",
                "",
                *(told or ["Nothing that decides about speed."]),
            ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="+")
    parser.add_argument(
        "--arch", type=int, action="append", help="80, 89, 90 or 100; repeatable (default: 90)"
    )
    parser.add_argument("--op", action="append", default=[], help="only this op; repeatable")
    parser.add_argument("--per", choices=("binary", "row", "kernel"), default="row")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file")
    asked = parser.parse_args()
    archs = asked.arch or [90]
    versions = list(dict.fromkeys([triton.__version__, *asked.versions]))
    results = {version: reports(version, archs, asked.op, asked.per) for version in versions}
    text = page({version: results[version] for version in sorted(results)}, archs)
    before = asked.out.read_text() if asked.out.exists() else ""
    notes = before[before.index(MARK) :] if MARK in before else f"{MARK}\n"
    asked.out.write_text(f"{text}\n{notes}")
    print(text)


if __name__ == "__main__":
    main()
