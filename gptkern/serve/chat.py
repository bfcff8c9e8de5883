"""A conversation as the text that the model continues."""

from __future__ import annotations

from collections.abc import Sequence

from gptkern.serve.errors import ApiProblem
from gptkern.serve.protocol import Message
from gptkern.tokenizer import Tokenizer


def template_of(tokenizer: Tokenizer, own: str | None) -> str | None:
    """The chat template: the operator's, else the model's; None where there is none."""
    return own if own is not None else tokenizer.chat_templates.get("default")


def chat_text(tokenizer: Tokenizer, template: str | None, messages: Sequence[Message]) -> str:
    """A conversation as the text that the model continues: up to where it speaks.

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
    conversation = [{"role": message.role, "content": message.text} for message in messages]
    try:
        text: str = tokenizer.apply_chat_template(
            conversation, chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except (TypeError, ValueError) as error:
        raise ApiProblem(
            400, f"the chat template refuses the messages: {error}", param="messages", code="chat_template"
        ) from error
    return text
