"""Instructions of the executor against what the ISA defines, worked out apart from it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from ptx_support import TILE, module, run, unary

from gptkern.testing.ptx import TensorMap, execute

NUMBERS = [0, 1, -1, 2, 7, -7, 31, 32, 33, 255, -256, 65535, -65536, 1 << 30, -(1 << 31), (1 << 31) - 1]
INTEGERS = torch.tensor(NUMBERS * 2, dtype=torch.int32)


def signed(value: int, bits: int = 32) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def by_halves(x: int, of: Callable[[int, int], int]) -> int:
    """``of`` each signed half and its number, the lower first."""
    low, high = (of(signed(x >> 16 * i, 16), i) & 0xFFFF for i in (0, 1))
    return low | high << 16


def truncated(a: int, b: int) -> int:
    return -1 if b == 0 else int(Fraction(a, b))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s32 OUT, IN, 5", lambda x: x + 5),
        ("sub.s32 OUT, IN, 5", lambda x: x - 5),
        ("mul.lo.s32 OUT, IN, -3", lambda x: x * -3),
        ("mul.hi.s32 OUT, IN, 123456789", lambda x: x * 123456789 >> 32),
        ("mul.hi.u32 OUT, IN, 4000000000", lambda x: (x & 0xFFFFFFFF) * 4000000000 >> 32),
        ("mad.lo.s32 OUT, IN, 3, 9", lambda x: x * 3 + 9),
        ("div.s32 OUT, IN, 7", lambda x: truncated(x, 7)),
        ("div.s32 OUT, IN, -7", lambda x: truncated(x, -7)),
        ("div.u32 OUT, IN, 7", lambda x: (x & 0xFFFFFFFF) // 7),
        ("rem.s32 OUT, IN, 7", lambda x: x - 7 * truncated(x, 7)),
        ("rem.u32 OUT, IN, 7", lambda x: (x & 0xFFFFFFFF) % 7),
        ("neg.s32 OUT, IN", lambda x: -x),
        ("abs.s32 OUT, IN", abs),
        ("not.b32 OUT, IN", lambda x: ~x),
        ("and.b32 OUT, IN, 0xFF0F", lambda x: x & 0xFF0F),
        ("or.b32 OUT, IN, 0xFF0F", lambda x: x | 0xFF0F),
        ("xor.b32 OUT, IN, 0xFF0F", lambda x: x ^ 0xFF0F),
        ("shl.b32 OUT, IN, 5", lambda x: x << 5),
        ("shl.b32 OUT, IN, 32", lambda x: 0),
        ("shr.s32 OUT, IN, 5", lambda x: x >> 5),
        ("shr.s32 OUT, IN, 40", lambda x: x >> 31),
        ("shr.u32 OUT, IN, 5", lambda x: (x & 0xFFFFFFFF) >> 5),
        ("shr.u32 OUT, IN, 32", lambda x: 0),
        ("bfe.u32 OUT, IN, 4, 7", lambda x: (x >> 4) & 127),
        ("bfe.s32 OUT, IN, 3, 5", lambda x: signed(x >> 3, 5)),
        ("bfi.b32 OUT, IN, 0x7A5A5A5A, 6, 11", lambda x: (0x7A5A5A5A & ~(2047 << 6)) | (x & 2047) << 6),
        ("bfi.b32 OUT, 0x1234, IN, 24, 20", lambda x: (x & 0xFFFFFF) | 0x34 << 24),
        ("min.s32 OUT, IN, 9", lambda x: min(x, 9)),
        ("max.s32 OUT, IN, 9", lambda x: max(x, 9)),
        ("min.u32 OUT, IN, 9", lambda x: min(x & 0xFFFFFFFF, 9)),
        ("max.relu.s32 OUT, IN, -5", lambda x: max(x, -5, 0)),
        ("popc.b32 OUT, IN", lambda x: bin(x & 0xFFFFFFFF).count("1")),
        ("clz.b32 OUT, IN", lambda x: 32 - (x & 0xFFFFFFFF).bit_length()),
        (
            "prmt.b32 OUT, IN, 0, 0x0123",
            lambda x: int.from_bytes((x & 0xFFFFFFFF).to_bytes(4, "little"), "big"),
        ),
        ("lop3.b32 OUT, IN, 0xF0F0, 0xFF00, 0xE8", lambda x: (x & 0xF0F0) | (x & 0xFF00) | (0xF0F0 & 0xFF00)),
        ("cvt.s32.s8 OUT, IN", lambda x: signed(x, 8)),
        ("add.s16x2 OUT, IN, 0x7FFF8001", lambda x: by_halves(x, lambda h, i: h + (0x8001, 0x7FFF)[i])),
        ("add.u16x2 OUT, IN, 0x7FFF8001", lambda x: by_halves(x, lambda h, i: h + (0x8001, 0x7FFF)[i])),
        ("min.s16x2 OUT, IN, 0x00058001", lambda x: by_halves(x, lambda h, i: min(h, (-0x7FFF, 5)[i]))),
        (
            "max.u16x2 OUT, IN, 0x00058001",
            lambda x: by_halves(x, lambda h, i: max(h & 0xFFFF, (0x8001, 5)[i])),
        ),
    ],
)
def test_integers(instruction: str, expected: Callable[[int], int]) -> None:
    found = unary(instruction, INTEGERS, torch.int32)
    assert found.tolist() == [signed(expected(value)) for value in INTEGERS.tolist()]


def test_wide_integers() -> None:
    found = unary("mul.wide.s32 OUT, IN, -3", INTEGERS, torch.int64)
    assert found.tolist() == [value * -3 for value in INTEGERS.tolist()]
    found = unary("mad.wide.u32 OUT, IN, 8, 5", INTEGERS, torch.int64)
    assert found.tolist() == [(value & 0xFFFFFFFF) * 8 + 5 for value in INTEGERS.tolist()]
    assert unary("cvt.s64.s32 OUT, IN", INTEGERS, torch.int64).tolist() == INTEGERS.tolist()
    unsigned = [value & 0xFFFFFFFF for value in INTEGERS.tolist()]
    assert unary("cvt.u64.u32 OUT, IN", INTEGERS, torch.int64).tolist() == unsigned


FLOATS = torch.tensor(
    [
        0.0,
        -0.0,
        1.0,
        -1.5,
        3.14159,
        1e-40,
        -1e-40,
        1e30,
        -1e30,
        65504.0,
        math.inf,
        -math.inf,
        math.nan,
        0.1,
        2.5,
        3.5,
    ]
    * 2
)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.f32 OUT, IN, 0f3F800000", lambda x: x + 1),
        (
            "mul.f32 OUT, IN, 0f40490FDB",
            lambda x: x * torch.tensor(0x40490FDB, dtype=torch.int32).view(torch.float32),
        ),
        ("neg.f32 OUT, IN", lambda x: -x),
        ("abs.f32 OUT, IN", torch.abs),
        ("max.f32 OUT, IN, 0f3F800000", lambda x: torch.fmax(x, torch.tensor(1.0))),
        ("min.f32 OUT, IN, 0f3F800000", lambda x: torch.fmin(x, torch.tensor(1.0))),
        ("max.NaN.f32 OUT, IN, 0f3F800000", lambda x: torch.maximum(x, torch.tensor(1.0))),
        ("min.NaN.f32 OUT, IN, 0f3F800000", lambda x: torch.minimum(x, torch.tensor(1.0))),
        ("ex2.approx.f32 OUT, IN", lambda x: torch.exp2(x.double()).float()),
        ("rsqrt.approx.f32 OUT, IN", lambda x: (1 / x.double().sqrt()).float()),
        ("div.full.f32 OUT, IN, 0f40400000", lambda x: x / 3),
        ("mul.ftz.f32 OUT, IN, 0f3F800000", lambda x: torch.where(x.abs() < 2**-126, x * 0, x)),
    ],
)
def test_floats(instruction: str, expected: Callable[[torch.Tensor], torch.Tensor]) -> None:
    found = unary(instruction, FLOATS, torch.float32)
    torch.testing.assert_close(found, expected(FLOATS), rtol=0, atol=0, equal_nan=True)


def test_minima_and_maxima_know_the_sign_of_zero() -> None:
    for name, zero, other in (("max", 0.0, "0f80000000"), ("min", -0.0, "0f00000000")):
        found = unary(
            f"{name}.f32 OUT, IN, {other}", torch.zeros(32).copysign(torch.tensor(zero)), torch.float32
        )
        assert torch.equal(found.signbit(), torch.full((32,), math.copysign(1, zero) < 0))
    found = unary("max.f32 OUT, IN, 0f80000000", -torch.zeros(32), torch.float32)
    assert torch.all(found.signbit())


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_conversions_round_to_nearest_even(dtype: torch.dtype, name: str) -> None:
    values = torch.cat([FLOATS[:16], torch.randn(16) * 100])
    found = unary(f"cvt.rn.{name}.f32 OUT, IN", values, torch.int16).view(dtype)
    torch.testing.assert_close(found, values.to(dtype), rtol=0, atol=0, equal_nan=True)
    back = unary(f"cvt.f32.{name} OUT, IN", values.to(dtype).view(torch.int16), torch.float32)
    torch.testing.assert_close(back, values.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_pairs_of_fp8_become_pairs_of_fp16(name: str) -> None:
    """Every code, NaN and infinities among them; the lower byte becomes the lower half."""
    for begin in range(0, 256, 64):
        codes = torch.arange(begin, begin + 64, dtype=torch.uint8)
        found = unary(f"cvt.rn.f16x2.{name}x2 OUT, IN", codes.view(torch.int16), torch.int32)
        dtype = torch.float8_e4m3fn if name == "e4m3" else torch.float8_e5m2
        torch.testing.assert_close(
            found.view(torch.float16), codes.view(dtype).to(torch.float16), rtol=0, atol=0, equal_nan=True
        )


def test_registers_of_a_scope_are_its_own() -> None:
    """An array of registers in a scope hides none of the entry's."""
    body = """
        mul.wide.u32 %rd3, %r0, 4; add.s64 %rd3, %rd3, %rd0;
        mov.b32 %r1, 5;
        { .reg .b32 l<2>; mov.b32 l0, 2; mov.b32 l1, 3;
            { .reg .b32 l<1>; mov.b32 l0, 100; }
            add.s32 %r1, l0, l1; }
        st.global.b32 [%rd3], %r1;
    """
    out = torch.zeros(32, dtype=torch.int32)
    run(body, out)
    assert out.tolist() == [5] * 32


