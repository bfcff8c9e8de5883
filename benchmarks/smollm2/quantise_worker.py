"""Writes a GGUF file in another format by llama.cpp: ``python quantise_worker.py IN OUT Q8_0|Q4_0|BF16``."""

from __future__ import annotations

import sys

import llama_cpp


def main() -> None:
    """The command."""
    source, target, kind = sys.argv[1:]
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = {"Q8_0": 7, "Q4_0": 2, "BF16": 32}[kind]
    settings.allow_requantize, settings.pure = True, True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings) != 0:
        raise SystemExit(f"{kind}: llama.cpp cannot write it")


if __name__ == "__main__":
    main()
