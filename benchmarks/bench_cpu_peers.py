"""GPT-2 124M on a CPU beside what else generates there: a token by batch, a first token by prompt.

    python benchmarks/cpu_peers/make_environments.py ENVIRONMENTS
    python benchmarks/bench_cpu_peers.py ENVIRONMENTS --threads 2 --out benchmarks/results/NAME/peers

Peers: transformers, plain and accelerated by gptkern, OpenVINO GenAI, llama.cpp, CTranslate2 and vLLM, each a
process of its own in its own environment, on the same random weights, in each format that it has. A peer that
is not there, or lacks a format, is said. Everybody generates greedily from the same random prompts, a new one
at each request. One process works at a time; rounds alternate between all, and the least time counts, for
other programs on the machine only ever add to it.

A token of a batch is the time of 33 new tokens after a prompt of 32 (or 900) less that of one, over 32.
Beside each time stand its shares of what this machine does: of the speed at which PyTorch's sum reads memory
(the format's fewest bytes of the matrices, and keys and values of 16 bits), and of the multiplications that
PyTorch's largest products reach in fp32, or in bf16 for the other formats (the matrices' alone).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from cpu_ceilings import product_speed, read_speed
from gpt2_gguf import write_gguf

import gptkern
from gptkern.bench.suites import _models as models
from gptkern.config import GPTConfig
from gptkern.durable import write_file

HERE = Path(__file__).parent / "cpu_peers"
# Bytes of a weight, at the least.
FORMATS = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}
QUICK = models.GPT2.replace(n_layer=2, n_head=4, n_embd=256, n_positions=128, vocab_size=1000)
# Idle threads of a process may spin this long.
PAUSE_S = 0.25


@dataclass(frozen=True)
class Case:
    """What is asked of everybody: the time of a first token, or of one after it."""

    rows: int
    prompt: int
    new: int = 1

    @property
    def name(self) -> str:
        """The column's head."""
        if self.new == 1:
            return f"first of {self.prompt}"
        return f"b{self.rows}" if self.prompt == DECODE_PROMPT else f"after {self.prompt}"


DECODE_PROMPT, NEW = 32, 33
CASES = (
    *(Case(rows, DECODE_PROMPT, NEW) for rows in (1, 4, 8, 16, 32)),
    *(Case(1, prompt) for prompt in (32, 128, 512, 900)),
    Case(1, 900, NEW),
)
QUICK_CASES = (Case(2, DECODE_PROMPT, 3), Case(1, 16))


@dataclass(frozen=True)
class Peer:
    """A program to measure: its interpreter, and the script that it runs with a format's name."""

    name: str
    python: str
    script: Path
    prefix: str = ""


def peers(environments: Path) -> list[Peer]:
    """Everybody."""
    own = sys.executable
    found = [
        Peer("gptkern", own, HERE / "with_gptkern.py"),
        Peer("transformers, accelerated", own, HERE / "with_transformers.py", "accelerated-"),
        Peer("transformers", own, HERE / "with_transformers.py"),
    ]
    names = {"OpenVINO": "openvino", "llama.cpp": "llama", "CTranslate2": "ctranslate2", "vLLM": "vllm"}
    for name, folder in names.items():
        python = environments / folder / "bin" / "python"
        found.append(Peer(name, str(python), HERE / f"with_{folder}.py"))
    return found


@dataclass
class Worker:
    """A peer's process for one format. The attributes from ``missing`` on are filled as it answers.

    Attributes:
        missing: Why it does not work.
        versions: Versions of its packages.
        seconds: The least time of each case, by (rows, prompt, new).
    """

    peer: Peer
    format: str
    process: subprocess.Popen[str] | None = None
    missing: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    tokens: list[list[int]] = field(default_factory=list)
    seconds: dict[tuple[int, int, int], float] = field(default_factory=dict)

    def start(self, folder: Path, threads: int, log: IO[str]) -> None:
        """Start the process and wait until it is ready, or find out why it is not."""
        if not Path(self.peer.python).exists():
            self.missing = "its environment is not there"
            return
        command = [self.peer.python, str(self.peer.script), str(folder), self.peer.prefix + self.format]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if self.peer.python != sys.executable:
            environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [*command, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        )
        answer = self.read()
        self.missing, self.versions = answer.get("missing"), answer.get("versions", {})

    def read(self) -> dict[str, Any]:
        """The next answer; a process that has ended is missing."""
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"missing": "its process ended"}
        return answer

    def ask(self, ids: list[list[int]], new: int) -> None:
        """Have it generate, and note the least time; an answer of the wrong size makes it missing."""
        if self.missing is not None:
            return
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps({"ids": ids, "new": new}) + "\n")
        self.process.stdin.flush()
        answer = self.read()
        self.missing = answer.get("missing")
        if self.missing is None and [len(row) for row in answer["tokens"]] != [new] * len(ids):
            self.missing = "it answered with another number of tokens than it was asked for"
        if self.missing is None:
            self.tokens = answer["tokens"]
            case = (len(ids), len(ids[0]), new)
            self.seconds[case] = min(self.seconds.get(case, float("inf")), answer["seconds"])

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.close()
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()

    def time(self, case: Case) -> float | None:
        """The time that a case is about; None where more tokens took no longer than the first."""
        first = self.seconds[case.rows, case.prompt, 1]
        if case.new == 1:
            return first
        later = self.seconds[case.rows, case.prompt, case.new] - first
        return later / (case.new - 1) if later > 0.0 else None


