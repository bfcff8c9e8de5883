"""``python -m gptkern.testing.ptx FILE``: kernels as in tutorials pass, each planted fault is told well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("tutorial_kernels.py")
# Several commands in one process, which compiles nothing twice.
COMMANDS = """
import sys
from gptkern.testing.ptx.__main__ import main
for command in sys.argv[1:]:
    print("==", flush=True)
    try:
        status = main(command.split())
    except SystemExit as left:
        status = left.code
    print("status", status, flush=True)
"""


def outputs(*commands: str) -> list[str]:
    """The output of each command, with its exit status in the last line."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *commands],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.split("==\n")[1:]


# The check, a line of the source, and what becomes of it; words of the message.
FAULTS = {
    "a load without its mask": (
        "add", "x = tl.load(x_ptr + at, mask=mask)", "x = tl.load(x_ptr + at)",
        ["FAILED, bounds in add_kernel, launch 1, order 0", "beyond the end of x_ptr, in block (3, 0, 0)"],
    ),
    "a mask that is off by one": (
        "add", "mask = at < n\n", "mask = at <= n\n",
        ["bounds", "lane 116 accesses 4 bytes, 4 beyond the end of x_ptr", "x = tl.load(x_ptr + at, mask="],
    ),
    "programs that overlap": (
        "add", "tl.program_id(0) * BLOCK + tl", "tl.program_id(0) * (BLOCK // 2) + tl",
        ["race in add_kernel", "writes out_ptr without an order to block", "tl.store(out_ptr + at, x + y"],
    ),
    "a row's stride that is the block's": (
        "softmax", "x_ptr + row * stride + at", "x_ptr + row * BLOCK + at",
        ["bounds in softmax_kernel", "beyond the end of x_ptr", "x = tl.load(x_ptr + row * BLOCK + at"],
    ),
    "a maximum over zeros beyond the row": (
        "softmax", ', other=-float("inf")', "",
        ["FAILED, result", "torch.testing.assert_close(out, torch.softmax"],
    ),
    "rows that do not come round": (
        "matmul", "(rows % M)[:, None]", "rows[:, None]",
        ["bounds in matmul_kernel", "beyond the end of a_ptr"],
    ),
    "a mask that does not follow k": (
        "matmul", "mask=depth[None, :] < K - k * BLOCK_K", "mask=depth[None, :] < K",
        ["bounds in matmul_kernel", "beyond the end of a_ptr", "by cp.async"],
    ),
    "a group that counts rows which are not there": (
        "matmul", "// size_m", "// GROUP_M",
        ["race in matmul_kernel", "writes c_ptr without an order to block"],
    ),
}  # fmt: skip


def planted(fault: str, folder: Path) -> str:
    """A command on the file with a fault."""
    check, before, after, _ = FAULTS[fault]
    text = FILE.read_text()
    assert text.count(before) == 1
    path = folder / f"kernels_{list(FAULTS).index(fault)}.py"
    path.write_text(text.replace(before, after))
    return f"{path} check_{check} --arch 90 --seeds 1"


def told(fault: str, output: str) -> None:
    for words in FAULTS[fault][3]:
        assert words in output, output
    assert output.endswith("0 of 1 passed\nstatus 1\n"), output


def test_a_kernel_that_is_right_passes_and_one_that_is_not_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    broken = [fault for fault, row in FAULTS.items() if row[0] == "add"]
    right, nothing, unknown, missing, *faults = outputs(
        f"{FILE} check_add --arch 90 --counters",
        f"{tmp_path}/empty.py",
        f"{FILE} check_nothing",
        f"{tmp_path}/none.py",
        *(planted(fault, tmp_path) for fault in broken),
    )
    for fault, output in zip(broken, faults, strict=True):
        told(fault, output)
    first, *counts, total, status = right.splitlines()
    assert first == "sm_90  check_add: passed, 1 launch"
    assert (total, status) == ("1 of 1 passed", "status 0")
    # Two orders of blocks: 2 x 1000 numbers are read, 1000 written.
    assert "global memory: 16000 bytes read and 8000 written, each once" in counts[2]
    assert "24000 asked for" in counts[2]
    # 1000 is no multiple of 16: a lane's two numbers are loaded one by one, half a sector at a time.
    assert counts[3].strip() == "in 1500 sectors of 32 bytes; 756 would do"
    assert "tutorial_kernels.py:19: 250 sectors, 126 would do: @%p1 ld.global.b32" in "".join(counts)
    rule = "functions whose names begin with check_ are checks"
    assert f"has nothing to check; {rule}: none" in nothing
    assert f"has no check check_nothing; {rule}: check_add, check_softmax, check_matmul" in unknown
    assert "none.py: no such file" in missing
    assert all(output.endswith("status 2\n") for output in (nothing, unknown, missing))


