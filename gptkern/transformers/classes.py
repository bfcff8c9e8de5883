"""The classes to import: transformers' own, whose instances are accelerated from the start."""

from __future__ import annotations

from typing import Any

import transformers

from gptkern.transformers import models
from gptkern.transformers.swap import accelerate


def _accelerating(cls: Any, library: Any) -> Any:
    """A subclass of ``cls`` under the library's name, whose instances are accelerated."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        # An attention that the caller chose by name stays; "sdpa" is the library's default.
        chosen = self.config._attn_implementation
        accelerate(self)
        if chosen not in ("sdpa", "gptkern", None):
            self.set_attn_implementation(chosen)

    def from_pretrained(subclass: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = cls.from_pretrained.__func__(subclass, *args, **kwargs)
        chosen = kwargs.get("attn_implementation")
        if chosen is not None:
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model.set_attn_implementation(chosen)
        return loaded

    def is_custom_code(subclass: Any) -> bool:
        # The library goes by the place of the class, and initialises and saves custom code in other ways.
        return bool(library.is_custom_code())

    from_pretrained.__doc__ = cls.from_pretrained.__doc__
    namespace = {
        "__module__": __name__,
        "__qualname__": library.__qualname__,
        "__doc__": f"``transformers.{library.__qualname__}``, accelerated: another import, nothing else.",
        "__init__": __init__,
        "from_pretrained": classmethod(from_pretrained),
        "is_custom_code": classmethod(is_custom_code),
    }
    return type(library.__name__, (cls,), namespace)


GPT2LMHeadModel = _accelerating(models.GPT2LMHeadModel, transformers.GPT2LMHeadModel)
OpenAIGPTLMHeadModel = _accelerating(models.OpenAIGPTLMHeadModel, transformers.OpenAIGPTLMHeadModel)
(
    GPT2Model,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2ForQuestionAnswering,
    GPT2DoubleHeadsModel,
) = (
    _accelerating(cls, cls)
    for cls in (
        transformers.GPT2Model,
        transformers.GPT2ForSequenceClassification,
        transformers.GPT2ForTokenClassification,
        transformers.GPT2ForQuestionAnswering,
        transformers.GPT2DoubleHeadsModel,
    )
)
