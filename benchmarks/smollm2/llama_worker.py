"""llama.cpp's part of ``speed.py``, in the environment that has llama-cpp-python.

    python llama_worker.py FILE.gguf THREADS PROMPT NEW BATCH        # a line of JSON: seconds

Greedy, the same number of tokens whatever they are. The prompt is decoded as one batch, whose last position's
logits alone are asked for; then each pass decodes one token of each of BATCH sequences.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np


def main() -> None:
    """The command."""
    path, threads, prompt, new, batch = sys.argv[1], *map(int, sys.argv[2:])
    llama_cpp.llama_backend_init()
    quiet = llama_cpp.llama_log_callback(lambda *_: None)  # held: llama.cpp keeps its address
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = batch * (prompt + new + 8)
    settings.n_batch = settings.n_ubatch = max(512, batch * prompt)
    settings.n_seq_max = batch
    settings.n_threads = settings.n_threads_batch = threads
    settings.kv_unified = True
    context = llama_cpp.llama_init_from_model(model, settings)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    pieces = llama_cpp.llama_batch_init(batch * prompt, 0, batch)

    def fill(rows: list[list[int]], begin: int) -> None:
        pieces.n_tokens = 0
        for sequence, row in enumerate(rows):
            for offset, token in enumerate(row):
                at = pieces.n_tokens
                pieces.token[at], pieces.pos[at] = token, begin + offset
                pieces.n_seq_id[at], pieces.seq_id[at][0] = 1, sequence
                pieces.logits[at] = offset == len(row) - 1
                pieces.n_tokens += 1

    def step(rows: list[list[int]], begin: int) -> list[list[int]]:
        fill(rows, begin)
        if llama_cpp.llama_decode(context, pieces) != 0:
            raise SystemExit("llama_decode failed")
        ends = np.cumsum([len(row) for row in rows]) - 1
        found = []
        for end in ends:
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, int(end)), (vocabulary,))
            found.append([int(logits.argmax())])
        return found

    rows = [
        [(7 * sequence + 13 * place) % 40000 + 100 for place in range(prompt)] for sequence in range(batch)
    ]
    best: list[tuple[float, float]] = []
    for _ in range(3):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        start = time.perf_counter()
        tokens = step(rows, 0)
        first = time.perf_counter()
        for place in range(new):
            tokens = step(tokens, prompt + place)
        best.append((first - start, (time.perf_counter() - first) / new))
    print(json.dumps({"first": min(b[0] for b in best), "token": min(b[1] for b in best)}))


if __name__ == "__main__":
    main()