def test_integers_of_floats_saturate() -> None:
    found = unary("cvt.rzi.s32.f32 OUT, IN", FLOATS, torch.int32).tolist()
    for value, integer in zip(FLOATS.tolist(), found, strict=True):
        wanted = 0 if math.isnan(value) else max(min(value, 2**31 - 1), -(2**31))
        assert integer == (int(wanted) if abs(wanted) < 2**31 else round(wanted))


def rounded_once(exact: Fraction) -> float:
    """The float32 nearest to a fraction, to even where two are."""
    if exact == 0:
        return 0.0
    exponent = max(math.frexp(float(exact))[1] - 24, -149)
    scaled = exact / Fraction(2) ** exponent
    whole = scaled.numerator // scaled.denominator
    rest = scaled - whole
    whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
    return float(whole * Fraction(2) ** exponent)


def test_fma_rounds_once() -> None:
    """Operands whose product and sum cancel or lie halfway: two roundings would differ."""
    generator = random.Random(0)
    rows = []
    for _ in range(32):
        a = torch.tensor(generator.uniform(1, 2)).item()
        b = torch.tensor(generator.uniform(1, 2)).item()
        c = torch.tensor(-a * b * generator.choice([1, 1 + 2**-20, 2**-30, 2**25])).item()
        rows.append((a, b, c))
    a, b, c = (torch.tensor(column) for column in zip(*rows, strict=True))
    out = torch.zeros(32)
    loads = "".join(
        f"mul.wide.u32 %rd30, %r0, 4; add.s64 %rd30, %rd30, %rd{i}; ld.global.b32 %r{10 + i}, [%rd30];"
        for i in range(3)
    )
    body = f"{loads} fma.rn.f32 %r20, %r10, %r11, %r12; add.s64 %rd30, %rd30, 0; mul.wide.u32 %rd31, %r0, 4;"
    run(f"{body} add.s64 %rd31, %rd31, %rd3; st.global.b32 [%rd31], %r20;", a, b, c, out)
    exact = [
        Fraction(x) * Fraction(y) + Fraction(z)
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    assert out.tolist() == [rounded_once(value) for value in exact]
    assert any(
        o != float(torch.tensor(x) * torch.tensor(y) + torch.tensor(z))
        for o, (x, y, z) in zip(out.tolist(), rows, strict=True)
    )


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "source"),
    [
        ("bfly", 5, 31, lambda lane: lane ^ 5),
        ("idx", 7, 31, lambda lane: 7),
        ("up", 3, 0, lambda lane: lane - 3 if lane >= 3 else lane),
        ("down", 3, 31, lambda lane: lane + 3 if lane + 3 < 32 else lane),
        ("idx", 2, 0x181F, lambda lane: (lane & ~7) | 2),
    ],
)
def test_shuffles(mode: str, by: int, clamp: int, source: Callable[[int], int]) -> None:
    found = unary(
        f"shfl.sync.{mode}.b32 OUT, IN, {by}, {clamp}, -1", torch.arange(32, dtype=torch.int32), torch.int32
    )
    assert found.tolist() == [source(lane) for lane in range(32)]


