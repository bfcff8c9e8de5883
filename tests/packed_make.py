"""Makes the pack that ``packed_run.py`` launches from, in a process that compiles.

    python tests/packed_make.py OUT ARCH [--backwards] [--codes] [PART...]

Of the parts that ``packed_model.launches`` knows, and of ``generate`` of a small model. ``--codes``: instead
of a pack, print how many different machine codes Triton makes of each key's launches, the most of all keys.
"""

from __future__ import annotations

import sys
from pathlib import Path

from packed_model import launches

from gptkern.ops import _aot
from gptkern.ops.pack import build, signature
from gptkern.ops.pack.file import write


def most_codes(arch: int, parts: list[str]) -> int:
    """The most machine codes that launches of one key are compiled to."""
    codes: dict[tuple[str, bytes], set[str]] = {}
    for _, launch in launches(arch, parts):
        key = signature.empty(launch.kernel).key(launch.args, launch.kwargs)
        codes.setdefault((launch.name, key), set()).add(_aot.compile_launch(launch, arch).hash)
    return max(map(len, codes.values()))


def main() -> None:
    """The command."""
    flags = {word for word in sys.argv[1:] if word.startswith("--")}
    out, arch, *parts = (word for word in sys.argv[1:] if word not in flags)
    if "--codes" in flags:
        print(most_codes(int(arch), parts))
        return
    unique = build.unique(launch for _, launch in launches(int(arch), parts))
    if "--backwards" in flags:
        unique.reverse()
    write(Path(out), build.made(int(arch)), build.binaries(unique, int(arch)))


if __name__ == "__main__":
    main()
