"""AsyncEngine: one worker thread steps an engine, and coroutines read the events of their own requests."""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from collections.abc import AsyncIterator, Iterable
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
        stream = self._worker.add(request, tokenizer)
        try:
            while (item := await stream.queue.get()) is not None:
                if isinstance(item, TokenEvent):
                    yield item
                else:
                    raise RuntimeError(f"AsyncEngine: {item}") from item
        finally:
            self._worker.leave(stream)

    async def close(self) -> None:
        """End every request, and take no more. Streams that are open raise ``RuntimeError``."""
        self._worker.stop()
        await asyncio.to_thread(self._worker.join)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Stream:
    """The events of one request on their way to the event loop that reads them; None follows the last."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.queue: asyncio.Queue[TokenEvent | BaseException | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def put(self, item: TokenEvent | BaseException | None) -> bool:
        """Hand on the next item, from any thread; False where the event loop is closed."""
        try:
            self._loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:
            return False
        return True


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
        with self._changed:
            for event in events:
                stream = self._streams.get(event.request)
                if stream is not None and not stream.put(event):
                    del self._streams[event.request]
                    self._engine.cancel(event.request)
            for number in [number for number in self._streams if not self._engine.has(number)]:
                self._streams.pop(number).put(None)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            for stream in self._streams.values():
                stream.put(error)
            self._streams.clear()
