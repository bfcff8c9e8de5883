"""gptkern in transformers: ``accelerate`` for models at hand, classes to import, an attention to choose.

::

    model = gptkern.accelerate(GPT2LMHeadModel.from_pretrained("gpt2"))     # one line more
    from gptkern.transformers import GPT2LMHeadModel, GPT2Tokenizer         # or one line changed
    AutoModelForCausalLM.from_pretrained(..., attn_implementation="gptkern")  # or any other model

``import gptkern`` is enough for the last.
"""

from transformers import GPT2Tokenizer, GPT2TokenizerFast, OpenAIGPTTokenizer

from gptkern.routes import Explanation, FallbackWarning, Route
from gptkern.transformers import attention
from gptkern.transformers.classes import (
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    OpenAIGPTLMHeadModel,
)
from gptkern.transformers.swap import SUPPORTED, accelerate, explain, restore

attention.register()

__all__ = [
    "SUPPORTED",
    "Explanation",
    "FallbackWarning",
    "GPT2DoubleHeadsModel",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "OpenAIGPTLMHeadModel",
    "OpenAIGPTTokenizer",
    "Route",
    "accelerate",
    "explain",
    "restore",
]
