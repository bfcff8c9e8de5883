"""Faults planted in compiled kernels, one at a time: which check of the executor catches each.

    python tests/ptx/ptx_mutations.py ARCH NAME...

Prints a line of JSON for each: kernel, kind of fault, the changed instruction and its source line, and the
check that caught it: the name of a fault, "numbers" where the launch leaves wrong numbers, "bits" where it
differs within rounding, "" where nothing differs. ``numbers_alone`` is False where a comparison of numbers,
which is all that interpreted tests have, could not have seen it: the source has no such instruction, or the
numbers stay right.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator

import ptx_recorded
import torch

from gptkern import backend
from gptkern.testing.ptx import Fault

# name -> (op, the check whose call launches it, the kernels)
CALLS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "linear": ("linear", "gelu_tanh, 65 tokens", ("linear", "linear_dw")),
    "gelu": ("gelu_mlp", "gelu_tanh, 33", ("linear_dact", "column_sum")),
    "gated": ("gated_mlp", "silu, 33", ("gated_linear", "gated_dact")),
    "attention": (
        "flash_attention",
        "causal",
        ("flash_attention_forward", "flash_attention_dq", "flash_attention_dkdv"),
    ),
    "decode": ("decode_linear", "residual, 17 x 100 to 33", ("decode_linear_kernel",)),
    "qkv": ("decode_linear", "qkv, 5 x 40", ("decode_linear_kernel",)),
    "decode_attention": ("decode_attention", "3 splits", ("decode_attention_kernel",)),
    "norm": ("layer_norm", "layer_norm (3, 17)", ("norm_forward_kernel", "norm_backward_kernel")),
    "rotary": ("rotary", "halves, partial, norm", ("rotary_kernel", "rotary_norm_backward_kernel")),
    "loss": ("linear_cross_entropy", "5 tokens x 24", ("logits_kernel", "loss_kernel", "dhidden_kernel")),
}
# Faults of kinds that a kernel's source does not have, or that programs run one after another cannot have.
MACHINE_ALONE = ("barrier", "wait", "fence", "order", "swizzle", "lane")
_MOST = 2  # of one kind and one form of instruction in a kernel
_LINE = re.compile(r"^[^\n]*;", re.MULTILINE)
_SOURCE = re.compile(r"\.loc\s[^\n]*// ([\w.]+:\d+)")
_GUARDED = re.compile(r"@!?%p\d+ ((?:ld|st)\.global\S*|atom\S*|red\S*)")
_SCALE = re.compile(r"mul(?:\.rn)?\.f32\s+(%\w+), (%\w+), (?:%\w+|0f\w+);")


def _once(pattern: str, to: str, plain: str) -> str:
    """The instruction with the first match replaced; empty if there is none."""
    changed = re.sub(pattern, to, plain, count=1)
    return changed if changed != plain else ""


def _changes(plain: str) -> Iterator[tuple[str, str, str]]:
    """(kind of fault, what it does, the instructions in place of this one)."""
    if plain.startswith(("bar.sync", "barrier.")):
        yield "barrier", "without", ""
    if re.match(r"cp\.async\.(wait_group|commit_group)|wgmma\.(wait_group|commit_group)", plain):
        yield "wait", "without", ""
    if group := re.search(r"wait_group(?:\.sync\.aligned)?\s+(\d+);", plain):
        yield "wait", "a group late:", plain.replace(f"{group.group(1)};", f"{int(group.group(1)) + 1};")
    if "mbarrier.try_wait" in plain:
        yield "wait", "other phase:", f"{plain} not.pred {plain.split()[1]} {plain.split()[1].rstrip(',')};"
    if "expect_tx" in plain and (size := re.search(r"(\d+);$", plain)):
        yield "wait", "too few bytes:", plain.replace(size.group(0), f"{int(size.group(1)) // 2};")
    if plain.startswith("fence.proxy.async"):
        yield "fence", "without", ""
    if "acq_rel" in plain:
        yield "order", "relaxed", plain.replace("acq_rel", "relaxed")
    if "ld.global.acquire" in plain or ".acquire." in plain:
        yield "order", "relaxed", plain.replace("acquire", "relaxed")
    if guard := _GUARDED.match(plain):
        yield "mask", "unguarded", plain[guard.start(1) :]
        if plain[guard.start(1) :].startswith(("st", "atom")):
            yield "term", "without", ""
    if changed := _once(r"^setp\.lt\.([su]\d+)", r"setp.le.\1", plain):
        yield "mask", "one more:", changed
    if changed := _once(r"^setp\.gt\.([su]\d+)", r"setp.ge.\1", plain):
        yield "mask", "one more:", changed
    if re.match(r"st\.global\.\S+\s+\[.*\], (?:0|\{ 0 \});", plain):
        yield "counter", "not reset:", ""
    if changed := _once(r"^(xor\.b32\s+%\w+, %\w+, )(?:16|32|64|48|96|112);", r"\g<1>0;", plain):
        yield "swizzle", "without", changed
    if changed := _once(r"^(shfl\.sync\.bfly\.b32\s+%\w+, %\w+, )(\d+)", r"\g<1>0", plain):
        yield "lane", "its own value:", changed
    if plain.startswith(("mma.sync", "wgmma.mma_async")):
        yield "term", "twice", f"{plain} {_again(plain)}"
    if changed := _once(r"^add(?:\.rn)?\.f32\s+(%\w+), (%\w+), (%\w+);", r"add.f32 \1, \2, \3;", plain):
        target, _, source = re.findall(r"%\w+", plain)[:3]
        yield "term", "twice", f"{plain} add.f32 {target}, {target}, {source};"
    if scale := _SCALE.match(plain):
        yield "scale", "left out:", f"mov.b32 {scale.group(1)}, {scale.group(2)};"


def _again(plain: str) -> str:
    """A product that adds to its own result."""
    if plain.startswith("wgmma"):
        return re.sub(r", [^,]+(, 1, 1\b)", r", 1\1", plain, count=1)
    head, rest = plain.split("{", 1)
    groups = re.findall(r"\{[^}]*\}", "{" + rest)
    return f"{head}{groups[0]}, {groups[1]}, {groups[2]}, {groups[0]};"


def mutations(ptx: str) -> Iterator[tuple[str, str, str, str]]:
    """(kind, what was changed, its source line, the text with it)."""
    body = ptx.index("{", ptx.index(".reqntid"))
    seen: Counter[tuple[str, str, str]] = Counter()
    for found in _LINE.finditer(ptx, body):
        plain = " ".join(found.group(0).split("//")[0].split())
        form = re.sub(r"^@!?%p\d+ ", "", plain).split(" ")[0]
        for kind, what, changed in _changes(plain):
            seen[kind, what, form] += 1
            if seen[kind, what, form] <= _MOST:
                source = _SOURCE.findall(ptx, body, found.start())[-1:]
                text = ptx[: found.start()] + changed + ptx[found.end() :]
                yield kind, f"{what} {plain}".strip(), *source, text


class Planted:
    """One launch, into which faults are planted.

    Of a counter that is not reset a second launch tells: its faults are planted into two in a row.
    """

    def __init__(self, launch: ptx_recorded.Recorded) -> None:
        self._launch, self._apart = launch, launch.within_margins()
        self._plain: dict[tuple[bool, int], list[torch.Tensor]] = {}

    def _difference(self, apart: bool, text: str, times: int) -> str:
        launch = self._apart if apart else self._launch
        if (apart, times) not in self._plain:
            self._plain[apart, times] = launch.again(times=times)
        return ptx_recorded.difference(launch.again(text, times), self._plain[apart, times], launch)

    def caught(self, text: str, times: int) -> tuple[str, bool]:
        """(the check that notices the changed text, whether numbers alone would have shown it)."""
        try:
            seen = self._difference(False, text, times)
            return seen, seen == "numbers"
        except Fault as fault:
            found = fault.check
        try:
            return found, self._difference(True, text, times) == "numbers"
        except Fault:
            return found, False


def main() -> None:
    """The command."""
    arch = int(sys.argv[1])
    for wanted in sys.argv[2:]:
        op, begin, kernels = CALLS[wanted]
        done: set[str] = set()
        for launch in ptx_recorded.of_check(op, begin, arch):
            if launch.name not in kernels or launch.name in done:
                continue
            done.add(launch.name)
            planted = Planted(launch)
            for kind, what, source, text in mutations(launch.text):
                check, numbers = planted.caught(text, times=2 if kind == "counter" else 1)
                row = {"kernel": launch.name, "arch": arch, "kind": kind, "mutation": what, "source": source}
                row |= {"caught": check, "numbers_alone": numbers and kind not in MACHINE_ALONE}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    with backend("auto"):
        main()
