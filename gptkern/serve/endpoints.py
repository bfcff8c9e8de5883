"""The two ways to ask for text: completions and chat completions, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gptkern.serve.answers import (
    Answer,
    Delta,
    PromptTables,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs_json,
)
from gptkern.serve.connection import EventStream, while_connected
from gptkern.serve.errors import ApiProblem, bad_field, json_bytes, json_response
from gptkern.serve.options import DEFAULT_COMPLETION_TOKENS
from gptkern.serve.protocol import ChatRequest, CompletionRequest
from gptkern.serve.service import Job, Prompt, Service, Wish

PromptSource = Callable[[], Any]


class Form:
    """The way in which one of the interfaces writes an answer.

    Attributes:
        prefix: The beginning of an answer's id.
        whole, chunk: The ``object`` of an answer, and of a stream's chunk.
    """

    prefix: str
    whole: str
    chunk: str

    def __init__(self, service: Service, logprobs: bool) -> None:
        self.tokenizer, self.logprobs = service.tokenizer, logprobs

    def choice(self, answer: Answer, delta: Delta) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def piece(self, answer: Answer, delta: Delta, first: bool) -> dict[str, Any]:
        """A part of a stream."""
        raise NotImplementedError

    def with_prompt(self, choice: dict[str, Any], tables: PromptTables) -> dict[str, Any]:
        """Add a prompt's log-probabilities where vLLM has them.

        Returns:
            The fields that stand beside the choices.
        """
        raise NotImplementedError


class CompletionForm(Form):
    """Completions."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def choice(self, answer: Answer, delta: Delta) -> dict[str, Any]:
        """A whole answer."""
        logprobs = completion_logprobs(self.tokenizer, delta.entries) if self.logprobs else None
        return {
            "index": answer.index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }

    def piece(self, answer: Answer, delta: Delta, first: bool) -> dict[str, Any]:
        """A part of a stream: its text and its tokens."""
        return self.choice(answer, delta)

    def with_prompt(self, choice: dict[str, Any], tables: PromptTables) -> dict[str, Any]:
        """Add them to each choice: there may be several prompts."""
        choice["prompt_logprobs"] = tables
        return {}


