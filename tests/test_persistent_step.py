"""The persistent step against the separate launches that it stands for: the same bits."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gptkern import GPTConfig, backend
from gptkern.config import read
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.graph import GraphExecutor
from gptkern.engine.executors.persistent import PersistentExecutor
from gptkern.engine.executors.weights import step_program
from gptkern.gpt import GPT
from gptkern.ops import _launch
from gptkern.ops._cases import tensors
from gptkern.ops._types import FP8
from gptkern.ops.decode_linear.formats import quantize
from gptkern.ops.decode_step import Linear, StepProgram, kernels, persistent_step
from gptkern.ops.decode_step.flat import flat
from gptkern.ops.decode_step.rows import TENSORS
from gptkern.ops.decode_step.table import Fields
from gptkern.quantization import Quantization
from gptkern.quantize import quantize_model

pytestmark = pytest.mark.kernels

VOCABULARY = 37


# What Llama's kin share; two key heads of four.
KIN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "smollm3, a layer without positions": {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "mistral, a window": {"model_type": "mistral", "sliding_window": 3},
    "qwen2, biases": {"model_type": "qwen2"},
    "qwen3, normed heads wider than width / heads": {"model_type": "qwen3", "head_dim": 32},
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs take the same items in more turns: the interpreter runs one program after another."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(_launch, "multiprocessors", lambda _: 2)


def make_kin(name: str, device: torch.device, dtype: torch.dtype = torch.float32, **changes: Any) -> GPT:
    model = GPT(read({**KIN, **FAMILIES[name], **changes}))
    return with_telling_weights(model, device, dtype)


def make_model(device: torch.device, dtype: torch.dtype = torch.float32, **changes: Any) -> GPT:
    sizes = {"vocab_size": VOCABULARY, "n_positions": 64, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(**{**sizes, **changes}))
    return with_telling_weights(model, device, dtype)


def with_telling_weights(model: GPT, device: torch.device, dtype: torch.dtype) -> GPT:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # norms and biases that matter
    return model.to(device=device, dtype=dtype).eval()


def filled(
    model: GPT, lengths: list[int], *, page_size: int = 4, max_seqs: int | None = None, fp8: bool = False
) -> KVCache:
    """A cache that holds random keys and values, the same ones at every call."""
    config = model.config
    generator = torch.Generator().manual_seed(3)
    options: dict[str, Any] = {"dtype": model.dtype}
    if fp8:
        shape = (len(model.spec.layers), model.spec.kv_heads)
        scales = [torch.rand(shape, generator=generator) * 0.02 + 0.01 for _ in range(2)]
        options = {"dtype": FP8, "k_scale": scales[0], "v_scale": scales[1]}
    cache = KVCache.for_config(
        config,
        max_seqs=max_seqs or len(lengths),
        max_len=model.spec.context,
        page_size=page_size,
        device=model.device,
        **options,
    )
    for kept in (cache.k, cache.v):
        kept.copy_(torch.randn(kept.shape, generator=generator))
    cache.allocate(len(lengths))
    cache.reserve(lengths)
    cache.advance(lengths)
    return cache


def lengths_of(cache: KVCache) -> torch.Tensor:
    """Tokens of each sequence, as the op takes them."""
    return torch.tensor(cache.lengths, dtype=torch.int32, device=cache.device)


def compare(model: GPT, lengths: list[int], *, steps: int = 2, **options: Any) -> None:
    """Both kinds of step on caches that are alike: logits, caches and lengths."""
    caches = [filled(model, lengths, **options) for _ in range(2)]
    separate = GraphExecutor(model, caches[0])
    persistent = PersistentExecutor(model, caches[1])
    for _ in range(steps):
        tokens = torch.randint(VOCABULARY, (len(lengths),), device=model.device)
        expected = separate(tokens)
        assert expected.isfinite().all()
        assert torch.equal(persistent(tokens), expected)
    for name in ("k", "v", "page_table"):
        a, b = (getattr(cache, name) for cache in caches)
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
    assert caches[1].lengths == [length + steps for length in lengths]
    assert persistent._table.lengths.tolist()[: len(lengths)] == caches[1].lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_bits(device: torch.device, dtype: torch.dtype, bias: bool) -> None:
    compare(make_model(device, dtype, bias=bias), [7, 1, 4])


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_every_batch(device: torch.device, batch: int) -> None:
    compare(make_model(device), [3 * i % 11 for i in range(batch)], steps=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"activation_function": "relu"},
        {"n_head": 3, "n_embd": 60, "n_layer": 1},
        {"n_embd": 160, "n_inner": 96},  # splits of K, and an inner width of its own
        {"tie_word_embeddings": False},
        {"n_layer": 4},
        {"model_type": "openai-gpt", "n_layer": 3},
        {"model_type": "openai-gpt", "n_layer": 1, "n_embd": 160},
    ],
    ids=str,
)
def test_other_models(device: torch.device, changes: dict[str, Any]) -> None:
    compare(make_model(device, **changes), [5, 2], steps=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(device: torch.device, name: str) -> None:
    compare(make_kin(name, device), [5, 2], steps=1)


@pytest.mark.parametrize("format", ["plain", "int8", "fp8", "int4"])
@pytest.mark.parametrize("name", ["llama", "qwen3, normed heads wider than width / heads"])
def test_families_in_bfloat16_and_fewer_bits(device: torch.device, name: str, format: str) -> None:
    model = make_kin(name, device, torch.bfloat16, num_hidden_layers=1, intermediate_size=128)
    if format != "plain":
        options = {"group_size": 32} if format == "int4" else {}
        quantize_model(model, Quantization.make(model.config, format, **options))
    compare(model, [5], steps=1, fp8=format == "fp8")


def test_floats_beside_packed_matrices(device: torch.device) -> None:
    """Each row has its own format: a layer's product may be floats where the next layer's is packed."""
    model = make_kin("llama", device)
    quantization = Quantization.make(model.config, "int4", group_size=32)
    quantize_model(model, replace(quantization, floats=("lm_head", "transformer.h.0.mlp.c_proj")))
    compare(model, [5], steps=1)


def test_a_family_of_many_query_heads_a_key_head(device: torch.device) -> None:
    """More heads than a block of attention takes together."""
    compare(
        make_kin(
            "llama",
            device,
            num_attention_heads=66,
            num_key_value_heads=1,
            head_dim=8,
            num_hidden_layers=1,
        ),
        [5],
        steps=1,
    )


def test_reasons_of_the_persistent_executor(device: torch.device) -> None:
    qwen3 = make_kin("qwen3, normed heads wider than width / heads", device, head_dim=80, num_hidden_layers=1)
    strided, shifted = (make_kin("llama", device, num_hidden_layers=1) for _ in range(2))
    strided.lm_head.weight = nn.Parameter(torch.randn(VOCABULARY, 128, device=device)[:, ::2])
    shifted.lm_head.weight = nn.Parameter(
        torch.randn(VOCABULARY * 64 + 1, device=device)[1:].view(VOCABULARY, 64)
    )
    with backend("kernel"):
        for model, reason in (
            (
                qwen3,
                "in torch.float32 the persistent step norms heads of up to 64 elements; this model's have 80",
            ),
            (strided, "reads contiguous weights at multiples of 16 bytes; lm_head.weight has strides"),
            (shifted, "reads contiguous weights at multiples of 16 bytes; lm_head.weight has strides"),
        ):
            assert reason in (PersistentExecutor.serves(model, torch.float32) or "")
        assert PersistentExecutor.serves(qwen3.half(), torch.float16) is None
        assert PersistentExecutor.serves(make_kin("llama", device), torch.float32) is None


def test_contexts_of_several_splits(device: torch.device) -> None:
    model = make_model(device, n_positions=512, n_layer=1)
    compare(model, [400, 1, 127, 128], page_size=16, steps=2)


@pytest.mark.parametrize(
    ("format", "zero_point"),
    [("int8", False), ("fp8", False), ("int4", False), ("int4", True)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_fewer_bits(
    device: torch.device, dtype: torch.dtype, format: str, zero_point: bool
) -> None:
    model = make_model(device, dtype, n_embd=64, n_layer=1)
    options = {"group_size": 32, "zero_point": zero_point} if format == "int4" else {}
    quantize_model(model, Quantization.make(model.config, format, **options))
    compare(model, [5, 2], steps=1)


def test_an_fp8_cache(device: torch.device) -> None:
    compare(make_model(device, torch.bfloat16), [5, 2], fp8=True)


def test_bits_do_not_depend_on_how_many_programs_there_are(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(device, n_positions=512, n_layer=1)
    tokens = torch.tensor([7, 8], device=device)
    found = []
    for multiprocessors in (1, 5, 132):
        monkeypatch.setattr(_launch, "multiprocessors", lambda _, count=multiprocessors: count)
        found.append(PersistentExecutor(model, filled(model, [300, 9], page_size=16))(tokens))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_padding_of_a_bucket_writes_nothing(device: torch.device) -> None:
    model = make_model(device, n_layer=1)
    caches = [filled(model, [7, 1, 4], max_seqs=4) for _ in range(2)]
    tokens = torch.tensor([7, 8, 9], device=device)
    expected = GraphExecutor(model, caches[0])(tokens)
    step, cache = PersistentExecutor(model, caches[1]), caches[1]
    cache.reserve([1, 1, 1])
    step._table.lay(
        [(cache.pages(i), length) for i, length in zip(cache.sequences, cache.lengths, strict=True)]
    )
    step._tokens[:3] = tokens
    step._live.fill_(3)
    step._look_for_weights()
    with torch.no_grad():
        padded = step.run(4)
    assert torch.equal(padded[:3], expected)
    assert padded[3].isfinite().all()
    assert step._table.lengths.tolist()[:4] == [8, 2, 5, 0]
    assert torch.equal(caches[0].k, caches[1].k)
    assert torch.equal(caches[0].v, caches[1].v)


def test_weights_stay_live_and_may_move(device: torch.device) -> None:
    model = make_model(device, n_layer=1)
    tokens = torch.tensor([7, 8], device=device)
    step = PersistentExecutor(model, filled(model, [5, 2]))
    other = GraphExecutor(model, filled(model, [5, 2]))
    before = step(tokens)
    assert torch.equal(before, other(tokens))
    program = other._program
    assert torch.equal(step(tokens), other(tokens))
    assert other._program is program
    weight = model.transformer.h[0].mlp.c_fc.weight
    with torch.no_grad():
        weight.mul_(2.0)
    assert torch.equal(step(tokens), other(tokens))
    assert other._program is program
    weight.data = weight.data.clone() * 0.5
    assert torch.equal(step(tokens), other(tokens))
    assert other._program is not program


@pytest.mark.parametrize("what", ["a parameter", "a module"])
def test_weights_may_be_replaced(device: torch.device, what: str) -> None:
    model = make_model(device, n_layer=1)
    tokens = torch.tensor([7, 8], device=device)
    steps = [kind(model, filled(model, [5, 2])) for kind in (GraphExecutor, PersistentExecutor)]
    for step in steps:
        step(tokens)
    mlp = model.transformer.h[0].mlp
    weight = nn.Parameter(mlp.c_fc.weight.detach() * 3)
    if what == "a parameter":
        mlp.c_fc.weight = weight
    else:
        layer = nn.Linear(*mlp.c_fc.weight.shape[::-1], device=device)
        layer.weight, layer.bias = weight, mlp.c_fc.bias
        mlp.c_fc = layer
    for step in steps:
        again = filled(model, [6, 3])
        again.k.copy_(step._cache.k)
        again.v.copy_(step._cache.v)
        assert torch.equal(step(tokens), type(step)(model, again)(tokens))


def _launches(step: GraphExecutor, tokens: torch.Tensor) -> list[_launch.Launch]:
    found: list[_launch.Launch] = []

    def note(launch: _launch.Launch) -> bool:
        found.append(launch)
        return True

    with _launch.observe(note), torch.no_grad():
        step(tokens)
    return found


def test_more_than_8_sequences_take_two_launches(device: torch.device) -> None:
    model = make_model(device, n_layer=1)
    counts = []
    for batch in (8, 9):
        step = PersistentExecutor(model, filled(model, [2] * batch))
        names = [
            launch.name for launch in _launches(step, torch.zeros(batch, dtype=torch.int64, device=device))
        ]
        assert set(names) == {"persistent_step_kernel"}
        counts.append(len(names))
    assert counts[1] == 2 * counts[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there one launch runs all phases")
def test_interpreted_phases_are_launched_one_by_one() -> None:
    model = make_model(torch.device("cpu"), n_layer=2)
    step = PersistentExecutor(model, filled(model, [5]))
    launches = _launches(step, torch.zeros(1, dtype=torch.int64))
    assert [launch.name for launch in launches] == ["persistent_step_kernel"] * 12
    # Phases first and first + 1 follow 26 tensors and the number of rows.
    assert [launch.args[27:29] for launch in launches] == [(p, p + 1) for p in range(12)]


def test_fields_are_where_the_kernel_reads_them() -> None:
    assert [getattr(kernels, name.upper()).value for name in Fields._fields] == list(
        range(len(Fields._fields))
    )
    assert kernels.FIELDS.value == len(Fields._fields)
    columns = [name.upper().replace(" ", "_") + "_AT" for name in TENSORS]
    first = kernels.FETCH.value + 1
    assert [getattr(kernels, name).value for name in columns] == list(range(first, kernels.COLUMNS.value))


def test_it_needs_kernels() -> None:
    model = make_model(torch.device("cpu"))
    with backend("reference"), pytest.raises(ValueError, match="a CUDA device is needed"):
        PersistentExecutor(model, filled(model, [3]))


def _program(model: GPT) -> StepProgram:
    return step_program(model)


def changed(program: StepProgram, number: int, **changes: Any) -> StepProgram:
    """The program with one of its rows changed."""
    rows = list(program.rows)
    rows[number] = replace(rows[number], **changes)
    return replace(program, rows=tuple(rows))


def test_rows_that_do_not_fit(device: torch.device) -> None:
    given = arguments(device, n_layer=2)
    program = given.pop("program")
    head = program.rows[-1].product.weight
    wide = torch.randn(64, 33, device=device)
    narrow = Linear(torch.randn(30, 32, device=device))
    norm = torch.ones(32, device=device)
    int4 = quantize(torch.randn(37, 32, device=device), "int4", group_size=32)
    old = replace(int4, scales=int4.scales.float())
    with pytest.raises(ValueError, match="the last of its rows must write 'logits'"):
        replace(program, rows=program.rows[:-1])
    with pytest.raises(ValueError, match="row 0 reads 'inner', which nothing has written"):
        changed(program, 0, read="inner")
    with pytest.raises(ValueError, match="the row that writes 'logits' has no weight"):
        changed(program, -1, linear=None)
    cases: list[tuple[int, dict[str, Any], str]] = [
        (0, {"linear": Linear(wide)}, "row 0 reads 32 elements, its weight takes 33"),
        (2, {"linear": narrow}, "row 2 has 30 outputs; it adds 'x', which has 32"),
        (7, {"linear": narrow}, "row 7 has 30 outputs; it writes 'middle', which has 32 elements"),
        (0, {"norm": (norm, None, 0.5)}, "row 3 has eps of its own"),
        (3, {"norm": (norm.half(), None, 1e-5)}, "norm weight of row 3 is torch.float16, the embeddings"),
        (1, {"kind": "add_norm"}, "row 1 is of kind 'add_norm', which is not among"),
        (-1, {"linear": Linear(wide[:, 1:])}, "contiguous and a multiple of 16"),
        (-1, {"linear": Linear(old)}, "scales of row 10, int4, are torch.float32; torch.float16 is needed"),
        (-1, {"linear": Linear(wide.view(-1)[1:2049].view(64, 32))}, "a multiple of 16"),
        (-1, {"linear": Linear(head, norm)}, r"the bias of row 10 has shape \(32,\); \(37,\) is needed"),
    ]
    before = given["seq_lens"].clone()
    for number, changes, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            persistent_step(changed(program, number, **changes), **given)
    assert torch.equal(given["seq_lens"], before)


def test_bad_arguments_are_named(device: torch.device) -> None:
    model = make_model(device)
    program, cache = _program(model), filled(model, [3, 4])
    live = torch.ones(1, dtype=torch.int32, device=device)
    given: dict[str, Any] = {
        "program": program,
        "tokens": torch.zeros(2, dtype=torch.int64, device=device),
        "live": live,
        "k_cache": cache.k,
        "v_cache": cache.v,
        "page_table": cache.page_table,
        "seq_lens": lengths_of(cache),
    }
    scales = (torch.ones(2, 2, device=device), torch.ones(2, 2, device=device))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tokens": torch.zeros(9, dtype=torch.int64, device=device)}, "tokens has 9 rows; 1 to 8"),
        ({"tokens": torch.zeros(2, dtype=torch.int32, device=device)}, "tokens is int32; accepted are int64"),
        ({"seq_lens": lengths_of(cache)[:1]}, r"seq_lens has shape \(1,\); \(2,\) is needed"),
        ({"page_table": cache.page_table[:1]}, r"page_table has shape \(1, 16\); \(2, 16\) is needed"),
        ({"k_cache": cache.k[:1]}, "k_cache has shape"),
        ({"v_cache": cache.v.half()}, "v_cache is float16; accepted are float32"),
        ({"k_cache": cache.k.transpose(-1, -2).contiguous().transpose(-1, -2)}, "the last two must be"),
        ({"scales": scales}, "k_cache is float32; accepted are float8_e4m3fn"),
    ]
    before = given["seq_lens"].clone()
    for changes, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            persistent_step(**{**given, **changes})
    assert torch.equal(given["seq_lens"], before)


def arguments(
    device: torch.device, dtype: torch.dtype = torch.float32, kind: str = "plain", **changes: Any
) -> dict[str, Any]:
    """A call of a model with one layer by default, and nothing in it that requires grad."""
    model = make_model(device, dtype, **{"n_layer": 1, **changes})
    if kind != "plain":
        options: dict[str, Any] = {"group_size": 32, "zero_point": True} if kind == "int4" else {}
        quantize_model(model, Quantization.make(model.config, kind, **options))
    cache = filled(model.requires_grad_(False), [5, 2], fp8=kind == "fp8")
    cache.reserve([1, 1])
    return {
        "program": _program(model),
        "tokens": torch.tensor([7, 8], device=device),
        "live": torch.full((1,), 2, dtype=torch.int32, device=device),
        "k_cache": cache.k,
        "v_cache": cache.v,
        "page_table": cache.page_table,
        "seq_lens": lengths_of(cache),
        "scales": cache.storage.kv_scales,
    }


def mapped(value: Any, change: Any) -> Any:
    """``value`` with every tensor in it changed, those in dataclasses too."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(mapped(item, change) for item in value)
    if isinstance(value, dict):
        return {name: mapped(item, change) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: mapped(getattr(value, f.name), change) for f in fields(value)})
    return value


