"""The CPU part's threads: how many there are, and that calls end in every state of the pool."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from gptkern import GPT, GPTConfig
from gptkern.cpu_threads import VARIABLE, cores_of_quota, cpu_threads
from gptkern.ops import SamplerState, SamplingParams, _dispatch, sample

LOGITS = torch.randn(4, 40000, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def _tokens() -> list[int]:
    params = SamplingParams.make(*LOGITS.shape, top_k=50)
    state = SamplerState.make(*LOGITS.shape, seed=0)
    return sample(LOGITS, params=params, state=state).tokens.tolist()


def test_a_process_of_one_core_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert cpu_threads() == 1
        expected = _tokens()
    finally:
        os.sched_setaffinity(0, cores)
    monkeypatch.setenv(VARIABLE, "3")
    assert _tokens() == expected


def test_pytorch_may_have_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    torch.set_num_threads(1)
    assert cpu_threads() == 1


def test_the_variable_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "64")
    assert cpu_threads() == 64


@pytest.mark.parametrize("value", ["0", "-1", "two", "", "1.5", "²"])
def test_what_is_no_number_of_threads_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ValueError, match=f"{VARIABLE}={value!r}: it takes a whole number"):
        cpu_threads()


def test_quotas_of_a_control_group_and_those_above_it(tmp_path: Path) -> None:
    group = tmp_path / "above" / "own"
    group.mkdir(parents=True)
    own = tmp_path / "cgroup"
    own.write_text("3:memory:/elsewhere\n0::/above/own\n")
    assert cores_of_quota(tmp_path, own) > 4096
    (group / "cpu.max").write_text("max 100000\n")
    assert cores_of_quota(tmp_path, own) > 4096
    (group.parent / "cpu.max").write_text("250000 100000\n")
    assert cores_of_quota(tmp_path, own) == 3
    (group / "cpu.max").write_text("50000 100000\n")
    assert cores_of_quota(tmp_path, own) == 1
    assert cores_of_quota(tmp_path, tmp_path / "none") > 4096


def test_quotas_of_the_older_control_groups(tmp_path: Path) -> None:
    group = tmp_path / "cpu,cpuacct" / "own"
    group.mkdir(parents=True)
    own = tmp_path / "cgroup"
    own.write_text("4:cpu,cpuacct:/own\n0::/\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    (group / "cpu.cfs_quota_us").write_text("-1\n")
    assert cores_of_quota(tmp_path, own) > 4096
    (group / "cpu.cfs_quota_us").write_text("200000\n")
    assert cores_of_quota(tmp_path, own) == 2


def test_a_child_process_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "2")
    torch.set_num_threads(1)  # PyTorch's own pool does not outlive a fork
    expected = _tokens()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)  # a child that waits for the parent's threads would wait for ever
        os._exit(0 if _tokens() == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert _tokens() == expected


def test_short_calls_of_changing_numbers_of_threads_all_end(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _tokens()
    for number in range(300):
        monkeypatch.setenv(VARIABLE, str((1, 2, 3, 2, 5)[number % 5]))
        assert _tokens() == expected


def _model() -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=61, n_positions=128, n_layer=2, n_head=2, n_embd=64, eos_token_id=None)
    return GPT(config).eval()


def _generated(model: GPT) -> list[list[int]]:
    ids = torch.arange(10).reshape(2, 5)
    rows: list[list[int]] = model.generate(ids, max_new_tokens=60, do_sample=True, seed=3).tolist()
    return rows


def test_a_child_generates_that_was_forked_among_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    monkeypatch.setenv(VARIABLE, "3")
    torch.set_num_threads(1)
    model, beside, ended = _model(), _model(), threading.Event()
    expected = _generated(model)

    def generate() -> None:
        while not ended.is_set():
            assert _generated(beside) == expected

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate)
        try:
            for _ in range(5):
                child = os.fork()
                if child == 0:
                    signal.signal(signal.SIGALRM, signal.SIG_DFL)
                    signal.alarm(60)
                    os._exit(0 if _generated(model) == expected else 1)
                assert os.waitpid(child, 0)[1] == 0
                assert _generated(model) == expected
        finally:
            ended.set()
        running.result()


def test_python_threads_that_generate_at_once_get_their_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    monkeypatch.setenv(VARIABLE, "3")
    model, other = _model(), _model()
    expected = _generated(model)
    with ThreadPoolExecutor(4) as pool:
        assert all(found == expected for found in pool.map(_generated, [model, other] * 4))


def test_more_threads_than_cores_meet_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    monkeypatch.setenv(VARIABLE, "1")
    model, cores = _model(), os.sched_getaffinity(0)
    expected = _generated(model)
    monkeypatch.setenv(VARIABLE, "8")
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert _generated(model) == expected
    finally:
        os.sched_setaffinity(0, cores)


def test_threads_stay_free_to_run_where_the_process_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that moves away from another one is bound to a core for that moment alone."""
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    cores = os.sched_getaffinity(0)
    monkeypatch.setenv(VARIABLE, str(len(cores)))
    torch.set_num_threads(1)
    model = _model()
    child = os.fork()  # its threads are new
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        for _ in range(20):
            _generated(model)
            time.sleep(0.005)  # threads sleep, and wake on each other's cores
        threads = [int(thread.name) for thread in Path("/proc/self/task").iterdir()]
        os._exit(0 if all(os.sched_getaffinity(thread) == cores for thread in threads) else 1)
    assert os.waitpid(child, 0)[1] == 0
