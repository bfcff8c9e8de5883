"""The CPU's decode step, of both instruction sets: against float64, and bitwise the same in any company."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn

import gptkern
from gptkern import _C, _native
from gptkern.config import GPTConfig
from gptkern.cpu_threads import VARIABLE
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.cpu import CpuExecutor
from gptkern.engine.executors.cpu_model import CpuLayer, CpuLinear, CpuModel, CpuNorm, CpuStage
from gptkern.gpt import GPT
from gptkern.quantization import Quantization
from gptkern.quantize import QuantizedLinear, quantize_model
from gptkern.testing import assert_accurate

pytestmark = pytest.mark.skipif(not _C.has_decoder, reason="this processor has no AVX2")

DTYPES = [torch.float32, torch.bfloat16]
PLAIN = GPTConfig(
    n_layer=2,
    n_head=3,
    n_embd=96,
    vocab_size=130,
    n_positions=64,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=None,
    eos_token_id=None,
    initializer_range=0.2,
)
# No width of these is a multiple of what a pass over the weights takes.
ODD = PLAIN.replace(n_head=5, n_embd=60, n_inner=77, vocab_size=51)
CONFIGS = {
    "plain": PLAIN,
    "odd": ODD,
    "no bias, erf": ODD.replace(bias=False, activation_function="gelu"),
    "relu, untied": PLAIN.replace(activation_function="relu", tie_word_embeddings=False),
    "silu, scales": ODD.replace(activation_function="silu", scale_attn_by_inverse_layer_idx=True),
    "wide heads": PLAIN.replace(n_head=1, n_inner=500),
    "post-norm": PLAIN.replace(model_type="openai-gpt"),
}


def _turn(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())


def _model(config: GPTConfig, dtype: torch.dtype, turned: bool) -> GPT:
    torch.manual_seed(0)
    model = GPT(config).to(dtype).eval()
    for name, value in model.named_parameters():
        if name.endswith("bias") or "ln_" in name:
            nn.init.normal_(value, 0.5, 0.3)
    if turned:
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer is not model.lm_head:
                _turn(layer)
    return model


def _filled(model: GPT, rows: int, page_size: int) -> KVCache:
    """Sequences of 7, 6, ... tokens with random keys and values, a row's the same however many there are."""
    config = model.config
    cache = KVCache.for_config(config, max_seqs=rows, max_len=40, page_size=page_size, dtype=model.dtype)
    cache.allocate(rows)
    step = cache.extend([7 - row % 7 for row in range(rows)])
    shape = (7, config.n_layer, config.n_head, config.head_dim)
    for number, kept in enumerate((cache.k, cache.v)):
        rows_of = [
            torch.randn(shape, generator=torch.Generator().manual_seed(2 * row + number))[:length]
            for row, length in enumerate([r.new for r in step.rows])
        ]
        kept.flatten(1, 2)[:, step.slots] = torch.cat(rows_of).transpose(0, 1).bfloat16().to(kept.dtype)
    step.commit()
    return cache


def _tokens(rows: int, step: int, config: GPTConfig) -> torch.Tensor:
    return torch.randint(config.vocab_size, (rows,), generator=torch.Generator().manual_seed(100 + step))


def _stepped(model: GPT, rows: int, steps: int, page_size: int = 64, fast: bool = True) -> Any:
    """(logits after so many steps, the cache)."""
    with torch.inference_mode():
        cache = _filled(model, rows, page_size)
        assert not fast or CpuExecutor.serves(model, cache.dtype) is None
        step = CpuExecutor(model, cache) if fast else lambda t: model(t[:, None], cache=cache).logits[:, -1]
        for number in range(steps):
            logits = step(_tokens(rows, number, model.config))
    return logits, cache