# (dtype, what is packed, changes of the model)
KINDS = [
    pytest.param(torch.float32, "plain", {}, id="plain"),
    pytest.param(torch.bfloat16, "plain", {"model_type": "openai-gpt"}, id="norms after their branches"),
    pytest.param(torch.float32, "int4", {"n_embd": 64}, id="int4 with zeros"),
    pytest.param(torch.bfloat16, "fp8", {"bias": False}, id="fp8, its cache too, without bias"),
]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("plain", {}),
        ("plain", {"model_type": "openai-gpt"}),
        ("int4", {"n_embd": 64}),
        ("fp8", {"bias": False}),
    ],
    ids=str,
)
def test_the_reference(device: torch.device, kind: str, changes: dict[str, Any]) -> None:
    """The reference gives the kernel's logits, keys, values and lengths, but for rounding."""
    given = arguments(device, kind=kind, n_layer=2, **changes)
    alike = mapped(given, torch.clone)
    with backend("reference"):
        expected = persistent_step(**alike)
    torch.testing.assert_close(persistent_step(**given), expected, rtol=1e-4, atol=1e-4)
    for name in ("k_cache", "v_cache", "seq_lens"):
        torch.testing.assert_close(given[name].float(), alike[name].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "kind", "changes"), KINDS)
def test_it_compiles_without_a_graph_break(
    device: torch.device, dtype: torch.dtype, kind: str, changes: dict[str, Any]
) -> None:
    """The compiled call gives the bits of the eager one, in the logits and in what it changes in place."""
    torch.compiler.reset()
    given = arguments(device, dtype, kind, **changes)
    program = given.pop("program")
    alike = mapped(given, torch.clone)

    def step(**call: Any) -> torch.Tensor:
        return persistent_step(program, **call) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**given), step(**alike))
    for got, expected in zip(tensors(given), tensors(alike), strict=True):
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    assert given["seq_lens"].tolist() == [6, 3]


