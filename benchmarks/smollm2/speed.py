"""SmolLM2-135M's speed beside llama.cpp's, on the same CPU, threads and weights.

    python benchmarks/smollm2/speed.py FILE.gguf --llama-python ENV/bin/python --threads 2

Rounds alternate between both; the least of all is shown: milliseconds to the first token, and a token after
it. llama.cpp reads BF16, Q8_0 and Q4_0 files that it makes of FILE; gptkern has the same weights in bf16, in
int8 (a scale an output), and Q4_0 as it is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import gptkern

HERE = Path(__file__).parent
FORMATS = {"BF16": {}, "Q8_0": {"weights": "int8"}, "Q4_0": {}}
CASES = ((32, 128, 1), (900, 100, 1), (32, 128, 8))


def ours(model: gptkern.GPT, prompt: int, new: int, batch: int) -> dict[str, float]:
    """Seconds to the first token and a token, of three tries the least."""
    rows = [[(7 * row + 13 * place) % 40000 + 100 for place in range(prompt)] for row in range(batch)]
    ids = torch.tensor(rows)
    found = []
    for _ in range(3):
        times = []
        for count in (1, new + 1):
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None)
            times.append(time.perf_counter() - start)
        found.append((times[0], (times[1] - times[0]) / new))
    return {"first": min(f for f, _ in found), "token": min(t for _, t in found)}


def theirs(python: str, path: Path, threads: int, case: tuple[int, int, int]) -> dict[str, float]:
    """The same by llama.cpp."""
    command = [python, str(HERE / "llama_worker.py"), str(path), str(threads), *map(str, case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"llama.cpp: {done.stderr[-500:]}")
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--llama-python", required=True, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print("Milliseconds, gptkern / llama.cpp:\n")
    print("| format | prompt + new, batch | first token | a token |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, options in FORMATS.items():
            path = Path(folder) / f"{name}.gguf"
            worker = [asked.llama_python, str(HERE / "quantise_worker.py"), str(asked.file), str(path), name]
            subprocess.run(worker, check=True, capture_output=True)
            source: Any = path if name == "Q4_0" else asked.file
            dtype: Any = torch.bfloat16
            model = gptkern.GPT.from_pretrained(str(source), dtype=dtype, device="cpu", **options)  # type: ignore[arg-type]
            for case in CASES:
                rounds = [
                    (ours(model, *case), theirs(asked.llama_python, path, asked.threads, case))
                    for _ in range(asked.rounds)
                ]
                cells = []
                for what in ("first", "token"):
                    a, b = (min(pair[side][what] for pair in rounds) * 1e3 for side in (0, 1))
                    cells.append(f"{a:.1f} / {b:.1f} ({b / a:.2f} x)")
                prompt, new, batch = case
                print(f"| {name} | {prompt} + {new}, {batch} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
