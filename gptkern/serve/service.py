"""Service: one engine with all that requests need around it, and the jobs that they become."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gptkern.engine.async_engine import AsyncEngine, EventReader
from gptkern.engine.engine import Engine
from gptkern.engine.request import Request, TokenEvent
from gptkern.gpt import GPT
from gptkern.serve.admission import Admission, Ticket
from gptkern.serve.answers import Answer
from gptkern.serve.chat import chat_text, template_of
from gptkern.serve.errors import ApiProblem, bad_field
from gptkern.serve.grammar import Grammars, grammar_of
from gptkern.serve.metrics import Metrics
from gptkern.serve.options import max_new_of, options_of
from gptkern.serve.protocol import GenerationFields, Message
from gptkern.serve.settings import ServeSettings
from gptkern.serve.steering import SteeringVectors
from gptkern.tokenizer import Tokenizer

# Texts beyond this are encoded in a thread: the event loop has other streams to serve.
_LONG_TEXT = 8192
# Whoever waits for a whole answer need not be woken at each token.
_WHOLE_INTERVAL, _WHOLE_TOKENS = 0.5, 1 << 20


@dataclass(frozen=True)
class Prompt:
    """One prompt: its token ids, and its text where the answer repeats it."""

    tokens: list[int]
    echo: str | None = None


@dataclass
class Wish:
    """The wish of a body, beside its prompts.

    Attributes:
        max_tokens: The most new tokens; None where it has no word.
        default_tokens: Where it has none; None is the rest of the context.
        logprobs: As ``Request``'s.
        echo: Whether answers begin with their prompts.
    """

    fields: GenerationFields
    max_tokens: int | None
    default_tokens: int | None
    logprobs: int | None
    echo: bool = False


@dataclass
class Job:
    """A request on its way: its continuations, and what they hold.

    Attributes:
        answers: All of them, in the order of the choices.
        began: When it came, on the service's clock.
    """

    prompts: Sequence[Prompt]
    copies: int
    answers: list[Answer]
    readers: list[EventReader]
    ticket: Ticket
    metrics: Metrics
    began: float
    _last: float = field(default=0.0)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(prompt.tokens) for prompt in self.prompts)

    @property
    def new_tokens(self) -> int:
        """New tokens so far."""
        return sum(answer.count for answer in self.answers)

    @property
    def has_ended(self) -> bool:
        """True if every answer has its last token."""
        return all(answer.finish_reason is not None for answer in self.answers)

    def usage(self) -> dict[str, int]:
        """The tokens, as OpenAI counts them."""
        prompt, new = self.prompt_tokens, self.new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    async def progress(self, *, within: float, tokens: int) -> AsyncIterator[list[Answer]]:
        """Let the answers grow; those that did, each time some have.

        Raises:
            ApiProblem: The request failed.
        """
        async for place, events in _merged(self.readers, within, tokens):
            self._time(len(events))
            grown: dict[int, Answer] = {}
            for event in events:
                answer = self.answers[place * self.copies + event.copy]
                answer.take(event)
                grown[answer.index] = answer
                if answer.finish_reason is not None:
                    self.metrics.ended(answer.finish_reason)
            if self.has_ended:
                self.metrics.request.observe(time.monotonic() - self.began)
            yield list(grown.values())

    async def finish(self) -> None:
        """Let the answers grow to their ends."""
        async for _ in self.progress(within=_WHOLE_INTERVAL, tokens=_WHOLE_TOKENS):
            pass

    def _time(self, count: int) -> None:
        now = time.monotonic()
        if not self._last:
            self.metrics.first_token.observe(now - self.began)
        else:
            self.metrics.between_tokens.observe((now - self._last) / count, count)
        self._last = now

    def close(self) -> None:
        """End what still runs, and give everything back."""
        for reader in self.readers:
            reader.close()
        self.ticket.close()
        self.metrics.generation_tokens.inc(self.new_tokens)


async def _merged(
    readers: Sequence[EventReader], within: float, tokens: int
) -> AsyncIterator[tuple[int, list[TokenEvent]]]:
    """Batches of events of several readers as they come, each with its reader's place."""
    if len(readers) == 1:
        while batch := await readers[0].read(within=within, tokens=tokens):
            yield 0, batch
        return

    def read(place: int) -> asyncio.Task[list[TokenEvent]]:
        return asyncio.create_task(readers[place].read(within=within, tokens=tokens), name=str(place))

    tasks = {read(place) for place in range(len(readers))}
    try:
        while tasks:
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if batch := task.result():
                    place = int(task.get_name())
                    tasks.add(read(place))
                    yield place, batch
    finally:
        for task in tasks:
            task.cancel()