def test_weights_gathered_in_a_compiled_function(device: torch.device) -> None:
    """A head that the compiled function itself computes is read at its own address."""
    torch.compiler.reset()
    given = arguments(device)
    program = given.pop("program")
    alike = mapped(given, torch.clone)

    def step(head: torch.Tensor, **call: Any) -> torch.Tensor:
        *rows, last = program.rows
        return persistent_step(replace(program, rows=(*rows, replace(last, linear=Linear(head * 2)))), **call)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    head = program.rows[-1].product.weight
    assert torch.equal(compiled(head, **given), step(head, **alike))


@pytest.mark.parametrize("where", ["meta", "fake"])
@pytest.mark.parametrize("kind", ["plain", "int4"])
def test_shapes_alone(device: torch.device, where: str, kind: str) -> None:
    mode = FakeTensorMode()
    given = arguments(device, torch.bfloat16, kind)
    bare = mapped(given, (lambda t: t.to("meta")) if where == "meta" else mode.from_tensor)
    with mode if where == "fake" else nullcontext(), _launch.observe(lambda _: pytest.fail("a launch")):
        logits = persistent_step(**bare)
    assert (logits.shape, logits.dtype) == ((2, VOCABULARY), torch.bfloat16)
    assert logits.device == bare["tokens"].device


