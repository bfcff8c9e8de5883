"""Makes the pack that ``packed_run.py`` launches from, in a process that compiles.

    python tests/packed_make.py OUT ARCH [--backwards] [--codes] [OP...]

Of every case of these ops in its first dtype, and of ``generate`` of a small model. ``--codes``: instead of a
pack, print how many different machine codes Triton makes of each key's launches, the most of all keys.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from packed_model import model

from gptkern import packing
from gptkern.ops import _aot, _cases
from gptkern.ops._launch import Launch
from gptkern.ops.pack import build, signature
from gptkern.ops.pack.file import write


def launches(arch: int, ops: list[str]) -> Iterator[Launch]:
    """What is packed, each as often as it is launched."""
    for op in ops:
        for case in _cases.cases(op):
            if case.archs is None or arch in case.archs:
                yield from _cases.record_case(case, case.dtypes[0], arch)
    yield from packing.model_launches(model(), arch)


def most_codes(arch: int, ops: list[str]) -> int:
    """The most machine codes that launches of one key are compiled to."""
    codes: dict[tuple[str, bytes], set[str]] = {}
    for launch in launches(arch, ops):
        key = signature.empty(launch.kernel).key(launch.args, launch.kwargs)
        codes.setdefault((launch.name, key), set()).add(_aot.compile_launch(launch, arch).hash)
    return max(map(len, codes.values()))


def main() -> None:
    """The command."""
    flags = {word for word in sys.argv[1:] if word.startswith("--")}
    out, arch, *ops = (word for word in sys.argv[1:] if word not in flags)
    if "--codes" in flags:
        print(most_codes(int(arch), ops))
        return
    unique = build.unique(launches(int(arch), ops))
    if "--backwards" in flags:
        unique.reverse()
    write(Path(out), build.made(int(arch)), build.binaries(unique, int(arch)))


if __name__ == "__main__":
    main()