def test_comparisons_know_nan() -> None:
    one = "mov.b32 %r11, 0f3F800000;"
    for how, expected in (
        ("lt", lambda x: x < 1),
        ("ltu", lambda x: not x >= 1),
        ("ne", lambda x: x < 1 or x > 1),
    ):
        found = unary(
            "selp.b32 OUT, 1, 0, %p1", FLOATS, torch.int32, f"{one} setp.{how}.f32 %p1, %r10, %r11;"
        )
        assert found.tolist() == [int(expected(value)) for value in FLOATS.tolist()]


def test_diverging_lanes_meet_again() -> None:
    """Even lanes loop as often as their number says, odd ones skip the loop; then all shuffle together."""
    out = torch.zeros(32, dtype=torch.int32)
    run(
        """
        mov.b32 %r1, 0; and.b32 %r2, %r0, 1; setp.eq.b32 %p1, %r2, 1;
        @%p1 bra $after;
        $loop: add.s32 %r1, %r1, 1; setp.le.s32 %p2, %r1, %r0; @%p2 bra $loop;
        $after: shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;
        mul.wide.u32 %rd5, %r0, 4; add.s64 %rd5, %rd5, %rd0; st.global.b32 [%rd5], %r3;
        """,
        out,
    )
    assert out.tolist() == [0 if lane % 2 == 0 else lane for lane in range(32)]


