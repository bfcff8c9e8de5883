"""Grammars of requests: tried out in a process of their own within a time limit, then the sampler's masks."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from gptkern.serve.errors import ApiProblem
from gptkern.serve.protocol import GenerationFields

if TYPE_CHECKING:
    import torch

    from gptkern.serve.grammar_worker import Budget
    from gptkern.tokenizer import Tokenizer

_KEPT_GRAMMARS = 64
# What llguidance puts behind a message: its own state.
_STATE = "<state>"
# Bytes of a line of the worker's answer: messages quote grammars.
_LINE_BYTES = 1 << 24


class Grammar(NamedTuple):
    """A grammar as a request has it.

    Attributes:
        kind: ``"json_schema"``, ``"regex"`` or ``"grammar"``.
        text: The schema as JSON, the expression, or the grammar in Lark's syntax.
        param: The field that it came in.
    """

    kind: str
    text: str
    param: str


def grammar_of(fields: GenerationFields) -> Grammar | None:
    """The grammar that a request asks for; None where its text is free.

    Raises:
        ApiProblem: More than one, or a format without its schema.
    """
    grammars: list[Grammar] = []
    form = fields.response_format
    if form is not None and form.type == "json_object":
        grammars.append(Grammar("json_schema", '{"type":"object"}', "response_format"))
    if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
        raise ApiProblem(
            400,
            "response_format.json_schema belongs to the type json_schema: give both or none",
            param="response_format",
        )
    if form is not None and form.json_schema is not None:
        schema = json.dumps(form.json_schema.schema_)
        grammars.append(Grammar("json_schema", schema, "response_format"))
    if fields.regex is not None:
        grammars.append(Grammar("regex", fields.regex, "regex"))
    if fields.grammar is not None:
        grammars.append(Grammar("grammar", fields.grammar, "grammar"))
    if len(grammars) > 1:
        names = " and ".join(grammar.param for grammar in grammars)
        raise ApiProblem(400, f"{names} exclude each other: give one", param=grammars[1].param)
    return grammars[0] if grammars else None


class Grammars:
    """Grammars for one model's vocabulary.

    Args:
        vocab_size: Logits a row.
        end_of_text: The tokens that end a text.
        seconds: The time that one may take to be compiled.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, end_of_text: tuple[int, ...], seconds: float
    ) -> None:
        self._tokenizer, self._vocab_size, self._seconds = tokenizer, vocab_size, seconds
        self._end_of_text = end_of_text
        self._vocabulary: Any = None
        self._own: Any = None
        self._matchers: OrderedDict[Grammar, Any] = OrderedDict()
        self._process: asyncio.subprocess.Process | None = None
        # One grammar at a time: the next ones wait no longer than those before may take.
        self._turn = asyncio.Lock()

    async def constraint(self, grammar: Grammar) -> MatcherConstraint:
        """The constraint of a grammar.

        Raises:
            ApiProblem: A grammar that is wrong, or takes too long; llguidance is not installed.
        """
        try:
            # not at the top: an extra
            from gptkern.serve.grammar_worker import Budget, matcher_of, source_of
        except ModuleNotFoundError:
            raise ApiProblem(
                400,
                f"{grammar.param} needs the server's extra [grammar], which is not installed",
                param=grammar.param,
            ) from None
        matcher = self._matchers.get(grammar)
        if matcher is None:
            async with self._turn:
                tokenizer = await self._prepared()
                await self._try(grammar)
            source = source_of(grammar.kind, grammar.text)
            matcher = await asyncio.to_thread(matcher_of, tokenizer, source)
            if len(self._matchers) >= _KEPT_GRAMMARS:
                self._matchers.popitem(last=False)
            self._matchers[grammar] = matcher
        self._matchers.move_to_end(grammar)
        return MatcherConstraint(matcher, self._vocab_size, Budget())

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def _prepared(self) -> Any:
        """llguidance's form of the vocabulary, made at the first grammar."""
        if self._own is None:
            self._vocabulary = await asyncio.to_thread(self._made_vocabulary)
            self._own = await asyncio.to_thread(self._vocabulary.tokenizer)
        return self._own

    def _made_vocabulary(self) -> Any:
        from gptkern.serve.grammar_worker import Vocabulary

        tokens = [self._tokenizer.token_bytes(token) for token in range(self._vocab_size)]
        special = {*self._tokenizer.special_tokens.values(), *self._end_of_text}
        end = next(iter(self._end_of_text), None)
        if end is None:
            # Where texts have no end, one more token stands for it: no mask of the model reaches it.
            end = len(tokens)
            tokens.append(b"")
        return Vocabulary(tokens, sorted(special), end)

    async def _try(self, grammar: Grammar) -> None:
        """Compile a grammar in the other process.

        Raises:
            ApiProblem: It is wrong or takes too long.
        """
        try:
            process = await self._running()
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps([grammar.kind, grammar.text]).encode() + b"\n")
            line = await asyncio.wait_for(process.stdout.readline(), self._seconds)
        except TimeoutError:
            await self.close()
            raise ApiProblem(
                400,
                f"{grammar.param} takes more than {self._seconds:g} s to compile; a simpler one is needed",
                param=grammar.param,
                code="grammar_too_complex",
            ) from None
        except BaseException:
            # A client that has gone leaves an answer behind, which is no other grammar's.
            await asyncio.shield(self.close())
            raise
        if not line:
            await self.close()
            raise ApiProblem(
                400,
                f"{grammar.param} could not be compiled: the compiler ended",
                param=grammar.param,
                code="grammar_too_complex",
            )
        wrong = json.loads(line)
        if wrong is not None:
            raise ApiProblem(
                400, f"{grammar.param} cannot be used: {wrong}", param=grammar.param, code="invalid_grammar"
            )

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "gptkern.serve.grammar_worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                limit=_LINE_BYTES,
            )
            assert self._process.stdin is not None
            self._process.stdin.write(self._vocabulary.to_json().encode() + b"\n")
            # An empty schema: the time of the start is nobody's grammar's.
            self._process.stdin.write(b'["json_schema", "{}"]\n')
            await self._process.stdin.drain()
            assert self._process.stdout is not None
            await self._process.stdout.readline()
        return self._process


