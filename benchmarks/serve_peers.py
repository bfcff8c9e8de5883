"""Latencies by load of gptkern's server, transformers' and llama.cpp's, on the same weights, in one run.

    python benchmarks/serve_peers.py --llama-python other/bin/python --out benchmarks/results/NAME/serve.md

The model is the embedded one, in fp32. ``--llama-python`` is an interpreter that has
``llama-cpp-python[server]``, whose server takes one request at a time. Every server gets the same chats at
the same random times.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from bench_serve import DEVICE, PROMPT, STREAMS, server
from gpt2_gguf import write_gguf

from gptkern import GPT
from gptkern.durable import write_file

NEW = 32
REQUESTS = 16
# Requests a second.
RATES = (1.0, 4.0)
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@dataclass(frozen=True)
class Peer:
    """A server.

    Attributes:
        model: The name by which it is asked for its model.
    """

    name: str
    command: Sequence[str]
    port: int
    model: str
    ready: str = "/health"


async def chat(peer: Peer, seed: int) -> list[float]:
    """The times at which an answer's pieces of text came, from when it was asked for."""
    body: dict[str, Any] = {"model": peer.model, "max_tokens": NEW, "temperature": 1.0, "stream": True}
    body["messages"] = [{"role": "user", "content": f"{PROMPT}\n{seed}"}]
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", peer.port)
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
    times = []
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if any(choice.get("delta", {}).get("content") for choice in event.get("choices", ())):
            times.append(time.perf_counter() - began)
    writer.close()
    return times


def latencies(peer: Peer, rate: float) -> list[float]:
    """p50 and p99, in ms, of the time to the first text and between pieces; seconds in all; answers."""

    async def main() -> list[list[float]]:
        rng = random.Random(1)
        delay, tasks = 0.0, []

        async def one(delay: float, seed: int) -> list[float]:
            await asyncio.sleep(delay)
            return await chat(peer, seed)

        for seed in range(REQUESTS):
            tasks.append(one(delay, seed))
            delay += rng.expovariate(rate)
        return await asyncio.gather(*tasks)

    began = time.perf_counter()
    answers = asyncio.run(main())
    seconds = time.perf_counter() - began
    firsts = [times[0] for times in answers if times]
    betweens = [later - earlier for times in answers for earlier, later in pairwise(times)]
    found = [quantiles(values, n=100)[place] * 1000 for values in (firsts, betweens) for place in (49, 98)]
    return [*found, seconds, len(firsts)]


def peers(folder: Path, llama_python: str | None) -> list[Peer]:
    """The servers that there are."""
    model = GPT.from_pretrained(dtype=torch.float32)
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    own = [sys.executable, "-m", "gptkern", "serve", str(folder), "--name=gptkern", "--no-access-log"]
    own += [f"--max-seqs={STREAMS}", f"--device={DEVICE}"]
    theirs = [str(Path(sys.executable).with_name("transformers")), "serve", "--port=8243"]
    theirs += ["--device", DEVICE, "--continuous-batching", str(folder)]
    found = [
        Peer("gptkern", [*own, "--port=8241"], 8241, "gptkern"),
        Peer("gptkern, --stream-interval 0", [*own, "--port=8242", "--stream-interval=0"], 8242, "gptkern"),
        Peer("transformers serve", theirs, 8243, str(folder)),
    ]
    if llama_python is not None:
        file = folder / "model.gguf"
        write_gguf(model, file, TEMPLATE)
        command = [llama_python, "-m", "llama_cpp.server", f"--model={file}", "--model_alias=gptkern"]
        command += [
            "--host=127.0.0.1",
            "--port=8244",
            f"--n_ctx={model.spec.context}",
            "--n_threads=1",
            "--verbose=false",
        ]
        found.append(Peer("llama-cpp-python", command, 8244, "gptkern", "/v1/models"))
    return found


def _environment(llama_python: str | None) -> str:
    names = ["torch", "transformers", "uvicorn"]
    versions = [f"{name} {version(name)}" for name in names]
    if llama_python is not None:
        code = "from importlib.metadata import version; print(version('llama-cpp-python'))"
        found = subprocess.run([llama_python, "-c", code], capture_output=True, text=True, check=True)
        versions.append(f"llama-cpp-python {found.stdout.strip()}")
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "")
    load = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cpu}, {cores} cores, one thread a server, load {load:.1f} before the run; "
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-python", help="An interpreter that has llama-cpp-python[server].")
    parser.add_argument("--out", type=Path, help="The Markdown file to write.")
    chosen = parser.parse_args()
    lines = [
        f"# Servers by offered load: {REQUESTS} chats of {NEW} tokens, the embedded model in fp32",
        "",
        _environment(chosen.llama_python),
        "",
        "Milliseconds; a piece of gptkern's default stream has the tokens of 40 ms. `took` is from the first",
        "request to the last answer's end: more than the requests take to arrive means that they queued.",
        "An answer without text counts as none.",
        "",
        "| server | requests/s | first text p50 | p99 | between pieces p50 | p99 | took | answers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for peer in peers(Path(folder), chosen.llama_python):
            url = f"http://127.0.0.1:{peer.port}"
            with server(*peer.command, url=url, ready=peer.ready):
                asyncio.run(chat(peer, 0))
                for rate in RATES:
                    *times, seconds, count = latencies(peer, rate)
                    cells = " | ".join(f"{value:.0f}" for value in times)
                    lines.append(f"| {peer.name} | {rate:g} | {cells} | {seconds:.0f} s | {count} |")
                    print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if chosen.out is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(chosen.out, text)


if __name__ == "__main__":
    main()
