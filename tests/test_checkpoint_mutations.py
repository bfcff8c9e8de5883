"""Damaged checkpoints load right or are refused by a CheckpointError, within 1 GB and 5 s."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("checkpoint_mutations.py")


# in a process of its own: what other tests import and compile would be copied into each child
def opened(*arguments: str) -> None:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(900)
def test_a_hundred_damaged_checkpoints() -> None:
    opened("--count", "100", "--seed", "1")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thousands_of_damaged_checkpoints() -> None:
    opened("--count", "10000", "--seed", "2")
