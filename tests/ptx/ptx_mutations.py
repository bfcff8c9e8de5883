"""Faults planted in compiled kernels, one at a time: which check of the executor catches each.

    python tests/ptx/ptx_mutations.py ARCH [--to FOLDER] NAME...

NAME is one of ``ptx_fault_calls.CALLS``. Prints a line of JSON for each fault: kernel, kind, the changed
instruction and its source line, and the check that caught it: the name of a fault, "numbers" where the launch
leaves wrong numbers, "bits" where it differs within rounding, "" where nothing differs. ``numbers_alone`` is
False where a comparison of numbers, which is all that interpreted tests have, could not have seen it: the
source has no such instruction, or the numbers stay right. ``fact`` says of a fault that nothing caught what
was tried: "same" if in no lane of any launch the changed instruction does otherwise than the original;
"unused" if it does, and noise in place of what it gives in these lanes leaves all bits as they were;
"double" of a barrier if without its neighbour, too, a check finds a fault.

With ``--to`` lines are added to FOLDER/mutations-ARCH-NAME, and faults that are there already are left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ptx_fault_calls
import ptx_recorded
import torch
from ptx_fault_calls import CALLS, Calls

from gptkern import backend, testing
from gptkern.ops import _launch
from gptkern.testing.ptx import Fault

# Faults of kinds that a kernel's source does not have, or that programs run one after another cannot have.
MACHINE_ALONE = ("barrier", "wait", "fence", "order", "swizzle", "lane")
# The most faults of one kind and one form of instruction in a kernel, taken evenly from all of its text.
_MOST = 2
_MOST_OF = dict.fromkeys(("barrier", "wait", "fence", "order", "counter"), 4)
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
        yield "wait", "a group late", plain.replace(f"{group.group(1)};", f"{int(group.group(1)) + 1};")
    if "mbarrier.try_wait" in plain:
        yield "wait", "other phase", f"{plain} not.pred {plain.split()[1]} {plain.split()[1].rstrip(',')};"
    if "expect_tx" in plain and (size := re.search(r"(\d+);$", plain)):
        yield "wait", "too few bytes", plain.replace(size.group(0), f"{int(size.group(1)) // 2};")
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
        yield "mask", "one more", changed
    if changed := _once(r"^setp\.gt\.([su]\d+)", r"setp.ge.\1", plain):
        yield "mask", "one more", changed
    if re.match(r"st\.global\.\S+\s+\[.*\], (?:0|\{ 0 \});", plain):
        yield "counter", "not reset", ""
    if changed := _once(r"^(xor\.b32\s+%\w+, %\w+, )(?:16|32|64|48|96|112);", r"\g<1>0;", plain):
        yield "swizzle", "without", changed
    if changed := _once(r"^(shfl\.sync\.bfly\.b32\s+%\w+, %\w+, )(\d+)", r"\g<1>0", plain):
        yield "lane", "its own value", changed
    if plain.startswith(("mma.sync", "wgmma.mma_async")):
        yield "term", "twice", f"{plain} {_again(plain)}"
    if changed := _once(r"^add(?:\.rn)?\.f32\s+(%\w+), (%\w+), (%\w+);", r"add.f32 \1, \2, \3;", plain):
        target, _, source = re.findall(r"%\w+", plain)[:3]
        yield "term", "twice", f"{plain} add.f32 {target}, {target}, {source};"
    if scale := _SCALE.match(plain):
        yield "scale", "left out", f"mov.b32 {scale.group(1)}, {scale.group(2)};"


def _again(plain: str) -> str:
    """A product that adds to its own result."""
    if plain.startswith("wgmma"):
        return re.sub(r", [^,]+(, 1, 1\b)", r", 1\1", plain, count=1)
    head, rest = plain.split("{", 1)
    groups = re.findall(r"\{[^}]*\}", "{" + rest)
    return f"{head}{groups[0]}, {groups[1]}, {groups[2]}, {groups[0]};"


@dataclass(frozen=True)
class Planting:
    """A fault: what was done to which instruction, its source line, the text with it.

    Attributes:
        number: Among those of its kernel.
        probe: A text that fails where the changed instruction would do otherwise than the original.
        noise: The text with noise in place of what the changed instruction gives there; empty if it gives
            no number.
        pairs: Of a barrier: the texts without it and the barrier before it, or the one after it.
    """

    number: int
    kind: str
    what: str
    instruction: str
    source: str
    text: str
    probe: str
    noise: str
    pairs: tuple[str, ...]


# Within a probe: registers of its own, and a load that is out of bounds wherever %differs is true.
_SCOPE = "{{ .reg .pred %differs; .reg .b64 %nowhere; .reg .b32 %nothing; {} }}"
_FAIL = "mov.b64 %nowhere, 0; @%differs ld.global.b32 %nothing, [%nowhere];"
_NOISE = "0x7fc1a5a5"  # a NaN, and no address of anything


def _differs(plain: str, changed: str) -> str:
    """Instructions after which ``%differs`` says where the changed instruction does otherwise."""
    if guard := re.match(r"@(!?)(%p\d+) ", plain):
        without = not changed
        negated = bool(guard.group(1)) != (not without)
        return f"{'not' if negated else 'mov'}.pred %differs, {guard.group(2)};"
    if compared := re.match(r"setp\.[lg][te]\.(\w+)\s+%p\d+, (\S+), (\S+);", plain):
        kind, left, right = compared.groups()
        return f"setp.eq.{kind} %differs, {left}, {right};"
    if given := re.match(r"(?:shfl|mul)\S*\s+(%r\d+), (%r\d+),", plain):
        return f"setp.ne.b32 %differs, {given.group(1)}, {given.group(2)};"
    return ""


def _probes(plain: str, changed: str) -> tuple[str, str]:
    """The instructions of ``probe`` and of ``noise`` in place of this one; empty where there are none."""
    differs = _differs(plain, changed) or "setp.eq.u32 %differs, 1, 1;"
    given = re.match(r"@!?%p\d+ ld\.global\S*\s+(\{[^}]*\})", plain)
    given = given or re.match(r"(?:shfl|mul)\S*\s+(%r\d+)", plain)
    probe = _SCOPE.format(f"{plain} {differs} {_FAIL}")
    if plain.startswith("@"):  # before it: a load may write over what its guard comes from
        probe = _SCOPE.format(f"{differs} {_FAIL} {plain}")
    if given is None:
        return probe, ""
    names = re.findall(r"%\w+", given.group(1))
    noises = " ".join(
        f"@%differs mov.b{'16' if 's' in name else '64' if 'd' in name else '32'} {name}, "
        f"{'0x7fc1' if 's' in name else _NOISE};"
        for name in names
    )
    return probe, _SCOPE.format(f"{plain} {differs} {noises}")


def _planting(ptx: str, begin: int, end: int, number: int, kind: str, what: str, changed: str) -> Planting:
    plain = _plain(ptx[begin:end])
    (source,) = _SOURCE.findall(ptx, 0, begin)[-1:]
    texts = [
        ptx[:begin] + new + ptx[end:] if new or index == 0 else ""
        for index, new in enumerate((changed, *_probes(plain, changed)))
    ]
    pairs = _pairs(ptx, begin, texts[0]) if kind == "barrier" else ()
    return Planting(number, kind, what, plain, source, *texts, pairs)


def _pairs(ptx: str, begin: int, without: str) -> tuple[str, ...]:
    others = [found.start() for found in re.finditer(r"bar\.sync", without)]
    near = [
        max((at for at in others if at < begin), default=-1),
        min((at for at in others if at >= begin), default=-1),
    ]
    return tuple(without[:at] + without[without.index(";", at) + 1 :] for at in near if at >= 0)


def _plain(line: str) -> str:
    return " ".join(line.split("//")[0].split())


def mutations(ptx: str) -> list[Planting]:
    """The faults that are planted in a text."""
    body = ptx.index("{", ptx.index(".reqntid"))
    every = []
    alike: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for found in _LINE.finditer(ptx, body):
        plain = _plain(found.group(0))
        form = re.sub(r"^@!?%p\d+ ", "", plain).split(" ")[0]
        for kind, what, changed in _changes(plain):
            alike[kind, what, form].append(len(every))
            every.append((found.start(), found.end(), len(every), kind, what, changed))
    chosen: set[int] = set()
    for (kind, _, _), numbers in alike.items():
        count = min(len(numbers), _MOST_OF.get(kind, _MOST))
        chosen.update(numbers[round(i * (len(numbers) - 1) / max(count - 1, 1))] for i in range(count))
    return [_planting(ptx, *every[number]) for number in sorted(chosen)]


class Planted:
    """Launches of one text, into which faults are planted.

    Of a counter that is not reset a second launch tells: its faults are planted into two in a row.
    """

    def __init__(self, launches: list[ptx_recorded.Recorded]) -> None:
        self._launches = launches
        self._apart = [launch.within_margins() for launch in launches]
        self._plain: dict[tuple[int, int], list[torch.Tensor]] = {}

    def _difference(self, launch: ptx_recorded.Recorded, text: str, times: int) -> str:
        key = id(launch), times
        if key not in self._plain:
            self._plain[key] = launch.again(times=times)
        return ptx_recorded.difference(launch.again(text, times), self._plain[key], launch)

    def caught(self, fault: Planting) -> tuple[str, bool]:
        """(the check that notices the changed text, whether numbers alone would have shown it)."""
        times = 2 if fault.kind == "counter" else 1
        found = ""
        for launch, apart in zip(self._launches, self._apart, strict=True):
            try:
                seen = self._difference(launch, fault.text, times)
                if seen == "numbers":
                    return seen, fault.kind not in MACHINE_ALONE
                found = found or seen
            except Fault as refused:
                return refused.check, fault.kind not in MACHINE_ALONE and self._wrong(apart, fault, times)
        return found, False

    def _wrong(self, apart: ptx_recorded.Recorded, fault: Planting, times: int) -> bool:
        try:
            return self._difference(apart, fault.text, times) == "numbers"
        except Fault:
            return False

    def _refused(self, text: str) -> bool:
        try:
            for launch in self._launches:
                launch.again(text)
        except Fault:
            return True
        return False

    def fact(self, fault: Planting) -> str:
        """What is known of a fault that nothing caught."""
        if not self._refused(fault.probe):
            return "same"
        if any(self._refused(text) for text in fault.pairs):
            return "double"
        if not fault.noise:
            return ""
        try:
            different = [self._difference(launch, fault.noise, 1) for launch in self._launches]
        except Fault:
            return ""
        return "" if any(different) else "unused"


def launches(calls: Calls, arch: int) -> dict[str, list[ptx_recorded.Recorded]]:
    """By kernel, the launches whose text is that of its first."""
    every: list[ptx_recorded.Recorded] = []
    for make in calls.makes:
        torch.manual_seed(0)
        call = make(torch.device("cpu"), torch.bfloat16)
        with mock.patch.object(_launch, "multiprocessors", return_value=calls.programs):
            every += ptx_recorded.recorded(lambda call=call: testing._run(calls.op, call), arch)
    found = {}
    for kernel in calls.kernels:
        own = [launch for launch in every if launch.name == kernel]
        if kernel in ptx_fault_calls.ANY_GRID:
            own = [launch.before(grid=(calls.programs,)) for launch in own]
        alike = [launch for launch in own if launch.text == own[0].text]
        if kernel in ptx_fault_calls.ANY_SHARES:
            alike += [launch.before(grid=launch.grid[:1]) for launch in alike]
        edges = [launch.at_edges(*edge) for edge in calls.edges for launch in alike]
        found[kernel] = alike + [edge for edge in edges if edge]
    return found


def rows(name: str, arch: int, done: set[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """The faults of a call's kernels, but for those (kernel, number) that are done."""
    every = launches(CALLS[name], arch)
    gc.freeze()  # torch's objects: each of the thousands of runs would look through them
    for kernel, own in every.items():
        planted = Planted(own)
        for fault in mutations(own[0].text):
            if (kernel, fault.number) in done:
                continue
            check, numbers = planted.caught(fault)
            row: dict[str, Any] = {"call": name, "kernel": kernel, "arch": arch, "number": fault.number}
            row |= {"kind": fault.kind, "what": fault.what, "instruction": fault.instruction}
            row |= {"source": fault.source, "caught": check, "numbers_alone": numbers}
            yield row if check not in ("", "bits") else row | {"fact": planted.fact(fault)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", type=int)
    parser.add_argument("names", nargs="+", choices=CALLS)
    parser.add_argument("--to", type=Path, help="a folder")
    asked = parser.parse_args()
    for name in asked.names:
        path = asked.to and asked.to / f"mutations-{asked.arch}-{name.replace(' ', '_')}"
        before = path.read_text().splitlines() if path and path.exists() else []
        done = {(row["kernel"], row["number"]) for row in map(json.loads, before)}
        for row in rows(name, asked.arch, done):
            line = json.dumps(row)
            print(line, flush=True)
            if path:
                with path.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    with backend("auto"):
        main()
