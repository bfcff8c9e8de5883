"""The cost of the server beside its engine, and its latencies by load, as ratios and times within one run.

    pytest benchmarks/bench_serve.py -n 0 -s --benchmark-enable

The server runs in a process of its own; the client is this one, so that on few cores the two share them.
``serve_peers.py`` measures other servers beside it, on the same weights.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from gptkern import GPT, Engine, Request

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STREAMS = 32
NEW = 128
ROUNDS = 5
PROMPT = "First Citizen:\nBefore we proceed any further, hear me speak."


@contextmanager
def server(*command: str, url: str, ready: str = "/health") -> Iterator[int]:
    """The number of a server's process, from when it answers on, at the path ``ready``."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 120
            while True:
                assert process.poll() is None and time.monotonic() < end, "the server does not answer"
                try:
                    if httpx.get(url + ready, timeout=1).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(0.1)
            yield process.pid
        finally:
            process.terminate()


@contextmanager
def own_server(port: int) -> Iterator[int]:
    """gptkern's server of the embedded model; its process."""
    url = f"http://127.0.0.1:{port}"
    options = [f"--port={port}", f"--device={DEVICE}", f"--max-seqs={STREAMS}", "--no-access-log"]
    with server(sys.executable, "-m", "gptkern", "serve", "embedded", *options, url=url) as process:
        yield process


def processor_seconds(process: int) -> float:
    """The processor time that a process, with its threads, has had."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


async def stream(port: int, path: str, body: dict[str, Any]) -> list[float]:
    """The times at which a stream's chunks of text came, from when it was asked for.

    By hand: a client's library costs more than the server.
    """
    content = json.dumps(body | {"stream": True}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    times: list[float] = []
    received = b""
    while part := await reader.read(1 << 16):
        received = part if not received.startswith(b"HTTP/1.1 4") else received + part
        if b'"choices":[{' in part or b'"choices": [{' in part:
            times.append(time.perf_counter() - began)
    writer.close()
    assert times, received[:500]
    return times


def _body(seed: int) -> dict[str, Any]:
    shared = {"model": "gptkern", "max_tokens": NEW, "ignore_eos": True}
    return shared | {"prompt": f"{PROMPT}\n{seed}", "seed": seed}


def _all_streams(port: int) -> float:
    """Tokens a second of ``STREAMS`` streams at once."""

    async def main() -> None:
        await asyncio.gather(*(stream(port, "/v1/completions", _body(seed)) for seed in range(STREAMS)))

    began = time.perf_counter()
    asyncio.run(main())
    return STREAMS * NEW / (time.perf_counter() - began)


class Speeds(NamedTuple):
    """Tokens a second, of the clock and of processor time."""

    clock: float
    processor: float


def _engine_alone(engine: Engine, tokenizer: Any) -> Speeds:
    """The same requests in this process, without a server."""
    began, spent = time.perf_counter(), time.process_time()
    for seed in range(STREAMS):
        options = {"max_new_tokens": NEW, "eos_token_id": None, "do_sample": True, "top_k": 0, "seed": seed}
        engine.add(Request(prompt=tokenizer.encode(f"{PROMPT}\n{seed}"), options=options))
    while engine.has_work:
        engine.step()
    tokens = STREAMS * NEW
    return Speeds(tokens / (time.perf_counter() - began), tokens / (time.process_time() - spent))


def _served(port: int, process: int) -> Speeds:
    spent = processor_seconds(process)
    clock = _all_streams(port)
    return Speeds(clock, STREAMS * NEW / (processor_seconds(process) - spent))


def test_tokens_of_32_streams(benchmark: BenchmarkFixture) -> None:
    """32 streams through the server against the engine alone, in turn: the goal is 0.9 of its tokens/s.

    Processor time says the same of a machine that others use too.
    """
    model = GPT.from_pretrained(device=DEVICE)
    engine = Engine(model, max_seqs=STREAMS)
    with own_server(8231) as process:
        _engine_alone(engine, model.tokenizer), _all_streams(8231)
        rounds = [(_engine_alone(engine, model.tokenizer), _served(8231, process)) for _ in range(ROUNDS)]
    benchmark.pedantic(lambda: None, rounds=1)
    alone, own = (Speeds(*map(median, zip(*column, strict=True))) for column in zip(*rounds, strict=True))
    clock = median(served.clock / engine.clock for engine, served in rounds)
    processor = median(served.processor / engine.processor for engine, served in rounds)
    benchmark.extra_info.update({"engine": alone.clock, "server": own.clock, "ratio": clock})
    benchmark.extra_info["ratio of processor time"] = processor
    print(f"\n32 streams: {own.clock:.0f} tokens/s, the engine alone {alone.clock:.0f}: {clock:.2f} of it")
    print(f"tokens a second of processor time: {processor:.2f} of the engine's {alone.processor:.0f}")


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_latencies_by_load(benchmark: BenchmarkFixture, share: float) -> None:
    """Time to the first text and between chunks, of requests that arrive at random at a share of capacity."""
    with own_server(8232) as _:
        _all_streams(8232)
        rate = share * _all_streams(8232) / NEW
        rng = random.Random(1)
        firsts: list[float] = []
        betweens: list[float] = []

        async def one(delay: float, seed: int) -> None:
            await asyncio.sleep(delay)
            times = await stream(8232, "/v1/completions", _body(seed))
            firsts.append(times[0])
            betweens.extend(b - a for a, b in pairwise(times))

        async def main() -> None:
            delay = 0.0
            tasks = []
            for seed in range(max(40, int(rate * 5))):
                tasks.append(one(delay, seed))
                delay += rng.expovariate(rate)
            await asyncio.gather(*tasks)

        asyncio.run(main())
    benchmark.pedantic(lambda: None, rounds=1)
    found = {
        f"{name} {level}": quantiles(values, n=100)[place] * 1000
        for name, values in (("first", firsts), ("between", betweens))
        for level, place in (("p50", 49), ("p99", 98))
    }
    benchmark.extra_info.update({"requests/s": rate, **found})
    words = ", ".join(f"{name} {value:.1f} ms" for name, value in found.items())
    print(f"\n{share:.0%} of capacity, {rate:.1f} requests/s: {words}")
