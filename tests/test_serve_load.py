"""The server under load: the same answers, nothing left behind, limits that hold, ends that are proper."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]")

from serve_support import NAME, Running, serving, small_model

from gptkern import GPT

OPENINGS = ["", "x" * 70, "the quick brown fox jumps over the lazy dog and runs away from all of it "]


@pytest.fixture(scope="module")
def model() -> GPT:
    return small_model()


def bodies(count: int, seed: int) -> list[dict[str, Any]]:
    """Requests of every kind."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        body: dict[str, Any] = {
            "prompt": rng.choice(OPENINGS) + "".join(rng.choices("abcdef ", k=rng.randint(1, 20))),
            "max_tokens": rng.randint(1, 24),
            "seed": rng.randrange(50),
            "temperature": rng.choice([0, 0.7, 1.3]),
            "logprobs": rng.choice([None, 0, 2]),
            "stream": rng.random() < 0.5,
        }
        if rng.random() < 0.2:
            body["n"] = 2
        if rng.random() < 0.2:
            body["frequency_penalty"] = 0.5
        if rng.random() < 0.1:
            body["regex"] = "[a-z]{4,30}"
        found.append(body)
    return found


def choices_of(answer: httpx.Response) -> list[Any]:
    """The choices of an answer, those of a stream put together."""
    assert answer.status_code == 200, answer.text
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return [
            [c["text"], c["finish_reason"], (c["logprobs"] or {}).get("token_logprobs")]
            for c in answer.json()["choices"]
        ]
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    whole: dict[int, list[Any]] = {}
    for event in events:
        (choice,) = json.loads(event)["choices"]
        own = whole.setdefault(choice["index"], ["", None, None])
        own[0] += choice["text"]
        own[1] = choice["finish_reason"]
        if choice["logprobs"]:
            own[2] = (own[2] or []) + choice["logprobs"]["token_logprobs"]
    return [whole[index] for index in sorted(whole)]


def _until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_answers_are_those_of_an_idle_server(model: GPT) -> None:
    asked = bodies(64, 1)
    with serving(model, {"max_seqs": 16}) as idle:
        alone = [choices_of(idle.post("/v1/completions", **body)) for body in asked]

    async def ask(client: httpx.AsyncClient, place: int, rng: random.Random) -> list[Any] | None:
        await asyncio.sleep(rng.random() * 0.5)
        body = {"model": NAME, **asked[place]}
        if place % 4 == 3:
            # One that goes away.
            async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                async for _ in answer.aiter_raw():
                    break
            return None
        return choices_of(await client.post("/v1/completions", json=body))

    # Few sequences and fewer pages than they want: rows wait, join, share beginnings and give way.
    with serving(model, {"max_seqs": 6, "cache_tokens": 6 * 64, "prefill_chunk": 64}) as server:

        async def main() -> list[list[Any] | None]:
            limits = httpx.Limits(max_connections=64)
            async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
                rng = random.Random(2)
                return await asyncio.gather(*(ask(client, place, rng) for place in range(len(asked))))

        for _ in range(2):
            together = asyncio.run(main())
            for place, (own, expected) in enumerate(zip(together, alone, strict=True)):
                assert own is None or own == expected, asked[place]
        _until(server.is_idle)


def _disconnects(model: GPT, tries: int) -> None:
    rng = random.Random(3)
    with serving(model, {"max_seqs": 4}) as server:
        inner = server.service.inner
        passes, count, cancelled = 0, 0, list[tuple[int, int]]()
        late: list[tuple[int, int]] = []
        step, cancel = inner.step, inner.cancel

        def counting_step() -> Any:
            nonlocal passes
            passes += 1
            events = step()
            # A request that was cancelled before this pass began is in it no more.
            for number, before in list(cancelled):
                if before < passes:
                    cancelled.remove((number, before))
                    if inner.has(number):
                        late.append((number, passes))
            return events

        def noting_cancel(number: int) -> None:
            nonlocal count
            cancel(number)
            cancelled.append((number, passes))
            count += 1

        inner.step, inner.cancel = counting_step, noting_cancel  # type: ignore[method-assign]
        for _ in range(tries):
            body = {
                "model": NAME,
                "prompt": "ab",
                "max_tokens": 120,
                "ignore_eos": True,
                "n": rng.randint(1, 4),
                "stream": rng.random() < 0.7,
            }
            content = json.dumps(body).encode()
            with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as raw:
                raw.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n" % len(content) + content
                )
                if body["stream"]:
                    raw.recv(rng.choice([1, 500, 4000]))
                else:
                    time.sleep(rng.random() * 0.01)
        _until(server.is_idle)
        assert late == [] and count > tries // 2
        assert choices_of(server.post("/v1/completions", prompt="ab", max_tokens=5, seed=1))


def test_who_goes_away_leaves_nothing(model: GPT) -> None:
    _disconnects(model, 30)


@pytest.mark.slow
def test_very_many_that_go_away_leave_nothing(model: GPT) -> None:
    _disconnects(model, 500)


def _flood(model: GPT, count: int, at_once: int) -> Counter[int]:
    """Ask ``count`` times, ``at_once`` of them together; the statuses."""
    found: Counter[int] = Counter()

    async def main(server: Running) -> None:
        gate = asyncio.Semaphore(at_once)
        limits = httpx.Limits(max_connections=at_once)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:

            async def ask() -> None:
                async with gate:
                    body = {"model": NAME, "prompt": "ab", "max_tokens": 30, "ignore_eos": True}
                    answer = await client.post("/v1/completions", json=body)
                    found[answer.status_code] += 1
                    if answer.status_code == 429:
                        assert answer.headers["retry-after"] == "1"

            await asyncio.gather(*(ask() for _ in range(count)))

    with serving(model, {"max_seqs": 4}, most_rows=16, most_tokens=16 * 32) as server:
        most = [0, 0]
        admission = server.service.admission
        reserve = admission.reserve

        def noting(rows: int) -> Any:
            ticket = reserve(rows)
            most[0] = max(most[0], admission.rows)
            return ticket

        admission.reserve = noting  # type: ignore[method-assign]
        asyncio.run(main(server))
        assert most[0] <= 16
        _until(server.is_idle)
        assert server.complete("ab", max_tokens=2)["choices"]
    return found


