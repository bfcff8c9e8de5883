"""Fine-tune a model to tell praise from complaint: a small head on the hidden state of the last token.

    python examples/finetune_sentiment.py --out runs/sentiment

The sentences are made up from a few words; for data of your own, write a line of JSON each,
``{"text": ..., "label": ...}``, and give the file by --data.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

from gptkern.train import Settings, SettingsError, train
from gptkern.train.objective import Classification

THINGS = ["film", "book", "meal", "hotel", "song", "phone", "game", "show"]
PRAISE = ["wonderful", "a delight", "so good", "great fun", "just lovely"]
COMPLAINT = ["awful", "a waste of time", "so dull", "broken", "a great pity"]


def write_sentences(path: Path) -> None:
    """Sentences with their labels, in random order."""
    rows = [
        {"text": f"{opening} {thing} was {word}.", "label": label}
        for label, words in (("praise", PRAISE), ("complaint", COMPLAINT))
        for opening, thing, word in itertools.product(["The", "This", "Our"], THINGS, words)
    ]
    random.Random(0).shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--model", default="embedded", help="the model to begin with")
    parser.add_argument("--data", type=Path, help="JSONL with text and label")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    if args.data is None:
        args.data = args.out / "sentences.jsonl"
        write_sentences(args.data)
    settings = Settings.from_dict(
        {
            "model": {"from": args.model, "dropout": 0.0},
            "data": {"kind": "classes", "path": str(args.data), "context": 64, "val_fraction": 0.2},
            "train": {"steps": args.steps, "batch_size": 16},
            "optimizer": {"lr": 1e-3},
            "schedule": {"name": "linear", "warmup": 5},
            "eval": {"every": max(1, args.steps // 3)},
        }
    )
    try:
        result = train(settings, args.out / "run", shown=True)
    except SettingsError as error:
        parser.exit(1, f"{error}\n")
    print(f"held-out accuracy {result.metrics['accuracy']:.0%}")

    classifier = Classification.from_pretrained(args.out / "run" / "model")
    for text in ("This song was a delight.", "Our meal was so dull."):
        print(f"{text} -> {classifier.classify([text])[0]}")


if __name__ == "__main__":
    main()
