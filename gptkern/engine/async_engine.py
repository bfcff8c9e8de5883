"""AsyncEngine: one worker thread steps an engine, and coroutines read the events of their own requests."""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING

from gptkern.engine.engine import Engine
from gptkern.engine.request import Request, TokenEvent

if TYPE_CHECKING:
    from gptkern.tokenizer import Tokenizer


class AsyncEngine:
    """An engine for coroutines.

    ::

        async with AsyncEngine(gptkern.Engine(model)) as engine:
            async for event in engine.stream(Request(prompt=ids)):
                ...

    The engine is this object's own from here on: nobody else may step it. Coroutines of several event loops
    may use it at once.
    """

    def __init__(self, engine: Engine) -> None:
        self._worker = _Worker(engine)
        # The thread knows the worker alone: when nobody uses this object it goes, and the thread with it.
        weakref.finalize(self, self._worker.stop)

    async def stream(self, request: Request, tokenizer: Tokenizer | None = None) -> AsyncIterator[TokenEvent]:
        """The events of one request, as they come; the last says why its last copy ended.

        A consumer that stops reading ends its request: what it holds is given back before the next pass.

        Args:
            tokenizer: For stop strings; the model's own when None.

        Raises:
            TypeError, ValueError: As ``Engine.add``, at the first event.
            RuntimeError: The engine is closed, or its step failed.
        """
        with self.open(request, tokenizer) as events:
            while batch := await events.read():
                for event in batch:
                    yield event

    def open(self, request: Request, tokenizer: Tokenizer | None = None) -> EventReader:
        """Begin a request at once; its events, to be read in batches.

        ::

            with engine.open(request) as events:
                while batch := await events.read(within=0.05, tokens=16):
                    ...

        Args:
            tokenizer: For stop strings; the model's own when None.

        Raises:
            TypeError, ValueError: As ``Engine.add``.
            RuntimeError: The engine is closed.
        """
        return EventReader(self._worker, self._worker.add(request, tokenizer))

    async def close(self) -> None:
        """End every request, and take no more. Streams that are open raise ``RuntimeError``."""
        self._worker.stop()
        await asyncio.to_thread(self._worker.join)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class EventReader:
    """The events of one request, for the coroutine that opened it. Leaving the block ends the request."""

    def __init__(self, worker: _Worker, stream: _Stream) -> None:
        self._worker, self._stream = worker, stream

    def __enter__(self) -> EventReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def read(self, *, within: float = 0.0, tokens: int = 1) -> list[TokenEvent]:
        """The events since the last call, one at least; an empty list after the last.

        It waits for ``tokens`` of them, but no longer than ``within`` seconds after it last gave some.

        Raises:
            RuntimeError: The engine was closed, or its step failed.
        """
        return await self._stream.read(within, tokens)

    def cancel(self) -> None:
        """Let the request end at the next pass; its last event says "cancelled"."""
        self._worker.cancel(self._stream)

    def close(self) -> None:
        """End the request. What it holds is given back before the next pass; nothing where it has ended."""
        self._worker.leave(self._stream)


_Item = TokenEvent | BaseException | None


class _Stream:
    """The events of one request on their way to the event loop that reads them; None follows the last.

    All but ``number`` and ``loop`` is that loop's alone.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.loop = asyncio.get_running_loop()
        self._events: list[TokenEvent] = []
        self._last: BaseException | None = None
        self._ended = False
        # How many events wake the reader.
        self._enough = 1
        self._read_at = -float("inf")
        self._wake = asyncio.Event()

    def put(self, item: _Item) -> None:
        """Take the next item."""
        if isinstance(item, TokenEvent):
            self._events.append(item)
        else:
            self._ended, self._last = True, item
        if self._ended or len(self._events) >= self._enough:
            self._wake.set()

    async def read(self, within: float, tokens: int) -> list[TokenEvent]:
        due = self._read_at + within
        timer = None
        if due > self.loop.time():
            self._enough = tokens
            timer = self.loop.call_at(due, self._hurry)
        if not self._ended and len(self._events) < self._enough:
            self._wake.clear()
            try:
                await self._wake.wait()
            finally:
                if timer is not None:
                    timer.cancel()
        elif timer is not None:
            timer.cancel()
        self._enough = 1
        events, self._events = self._events, []
        if not events and self._last is not None:
            raise RuntimeError(f"AsyncEngine: {self._last}") from self._last
        self._read_at = self.loop.time()
        return events

    def _hurry(self) -> None:
        """Let one event be enough: the reader has waited for more."""
        self._enough = 1
        if self._events:
            self._wake.set()


def _deliver_all(items: Sequence[tuple[_Stream, _Item]]) -> None:
    """Hand items on, in the event loop of all their streams."""
    for stream, item in items:
        stream.put(item)


# Those whose thread may run still.
_workers: weakref.WeakSet[_Worker] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Let no thread be in a pass while the interpreter goes: its libraries end the process with an abort."""
    for worker in list(_workers):
        worker.stop()
        worker.join()


class _Worker:
    """The thread that steps the engine, and who is told of what."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._streams: dict[int, _Stream] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="gptkern-engine", daemon=True)
        _workers.add(self)
        self._thread.start()

    def add(self, request: Request, tokenizer: Tokenizer | None) -> _Stream:
        # Under the lock: the first event may be there before the stream is known.
        with self._changed:
            if self._stopped:
                raise RuntimeError("AsyncEngine.stream: the engine is closed")
            stream = _Stream(self._engine.add(request, tokenizer))
            self._streams[stream.number] = stream
            self._changed.notify()
        return stream

    def cancel(self, stream: _Stream) -> None:
        """End a request whose events are read on, to the last."""
        with self._changed:
            if stream.number in self._streams:
                self._engine.cancel(stream.number)

    def leave(self, stream: _Stream) -> None:
        """End a request whose events nobody reads any more; nothing where it has ended."""
        with self._changed:
            if self._streams.pop(stream.number, None) is not None:
                self._engine.cancel(stream.number)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._engine.has_work)
                if self._stopped:
                    break
            try:
                self._deliver(self._engine.step())
            except BaseException as error:  # it is told to everybody, by name
                # Together: a request added in between would be told of the failure and yet run.
                with self._changed:
                    self._engine.clear()
                    self._fail(error)
        self._engine.close()
        self._fail(RuntimeError("the engine is closed"))

    def _deliver(self, events: Iterable[TokenEvent]) -> None:
        # One call a pass into each event loop, however many events: such a call costs more than an event.
        items: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, _Item]]] = {}
        with self._changed:
            for event in events:
                stream = self._streams.get(event.request)
                if stream is not None:
                    items.setdefault(stream.loop, []).append((stream, event))
            for number in [number for number in self._streams if not self._engine.has(number)]:
                stream = self._streams.pop(number)
                items.setdefault(stream.loop, []).append((stream, None))
            for loop, own in items.items():
                self._hand_on(loop, own)

    def _hand_on(self, loop: asyncio.AbstractEventLoop, items: Sequence[tuple[_Stream, _Item]]) -> None:
        """Let an event loop take items; where it is closed its requests end."""
        try:
            loop.call_soon_threadsafe(_deliver_all, items)
        except RuntimeError:
            for stream, _ in items:
                if self._streams.pop(stream.number, None) is not None:
                    self._engine.cancel(stream.number)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            streams = list(self._streams.values())
            self._streams.clear()
            for stream in streams:
                self._hand_on(stream.loop, [(stream, error)])
