"""The launches of models and ops on a GPU, recorded without one: the contents of a pack.

Launches are recorded from ``generate`` over batches and prompts that meet every specialisation: one row and
several, each width of a block of rows, lengths that 16 divides and others, lengths and contexts of each row
of the launch tables. Nothing is computed: weights are memory that nobody has written, products are skipped;
small results are made zero, so that the host's part of generation has numbers to go on with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, get_args

import torch
import torch.nn.functional as F

from gptkern.config import Config, read
from gptkern.engine.executors import prompt
from gptkern.engine.options import KVCacheDType
from gptkern.gpt import GPT
from gptkern.ops import _cases, _launch
from gptkern.ops.decode_linear.formats import QuantizedWeight
from gptkern.ops.pack.bare import bare
from gptkern.quantization import FORMATS, Quantization
from gptkern.quantize import empty_layers
from gptkern.train.evaluate import computing
from gptkern.train.objective import LanguageModelling
from gptkern.train.settings import PRECISIONS

# Rows, tokens of their prompts, and the new tokens for which there is room in the cache.
CALLS = (
    *((1, tokens, 3) for tokens in (1, 7, 16, 33, 65, 100, 129, 160, 200, 257, 320, 385, 450, 511, 520)),
    *((rows, 7, 3) for rows in (2, 3, 16, 32, 64)),
    *((1, 7, room) for room in (9000, 70000)),
)
_FP8_SINCE = 89  # the first architecture that converts e4m3
_NEW = 3  # tokens that are generated
# Rows and tokens of a training step of the embedded model's shape: those of its configuration, and a few.
_TRAINED = ((64, 256), (3, 40))
# Results up to this size and of these dtypes are read on the host, or by what reads them next.
_ZEROED, _ZEROED_DTYPES = 1 << 24, (torch.float32, torch.float16, torch.bfloat16, torch.int64)


# Models whose generation is in the package's own pack, by their checkpoints' names. Kernels do not depend on
# the number of layers: one has them all.
_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
_GPT2: dict[str, Any] = {"model_type": "gpt2", "n_layer": 1}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2 | {"n_head": 12, "n_embd": 768},
    "gpt2-medium": _GPT2 | {"n_head": 16, "n_embd": 1024},
    "gpt2-large": _GPT2 | {"n_head": 20, "n_embd": 1280},
    "gpt2-xl": _GPT2 | {"n_head": 25, "n_embd": 1600},
    "SmolLM2-135M": _LLAMA
    | {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
    },
    "Llama-3.2-1B": _LLAMA
    | {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "Qwen3-0.6B": _LLAMA
    | {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
    },
}


@contextmanager
def recorded(arch: int) -> Iterator[list[_launch.Launch]]:
    """Collect what CPU tensors would launch on a GPU of ``arch``; the launches' small results are zero."""
    found: list[_launch.Launch] = []

    def observer(launch: _launch.Launch) -> bool:
        found.append(bare(launch))
        for value in launch.args:
            if isinstance(value, torch.Tensor) and value.dtype in _ZEROED_DTYPES and value.numel() <= _ZEROED:
                value.detach().zero_()
        return False

    with _launch.record(arch), _launch.observe(observer):
        yield found


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Prompts run in a GPU's units, and products are skipped: linear layers give zeros."""

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], weight.shape[0])

    def dequantize(packed: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(packed.shape, dtype=dtype)

    replaced: tuple[tuple[Any, str, Any], ...] = (
        (F, "linear", linear),
        (QuantizedWeight, "dequantize", dequantize),
        (prompt, "UNIT_ON_CPU", prompt.UNIT),
    )
    before = [getattr(owner, name) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(replaced, before, strict=True):
            setattr(owner, name, value)


def op_launches(arch: int, ops: Sequence[str] | None = None) -> Iterator[_launch.Launch]:
    """Those of the cases of these ops, or of all, gradients included."""
    for op in _cases.ops() if ops is None else ops:
        for case in _cases.cases(op):
            if case.archs is None or arch in case.archs:
                for dtype in case.dtypes:
                    yield from map(bare, _cases.record_case(case, dtype, arch))


def model_launches(model: GPT, arch: int) -> Iterator[_launch.Launch]:
    """Those of ``model.generate``, with a KV cache of the model's dtype and, where ``arch`` has it, of fp8.

    Raises:
        ValueError: The model's weights are fp8, and ``arch`` has no such numbers.
    """
    weights = model.quantization
    if arch < _FP8_SINCE and weights is not None and weights.format == "fp8":
        raise ValueError(f"pack: fp8 weights need sm_{_FP8_SINCE} or newer, not sm_{arch}")
    fitting = [call for call in CALLS if sum(call[1:]) <= model.spec.context]
    dtypes = get_args(KVCacheDType) if arch >= _FP8_SINCE else ("auto",)
    for kv_cache_dtype, (rows, tokens, room) in product(dtypes, fitting):
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        with recorded(arch) as launches, _as_on_a_gpu():
            # All logits are zero, so the first token wins as soon as it may.
            model.generate(
                ids,
                max_new_tokens=room,
                min_new_tokens=_NEW,
                eos_token_id=0,
                kv_cache_dtype=kv_cache_dtype,
            )
        yield from launches


def training_launches(model: GPT, arch: int, precision: str) -> Iterator[_launch.Launch]:
    """Those of training steps of a language model."""
    objective = LanguageModelling(model).train()
    for rows, tokens in _TRAINED:
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        with _launch.record(arch) as launches, computing(precision, ids.device):
            objective(ids, ids).backward()
        yield from map(bare, launches)


def unwritten(config: Config, dtype: torch.dtype, weights: str | None = None) -> GPT:
    """A model whose weights are memory that nobody has written to, in a format of 8 or 4 bits if named."""
    with torch.device("meta"):
        model = GPT(config).to(dtype)
    if weights is not None:
        empty_layers(model, Quantization.make(config, weights))
    return model.to_empty(device="cpu").eval()


def standard_launches(arch: int) -> Iterator[_launch.Launch]:
    """Those of the package's own pack: every op's cases, ``MODELS``, the embedded model and its training."""
    yield from op_launches(arch)
    embedded = GPT.from_pretrained("embedded", device="cpu")
    yield from model_launches(embedded, arch)
    for precision in PRECISIONS:
        yield from training_launches(GPT(embedded.config), arch, precision)
    for shape in MODELS.values():
        config = read(shape)
        for weights in (None, *(name for name in FORMATS if name != "fp8" or arch >= _FP8_SINCE)):
            yield from model_launches(unwritten(config, torch.bfloat16, weights), arch)
        if config.model_type == "gpt2":
            yield from model_launches(unwritten(config, torch.float32), arch)
