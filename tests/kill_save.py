"""Kill a process at every file operation of a save, and look at the files that remain.

``python kill_save.py SCENARIO FOLDER`` forks a child for each operation in turn; the child saves a new model
over an old one and kills itself (SIGKILL) just before that operation, or in the middle of writing a file
(SIGXFSZ from a limit on file sizes). Prints as JSON, for each kill, which model the folder then holds.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from gptkern import GPTConfig
from gptkern.gpt import GPT
from gptkern.tokenizer import Tokenizer

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "fcntl.flock")
SMALL = GPTConfig(vocab_size=300, n_positions=16, n_layer=2, n_head=2, n_embd=16)
WIDE = SMALL.replace(n_embd=24, n_layer=1, model_type="openai-gpt")
# old model and its shard size, new model and its shard size
SCENARIOS = {
    "same_shape": (SMALL, "5GB", SMALL, "5GB"),
    "other_shape": (SMALL, "5GB", WIDE, "5GB"),
    "to_shards": (SMALL, "5GB", WIDE, "8KB"),
    "from_shards": (SMALL, "16KB", WIDE, "5GB"),
    "new_folder": (None, "5GB", SMALL, "5GB"),
}


def build(config: GPTConfig, seed: int) -> GPT:
    torch.manual_seed(seed)
    model = GPT(config)
    if config.post_norm:
        model.tokenizer = Tokenizer.bytes()
    return model


def die_at_operation(number: int) -> None:
    """Kill this process before its ``number``-th file operation."""
    left = number

    def count(event: str, _: object) -> None:
        nonlocal left
        if event in OPERATIONS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = lambda descriptor: count("open", None)
    sys.addaudithook(count)


def die_at_size(size: int) -> None:
    """Kill this process when a file it writes passes ``size`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def survives(save: Callable[[], None], die: Callable[[int], None], when: int) -> bool:
    """True if the child ended before it was killed."""
    child = os.fork()
    if child == 0:
        die(when)
        save()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status), status
    return status == 0


def is_in(folder: Path, model: GPT | None) -> bool:
    """True if the folder holds exactly that model; for None, if it holds none."""
    if model is None:
        return not (folder / "config.json").exists()
    found = GPT.from_pretrained(folder)
    tensors = dict(found.named_parameters())
    return (
        found.config == model.config
        and (found.tokenizer is None) == (model.tokenizer is None)
        and all(torch.equal(tensors[name], parameter) for name, parameter in model.named_parameters())
    )


def outcome(folder: Path, old: GPT | None, new: GPT) -> str:
    # opening the folder finishes a save that was cut off, so the new model is asked for last
    if old is None and not (folder / ".gptkern-pending").exists() and is_in(folder, None):
        return "old"
    found = GPT.from_pretrained(folder)
    return (
        "new"
        if is_in(folder, new)
        else "old"
        if found.config == old.config and is_in(folder, old)
        else "broken"
    )


def main(scenario: str, folder: Path) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: (
        None
    )  # processes are killed here, not machines, and it takes most of the time
    old_config, old_size, new_config, new_size = SCENARIOS[scenario]
    old = None if old_config is None else build(old_config, 1)
    new = build(new_config, 2)
    results = []
    largest = 4 * max(parameter.numel() for parameter in new.parameters())
    plans = [(die_at_operation, n) for n in range(1, 500)] + [
        (die_at_size, largest * k // 8) for k in range(1, 8)
    ]
    done_counting = False
    template = folder.with_name("template")
    if old is not None:
        old.save_pretrained(template, max_shard_size=old_size)
        (template / "notes.txt").write_text("mine")
    for die, when in plans:
        if die is die_at_operation and done_counting:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        if old is not None:
            shutil.copytree(template, folder)
        if survives(lambda: new.save_pretrained(folder, max_shard_size=new_size), die, when):
            done_counting = True
        results.append(outcome(folder, old, new) if folder.exists() else "old")
        if old is not None:
            assert (folder / "notes.txt").read_text() == "mine"
        new.save_pretrained(folder, max_shard_size=new_size)
        assert is_in(folder, new)
        left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        assert not left, left
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