# --- warps and warpgroups


def fragments_a(matrix: torch.Tensor) -> torch.Tensor:
    """A of m16n8k16 as (32 lanes, 4 registers), by the ISA's figure."""
    out = torch.zeros(32, 8, dtype=matrix.dtype)
    for lane in range(32):
        for i in range(8):
            row = lane // 4 + (8 if i in (2, 3, 6, 7) else 0)
            out[lane, i] = matrix[row, lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)]
    return out.view(torch.int32)


def test_lanes_meet_where_the_code_stands_before_one_of_their_ways() -> None:
    """The way of odd lanes stands behind the place where all meet, and a loop of unlike lengths before it."""
    out = torch.zeros(32, dtype=torch.int32)
    body = """
        mul.wide.u32 %rd3, %r0, 4; add.s64 %rd3, %rd3, %rd0; mov.b32 %r3, 0;
        $again: add.s32 %r3, %r3, 1; setp.lt.u32 %p1, %r3, %r0; @%p1 bra $again;
        and.b32 %r1, %r0, 1; setp.ne.b32 %p2, %r1, 0; @%p2 bra $odd;
        mov.b32 %r2, 100;
        $meet: shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1; st.global.b32 [%rd3], %r4; bra.uni $end;
        $odd: mov.b32 %r2, 200; bra.uni $meet;
        $end:
    """
    run(body, out)
    assert out.tolist() == [200, 100] * 16


def test_a_table_of_targets_parts_lanes() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    body = """
        rem.u32 %r1, %r0, 3; mul.wide.u32 %rd3, %r0, 4; add.s64 %rd3, %rd3, %rd0;
        $table: .branchtargets
            $zero,
            $one,
            $two;
        brx.idx %r1, $table;
        $zero: mov.b32 %r2, 10; bra.uni $end;
        $one: mov.b32 %r2, 20; bra.uni $end;
        $two: mov.b32 %r2, 30;
        $end: st.global.b32 [%rd3], %r2;
    """
    run(body, out)
    assert out.tolist() == [10 * (1 + lane % 3) for lane in range(32)]


