"""Options that several commands share, and how they become a model and its settings."""

from __future__ import annotations

import os
import secrets
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gptkern.model import GPT
    from gptkern.tokenizer import Tokenizer

_SAMPLING = "Sampling"


class DType(StrEnum):
    """What weights are computed in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A transformers folder, a nanoGPT .pt, an llm.c .bin, a hub id, or the embedded model.",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default a GPU where there is one.")
]
Dtype = Annotated[DType | None, typer.Option(help="Type of the weights; by default the checkpoint's.")]


class Format(StrEnum):
    """What linear layers' weights are kept in."""

    int8 = "int8"
    fp8 = "fp8"
    int4 = "int4"


Weights = Annotated[
    Format | None, typer.Option(help="Quantise the linear layers while loading: int8, fp8 or int4.")
]


class CacheDType(StrEnum):
    """What keys and values are kept in."""

    auto = "auto"
    fp8 = "fp8"


KvCacheDtype = Annotated[
    CacheDType, typer.Option(help="Type of the KV cache: fp8 takes one byte a number, half of bf16.")
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        "-n",
        min=1,
        help="Most tokens to generate; by default 256, or what is left of the context.",
    ),
]
MinNewTokens = Annotated[
    int | None, typer.Option(min=0, help="Generate at least so many tokens before an end-of-text token.")
]
Greedy = Annotated[
    bool,
    typer.Option(
        "--greedy",
        help="Take the most likely token each time instead of sampling.",
        rich_help_panel=_SAMPLING,
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature",
        "-t",
        min=0.0,
        help="Sharpness of sampling: lower is safer, higher is wilder, 0 is greedy.",
        rich_help_panel=_SAMPLING,
    ),
]
TopK = Annotated[
    int,
    typer.Option(
        min=0, help="Sample from the K most likely tokens only (0 = all).", rich_help_panel=_SAMPLING
    ),
]


def _positive(value: float | None) -> float | None:
    if value is not None and value <= 0:
        raise typer.BadParameter(f"{value:g} is not in the range 0 < P <= 1; 1 turns it off")
    return value


TopP = Annotated[
    float,
    typer.Option(
        max=1.0,
        callback=_positive,
        metavar="P",
        help="Nucleus sampling: keep the smallest set of tokens whose probabilities sum to P, 0 < P <= 1 "
        "(1 = off).",
        rich_help_panel=_SAMPLING,
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Drop tokens less likely than MIN_P times the most likely one (0 = off).",
        rich_help_panel=_SAMPLING,
    ),
]
TypicalP = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Locally typical sampling: keep the most typical tokens up to this probability (1 = off).",
        rich_help_panel=_SAMPLING,
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        min=0.0,
        help="Above 1, discourage tokens that the prompt or the text so far holds (1 = off).",
        rich_help_panel=_SAMPLING,
    ),
]
PresencePenalty = Annotated[
    float,
    typer.Option(help="Above 0, discourage tokens already generated (0 = off).", rich_help_panel=_SAMPLING),
]
FrequencyPenalty = Annotated[
    float,
    typer.Option(
        help="Above 0, discourage tokens by how often they were generated (0 = off).",
        rich_help_panel=_SAMPLING,
    ),
]
Speculate = Annotated[
    int | None,
    typer.Option(
        "--speculate",
        min=1,
        help="Draft up to so many tokens a pass from repeated text: the same result, sooner.",
    ),
]
NoRepeatNgram = Annotated[
    int,
    typer.Option(
        "--no-repeat-ngram-size",
        min=0,
        help="Never repeat a run of so many tokens (0 = off).",
        rich_help_panel=_SAMPLING,
    ),
]
EpsilonCutoff = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, help="Drop tokens below this probability (0 = off).", rich_help_panel=_SAMPLING
    ),
]
EtaCutoff = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Eta sampling: like --epsilon-cutoff, lower where the model is unsure (0 = off).",
        rich_help_panel=_SAMPLING,
    ),
]
Seed = Annotated[
    int | None, typer.Option(min=0, help="The same seed gives the same text.", rich_help_panel=_SAMPLING)
]
Stop = Annotated[list[str] | None, typer.Option(help="Stop before this text; repeatable.")]


def load(model: str, device: str | None, dtype: DType | None, weights: Format | None = None) -> GPT:
    """The model, on its device."""
    import torch

    from gptkern.model import GPT

    on = chosen_device(device)
    kind = None if dtype is None else getattr(torch, dtype.value)
    return GPT.from_pretrained(
        model, device=on, dtype=kind, weights=None if weights is None else weights.value
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


def sampling(
    *,
    greedy: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    typical_p: float,
    epsilon_cutoff: float,
    eta_cutoff: float,
    repetition_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
    no_repeat_ngram_size: int,
    seed: int | None,
    stop: list[str] | None,
) -> dict[str, Any]:
    """These options as ``generate``'s."""
    options: dict[str, Any] = {
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "stop_strings": list(map(unescape, stop or [])),
    }
    if greedy or temperature == 0:
        return options
    return options | {
        "do_sample": True,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "typical_p": typical_p,
        "epsilon_cutoff": epsilon_cutoff,
        "eta_cutoff": eta_cutoff,
        "seed": secrets.randbits(32) if seed is None else seed,
    }


def unescape(text: str) -> str:
    r"""``\n``, ``\t`` and ``\\`` as shells pass them on."""
    parts = text.split("\\\\")
    return "\\".join(part.replace("\\n", "\n").replace("\\t", "\t") for part in parts)


def strict() -> bool:
    """Whether ``GPTKERN_STRICT=1`` turns every fallback into an error."""
    return os.environ.get("GPTKERN_STRICT") == "1"


def fitting(gpt: GPT, prompt: str, asked: int | None, default: int) -> int:
    """New tokens: as many as asked for, else the default or what is left of the context."""
    if asked is not None:
        return asked
    used = max(1, len(tokenizer_of(gpt).encode(prompt)))
    return max(1, min(default, gpt.config.n_positions - used))


def tokenizer_of(gpt: GPT) -> Tokenizer:
    """The model's tokenizer.

    Raises:
        ValueError: It came without one.
    """
    if gpt.tokenizer is None:
        raise ValueError(
            "the model has no tokenizer beside it (tokenizer.json, or vocab.json and merges.txt)"
        )
    return gpt.tokenizer
