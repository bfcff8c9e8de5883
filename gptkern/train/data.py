"""Batches: which rows a step trains on, as a function of the seed and the step alone.

Nothing is remembered between steps, so the position in the data is the step's number, a resumed
run sees the same rows, and any number of processes share a step's rows without speaking.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from gptkern.model.decoder import IGNORE_INDEX
from gptkern.tokenizer import Tokenizer
from gptkern.train.errors import SettingsError
from gptkern.train.settings import DataSettings
from gptkern.train.tokens import read_jsonl

Array = np.ndarray[Any, Any]


@dataclass
class Batch:
    """Rows for one forward pass.

    Attributes:
        ids: ``(rows, seq)`` int64, padded on the right.
        targets: ``(rows, seq)``, the next token or -100; for classes ``(rows,)``, the label.
        last: ``(rows,)``, each row's last token's position; None for language modelling.
        rows: Which rows of the data these are, for messages.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    last: torch.Tensor | None
    rows: list[int]

    @property
    def counted(self) -> int:
        """Targets that the loss is the mean of."""
        return int((self.targets != IGNORE_INDEX).sum())

    def part(self, start: int, stop: int) -> Batch:
        """Some of the rows."""
        last = None if self.last is None else self.last[start:stop]
        return Batch(self.ids[start:stop], self.targets[start:stop], last, self.rows[start:stop])

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        if device.type == "cpu":
            return self

        def move(value: torch.Tensor) -> torch.Tensor:
            return value.pin_memory().to(device, non_blocking=True)

        return Batch(
            move(self.ids), move(self.targets), None if self.last is None else move(self.last), self.rows
        )


class Source(Protocol):
    """A source of batches."""

    def describe(self) -> str:
        """The amount of data, in words."""
        ...

    def training_batch(self, step: int, size: int) -> Batch:
        """The ``size`` rows of step ``step``."""
        ...

    def held_out(self, tokens: int, size: int) -> Iterator[Batch]:
        """The held-out data in order, every target once, at most ``tokens`` of them (0: all)."""
        ...


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))


def shuffled(places: Array, count: int, seed: int, epoch: int) -> Array:
    """The items at ``places`` of an epoch's random order of ``count`` items, without holding the order.

    A four-round Feistel network on the next power of four, walked until it falls below ``count``
    (Black and Rogaway 2002, the cycle-walking cipher): a permutation for any keys.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = _generator(seed, epoch).integers(1 << 63, size=4, dtype=np.uint64)

    def once(values: Array) -> Array:
        left, right = values >> np.uint64(half), values & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(33)) & mask)
        return (left << np.uint64(half)) | right

    found = once(places.astype(np.uint64))
    while (outside := found >= count).any():
        found[outside] = once(found[outside])
    return found.astype(np.int64)


class Windows:
    """Language modelling: windows of ``context + 1`` tokens.

    An epoch cuts the training tokens into windows end to end, from a random first token, and takes
    them in random order: every token is a target once before any is twice.
    """

    def __init__(self, train: list[Array], val: list[Array], context: int, seed: int) -> None:
        self.train, self.val, self.context, self.seed = train, val, context, seed
        lengths = np.array([len(shard) for shard in train])
        # A window fewer than fit, where that leaves one, so that the first token may vary.
        self.counts = np.where(lengths > context, np.maximum(1, (lengths - context) // context), 0)
        self.slack = lengths - 1 - self.counts * context
        self.ends = np.cumsum(self.counts)
        if not self.ends[-1]:
            raise SettingsError(
                f"[data] context is {context}; the training tokens, {lengths.max()}, must be more than it"
            )

    def describe(self) -> str:
        train, val = (sum(map(len, shards)) for shards in (self.train, self.val))
        return f"{train:,} tokens to train on, {val:,} held out"

    def training_batch(self, step: int, size: int) -> Batch:
        count = int(self.ends[-1])
        epochs, places = np.divmod(np.arange(step * size, (step + 1) * size), count)
        rows, names = [], []
        for epoch in np.unique(epochs):
            first = int(_generator(self.seed, int(epoch)).integers(2 * self.context))
            for number in shuffled(places[epochs == epoch], count, self.seed, int(epoch)):
                shard = int(np.searchsorted(self.ends, number, side="right"))
                place = int(number - (self.ends[shard] - self.counts[shard]))
                start = first % (int(self.slack[shard]) + 1) + place * self.context
                rows.append(self.train[shard][start : start + self.context + 1].astype(np.int64))
                names.append(int(number))
        return _language_batch(np.stack(rows), names)

    def held_out(self, tokens: int, size: int) -> Iterator[Batch]:
        """Windows end to end: each held-out token but a shard's first is a target exactly once."""
        left = tokens or sum(len(shard) - 1 for shard in self.val)
        for shard in self.val:
            whole = min((len(shard) - 1) // self.context, left // self.context)
            for first in range(0, whole, size):
                starts = np.arange(first, min(first + size, whole)) * self.context
                rows = np.stack([shard[s : s + self.context + 1] for s in starts]).astype(np.int64)
                yield _language_batch(rows, starts.tolist())
            left -= whole * self.context
            start = whole * self.context
            rest = min(len(shard) - 1 - start, left)
            if rest > 0:
                yield _language_batch(shard[None, start : start + rest + 1].astype(np.int64), [start])
                left -= rest


def _language_batch(rows: Array, names: list[int]) -> Batch:
    tokens = torch.from_numpy(rows)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, names)