@pytest.mark.slow
def test_kernels_of_tutorials_pass_with_every_configuration() -> None:
    (output,) = outputs(f"{FILE} --every-config --seeds 3")
    assert "check_matmul: passed, 2 launches" in output
    assert output.endswith("6 of 6 passed\nstatus 0\n")


@pytest.mark.slow
def test_faults_in_kernels_of_tutorials_are_told(tmp_path: Path) -> None:
    broken = [fault for fault, row in FAULTS.items() if row[0] != "add"]
    for fault, output in zip(broken, outputs(*(planted(f, tmp_path) for f in broken)), strict=True):
        told(fault, output)


@pytest.mark.slow
def test_errors_of_a_check_are_told_with_its_line(tmp_path: Path) -> None:
    header = FILE.read_text().partition("def check_add")[0]
    path = tmp_path / "kernels.py"
    path.write_text(
        header
        + """
def check_misspelt():
    add_kernel[(1,)](torch.zeros(4), torch.zeros(4), torch.zeros(4), 4, BLOK=4)


def check_elsewhere():
    add_kernel[(1,)](torch.zeros(4, device="meta"), torch.zeros(4), torch.zeros(4), 4, BLOCK=4)


def check_nothing():
    add_kernel[(0,)](torch.zeros(4), torch.zeros(4), torch.zeros(4), 4, BLOCK=4)
"""
    )
    (output,) = outputs(f"{path} --arch 80 --seeds 1")
    assert "check_misspelt: FAILED" in output and "BLOK=4" in output
    assert "add_kernel: x_ptr is on meta; checks take tensors on the CPU" in output
    assert "check_nothing: passed" in output
    assert output.endswith("1 of 3 passed\nstatus 1\n")


def test_the_interpreter_is_in_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    from gptkern.ops._dispatch import INTERPRETED
    from gptkern.testing.ptx.__main__ import main

    if not INTERPRETED:
        pytest.skip("kernels are compiled here")
    with pytest.raises(SystemExit) as left:
        main([str(FILE)])
    assert left.value.code == 2
    assert "TRITON_INTERPRET is set, so that nothing is compiled: unset it" in capsys.readouterr().err


TABLE_OF_ADDRESSES = """
import torch, triton, triton.language as tl
from gptkern.testing.ptx import reachable

@triton.jit
def fill(pointers, BLOCK: tl.constexpr):
    place = tl.load(pointers + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    tl.store(place + tl.arange(0, BLOCK), 7.0)

@triton.jit
def say(x_ptr):
    tl.device_print("x", tl.load(x_ptr))

def launch(tensors):
    fill[(3,)](torch.tensor([tensor.data_ptr() for tensor in tensors]), BLOCK=32)
    assert all(torch.all(tensor == 7) for tensor in tensors)

def check_reachable():
    tensors = [torch.zeros(32) for _ in range(3)]
    with reachable(*tensors):
        launch(tensors)

def check_unknown():
    launch([torch.zeros(32) for _ in range(3)])

def check_on_a_gpu():
    torch.zeros(3, device="cuda")

def check_printed():
    say[(1,)](torch.zeros(3))
"""


def test_tensors_that_are_found_by_addresses_are_named_and_messages_say_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "addresses.py"
    path.write_text(TABLE_OF_ADDRESSES)
    (output,) = outputs(
        f"{path} --seeds 1 --arch 90 check_reachable check_unknown check_on_a_gpu check_printed"
    )
    assert "check_reachable: passed, 1 launch" in output
    assert "where no tensor is that was passed, in block" in output
    assert "by addresses in memory: see gptkern.testing.ptx.reachable" in output
    assert "check_on_a_gpu: FAILED, AssertionError" in output
    assert "a check's tensors are on the CPU: triton.runtime.driver.active" in output
    assert "the executor does not serve the operand" in output
    assert output.endswith("1 of 4 passed\nstatus 1\n")
