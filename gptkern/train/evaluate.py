"""Held-out loss, perplexity, bits per byte, accuracy."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator

import torch

from gptkern.train.assemble import Objective
from gptkern.train.data import Batch, Source
from gptkern.train.objective import Classification
from gptkern.train.processes import Processes
from gptkern.train.settings import EvalSettings


@contextlib.contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """Autocast to the run's precision."""
    if precision == "float32":
        yield
        return
    with torch.autocast(device.type, torch.bfloat16):
        yield


def _rounds(batches: Iterator[Batch], group: Processes) -> Iterator[tuple[Batch, bool]]:
    """This process's batch of every round, and whether it counts.

    Every process computes in every round, for sharded weights are gathered by all or by none.
    """
    while together := list(itertools.islice(batches, group.world)):
        mine = group.rank < len(together)
        yield together[group.rank if mine else 0], mine


@torch.no_grad()
def evaluate(
    objective: Objective, source: Source, settings: EvalSettings, precision: str, group: Processes
) -> dict[str, float]:
    """``val_loss`` (the mean over held-out targets), ``perplexity``, and what else the data allows.

    ``bits_per_byte`` divides by the UTF-8 bytes of the scored text, where there is a tokenizer;
    ``accuracy`` is that of a classifier. Empty where there is no held-out data.
    """
    objective.eval()
    nats = counted = correct = size = 0.0
    tokenizer = objective.model.tokenizer
    classifies = isinstance(objective, Classification)
    for batch, counts in _rounds(source.held_out(settings.tokens, settings.batch_size), group):
        on_device = batch.to(group.device)
        with computing(precision, group.device):
            total = objective(on_device.ids, on_device.targets, on_device.last)
        if not counts:
            continue
        nats += float(total)
        counted += batch.counted
        if isinstance(objective, Classification) and on_device.last is not None:
            with computing(precision, group.device):
                scores = objective.logits(on_device.ids, on_device.last)
            correct += float((scores.argmax(-1) == on_device.targets).sum())
        elif tokenizer is not None:
            size += sum(len(tokenizer.decode(row[row >= 0].tolist()).encode()) for row in batch.targets)
    objective.train()
    nats, counted, correct, size = group.total(nats, counted, correct, size)
    if not counted:
        return {}
    loss = nats / counted
    found = {"val_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if classifies:
        found["accuracy"] = correct / counted
    elif size:
        found["bits_per_byte"] = nats / size / math.log(2.0)
    return found


def sample_texts(objective: Objective, settings: EvalSettings) -> list[str]:
    """Texts that the model makes of the prompt, at temperature 1; none where there is no tokenizer."""
    model = objective.model
    if not settings.samples or model.tokenizer is None or isinstance(objective, Classification):
        return []
    room = model.spec.context - len(model.tokenizer.encode(settings.sample_prompt))
    completions = model.generate_text(
        [settings.sample_prompt] * settings.samples,
        max_new_tokens=max(1, min(settings.sample_tokens, room)),
        do_sample=True,
    )
    return [completion.text for completion in completions]