class Service:
    """A model behind an engine, for one event loop.

    Args:
        model: The model, on its device, with its tokenizer.
        engine_options: Those of ``Engine``.

    Raises:
        ValueError: The model has no tokenizer; steering vectors that are not the model's.
    """

    def __init__(self, model: GPT, settings: ServeSettings, **engine_options: Any) -> None:
        if model.tokenizer is None:
            raise ValueError("serve: the model has no tokenizer beside it; assign model.tokenizer")
        self.model, self.settings = model, settings
        self.tokenizer: Tokenizer = model.tokenizer
        self.steering = SteeringVectors(settings.steering, model)
        if settings.steering:
            engine_options |= {"steering": True}
        self.inner = Engine(model, **engine_options)
        self.engine = AsyncEngine(self.inner)
        self.admission = Admission(settings.most_rows, settings.most_tokens)
        self.metrics = Metrics(settings.model_name, lambda: self.inner.load)
        self.created = int(time.time())
        self.draining = False
        self.chat_template = template_of(self.tokenizer, settings.chat_template)
        self.end_of_text = _end_of_text(model)
        self.opening = _opening(self.tokenizer, self.end_of_text)
        self._jobs: dict[int, Job] = {}
        self.grammars = Grammars(
            self.tokenizer, model.spec.vocab_size, self.end_of_text, settings.grammar_seconds
        )

    @property
    def jobs_in_flight(self) -> int:
        """Requests that have begun and have not been answered."""
        return len(self._jobs)

    def refused(self, status: int) -> None:
        """Count a request that was not served."""
        self.metrics.refused(status)

    def check_model(self, name: str | None) -> None:
        """Refuse another model's name.

        Raises:
            ApiProblem: 404.
        """
        if name is not None and name != self.settings.model_name:
            error = bad_field(
                "model", name, f"{self.settings.model_name!r} is served", code="model_not_found"
            )
            error.status = 404
            raise error

    def checked_ids(self, param: str, tokens: Sequence[int]) -> list[int]:
        """Token ids of a request.

        Raises:
            ApiProblem: One that the model does not have.
        """
        vocab_size = self.model.spec.vocab_size
        if tokens and max(tokens) >= vocab_size:
            raise bad_field(param, max(tokens), f"token ids from 0 to {vocab_size - 1} are accepted")
        return list(tokens)

    async def encode(self, text: str, *, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        """The ids of a text.

        Raises:
            ApiProblem: A text that the tokenizer cannot express.
        """
        try:
            if len(text) > _LONG_TEXT:
                return await asyncio.to_thread(
                    self.tokenizer.encode, text, add_special_tokens=add_special_tokens
                )
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except ValueError as error:
            raise ApiProblem(400, f"{param}: {_plain_words(error)}", param=param) from error

    async def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation, up to where the model speaks.

        Raises:
            ApiProblem: As ``chat_text`` and ``encode``.
        """
        # In a thread: a template is a program of somebody else's.
        text = await asyncio.to_thread(chat_text, self.tokenizer, self.chat_template, messages)
        # The template writes the special tokens.
        return await self.encode(text, add_special_tokens=False, param="messages")

    async def begin(self, wish: Wish, prompts: Sequence[Callable[[], Any]]) -> Job:
        """Admit a request and start its continuations.

        Args:
            prompts: One coroutine function a prompt, which gives a ``Prompt``: none is run before there is
                room for all.

        Raises:
            ApiProblem: Anything that is wrong with it; nothing is held then.
        """
        began = time.monotonic()
        fields = wish.fields
        if fields.stream_options is not None and not fields.stream:
            raise ApiProblem(400, "stream_options belongs to stream: true", param="stream_options")
        copies = fields.n or 1
        if copies > self.inner.cache.max_seqs:
            raise bad_field("n", copies, f"at most {self.inner.cache.max_seqs} are made of a prompt")
        grammar, steering = grammar_of(fields), self.steering.sum(fields.steering)
        ticket = self.admission.reserve(copies * len(prompts))
        readers: list[EventReader] = []
        try:
            read = [await prompt() for prompt in prompts]
            constraint = None if grammar is None else await self.grammars.constraint(grammar)
            lengths = [self._most_new(wish, prompt) for prompt in read]
            ticket.take(sum(len(p.tokens) + copies * new for p, new in zip(read, lengths, strict=True)))
            for prompt, new in zip(read, lengths, strict=True):
                readers.append(self._open(wish, prompt, new, constraint, steering))
        except BaseException:
            for reader in readers:
                reader.close()
            ticket.close()
            raise
        job = Job(read, copies, self._answers(wish, read), readers, ticket, self.metrics, began)
        self.metrics.prompt_tokens.inc(job.prompt_tokens)
        self._jobs[id(job)] = job
        return job

    def end(self, job: Job) -> None:
        """Give back what a job holds, whatever became of it."""
        if self._jobs.pop(id(job), None) is not None:
            job.close()

    def cancel_all(self) -> None:
        """Let every job end with what it has."""
        for job in self._jobs.values():
            for reader in job.readers:
                reader.cancel()

    async def close(self) -> None:
        """End everything."""
        await self.grammars.close()
        await self.engine.close()

    def _most_new(self, wish: Wish, prompt: Prompt) -> int:
        context = self.model.spec.context
        return max_new_of(wish.max_tokens, wish.default_tokens, len(prompt.tokens), context)

    def _open(
        self,
        wish: Wish,
        prompt: Prompt,
        new: int,
        constraint: Any,
        steering: Mapping[int, torch.Tensor] | None,
    ) -> EventReader:
        fields, vocab_size = wish.fields, self.model.spec.vocab_size
        options = options_of(fields, max_new=new, end_of_text=self.end_of_text, vocab_size=vocab_size)
        of_prompt = fields.prompt_logprobs
        if wish.echo and wish.logprobs is not None:
            of_prompt = max(wish.logprobs, of_prompt or 0)
        try:
            request = Request(
                prompt=prompt.tokens,
                options=options,
                deadline=self.settings.deadline,
                logprobs=wish.logprobs,
                prompt_logprobs=of_prompt,
                constraint=constraint,
                steering=steering,
            )
            return self.engine.open(request, self.tokenizer)
        except (TypeError, ValueError) as error:
            raise ApiProblem(400, _plain_words(error)) from error

    def _answers(self, wish: Wish, prompts: Sequence[Prompt]) -> list[Answer]:
        copies = wish.fields.n or 1
        return [
            Answer(
                place * copies + copy,
                self.tokenizer,
                prompt.tokens,
                echo=prompt.echo,
                logprobs=wish.logprobs is not None,
                hidden=wish.max_tokens == 0,
            )
            for place, prompt in enumerate(prompts)
            for copy in range(copies)
        ]


def _end_of_text(model: GPT) -> tuple[int, ...]:
    """The tokens that end a text: the checkpoint's word, else the tokenizer's."""
    asked = model.generation_config.get("eos_token_id")
    ids = asked if isinstance(asked, list | tuple) else [asked]
    ends = [token for token in ids if isinstance(token, int) and 0 <= token < model.spec.vocab_size]
    own = model.tokenizer.eos_token_id if model.tokenizer is not None else None
    return tuple(ends) or (() if own is None else (own,))


def _opening(tokenizer: Tokenizer, end_of_text: tuple[int, ...]) -> int | None:
    """The token that begins a text: an empty prompt stands for it. None where the model has none."""
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    return next(iter(end_of_text), None)


def _plain_words(error: Exception) -> str:
    """An error of the engine without the names of its functions."""
    text = str(error)
    for name in ("Engine.add: ", "Request: ", "generate: ", "Tokenizer.encode: "):
        text = text.removeprefix(name)
    return text