class MatcherConstraint:
    """A constraint of the engine (``gptkern.engine.constraint.Constraint``) that llguidance decides.

    Args:
        matcher: An ``LLMatcher`` at its beginning, which stays as it is.
        budget: The time that it may take, with all its forks.
    """

    def __init__(self, matcher: Any, vocab_size: int, budget: Budget) -> None:
        self._matcher, self._vocab_size, self._budget = matcher.deep_copy(), vocab_size, budget

    @property
    def complete(self) -> bool:
        """True if no text may follow."""
        return bool(self._matcher.is_stopped())

    def fill(self, bitmask: torch.Tensor) -> None:
        """Write the tokens that may come next."""
        with self._spend():
            raw = self._matcher.compute_bitmask()
        # The mask of a vocabulary with an end of its own may be a word longer.
        import torch

        mask = torch.frombuffer(bytearray(raw), dtype=torch.int32)
        bitmask.copy_(mask[: len(bitmask)])

    def push(self, token: int) -> None:
        """Take the row's next token."""
        with self._spend():
            self._matcher.consume_token(token)
        self._budget.earn()

    def fork(self) -> MatcherConstraint:
        """A copy that goes on by itself."""
        return MatcherConstraint(self._matcher, self._vocab_size, self._budget)

    @contextmanager
    def _spend(self) -> Iterator[None]:
        try:
            with self._budget.spend():
                yield
        except ValueError as error:
            raise ValueError(f"the grammar cannot go on: {error}") from error
        if self._matcher.is_error():
            raise ValueError(
                f"the grammar cannot go on: {self._matcher.get_error().partition(_STATE)[0].strip()}"
            )
