"""``generate`` in transformers' loop on the engine's passes: its prefill, paged cache and executors.

The library's loop stays, so that every processor, stopping criterion, streamer and field of the result is
its own; the engine computes the logits that the loop calls the model for. An ``EngineCache`` takes the
cache's place in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache

from gptkern.as_built import Watch
from gptkern.engine.cache import PAGE_SIZE
from gptkern.engine.engine import Engine
from gptkern.engine.rows import Rows
from gptkern.gpt import GPT
from gptkern.transformers.options import ENDS, KINDS
from gptkern.transformers.parts import CACHE
from gptkern.transformers.refusals import refuse_changes

# The most rows of logits that one thread chooses tokens from. Nucleus sampling sorts each of them.
FEW_ROWS, FEW_SAMPLED = 32, 2


def on_passes(
    model: Any, gpt: GPT, loop: Callable[..., Any], input_ids: torch.Tensor, kwargs: dict[str, Any]
) -> Any:
    """The result of the library's ``loop``, with logits of the engine that ``gpt`` keeps.

    Args:
        gpt: The view of ``model``.
        input_ids: Whole sequences, or the new tokens alone if there is a cache and the mask is longer.
        kwargs: The other arguments of ``loop``.
    """
    config, past, rows = kwargs["generation_config"], kwargs.get(CACHE), input_ids.shape[0]
    tokens = rows * -(-config.max_length // PAGE_SIZE) * PAGE_SIZE
    with gpt.engines.engine(gpt, rows, tokens, "auto") as engine:
        # An engine that was kept chose its executor for the model as it was at the last call.
        engine.executors.look_again()
        try:
            cache = EngineCache(model, engine, rows, past, kwargs.get("attention_mask"))
            with _threads(1 if _light(kwargs, rows) else torch.get_num_threads()):
                output = loop(input_ids, **kwargs | {CACHE: cache})
            if config.return_dict_in_generate:
                output[CACHE] = cache.hand_back()
            elif getattr(past, "_is_user_defined", False):
                cache.hand_back()
        finally:
            engine.cache.clear()
    return output


class EngineCache(Cache):
    """The cache of one ``generate`` call in the library's loop, and the engine that runs the model on it.

    Args:
        model: An accelerated language model for which ``model_refusal`` is None.
        engine: An idle engine of the model's view.
        rows: Sequences in the batch.
        past: The cache that the library prepared or the caller passed; its contents are copied.
        mask: ``(rows, past + new)``, or None.
    """

    def __init__(
        self, model: Any, engine: Engine, rows: int, past: Cache | None, mask: torch.Tensor | None
    ) -> None:
        super().__init__(layers=[])
        self._model, self._watch = model, Watch(model)
        self._executors, self._kv = engine.executors, engine.cache
        self._threads = torch.get_num_threads()
        self._vocab_size = engine.model.spec.vocab_size
        # A model without a cache gets whole sequences in every pass.
        self._whole = model.config.model_type == "openai-gpt"
        self._seen = 0
        self._mask = None if mask is None or bool(mask.all()) else mask.bool()
        self._rows = self._kv.allocate(rows)
        self._past = past
        self._past_length = 0 if past is None or self._whole else int(past.get_seq_length())
        if self._past_length:
            self._copy_past(past)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens in a row, padding included."""
        return self._seen

    @property
    def is_linear(self) -> list[bool]:
        """True for each layer with a state instead of keys and values (from transformers 5.24 on): none."""
        return [False] * len(self._kv.k)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Give row i the tokens of row ``beam_idx[i]``, a beam of the same prompt."""
        self._kv.reorder([self._rows[i] for i in beam_idx.tolist()])

    def run(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits after the last of ``input_ids``, ``(rows, 1, vocab_size)``.

        Raises:
            RuntimeError: The model was hooked or changed since, so that its layers must be called.
        """
        refuse_changes(self._model, self._watch)
        if self._whole:
            input_ids = input_ids[:, self._seen :]
        start, new = self._seen, input_ids.shape[1]
        with torch.inference_mode(), _threads(self._threads):
            if start and new == 1:
                self._kv.reserve([1] * len(self._rows), self._rows)
                tokens = input_ids[:, 0].to(self._kv.device)
                logits = self._executors.decode.forward(Rows.one_each(self._rows, tokens))
            else:
                logits = self._prefilled(_texts(input_ids, self._mask, start), alike=not start)
        self._seen += new
        return logits[:, None]

    def hand_back(self) -> Cache | None:
        """The library's cache with the keys and values of this call; padding is zeros."""
        past, kv = self._past, self._kv
        if past is None or self._whole:
            return past
        token_mask = torch.ones(len(self._rows), self._seen, dtype=torch.bool, device=kv.device)
        if self._mask is not None:
            width = min(self._mask.shape[1], self._seen)
            token_mask[:, :width] = self._mask[:, :width]
        places = (token_mask.long().cumsum(1) - 1).clamp_min(0)
        pages = kv.page_table[: len(self._rows)].long().gather(1, places // kv.page_size)
        for layer, pools in enumerate(zip(kv.k, kv.v, strict=True)):
            tensors = []
            for pool in pools:
                tokens = pool[pages, places % kv.page_size].masked_fill(~token_mask[..., None, None], 0)
                tensors.append(tokens[:, self._past_length :].transpose(1, 2).contiguous())
            past.update(*tensors, layer)
        return past

    def _prefilled(self, texts: list[list[int]], alike: bool) -> torch.Tensor:
        """Logits after some more tokens of every row, ``(rows, vocab_size)``; zeros for a row that has none.

        Args:
            alike: Rows of the same tokens, the copies or beams of one prompt, are computed once.
        """
        kv, keys = self._kv, [tuple(text) if alike else row for row, text in enumerate(texts)]
        first: dict[Any, int] = {}
        sources = [first.setdefault(key, row) for row, key in enumerate(keys)]
        computed = [row for row in first.values() if texts[row]]
        logits = torch.zeros(len(texts), self._vocab_size, dtype=kv.dtype, device=kv.device)
        if computed:
            sequences, counts = [self._rows[row] for row in computed], [len(texts[row]) for row in computed]
            tokens = torch.tensor([token for row in computed for token in texts[row]], device=kv.device)
            kv.reserve(counts, sequences)
            rows = Rows(sequences, counts, tokens, [1] * len(computed))
            logits[computed] = self._executors.prefill.forward(rows)
        kv.assign(
            {self._rows[row]: self._rows[source] for row, source in enumerate(sources) if row != source}
        )
        return logits[sources]

    def _copy_past(self, past: Any) -> None:
        """Copy the keys and values of a library's cache, without its padding."""
        seen, rows = self._past_length, len(self._rows)
        token_mask = torch.ones(rows, seen, dtype=torch.bool, device=self._kv.device)
        if self._mask is not None:
            token_mask = self._mask[:, :seen]
        forward_pass = self._kv.extend(token_mask.sum(1).tolist())
        for layer, source in enumerate(past.layers):
            for pool, tensor in ((self._kv.k[layer], source.keys), (self._kv.v[layer], source.values)):
                new = tensor.transpose(1, 2)[token_mask]
                pool.flatten(0, 1)[forward_pass.slots] = new.to(pool.dtype)
        forward_pass.commit()
        self._seen = seen


def _light(kwargs: dict[str, Any], rows: int) -> bool:
    """True if what the library's loop computes between passes is sooner done by one thread.

    An operator on a row of logits wakes PyTorch's threads. They poll for some milliseconds after it, on the
    cores that the next pass is to run on. A caller's own processor or criterion may run a whole model.
    """
    criteria, processors = kwargs["stopping_criteria"], kwargs["logits_processor"]
    own = all(type(p) in KINDS for p in processors) and all(type(c) in ENDS for c in criteria)
    return own and rows <= (FEW_SAMPLED if kwargs["generation_config"].do_sample else FEW_ROWS)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Give PyTorch's operators ``count`` threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _texts(input_ids: torch.Tensor, mask: torch.Tensor | None, start: int) -> list[list[int]]:
    """The tokens of every row without its padding; ``mask`` begins ``start`` tokens before them."""
    rows: list[list[int]] = input_ids.tolist()
    if mask is None:
        return rows
    masks = mask[:, start : start + input_ids.shape[1]].tolist()
    return [
        [t for place, t in enumerate(row) if place >= len(real) or real[place]]
        for row, real in zip(rows, masks, strict=True)
    ]