@pytest.mark.usefixtures("decode_path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize(("name", "rows", "page_size"), [*((n, 3, 4) for n in CONFIGS), ("plain", 1, 64)])
def test_against_float64(name: str, rows: int, page_size: int, turned: bool, dtype: torch.dtype) -> None:
    model = _model(CONFIGS[name], dtype, turned)
    exact = GPT(CONFIGS[name]).double().eval()
    exact.load_state_dict(model.state_dict())
    found, cache = _stepped(model, rows, 6, page_size)
    plain, _ = _stepped(model, rows, 6, page_size, fast=False)
    truth, true_cache = _stepped(exact, rows, 6, page_size, fast=False)
    assert_accurate(found, plain, truth)
    assert cache.lengths == true_cache.lengths
    for kept, right in ((cache.k, true_cache.k), (cache.v, true_cache.v)):
        torch.testing.assert_close(
            kept.double(), right, rtol=2e-2, atol=5e-2 if dtype != torch.float32 else 1e-4
        )


def _packed(config: GPTConfig, dtype: torch.dtype, format: str = "int8", **options: Any) -> GPT:
    model = _model(config, dtype, False)
    quantize_model(model, Quantization.make(config, format, **options))
    return model


PACKED: dict[str, tuple[GPTConfig, str, dict[str, Any]]] = {
    **{
        f"{format}, {name}": (config, format, {})
        for format in ("int8", "fp8")
        for name, config in CONFIGS.items()
    },
    "int4, groups of 32": (PLAIN, "int4", {"group_size": 32}),
    "int4, groups of 32, no zeros": (PLAIN, "int4", {"group_size": 32, "zero_point": False}),
    "int4, groups of 64": (PLAIN.replace(n_head=2, n_embd=64, n_inner=192), "int4", {"group_size": 64}),
    "int4, groups of 128": (
        ODD.replace(n_head=4, n_embd=128, n_inner=256),
        "int4",
        {"group_size": 128, "zero_point": False},
    ),
    "int4, post-norm": (PLAIN.replace(model_type="openai-gpt"), "int4", {}),
}


@pytest.mark.usefixtures("decode_path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "rows"), [*((n, 3) for n in PACKED), ("int8, plain", 1), ("int4, groups of 32", 1)]
)
def test_quantised_weights_against_float64(name: str, rows: int, dtype: torch.dtype) -> None:
    config, format, options = PACKED[name]
    model = _packed(config, dtype, format, **options)
    exact = GPT(config.replace(tie_word_embeddings=False)).double().eval()
    values = dict(model.named_parameters())
    values |= {
        f"{name}.weight": layer.quantized.dequantize(torch.float64)
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear)
    }
    exact.load_state_dict(values)
    found, _ = _stepped(model, rows, 6, 4)
    plain, _ = _stepped(model, rows, 6, 4, fast=False)
    truth, _ = _stepped(exact, rows, 6, 4, fast=False)
    assert_accurate(found, plain, truth)


