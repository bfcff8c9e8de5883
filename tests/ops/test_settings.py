"""Settings of another type or value than an op takes: the error names the op, the argument and what came."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gptkern
from gptkern import ops
from gptkern.ops._dispatch import INTERPRETED

X, W, N = torch.randn(4, 16), torch.randn(8, 16), torch.randn(16)
Q, CACHE = torch.randn(1, 8, 2, 16), torch.zeros(2, 4, 2, 16)
STARTS, TABLE, LENS = (torch.tensor(v, dtype=torch.int32) for v in ([0, 8], [[0, 1]], [3]))
TARGETS = torch.tensor([1, 2, 3, 4])


@pytest.fixture(autouse=True)
def tensors_where_kernels_run(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[__name__]
    for name, value in list(vars(module).items()):
        if isinstance(value, torch.Tensor):
            monkeypatch.setattr(module, name, value.to(device))


def varlen(op: Callable[..., Any]) -> Callable[..., Any]:
    def run(max_seqlen_q: Any = 8, max_seqlen_k: Any = 8, **settings: Any) -> Any:
        return op(Q[0], Q[0], Q[0], STARTS, STARTS, max_seqlen_q, max_seqlen_k, **settings)

    return run


CALLS: dict[str, Callable[..., Any]] = {
    "flash_attention": lambda **s: ops.flash_attention(Q, Q, Q, **s),
    "flash_attention_varlen": varlen(ops.flash_attention_varlen),
    "flash_attn_func": lambda **s: ops.flash_attn_func(Q, Q, Q, **s),
    "flash_attn_varlen_func": varlen(ops.flash_attn_varlen_func),
    "flash_attn_with_kvcache": lambda **s: ops.flash_attn_with_kvcache(
        Q[:, :1], CACHE, CACHE, block_table=TABLE, cache_seqlens=LENS, **s
    ),
    "decode_attention": lambda **s: ops.decode_attention(Q[:, 0], CACHE, CACHE, TABLE, LENS, **s),
    "decode_linear": lambda **s: ops.decode_linear(X, W, None, **s),
    "linear_act": lambda **s: ops.linear_act(X, W, **s),
    "gelu_mlp": lambda **s: ops.gelu_mlp(X, W, None, W.t(), None, **s),
    "layer_norm": lambda **s: ops.layer_norm(X, N, N, **s),
    "rms_norm": lambda **s: ops.rms_norm(X, N, **s),
    "add_layer_norm": lambda **s: ops.add_layer_norm(X, X, N, N, **s),
    "add_rms_norm": lambda **s: ops.add_rms_norm(X, X, N, **s),
    "linear_cross_entropy": lambda **s: ops.linear_cross_entropy(X, W, TARGETS, **s),
}
NUMBERS = {
    "flash_attention": ["scale", "softcap", "dropout_p"],
    "flash_attention_varlen": ["scale", "softcap", "dropout_p"],
    "flash_attn_func": ["softmax_scale", "softcap", "dropout_p"],
    "flash_attn_varlen_func": ["softmax_scale", "softcap", "dropout_p"],
    "flash_attn_with_kvcache": ["softmax_scale", "softcap"],
    "decode_attention": ["scale", "softcap"],
    "decode_linear": ["scale", "softcap"],
    "layer_norm": ["eps"],
    "rms_norm": ["eps"],
    "add_layer_norm": ["eps", "dropout_p"],
    "add_rms_norm": ["eps", "dropout_p"],
    "linear_cross_entropy": ["z_loss", "label_smoothing", "softcap"],
}
WHOLE = {
    "flash_attention": ["window"],
    "flash_attention_varlen": ["window", "max_seqlen_q", "max_seqlen_k"],
    "flash_attn_varlen_func": ["max_seqlen_q", "max_seqlen_k"],
    "decode_attention": ["window"],
    "linear_cross_entropy": ["ignore_index"],
}
WORDS = {name: ["activation"] for name in ("linear_act", "gelu_mlp", "decode_linear")}
WORDS["linear_cross_entropy"] = ["reduction"]
PAIRS = {name: ["window_size"] for name in ("flash_attn_func", "flash_attn_with_kvcache")}
WRONG: list[tuple[dict[str, list[str]], list[Any]]] = [
    (NUMBERS, ["1", ["gelu"], {}, object, torch.ones(2), float("nan")]),
    (WHOLE, ["1", 2.0, 2.5, True, [2], torch.tensor(2.0)]),
    (WORDS, [["gelu"], ("gelu",), 1, None, {}, "gelu "]),
    (PAIRS, [3, (1,), (1, 2, 3), (1.0, 2), (-2, 0), "ab", None]),
]
CASES = [
    pytest.param(op, name, value, id=f"{op}, {name}, {value!r}")
    for table, values in WRONG
    for op, names in table.items()
    for name in names
    for value in values
]


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
@pytest.mark.parametrize(("op", "name", "value"), CASES)
def test_the_error_names_the_argument(op: str, name: str, value: Any, implementation: Any) -> None:
    if implementation == "kernel" and not INTERPRETED:
        pytest.skip("on a CPU kernels run interpreted alone")
    message = rf"^{op}: (each side of )?{name} is "
    with gptkern.backend(implementation), pytest.raises((TypeError, ValueError), match=message):
        CALLS[op](**{name: value})


@pytest.mark.parametrize("op", CALLS)
def test_the_calls_without_settings_are_sound(op: str) -> None:
    CALLS[op]()


@pytest.mark.parametrize("op", ["decode_attention", "decode_linear"])
def test_a_number_in_a_tensor_is_read(op: str) -> None:
    """A kernel would take its address."""
    for name in ("scale", "softcap"):
        given = [CALLS[op](**{name: value}) for value in (2.0, torch.tensor(2.0))]
        assert torch.equal(*given)
