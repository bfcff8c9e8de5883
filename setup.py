"""Builds the extension ``gptkern._C`` with CMake: C++ always, CUDA where nvcc is found.

Environment:
    GPTKERN_CUDA: ``auto`` (default: CUDA where nvcc is found), ``1`` (CUDA or fail), ``0`` (none).
    GPTKERN_CUDA_ARCHS, then TORCH_CUDA_ARCH_LIST: architectures, such as ``80;90`` or ``8.0 9.0+PTX``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
DEFAULT_ARCHS = (80, 86, 89, 90, 100, 120)


def find_nvcc() -> str | None:
    """The CUDA compiler that the build is to use, or None for the CPU part alone."""
    wanted = os.environ.get("GPTKERN_CUDA", "auto").lower()
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"GPTKERN_CUDA is {wanted!r}; accepted are auto, 0 and 1")
    if wanted == "0":
        return None
    nvcc = shutil.which("nvcc")
    if nvcc is None and "CUDA_HOME" in os.environ:
        nvcc = shutil.which("nvcc", path=str(Path(os.environ["CUDA_HOME"]) / "bin"))
    if nvcc is None and wanted == "1":
        raise SystemExit("GPTKERN_CUDA=1, but there is no nvcc on PATH or in CUDA_HOME/bin")
    return nvcc


def parse_archs(text: str) -> tuple[list[int], bool]:
    """Architectures named as ``90``, ``9.0``, ``sm_90`` or ``9.0a+PTX``, and whether PTX is asked for."""
    archs, ptx = [], False
    for name in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(?:sm_)?(?:(\d+)\.(\d)|(\d{2,3}))[af]?(\+PTX)?", name, re.IGNORECASE)
        if match is None:
            raise SystemExit(f"CUDA architecture {name!r} is not understood; write for example '80;90'")
        major, minor, whole, suffix = match.groups()
        archs.append(int(whole) if whole else 10 * int(major) + int(minor))
        ptx |= suffix is not None
    return sorted(set(archs)), ptx


def cuda_architectures(nvcc: str) -> str:
    """CMake's list: machine code for every architecture, and the newest one's PTX for GPUs to come."""
    for variable in ("GPTKERN_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        if os.environ.get(variable, "").strip():
            archs, ptx = parse_archs(os.environ[variable])
            break
    else:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
        archs = [a for a in DEFAULT_ARCHS if f"compute_{a}\n" in known.stdout]
        ptx = True
    names = [f"{arch}-real" for arch in archs]
    return ";".join([*names, f"{archs[-1]}-virtual"] if ptx else names)


class CMakeBuild(build_ext):
    """Configures and builds ``csrc`` in the temporary build folder."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "csrc"
        build.mkdir(parents=True, exist_ok=True)
        nvcc = find_nvcc()
        if nvcc is None:
            print("gptkern: no nvcc (or GPTKERN_CUDA=0): building the CPU part of gptkern._C alone")
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(target.parent),
            "GPTKERN_MODULE_FILE": target.name,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "GPTKERN_CUDA": "ON" if nvcc else "OFF",
        }
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
            options["CMAKE_CUDA_ARCHITECTURES"] = cuda_architectures(nvcc)
            print(f"gptkern: CUDA for {options['CMAKE_CUDA_ARCHITECTURES']} with {nvcc}")
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit("gptkern: building needs cmake; pip's build isolation provides it")
        defines = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(
            [cmake, "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja", *defines], check=True
        )
        subprocess.run([cmake, "--build", str(build)], check=True)


if __name__ == "__main__":
    setup(ext_modules=[Extension("gptkern._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
