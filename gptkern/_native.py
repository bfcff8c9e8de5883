"""The extension ``gptkern._C``, loaded once, and the numbers that its C++ code and Python agree on.

The numbers come from the extension (``csrc/constants.cpp``). Where it is missing, ``extension`` is None, each
feature that needs it says so, and the PyTorch code that stands in for it numbers the same names in order.
"""

from __future__ import annotations

import importlib
from typing import Any

from gptkern.sampler_columns import COLUMNS


def _load() -> tuple[Any, ImportError | None]:
    try:
        return importlib.import_module("gptkern._C"), None
    except ImportError as error:  # a source tree that was never built, or a library that cannot be loaded
        return None, error


extension, load_error = _load()

# What Python passes to the extension: csrc/constants.h has the same number.
_INTERFACE = 10
_BUILD_AGAIN = "build the extension again, from the sources that gptkern's Python files come from"


def _check_interface() -> None:
    """Refuse an extension that takes other arguments, which would fail in the middle of a call."""
    if extension is not None and (built := getattr(extension, "interface", 0)) != _INTERFACE:
        raise ImportError(f"gptkern._C has interface {built}; {_INTERFACE} is needed: {_BUILD_AGAIN}")


_check_interface()


def _numbers(table: str, *names: str) -> dict[str, int]:
    """The extension's number of each name in one of its tables."""
    if extension is None:
        return {name: number for number, name in enumerate(names)}
    exported: dict[str, int] = getattr(extension, table, {})
    if set(exported) != set(names):
        raise ImportError(
            f"gptkern._C has the {table} {', '.join(exported)}; {', '.join(names)} are needed: {_BUILD_AGAIN}"
        )
    return exported


def _columns(table: str, *names: str) -> tuple[str, ...]:
    """The names of a row's columns, in the order in which the extension reads them."""
    numbers = _numbers(table, *names)
    return tuple(sorted(numbers, key=numbers.__getitem__))


def _number(name: str, otherwise: int) -> int:
    """One of the extension's numbers, or ``otherwise`` where it is missing."""
    return otherwise if extension is None else int(getattr(extension, name))


_statuses = _numbers(
    "statuses",
    "ok",
    "nan",
    "infinite",
    "nothing_allowed",
    "needs_counts",
    "bad_token_id",
    "bad_draft",
    "bad_draft_probs",
    "bad_draft_length",
)
NAN = _statuses["nan"]
INFINITE = _statuses["infinite"]
NOTHING_ALLOWED = _statuses["nothing_allowed"]
NEEDS_COUNTS = _statuses["needs_counts"]
BAD_TOKEN_ID = _statuses["bad_token_id"]
BAD_DRAFT = _statuses["bad_draft"]
BAD_DRAFT_PROBS = _statuses["bad_draft_probs"]
BAD_DRAFT_LENGTH = _statuses["bad_draft_length"]

_commits = _numbers("commits", "no", "yes", "only")
KEEP_STATE, COMMIT, COMMIT_ONLY = _commits["no"], _commits["yes"], _commits["only"]

# The columns of SamplingParams.values and of SamplerState.counters.
PARAMETERS = _columns("parameters", *(column.name for column in COLUMNS))
COUNTERS = _columns("counters", "seed", "request", "step")

# The bit of SamplerState.counts that marks a token of the prompt.
IN_PROMPT = _number("in_prompt", 1 << 30)

# The most tokens of a vocabulary: to sample from, and to list the most likely ones of.
MAX_VOCAB = _number("max_vocab", 1 << 19)
MAX_VOCAB_TOP_K = _number("max_vocab_top_k", 1 << 24)

# Activation functions of the CPU's decode step.
ACTIVATIONS = _numbers("activations", "gelu_tanh", "gelu", "relu", "silu")

# The stages of that step and what they read and write: the names of gptkern/model/program.py.
STAGES = _numbers("stages", "embed", "qkv", "attention", "linear", "add_norm")
BUFFERS = _numbers(
    "buffers",
    *("none", "x", "q", "attended", "branch", "middle", "inner", "normed_x", "normed_middle", "logits"),
)
