"""Train a model from scratch on a text file, character by character, and let it write.

    python examples/pretrain.py tinyshakespeare.txt --out runs/first --steps 300

The same by a configuration file: gptkern train configs/shakespeare_char_cpu.toml --data FILE --out DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gptkern.gpt import GPT
from gptkern.train import Settings, SettingsError, train


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="the training text, UTF-8; its last tenth is held out")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()

    settings = Settings.from_dict(
        {
            "model": {"n_layer": 2, "n_head": 2, "n_embd": 64, "dropout": 0.0},
            "data": {"path": str(args.text), "tokenizer": "char", "context": 64},
            "train": {"steps": args.steps, "batch_size": 12},
            "optimizer": {"lr": 2e-3, "beta2": 0.99},
            "schedule": {"name": "cosine", "warmup": args.steps // 20},
            "eval": {"every": max(1, args.steps // 3), "tokens": 20000},
        }
    )
    try:
        result = train(settings, args.out, shown=True)
    except SettingsError as error:
        parser.exit(1, f"{error}\n")
    print(f"held-out loss {result.metrics['val_loss']:.3f} nats a character")

    model = GPT.from_pretrained(args.out / "model")
    print(model.generate_text("\n", max_new_tokens=50, do_sample=True, seed=0)[0].text)


if __name__ == "__main__":
    main()
