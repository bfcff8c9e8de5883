"""``generate`` on gptkern's engine: transformers' loop around gptkern's prefill, paged cache and executors.

The library's loop stays, so that every processor, stopping criterion, streamer and field of the result is
its own; the engine computes the logits that the loop calls the model for. An ``EngineCache`` takes the
cache's place in it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache

from gptkern.as_built import Watch
from gptkern.engine.cache import PAGE_SIZE, KVCache
from gptkern.engine.executors.choose import Executors
from gptkern.model.decoder import GPTOutput
from gptkern.transformers.refusals import changed
from gptkern.transformers.view import view


class EngineCache(Cache):
    """The cache of one ``generate`` call, and the executors that run the model on it.

    Attributes:
        whole_ids: True if ``run`` gets whole sequences instead of new tokens, as in a model without a cache.

    Args:
        model: An accelerated language model for which ``model_refusal`` is None.
        rows: Sequences in the batch.
        max_len: The length of the longest sequence, padding included.
        past: The cache that the library prepared or the caller passed; its contents are copied.
        mask: ``(rows, past + new)``, or None.
    """

    def __init__(
        self, model: Any, rows: int, max_len: int, past: Cache | None, mask: torch.Tensor | None
    ) -> None:
        super().__init__(layers=[])
        self._gpt = view(model)
        self._model, self._watch = model, Watch(model)
        self.whole_ids = model.config.model_type == "openai-gpt"
        self._max_len = max_len
        self._seen = 0
        self._mask = None if mask is None or bool(mask.all()) else mask.bool()
        self._executors: Executors | None = None
        self._kv = KVCache.for_config(
            self._gpt.config,
            max_seqs=rows,
            max_len=self._gpt.config.n_positions,
            cache_tokens=rows * -(-max_len // PAGE_SIZE) * PAGE_SIZE,
            dtype=self._gpt.dtype,
            device=self._gpt.device,
        )
        self._kv.allocate(rows)
        self._past = past
        self._past_length = 0 if past is None or self.whole_ids else int(past.get_seq_length())
        if self._past_length:
            self._copy_past(past)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens in a row, padding included."""
        return self._seen

    @property
    def vocab_size(self) -> int:
        """The number of logits in a row."""
        return self._gpt.config.vocab_size

    @property
    def is_linear(self) -> list[bool]:
        """True for each layer with a state instead of keys and values (from transformers 5.24 on): none."""
        return [False] * self._gpt.config.n_layer

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Give row i the tokens of row ``beam_idx[i]``, a beam of the same prompt."""
        ids, order = self._kv.sequences, beam_idx.tolist()
        self._kv.reorder([ids[i] for i in order])

    def run(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits after the last of ``input_ids``, ``(rows, 1, vocab_size)``.

        Raises:
            RuntimeError: The model was hooked or changed since, so that its layers must be called.
        """
        reason = changed(self._model) if self._watch.stirred() else None
        if reason is not None:
            raise RuntimeError(f"generate: {reason}, since this generation began; begin it anew")
        if self.whole_ids:
            input_ids = input_ids[:, self._seen :]
        input_ids = input_ids.to(self._gpt.device)
        with torch.inference_mode():
            if self._seen and input_ids.shape[1] == 1:
                if self._executors is None:
                    self._executors = Executors(self._gpt, self._kv, input_ids.shape[0])
                logits = self._executors.decode(input_ids[:, 0])[:, None]
            else:
                logits = self._prefill(input_ids)
        self._seen += input_ids.shape[1]
        # A tensor of inference mode cannot be written to outside it.
        return logits.clone()

    def hand_back(self) -> Cache | None:
        """The library's cache with the keys and values of this call; padding is zeros."""
        past, rows = self._past, len(self._kv.sequences)
        if past is None or self.whole_ids:
            return past
        token_mask = torch.ones(rows, self._seen, dtype=torch.bool, device=self._kv.device)
        if self._mask is not None:
            width = min(self._mask.shape[1], self._seen)
            token_mask[:, :width] = self._mask[:, :width]
        places = (token_mask.long().cumsum(1) - 1).clamp_min(0)
        pages = self._kv.page_table[:rows].long().gather(1, places // PAGE_SIZE)
        for layer in range(self._gpt.config.n_layer):
            tensors = []
            for pool in (self._kv.k[layer], self._kv.v[layer]):
                tokens = pool[pages, places % PAGE_SIZE].masked_fill(~token_mask[..., None, None], 0)
                tensors.append(tokens[:, self._past_length :].transpose(1, 2).contiguous())
            past.update(*tensors, layer)
        return past

    def _prefill(self, input_ids: torch.Tensor) -> torch.Tensor:
        mask = None
        if self._mask is not None:
            mask = self._mask[:, self._seen : self._seen + input_ids.shape[1]]
            if mask.shape[1] < input_ids.shape[1]:
                extra = mask.new_ones(mask.shape[0], input_ids.shape[1] - mask.shape[1])
                mask = torch.cat([mask, extra], 1)
            if not bool(mask.any()):
                # A chunk of the prompts that is padding throughout: nobody reads these logits.
                vocab_size = self._gpt.config.vocab_size
                return torch.zeros(len(mask), 1, vocab_size, dtype=self._gpt.dtype, device=mask.device)
            # Padding may hold ids that are no tokens of the model.
            input_ids = input_ids.masked_fill(~mask, 0)
        output: GPTOutput = self._gpt(input_ids, attention_mask=mask, cache=self._kv, logits_to_keep=1)
        return output.logits[:, -1:]

    def _copy_past(self, past: Any) -> None:
        """Copy the keys and values of a library's cache, without its padding."""
        seen, rows = self._past_length, len(self._kv.sequences)
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
