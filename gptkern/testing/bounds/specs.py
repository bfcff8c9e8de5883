"""The kernels' promises: which sizes are any, how large the tensors are, and how many programs there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import z3

Formula = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Spec:
    """A kernel's promise.

    Attributes:
        case: The op and the name of one of its cases, whose launch is recorded.
        sizes: (least, largest) of each argument that is any number in between. Others are as recorded.
        extents: Elements of each tensor.
        arguments: Arguments that follow from sizes.
        grid: Programs on an axis, where they follow from sizes or are any number; else as recorded.
        loaded: (least, largest) of the integers in a tensor.
        shared: Tensors in which programs may meet, and why that is not asked.
    """

    case: tuple[str, str]
    sizes: dict[str, tuple[int, int]]
    extents: dict[str, Formula]
    arguments: dict[str, Formula] = field(default_factory=dict)
    grid: dict[int, Formula] = field(default_factory=dict)
    loaded: dict[str, tuple[int, int]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)


def _size(text: str) -> Formula:
    """A formula of arguments' names."""
    code = compile(text, text, "eval")
    return lambda names: eval(code, {"__builtins__": {}, "cdiv": _cdiv}, names)  # our own text


def _cdiv(a: Any, b: int) -> Any:
    return -(-a // b) if isinstance(a, int) else (a + b - 1) / b


def _extents(**formulas: str) -> dict[str, Formula]:
    return {name: _size(text) for name, text in formulas.items()}


def _any(name: str) -> Formula:
    return lambda names: z3.Int(name)


# A tile of rows may begin just below the last row: int32 must hold the tile's end, too.
MOST_ROWS = 2**31 - 2**20
_ROWS = {"rows": (1, MOST_ROWS)}
_CONTIGUOUS = {"x_inner": _size("rows"), "residual_inner": _size("rows")}
_NORM = _extents(
    x_ptr="rows * WIDTH", residual_ptr="rows * WIDTH", weight_ptr="WIDTH", bias_ptr="WIDTH",
    out_ptr="rows * WIDTH", sum_ptr="rows * WIDTH", stats_ptr="(1 + CENTERED) * rows", seed_ptr="1",
    d_out_ptr="rows * WIDTH", d_sum_ptr="rows * WIDTH", dx_ptr="rows * WIDTH",
    d_residual_ptr="rows * WIDTH", d_weight_part_ptr="programs * WIDTH", d_bias_part_ptr="programs * WIDTH",
    d_weight_ptr="WIDTH", d_bias_ptr="WIDTH",
)  # fmt: skip

_ROTARY = _extents(
    q_ptr="(tokens - 1) * stride_qi + HEADS * HEAD_DIM",
    k_ptr="(tokens - 1) * stride_ki + KV_HEADS * HEAD_DIM",
    q_out_ptr="tokens * HEADS * HEAD_DIM", k_out_ptr="tokens * KV_HEADS * HEAD_DIM",
    dq_out_ptr="tokens * HEADS * HEAD_DIM", dk_out_ptr="tokens * KV_HEADS * HEAD_DIM",
    dq_ptr="tokens * HEADS * HEAD_DIM", dk_ptr="tokens * KV_HEADS * HEAD_DIM",
    cos_ptr="context * (DIM // 2)", sin_ptr="context * (DIM // 2)", positions_ptr="rows",
    q_weight_ptr="HEAD_DIM", k_weight_ptr="HEAD_DIM",
    q_part_ptr="programs * cdiv(HEADS, BLOCK_H) * HEAD_DIM",
    k_part_ptr="programs * cdiv(KV_HEADS, BLOCK_H) * HEAD_DIM",
)  # fmt: skip


_LOSS = _extents(
    exp_ptr="tokens * stride_et", tile_max_ptr="tokens * n_tiles", row_max_ptr="tokens", log_sum_ptr="tokens",
    targets_ptr="tokens", class_weight_ptr="vocab", class_stats_ptr="2",
    scale_ptr="(tokens - 1) * stride_s + 1",
)  # fmt: skip


def _all(source: str, *names: str) -> dict[str, Formula]:
    """Arguments that are the same as another."""
    return {name: _size(source) for name in names}


SPECS: dict[str, Spec] = {
    "norm_forward_kernel": Spec(
        ("layer_norm", "layer_norm (3, 17)"),
        {**_ROWS, "programs": (1, 2**16)},
        _NORM,
        _CONTIGUOUS,
        {0: _any("programs")},
    ),
    "norm_backward_kernel": Spec(
        ("layer_norm", "layer_norm (3, 17)"),
        {**_ROWS, "programs": (1, 2**12)},
        _NORM,
        _CONTIGUOUS,
        {0: _any("programs")},
    ),
    "norm_weight_grad_kernel": Spec(
        ("layer_norm", "layer_norm (3, 17)"),
        {"parts": (1, 2**12)},
        _extents(
            d_weight_part_ptr="parts * WIDTH",
            d_bias_part_ptr="parts * WIDTH",
            d_weight_ptr="WIDTH",
            d_bias_ptr="WIDTH",
        ),
    ),
    "norm_wide_forward_kernel": Spec(
        ("layer_norm", "layer_norm 16384 x 65536"), _ROWS, _NORM, _CONTIGUOUS, {0: _size("rows")}
    ),
    "norm_wide_backward_kernel": Spec(
        ("layer_norm", "layer_norm 16384 x 16384"), _ROWS, _NORM, _CONTIGUOUS, {0: _size("rows")}
    ),
    "norm_wide_weight_grad_kernel": Spec(
        ("layer_norm", "layer_norm 16384 x 16384"),
        {**_ROWS, "programs": (1, 2**12)},
        _NORM,
        _CONTIGUOUS,
        {1: _any("programs")},
    ),
    "rotary_kernel": Spec(
        ("rotary", "interleaved, partial"),
        {"tokens": (1, MOST_ROWS), "rows": (1, 2**22), "context": (1, 2**22)},
        _ROTARY,
        _all("tokens", "q_inner", "k_inner", "q_out_inner", "k_out_inner"),
        {0: _size("tokens")},
    ),
    "rotary_norm_backward_kernel": Spec(
        ("rotary", "halves, partial, norm"),
        {"tokens": (1, MOST_ROWS), "rows": (1, 2**22), "context": (1, 2**22), "programs": (1, 2**12)},
        _ROTARY,
        _all("tokens", "q_inner", "k_inner", "dq_inner", "dk_inner"),
        {0: _any("programs")},
    ),
    "decode_embed_kernel": Spec(
        ("decode_embed", "3 rows of 20"),
        {"rows": (1, 2**12), "words": (1, 2**31 - 1), "positions": (1, 2**31 - 1), "max_pages": (1, 2**18)},
        _extents(
            tokens_ptr="rows",
            live_ptr="1",
            token_weight_ptr="words * WIDTH",
            position_weight_ptr="positions * WIDTH",
            table_ptr="rows * max_pages",
            lens_ptr="rows",
            x_ptr="rows * WIDTH",
            slots_ptr="rows",
        ),
        {"stride_tb": _size("max_pages"), **_all("WIDTH", "stride_token", "stride_position")},
        {0: _size("rows")},
        # A sequence is at most as long as a page table's row.
        loaded={"live_ptr": (0, 2**12), "lens_ptr": (0, 2**30)},
    ),
    "append_kv_kernel": Spec(
        ("decode_attention", "append 7 x 3 x 20"),
        {"tokens": (1, 2**31 - 1), "page_count": (1, 2**31 - 1)},
        _extents(
            k_ptr="tokens * KV_HEADS * HEAD_DIM",
            v_ptr="tokens * KV_HEADS * HEAD_DIM",
            k_cache_ptr="page_count * page_size * KV_HEADS * HEAD_DIM",
            v_cache_ptr="page_count * page_size * KV_HEADS * HEAD_DIM",
            slots_ptr="tokens",
        ),
        grid={0: _size("tokens")},
        shared=dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), "tokens have slots of their own by promise"),
    ),
    "column_sum": Spec(
        ("linear", "relu, 65 tokens, 17 to 33"),
        {"M": (1, MOST_ROWS)},
        _extents(
            x_ptr="M * N",
            pre_ptr="M * N",
            dpre_ptr="M * N",
            sum_ptr="cdiv(M, rows_per_program) * N",
        ),
        _all("N", "stride_m"),
        {1: _size("cdiv(M, rows_per_program)")},
    ),
    "loss_kernel": Spec(
        ("linear_cross_entropy", "133 tokens x 40, 517 words"),
        {"tokens": (1, MOST_ROWS)},
        _extents(
            tile_max_ptr="tokens * n_tiles",
            tile_sum_ptr="tokens * n_tiles",
            tile_total_ptr="tokens * n_tiles",
            tile_best_ptr="tokens * n_tiles",
            target_logit_ptr="tokens",
            targets_ptr="tokens",
            class_weight_ptr="vocab",
            class_stats_ptr="2",
            loss_ptr="tokens",
            z_loss_ptr="tokens",
            correct_ptr="tokens",
            row_max_ptr="tokens",
            log_sum_ptr="tokens",
            factor_ptr="n_tiles * tokens",
            word_ptr="tokens",
        ),
        grid={0: _size("cdiv(tokens, BLOCK_M)")},
    ),
    "logits_kernel": Spec(
        ("linear_cross_entropy", "133 tokens x 40, 517 words"),
        {"tokens": (1, 2**24)},
        _extents(
            hidden_ptr="tokens * width",
            weight_ptr="vocab * width",
            bias_ptr="vocab",
            class_weight_ptr="vocab",
            targets_ptr="tokens",
            exp_ptr="tokens * stride_et",
            tile_max_ptr="tokens * n_tiles",
            tile_sum_ptr="tokens * n_tiles",
            tile_total_ptr="tokens * n_tiles",
            tile_best_ptr="tokens * n_tiles",
            target_logit_ptr="tokens",
        ),
        grid={0: _size("cdiv(tokens, BLOCK_M) * n_tiles")},
        shared=dict.fromkeys(
            ("tile_max_ptr", "tile_sum_ptr", "tile_total_ptr", "exp_ptr", "tile_best_ptr"),
            "z3 does not decide it in a minute: rows and tile come of a division by the number of blocks",
        ),
    ),
    "linear": Spec(
        ("linear", "relu, 65 tokens, 17 to 33"),
        {"M": (1, MOST_ROWS)},
        _extents(
            a="M * K",
            b="K * N",
            bias_ptr="N",
            residual_ptr="M * N",
            out_ptr="M * N",
            pre_ptr="M * N",
        ),
        grid={0: _size("cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)")},
    ),
    "linear_dw": Spec(
        ("linear", "relu, 65 tokens, 17 to 33"),
        {"K": (1, MOST_ROWS)},
        _extents(a="K * M", b="K * N", out_ptr="programs_1 * M * N"),
    ),
    "linear_dact": Spec(
        ("gelu_mlp", "relu, 33 tokens x 24"),
        {"M": (1, MOST_ROWS)},
        _extents(
            a="M * K",
            b="K * N",
            pre_ptr="M * N",
            dpre_ptr="M * N",
            partial_ptr="cdiv(M, BLOCK_M) * N",
        ),
        grid={0: _size("cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)")},
    ),
    "gated_linear": Spec(
        ("gated_mlp", "ragged tiles"),
        {"M": (1, MOST_ROWS)},
        _extents(
            a="M * K",
            b="2 * K * N",
            bias_ptr="2 * N",
            out_ptr="M * N",
            pre_ptr="2 * M * N",
        ),
        grid={0: _size("cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)")},
    ),
    "gated_linear_dact": Spec(
        ("gated_mlp", "ragged tiles"),
        {"M": (1, MOST_ROWS)},
        _extents(
            a="M * K",
            b="K * N",
            pre_ptr="2 * M * N",
            dpre_ptr="2 * M * N",
            partial_ptr="cdiv(M, BLOCK_M) * 2 * N",
        ),
        grid={0: _size("cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)")},
    ),
    "flash_attention_outside": Spec(
        ("flash_attention", "packed"),
        {"tokens": (1, MOST_ROWS)},
        _extents(
            first_ptr="tokens * first_width",
            second_ptr="tokens * second_width",
            lse_ptr="heads * tokens",
            cu_seqlens_ptr="sequences + 1",
            cu_seqlens_other_ptr="sequences + 1",
        ),
        grid={0: _size("cdiv(tokens, BLOCK_ROWS)")},
    ),
    "dhidden_kernel": Spec(
        ("linear_cross_entropy", "133 tokens x 40, 517 words"),
        {"tokens": (1, MOST_ROWS)},
        {**_LOSS, **_extents(weight_ptr="vocab * width", dhidden_ptr="tokens * width")},
        grid={0: _size("cdiv(tokens, BLOCK_M) * cdiv(width, BLOCK_N)")},
    ),
    "dweight_kernel": Spec(
        ("linear_cross_entropy", "133 tokens x 40, 517 words"),
        {"tokens": (1, MOST_ROWS)},
        {**_LOSS, **_extents(hidden_ptr="tokens * width", dweight_ptr="vocab * width", dbias_ptr="vocab")},
    ),
}

BEYOND = {
    "decode_attention_kernel": "who combines a sequence's splits is decided by an atomic counter",
    "decode_linear_kernel": "who adds up a tile's parts is decided by an atomic counter",
    "persistent_step_kernel": "its programs meet at barriers, and addresses are read from a table",
    "flash_attention_forward": "programs beyond a sequence return before the end: several blocks",
    "flash_attention_forward_hopper": "Gluon is another text, and warps have parts of their own",
    "flash_attention_delta": "programs beyond a sequence return before the end: several blocks",
    "flash_attention_backward_hopper": "as flash_attention_forward_hopper",
    "linear_hopper": "as flash_attention_forward_hopper",
    "linear_dact_hopper": "as flash_attention_forward_hopper",
    "linear_dw_hopper": "as flash_attention_forward_hopper",
    "logits_hopper": "as flash_attention_forward_hopper",
    "dhidden_hopper": "as flash_attention_forward_hopper",
    "dweight_hopper": "as flash_attention_forward_hopper",
    "flash_attention_dq": "programs beyond a sequence return before the end: several blocks",
    "flash_attention_dkdv": "programs beyond a sequence return before the end: several blocks",
}
"""Kernels that are not asked, and why."""
