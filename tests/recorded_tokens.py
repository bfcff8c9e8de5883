"""Tokens of ``generate`` for fixed seeds: the embedded model and 20 small random ones, random options.

Those of bf16 models depend on the processor's instructions; AVX2's are recorded, which every one has.

``python tests/recorded_tokens.py`` writes ``tests/fixtures/generate_tokens.json`` anew. Do so only
for a change that is meant to give other tokens, and say so in its commit.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gptkern import GPT, GPTConfig, _native

FILE = Path(__file__).parent / "fixtures" / "generate_tokens.json"
RANDOM_MODELS = 20
CALLS = 4
EMBEDDED_CALLS: list[dict[str, Any]] = [
    {"max_new_tokens": 40},
    {"max_new_tokens": 40, "do_sample": True, "seed": 1},
    {"max_new_tokens": 40, "do_sample": True, "seed": 2, "num_return_sequences": 3, "top_p": 0.9},
    {"max_new_tokens": 60, "speculate": 4, "repetition_penalty": 1.1},
    {"max_new_tokens": 30, "num_beams": 4, "num_return_sequences": 2},
    {"max_new_tokens": 40, "do_sample": True, "seed": 3, "stop_strings": ["\n\n", "the "]},
]
EMBEDDED_PROMPTS = ["ROMEO:", "First Citizen:\nBefore we proceed any further, hear me speak.\n"]


def random_model(number: int) -> GPT:
    """A small model, the same for the same number; weights are wide, so that tokens differ."""
    rng = random.Random(number)
    heads, kind = rng.choice([1, 2, 3, 4]), rng.choice(["gpt2", "gpt2", "gpt2", "openai-gpt"])
    config = GPTConfig(
        vocab_size=rng.randint(60, 300),
        n_positions=128,
        n_layer=rng.randint(1, 3),
        n_head=heads,
        n_embd=heads * rng.choice([8, 16, 24, 32]),
        activation_function=rng.choice(["gelu_new", "relu", "silu"]),
        tie_word_embeddings=kind == "openai-gpt" or rng.random() < 0.7,
        initializer_range=0.4,
        model_type=kind,
        eos_token_id=0,
    )
    torch.manual_seed(number)
    return GPT(config).eval().to(rng.choice([torch.float32, torch.float32, torch.bfloat16]))


def random_call(rng: random.Random, vocab: int) -> dict[str, Any]:
    """Prompts as lists of ids (the first row is the longest), and options."""
    width, batch = rng.randint(3, 70), rng.randint(1, 4)
    lengths = [width, *(rng.randint(1, width) for _ in range(batch - 1))]
    motif = [rng.randrange(1, vocab) for _ in range(rng.randint(2, 9))]
    prompts = [
        (motif * width)[:length] if rng.random() < 0.4 else [rng.randrange(1, vocab) for _ in range(length)]
        for length in lengths
    ]
    options: dict[str, Any] = {"max_new_tokens": rng.randint(1, 40)}
    kind = rng.choice(["greedy", "sample", "sample", "beams"])
    if kind == "sample":
        options |= {"do_sample": True, "seed": rng.randrange(2**40), "top_k": rng.choice([0, 5, 50])}
        options |= {"temperature": rng.choice([0.7, 1.0, 1.3]), "top_p": rng.choice([0.8, 1.0])}
        options["num_return_sequences"] = rng.choice([1, 1, 3])
    if kind == "beams":
        options |= {"num_beams": rng.choice([2, 4]), "length_penalty": rng.choice([0.5, 1.0])}
    elif rng.random() < 0.3:
        options["speculate"] = rng.randint(1, 6)
    for name, values in (
        ("repetition_penalty", [1.2]),
        ("frequency_penalty", [0.3]),
        ("no_repeat_ngram_size", [2, 3]),
        ("min_new_tokens", [4]),
        ("suppress_tokens", [[3, 5]]),
        ("bad_words_ids", [[[7], [4, 9]]]),
    ):
        if rng.random() < 0.2:
            options[name] = rng.choice(values)
    return {"prompts": prompts, "options": options}


@contextmanager
def avx2() -> Iterator[None]:
    """The decode step of processors with AVX2 and no more."""
    extension = _native.extension
    if extension is None or not extension.has_decoder:
        yield
        return
    best = extension.decode_path()
    extension.use_decode_path("avx2")
    try:
        yield
    finally:
        extension.use_decode_path(best)


def run(model: GPT, prompts: list[list[int]], options: dict[str, Any]) -> list[list[int]]:
    """The new tokens of every row, filling included."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    with avx2():
        out = model.generate(ids, mask, pad_token_id=0, **options)
    assert isinstance(out, torch.Tensor)
    return out[:, width:].tolist()


def record() -> dict[str, list[dict[str, Any]]]:
    """The calls of every model and their tokens."""
    found: dict[str, list[dict[str, Any]]] = {}
    embedded = GPT.from_pretrained()
    assert embedded.tokenizer is not None
    prompts = [embedded.tokenizer.encode(text) for text in EMBEDDED_PROMPTS]
    calls = [{"prompts": prompts, "options": options} for options in EMBEDDED_CALLS]
    found["embedded"] = [call | {"tokens": run(embedded, **call)} for call in calls]
    for number in range(RANDOM_MODELS):
        model, rng = random_model(number), random.Random(1000 + number)
        calls = [random_call(rng, model.config.vocab_size) for _ in range(CALLS)]
        found[str(number)] = [call | {"tokens": run(model, **call)} for call in calls]
    return found


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(record(), separators=(",", ":")) + "\n")