@pytest.mark.usefixtures("decode_path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["", "turned", "int8", "fp8", "int4"])
def test_a_row_is_bitwise_the_same_in_any_batch_and_with_any_threads(
    how: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PLAIN.replace(vocab_size=515)
    model = (
        _packed(config, dtype, how)
        if how.startswith(("int", "fp"))
        else _model(config, dtype, how == "turned")
    )
    whole, _ = _stepped(model, 13, 3, 4)
    for number in (1, 2, 3):
        monkeypatch.setenv(VARIABLE, str(number))
        for rows in (1, 2, 3, 4, 7, 13):
            found, _ = _stepped(model, rows, 3)
            assert torch.equal(found, whole[:rows]), (number, rows)


# Inputs past 1024 are summed in parts, and neither these nor the outputs fill a last vector.
DEEP = PLAIN.replace(n_layer=1, n_embd=90, n_inner=1130, vocab_size=515)


@pytest.mark.usefixtures("decode_path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
def test_every_number_of_rows_gives_the_same_bits_near_float64(
    turned: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(DEEP, dtype, turned)
    exact = GPT(DEEP).double().eval()
    exact.load_state_dict(model.state_dict())
    whole, _ = _stepped(model, 64, 1, 4)
    plain, _ = _stepped(model, 64, 1, 4, fast=False)
    truth, _ = _stepped(exact, 64, 1, 4, fast=False)
    assert_accurate(whole, plain, truth)
    for rows in range(1, 64):
        monkeypatch.setenv(VARIABLE, str(1 + rows % 2))
        found, _ = _stepped(model, rows, 1, 4)
        assert torch.equal(found, whole[:rows]), rows


@pytest.mark.usefixtures("decode_path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_be_consecutive_tokens_of_one_sequence(dtype: torch.dtype) -> None:
    model = _model(PLAIN, dtype, False)
    with torch.inference_mode():
        one, many = (_filled(model, 2, 4) for _ in range(2))
        fed = [_tokens(2, number, PLAIN) for number in range(5)]
        step = CpuExecutor(model, one)
        expected = torch.stack([step(tokens) for tokens in fed], 1)
        many.reserve([5, 5])
        lengths = (torch.tensor(many.lengths)[:, None] + torch.arange(5)).flatten().int()
        table = many.page_table[:2].repeat_interleave(5, 0)
        found = CpuExecutor(model, many).logits(torch.stack(fed, 1).flatten(), table, lengths)
    assert torch.equal(found.unflatten(0, (2, 5)), expected)
    assert many.lengths == [7, 6]


@pytest.mark.usefixtures("decode_path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "post-norm"])
@pytest.mark.parametrize("wanted", [[], [3], [4, 0, 2]], ids=str)
def test_logits_of_some_rows_are_those_of_all(wanted: list[int], name: str, dtype: torch.dtype) -> None:
    model = _model(CONFIGS[name], dtype, False)
    with torch.inference_mode():
        whole, some = (_filled(model, 2, 4) for _ in range(2))
        for cache in (whole, some):
            cache.reserve([3, 2])
        given = {
            "tokens": _tokens(5, 0, PLAIN),
            "page_table": whole.page_table[:2].repeat_interleave(torch.tensor([3, 2]), 0),
            "lengths": torch.tensor([7, 8, 9, 6, 7], dtype=torch.int32),
        }
        expected = CpuExecutor(model, whole).logits(**given)
        found = CpuExecutor(model, some).logits(**given, wanted=wanted)
    assert torch.equal(found, expected[wanted])
    assert torch.equal(some.k, whole.k) and torch.equal(some.v, whole.v)


@pytest.mark.usefixtures("decode_path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_fp8_number_is_read_as_it_is(dtype: torch.dtype) -> None:
    """A head whose every row holds one number 96 times: logits are as the numbers are."""
    model = _packed(PLAIN.replace(vocab_size=256), dtype, "fp8")
    model.lm_head.values = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 96).contiguous()
    model.lm_head.scales = torch.ones(256)
    logits, _ = _stepped(model, 2, 1)
    numbers = model.lm_head.values[:, 0].view(torch.float8_e4m3fn).double()
    assert logits[:, numbers.isnan()].isnan().all()
    ratios = logits.double() / logits[:, 0x38:0x39].double()  # 0x38 is 1
    kept = ~numbers.isnan()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(ratios[:, kept], numbers[kept].expand(2, -1), rtol=tolerance, atol=0)


@pytest.mark.usefixtures("decode_path")
def test_nan_stays_in_its_row() -> None:
    model = _model(PLAIN, torch.float32, True)
    with torch.inference_mode():
        clean, _ = _stepped(model, 4, 1, 8)
        cache = _filled(model, 4, 8)
        cache.k[:, cache.page_table[2, 0].long(), 0] = torch.nan
        found = CpuExecutor(model, cache)(_tokens(4, 0, PLAIN))
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3]], clean[[0, 1, 3]])


def test_weights_that_change_in_place_are_what_the_next_step_reads() -> None:
    model = _model(PLAIN, torch.float32, False)
    with torch.inference_mode():
        cache = _filled(model, 2, 64)
        step = CpuExecutor(model, cache)
        before = step(_tokens(2, 0, PLAIN))
        for sequence, length in zip(cache.sequences, [7, 6], strict=True):
            cache.truncate(sequence, length)
        for parameter in model.parameters():
            parameter.mul_(1.01)
        after = step(_tokens(2, 0, PLAIN))
    assert not torch.equal(before, after)


def _assign(model: GPT) -> None:
    model.load_state_dict({name: value * 1.01 for name, value in model.state_dict().items()}, assign=True)


def _give_data(model: GPT) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.01


def _replace_layer(model: GPT) -> None:
    first = model.transformer.h[0]
    first.mlp.c_fc = copy.deepcopy(first.mlp.c_fc)
    with torch.no_grad():
        first.mlp.c_fc.weight.mul_(1.1)


def _transpose_in_place(model: GPT) -> None:
    for block in model.transformer.h:
        _turn(block.mlp.c_fc)


FOLLOWED: dict[str, Any] = {
    "load_state_dict(assign=True)": _assign,
    "p.data =": _give_data,
    "share_memory": lambda model: model.share_memory(),
    "quantize_model": lambda model: quantize_model(model, Quantization.make(model.config, "int8")),
    "quantize_model, int4": lambda model: quantize_model(model, Quantization.make(model.config, "int4")),
    "a layer replaced": _replace_layer,
    "weights turned": _transpose_in_place,
    "to and back": lambda model: model.bfloat16().float(),
}
REFUSED: dict[str, Any] = {
    "to(bfloat16)": lambda model: model.to(torch.bfloat16),
    "double": lambda model: model.double(),
    "half": lambda model: model.half(),
    "to(meta)": lambda model: model.to("meta"),
}


@pytest.mark.parametrize("how", FOLLOWED)
def test_weights_that_move_between_passes_are_followed(how: str) -> None:
    model = _model(PLAIN, torch.float32, False)
    with torch.inference_mode():
        cache = _filled(model, 2, 64)
        step = CpuExecutor(model, cache)
        step(_tokens(2, 0, PLAIN))
    FOLLOWED[how](model)
    # What is freed is soon written by others.
    junk = [
        torch.full((n,), torch.nan)
        for n in (96, 288, 96 * 96, 96 * 288, 96 * 384, 130 * 96)
        for _ in range(9)
    ]
    with torch.inference_mode():
        found = step(_tokens(2, 1, PLAIN))
        for sequence, length in zip(cache.sequences, [8, 7], strict=True):
            cache.truncate(sequence, length)
        expected = CpuExecutor(model, cache)(_tokens(2, 1, PLAIN))
    del junk
    assert torch.equal(found, expected)


@pytest.mark.parametrize("how", REFUSED)
def test_weights_that_no_longer_fit_are_refused_by_name(how: str) -> None:
    model = _model(PLAIN, torch.float32, False)
    with torch.inference_mode():
        cache = _filled(model, 2, 64)
        step = CpuExecutor(model, cache)
        step(_tokens(2, 0, PLAIN))
    REFUSED[how](model)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match="GPT: weights changed while generation was under way: the CPU"),
    ):
        step(_tokens(2, 1, PLAIN))
    assert cache.lengths == [8, 7]


@pytest.mark.parametrize("how", FOLLOWED | REFUSED)
def test_an_open_stream_goes_on_or_is_refused_by_name(how: str) -> None:
    """Whatever happens to the weights between two pieces: no memory is read that is gone."""
    model = _model(PLAIN, torch.float32, False)
    model.tokenizer = gptkern.Tokenizer.bytes()
    stream = model.stream("ab", max_new_tokens=12)
    next(stream)
    (FOLLOWED | REFUSED)[how](model)
    if how in FOLLOWED and not how.startswith("quantize_model"):
        list(stream)
    else:
        with pytest.raises(RuntimeError, match="GPT: weights changed while"):
            list(stream)


def test_a_storage_that_was_freed_is_refused() -> None:
    model = _model(PLAIN, torch.float32, False)
    with torch.inference_mode():
        cache = _filled(model, 1, 64)
        step = CpuExecutor(model, cache)
    model.transformer.h[1].mlp.c_fc.weight.untyped_storage().resize_(0)
    with torch.inference_mode(), pytest.raises(ValueError, match="a storage that holds all of it"):
        step(_tokens(1, 0, PLAIN))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_tokens_of_any_integer_dtype_are_the_same_tokens(dtype: torch.dtype) -> None:
    model = _model(PLAIN, torch.float32, False)
    logits = []
    for kind in (torch.int64, dtype):
        with torch.inference_mode():
            logits.append(CpuExecutor(model, _filled(model, 3, 4))(torch.tensor([5, 99, 127]).to(kind)))
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.complex64])
def test_tokens_that_are_no_whole_numbers_are_refused(dtype: torch.dtype) -> None:
    model = _model(PLAIN, torch.float32, False)
    cache = _filled(model, 1, 64)
    with torch.inference_mode(), pytest.raises(TypeError, match=f"tokens are {dtype}; whole numbers"):
        CpuExecutor(model, cache)(torch.ones(1).to(dtype))
    assert cache.lengths == [7]


