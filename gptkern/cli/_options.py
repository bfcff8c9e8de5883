"""Options that several commands share, and how they become a model and its settings."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gptkern.gpt import GPT
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
        help="Most tokens to generate; by default as the checkpoint says, else 256 or what still fits.",
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


def _sampler(metavar: str, help: str, default: str, *names: str) -> Any:
    """An option of sampling: None unless given, when the checkpoint has its word; ``generate`` checks it."""
    shown = f"the checkpoint's, else {default}"
    return typer.Option(*names, metavar=metavar, help=help, show_default=shown, rich_help_panel=_SAMPLING)


Temperature = Annotated[
    float | None,
    _sampler(
        "T",
        "Sharpness of sampling: lower is safer, higher is wilder, 0 is greedy.",
        "0.8",
        "--temperature",
        "-t",
    ),
]
TopK = Annotated[int | None, _sampler("K", "Sample from the K most likely tokens only (0 = all).", "50")]
TopP = Annotated[
    float | None,
    _sampler(
        "P",
        "Nucleus sampling: keep the smallest set of tokens whose probabilities sum to P, above 0 (1 = off).",
        "1; 0.95 in chat",
    ),
]
MinP = Annotated[
    float | None,
    _sampler("P", "Drop tokens less likely than P times the most likely one (0 = off).", "0"),
]
TypicalP = Annotated[
    float | None,
    _sampler("P", "Locally typical sampling: keep the most typical tokens up to P, above 0 (1 = off).", "1"),
]
EpsilonCutoff = Annotated[
    float | None, _sampler("P", "Drop tokens whose probability is below P, less than 1 (0 = off).", "0")
]
EtaCutoff = Annotated[
    float | None,
    _sampler("P", "Eta sampling: like --epsilon-cutoff, lower where the model is unsure (0 = off).", "0"),
]
RepetitionPenalty = Annotated[
    float | None,
    _sampler("X", "Above 1, discourage tokens of the prompt and of the text so far (1 = off).", "1"),
]
PresencePenalty = Annotated[
    float | None, _sampler("X", "Above 0, discourage tokens already generated (0 = off).", "0")
]
FrequencyPenalty = Annotated[
    float | None,
    _sampler("X", "Above 0, discourage tokens by how often they were generated (0 = off).", "0"),
]
NoRepeatNgram = Annotated[int | None, _sampler("N", "Never repeat a run of N tokens (0 = off).", "0")]
NumBeams = Annotated[
    int | None, _sampler("N", "Beam search with N beams, which does not sample (1 = off).", "1")
]
Speculate = Annotated[
    int | None,
    typer.Option(
        "--speculate",
        min=1,
        help="Draft up to so many tokens a pass from repeated text: the same result, sooner.",
    ),
]
Seed = Annotated[
    int | None, typer.Option(help="The same seed gives the same text.", rich_help_panel=_SAMPLING)
]
Stop = Annotated[list[str] | None, typer.Option(help="Stop before this text; repeatable.")]


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


def generation(
    gpt: GPT,
    fallback: Mapping[str, Any],
    *,
    greedy: bool,
    seed: int | None,
    stop: list[str] | None,
    **given: Any,
) -> dict[str, Any]:
    """What to give ``generate``: what was asked for, else what the checkpoint says, else ``fallback``.

    Args:
        fallback: The command's own defaults.
        given: Further options of ``generate``; None where the user gave none.
    """
    from gptkern.generate.options import options_over

    asked = {name: value for name, value in given.items() if value is not None}
    if stop:
        asked["stop_strings"] = list(map(unescape, stop))
    if asked.get("temperature") == 0:
        del asked["temperature"]
        greedy = True
    if greedy or asked.get("num_beams", 1) > 1:
        asked["do_sample"] = False
    options = options_over(fallback, gpt, asked)
    if options.get("do_sample", gpt.generation_config.get("do_sample")):
        # Drawn here, so that it can be told.
        options["seed"] = secrets.randbits(32) if seed is None else seed
    return options


def unescape(text: str) -> str:
    r"""``\n``, ``\t`` and ``\\`` as shells pass them on."""
    parts = text.split("\\\\")
    return "\\".join(part.replace("\\n", "\n").replace("\\t", "\t") for part in parts)


def strict() -> bool:
    """Whether ``GPTKERN_STRICT=1`` turns every fallback into an error."""
    return os.environ.get("GPTKERN_STRICT") == "1"


def fitting(gpt: GPT, prompt: str, default: int) -> int:
    """The default number of new tokens, or what is left of the context."""
    used = max(1, len(tokenizer_of(gpt).encode(prompt)))
    return max(1, min(default, gpt.config.n_positions - used))


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