@dataclass
class Ceilings:
    """What PyTorch reaches on this machine: bytes read a second, and operations a second by dtype."""

    reads: float = 0.0
    products: dict[str, float] = field(default_factory=lambda: {"fp32": 0.0, "bf16": 0.0})

    def measure(self) -> None:
        """Measure once more; the highest counts."""
        self.reads = max(self.reads, read_speed(1))
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            self.products[name] = max(self.products[name], product_speed(dtype, 1))

    def shares(self, config: GPTConfig, form: str, case: Case, seconds: float) -> tuple[float, float]:
        """The shares of reading and of products that a time makes."""
        inner = 12 * config.n_layer * config.n_embd**2
        head = config.vocab_size * config.n_embd
        tokens = case.rows * (case.prompt if case.new == 1 else 1)
        context = 0 if case.new == 1 else case.rows * case.prompt
        cache = 2 * context * config.n_layer * config.n_embd * 2
        moved = (inner + head) * FORMATS[form] + cache
        operations = 2.0 * (tokens * inner + case.rows * head)
        product = self.products["fp32" if form == "fp32" else "bf16"]
        return moved / seconds / self.reads, operations / seconds / product


def write_models(folder: Path, config: GPTConfig) -> None:
    """The files that the peers read or convert, if they are not there."""
    if (folder / "hf").exists():
        return
    model = models.ours(config, torch.float32, torch.device("cpu"))
    unfinished = folder / "hf-unfinished"
    model.save_pretrained(unfinished)
    write_gguf(model, folder / "fp32.gguf")
    unfinished.rename(folder / "hf")


def prompt(config: GPTConfig, rows: int, tokens: int, draw: random.Random) -> list[list[int]]:
    """Random tokens: another prompt each time, for some peers remember those that they had."""
    return [[draw.randrange(config.vocab_size) for _ in range(tokens)] for _ in range(rows)]


def measure(workers: Sequence[Worker], config: GPTConfig, cases: Sequence[Case], rounds: int) -> Ceilings:
    """Ask everybody everything, once before it counts."""
    ceilings = Ceilings()
    asked = dict.fromkeys((case.rows, case.prompt, new) for case in cases for new in {1, case.new})
    for round_ in range(rounds + 1):
        ceilings.measure()
        for worker in workers:
            draw = random.Random(round_)
            time.sleep(PAUSE_S)
            for rows, tokens, new in asked:
                worker.ask(prompt(config, rows, tokens, draw), new)
            if round_ == 0:
                worker.seconds.clear()
        print(f"round {round_} of {rounds}", file=sys.stderr, flush=True)
    return ceilings