def test_opcheck(device: torch.device) -> None:
    given = arguments(device)
    program = given.pop("program")
    assert given.pop("scales") is None
    torch.library.opcheck(torch.ops.gptkern.persistent_step, (*flat(program), *given.values(), None, None))


def test_the_registered_op_refuses_what_the_function_refuses(device: torch.device) -> None:
    given = arguments(device)
    weights, scales = flat(given.pop("program")), (None, None)
    assert given.pop("scales") is None
    op = torch.ops.gptkern.persistent_step
    short = {**given, "seq_lens": given["seq_lens"][:1]}
    with pytest.raises(ValueError, match=r"seq_lens has shape \(1,\); \(2,\) is needed"):
        op(*weights, *short.values(), *scales)
    with pytest.raises(ValueError, match="k_scale and v_scale: both or neither"):
        op(*weights, *given.values(), torch.ones(1, 2, device=device), None)
    tokens, positions, tensors, *settings = weights
    with pytest.raises(
        ValueError, match=r"\(59, 78, 30\) weights, numbers and factors for 6 rows; \(60, 78, 30"
    ):
        op(tokens, positions, tensors[:-1], *settings, *given.values(), *scales)
    with pytest.raises(ValueError, match="a weight is None"):
        op(tokens, positions, [None] * len(tensors), *settings, *given.values(), *scales)


