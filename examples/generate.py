"""A new user's first script: load a tokenizer and a model, continue "Once upon a time", print it.

python examples/generate.py                  # the small model that comes with gptkern
python examples/generate.py path/or/hub-id   # GPT-2, GPT-1, nanoGPT, llm.c
"""

import sys

import torch

from gptkern import GPT, Tokenizer

name = sys.argv[1] if len(sys.argv) > 1 else "embedded"
tokenizer = Tokenizer.from_pretrained(name)
model = GPT.from_pretrained(name)

input_ids = torch.tensor([tokenizer.encode("Once upon a time")])
output = model.generate(input_ids, max_length=50, num_return_sequences=1)
print(tokenizer.decode(output[0], skip_special_tokens=True))
