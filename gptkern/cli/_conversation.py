"""A conversation as the prompt of its next answer: by the model's chat template, or as a transcript."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptkern.tokenizer import Tokenizer

Turn = tuple[str, str]


@dataclass
class Conversation:
    """Turns, and what stands before the first one.

    Attributes:
        system: The system prompt, or a transcript's opening; "" for none. It is never dropped.
        turns: Pairs of a user's line and the model's answer; the oldest are dropped when the context is full.
    """

    system: str
    turns: list[Turn] = field(default_factory=list, kw_only=True)

    def prompt(self, line: str) -> str | list[int]:
        """All up to where the model answers ``line``: text, or token ids."""
        raise NotImplementedError

    def messages(self) -> list[dict[str, str]]:
        """The conversation as transformers and most services write one."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for line, answer in self.turns:
            messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]
        return messages


@dataclass
class Templated(Conversation):
    """A conversation with a model that was trained on a chat template.

    Attributes:
        tokenizer: The tokenizer that has the template.
    """

    tokenizer: Tokenizer

    def prompt(self, line: str) -> list[int]:
        messages = [*self.messages(), {"role": "user", "content": line}]
        ids: Any = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return list(ids)


@dataclass
class Transcript(Conversation):
    """A conversation as text that a model continues, each line after the name of who speaks.

    Attributes:
        you, bot: The names.
    """

    you: str
    bot: str

    def prompt(self, line: str) -> str:
        lines = [self.system] if self.system else []
        for yours, theirs in self.turns:
            lines += [f"{self.you}: {yours}", f"{self.bot}: {theirs}"]
        return "\n".join([*lines, f"{self.you}: {line}", f"{self.bot}:"])


def tokens_of(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> int:
    """The number of a prompt's tokens."""
    return len(tokenizer.encode(prompt)) if isinstance(prompt, str) else len(prompt)
