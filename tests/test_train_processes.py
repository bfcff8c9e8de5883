"""Training killed and gone on with; training by two processes, against one."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gptkern.gpt import GPT
from gptkern.train import Settings, train
from gptkern.train.logs import read_log

WORKER = """
import json, os, sys, torch
from pathlib import Path
from gptkern.train import Settings, train
torch.set_num_threads(1)
begun = any(Path(sys.argv[2]).glob("checkpoints/step-*"))
train(Settings.from_dict(json.loads(sys.argv[1])), sys.argv[2], resume=begun)
# gloo's threads, alive while the interpreter ends, abort it now and then.
left = [Path(f"/proc/self/task/{thread}/comm").read_text() for thread in os.listdir("/proc/self/task")]
assert not any("gloo" in name for name in left), left
"""
BASE: dict[str, dict[str, Any]] = {
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.1},
    "data": {"tokenizer": "bytes", "context": 16},
    "train": {"steps": 40, "batch_size": 4, "device": "cpu"},
    "optimizer": {"lr": 1e-3},
    "eval": {"every": 10},
    "checkpoint": {"every": 4},
    "log": {"every": 1},
}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """As the workers: sums of other numbers of threads differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_settings(folder: Path, **tables: dict[str, Any]) -> dict[str, Any]:
    text = folder / "text.txt"
    text.write_text("To be, or not to be: that is the question.\n" * 60)
    settings = {name: BASE.get(name, {}) | tables.get(name, {}) for name in BASE.keys() | tables.keys()}
    settings["data"] = settings["data"] | {"path": [str(text)]}
    return settings


def start(settings: dict[str, Any], out: Path, **environment: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, json.dumps(settings), str(out)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]


def run_together(settings: dict[str, Any], out: Path, world: int) -> None:
    """``world`` processes joined by gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [start(settings, out, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(world)]
    for process in started:
        finish(process)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return GPT.from_pretrained(folder).state_dict()


def largest_difference(a: Path, b: Path) -> float:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def assert_equal_runs(a: Path, b: Path) -> None:
    """Weights, losses and gradient norms (to whose scale AdamW is blind) within 1e-5."""
    assert largest_difference(a / "model", b / "model") < 1e-5
    rows = [read_log(folder / "log.jsonl") for folder in (a, b)]
    for one, other in zip(*rows, strict=True):
        for key in one.keys() & {"loss", "val_loss", "grad_norm"}:
            assert one[key] == pytest.approx(other[key], abs=1e-5), (one["step"], key)


def last_step(log: Path) -> int:
    return max((row["step"] for row in read_log(log)), default=0)


def killed_and_resumed(tmp_path: Path, kills: int) -> None:
    settings = run_settings(tmp_path)
    train(Settings.from_dict(settings), tmp_path / "whole")
    out = tmp_path / "broken"
    log = out / "log.jsonl"
    chance = random.Random(0)
    for _ in range(kills):
        process = start(settings, out)
        done = [int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")]
        # A few steps beyond the newest checkpoint, and then at any moment of a step or of a save.
        wanted = max(done, default=0) + chance.randint(0, 6)
        while process.poll() is None and last_step(log) <= wanted:
            time.sleep(0.005)
        time.sleep(chance.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(settings, out))
    assert largest_difference(tmp_path / "whole" / "model", out / "model") == 0.0
    evaluations = [
        [(row["step"], row["val_loss"]) for row in read_log(folder / "log.jsonl") if "val_loss" in row]
        for folder in (tmp_path / "whole", out)
    ]
    assert evaluations[0] == evaluations[1]
    assert not list((out / "checkpoints").glob("writing-*"))


def test_killed_once(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_twenty_times(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, 20)


def test_ddp_equals_one_process_and_resumes_alone(tmp_path: Path) -> None:
    """Two processes with half the batch each; then one goes on with their checkpoint."""
    settings = run_settings(tmp_path, train={"steps": 8}, model={"dropout": 0.0}, eval={"every": 4})
    run_together(settings, tmp_path / "two", 2)
    train(Settings.from_dict(settings), tmp_path / "one")
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    longer = run_settings(
        tmp_path, train={"steps": 12}, model={"dropout": 0.0}, schedule={"name": "constant"}
    )
    train(Settings.from_dict(longer), tmp_path / "one", resume=True)
    train(Settings.from_dict(longer), tmp_path / "two", resume=True)
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_fsdp_equals_one_process_and_resumes_alone(tmp_path: Path) -> None:
    together = {"strategy": "fsdp", "micro_batch_size": 1}
    sharded = run_settings(tmp_path, train={"steps": 8, **together}, model={"dropout": 0.0})
    run_together(sharded, tmp_path / "two", 2)
    train(Settings.from_dict(sharded), tmp_path / "one")
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    longer = run_settings(tmp_path, train={"steps": 12, **together}, model={"dropout": 0.0})
    train(Settings.from_dict(longer), tmp_path / "two", resume=True)
    run_together(longer, tmp_path / "one", 2)
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
