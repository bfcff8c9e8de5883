"""Example calls of the persistent step: GPT-2's, Llama's and Qwen 3's sizes, every kind of weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gptkern.ops._cases import Call, Case, Make, tensor
from gptkern.ops._types import FP8, HeadNorm, Norm, RmsNorm
from gptkern.ops.decode_linear.cases import Packed, packed_matrix
from gptkern.ops.decode_step.op import persistent_step
from gptkern.ops.decode_step.rows import Linear, Positions, StepProgram, StepRow

# Rows are the narrow side, and narrow layers' tiles of 16 outputs are below wgmma's 64.
_N = frozenset({"persistent_step_kernel"})
_FP32 = (torch.float32,)
_PAGE, _PAGES, _CONTEXT = 128, 8, 1024


@dataclass(frozen=True)
class Sizes:
    """A decoder's sizes; with a gate it is of Llama's kin, without one of GPT-2's."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    gated: bool = False
    head_norm: bool = False


GPT2 = Sizes(768, 12, 12, 64, 3072, 50257)
LLAMA_1B = Sizes(2048, 32, 8, 64, 8192, 128256, gated=True)
QWEN3_06B = Sizes(1024, 16, 8, 128, 3072, 151936, gated=True, head_norm=True)
_LAYERS = 2


class _Maker:
    """Makes the rows of a pass with weights of one dtype, packed or not."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype, packed: Packed) -> None:
        self._sizes, self._device, self._dtype, self._packed = sizes, device, dtype, packed

    def value(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return tensor(*shape, device=self._device, dtype=dtype or self._dtype, requires_grad=False, scale=0.3)

    def linear(self, outputs: int, inputs: int) -> Linear:
        bias = None if self._sizes.gated else self.value(outputs)
        if self._packed is None:
            return Linear(self.value(outputs, inputs), bias)
        return Linear(packed_matrix(outputs, inputs, self._device, *self._packed), bias)

    def norm(self) -> Norm | RmsNorm:
        width = self._sizes.width
        if self._sizes.gated:
            return RmsNorm(self.value(width), 1e-6)
        return self.value(width), self.value(width), 1e-5

    def qkv(self, layer: int) -> StepRow:
        sizes = self._sizes
        outputs = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
        row = StepRow(*("qkv", layer, "x", "q"), norm=self.norm(), linear=self.linear(outputs, sizes.width))
        if sizes.gated:
            cos, sin = (self.value(_CONTEXT, sizes.head_dim // 2, dtype=torch.float32) for _ in range(2))
            row = replace(row, rotary=Positions(cos, sin))
        if sizes.head_norm:
            q_norm, k_norm = self.value(sizes.head_dim), self.value(sizes.head_dim)
            row = replace(row, head_norm=HeadNorm(q_norm, k_norm, 1e-6))
        return row

    def layer(self, layer: int, post_norm: bool) -> list[StepRow]:
        sizes = self._sizes
        qkv = self.qkv(layer)
        attention = StepRow(*("attention", layer, "q", "attended"), attention_scale=sizes.head_dim**-0.5)
        out = self.linear(sizes.width, sizes.heads * sizes.head_dim)
        fc = self.linear((2 if sizes.gated else 1) * sizes.inner, sizes.width)
        proj = self.linear(sizes.width, sizes.inner)
        saved, residuals = None, ["x", "middle"]
        if post_norm:
            saved, residuals = "normed_middle", ["normed_x" if layer else "x", "normed_middle"]
            qkv = replace(qkv, norm=qkv.norm if layer else None, save="normed_x" if layer else None)
        return [
            qkv,
            attention,
            StepRow("linear", layer, "attended", "middle", linear=out, residual=residuals[0]),
            StepRow(
                *("linear", layer, "middle", "inner"),
                norm=self.norm(),
                save=saved,
                linear=fc,
                activation="silu" if sizes.gated else "gelu_tanh",
                gated=sizes.gated,
            ),
            StepRow("linear", layer, "inner", "x", linear=proj, residual=residuals[1]),
        ]

    def program(self, post_norm: bool) -> StepProgram:
        sizes = self._sizes
        layers = [row for layer in range(_LAYERS) for row in self.layer(layer, post_norm)]
        head = replace(self.linear(sizes.vocabulary, sizes.width), bias=None)
        last = StepRow("linear", _LAYERS, "x", "logits", norm=self.norm(), linear=head)
        return StepProgram(
            self.value(sizes.vocabulary, sizes.width),
            None if sizes.gated else self.value(_CONTEXT, sizes.width),
            (*layers, last),
            heads=sizes.heads,
        )


def _step(
    sizes: Sizes,
    rows: int = 1,
    *,
    weights: Packed = None,
    fp8_cache: bool = False,
    post_norm: bool = False,
) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        maker = _Maker(sizes, device, dtype, weights)
        shape = (_LAYERS, rows * _PAGES, _PAGE, sizes.kv_heads, sizes.head_dim)
        caches = [maker.value(*shape) for _ in range(2)]
        scales = None
        if fp8_cache:
            caches = [cache.to(FP8) for cache in caches]
            scales = tuple(torch.ones(_LAYERS, sizes.kv_heads, device=device) for _ in range(2))
        table = torch.arange(rows * _PAGES, dtype=torch.int32, device=device).view(rows, _PAGES)
        lens = torch.arange(rows, dtype=torch.int32, device=device) * 7
        live = torch.ones(1, dtype=torch.int32, device=device)
        tokens = torch.arange(rows, device=device)
        program = maker.program(post_norm)
        return Call((program, tokens, live, *caches, table, lens, scales))

    return make


# Format, group size, zero points; and whether the cache is fp8 too.
_FORMATS: dict[str, tuple[tuple[str, int, bool], bool]] = {
    "int8": (("int8", 0, False), False),
    "int4": (("int4", 128, True), False),
    "fp8, fp8 cache": (("fp8", 0, False), True),
}
_OF_FAMILIES = {"124M": GPT2, "Llama 1B": LLAMA_1B, "Qwen3 0.6B": QWEN3_06B}
CASES = [
    *(Case(name, persistent_step, _step(sizes), mma_sync=_N) for name, sizes in _OF_FAMILIES.items()),
    Case("355M", persistent_step, _step(Sizes(1024, 16, 16, 64, 4096, 50257)), mma_sync=_N),
    Case("1.5B", persistent_step, _step(Sizes(1600, 25, 25, 64, 6400, 50257), 8), mma_sync=_N),
    Case("GPT-1", persistent_step, _step(replace(GPT2, vocabulary=40478), post_norm=True), mma_sync=_N),
    Case("124M, fp32", persistent_step, _step(GPT2), dtypes=_FP32),
    Case("Llama 1B, fp32", persistent_step, _step(LLAMA_1B), dtypes=_FP32),
    Case(
        "normed heads of 64, fp32",
        persistent_step,
        _step(replace(QWEN3_06B, heads=32, kv_heads=16, head_dim=64)),
        dtypes=_FP32,
    ),
    *(
        Case(
            f"{name}, {format}",
            persistent_step,
            _step(sizes, weights=packed, fp8_cache=fp8_cache),
            mma_sync=_N,
            archs=(89, 90, 100) if fp8_cache else None,
            # Fewer stages would end it and leave no weights in flight; more warps would change the bits.
            spills={100: 40} if fp8_cache else {},
        )
        for name, sizes in _OF_FAMILIES.items()
        for format, (packed, fp8_cache) in _FORMATS.items()
    ),
]
CHECKS: list[Case] = []
