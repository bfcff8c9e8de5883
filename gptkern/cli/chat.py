"""``gptkern chat``: a conversation in the terminal, written by the model as a transcript."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptkern.cli import _generation as g
from gptkern.cli import _options as o
from gptkern.cli import terminal

if TYPE_CHECKING:
    from gptkern.gpt import GPT

FALLBACK = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
_HELP = "/reset begins anew, /exit (or Ctrl-D) ends, Ctrl-C stops an answer."


@dataclass
class Transcript:
    """A conversation, as the text that the model continues.

    Attributes:
        opening: Text before the first turn, never dropped.
        you, bot: What stands before each one's lines.
        turns: Pairs of a user's line and the model's answer; the oldest are dropped when the context is full.
    """

    opening: str
    you: str
    bot: str
    turns: list[tuple[str, str]] = field(default_factory=list)

    def prompt(self, line: str) -> str:
        """The transcript up to where the model speaks."""
        lines = [self.opening] if self.opening else []
        for yours, theirs in self.turns:
            lines += [f"{self.you}: {yours}", f"{self.bot}: {theirs}"]
        return "\n".join([*lines, f"{self.you}: {line}", f"{self.bot}:"])


@g.generation_options(
    FALLBACK,
    without=("max_new_tokens", "min_new_tokens", "num_beams", "num_return_sequences", "stop_strings"),
)
def chat(
    model: o.Model = "embedded",
    tokenizer: o.TokenizerPath = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Most new tokens of one answer.")
    ] = 100,
    system: Annotated[str, typer.Option("--system", help="Text that the conversation begins with.")] = "",
    you: Annotated[str, typer.Option(help="Your name in the transcript.")] = "User",
    bot: Annotated[str, typer.Option(help="The model's name in the transcript.")] = "Bot",
    greedy: g.Greedy = False,
    dtype: o.Dtype = None,
    weights: o.Weights = None,
    device: o.Device = None,
    **choices: Any,
) -> None:
    """Talk with a model, which sees the whole conversation.

    GPT-2 and its like continue text: they were not trained to answer. The conversation is therefore
    put to the model as a transcript, `User: ...` and `Bot: ...` by turns, and its answer ends where it
    would write your next line. When the context is full, the oldest turns are forgotten,
    and a line says so. Ctrl-C stops an answer, Ctrl-D ends the chat.

    Examples:

    - `gptkern chat --you JULIET --bot ROMEO` with the small model that comes with gptkern

    - `gptkern chat --model gpt2-xl --system "A talk between a student and a patient teacher."`
    """
    # imported here: --help need not wait for PyTorch
    from gptkern.generate.engines import Engines

    gpt = o.load(model, device, dtype, weights, tokenizer)
    o.tokenizer_of(gpt)  # refused before anybody types
    choices |= {
        "stop_strings": [f"\\n{you}:", f"\\n{bot}:"],
        "num_beams": 1,
        "num_return_sequences": 1,
    }
    options = g.generation(gpt, FALLBACK, choices, greedy=greedy)
    # Each turn begins with those before it: only what is new goes through the model.
    gpt.engines = Engines(keeps_prefixes=True)
    transcript = Transcript(g.unescape(system), you, bot)
    interactive = terminal.waits_for_a_person()
    if interactive:
        print(_HELP, file=sys.stderr)
        with contextlib.suppress(ImportError):  # Python can be built without it
            import readline  # noqa: F401  # gives input() line editing and a history
    while (line := _read(f"{you}: ", interactive)) is not None:
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            transcript.turns.clear()
        elif line.startswith("/"):
            print(_HELP, file=sys.stderr)
        elif line:
            try:
                answer = _answer(gpt, transcript, line, max_new_tokens, options, interactive)
            except TooLong as error:
                if not interactive:
                    raise
                terminal.tell(error)
                continue
            transcript.turns.append((line, answer))
            if "seed" in options:
                # The same words a second time shall not get the same answer.
                options["seed"] = (options["seed"] + 1) % 2**64


class TooLong(ValueError):
    """A message that leaves no room for an answer."""


def _read(shown: str, interactive: bool) -> str | None:
    """The next message; None at the end of the input."""
    try:
        return input(shown if interactive else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        if not interactive:
            raise
        print(f"\n{_HELP}", file=sys.stderr)
        return ""


def _answer(
    gpt: GPT, transcript: Transcript, line: str, most: int, options: dict[str, Any], interactive: bool
) -> str:
    """Print the model's turn as it is made, and return it."""
    tokenizer = o.tokenizer_of(gpt)
    context = gpt.config.n_positions
    alone = len(tokenizer.encode(replace(transcript, turns=[]).prompt(line)))
    if alone >= context:
        raise TooLong(f"the message has {alone} tokens with what stands before it; the context is {context}")
    forgotten = 0
    while (used := len(tokenizer.encode(transcript.prompt(line)))) + most > context and transcript.turns:
        del transcript.turns[0]
        forgotten += 1
    if forgotten:
        print(f"(the context is full: {forgotten} earlier turns are forgotten)", file=sys.stderr)
    print(f"{transcript.bot}:", end="", flush=True)
    pieces = gpt.stream(transcript.prompt(line), max_new_tokens=min(most, context - used), **options)
    try:
        for piece in pieces:
            terminal.write(piece, end="")
    except KeyboardInterrupt:
        if not interactive:
            raise
        # The answer so far is part of the conversation.
    terminal.write("")
    return pieces.completion.text.strip()