def test_a_weight_that_requires_grad_is_refused(device: torch.device) -> None:
    given = arguments(device)
    given["program"].rows[-1].norm[0].requires_grad_()
    before = given["seq_lens"].clone()
    for call in (persistent_step, torch.compile(persistent_step, backend="aot_eager", fullgraph=True)):
        with pytest.raises(Exception, match="a weight requires grad; it is forward only"):
            call(**given)
        assert torch.equal(given["seq_lens"], before)
    with torch.no_grad():
        persistent_step(**given)


def test_launch_rows_agree_on_warps() -> None:
    """How a tile's sums are laid out depends on the number of warps, of which a kernel has one."""
    for arch in (80, 90, 100):
        for name in ("persistent_step", "decode_linear", "decode_attention", "decode_heads"):
            for row in _launch.table(arch)[name]:
                wide = arch == 80 and row.get("dtype") == "fp32" and row.get("max_head_dim") == 256
                # Wider heads with a norm: the persistent step refuses them.
                wide = wide or (name == "decode_heads" and "max_head_dim" not in row)
                assert row["num_warps"] == (8 if wide else 4), (arch, name, row)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8])
def test_many_steps_on_a_gpu(device: torch.device, batch: int) -> None:
    """Graphs of one cooperative launch, step after step: the same tokens, and counters left at zero."""
    from gptkern.ops._counters import _counters

    model = make_model(device, torch.bfloat16, n_positions=1024, n_embd=768, n_head=12, n_layer=4)
    steps = [
        kind(model, filled(model, [3] * batch, page_size=128)) for kind in (GraphExecutor, PersistentExecutor)
    ]
    for _ in range(500):
        tokens = torch.randint(VOCABULARY, (batch,), device=device)
        a, b = (step(tokens) for step in steps)
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not any(counter.any() for counter in _counters.values())
