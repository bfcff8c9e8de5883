"""Text to token ids and back: GPT-2's byte-level BPE, GPT-1's BPE, plain bytes, any ``tokenizer.json``.

``folder`` reads the files of a folder as transformers' AutoTokenizer does, ``pipelines`` holds the two
families' ways from text to tokens, ``streams`` decodes token by token, ``beside`` looks for the tokenizer
of a checkpoint that is a single file.
"""

from gptkern.tokenizer.streams import TokenStream
from gptkern.tokenizer.tokenizer import Tokenizer

__all__ = ["TokenStream", "Tokenizer"]