def test_mma_is_a_dense_product() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(16, 16, dtype=torch.bfloat16), torch.randn(16, 8, dtype=torch.bfloat16)
    registers = torch.zeros(32, 10, dtype=torch.int32)
    registers[:, :4] = fragments_a(a)
    fragment_b = torch.zeros(32, 4, dtype=torch.bfloat16)
    c, out = torch.randn(16, 8), torch.zeros(32, 4)
    for lane in range(32):
        for i in range(4):
            fragment_b[lane, i] = b[lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), lane // 4]
    registers[:, 4:6] = fragment_b.view(torch.int32)
    fragment_c = torch.stack(
        [c[lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)] for lane in range(32) for i in range(4)]
    )
    registers[:, 6:] = fragment_c.view(32, 4).view(torch.int32)
    loads = "".join(f"ld.global.b32 %r{10 + i}, [%rd5 + {4 * i}];" for i in range(10))
    stores = "".join(f"st.global.b32 [%rd6 + {4 * i}], %r{30 + i};" for i in range(4))
    run(
        f"""
        mul.wide.u32 %rd5, %r0, 40; add.s64 %rd5, %rd5, %rd0; {loads}
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%r30, %r31, %r32, %r33}},
            {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%r16, %r17, %r18, %r19}};
        mul.wide.u32 %rd6, %r0, 16; add.s64 %rd6, %rd6, %rd1; {stores}
        """.replace(",\n", ","),
        registers,
        out,
    )
    dense = (a.double() @ b.double() + c.double()).float()
    for lane in range(32):
        for i in range(4):
            assert out[lane, i] == dense[lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)]


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_loaded_and_stored_by_rows(transposed: bool) -> None:
    """Four 8 x 8 matrices: a row an address, two elements a lane."""
    data = torch.arange(4 * 64, dtype=torch.int16).view(4, 8, 8)
    out, back = torch.zeros(32, 4, dtype=torch.int32), torch.zeros(4, 8, 8, dtype=torch.int16)
    way = ".trans" if transposed else ""
    run(
        f"""
        shl.b32 %r1, %r0, 4; mul.wide.u32 %rd5, %r0, 16; add.s64 %rd6, %rd5, %rd0;
        ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd6];
        st.shared.v4.b32 [%r1], {{%r10, %r11, %r12, %r13}}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{way}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r1];
        add.s64 %rd7, %rd5, %rd1; st.global.v4.b32 [%rd7], {{%r20, %r21, %r22, %r23}};
        bar.sync 0; stmatrix.sync.aligned.m8n8.x4{way}.shared.b16 [%r1], {{%r20, %r21, %r22, %r23}};
        bar.sync 0; ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r1];
        add.s64 %rd8, %rd5, %rd2; st.global.v4.b32 [%rd8], {{%r10, %r11, %r12, %r13}};
        """,
        data,
        out,
        back,
        shared_bytes=512,
    )
    pairs = out.view(torch.int16).view(32, 4, 2)
    for lane in range(32):
        for which in range(4):
            for e in range(2):
                row, column = lane // 4, lane % 4 * 2 + e
                assert pairs[lane, which, e] == (
                    data[which, column, row] if transposed else data[which, row, column]
                )
    assert torch.equal(back, data)


def _map(matrix: torch.Tensor, rows: int, rank: int) -> TensorMap:
    """Tiles of so many rows of a matrix, which is a head of a batch if the rank is 4."""
    columns = matrix.shape[1]
    if rank == 2:
        return TensorMap(matrix, tuple(matrix.shape), (columns, 1), (rows, columns), 3)
    whole = torch.full((2, len(matrix), 2, columns), float("nan"), dtype=matrix.dtype)
    whole[1, :, 1] = matrix
    return TensorMap(whole, tuple(whole.shape), whole.stride(), (1, rows, 1, columns), 3)