class ChatForm(Form):
    """Chat completions."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, answer: Answer, delta: Delta) -> dict[str, Any]:
        """A whole answer."""
        parts: dict[str, Any] = {"content": delta.text, "refusal": None, "annotations": []}
        return self._around(answer, delta, "message", {"role": "assistant", **parts})

    def piece(self, answer: Answer, delta: Delta, first: bool) -> dict[str, Any]:
        """A part of a stream; the first says who speaks."""
        message: dict[str, Any] = {"role": "assistant"} if first else {}
        if first or delta.text:
            message["content"] = delta.text
        return self._around(answer, delta, "delta", message)

    def with_prompt(self, choice: dict[str, Any], tables: PromptTables) -> dict[str, Any]:
        """Give them beside the choices: they have one prompt."""
        return {"prompt_logprobs": tables}

    def _around(self, answer: Answer, delta: Delta, name: str, message: dict[str, Any]) -> dict[str, Any]:
        logprobs = chat_logprobs(self.tokenizer, delta.entries) if self.logprobs else None
        return {
            "index": answer.index,
            name: message,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }


async def complete(service: Service, body: CompletionRequest, http: HttpRequest) -> Response:
    """Answer ``/v1/completions``."""
    service.check_model(body.model)
    echo = bool(body.echo)
    wish = Wish(body, body.max_tokens, DEFAULT_COMPLETION_TOKENS, body.logprobs, echo)
    form = CompletionForm(service, body.logprobs is not None)
    return await _respond(service, form, wish, _prompts(service, body, echo), http)


async def chat(service: Service, body: ChatRequest, http: HttpRequest) -> Response:
    """Answer ``/v1/chat/completions``."""
    service.check_model(body.model)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiProblem(
            400,
            "max_tokens and max_completion_tokens are two names of one field: give one",
            param="max_completion_tokens",
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_field("top_logprobs", body.top_logprobs, "it belongs to logprobs: true")
    most = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
    wish = Wish(body, most, None, (body.top_logprobs or 0) if body.logprobs else None)

    async def prompt() -> Prompt:
        ids = await service.encode_chat(body.messages)
        if not ids:
            raise ApiProblem(400, "the chat template makes no text of the messages", param="messages")
        return Prompt(ids)

    return await _respond(service, ChatForm(service, bool(body.logprobs)), wish, [prompt], http)


def _prompts(service: Service, body: CompletionRequest, echo: bool) -> list[PromptSource]:
    """The prompts, each read when it is asked for."""

    def source(text: str | None, tokens: Sequence[int]) -> PromptSource:
        async def read() -> Prompt:
            ids = service.checked_ids("prompt", tokens) if text is None else await service.encode(text)
            if not ids:
                ids = _opening(service)
            repeated = None
            if echo:
                repeated = service.tokenizer.decode(ids, skip_special_tokens=True) if text is None else text
            return Prompt(ids, repeated)

        return read

    prompt: Any = body.prompt
    if isinstance(prompt, str):
        return [source(prompt, ())]
    if isinstance(prompt[0], int):
        return [source(None, prompt)]
    return [source(one, ()) if isinstance(one, str) else source(None, one) for one in prompt]


def _opening(service: Service) -> list[int]:
    """The prompt that an empty text stands for: the beginning of a text."""
    if service.opening is None:
        raise ApiProblem(
            400,
            "prompt is empty, and the model has no token that begins a text; one token or more is needed",
            param="prompt",
        )
    return [service.opening]


async def _respond(
    service: Service, form: Form, wish: Wish, prompts: Sequence[PromptSource], http: HttpRequest
) -> Response:
    if not wish.fields.stream:
        return await while_connected(http.receive, _whole(service, form, wish, prompts, http))
    job = await while_connected(http.receive, service.begin(wish, prompts))

    def end() -> None:
        http.state.usage = job.usage()
        service.end(job)

    return EventStream(b": begun\n\n", _stream(service, form, wish, job, http, end), end)


def _head(service: Service, form: Form, http: HttpRequest, kind: str) -> dict[str, Any]:
    return {
        "id": f"{form.prefix}-{http.state.request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": service.settings.model_name,
    }


async def _whole(
    service: Service, form: Form, wish: Wish, prompts: Sequence[PromptSource], http: HttpRequest
) -> Response:
    job = await service.begin(wish, prompts)
    try:
        try:
            await job.finish()
        except RuntimeError as error:
            raise _engine_failed(error) from error
        choices = [form.choice(answer, answer.delta()) for answer in job.answers]
        beside: dict[str, Any] = {}
        if wish.fields.prompt_logprobs is not None:
            tables = [_of_prompt(service, wish, job, answer) for answer in job.answers[:: job.copies]]
            for answer, choice in zip(job.answers, choices, strict=True):
                beside = form.with_prompt(choice, tables[answer.index // job.copies])
        http.state.usage = job.usage()
        head = _head(service, form, http, form.whole)
        return json_response(head | {"choices": choices, "usage": job.usage()} | beside)
    finally:
        service.end(job)


def _of_prompt(service: Service, wish: Wish, job: Job, answer: Answer) -> PromptTables:
    prompt = job.prompts[answer.index // job.copies]
    top = wish.fields.prompt_logprobs or 0
    found = tuple((own, likeliest[:top]) for own, likeliest in answer.prompt_logprobs or ())
    return prompt_logprobs_json(service.tokenizer, prompt.tokens, found)


async def _stream(
    service: Service, form: Form, wish: Wish, job: Job, http: HttpRequest, end: Callable[[], None]
) -> AsyncIterator[bytes]:
    """The chunks of a stream. An error becomes its last.

    Args:
        end: Gives back what the job holds.
    """
    settings = service.settings
    head = _head(service, form, http, form.chunk)
    wants_usage = wish.fields.stream_options is not None and bool(wish.fields.stream_options.include_usage)
    nothing = {"usage": None} if wants_usage else {}
    began: set[int] = set()
    try:
        async for grown in job.progress(within=settings.stream_interval, tokens=settings.stream_tokens):
            events = []
            for answer in grown:
                delta = answer.delta()
                if not (delta.text or delta.entries or delta.finish_reason):
                    continue
                choice = form.piece(answer, delta, answer.index not in began)
                beside = nothing
                if wish.fields.prompt_logprobs is not None and answer.index not in began:
                    beside = nothing | form.with_prompt(choice, _of_prompt(service, wish, job, answer))
                began.add(answer.index)
                events.append(_event(head | {"choices": [choice]} | beside))
            if job.has_ended:
                # With the last tokens: one more write would cost as much as these.
                if wants_usage:
                    events.append(_event(head | {"choices": [], "usage": job.usage()}))
                events.append(b"data: [DONE]\n\n")
                # Before the client knows: its next request has room then.
                end()
            if events:
                yield b"".join(events)
            if job.has_ended:
                return
    except ApiProblem as error:
        yield _event(error.body(http.state.request_id))
    except RuntimeError as error:
        yield _event(_engine_failed(error).body(http.state.request_id))


def _engine_failed(error: RuntimeError) -> ApiProblem:
    return ApiProblem(500, f"the engine failed: {error}", code="engine_failed")


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json_bytes(value) + b"\n\n"