class Examples:
    """Rows of their own lengths, shuffled anew each epoch: prompts and answers, or texts and labels.

    ``train`` and ``val`` hold ``(ids, targets)``: as many targets as ids, or a label.
    """

    def __init__(
        self, train: list[tuple[list[int], Any]], val: list[tuple[list[int], Any]], seed: int
    ) -> None:
        if not train:
            raise SettingsError("[data] path: no examples to train on")
        self.train, self.val, self.seed = train, val, seed

    def describe(self) -> str:
        return f"{len(self.train):,} examples to train on, {len(self.val):,} held out"

    def training_batch(self, step: int, size: int) -> Batch:
        rows = [self._row(step * size + i) for i in range(size)]
        return _example_batch([self.train[row] for row in rows], rows)

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, len(self.train))
        return int(shuffled(np.array([place]), len(self.train), self.seed, epoch)[0])

    def held_out(self, tokens: int, size: int) -> Iterator[Batch]:
        counted = 0
        for first in range(0, len(self.val), size):
            batch = _example_batch(self.val[first : first + size], list(range(first, first + size)))
            yield batch
            counted += batch.counted
            if tokens and counted >= tokens:
                return


def _example_batch(examples: list[tuple[list[int], Any]], rows: list[int]) -> Batch:
    longest = max(len(ids) for ids, _ in examples)
    padded = torch.zeros(len(examples), longest, dtype=torch.int64)
    for row, (ids, _) in enumerate(examples):
        padded[row, : len(ids)] = torch.tensor(ids)
    if isinstance(examples[0][1], int):
        labels = torch.tensor([label for _, label in examples])
        return Batch(padded, labels, torch.tensor([len(ids) - 1 for ids, _ in examples]), rows)
    targets = torch.full_like(padded, IGNORE_INDEX)
    for row, (_, wanted) in enumerate(examples):
        targets[row, : len(wanted)] = torch.tensor(wanted)
    return Batch(padded, targets, None, rows)


def _split(
    settings: DataSettings, texts: list[str], label: str | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows = read_jsonl(settings.path, texts, "path", label)
    if settings.val_path:
        return rows, read_jsonl(settings.val_path, texts, "val_path", label)
    cut = int(len(rows) * (1.0 - settings.val_fraction))
    return rows[:cut], rows[cut:]


def pair_ids(
    tokenizer: Tokenizer, prompt: str, answer: str, settings: DataSettings
) -> tuple[list[int], list[int]]:
    """Ids of a prompt with its answer and, at each, the next token, or -100 where the prompt goes on.

    What does not fit into the context is cut off the prompt's beginning, then off the answer's end. A
    beginning token, of a tokenizer that has one, stands before the prompt alone and is not cut off.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else encode(settings.end)
    asked = encode(prompt + settings.separator)
    answered = (encode(answer) + end)[: settings.context]
    if not asked:
        raise SettingsError("[data] a prompt is empty, with its separator: one token or more is needed")
    room = settings.context + 1 - len(answered) - len(tokenizer.prefix_ids)
    asked = tokenizer.prefix_ids + asked[max(len(asked) - max(room, 0), 0) :]
    ids = asked + answered
    return ids[:-1], [IGNORE_INDEX] * (len(asked) - 1) + answered


def load_pairs(settings: DataSettings, tokenizer: Tokenizer, seed: int) -> Examples:
    """Prompts and answers from JSONL; the loss is of the answers alone."""
    keys = [settings.prompt_key, settings.answer_key]
    train, val = (
        [pair_ids(tokenizer, row[keys[0]], row[keys[1]], settings) for row in rows]
        for rows in _split(settings, keys)
    )
    return Examples(list(train), list(val), seed)


def load_classes(settings: DataSettings, tokenizer: Tokenizer, seed: int) -> tuple[Examples, list[str]]:
    """Texts and labels from JSONL, and the labels' names, sorted. A long text keeps its end."""
    text, label = settings.text_key, settings.label_key
    train, val = _split(settings, [text], label)
    names = sorted({str(row[label]) for row in train + val})
    numbers = {name: number for number, name in enumerate(names)}

    def example(row: dict[str, Any]) -> tuple[list[int], int]:
        ids = tokenizer.encode(row[text])[-settings.context :]
        if not ids:
            raise SettingsError(f"[data] a {text} is empty: one token or more is needed")
        return ids, numbers[str(row[label])]

    return Examples([example(row) for row in train], [example(row) for row in val], seed), names
