"""The options of generation: each once, with its type, default, range, help, column and command-line form.

``generate``'s checks, the documentation of ``GenerateOptions``, the command line and the mapping to the
sampler are made from this table. It imports neither torch nor triton, so that ``--help`` is quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from gptkern.sampler_columns import RANGES, Range

EarlyStopping = bool | Literal["never"]
KVCacheDType = Literal["auto", "fp8"]
SequenceBias = Mapping[tuple[int, ...], float] | Sequence[tuple[Sequence[int], float]]


class GenerateOptions(TypedDict, total=False):
    # The docstring is made from the table below. Types stand here too, for type checkers; a test compares.
    max_length: int | None
    max_new_tokens: int | None
    min_length: int
    min_new_tokens: int | None
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float | None
    typical_p: float
    epsilon_cutoff: float
    eta_cutoff: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram_size: int
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    sequence_bias: SequenceBias | None
    logit_bias: Mapping[int, float] | None
    num_return_sequences: int
    num_beams: int
    length_penalty: float
    early_stopping: EarlyStopping
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    stop_strings: str | Sequence[str] | None
    speculate: int | None
    kv_cache_dtype: KVCacheDType
    seed: int | None


@dataclass(frozen=True)
class Flag:
    """The form of an option on the command line.

    Attributes:
        names: As they are typed; the first is the long one.
        metavar: What stands for the value in the help; None: the type's name.
        type: The value's type where it is not the option's own.
        help: The sentence where the option's own does not fit.
        panel: The heading under which the help lists it.
    """

    names: tuple[str, ...]
    metavar: str | None = None
    type: Any = None
    help: str | None = None
    panel: Literal["Generation", "Sampling"] = "Sampling"


@dataclass(frozen=True)
class Option:
    """One option of generation.

    Attributes:
        type: As in ``GenerateOptions``.
        default: The value where neither the call nor the checkpoint gives one; None where it depends on
            others or is none at all.
        help: One sentence.
        more: Further sentences for the documentation.
        range: The numbers that are accepted.
        column: The sampler's column of the same meaning.
        draws: It shapes the draw: without ``do_sample`` it has no effect.
        flag: Its command-line form.
    """

    name: str
    type: Any
    default: Any
    help: str
    more: str = ""
    range: Range | None = None
    column: str | None = None
    draws: bool = False
    flag: Flag | None = None


def _from_1(words: str = "1 or more") -> Range:
    return Range(words, low=1)


def _from_0(words: str = "0 or more") -> Range:
    return Range(words, low=0)


TABLE = (
    Option(
        "max_length",
        int | None,
        None,
        "The longest sequence, prompt (with its padding) included.",
        range=_from_1(),
    ),
    Option(
        "max_new_tokens",
        int | None,
        None,
        "The most new tokens.",
        "Goes before ``max_length``. With neither, 20, or the rest of the context where that is less. More "
        "than the context holds is an error that names the largest value.",
        range=_from_1(),
        flag=Flag(
            ("--max-new-tokens", "-n"),
            help="Most tokens to generate; by default as the checkpoint says, else 256 or what still fits.",
            panel="Generation",
        ),
    ),
    Option(
        "min_length",
        int,
        0,
        "No end-of-text token comes before the sequence, prompt included, is so long.",
        range=_from_0(),
    ),
    Option(
        "min_new_tokens",
        int | None,
        None,
        "Generate at least so many tokens before an end-of-text token.",
        "Goes before ``min_length``.",
        range=_from_0(),
        column="min_new_tokens",
        flag=Flag(("--min-new-tokens",), panel="Generation"),
    ),
    Option(
        "do_sample",
        bool,
        False,
        "Draw from the distribution; otherwise take the most likely token.",
    ),
    Option(
        "temperature",
        float,
        1.0,
        "Sharpness of sampling: logits are divided by it, so that lower is safer and higher is wilder.",
        range=Range(
            "a number above 0 (do_sample=False takes the most likely token)",
            low=0,
            open_low=True,
            open_high=True,
        ),
        column="temperature",
        draws=True,
        flag=Flag(
            ("--temperature", "-t"),
            "T",
            help="Sharpness of sampling: lower is safer, higher is wilder, 0 is greedy.",
        ),
    ),
    Option(
        "top_k",
        int | None,
        50,
        "Sample from the K most likely tokens only (0 = all).",
        "None keeps all too.",
        range=_from_0(),
        column="top_k",
        draws=True,
        flag=Flag(("--top-k",), "K"),
    ),
    Option(
        "top_p",
        float,
        1.0,
        "Nucleus sampling: keep the smallest set of tokens whose probabilities sum to P, above 0 (1 = off).",
        range=RANGES["top_p"],
        column="top_p",
        draws=True,
        flag=Flag(("--top-p",), "P"),
    ),
    Option(
        "min_p",
        float | None,
        0.0,
        "Drop tokens less likely than P times the most likely one (0 = off).",
        range=RANGES["min_p"],
        column="min_p",
        draws=True,
        flag=Flag(("--min-p",), "P"),
    ),
    Option(
        "typical_p",
        float,
        1.0,
        "Locally typical sampling: keep the most typical tokens up to probability P, above 0 (1 = off).",
        range=RANGES["typical_p"],
        column="typical_p",
        draws=True,
        flag=Flag(("--typical-p",), "P"),
    ),
    Option(
        "epsilon_cutoff",
        float,
        0.0,
        "Drop tokens whose probability is below P, less than 1 (0 = off).",
        range=RANGES["epsilon_cutoff"],
        column="epsilon_cutoff",
        draws=True,
        flag=Flag(("--epsilon-cutoff",), "P"),
    ),
    Option(
        "eta_cutoff",
        float,
        0.0,
        "Eta sampling: drop tokens whose probability is below P, or below less where the model is unsure "
        "(0 = off).",
        range=RANGES["eta_cutoff"],
        column="eta_cutoff",
        draws=True,
        flag=Flag(("--eta-cutoff",), "P"),
    ),
    Option(
        "repetition_penalty",
        float,
        1.0,
        "Above 1, discourage tokens of the prompt and of the text so far (1 = off).",
        range=RANGES["repetition_penalty"],
        column="repetition_penalty",
        flag=Flag(("--repetition-penalty",), "X"),
    ),
    Option(
        "presence_penalty",
        float,
        0.0,
        "Above 0, discourage tokens already generated (0 = off).",
        "Subtracted once from the logits of tokens among the new ones.",
        range=RANGES["presence_penalty"],
        column="presence_penalty",
        flag=Flag(("--presence-penalty",), "X"),
    ),
    Option(
        "frequency_penalty",
        float,
        0.0,
        "Above 0, discourage tokens by how often they were generated (0 = off).",
        "Subtracted from a token's logit for each time that it is among the new ones.",
        range=RANGES["frequency_penalty"],
        column="frequency_penalty",
        flag=Flag(("--frequency-penalty",), "X"),
    ),
    Option(
        "no_repeat_ngram_size",
        int,
        0,
        "Never repeat a run of N tokens, the prompt's own included (0 = off).",
        range=_from_0(),
        flag=Flag(("--no-repeat-ngram-size",), "N"),
    ),
    Option(
        "bad_words_ids",
        Sequence[Sequence[int]] | None,
        (),
        "Lists of token ids that never come.",
        "``[[5], [7, 8]]``: never 5; never 8 directly after 7.",
    ),
    Option("suppress_tokens", Sequence[int] | None, (), "Tokens that never come."),
    Option(
        "sequence_bias",
        SequenceBias | None,
        (),
        "Biases of token sequences: ``{(5,): -2.0, (7, 8): 1.5}``, or a list of such pairs.",
        "Each is added to the logit of a sequence's last token where the others came just before. -inf bars.",
    ),
    Option(
        "logit_bias",
        Mapping[int, float] | None,
        (),
        "Biases of tokens, ``{token: bias}``, each added to the token's logit.",
    ),
    Option(
        "num_return_sequences",
        int,
        1,
        "Continuations to make of each prompt.",
        "More than one needs ``do_sample`` or as many beams.",
        range=_from_1(),
        flag=Flag(("--num-samples",), help="Continuations to make.", panel="Generation"),
    ),
    Option(
        "num_beams",
        int,
        1,
        "Beam search with N beams, which does not sample (1 = off).",
        range=_from_1(),
        flag=Flag(("--num-beams",), "N"),
    ),
    Option(
        "length_penalty",
        float,
        1.0,
        "Beam scores are divided by the length to this power.",
        # A length to a greater power may pass what a float holds.
        range=Range("-50 to 50", low=-50, high=50),
    ),
    Option(
        "early_stopping",
        EarlyStopping,
        False,
        "True ends beam search when ``num_beams`` sequences are complete, False when no better one is "
        'likely, "never" when no better one is possible.',
    ),
    Option(
        "eos_token_id",
        int | Sequence[int] | None,
        (),
        "The end-of-text token or tokens; None for none.",
    ),
    Option(
        "pad_token_id",
        int | None,
        None,
        "The token that fills sequences which ended before the others.",
        "By default the first end-of-text token.",
        range=Range("0 to 2**63 - 1", low=0, high=2**63 - 1),
    ),
    Option(
        "stop_strings",
        str | Sequence[str] | None,
        (),
        "Text that ends generation when the new tokens complete it.",
        flag=Flag(
            ("--stop",),
            type=list[str],
            help="Stop before this text, in which \\n is a line break; repeatable.",
            panel="Generation",
        ),
    ),
    Option(
        "speculate",
        int | None,
        None,
        "Draft up to so many tokens a pass from repeated text: the same result, sooner.",
        "Prompt lookup drafts the tokens that followed the latest ones when they last came in the row. Each "
        "position is drawn as it would be without, and drafts hold while they equal the draws: every token "
        "and seed gives what it gives without. Drafts are made where a row's arithmetic does not depend on "
        "its neighbours: with kernels on a GPU from 17 new tokens on, and on the CPU for up to 16 rows, "
        "drafted ones included. Other calls take plain steps. Not with ``num_beams``.",
        range=_from_1(),
        flag=Flag(("--speculate",), panel="Generation"),
    ),
    Option(
        "kv_cache_dtype",
        KVCacheDType,
        "auto",
        "Type of the KV cache: fp8 takes one byte a number, half of bf16.",
        '"auto" keeps keys and values in the model\'s dtype, "fp8" as e4m3 by the model\'s ``kv_scales`` (on '
        "GPUs from compute capability 8.9 on).",
        flag=Flag(("--kv-cache-dtype",), panel="Generation"),
    ),
    Option(
        "seed",
        int | None,
        None,
        "The same seed gives the same text.",
        "64 bits, signed or not. A draw depends on the seed, the number of the copy among its prompt's "
        "``num_return_sequences``, and the number of the new token alone. So a prompt's tokens are the same "
        "alone, in any batch and in any place of it, up to rounding of the model's logits; copies of a "
        "prompt differ, and equal prompts in one call do not. Without a seed one is drawn from PyTorch's "
        "global generator, and all rows differ.",
        range=Range("64 bits, from -2**63 to 2**64 - 1", low=-(2**63), high=2**64 - 1),
        flag=Flag(("--seed",)),
    ),
)
OPTIONS: dict[str, Option] = {option.name: option for option in TABLE}

_HEAD = """Options of ``generate``, ``stream`` and ``generate_text``, as transformers 5 names and means them.

    An option that is not given is what the checkpoint's ``generation_config`` says, else the default below;
    one that is given as None is the default. Tensors, arrays and NumPy's numbers are taken as what they hold.

    ``presence_penalty``, ``frequency_penalty`` and ``logit_bias`` are vLLM's. Biases come first, then the
    penalties, barred tokens, the minimum length, and what ``do_sample`` asks for, in the order below.

    Attributes:
"""


def described(option: Option) -> str:
    """An option's help, further sentences, range and default, as one paragraph."""
    parts = [option.help, option.more]
    if option.range is not None:
        parts.append(f"Accepted: {option.range.words}.")
    if option.default not in (None, ()):
        parts.append(f"Default: {option.default!r}.")
    return " ".join(part for part in parts if part)


GenerateOptions.__doc__ = _HEAD + "".join(f"        {o.name}: {described(o)}\n" for o in TABLE)