def test_beyond_the_limits_is_429(model: GPT) -> None:
    found = _flood(model, 200, 100)
    assert set(found) == {200, 429} and found[200] >= 16


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_requests_take_no_memory(model: GPT) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    _flood(model, 500, 500)
    before = _resident()
    found = _flood(model, 10_000, 500)
    assert set(found) == {200, 429} and sum(found.values()) == 10_000
    assert _resident() - before < 64 << 20


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_a_slow_reader_holds_up_nobody_and_gets_all(model: GPT) -> None:
    body = {
        "model": NAME,
        "prompt": "ab",
        "max_tokens": 100,
        "ignore_eos": True,
        "n": 4,
        "seed": 1,
        "logprobs": 20,
        "stream": True,
    }
    with serving(model, {"max_seqs": 8}) as server:
        expected = choices_of(httpx.post(server.url + "/v1/completions", json=body, timeout=60))
        content = json.dumps(body).encode()
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content
            )
            # It has begun; the engine is done with it while nobody reads.
            received = raw.recv(16)
            _until(lambda: server.service.inner.load.running == server.service.inner.load.waiting == 0)
            assert server.complete("cd", max_tokens=4, seed=1)["choices"]
            while part := raw.recv(65536):
                received += part
        # More than the sockets' buffers hold.
        assert len(received) > 1 << 16
        texts = ["", "", "", ""]
        for line in received.splitlines():
            if line.startswith(b"data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                texts[choice["index"]] += choice["text"]
        assert texts == [own[0] for own in expected]
        _until(server.is_idle)


def _streams(server: Running, count: int, tokens: int) -> tuple[list[threading.Thread], list[list[Any]]]:
    """Streams that have begun, and where their choices go."""
    found: list[list[Any]] = []
    begun = threading.Semaphore(0)

    def read() -> None:
        body = {"model": NAME, "prompt": "ab", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            own = [next(lines)]
            begun.release()
            own += lines
        found.append(own)

    threads = [threading.Thread(target=read) for _ in range(count)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert begun.acquire(timeout=60)
    return threads, found


@pytest.mark.parametrize(("drain", "reason"), [(30.0, "length"), (0.0, "abort")])
def test_a_drain_lets_answers_end(model: GPT, drain: float, reason: str) -> None:
    with serving(model, {"max_seqs": 4}, drain=drain) as server:
        inner = server.service.inner
        step = inner.step

        def slow_step() -> Any:
            time.sleep(0.01)
            return step()

        inner.step = slow_step  # type: ignore[method-assign]
        threads, found = _streams(server, 6, 60)
        server.server.handle_exit(signal.SIGTERM, None)
        _until(lambda: server.service.draining)
        if drain:
            # Without a drain the server may have gone already.
            assert httpx.get(server.url + "/health").status_code == 503
            assert server.error(status=503)["code"] == "draining"
        for thread in threads:
            thread.join(60)
        assert len(found) == 6
        for lines in found:
            events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
            assert events[-1] == "[DONE]"
            assert json.loads(events[-2])["choices"][0]["finish_reason"] == reason
        assert server.is_idle()


PROCESS = """
import sys
sys.path.insert(0, {tests!r})
from serve_support import small_model
from gptkern.serve import ServeSettings, run
raise SystemExit(run(small_model(), ServeSettings(port=0, access_log=False, drain=30), max_seqs=4))
"""


@pytest.fixture
def process() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address."""
    code = PROCESS.format(tests=str(Path(__file__).parent))
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as started:
        assert started.stderr is not None
        try:
            line = started.stderr.readline()
            assert " at http://" in line, line + started.stderr.read()
            yield started, line.split()[-1]
        finally:
            started.kill()


@pytest.mark.slow
@pytest.mark.ci
def test_sigterm_loses_nothing(process: tuple[subprocess.Popen[str], str]) -> None:
    started, url = process
    found: list[str] = []

    def read() -> None:
        body = {"model": NAME, "prompt": "ab", "max_tokens": 120, "ignore_eos": True, "n": 4, "stream": True}
        found.append(httpx.post(url + "/v1/completions", json=body, timeout=60).text)

    threads = [threading.Thread(target=read) for _ in range(12)]
    for thread in threads:
        thread.start()
    _until(lambda: "num_requests_waiting" in httpx.get(url + "/metrics").text)
    _until(lambda: _metric(url, "num_requests_running") > 0 or len(found) == 12)
    started.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    assert started.wait(60) == 0
    # Those that came before the signal was seen; all of them are whole.
    assert found
    assert all(text.count('"finish_reason":"length"') == 4 for text in found if '"draining"' not in text)


def _metric(url: str, name: str) -> float:
    lines = httpx.get(url + "/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"gptkern:{name}")).split()[-1])


@pytest.mark.slow
def test_ctrl_c_ends_with_its_code(process: tuple[subprocess.Popen[str], str]) -> None:
    started, url = process
    assert httpx.get(url + "/health").status_code == 200
    started.send_signal(signal.SIGINT)
    assert started.wait(60) == 130
