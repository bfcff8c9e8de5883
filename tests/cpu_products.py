"""The extension's products on a CPU, by themselves, and its decode paths."""

from __future__ import annotations

import torch

from gptkern import _C, _native
from gptkern.engine.executors.cpu_model import CpuLinear, CpuModel, CpuStage
from gptkern.ops.decode_linear.formats import QuantizedWeight


def _paths() -> list[str]:
    best, found = _C.decode_path(), []
    for name in ("avx512_bf16", "avx512_vnni", "avx512", "avx2_vnni", "avx2"):
        try:
            _C.use_decode_path(name)
        except ValueError:
            continue
        found.append(name)
    _C.use_decode_path(best)
    return found


PATHS = _paths() if _C.has_decoder else []


def _stage(kind: str, write: str, read: str = "none", linear: CpuLinear | None = None) -> CpuStage:
    kinds, buffers = _native.STAGES, _native.BUFFERS
    none = buffers["none"]
    return CpuStage(kinds[kind], 0, buffers[read], buffers[write], none, none, None, linear, False)


def product(
    x: torch.Tensor, weight: QuantizedWeight | torch.Tensor, threads: int = 1, packed: bool = False
) -> torch.Tensor:
    """x @ weight.T in x's dtype by the extension: a decoder of embeddings and a head.

    Args:
        x: ``(rows, inputs)`` bf16 or fp32, no more rows than the weight has outputs.
        weight: ``(outputs, inputs)``, quantised or of x's dtype.
        threads: Threads of the call.
        packed: A weight of x's dtype is read from a packed copy.
    """
    rows, (outs, _) = len(x), weight.shape
    if isinstance(weight, torch.Tensor):
        linear = CpuLinear(weight, None, None, None)
    else:
        linear = CpuLinear(weight.values, None, weight.scales, weight.minimums)
    tokens = torch.zeros(outs, x.shape[1], dtype=x.dtype)
    tokens[:rows] = x
    model = CpuModel(
        context=9, heads=1, kv_heads=1, head_dim=4, inner=4, activation=0, gated=False, rms=False,
        unit_offset=False, whole_qk_norm=False, eps=1e-5, embedding_scale=1.0, residual_scale=1.0,
        logits_scale=1.0, attention_softcap=0.0, logits_softcap=0.0, position_offset=0, tokens=tokens,
        positions=None, layers=[], stages=[_stage("embed", "x"), _stage("linear", "logits", "x", linear)],
    )  # fmt: skip
    keys, values = torch.zeros(2, 0, 1, 1, 1, 4, dtype=x.dtype)
    table, lengths = torch.zeros(rows, 1, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    logits = torch.empty(rows, outs, dtype=x.dtype)
    wanted = torch.arange(rows, dtype=torch.int32)
    ids = torch.arange(rows)
    decoder = _C.Decoder(model)
    decoder.read_packed(packed)
    assert decoder.step(keys, values, table, lengths, ids, wanted, logits, threads)
    return logits
