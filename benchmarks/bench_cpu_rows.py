"""GPT-2 124M on a CPU, by the format of its weights: the time of a pass of each batch, and of a first token.

    python benchmarks/bench_cpu_rows.py --threads 2

Random weights. A pass is what each new token of a batch takes, out of ``generate`` with 65 and with 1 new
tokens after a prompt of 32. A first token is ``generate(max_new_tokens=1)``. Rounds of all formats
alternate and the fastest of each is printed, for other programs on the machine only ever add time.

Beside them: how much of the speed at which this machine reads memory a pass of one row uses (the bytes of
its weights, over the time), and how much of the products a second that PyTorch's own largest ones reach, in
the weights' dtype, a first token after 512 does.
"""

from __future__ import annotations

import argparse
import time
from copy import deepcopy

import torch
from cpu_ceilings import product_speed, read_speed, seconds_of

from gptkern import GPT, _native
from gptkern.bench.suites import _models as models
from gptkern.quantization import Quantization
from gptkern.quantize import quantize_model

BATCHES = (1, 4, 8, 16, 32)
PROMPTS = (32, 128, 512, 900)
FORMATS = ("float32", "bfloat16", "int8", "int4")
DECODE_PROMPT, NEW = 32, 65  # so many that what the prompt takes counts for little
CPU = torch.device("cpu")


CLOCKS = {"elapsed": time.perf_counter, "cpu": time.process_time}
_clock = time.perf_counter


def _model(format: str) -> GPT:
    """The model of float32, or of bfloat16 with or without packed weights."""
    model = models.ours(models.GPT2, torch.float32 if format == "float32" else torch.bfloat16, CPU)
    if format in ("float32", "bfloat16"):
        return model
    model = deepcopy(model)
    quantize_model(model, Quantization.make(model.config, format))
    return model


def _ids(rows: int, tokens: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(rows * tokens)
    return torch.randint(models.GPT2.vocab_size, (rows, tokens), generator=draw)


def _times(made: dict[str, GPT], rows: int, tokens: int, new: int, rounds: int) -> dict[str, float]:
    """The least seconds of ``generate`` with each model, in alternating rounds."""
    ids = _ids(rows, tokens)
    best = dict.fromkeys(made, float("inf"))
    for _ in range(rounds):
        for name, model in made.items():
            call = lambda: model.generate(ids, max_new_tokens=new, eos_token_id=None)  # noqa: B023, E731
            best[name] = min(best[name], seconds_of(call, _clock))
    return best


def _bytes_of(model: GPT) -> int:
    """Bytes of the tensors that a pass of one row reads whole: all but the embeddings, a tied head once."""
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    tied = model.lm_head.weight is model.transformer.wte.weight if model.quantization is None else False
    unread = [model.transformer.wpe.weight, *([] if tied else [model.transformer.wte.weight])]
    return sum(tensors.values()) - sum(tensor.nbytes for tensor in unread)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="PyTorch's threads")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds of each case (default: 5)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="Formats of weights")
    parser.add_argument("--path", help="Decode path by name, such as avx2 (default: the processor's best)")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="elapsed", help="cpu: processor time, where other programs run"
    )
    options = parser.parse_args()
    global _clock
    _clock = CLOCKS[options.clock]
    torch.set_num_threads(options.threads)
    if _native.extension is None or not _native.extension.has_decoder:
        raise SystemExit("gptkern._C is not built, or this processor has no decode step")
    if options.path is not None:
        _native.extension.use_decode_path(options.path)
    made = {format: _model(format) for format in options.formats}
    passes, firsts = {}, {}
    for batch in BATCHES:
        one, many = (_times(made, batch, DECODE_PROMPT, new, options.rounds) for new in (1, NEW))
        passes[batch] = {name: (many[name] - one[name]) / (NEW - 1) for name in made}
    for prompt in PROMPTS:
        firsts[prompt] = _times(made, 1, prompt, 1, options.rounds)
    read = read_speed(options.rounds, _clock)
    products = {
        dtype: product_speed(dtype, options.rounds, _clock) for dtype in (torch.float32, torch.bfloat16)
    }
    path = _native.extension.decode_path()
    print(f"{path}, {options.threads} threads, {options.clock} time, torch {torch.__version__}")
    speeds = ", ".join(f"{dtype} {products[dtype] / 1e9:.0f}" for dtype in products)
    print(f"reads {read / 1e9:.1f} GB/s; products, GFLOP/s: {speeds}")
    print("| weights | " + " | ".join(f"b{b} ms" for b in BATCHES) + " | of reads, b1 | ", end="")
    print(" | ".join(f"first of {p} ms" for p in PROMPTS) + " | of products, 512 |")
    print("|---" * (len(BATCHES) + len(PROMPTS) + 3) + "|")
    inner = sum(p.numel() for p in models.ours(models.GPT2, torch.float32, CPU).transformer.h.parameters())
    for name, model in made.items():
        of_reads = _bytes_of(model) / passes[1][name] / read
        of_products = 2 * 512 * inner / firsts[512][name] / products[model.dtype]
        row = [name, *(f"{passes[batch][name] * 1e3:.1f}" for batch in BATCHES), f"{of_reads:.0%}"]
        row += [*(f"{firsts[prompt][name] * 1e3:.0f}" for prompt in PROMPTS), f"{of_products:.0%}"]
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