def _places(**other: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "tokens": torch.tensor([1, 2]),
        "page_table": torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32),
        "lengths": torch.tensor([3, 4], dtype=torch.int32),
    }
    return given | other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.tensor([1, 10**9])}, r"tokens\[1\] is 1000000000; 0 <= token < 130"),
        ({"wanted": [0, 2]}, "row 2 is wanted of 2"),
        ({"wanted": [-1]}, "row -1 is wanted of 2"),
        ({"wanted": [0, 1, 1]}, "the wanted rows is 3"),
        ({"tokens": torch.tensor([[1, 2]])}, "tokens is int64 of shape \\(1, 2\\)"),
        ({"lengths": torch.tensor([3, 64], dtype=torch.int32)}, "64 tokens, the model's whole context of 64"),
        ({"lengths": torch.tensor([3, 2**31 - 1], dtype=torch.int32)}, "the model's whole context of 64"),
        ({"lengths": torch.tensor([3, -1], dtype=torch.int32)}, "a sequence has -1 tokens"),
        ({"lengths": torch.tensor([3, 12], dtype=torch.int32)}, "its 3 pages of 4 hold no more"),
        ({"lengths": torch.tensor([3], dtype=torch.int32)}, "lengths is int32 of shape"),
        ({"lengths": torch.tensor([3, 4])}, "lengths is int64"),
        ({"lengths": torch.zeros(4, dtype=torch.int32)[::2]}, "lengths is int32 of shape .*strides"),
        ({"page_table": torch.full((2, 3), 10**6, dtype=torch.int32)}, "names a page that the cache lacks"),
        ({"page_table": torch.full((2, 3), -1, dtype=torch.int32)}, "names a page that the cache lacks"),
        ({"page_table": torch.zeros(2, 3)}, "page_table is float32"),
        ({"page_table": torch.zeros(1, 3, dtype=torch.int32)}, "page_table is int32 of shape \\(1, 3\\)"),
        ({"page_table": torch.zeros(3, 2, dtype=torch.int32).t()}, "page_table is int32 .*strides"),
    ],
)
def test_places_outside_of_the_cache_are_refused(change: dict[str, Any], message: str) -> None:
    model = _model(PLAIN, torch.float32, False)
    with torch.inference_mode():
        cache = _filled(model, 2, 4)
        before = cache.k.clone()
        step = CpuExecutor(model, cache)
        with pytest.raises(ValueError, match=message):
            step.logits(**_places(**change))
        assert torch.equal(cache.k, before)
        step.logits(**_places())


