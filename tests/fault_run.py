"""Let the n-th write, flush, rename, opening, allocation or thread start fail, and look at the rest.

``LD_PRELOAD=faults.so python fault_run.py FOLDER SCENARIO,... KIND,... EVERY`` does an operation over an old
state once for each fault: a forked child fails at that point, then the parent compares the folder with the
old state and with the new one. Prints, for each scenario and kind, how many faults ended in which way;
anything that is not allowed ends the run with a message. EVERY is the step from one fault to the next: 1
tries all.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptkern import GPTConfig
from gptkern.checkpoint import CheckpointError
from gptkern.durable import write_file
from gptkern.gpt import GPT
from gptkern.ops import SamplerState, SamplingParams, sample
from gptkern.quantization import Quantization
from gptkern.quantize import quantize_model
from gptkern.tokenizer import Tokenizer
from gptkern.train.checkpoints import Store
from gptkern.train.objective import LanguageModelling
from gptkern.train.processes import Processes
from gptkern.train.settings import DataSettings
from gptkern.train.tokens import load_split

NONE, WRITE, FLUSH, RENAME, OPEN, ALLOCATE, START = range(7)
EVER = 1 << 40
# kind of call, the error, how many more fail, and what an error has to say
KINDS = {
    "write": (WRITE, errno.ENOSPC, 0, "disk is full"),
    "full disk": (WRITE, errno.ENOSPC, EVER, "disk is full"),
    "short write": (WRITE, 0, 0, ""),
    "flush": (FLUSH, errno.EIO, 0, "disk reports an error"),
    "rename": (RENAME, errno.EIO, 0, "disk reports an error"),
    "open": (OPEN, errno.EMFILE, 0, ""),
    "allocation": (ALLOCATE, errno.ENOMEM, 0, ""),
    "start": (START, errno.EAGAIN, 0, ""),
}
SMALL = GPTConfig(vocab_size=256, n_positions=16, n_layer=1, n_head=2, n_embd=32, eos_token_id=None)
LEFT_OVER = (".gptkern-", ".writing", "writing-")

State = object


@dataclass
class Scenario:
    """The operation that is repeated with faults.

    Attributes:
        prepare: Makes the old state in an empty folder.
        act: Makes the new state of it.
        state: The result of reading the folder, comparable.
    """

    prepare: Callable[[Path], object]
    act: Callable[[Path], object]
    state: Callable[[Path], State]


def build(seed: int, **changes: object) -> GPT:
    torch.manual_seed(seed)
    model = GPT(SMALL.replace(**changes)).eval()
    model.tokenizer = Tokenizer.bytes()
    return model


def model_state(folder: Path) -> State:
    """All saved values, as they are read back."""
    model = GPT.from_pretrained(folder)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: (str(t.dtype), tuple(t.shape), t.tolist()) for name, t in tensors.items()}
    tokenizer = None if model.tokenizer is None else model.tokenizer.encode("aé")
    return values, model.config, tokenizer, model.generation_config, str(model.quantization)


def save_scenario(new: GPT, **options: Any) -> Scenario:
    def save(folder: Path) -> None:
        new.save_pretrained(folder, **options)

    return Scenario(build(1).save_pretrained, save, model_state)


def quantized() -> GPT:
    model = build(2)
    quantize_model(model, Quantization.make(model.config, "int8"))
    return model


def tokens_scenario(folder: Path) -> Scenario:
    """Two versions of a text in turn; the cache knows which it holds."""
    texts = [("old text. " * 40), ("another, longer text!\n" * 50)]
    settings = []
    for number, text in enumerate(texts):
        path = folder / f"{number}.txt"
        path.write_text(text)
        settings.append(DataSettings(path=[str(path)], tokenizer="bytes", context=8, workers=1))

    def made(number: int, cache: Path) -> tuple[list[int], list[int]]:
        split = load_split(settings[number], None, cache, writer=True)
        return split.train[0].tolist(), split.val[0].tolist()

    return Scenario(
        lambda cache: made(0, cache),
        lambda cache: made(1, cache),
        # whichever the cache holds, asking for a text gives that text's tokens
        lambda cache: (json.loads((cache / "sources.json").read_text()), made(1, cache)),
    )


def training_scenario() -> Scenario:
    group = Processes(0, 1, torch.device("cpu"))

    def trained(step: int) -> tuple[LanguageModelling, torch.optim.Optimizer]:
        objective = LanguageModelling(build(step))
        optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
        for parameter in objective.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * step)
        optimizer.step()
        return objective, optimizer

    states = {step: trained(step) for step in (1, 2)}

    def write(step: int, folder: Path) -> None:
        objective, optimizer = states[step]
        Store(folder, 1, group).save(step, objective, [optimizer], {"best": 1.0, "settings": {}})

    def read(folder: Path) -> State:
        store = Store(folder, 1, group)
        store.clear_unfinished()
        newest = store.newest()
        assert newest is not None
        objective = LanguageModelling(build(9))
        optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
        store.load(newest, objective, [optimizer])
        moments = [value.tolist() for state in optimizer.state.values() for value in state.values()]
        weights = [parameter.tolist() for parameter in objective.parameters()]
        return newest.step, weights, moments, model_state(newest.folder)

    return Scenario(lambda folder: write(1, folder), lambda folder: write(2, folder), read)


def file_scenario() -> Scenario:
    return Scenario(
        lambda folder: write_file(folder / "results.json", "old" * 5000),
        lambda folder: write_file(folder / "results.json", "new!" * 5000),
        lambda folder: (folder / "results.json").read_text(),
    )


def sample_scenario() -> Scenario:
    """Nothing on the disk: after a call that failed, the next one is right and does not hang."""
    logits = torch.randn(8, 50_000, generator=torch.Generator().manual_seed(0))
    # before there are threads: PyTorch's own do not survive a fork
    likeliest = logits.argmax(-1).tolist()

    def act(folder: Path) -> None:
        torch.set_num_threads(3)
        params = SamplingParams.make(8, 50_000, temperature=0.0)
        try:
            sample(logits, params, state=SamplerState.make(8, 50_000))
        finally:
            gptkern_fault(NONE, 0, 0, 0)
            found = sample(logits, params, state=SamplerState.make(8, 50_000)).tokens
            assert found.tolist() == likeliest, "wrong tokens after a call that failed"

    return Scenario(lambda folder: None, act, lambda folder: None)


gptkern_fault = ctypes.CDLL(os.environ["LD_PRELOAD"]).gptkern_fault
gptkern_fault.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_long]
gptkern_fault.restype = ctypes.c_long


def attempt(act: Callable[[Path], object], folder: Path, kind: str, number: int) -> tuple[str, int, str]:
    """(how the child ended, calls of that kind that it made, its error)."""
    call, error, more, _ = KINDS[kind]
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        signalled = "done"
        message = ""
        gptkern_fault(call, number, error, more)
        try:
            act(folder)
        except BaseException as problem:
            calls = gptkern_fault(NONE, 0, 0, 0)
            signalled, message = "raised", f"{type(problem).__name__}: {problem}"
        else:
            calls = gptkern_fault(NONE, 0, 0, 0)
        os.write(write_end, json.dumps([signalled, calls, message]).encode())
        os._exit(0)
    os.close(write_end)
    with open(read_end) as told:
        text = told.read()
    os.waitpid(child, 0)
    if text:
        ended, calls, message = json.loads(text)
        return ended, calls, message
    # the library that met the fault ended the process: a kill, as far as files are concerned
    return "died", number + 1, ""


def check(scenario: Scenario, folder: Path, kind: str, number: int, states: tuple[State, State]) -> str:
    """One fault; how it ended, empty where there was none."""
    old, new = states
    ended, calls, message = attempt(scenario.act, folder, kind, number)
    where = f"{kind} {number}: {ended} {message}"
    found = scenario.state(folder)
    if calls <= number:
        assert (ended, found) == ("done", new), where
        return ""
    if ended == "done":
        assert found == new, f"{where}: reported as done, and it is not"
    else:
        assert found in (old, new), f"{where}: neither the old state nor the new one"
    if ended == "raised" and KINDS[kind][3]:
        assert KINDS[kind][3] in message, where
        assert str(folder) in message, f"{where}: no file is named"
    if kind == "short write":
        assert ended == "done", where
    scenario.act(folder)
    assert scenario.state(folder) == new, f"{where}: a later one does not mend it"
    left = [path.name for path in folder.rglob("*") if any(mark in path.name for mark in LEFT_OVER)]
    assert ended == "died" or not left, f"{where}: {left} left behind"
    return ended


def run(scenario: Scenario, work: Path, kinds: list[str], every: int) -> dict[str, dict[str, int]]:
    old_folder, folder = work / "old", work / "now"
    old_folder.mkdir()
    scenario.prepare(old_folder)

    def fresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(old_folder, folder, copy_function=shutil.copy2)

    fresh()
    old = scenario.state(folder)
    fresh()
    scenario.act(folder)
    new = scenario.state(folder)
    results = {}
    for kind in kinds:
        ends: Counter[str] = Counter()
        for number in range(0, 100_000, every):
            fresh()
            ended = check(scenario, folder, kind, number, (old, new))
            if not ended:
                break
            ends[ended] += 1
        results[kind] = dict(ends)
    return results


SCENARIOS: dict[str, Callable[[Path], Scenario]] = {
    "save": lambda work: save_scenario(build(2)),
    "shards": lambda work: save_scenario(build(2, n_embd=24, n_layer=2), max_shard_size="10KB"),
    "quantise": lambda work: save_scenario(quantized()),
    "training": lambda work: training_scenario(),
    "tokens": tokens_scenario,
    "file": lambda work: file_scenario(),
    "sample": lambda work: sample_scenario(),
}


def main(work: Path, names: list[str], kinds: list[str], every: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = {}
    for name in names:
        (work / name).mkdir(parents=True)
        try:
            results[name] = run(SCENARIOS[name](work / name), work / name, kinds, every)
        except (AssertionError, CheckpointError, OSError) as error:
            sys.exit(f"{name}: {type(error).__name__}: {error}"[:2000])
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(","), int(sys.argv[4]))
