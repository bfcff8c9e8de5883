"""Options that several commands share, and how they become a model and its settings."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gptkern.gpt import GPT
    from gptkern.tokenizer import Tokenizer


class DType(StrEnum):
    """The dtype that weights are computed in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A transformers folder, a nanoGPT .pt, an llm.c .bin, a .gguf, a hub id, or the embedded model.",
    ),
]
TokenizerPath = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help="The tokenizer: a folder, tokenizer.json, meta.pkl, or hub id; by default beside the model.",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default a GPU where there is one.")
]
Dtype = Annotated[DType | None, typer.Option(help="Type of the weights; by default the checkpoint's.")]


class Format(StrEnum):
    """The format of quantised linear layers' weights."""

    int8 = "int8"
    fp8 = "fp8"
    int4 = "int4"


Weights = Annotated[
    Format | None, typer.Option(help="Quantise the linear layers while loading: int8, fp8 or int4.")
]


def load(
    model: str,
    device: str | None,
    dtype: DType | None,
    weights: Format | None = None,
    tokenizer: str | None = None,
) -> GPT:
    """The model, on its device, with its tokenizer."""
    import torch

    from gptkern.gpt import GPT

    on = chosen_device(device)
    kind = None if dtype is None else getattr(torch, dtype.value)
    return GPT.from_pretrained(
        model,
        device=on,
        dtype=kind,
        tokenizer=tokenizer,
        weights=None if weights is None else weights.value,
    )


def chosen_device(name: str | None) -> str:
    """The device asked for, or the best there is.

    Raises:
        ValueError: There is no such device.
    """
    import torch

    if name is None:
        if strict():
            _refuse_fallbacks()
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device is {name!r}; cpu or cuda (cuda:0, cuda:1, ...) is needed") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}; cpu and cuda are supported")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device is {name!r}, and {torch.cuda.device_count()} CUDA devices are visible")
    return name


def _refuse_fallbacks() -> None:
    from gptkern.cli.doctor import examine

    for finding in examine():
        if finding.verdict == "fallback":
            raise ValueError(f"{finding.subject}: {finding.text}; GPTKERN_STRICT=1 allows no fallback")


def strict() -> bool:
    """True if ``GPTKERN_STRICT=1`` turns every fallback into an error."""
    return os.environ.get("GPTKERN_STRICT") == "1"


def fitting(gpt: GPT, prompt: str, default: int) -> int:
    """The default number of new tokens, or what is left of the context."""
    used = max(1, len(tokenizer_of(gpt).encode(prompt)))
    return max(1, min(default, gpt.spec.context - used))


def tokenizer_of(gpt: GPT) -> Tokenizer:
    """The model's tokenizer.

    Raises:
        ValueError: It came without one.
    """
    if gpt.tokenizer is None:
        raise ValueError(
            "the model has no tokenizer beside it (tokenizer.json, vocab.json and merges.txt, or nanoGPT's "
            "meta.pkl): name one by --tokenizer"
        )
    return gpt.tokenizer