def _linear(outs: int, ins: int) -> CpuLinear:
    return CpuLinear(torch.zeros(outs, ins), torch.zeros(outs), None)


def _stage(kind: str, write: str, read: str = "none", **other: Any) -> CpuStage:
    buffers = {name: _native.BUFFERS[other.pop(name, "none")] for name in ("save", "residual")}
    right = CpuStage(
        _native.STAGES[kind], 0, _native.BUFFERS[read], _native.BUFFERS[write],
        norm=None, linear=None, activated=False, **buffers,
    )  # fmt: skip
    return right._replace(**other)


NORM = CpuNorm(torch.zeros(8), torch.zeros(8))
STAGES = [
    _stage("embed", "x"),
    _stage("qkv", "q", "x", norm=NORM, linear=_linear(24, 8)),
    _stage("attention", "attended", "q"),
    _stage("linear", "middle", "attended", linear=_linear(8, 8), residual="x"),
    _stage("linear", "inner", "middle", norm=NORM, linear=_linear(16, 8), activated=True),
    _stage("linear", "x", "inner", linear=_linear(8, 16), residual="middle"),
    _stage("linear", "logits", "x", norm=NORM, linear=_linear(11, 8)),
]
LAYER = CpuLayer(1.0, 0, 0, False, None, None, None, None)
TABLE = torch.zeros(9, 1)


