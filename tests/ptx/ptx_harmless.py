"""Why planted faults that nothing notices leave a right program: facts that were tried, and their meaning."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

# What ``ptx_mutations`` has tried.
FACTS = {
    "same": "it never does otherwise here",
    "unused": "what it gives is used by nobody",
    "double": "the barrier next to it orders the same",
}


@dataclass(frozen=True)
class Reason:
    """Why some faults are harmless.

    Attributes:
        kernel, what, instruction: Patterns of the faults.
        fact: What must have been found of them.
        why: What it means.
    """

    kernel: str
    what: str
    instruction: str
    fact: str
    why: str

    def of(self, row: dict[str, Any]) -> bool:
        """True if this is the reason of a fault."""
        pairs = (self.kernel, row["kernel"]), (self.what, row["what"]), (self.instruction, row["instruction"])
        return row["fact"] == self.fact and all(re.search(pattern, text) for pattern, text in pairs)


_COPIED = "no fence is asked for before products that read what cp.async copied"
REASONS = (
    Reason(
        "^flash", "one more", r"setp\.lt\.s32 %p1, %r4,", "same",
        "a dense call has no block of queries beyond its sequence",
    ),
    Reason(
        "^flash_attention_dkdv", "one more", r"setp\.lt\.s32 %p3, %r2,", "same",
        "a dense call has no block of keys beyond its sequence",
    ),
    Reason(
        "^flash_attention_dkdv", "one more", r"setp\.gt\.s32 %p(4, %r77|2, %r65), 0;", "same",
        "keys have at least one head of queries",
    ),
    Reason(
        "^flash_attention_dkdv", "one more", r"setp\.lt\.s32 %p35, %r28,", "",
        "queries beyond the end have no weight without the mask, too",
    ),
    Reason(
        "^dweight", "one more", r"setp\.lt\.s32 %p5, %r790,", "same",
        "numbers of tokens that 16 divides have a text of their own",
    ),
    Reason(
        "^column_sum", "one more", r"setp\.lt\.s32 %p50,", "",
        "one more turn has no row left, and its mask lets nothing through",
    ),
    Reason(
        "^decode_embed", "one more", r"setp\.lt\.s32 %p2,", "",
        "it guards two loads alone, whose results a padding row does not use",
    ),
    Reason(".", "one more", r", 2139095040;", "same", "a sum of exponentials below their maximum is not inf"),
    Reason(
        "linear", "one more", r"setp\.gt\.s32 .*, (63|127|191);", "same",
        "the copy engine's rows are multiples of 8",
    ),
    Reason(
        "linear", "one more", r"setp\.lt\.s32 .*, 64;", "same",
        "sizes that 16 divides have a text of their own",
    ),
    Reason(".", "one more", r"setp\.lt\.s32 .*, 1;", "same", "there is at least one turn"),
    Reason("linear", "one more", r"setp\.gt\.s32 .*, 31;", "same", "there is at least one turn"),
    Reason("^d(hidden|weight)", "one more", r"setp\.gt\.s32 .*, 0;", "same", "there is at least one turn"),
    Reason("^norm", "unguarded", r"ld\.global\.b32", "same", "the first of a program's rows is there"),
    Reason("^rotary", "its own value", "shfl", "same", "both lanes hold the same sum"),
    Reason(".", "without|late", r"cp\.async\.wait_group 0", "", "nothing reads the copied after the loop"),
    Reason(
        ".", "without", r"cp\.async\.commit_group", "",
        "its copies join the next group, and none is read before that one's wait",
    ),
    Reason("^flash", "without", r"fence\.proxy\.async", "", _COPIED),
    Reason(
        "^flash_attention_dq", "without|late", r"wgmma\.(commit|wait)_group", "",
        "the second product's commit and wait take the first along, and nothing uses it before",
    ),
    Reason("^decode", "unguarded", r"st\.global\.b(32|64)", "", "all lanes store the same number"),
    Reason(
        "^decode_linear", "one more", r"setp\.lt\.u(32|64)", "",
        "one more line or tile is fetched, which no product reads",
    ),
    Reason(
        "^rotary", "unguarded", r"st\.global\.b16", "",
        "the lanes that have the same element store the same to the same place",
    ),
)  # fmt: skip


def why(row: dict[str, Any]) -> str:
    """The reason of a fault that nothing caught; empty if it has none."""
    if row["fact"] in ("unused", "double"):
        return FACTS[row["fact"]]
    found = next((reason for reason in REASONS if reason.of(row)), None)
    if found is None:
        return ""
    return f"{FACTS[found.fact]}: {found.why}" if found.fact else found.why
