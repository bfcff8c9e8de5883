"""Text to token ids and back: GPT-2's byte-level BPE, GPT-1's BPE, plain bytes, any ``tokenizer.json``.

``folder`` reads the files of a folder as transformers' AutoTokenizer does, ``pipelines`` holds the two
families' ways from text to tokens, ``chat`` renders conversations by the model's template, ``batch`` makes
rows of one length of several texts, ``streams`` decodes token by token, ``beside`` looks for the tokenizer of
a checkpoint that is a single file.
"""

from gptkern.tokenizer.batch import Encoding
from gptkern.tokenizer.streams import TokenStream
from gptkern.tokenizer.tokenizer import Tokenizer

__all__ = ["Encoding", "TokenStream", "Tokenizer"]
