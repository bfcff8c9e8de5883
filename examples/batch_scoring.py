"""Which of several endings fits best? Score them all, many at once, without generating anything.

    python examples/batch_scoring.py
    python examples/batch_scoring.py --model gpt2 --context "The capital of France is" " Paris." " Rome."

Scores are natural logarithms of probabilities. An ending's total favours short endings; the mean of a token
is fairer among endings of different lengths.
"""

from __future__ import annotations

import argparse

from gptkern import GPT


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("endings", nargs="*", default=[" the king.", " the kign.", " xqzj wv."])
    parser.add_argument("--context", default="What says", help="what comes before; it is not scored")
    parser.add_argument("--model", default="embedded")
    args = parser.parse_args()

    model = GPT.from_pretrained(args.model)
    scores = model.score(args.endings, context=args.context)
    ranked = sorted(
        zip(args.endings, scores, strict=True),
        key=lambda pair: pair[1].total / len(pair[1].logprobs),
        reverse=True,
    )
    print("total   mean    ending")
    for ending, score in ranked:
        print(f"{score.total:6.2f}  {score.total / len(score.logprobs):6.2f}  {args.context}{ending}")


if __name__ == "__main__":
    main()
