"""transformers' GPT-2 tutorial on gptkern: the import line is the only one that changed.

    python examples/transformers_drop_in.py [MODEL]

MODEL is a folder or hub id of a GPT-2 checkpoint; "gpt2" by default.
"""

import sys

from gptkern.transformers import GPT2LMHeadModel, GPT2Tokenizer

name = sys.argv[1] if len(sys.argv) > 1 else "gpt2"
tokenizer = GPT2Tokenizer.from_pretrained(name)
model = GPT2LMHeadModel.from_pretrained(name)

input_ids = tokenizer.encode("Once upon a time", return_tensors="pt")
output = model.generate(input_ids, max_length=50, num_return_sequences=1)
print(tokenizer.decode(output[0], skip_special_tokens=True))
