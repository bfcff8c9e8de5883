"""A conversation as the text that the model continues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptkern.serve.errors import ApiProblem
from gptkern.serve.protocol import Message
from gptkern.tokenizer import Tokenizer


def template_of(tokenizer: Tokenizer, own: str | None) -> str | None:
    """The chat template: the operator's, else the model's; None where there is none."""
    return own if own is not None else tokenizer._chat_template


def chat_prompt(tokenizer: Tokenizer, template: str | None, messages: Sequence[Message]) -> list[int]:
    """The token ids of a conversation, up to where the model speaks.

    Raises:
        ApiProblem: The model has no template, or the template refuses the messages.
    """
    if template is None:
        raise ApiProblem(
            400,
            "the model has no chat template, so it serves no chat: use /v1/completions, or start the server "
            "with --chat-template FILE",
            param="messages",
            code="no_chat_template",
        )
    text = _rendered(tokenizer, template, messages)
    # A template writes all special tokens itself.
    return tokenizer.encode(text, add_special_tokens=False)


def _rendered(tokenizer: Tokenizer, template: str, messages: Sequence[Message]) -> str:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    conversation: list[dict[str, Any]] = [
        {"role": message.role, "content": message.text} for message in messages
    ]
    try:
        return environment.from_string(template).render(
            messages=conversation,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token or "",
            add_generation_prompt=True,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise ApiProblem(
            400, f"the chat template refuses the messages: {error}", param="messages", code="chat_template"
        ) from error