@pytest.mark.parametrize("rank", [2, 4])
def test_a_tile_is_copied_swizzled_and_multiplied_by_a_warpgroup(rank: int) -> None:
    """Both operands by the copy engine in 128-byte swizzle; the second tile hangs over the matrix' edge.

    Of rank 4 the matrices are those of head 1 of batch 1, ``(batch, rows, heads, columns)``.
    """
    torch.manual_seed(0)
    a, b = torch.randn(64, 64, dtype=torch.bfloat16), torch.randn(24, 64, dtype=torch.bfloat16)
    out = torch.zeros(128, 16)
    names = ",".join(f"%r{100 + i}" for i in range(16))
    products = ""
    for step in range(4):
        # Start address, and 1024 bytes between groups of 8 rows, in units of 16; mode 1: 128 bytes.
        descriptor_a = (1 << 62) | (64 << 32) | (step * 32 >> 4)
        descriptor_b = (1 << 62) | (64 << 32) | ((8192 + step * 32) >> 4)
        products += f"""
        mov.b64 %rd10, {descriptor_a}; mov.b64 %rd11, {descriptor_b};
        setp.ne.b32 %p3, {step}, 0;
        wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {{{names}}}, %rd10, %rd11, %p3, 1, 1, 0, 0;"""
    stores = "".join(f"st.global.b32 [%rd5 + {4 * i}], %r{100 + i};" for i in range(16))
    tile, corner = TILE.replace("2d", f"{rank}d"), "%r2, %r2" if rank == 2 else "%r2, %r4, %r2, %r4"
    body = f"""
        mov.b64 %rd6, k_param_1; cvta.param.u64 %rd7, %rd6;
        mov.b64 %rd8, k_param_2; cvta.param.u64 %rd9, %rd8;
        mov.b32 %r1, 16384; mov.b32 %r2, 0; mov.b32 %r3, 8192; setp.eq.b32 %p1, %r0, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%r1], 1; fence.proxy.async.shared::cta; bar.sync 0;
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 12288;
        mov.b32 %r4, 1;
        @%p1 {tile} [%r2], [%rd7, {{{corner}}}], [%r1];
        @%p1 {tile} [%r3], [%rd9, {{{corner}}}], [%r1];
        $wait: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0; @!%p2 bra.uni $wait;
        wgmma.fence.sync.aligned; {products}
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        mul.wide.u32 %rd5, %r0, 64; add.s64 %rd5, %rd5, %rd0; {stores}
    """
    text = module(body, 1, 128, ", .param .align 64 .b8 k_param_1[128], .param .align 64 .b8 k_param_2[128]")
    execute(text, (1,), (out, _map(a, 64, rank), _map(b, 32, rank)), shared_bytes=16392)
    dense = torch.zeros(64, 32)
    dense[:, :24] = a.float() @ b.float().T
    found = torch.zeros(64, 32)
    for thread in range(128):
        for i in range(16):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
            found[row, 8 * (i // 4) + 2 * (thread % 4) + i % 2] = out[thread, i]
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5)


def test_blocks_add_to_one_counter() -> None:
    counter = torch.zeros(1, dtype=torch.int32)
    run("setp.eq.b32 %p1, %r0, 0; @%p1 atom.global.gpu.acq_rel.add.u32 %r1, [%rd0], 2;", counter, blocks=7)
    assert counter.item() == 14


def test_what_is_not_served_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"tcgen05\.mma"):
        run("tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r3, %p1;", torch.zeros(1))


def test_atomics_of_four_numbers_add_each() -> None:
    """The values before are returned; a reduction returns none."""
    values, before = torch.arange(4.0), torch.zeros(4)
    body = """
mov.b32 %r1, 0f3F800000; mov.b32 %r2, 0f40000000;
setp.eq.b32 %p1, %r0, 0;
@%p1 atom.global.gpu.relaxed.add.v4.f32 {%r10, %r11, %r12, %r13}, [%rd0], {%r1, %r2, %r1, %r2};
@%p1 red.relaxed.gpu.global.add.v4.f32 [%rd0], {%r2, %r2, %r2, %r2};
@%p1 st.global.v4.b32 [%rd1], {%r10, %r11, %r12, %r13};
"""
    run(body, values, before)
    assert before.tolist() == [0.0, 1.0, 2.0, 3.0] and values.tolist() == [3.0, 5.0, 5.0, 7.0]
