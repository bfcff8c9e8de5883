"""The decode step's linear layers and embedding against float64, and bit for bit against themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptkern import backend
from gptkern.ops import _launch
from gptkern.ops.decode_embed import decode_embed
from gptkern.ops.decode_linear import decode_linear, decode_qkv, reference

# (width, outputs): whole tiles and cut off ones, K in one piece (up to 32 columns) and split.
SHAPES = [(16, 16), (20, 40), (100, 70), (33, 17), (300, 40)]


def tensors(rows: int, width: int, outputs: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    def value(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    return {
        "x": value(rows, width) * 2 + 3,
        "weight": value(outputs, width),
        "bias": value(outputs),
        "norm": (value(width), value(width), 1e-5),
        "residual": value(rows, outputs),
    }


def to_float64(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(to_float64, value))
    return value.double() if isinstance(value, torch.Tensor) else value


def check(given: dict[str, Any], activation: str = "none") -> None:
    out = decode_linear(**given, activation=activation)

    def plain(given: dict[str, Any]) -> torch.Tensor:
        every = {"bias": None, "norm": None, "residual": None, "normed_out": None, **given}
        return reference.decode_linear(**every, activation=activation)

    close(out, plain(given), plain({name: to_float64(value) for name, value in given.items()}))


def close(out: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """At most twice the error of the plain expression in the same dtype, plus an ulp of its scale."""
    assert out.dtype == plain.dtype
    ulp = torch.finfo(out.dtype).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + ulp


def without(given: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize(("width", "outputs"), SHAPES)
def test_every_shape(rows: int, width: int, outputs: int, device: torch.device) -> None:
    check(tensors(rows, width, outputs, device, torch.float32), "gelu_tanh")


@pytest.mark.parametrize("rows", [17, 64, 70])
def test_many_rows(rows: int, device: torch.device) -> None:
    check(tensors(rows, 100, 20, device, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("width", "outputs"), [(300, 40), (50, 70)])
def test_half_precision(dtype: torch.dtype, width: int, outputs: int, device: torch.device) -> None:
    check(tensors(2, width, outputs, device, dtype), "gelu_tanh")


@pytest.mark.parametrize("absent", [("bias",), ("norm",), ("residual",), ("bias", "norm", "residual")])
def test_what_may_be_left_out(absent: tuple[str, ...], device: torch.device) -> None:
    check(without(tensors(3, 40, 20, device, torch.float32), *absent))


def test_norm_without_bias(device: torch.device) -> None:
    given = tensors(3, 40, 20, device, torch.float32)
    check({**given, "norm": (given["norm"][0], None, 1e-3)})


@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "gelu", "relu", "silu"])
def test_activations(activation: str, device: torch.device) -> None:
    check(without(tensors(3, 40, 20, device, torch.float32), "norm"), activation)


def test_moments_do_not_cancel(device: torch.device) -> None:
    given = tensors(3, 300, 20, device, torch.float32)
    given["x"] += 1000.0
    check(given)


def test_what_the_norm_gave_is_kept(device: torch.device) -> None:
    given = tensors(5, 300, 40, device, torch.float32)
    kept = torch.full_like(given["x"], torch.nan)
    with_kept = decode_linear(**given, normed_out=kept)
    assert torch.equal(with_kept, decode_linear(**given))
    close(
        kept,
        reference.normed(given["x"], given["norm"]),
        reference.normed(*map(to_float64, (given["x"], given["norm"]))),
    )


@pytest.mark.parametrize(("width", "outputs"), [(300, 40), (30, 40)])
def test_a_row_is_bitwise_the_same_alone_and_among_others(
    width: int, outputs: int, device: torch.device
) -> None:
    given = tensors(16, width, outputs, device, torch.float32)
    together = decode_linear(**given, activation="gelu")
    for row in (0, 7, 15):
        one = slice(row, row + 1)
        alone = {**given, "x": given["x"][one], "residual": given["residual"][one]}
        assert torch.equal(decode_linear(**alone, activation="gelu"), together[one])


def test_nan_stays_in_its_row(device: torch.device) -> None:
    given = tensors(3, 300, 20, device, torch.float32)
    clean = decode_linear(**given)
    given["x"][1, 5] = torch.nan
    out = decode_linear(**given)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


def test_weights_of_any_row_stride(device: torch.device) -> None:
    given = tensors(2, 40, 20, device, torch.float32)
    expected = decode_linear(**given)
    given["weight"] = torch.cat([given["weight"], given["weight"]], 1)[:, :40]
    assert torch.equal(decode_linear(**given), expected)


def test_counters_are_left_at_zero(device: torch.device) -> None:
    given = tensors(2, 300, 40, device, torch.float32)
    first = decode_linear(**given)
    assert all(torch.equal(decode_linear(**given), first) for _ in range(3))


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_go_into_the_cache(kv_heads: int, dtype: torch.dtype, device: torch.device) -> None:
    head_dim, heads, width, rows = 12, 3, 40, 5
    given = tensors(rows, width, (heads + 2 * kv_heads) * head_dim, device, dtype)
    layer = torch.zeros(2, 7, 4, kv_heads, head_dim, device=device, dtype=dtype)
    k_cache, v_cache = layer[0], layer[1]
    slots = torch.tensor([27, 0, -1, 13, 14], device=device)
    options = {"bias": given["bias"], "norm": given["norm"]}
    q = decode_qkv(given["x"], given["weight"], given["bias"], k_cache, v_cache, slots, norm=given["norm"])
    both = decode_linear(given["x"], given["weight"], **options)
    parts = both.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], 1)
    assert torch.equal(q, parts[0])
    for cache, new in zip((k_cache, v_cache), parts[1:], strict=True):
        expected = torch.zeros(28, kv_heads * head_dim, device=device, dtype=dtype)
        expected[slots[slots >= 0]] = new[slots >= 0]
        assert torch.equal(cache.flatten(0, 1).flatten(1), expected)


def embedding(device: torch.device) -> tuple[Any, ...]:
    return (
        torch.tensor([3, 10, 0, 7], device=device),
        torch.tensor([3], dtype=torch.int32, device=device),
        torch.randn(11, 1100, device=device),
        torch.randn(9, 1100, device=device),
        torch.tensor([[4, 1, 9], [3, 9, 9], [8, 2, 5], [6, 6, 6]], dtype=torch.int32, device=device),
        torch.tensor([4, 0, 7, 0], dtype=torch.int32, device=device),
        3,
    )


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_embedding(implementation: Any, device: torch.device) -> None:
    tokens, live, token_weight, position_weight, table, lens, page_size = embedding(device)
    with backend(implementation):
        x, slots = decode_embed(tokens, live, token_weight, position_weight, table, lens, page_size)
    assert slots.tolist() == [1 * 3 + 1, 3 * 3, 5 * 3 + 1, -1]
    assert lens.tolist() == [5, 1, 8, 0]
    assert torch.equal(x[:3], token_weight[[3, 10, 0]] + position_weight[[4, 0, 7]])
    assert not x[3].any()


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_embedding_without_positions_with_an_offset_and_scaled(
    implementation: Any, device: torch.device
) -> None:
    tokens, live, words, places, table, lens, page_size = embedding(device)
    with backend(implementation):
        x, slots = decode_embed(tokens, live, words, None, table, lens.clone(), page_size, scale=3.0)
        assert torch.equal(x[:3], words[[3, 10, 0]] * 3.0)
        assert slots.tolist() == [1 * 3 + 1, 3 * 3, 5 * 3 + 1, -1]
        x, _ = decode_embed(
            tokens, live, words, places, table, lens.clone(), page_size, position_offset=1, scale=2.0
        )
        assert torch.equal(x[:3], words[[3, 10, 0]] * 2.0 + places[[5, 1, 8]])
        if device.type == "cpu":
            with pytest.raises(ValueError, match="seq_lens holds 7; 0 to 6 is accepted"):
                decode_embed(tokens, live, words, places, table, lens.clone(), page_size, position_offset=2)


def test_one_launch(device: torch.device) -> None:
    names: list[str] = []

    def note(launch: _launch.Launch) -> bool:
        names.append(launch.name)
        return True

    with _launch.observe(note):
        decode_linear(**tensors(3, 300, 40, device, torch.float32))
    assert names == ["decode_linear_kernel"]


def qkv(device: torch.device) -> tuple[Any, ...]:
    """Arguments of ``decode_qkv``: 5 rows, one of them written nowhere."""
    given = tensors(5, 40, 72, device, torch.float32)
    caches = torch.zeros(2, 7, 4, 2, 12, device=device)
    slots = torch.tensor([27, 0, -1, 13, 14], device=device)
    return given["x"], given["weight"], given["bias"], caches[0], caches[1], slots, given["norm"]


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_registered_ops_agree_with_their_schemas(implementation: Any, device: torch.device) -> None:
    given = tensors(3, 100, 20, device, torch.float32)
    x, weight, bias = given["x"], given["weight"], given["bias"]
    ops = torch.ops.gptkern
    with backend(implementation):
        kept = torch.empty_like(x)
        torch.library.opcheck(
            ops.decode_linear, (x, weight, bias, *given["norm"], "gelu", given["residual"], kept)
        )
        torch.library.opcheck(ops.decode_linear, (x, weight, None, None, None, 0.0, "none", None, None))
        x, weight, bias, k_cache, v_cache, slots, norm = qkv(device)
        kept = torch.empty_like(x)
        torch.library.opcheck(ops.decode_qkv, (x, weight, bias, *norm, k_cache, v_cache, slots, kept))
        torch.library.opcheck(ops.decode_embed, embedding(device))


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_a_step_compiles_into_one_graph(implementation: Any, device: torch.device) -> None:
    x, weight, bias, k_cache, v_cache, slots, norm = qkv(device)
    tokens, live, token_weight, position_weight, table, lens, page_size = embedding(device)
    head = torch.randn(20, 1100, device=device)

    def step(
        k_cache: torch.Tensor, v_cache: torch.Tensor, lens: torch.Tensor, kept: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        embedded, places = decode_embed(tokens, live, token_weight, position_weight, table, lens, page_size)
        q = decode_qkv(x, weight, bias, k_cache, v_cache, slots, norm=norm, normed_out=kept)
        return places, q, decode_linear(embedded, head, activation="relu")

    def changed() -> tuple[torch.Tensor, ...]:
        return k_cache.clone(), v_cache.clone(), lens.clone(), torch.zeros_like(x)

    with backend(implementation):
        expected_state, state = changed(), changed()
        expected = step(*expected_state)
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(*state)
    for ours, theirs in zip((*found, *state), (*expected, *expected_state), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(state[2], lens)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual", "norm weight", "token_weight"])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_refused(name: str, compiled: bool, device: torch.device) -> None:
    given, embedded = tensors(2, 40, 20, device, torch.float32), list(embedding(device))
    values = {**given, "norm weight": given["norm"][0], "token_weight": embedded[2]}
    values[name].requires_grad_()

    def call() -> Any:
        return decode_embed(*embedded) if name == "token_weight" else decode_linear(**given)

    # A compiler's errors quote the op's.
    error: type[Exception] = Exception if compiled else ValueError
    with pytest.raises(error, match=r"requires grad; it is forward only: use torch\.no_grad"):
        (torch.compile(call, fullgraph=True, backend="eager") if compiled else call)()
    with torch.no_grad():
        call()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "x has shape"),
        ({"x": torch.zeros(2, 40, dtype=torch.int32)}, TypeError, "x is int32"),
        ({"x": torch.zeros(40, 2).T}, ValueError, "x has strides"),
        ({"weight": torch.zeros(20, 41)}, ValueError, "weight has 41 columns, x 40"),
        ({"weight": torch.zeros(40, 20).T}, ValueError, "weight has strides"),
        ({"weight": torch.zeros(20, 40, dtype=torch.float16)}, TypeError, "weight is torch.float16, x"),
        ({"bias": torch.zeros(21)}, ValueError, "bias has shape"),
        ({"norm": (torch.zeros(39), None, 1e-5)}, ValueError, "norm weight has shape"),
        ({"norm": (torch.zeros(40), torch.zeros(1), 1e-5)}, ValueError, "norm bias has shape"),
        ({"activation": "tanh"}, ValueError, "activation is 'tanh'"),
        ({"residual": torch.zeros(2, 21)}, ValueError, "residual has shape"),
        ({"residual": torch.zeros(20, 2).T}, ValueError, "residual has strides"),
        ({"normed_out": torch.zeros(2, 40), "norm": None}, ValueError, "without a norm"),
        ({"normed_out": torch.zeros(2, 41)}, ValueError, "normed_out has shape"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = tensors(2, 40, 20, torch.device("cpu"), torch.float32)
    with pytest.raises(error, match=message):
        decode_linear(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.update(slots=torch.zeros(3, dtype=torch.int64)), "slots has shape"),
        (lambda g: g.update(k_cache=torch.zeros(2, 4, 3, 12)), "v_cache has shape"),
        (lambda g: g.update(k_cache=torch.zeros(2, 4, 12, 2).transpose(2, 3)), "heads must be contiguous"),
        (
            lambda g: g.update(k_cache=torch.zeros(2, 4, 6, 12), v_cache=torch.zeros(2, 4, 6, 12)),
            "weight has 72 rows; keys and values alone are 144",
        ),
    ],
)
def test_bad_caches_are_named(change: Callable[[dict[str, Any]], None], message: str) -> None:
    given: dict[str, Any] = {
        "x": torch.zeros(2, 40),
        "weight": torch.zeros(72, 40),
        "bias": None,
        "k_cache": torch.zeros(2, 4, 2, 12),
        "v_cache": torch.zeros(2, 4, 2, 12),
        "slots": torch.zeros(2, dtype=torch.int64),
    }
    change(given)
    with pytest.raises(ValueError, match=message):
        decode_qkv(**given)
