"""llama.cpp by llama-cpp-python: its own decode call, and NumPy's argmax."""

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from worker import Generate, serve

# The format's number in ``llama_ftype``.
KINDS = {"bf16": 32, "int8": 7, "int4": 2}
MOST_ROWS, MOST_TOKENS = 32, 1024


def converted(folder: Path, form: str) -> Path:
    """The file in a format, which llama.cpp makes from the one in fp32 if there is none."""
    source = folder / "fp32.gguf"
    target = folder / f"{form}.gguf"
    if not target.exists():
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.pure = KINDS[form], True
        if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings) != 0:
            raise RuntimeError(f"llama.cpp cannot write {target.name}")
    return target


class Decoder:
    """A context for one request at a time."""

    def __init__(self, path: Path, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)  # llama.cpp has its address alone
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p())
        options = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = MOST_ROWS * 128
        settings.n_batch = settings.n_ubatch = MOST_TOKENS
        settings.n_seq_max = MOST_ROWS
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch: Any = llama_cpp.llama_batch_init(MOST_TOKENS, 0, 1)

    def __call__(self, rows: list[list[int]], begin: int) -> list[list[int]]:
        """The token that follows each row, whose tokens stand from the place ``begin`` on."""
        places = [(row, place) for row, tokens in enumerate(rows) for place in range(len(tokens))]
        batch = self.batch
        batch.n_tokens = len(places)
        for at, (row, place) in enumerate(places):
            batch.token[at], batch.pos[at] = rows[row][place], begin + place
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
            batch.logits[at] = place == len(rows[row]) - 1
        if llama_cpp.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        ends = [at for at, (row, place) in enumerate(places) if place == len(rows[row]) - 1]
        pointers = [llama_cpp.llama_get_logits_ith(self.context, end) for end in ends]
        return [[int(np.ctypeslib.as_array(at, (self.vocabulary,)).argmax())] for at in pointers]

    def generate(self, ids: list[list[int]], new: int) -> list[list[int]]:
        """See ``Generate``."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        steps = [self(ids, 0)]
        for place in range(new - 1):
            steps.append(self(steps[-1], len(ids[0]) + place))
        return [[step[row][0] for step in steps] for row in range(len(ids))]


def make(folder: Path, form: str, threads: int) -> Generate:
    return Decoder(converted(folder, form), threads).generate


if __name__ == "__main__":
    serve(make, "llama_cpp_python")