def _decoder(**change: Any) -> Any:
    right = CpuModel(
        context=9, heads=2, kv_heads=2, head_dim=4, inner=16, activation=0, gated=False, rms=False,
        unit_offset=False, whole_qk_norm=False, eps=1e-5, embedding_scale=1.0, residual_scale=1.0,
        logits_scale=1.0, attention_softcap=0.0, logits_softcap=0.0, position_offset=0,
        tokens=torch.zeros(11, 8), positions=torch.zeros(9, 8), layers=[LAYER], stages=STAGES,
    )  # fmt: skip
    return _C.Decoder(right._replace(**change))


def _head(weight: torch.Tensor, bias: torch.Tensor | None = None, scales: torch.Tensor | None = None) -> Any:
    return {"stages": [*STAGES[:-1], STAGES[-1]._replace(linear=CpuLinear(weight, bias, scales))]}


def _with(place: int, **change: Any) -> dict[str, Any]:
    return {"stages": [*STAGES[:place], STAGES[place]._replace(**change), *STAGES[place + 1 :]]}


def _layer(**change: Any) -> dict[str, Any]:
    return {"layers": [LAYER._replace(**change)]}


_B = _native.BUFFERS


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 0},
        {"heads": 3},
        {"heads": -1},
        {"heads": 2**40},
        {"kv_heads": 0},
        {"kv_heads": 3},
        {"heads": 3, "kv_heads": 2},
        {"head_dim": 0},
        {"head_dim": 2**28},
        {"inner": 0},
        {"inner": 15},
        {"gated": True},
        {"context": 8},
        {"context": 0},
        {"position_offset": 1},
        {"position_offset": -1},
        {"activation": 4},
        {"layers": []},
        {"layers": [1.0]},
        _layer(scale="x"),
        _layer(window=-1),
        _layer(rotary=2),
        _layer(rotary=3, cos=TABLE, sin=TABLE),
        _layer(rotary=6, cos=torch.zeros(9, 3), sin=torch.zeros(9, 3)),
        _layer(rotary=2, cos=TABLE, sin=torch.zeros(8, 1)),
        _layer(rotary=2, cos=TABLE, sin=TABLE.double()),
        _layer(q_norm=torch.zeros(8)),
        _layer(k_norm=torch.zeros(4).bfloat16()),
        {"stages": []},
        {"stages": [1.0]},
        {"stages": STAGES[:-1]},
        {"stages": STAGES[1:]},
        {"stages": [*STAGES, STAGES[-1]]},
        {"stages": [*STAGES[:2], *STAGES[3:]]},
        _with(0, kind=5),
        _with(0, write=_B["middle"]),
        _with(0, write=10),
        _with(1, layer=1),
        _with(1, write=_B["attended"]),
        _with(1, residual=_B["x"]),
        _with(1, linear=None),
        _with(2, layer=1),
        _with(2, linear=_linear(8, 8)),
        _with(3, norm=NORM),
        _with(3, read=_B["q"]),
        _with(3, read=_B["inner"]),
        _with(3, write=_B["none"]),
        _with(3, residual=_B["branch"]),
        _with(3, residual=_B["normed_x"]),
        _with(4, save=_B["x"]),
        _with(4, activated=False),
        _with(4, read=_B["logits"]),
        _with(5, kind=_native.STAGES["add_norm"]),
        {"eps": "small"},
        {"tokens": torch.zeros(0, 8)},
        {"tokens": torch.zeros(11, 0)},
        {"tokens": torch.zeros(8, 11).t()},
        {"tokens": torch.zeros(11, 8, dtype=torch.float16)},
        {"tokens": torch.zeros(11, 8, dtype=torch.bfloat16)},
        {"tokens": torch.zeros(11, 8, device="meta")},
        {"positions": torch.zeros(9, 7)},
        {"positions": torch.zeros(0, 8)},
        _with(6, norm=CpuNorm(torch.zeros(7), None)),
        _with(6, norm=CpuNorm(torch.zeros(16)[::2], None)),
        _with(6, norm=(torch.zeros(8), None)),
        _head(torch.zeros(10, 8)),
        _head(torch.zeros(22, 16)[::2, ::2]),
        _head(torch.zeros(11, 8, dtype=torch.int8)),
        _head(torch.zeros(11, 8, dtype=torch.int8), None, torch.zeros(10)),
        _head(torch.zeros(11, 8), None, torch.zeros(11)),
        _head(torch.zeros(11, 8, dtype=torch.uint8), None, torch.zeros(10)),
        _head(torch.zeros(11, 4, dtype=torch.uint8), None, torch.zeros(11, 1)),
        _head(torch.zeros(11, 8, dtype=torch.uint8), None, "x"),
        _head(torch.zeros(11, 8), torch.zeros(12)),
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_no_decoder_is_refused(change: dict[str, Any]) -> None:
    _decoder()
    with pytest.raises((ValueError, TypeError), match=r"(Decoder|GPT): "):
        _decoder(**change)


