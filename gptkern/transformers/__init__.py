"""The three ways into transformers: accelerate a model, import a class, choose an attention.

::

    model = gptkern.accelerate(GPT2LMHeadModel.from_pretrained("gpt2"))     # one line more
    from gptkern.transformers import GPT2LMHeadModel, GPT2Tokenizer         # or one line changed
    AutoModelForCausalLM.from_pretrained(..., attn_implementation="gptkern")  # or any other model

``import gptkern`` is enough for the last. Names are imported at their first use; all but ``FallbackWarning``,
``Explanation`` and ``Route`` need transformers: ``pip install 'gptkern[transformers]'``.
"""

from typing import TYPE_CHECKING, Any

from gptkern._lazy import lazily
from gptkern.drop_in import accelerate, needs_transformers, restore

if TYPE_CHECKING:
    from transformers import GPT2Tokenizer, GPT2TokenizerFast, OpenAIGPTTokenizer

    from gptkern.environment import FallbackWarning
    from gptkern.routes import Explanation, Route
    from gptkern.transformers.classes import (
        GPT2DoubleHeadsModel,
        GPT2ForQuestionAnswering,
        GPT2ForSequenceClassification,
        GPT2ForTokenClassification,
        GPT2LMHeadModel,
        GPT2Model,
        OpenAIGPTLMHeadModel,
    )
    from gptkern.transformers.swap import SUPPORTED, explain

_CLASSES = "gptkern.transformers.classes"
_HOMES = {
    "SUPPORTED": "gptkern.transformers.swap",
    "Explanation": "gptkern.routes",
    "FallbackWarning": "gptkern.environment",
    "GPT2DoubleHeadsModel": _CLASSES,
    "GPT2ForQuestionAnswering": _CLASSES,
    "GPT2ForSequenceClassification": _CLASSES,
    "GPT2ForTokenClassification": _CLASSES,
    "GPT2LMHeadModel": _CLASSES,
    "GPT2Model": _CLASSES,
    "GPT2Tokenizer": "transformers",
    "GPT2TokenizerFast": "transformers",
    "OpenAIGPTLMHeadModel": _CLASSES,
    "OpenAIGPTTokenizer": "transformers",
    "Route": "gptkern.routes",
    "accelerate": "gptkern.drop_in",
    "explain": "gptkern.transformers.swap",
    "restore": "gptkern.drop_in",
}

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

_get, __dir__ = lazily(__name__, _HOMES)


def __getattr__(name: str) -> Any:
    try:
        return _get(name)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise needs_transformers(f"gptkern.transformers.{name}") from None
