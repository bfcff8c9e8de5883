"""The archive of what was compiled elsewhere: packed on that machine, unpacked on the one with the GPU.

    python benchmarks/gpu/archive.py build/gpu/carried.tar.xz CACHE     # unpack: Triton's cache to CACHE

It holds ``manifest.json``, Triton's cache without what only people read, and the extension. Triton's own
index of a kernel's files holds absolute paths: here they are names alone, and made paths again where they are
unpacked.
"""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = ROOT / "build" / "gpu" / "carried.tar.xz"
# Machine code, what Triton says of it, and the modules that launch it.
_KEPT = (".cubin", ".json", ".so")
_INDEX = "__grp__"


def pack(archive: Path, cache: Path, keys: Iterable[str], extension: Path, manifest: dict[str, Any]) -> None:
    """Write the entries of ``cache`` that ``keys`` name, and the extension."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as staging, tarfile.open(archive, "w:xz") as tar:
        index = Path(staging) / "index"
        index.write_text(json.dumps(manifest, indent=1))
        tar.add(index, "manifest.json")
        tar.add(extension, f"gptkern/{extension.name}")
        for file in sorted((f for key in keys for f in (cache / key).iterdir()), key=_alike):
            if file.suffix not in _KEPT:
                continue
            source = file
            if file.name.startswith(_INDEX):
                _write_index(index, [name for name in _children(file) if Path(name).suffix in _KEPT])
                source = index
            tar.add(source, f"cache/{file.parent.name}/{file.name}")


def _alike(file: Path) -> tuple[str, str, int, str]:
    """A place beside files like it, a kernel's variants: so they take half of what they take by key."""
    return file.suffix, file.name, file.stat().st_size, file.parent.name


def unpack(archive: Path, cache: Path, root: Path = ROOT) -> dict[str, Any]:
    """Put Triton's entries into ``cache`` and the extension into the package at ``root``; the manifest."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as folder, tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
        for index in Path(folder).glob(f"cache/*/{_INDEX}*"):
            _write_index(index, _children(index), cache / index.parent.name)
        shutil.copytree(Path(folder) / "cache", cache, dirs_exist_ok=True)
        shutil.copytree(Path(folder) / "gptkern", root / "gptkern", dirs_exist_ok=True)
        shutil.copy(Path(folder) / "manifest.json", cache / "manifest.json")
    found: dict[str, Any] = json.loads((cache / "manifest.json").read_text())
    return found


def _children(index: Path) -> list[str]:
    return list(json.loads(index.read_text())["child_paths"])


def _write_index(index: Path, names: Iterable[str], folder: Path | None = None) -> None:
    paths = {name: name if folder is None else str(folder.absolute() / name) for name in names}
    index.write_text(json.dumps({"child_paths": paths}))


if __name__ == "__main__":
    print(unpack(Path(sys.argv[1]), Path(sys.argv[2])))
