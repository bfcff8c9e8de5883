"""Load a checkpoint and print, as JSON, the memory that loading took.

``python load_memory.py SMALL PATH``. All figures are of this process alone, from /proc/self/status, in bytes:
``before`` the resident set after the small checkpoint SMALL was loaded (imports, first-use costs), ``peak``
the kernel's own high-water mark of the resident set (VmHWM: anonymous memory and mapped file pages, the
interpreter and libraries included), ``peak_anonymous`` and ``peak_file`` the highest RssAnon and RssFile
among samples taken every millisecond.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch

from gptkern.gpt import GPT


def status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def main(small: str, path: str) -> None:
    torch.set_num_threads(1)
    GPT.from_pretrained(small)
    before = status()["VmRSS"]
    samples: list[dict[str, int]] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.is_set():
            samples.append(status())
            time.sleep(0.001)

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    model = GPT.from_pretrained(path)
    seconds = time.perf_counter() - start
    stop.set()
    sampler.join()
    print(
        json.dumps(
            {
                "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
                "before": before,
                "peak": status()["VmHWM"],
                "peak_anonymous": max(s["RssAnon"] for s in samples),
                "peak_file": max(s["RssFile"] for s in samples),
                "seconds": seconds,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
