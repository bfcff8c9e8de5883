"""Engine: requests in, tokens out. The one loop that makes tokens."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch

from gptkern.engine.beam import refuse_beams
from gptkern.engine.cache import PAGE_SIZE, KVCache
from gptkern.engine.copies import Copy
from gptkern.engine.executors.choose import Executors
from gptkern.engine.executors.graph import MOST_ROWS
from gptkern.engine.launch import Launch, Launcher
from gptkern.engine.live import Inbox, LiveRequests, live_request
from gptkern.engine.options import KVCacheDType
from gptkern.engine.repeat import Repeat
from gptkern.engine.request import Request, TokenEvent
from gptkern.engine.sampling import Sampler, row_keys
from gptkern.engine.scheduler import Row, Scheduler
from gptkern.engine.settings import Settings, merged, settle
from gptkern.engine.weights_version import WeightsVersion
from gptkern.model.decoder import Decoder

if TYPE_CHECKING:
    from gptkern.tokenizer import Tokenizer

# Where the next pass is under way before the host looks at this one's tokens. A row that turns out to
# have finished has then computed one token too many, which nobody sees.
AHEAD_ON = ("cuda",)
DEFAULT_SEQS = 16
DEFAULT_CHUNK = 512


class EngineLoad(NamedTuple):
    """The work of an engine at one moment.

    Attributes:
        running, waiting: Sequences that hold memory, and requests that hold none yet, or none any more.
        free_pages, num_pages: Pages of the cache that nobody holds, and all of them.
        preemptions: How often a sequence gave its memory to others.
        prefix_queries, prefix_hits: Tokens of prompts that were looked for in the cache, and those found.
    """

    running: int
    waiting: int
    free_pages: int
    num_pages: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int


class Engine:
    """Continues any number of prompts together; requests join and leave a running batch.

    ::

        engine = gptkern.Engine(model, max_seqs=32)
        engine.add(Request(prompt=ids, options={"max_new_tokens": 100}))
        while engine.has_work:
            for event in engine.step():
                ...

    A request's tokens and log-probabilities are a function of its prompt, options and seed alone: the same
    bits alone or among others, after a prefix that was found, or computed again when memory ran out.

    ``add`` and ``cancel`` may be called from any thread, ``step`` from one at a time.

    Args:
        model: The model; its weights may change in place, not move.
        max_seqs: Most sequences that run at once.
        memory_bytes, cache_tokens: What keys and values may take, in bytes or in tokens of all sequences
            together. With neither there is room for ``max_seqs`` sequences of the model's whole context.
        page_size: Tokens that share a page.
        prefix_cache: Whether a prompt's keys and values are taken over from an earlier one that began alike.
        prefill_chunk: Most tokens of prompts in one pass, about: a longer prompt takes several.
        kv_cache_dtype: "auto" keeps keys and values in the model's dtype, "fp8" in a byte each.
        steering: Requests may have steering vectors. The model's layers then run all of them, one by one, as
            no faster executor adds anything between layers.

    Raises:
        TypeError: A size that is no whole number.
        ValueError: A size out of range.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        max_seqs: int = DEFAULT_SEQS,
        memory_bytes: int | None = None,
        cache_tokens: int | None = None,
        page_size: int = PAGE_SIZE,
        prefix_cache: bool = True,
        prefill_chunk: int = DEFAULT_CHUNK,
        kv_cache_dtype: KVCacheDType = "auto",
        steering: bool = False,
    ) -> None:
        if not isinstance(model, Decoder):
            raise TypeError(f"Engine: model is {type(model).__name__}; a GPT is needed")
        _check_whole("Engine", max_seqs=max_seqs, page_size=page_size, prefill_chunk=prefill_chunk)
        _check_whole("Engine", memory_bytes=0 if memory_bytes is None else memory_bytes)
        _check_whole("Engine", cache_tokens=0 if cache_tokens is None else cache_tokens)
        if kv_cache_dtype not in get_args(KVCacheDType):
            raise ValueError(f"Engine: kv_cache_dtype is {kv_cache_dtype!r}; 'auto' or 'fp8' is needed")
        for name, switch in (("prefix_cache", prefix_cache), ("steering", steering)):
            if not isinstance(switch, bool):
                raise TypeError(f"Engine: {name} is {switch!r}; True or False is needed")
        if prefill_chunk < 1:
            raise ValueError(f"Engine: prefill_chunk is {prefill_chunk}; 1 or more is needed")
        self.cache = KVCache.for_config(
            model.config,
            max_seqs=max_seqs,
            max_len=model.spec.context,
            page_size=page_size,
            memory_bytes=memory_bytes,
            cache_tokens=cache_tokens,
            device=model.device,
            **model.cache_options(kv_cache_dtype),
        )
        self._model_ref = weakref.ref(model)
        self._held: Decoder | None = model
        self.executors = Executors(model, self.cache, max(MOST_ROWS, max_seqs), steering)
        self._steering = steering
        self._version = WeightsVersion(model) if prefix_cache else None
        self._scheduler = Scheduler(
            self.cache,
            prefill_chunk=prefill_chunk,
            prefix_cache=prefix_cache,
            weights_version=None if self._version is None else self._version.current,
        )
        self._decode = self.executors.decode
        self._divide()
        self._launcher = Launcher(self.cache.device, self._scheduler)
        self._sampler = Sampler(model.spec.vocab_size, model.device)
        self._kv_cache_dtype = kv_cache_dtype
        self._live = LiveRequests(self._scheduler)
        self._launched: Launch | None = None
        self._repeat: Repeat | None = None
        self._ids = itertools.count()
        self._inbox = Inbox()
        self._stepping = threading.Lock()
        self._closed = False

    @property
    def model(self) -> Decoder:
        """The model that it was made for."""
        model = self._model_ref()
        if model is None:
            raise RuntimeError("Engine: the model is gone: its own engine does not keep it")
        return model

    def let_go(self) -> None:
        """Keep the model no more: it is to go when nobody else holds it, though it holds this engine."""
        self._held = None

    @property
    def has_work(self) -> bool:
        """True if a request has not ended, or an event has not been returned."""
        return bool(self._live or self._inbox.added or self._live.events)

    def has(self, request: int) -> bool:
        """True if the request exists and has not ended."""
        return request in self._live or any(added.number == request for added in self._inbox.added)

    @property
    def load(self) -> EngineLoad:
        """The work that the engine has, and the memory that it takes, at this moment; from any thread."""
        scheduler, cache = self._scheduler, self.cache
        return EngineLoad(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._inbox.added),
            free_pages=cache.free_pages,
            num_pages=cache.num_pages,
            preemptions=scheduler.preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
        )

    def add(self, request: Request, tokenizer: Tokenizer | None = None) -> int:
        """Take a request; its number, by which events name it.

        Args:
            tokenizer: With one, events have text. For stop strings the model's own when None.

        Raises:
            TypeError, ValueError: A bad option, a prompt that the model's context or vocabulary does not
                hold, or more pages or sequences than the engine has.
        """
        if not isinstance(request, Request):
            raise TypeError(f"Engine.add: request is {type(request).__name__}; a Request is needed")
        vocab_size = self.model.spec.vocab_size
        outside = [token for token in request.prompt if token >= vocab_size]
        if outside:
            raise ValueError(
                f"Engine.add: prompt holds {outside[0]}; token ids from 0 to {vocab_size - 1} are accepted"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(request, name) or 0) > vocab_size:
                raise ValueError(
                    f"Engine.add: {name} is {getattr(request, name)}; at most the vocabulary's {vocab_size}"
                )
        if request.steering is not None and not self._steering:
            raise ValueError(
                f"Engine.add: steering is given; this engine was made for the {self.executors.decode.name} "
                "executor: make it with Engine(steering=True), whose passes run by the model's layers"
            )
        length = len(request.prompt)
        # A checkpoint's beams are for callers who wait for whole sequences: a request asks for them itself.
        asked = merged(request.options, getattr(self.model, "generation_config", {}) | {"num_beams": 1})
        given = any(request.options.get(name) is not None for name in ("max_length", "max_new_tokens"))
        settings = settle(asked, self.model.config, width=length, longest=length, lengths_given=given)
        return self.submit(request, settings, row_keys(settings, 1), tokenizer)

    def submit(
        self,
        request: Request,
        settings: Settings,
        keys: Sequence[tuple[int, int]],
        tokenizer: Tokenizer | None = None,
    ) -> int:
        """``add`` for a request whose prompt and options are checked already.

        Args:
            settings: What its options come to.
            keys: (seed, request) of each copy's draws.
        """
        if self._closed:
            raise RuntimeError("Engine.add: the engine is closed")
        if settings.kv_cache_dtype != self._kv_cache_dtype:
            raise ValueError(
                f"Engine.add: kv_cache_dtype is {settings.kv_cache_dtype!r}; "
                f"the engine's is {self._kv_cache_dtype!r}"
            )
        beams, callbacks = settings.num_beams, request.callbacks
        if beams > 1:
            refuse_beams(
                "Engine.add",
                logprobs=request.logprobs is not None,
                logits_processor=callbacks.processors,
                stopping_criteria=callbacks.criteria,
                constraint=request.constraint is not None,
            )
        self._scheduler.check_fits(len(request.prompt), settings.max_new, copies=len(keys), beams=beams)
        if settings.stop_strings and tokenizer is None:
            tokenizer = getattr(self.model, "tokenizer", None)
        if settings.stop_strings and tokenizer is None:
            raise ValueError("Engine.add: stop_strings need a tokenizer: the model came without one")
        with self._inbox.lock:
            live = live_request(next(self._ids), request, settings, keys, tokenizer, self.model)
            self._inbox.added.append(live)
        return live.number

    def weights_changed(self) -> None:
        """Find no prefix again that was computed until now, and pack no weights as they were.

        Called after writes that PyTorch does not count: through ``parameter.data`` or a raw pointer. All
        other changes are noticed.
        """
        self.executors.weights_written()
        if self._version is not None:
            self._version.changed()

    def cancel(self, request: int) -> None:
        """End a request at the next step, with the reason "cancelled". One that has ended stays as it is.

        Raises:
            TypeError: No whole number.
        """
        _check_whole("Engine.cancel", request=request)
        with self._inbox.lock:
            self._inbox.cancelled.append(request)

    def step(self) -> list[TokenEvent]:
        """Run one pass; the new tokens and ends that came of it.

        Where a pass fails, its error is raised, and the next step computes anew what was running.

        Raises:
            RuntimeError: Another thread is in ``step``; the engine is closed; the model's weights were moved
                or given another dtype since it was made.
        """
        if not self._stepping.acquire(blocking=False):
            raise RuntimeError("Engine.step: another thread is in it; one steps at a time")
        try:
            if self._closed:
                raise RuntimeError("Engine.step: the engine is closed")
            self._step()
            # Those of a step that fails are given out by the next.
            events, self._live.events = self._live.events, []
        except BaseException:
            self._start_over()
            raise
        finally:
            self._stepping.release()
            if self._closed:
                self.close()
        return events

    def clear(self) -> None:
        """End every request, without an event, and give back what they hold. Prefixes stay."""
        self._inbox.take()
        self._live.clear()
        self._launched = self._repeat = None

    def close(self) -> None:
        """End every request, and take no more; from any thread. A step under way does it when done."""
        self._closed = True
        if self._stepping.acquire(blocking=False):
            try:
                self.clear()
            finally:
                self._stepping.release()

    def _start_over(self) -> None:
        """Compute every row again: nobody knows how far a step came that failed."""
        self._launched = self._repeat = None
        self._sampler.forget()
        self._scheduler.start_over(self._live.rows)

    def _step(self) -> None:
        self._follow_inbox()
        if not self._run_again():
            self._repeat = None
            with torch.inference_mode():
                self._run_next()

    def _run_again(self) -> bool:
        """Run the last pass again; False, with nothing done, where another is to be chosen."""
        repeat = self._repeat
        if repeat is None:
            return False
        self._refuse_changed()
        if self._decode is not repeat.decode or time.monotonic() >= repeat.deadline:
            return False
        drawn = repeat.run()
        if drawn is None:
            return False
        model, goes_on = self.model, repeat.passes > 0
        for copy, draw in zip(repeat.copies, drawn.read(), strict=True):
            goes_on &= self._live.take(copy, draw, 0, model)
        if not goes_on:
            self._repeat = None
        return True

    def _run_next(self) -> None:
        """Choose a pass and run it, or take one that is under way."""
        launch, self._launched = self._launched or self._launch(None), None
        self._live.ended(launch.expired, "deadline")
        launch = launch.where(lambda row: row.state != "finished")
        if not launch.rows:
            return
        drawing = launch.where(lambda row: not row.beams)
        if drawing is not launch:
            self._live.search(launch.where(lambda row: bool(row.beams)), self.model)
        if drawing.rows:
            self._draw(drawing, may_run_ahead=drawing is launch)
        if self._decode.row_invariant:
            self._live.draft(self._decode.draft_rows)

    def _draw(self, launch: Launch, may_run_ahead: bool) -> None:
        """Draw the next tokens of rows, and begin the next pass before the host knows them where it may."""
        copies = self._live.copies(launch.rows)
        drawn = self._sampler.draw([copy.sampler for copy in copies], launch.logits, launch.drafts)
        if may_run_ahead and self._may_launch_ahead(copies):
            for row in launch.rows:
                row.ahead = 1
                if len(row.generated) + 1 == row.max_new:
                    self._scheduler.finish(row)
            self._launched = self._launch((launch.rows, drawn.tokens))
        all_go_on = True
        for copy, draw, part in zip(copies, drawn.read(), launch.parts, strict=True):
            copy.row.ahead = 0
            if part is not None:
                self._scheduler.computed(part, len(draw.tokens))
            drafted = 0 if part is None else part.count - 1
            all_go_on &= self._live.take(copy, draw, drafted, self.model)
        if all_go_on and launch.one_each:
            self._repeat = Repeat.after(launch.rows, copies, self._decode, self._sampler, self._scheduler)

    def _launch(self, ahead: tuple[Sequence[Row], torch.Tensor] | None) -> Launch:
        self._refuse_changed()
        return self._launcher.launch(time.monotonic(), self._decode, self.executors.prefill, ahead)

    def _follow_inbox(self) -> None:
        added, cancelled = self._inbox.take()
        if added or cancelled:
            self._repeat = None
        for request in added:
            self._live.add(request)
        for number in cancelled:
            self._live.cancel(number)
        if added:
            self.executors.look_again()

    def _divide(self) -> None:
        """Let the scheduler cut rows' tokens as the executors need them."""
        decode = self._decode
        self._scheduler.unit = self.executors.unit
        self._scheduler.decode_tokens = decode.max_rows or 1 if decode.row_invariant else 1

    def _refuse_changed(self) -> None:
        """End rows whose drafts were computed by what serves the model no more: a hook would be left out."""
        decode = self.executors.decode
        if decode is self._decode:
            return
        self._decode = decode
        self._divide()
        reason = f"{self.executors.reason}, since generation with speculate began; begin it anew"
        self._live.end_drafting(RuntimeError(reason))

    def _may_launch_ahead(self, copies: Sequence[Copy]) -> bool:
        """True if the next pass can begin before the host knows this one's tokens."""
        return self.cache.device.type in AHEAD_ON and not any(
            copy.lookup is not None or copy.sampler.rules is not None or copy.sampler.constraint is not None
            for copy in copies
        )


def _check_whole(source: str, **values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{source}: {name} is {value!r}; a whole number is needed")
