"""Fine-tune a model to answer questions, by low-rank adaptation; the loss is of the answers alone.

    python examples/finetune_qa.py --out runs/qa

The questions are sums of small numbers; for data of your own (instructions, translations, questions),
write a line of JSON each, ``{"prompt": ..., "answer": ...}``, and give the file by --data.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from gptkern.gpt import GPT
from gptkern.train import Settings, SettingsError, train


def write_questions(path: Path) -> None:
    """Every sum of two digits, in random order."""
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    random.Random(0).shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--model", default="embedded", help="the model to begin with")
    parser.add_argument("--data", type=Path, help="JSONL with prompt and answer")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    if args.data is None:
        args.data = args.out / "questions.jsonl"
        write_questions(args.data)
    settings = Settings.from_dict(
        {
            "model": {"from": args.model, "dropout": 0.0},
            "data": {"kind": "pairs", "path": str(args.data), "context": 32, "separator": " "},
            "train": {"steps": args.steps, "batch_size": 16},
            "optimizer": {"lr": 5e-3, "weight_decay": 0.0},
            "schedule": {"name": "cosine", "warmup": 5},
            "eval": {"every": max(1, args.steps // 4)},
            "lora": {"rank": 8, "alpha": 16.0, "targets": ["c_attn", "c_proj", "c_fc"]},
        }
    )
    try:
        result = train(settings, args.out / "run", shown=True)
    except SettingsError as error:
        parser.exit(1, f"{error}\n")
    print(f"held-out loss {result.metrics['val_loss']:.3f}")

    model = GPT.from_pretrained(args.out / "run" / "model")
    for question in ("2+2= ", "7+5= "):
        print(question + model.generate_text(question, max_new_tokens=3, do_sample=False)[0].text.strip())


if __name__ == "__main__":
    main()
