"""Where does a token's time go? Time a prompt and the tokens after it, and compare with reading the weights.

    python examples/profiling.py
    python examples/profiling.py --model gpt2 --trace token.json     # open the trace in chrome://tracing

The same from the shell: gptkern profile "ROMEO:"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gptkern import GPT, explain
from gptkern.bench.profile import profile


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--prompt", default="ROMEO:")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--trace", type=Path, help="write a Chrome trace")
    args = parser.parse_args()

    model = GPT.from_pretrained(args.model)
    print(explain(model))
    found = profile(model, model.tokenizer.encode(args.prompt), args.tokens, args.trace)
    print(f"\nprompt: {found.prefill * 1e3:.2f} ms; then each token: {found.per_token * 1e3:.3f} ms")
    print(f"a token reads {found.bytes_moved / 1e6:.2f} MB; copied here in {found.floor * 1e3:.3f} ms")
    for operator in found.operators[:5]:
        print(f"{operator.seconds * 1e6:8.2f} µs  {operator.calls:4.0f} calls  {operator.name}")


if __name__ == "__main__":
    main()
