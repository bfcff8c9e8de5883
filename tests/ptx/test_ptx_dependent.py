"""Dependent launches: whatever the launch before uses is left alone until ``griddepcontrol.wait``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ptx_support import module

from gptkern.testing.ptx import Fault, execute
from gptkern.testing.ptx.dependent import Stream

START, WAIT = "griddepcontrol.launch_dependents;", "griddepcontrol.wait;"
PLACE = "mul.wide.u32 %rd5, %r0, 4; add.s64 %rd6, %rd5, %rd0; add.s64 %rd7, %rd5, %rd1;"
READ, WRITE = "ld.global.b32 %r1, [%rd6];", "st.global.b32 [%rd7], %r1;"
COPY = f"{READ} {WRITE}"


def ints(count: int = 32) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


class Launches:
    """Launches of bodies with two tensors, in one stream."""

    def __init__(self) -> None:
        self._stream = Stream()

    def __call__(self, body: str, *tensors: torch.Tensor, dependent: bool = True, threads: int = 32) -> None:
        text = module(f"{PLACE} {body}", 2, threads)
        execute(text, (1,), tensors, shared_bytes=128, stream=self._stream, dependent=dependent)


def refused(launches: Launches, body: str, *tensors: torch.Tensor, **options: Any) -> str:
    with pytest.raises(Fault) as caught:
        launches(body, *tensors, **options)
    assert caught.value.check == "dependent"
    return str(caught.value)


def test_a_read_of_the_launch_befores_result_needs_the_wait() -> None:
    a, b, c = ints(), torch.zeros(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    for start in (START, ""):  # without it the next launch may begin when the blocks end
        launches = Launches()
        launches(f"{start} {COPY}", a, b)
        message = "lane 0 reads parameter 0 before griddepcontrol.wait, which the launch before writes: k"
        assert message in refused(launches, COPY, b, c)
        assert message in refused(launches, f"{READ} {WAIT} {WRITE}", b, c)
        launches(f"{WAIT} {COPY}", b, c)
        assert torch.equal(c, a)


def test_a_launch_that_is_not_dependent_waits_by_itself() -> None:
    a, b, c = ints(), ints(), ints()
    launches = Launches()
    launches(f"{START} {COPY}", a, b)
    launches(COPY, b, c, dependent=False)


def test_what_the_launch_before_reads_is_not_overwritten() -> None:
    a, b, c = ints(), ints(), ints()
    launches = Launches()
    launches(f"{START} {COPY}", a, b)
    assert "lane 0 writes parameter 1 before" in refused(launches, COPY, c, a)
    launches(f"ld.global.b32 %r1, [%rd6]; {WAIT} {WRITE}", c, a)  # what nobody writes is read at any time


def test_only_what_the_launch_before_writes_counts() -> None:
    a, b, c = ints(64), ints(64), ints(64)
    launches = Launches()
    launches(f"{START} {COPY}", a, b)
    late = "ld.global.b32 %r1, [%rd6 + 128]; st.global.b32 [%rd7 + 128], %r1;"
    launches(late, b, c)


def test_copies_and_atomics_wait_as_well() -> None:
    a, b, c = ints(), ints(), ints()
    launches = Launches()
    launches(f"{START} {COPY}", a, b)
    copied = "shl.b32 %r2, %r0, 2; cp.async.ca.shared.global [%r2], [%rd6], 4; cp.async.wait_all;"
    refused(launches, copied, b, c)
    refused(launches, "atom.global.add.u32 %r2, [%rd6], 1;", b, c)
    launches(f"{WAIT} {copied}", b, c)


def test_each_thread_waits_or_comes_after_one_that_did() -> None:
    a, b, c = ints(64), ints(64), ints(64)
    some = "setp.lt.u32 %p1, %r0, 32; @%p1 griddepcontrol.wait;"
    launches = Launches()
    launches(f"{START} {COPY}", a, b, threads=64)
    assert "lane 32 reads" in refused(launches, f"{some} {COPY}", b, c, threads=64)
    launches(f"{some} bar.sync 0; {COPY}", b, c, threads=64)


def test_who_lets_the_next_begin_before_waiting_hands_on_the_launches_before() -> None:
    """The third launch meets the first, unless the second waited before it let the third begin."""
    for second, met in ((f"{START} {WAIT}", True), (f"{WAIT} {START}", False), (START, True), ("", True)):
        a, b, c, d = ints(), ints(), ints(), ints()
        launches = Launches()
        launches(f"{START} {COPY}", a, b)
        launches(second, c, c)
        if met:
            refused(launches, COPY, b, d)
        else:
            launches(COPY, b, d)


# --- the kernels of a decode step


def step(*change: str) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("ptx_dependent.py")), *change]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_decode_step_waits_where_it_must() -> None:
    found = step()
    assert found["failure"] == ""
    layer = ["decode_linear_kernel", "decode_attention_kernel"] + 3 * ["decode_linear_kernel"]
    assert found["launches"] == ["decode_embed_kernel", *layer, *layer, "decode_linear_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["removed", "late"])
@pytest.mark.parametrize("kernel", ["decode_linear_kernel", "decode_attention_kernel"])
def test_a_wait_that_is_missing_or_late_is_found(change: str, kernel: str) -> None:
    failure = step(change, kernel)["failure"]
    assert "reads parameter 0 before griddepcontrol.wait, which the launch before writes" in failure
