"""``python -m gptkern.testing.ptx FILE``: check Triton kernels without a GPU."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from gptkern.ops._dispatch import INTERPRETED
from gptkern.testing.ptx import checks
from gptkern.testing.ptx.counters import Access, Counters

ARCHS = (80, 89, 90)
_MOST_ACCESSES = 3
_DESCRIPTION = """\
Check Triton kernels without a GPU.

FILE defines functions whose names begin with check_. Each makes tensors on the CPU, launches kernels on them
as on a GPU, and asserts that the result is right. The kernels are compiled for a GPU; what the compiler made
of them is executed on the CPU and watched: reads and writes outside of the tensors, memory and registers that
nobody wrote, copies and matrix products used before their wait, races between warps and between blocks,
deadlocks. With small sizes a launch takes about a second.

    import torch, triton, triton.language as tl

    @triton.jit
    def double(x_ptr, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < n, other=0)
        tl.store(x_ptr + at, x + x, mask=at < n)

    def check_double():
        x = torch.arange(1000.0)
        double[(triton.cdiv(1000, 256),)](x, 1000, BLOCK=256)
        assert torch.equal(x, torch.arange(1000.0) * 2)

Choose sizes that no tile divides. torch.manual_seed(0) is called before each check, and
triton.runtime.driver.active.get_active_torch_device() is the CPU. Autotuned kernels run with their first
configuration. The exit status is 0 if all checks pass, 1 if one does not, 2 if there is nothing to check."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gptkern.testing.ptx",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a Python file with check_ functions")
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="names of checks to run; all by default")
    parser.add_argument(
        "--arch",
        type=int,
        action="append",
        choices=ARCHS,
        help="compute capability to compile for; repeatable; 80 and 90 by default",
    )
    parser.add_argument(
        "--seeds", type=int, default=2, metavar="N", help="orders of blocks to try, 2 by default"
    )
    parser.add_argument(
        "--every-config", action="store_true", help="run each configuration of autotuned kernels"
    )
    parser.add_argument(
        "--counters",
        action="store_true",
        help="print what each kernel does: instructions, bytes, sectors, bank conflicts, matrix operations",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = _parser()
    asked = parser.parse_intermixed_args(arguments)
    path: Path = asked.file
    if not path.is_file():
        parser.error(f"{path}: no such file")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, so that nothing is compiled: unset it")
    if asked.seeds < 1:
        parser.error(f"--seeds: at least 1 order of blocks is needed; got {asked.seeds}")
    sys.path.insert(0, str(path.resolve().parent))
    failures = ran = 0
    for arch in asked.arch or (80, 90):
        launches = checks.Launches(arch, asked.every_config)
        with launches.active():
            module = checks.load(path)
            found = checks.checks_of(module)
            unknown = sorted(set(asked.checks) - set(found))
            if unknown or not found:
                names = ", ".join(found) or "none"
                missing = f"no check {', '.join(unknown)}" if unknown else "nothing to check"
                rule = f"functions whose names begin with {checks.PREFIX} are checks: {names}"
                parser.error(f"{path} has {missing}; {rule}. See --help for an example")
            for name, check in found.items():
                if not asked.checks or name in asked.checks:
                    finding = checks.run_check(name, check, launches, asked.seeds, path)
                    failures, ran = failures + (finding is not None), ran + 1
                    _tell(name, launches, finding)
        if asked.counters:
            for kernel, counters in launches.counters.items():
                print(_counts(kernel, arch, counters))
    print(f"{ran - failures} of {ran} passed")
    return int(failures > 0)


def _tell(name: str, launches: checks.Launches, finding: checks.Finding | None) -> None:
    if finding is None:
        launched = _launches(launches.count)
        note = launched if launches.count else "no kernel was launched"
        print(f"sm_{launches.arch}  {name}: passed, {note}", flush=True)
        return
    where = f" in {finding.kernel}, launch {launches.count}, order {finding.seed}" if finding.kernel else ""
    print(f"sm_{launches.arch}  {name}: FAILED, {finding.what}{where}")
    print(textwrap.indent("\n".join(finding.lines), "    "), flush=True)


def _launches(count: int) -> str:
    return f"{count} launch{'es' if count != 1 else ''}"


def _counts(kernel: str, arch: int, counters: Counters) -> str:
    """A kernel's counts, and the accesses that are furthest from the fewest sectors or wavefronts."""
    classes = ", ".join(f"{count} {label}" for label, count in counters.instructions.most_common())
    requested, sectors, fewest = counters.total("global")
    _, wavefronts, fewest_wavefronts = counters.total("shared")
    lines = [
        f"sm_{arch}  {kernel}, {_launches(counters.launches)}",
        f"    instructions of warps: {counters.instructions.total()} ({classes})",
        f"    global memory: {counters.read} bytes read and {counters.written} written, each once a launch; "
        f"{requested} asked for",
        f"    in {sectors} sectors of 32 bytes; {fewest} would do",
    ]
    if wavefronts:
        lines.append(
            f"    shared memory: {wavefronts} wavefronts; {fewest_wavefronts} without bank conflicts"
        )
    if counters.operations:
        lines.append(f"    matrix products: {counters.operations} operations")
    worst = sorted(counters.accesses.values(), key=lambda access: access.fewest - access.units)
    lines += [_excess(access) for access in worst[:_MOST_ACCESSES] if access.units > access.fewest]
    return "\n".join(lines)


def _excess(access: Access) -> str:
    unit = "sectors" if access.space == "global" else "wavefronts"
    return f"      {access.source}: {access.units} {unit}, {access.fewest} would do: {access.instruction}"


if __name__ == "__main__":
    sys.exit(main())
