"""``gptkern chat``: a conversation in the terminal, by the model's chat template or as a transcript."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptkern.cli import _generation as g
from gptkern.cli import _options as o
from gptkern.cli import terminal
from gptkern.cli._conversation import Conversation, Templated, Transcript, tokens_of
from gptkern.durable import write_file

if TYPE_CHECKING:
    from gptkern.gpt import GPT

FALLBACK = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
# New tokens of an answer, where the user says nothing: transcripts wander, answers end by themselves.
_MOST_IN_TRANSCRIPT, _MOST = 100, 1000
_HELP = (
    "/regen answers the last message anew, /reset begins anew, /save FILE writes the conversation as JSON, "
    "/help shows this, /exit (or Ctrl-D) ends, Ctrl-C stops an answer."
)


@g.generation_options(
    FALLBACK,
    without=("max_new_tokens", "min_new_tokens", "num_beams", "num_return_sequences", "stop_strings"),
)
def chat(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="The model: the same as --model.")
    ] = None,
    model: o.Model = "embedded",
    tokenizer: o.TokenizerPath = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            min=1,
            help="Most new tokens of one answer.",
            show_default=f"{_MOST}; {_MOST_IN_TRANSCRIPT} in a transcript",
        ),
    ] = None,
    system: Annotated[
        str,
        typer.Option("--system", help="The system prompt; in a transcript, the text that it begins with."),
    ] = "",
    you: Annotated[str, typer.Option(help="Your name, as it is shown and in a transcript.")] = "User",
    bot: Annotated[str, typer.Option(help="The model's name, likewise.")] = "Bot",
    greedy: g.Greedy = False,
    dtype: o.Dtype = None,
    weights: o.Weights = None,
    device: o.Device = None,
    **choices: Any,
) -> None:
    """Talk with a model, which sees the whole conversation.

    A model that was trained to answer brings a chat template, and the conversation is put to it in that form.
    GPT-2 and its like continue text, which is said at the beginning: the conversation is then a transcript,
    `User: ...` and `Bot: ...` by turns, and an answer ends where the model would write your next line. When
    the context is full, the oldest turns are forgotten, and a line says so.

    While you talk: `/regen` answers the last message anew, `/reset` begins anew, `/save FILE` writes the
    conversation as JSON, `/help` lists these. Ctrl-C stops an answer, Ctrl-D ends the chat.

    Examples:

    - `gptkern chat --you JULIET --bot ROMEO` with the small model that comes with gptkern

    - `gptkern chat ./SmolLM2-135M-Instruct --system "You answer in one sentence."`
    """
    # imported here: --help need not wait for PyTorch
    from gptkern.generate.engines import Engines

    if checkpoint is not None and model != "embedded":
        raise typer.BadParameter("MODEL and --model: give one of them")
    gpt = o.load(checkpoint or model, device, dtype, weights, tokenizer)
    conversation = _conversation(gpt, g.unescape(system), you, bot)
    transcript = isinstance(conversation, Transcript)
    choices |= {"num_beams": 1, "num_return_sequences": 1}
    if transcript:
        choices["stop_strings"] = [f"\\n{you}:", f"\\n{bot}:"]
    options = g.generation(gpt, FALLBACK, choices, greedy=greedy)
    # Each turn begins with those before it: only what is new goes through the model.
    gpt.engines = Engines(keeps_prefixes=True)
    most = max_new_tokens or (_MOST_IN_TRANSCRIPT if transcript else _MOST)
    interactive = terminal.waits_for_a_person()
    if interactive:
        print(_HELP, file=sys.stderr)
        with contextlib.suppress(ImportError):  # Python can be built without it
            import readline  # noqa: F401  # gives input() line editing and a history
    talk = _Talk(gpt, conversation, most, options, interactive, bot)
    while (line := _read(f"{you}: ", interactive)) is not None:
        if line in ("/exit", "/quit"):
            return
        try:
            talk.take(line)
        except (Refused, OSError) as error:
            if not interactive:
                raise
            terminal.tell(error)


def _conversation(gpt: GPT, system: str, you: str, bot: str) -> Conversation:
    """An empty conversation. Whatever speaks against it is refused here, before anybody types."""
    tokenizer = o.tokenizer_of(gpt)
    if not tokenizer.chat_templates:
        terminal.tell(
            "the model has no chat template, so it was not trained to answer: it continues a transcript of "
            f"{you} and {bot}"
        )
        return Transcript(system, you, bot)
    conversation = Templated(system, tokenizer)
    conversation.prompt("Hello")
    return conversation


class Refused(ValueError):
    """A message or a command that cannot be followed; the conversation is as it was."""


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


@dataclass
class _Talk:
    """A conversation that goes on.

    Attributes:
        gpt, conversation: Who talks, and what was said.
        most: Most new tokens of an answer.
        options: What ``GPT.stream`` gets.
        interactive: A person types at a terminal.
        bot: The name that is shown before an answer.
        saved: Files that ``/save`` wrote: it replaces these, and no others.
    """

    gpt: GPT
    conversation: Conversation
    most: int
    options: dict[str, Any]
    interactive: bool
    bot: str
    saved: set[Path] = field(default_factory=set)

    def take(self, line: str) -> None:
        """Follow a command, or answer a message.

        Raises:
            Refused: It cannot be done.
        """
        command, _, argument = line.partition(" ")
        if line == "/reset":
            self.conversation.turns.clear()
        elif line == "/regen":
            self._regenerate()
        elif command == "/save" and argument.strip():
            self._save(Path(argument.strip()).expanduser())
        elif line.startswith("/"):
            print(_HELP, file=sys.stderr)
        elif line:
            self._answer(line)

    def _regenerate(self) -> None:
        if not self.conversation.turns:
            raise Refused("/regen: nothing was answered yet")
        if "seed" not in self.options:
            terminal.tell("the most likely tokens are taken (--greedy): the answer stays the same")
        line, _ = self.conversation.turns.pop()
        self._answer(line)

    def _save(self, path: Path) -> None:
        if path.exists() and path.resolve() not in self.saved:
            raise Refused(f"/save: {path} exists: name another file")
        text = json.dumps(self.conversation.messages(), indent=2, ensure_ascii=False)
        write_file(path, text + "\n")
        self.saved.add(path.resolve())
        print(f"(saved: {path})", file=sys.stderr)

    def _answer(self, line: str) -> None:
        """Print the model's turn as it is made, and keep it."""
        tokenizer = o.tokenizer_of(self.gpt)
        context = self.gpt.spec.context
        used = self._make_room(line, context)
        print(f"{self.bot}:", end="", flush=True)
        if isinstance(self.conversation, Templated):
            # A transcript's answer brings the space of its own.
            print(" ", end="", flush=True)
        pieces = self.gpt.stream(
            self.conversation.prompt(line),
            tokenizer=tokenizer,
            max_new_tokens=min(self.most, context - used),
            **self.options,
        )
        try:
            for piece in pieces:
                terminal.write(piece, end="")
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            # The answer so far is part of the conversation.
        terminal.write("")
        self.conversation.turns.append((line, pieces.completion.text.strip()))
        if "seed" in self.options:
            # The same words a second time shall not get the same answer.
            self.options["seed"] = (self.options["seed"] + 1) % 2**64

    def _make_room(self, line: str, context: int) -> int:
        """Forget the oldest turns until an answer fits; the tokens of the prompt."""
        tokenizer = o.tokenizer_of(self.gpt)
        alone = tokens_of(tokenizer, replace(self.conversation, turns=[]).prompt(line))
        if alone >= context:
            raise Refused(
                f"the message has {alone} tokens with what stands before it; the context is {context}"
            )
        forgotten, reserved = 0, min(self.most, context // 2)
        while (
            used := tokens_of(tokenizer, self.conversation.prompt(line))
        ) + reserved > context and self.conversation.turns:
            del self.conversation.turns[0]
            forgotten += 1
        if forgotten:
            print(f"(the context is full: {forgotten} earlier turns are forgotten)", file=sys.stderr)
        return used