def test_two_threads_may_share_one_step() -> None:
    """Working memory is grown under the lock, so that nobody computes in what another has freed."""
    model = _model(PLAIN, torch.float32, False)
    with torch.inference_mode():
        cache = _filled(model, 2, 4)
        step = CpuExecutor(model, cache)
        expected = {rows: CpuExecutor(model, cache).logits(**_rows_of(rows)) for rows in (1, 2, 13)}
    wrong = []

    def run() -> None:
        with torch.inference_mode():
            for rows in [1, 2, 13] * 20:
                if not torch.equal(step.logits(**_rows_of(rows)), expected[rows]):
                    wrong.append(rows)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _rows_of(rows: int) -> dict[str, torch.Tensor]:
    """So many rows at the start of a sequence each, whose pages nobody else reads."""
    return {
        "tokens": torch.arange(rows),
        "page_table": torch.arange(rows, dtype=torch.int32)[:, None],
        "lengths": torch.zeros(rows, dtype=torch.int32),
    }


def test_what_cannot_be_done_changes_nothing() -> None:
    model = _model(PLAIN.replace(n_positions=9), torch.float32, False)
    with torch.inference_mode():
        cache = _filled(model, 1, 64)
        step = CpuExecutor(model, cache)
        for tokens in ([130], [-1]):
            with pytest.raises(ValueError, match=rf"tokens\[0\] is {tokens[0]}; 0 <= token < 130 is needed"):
                step(torch.tensor(tokens))
        assert cache.lengths == [7]
        step(torch.tensor([1]))
        step(torch.tensor([1]))
        with pytest.raises(ValueError, match="10 tokens are longer than the model's context of 9"):
            step(torch.tensor([1]))
    assert cache.lengths == [9]


def test_what_it_does_not_serve_is_left_to_the_model_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(PLAIN, torch.float32, False)

    def reason(model: GPT, dtype: torch.dtype = torch.float32) -> str:
        return CpuExecutor.serves(model, dtype) or ""

    assert reason(model) == ""
    assert "weights are torch.float16" in reason(model.half(), torch.float16)
    assert "torch.bfloat16, not in torch.float32" in reason(model.bfloat16())
    model = model.float()
    model.transformer.ln_f.bfloat16()
    assert "several dtypes" in reason(model)
    model.float().lm_head.weight = nn.Parameter(torch.randn(260, 192)[::2, ::2])
    assert "rows or columns are contiguous" in reason(model)
    assert reason(_packed(PLAIN, torch.float32)) == ""
    packed = _packed(PLAIN, torch.float32, "int4")
    packed.lm_head.values = packed.lm_head.values.t().contiguous().t()
    assert "quantised weights that are contiguous" in reason(packed)
    with torch.autocast("cpu", torch.bfloat16):
        assert reason(_model(PLAIN, torch.float32, False)) == "autocast is on"
    monkeypatch.setattr(_native, "extension", None)
    assert "not built" in reason(_model(PLAIN, torch.float32, False))
