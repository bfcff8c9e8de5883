"""The same tokens in fewer passes: drafts are looked up in the text itself, and checked all at once.

    python examples/speculation.py
    python examples/speculation.py --model gpt2 --tokens 100

It helps where a text repeats itself: lists, code, answers that quote their question.
"""

from __future__ import annotations

import argparse

import torch

from gptkern import GPT, GenerateOutput


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--prompt", default="ROMEO:\nThe king, the king, the king, the")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--speculate", type=int, default=4, help="tokens drafted at once")
    args = parser.parse_args()

    model = GPT.from_pretrained(args.model)
    prompt = torch.tensor([model.tokenizer.encode(args.prompt)])
    plain = model.generate(prompt, max_new_tokens=args.tokens, return_dict_in_generate=True)
    drafted = model.generate(
        prompt, max_new_tokens=args.tokens, speculate=args.speculate, return_dict_in_generate=True
    )
    assert isinstance(plain, GenerateOutput)
    assert isinstance(drafted, GenerateOutput)
    if not torch.equal(plain.sequences, drafted.sequences):
        raise SystemExit("the tokens differ, which must never happen: please report it")
    new = drafted.sequences.shape[1] - prompt.shape[1]
    print(model.tokenizer.decode(drafted.sequences[0]))
    passes = new - drafted.accepted_tokens
    print(f"\nof {drafted.draft_tokens} drafted tokens {drafted.accepted_tokens} held")
    print(f"{new} new tokens, the same both ways: {passes} passes instead of {new}")


if __name__ == "__main__":
    main()