def processor() -> str:
    """The processor's name and those of its sets of instructions that matter here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", "").split())
    sets = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if name in flags]
    return f"{fields.get('model name', 'a processor')} with {', '.join(sets) or 'none of the known sets'}"


def result(
    workers: Sequence[Worker], config: GPTConfig, cases: Sequence[Case], ceilings: Ceilings, threads: int
) -> dict[str, Any]:
    """Everything as JSON."""
    rows = []
    for worker in workers:
        row: dict[str, Any] = {"peer": worker.peer.name, "format": worker.format}
        if worker.missing is not None:
            rows.append(row | {"missing": worker.missing})
            continue
        found: dict[str, dict[str, float] | None] = {}
        for case in cases:
            seconds = worker.time(case)
            if seconds is None:
                found[case.name] = None
                continue
            reads, products = ceilings.shares(config, worker.format, case, seconds)
            found[case.name] = {"ms": seconds * 1e3, "of_reads": reads, "of_products": products}
        rows.append(row | {"versions": worker.versions, "cases": found})
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "gptkern": gptkern.__version__,
        "model": f"{config.n_layer} layers, {config.n_embd} wide, {config.vocab_size} tokens",
        "reads_gb_s": ceilings.reads / 1e9,
        "products_gflop_s": {name: speed / 1e9 for name, speed in ceilings.products.items()},
        "rows": rows,
    }


def table(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    versions: dict[str, str] = {"gptkern": found["gptkern"]}
    for row in found["rows"]:
        versions |= row.get("versions", {})
    products = ", ".join(f"{name} {speed:.0f}" for name, speed in found["products_gflop_s"].items())
    lines = [
        f"# A CPU's generation beside its peers: {found['model']}",
        "",
        f"{found['processor']}, {found['cores']} cores, {found['threads']} threads; "
        + ", ".join(f"{name} {number}" for name, number in versions.items()),
        "",
        f"PyTorch reads {found['reads_gb_s']:.1f} GB/s and multiplies, GFLOP/s: {products}.",
        "",
        "Milliseconds (share of those reads, share of those products; bf16's for int8 and int4): a token of",
        "each row of a batch after 32 tokens, a first token by prompt, a token after 900. A dash: other work",
        "on the machine swallowed the time.",
    ]
    for form in FORMATS:
        rows = [row for row in found["rows"] if row["format"] == form]
        there = {row["peer"]: row["cases"] for row in rows if "cases" in row}
        if there:
            lines += ["", f"## {form}", "", *_format_table(there)]
        missing = [f"{row['peer']}: {row['missing']}" for row in rows if "missing" in row]
        if missing:
            lines += ["", f"Without {form}: " + "; ".join(missing) + "."]
    return "\n".join(lines) + "\n"


def _format_table(there: dict[str, dict[str, dict[str, float] | None]]) -> list[str]:
    names = list(next(iter(there.values())))
    lines = [f"| {' | '.join(['', *names])} |", "|---" * (len(names) + 1) + "|"]
    for peer, cases in there.items():
        cells = [
            f"{case['ms']:.1f} ({case['of_reads']:.0%}, {case['of_products']:.0%})" if case else "–"
            for case in cases.values()
        ]
        lines.append(f"| {' | '.join([peer, *cells])} |")
    others = [cases for peer, cases in there.items() if peer not in ("gptkern", "transformers, accelerated")]
    if "gptkern" in there and others:
        best = [_ratio(there["gptkern"][name], [cases[name] for cases in others]) for name in names]
        lines.append(f"| **the best peer's time / gptkern's** | {' | '.join(f'**{r}**' for r in best)} |")
    return lines


def _ratio(ours: dict[str, float] | None, theirs: Sequence[dict[str, float] | None]) -> str:
    if ours is None or None in theirs:
        return "–"
    return f"{min(case['ms'] for case in theirs if case) / ours['ms']:.2f}"


def run(
    everybody: Sequence[Peer],
    models_folder: Path,
    formats: Sequence[str],
    *,
    quick: bool,
    rounds: int,
    threads: int,
) -> dict[str, Any]:
    """Measure all peers in all formats."""
    config, cases = (QUICK, QUICK_CASES) if quick else (models.GPT2, CASES)
    models_folder.mkdir(parents=True, exist_ok=True)
    write_models(models_folder, config)
    workers = [Worker(peer, form) for form in formats for peer in everybody]
    with ExitStack() as stack:
        log = stack.enter_context((models_folder / "workers.log").open("w"))
        for worker in workers:
            stack.callback(worker.close)
            worker.start(models_folder, threads, log)
            print(
                f"{worker.peer.name}, {worker.format}: {worker.missing or 'ready'}",
                file=sys.stderr,
                flush=True,
            )
        ceilings = measure(workers, config, cases, rounds)
    return result(workers, config, cases, ceilings, threads)


def main() -> None:
    """Measure, print, and write the table and the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("environments", type=Path, help="The folder that make_environments.py has filled")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="Everybody's threads"
    )
    parser.add_argument("--rounds", type=int, default=3, help="Rounds that count (default: 3)")
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="Formats of weights"
    )
    parser.add_argument("--peers", nargs="+", help="Peers by name (default: all)")
    parser.add_argument("--out", type=Path, help="Where to write: this name with .md and with .json")
    parser.add_argument(
        "--quick", action="store_true", help="A small model and few cases, to see that it works"
    )
    options = parser.parse_args()
    everybody = peers(options.environments)
    if options.peers is not None:
        unknown = set(options.peers) - {peer.name for peer in everybody}
        if unknown:
            raise SystemExit(
                f"--peers: {sorted(unknown)[0]!r} is none of {[peer.name for peer in everybody]}"
            )
        everybody = [peer for peer in everybody if peer.name in options.peers]
    torch.set_num_threads(options.threads)
    folder = options.environments / ("models-quick" if options.quick else "models")
    found = run(
        everybody,
        folder,
        options.formats,
        quick=options.quick,
        rounds=options.rounds,
        threads=options.threads,
    )
    print(table(found))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(options.out.with_suffix(".md"), table(found))
        write_file(options.out.with_suffix(".json"), json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
