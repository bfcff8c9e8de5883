"""What do fewer bits cost? Quantise a model in each format and compare bytes and perplexity.

    python examples/quantise.py held-out.txt
    python examples/quantise.py held-out.txt --model gpt2 --formats int8 int4

The perplexity is of the file's beginning. Give a text that the model was not trained on.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from gptkern import GPT


def size(model: GPT) -> int:
    """Bytes of the model's tensors; a tied head counts once."""
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="UTF-8")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--formats", nargs="+", default=["int8", "fp8", "int4"])
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of the text to score")
    args = parser.parse_args()

    text = args.text.read_text(encoding="utf-8")
    print("format     MB  perplexity  change")
    before = math.nan
    for format_ in (None, *args.formats):
        model = GPT.from_pretrained(args.model, weights=format_)
        ids = model.tokenizer.encode(text)[: args.tokens]
        (score,) = model.score([ids], stride=model.config.n_positions // 2)
        before = score.perplexity if format_ is None else before
        change = score.perplexity / before - 1
        print(f"{format_ or 'as it is':8} {size(model) / 1e6:5.1f} {score.perplexity:10.3f}  {change:+.2%}")


if __name__ == "__main__":
    main()
