"""Instructions with memory, of whole warps and of warpgroups: answers for every form that the kernels use."""

from __future__ import annotations

import re
from pathlib import Path

import ptx_answers
import ptx_forms
import pytest
import torch
from ptx_support import TILE, module, run

from gptkern.testing.ptx import TensorMap, execute

HERE = Path(__file__).parent
_REGISTERS = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}


def octets(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (32, count), dtype=torch.uint8, generator=generator)


def shape_of(form: str) -> tuple[int, int]:
    """(registers, bits of each) of a load or store."""
    vector = re.search(r"\.v(\d)\.", form)
    return int(vector.group(1)) if vector else 1, ptx_answers.size_of(form.split(".")[-1])


def transfer(form: str, loads: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes before, after) of a load or a store; the rest of the way each lane's bytes go one by one."""
    count, size = shape_of(form)
    width = count * size // 8
    space = "shared" if ".shared" in form else "param" if ".param" in form else "global"
    source, out = octets(width), torch.zeros(32, width, dtype=torch.uint8)
    registers = [f"{_REGISTERS[size]}{20 + i}" for i in range(count)]
    listed = registers[0] if count == 1 else f"{{{', '.join(registers)}}}"

    def by_bytes(load: str, store: str) -> str:
        return "".join(
            f"ld.{load[0]}.b8 %rs1, [{load[1]} + {i}]; st.{store[0]}.b8 [{store[1]} + {i}], %rs1;"
            for i in range(width)
        )

    given, here = ("global", "%rd10"), {"shared": "%r1", "param": "k_param_2", "global": "%rd10"}[space]
    body = f"""mul.wide.u32 %rd9, %r0, {width}; add.s64 %rd10, %rd9, %rd0; add.s64 %rd11, %rd9, %rd1;
    mul.lo.s32 %r1, %r0, {width};"""
    pieces = [f"st.global.b{size} [%rd11 + {i * size // 8}], {name};" for i, name in enumerate(registers)]
    if loads:
        body += by_bytes(given, ("shared", "%r1")) if space == "shared" else ""
        body += f"{form} {listed}, [{here}]; {' '.join(pieces)}"
    else:
        fetch = [piece.replace("st.", "ld.").replace("%rd11", "%rd10") for piece in pieces]
        body += " ".join(re.sub(r"(ld\S+) (\[.*\]), (%\w+);", r"\1 \3, \2;", piece) for piece in fetch)
        body += f"{form} [{'%r1' if space == 'shared' else '%rd11'}], {listed};"
        body += by_bytes(("shared", "%r1"), ("global", "%rd11")) if space == "shared" else ""
    if space == "param":
        text = module(body, 2, 32, f", .param .align 16 .b8 k_param_2[{width}]")
        execute(text, (1,), (source, out, bytes(source[0].tolist())))
        return source[:1].expand(32, -1), out
    run(body, source, out, shared_bytes=32 * width)
    return source, out


@pytest.mark.parametrize("form", ptx_forms.LOADS)
def test_a_load_brings_its_bytes(form: str) -> None:
    source, out = transfer(form, loads=True)
    assert torch.equal(out, source)


@pytest.mark.parametrize("form", ptx_forms.STORES)
def test_a_store_leaves_its_bytes(form: str) -> None:
    source, out = transfer(form, loads=False)
    assert torch.equal(out, source)


@pytest.mark.parametrize("form", ptx_forms.ATOMICS)
def test_lanes_add_to_three_counters(form: str) -> None:
    """Lane t adds t + 1 to counter t mod 3: its end, and the values that were met on the way."""
    wide, shared = form.endswith("64"), ".shared" in form
    size, register = (8, "%rd") if wide else (4, "%r")
    dtype = torch.int64 if wide else torch.int32
    start = torch.tensor([5, 6, -1], dtype=dtype)
    counters, met = start.clone(), torch.full((32,), -1, dtype=dtype)
    place = "add.s32 %r5, %r4, 0;" if shared else "cvt.u64.u32 %rd5, %r4; add.s64 %rd5, %rd5, %rd0;"
    at = "%r5" if shared else "%rd5"
    copy = f"""setp.lt.u32 %p1, %r0, 3; mul.wide.u32 %rd7, %r0, {size}; add.s64 %rd8, %rd7, %rd0;
    mul.lo.s32 %r6, %r0, {size};"""
    bits, own = 8 * size, f"{register}20"
    into = f"@%p1 ld.global.b{bits} {own}, [%rd8]; @%p1 st.shared.b{bits} [%r6], {own};"
    back = f"@%p1 ld.shared.b{bits} {own}, [%r6]; @%p1 st.global.b{bits} [%rd8], {own};"
    returns = form.startswith("atom")
    run(
        f"""{copy} {into if shared else ""} bar.sync 0; rem.u32 %r3, %r0, 3; mul.lo.s32 %r4, %r3, {size};
        {place}
        add.s32 %r9, %r0, 1; cvt.u64.u32 %rd9, %r9; mov.b{bits} {register}21, -1;
        {form} {f"{register}21, " if returns else ""}[{at}], {register}9; bar.sync 0; {back if shared else ""}
        mul.wide.u32 %rd10, %r0, {size}; add.s64 %rd10, %rd10, %rd1; st.global.b{bits} [%rd10], {register}21;
        """,
        counters, met, shared_bytes=32,
    )  # fmt: skip
    for which in range(3):
        added = [lane + 1 for lane in range(which, 32, 3)]
        assert counters[which] == start[which] + sum(added)
        if returns:  # each order of the lanes is right: values and additions make a chain
            steps = sorted(
                (value, value + amount) for value, amount in zip(met[which::3].tolist(), added, strict=True)
            )
            ends = [int(start[which]), *(end for _, end in steps)]
            assert [value for value, _ in steps] == ends[:-1]


# --- warps


def matrices(registers: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Matrices (count, 8, 8) of which lanes hold these pairs (32, count, 2), by the ISA's figure."""
    out = torch.zeros(registers.shape[1], 8, 8, dtype=registers.dtype)
    for lane in range(32):
        for which in range(registers.shape[1]):
            for e in range(2):
                row, column = lane // 4, lane % 4 * 2 + e
                row, column = (column, row) if transposed else (row, column)
                out[which, row, column] = registers[lane, which, e]
    return out


@pytest.mark.parametrize("form", ptx_forms.ROWS)
def test_matrices_go_by_rows(form: str) -> None:
    """Row r of matrix m is at the address that lane 8 m + r gives; rows lie backwards here."""
    count, transposed = int(form.split(".x")[1][0]), ".trans" in form
    data = torch.arange(count * 64, dtype=torch.int16)
    names = ", ".join(f"%r{20 + i}" for i in range(count))
    place = f"sub.s32 %r1, {8 * count - 1}, %r0; and.b32 %r1, %r1, {8 * count - 1}; shl.b32 %r1, %r1, 4;"
    share = 4 * count  # bytes a lane: of registers, and of the memory that it copies
    copy = f"""mul.lo.s32 %r2, %r0, {share}; cvt.u64.u32 %rd5, %r2; add.s64 %rd6, %rd5, %rd0;
    add.s64 %rd7, %rd5, %rd1;"""
    if form.startswith("ldmatrix"):
        move = "".join(
            f"ld.global.b32 %r3, [%rd6 + {4 * i}]; st.shared.b32 [%r2 + {4 * i}], %r3;" for i in range(count)
        )
        after = "".join(f"st.global.b32 [%rd7 + {4 * i}], %r{20 + i};" for i in range(count))
        body = f"{copy} {place} {move} bar.sync 0; {form} {{{names}}}, [%r1]; {after}"
    else:
        move = "".join(f"ld.global.b32 %r{20 + i}, [%rd6 + {4 * i}];" for i in range(count))
        after = "".join(
            f"ld.shared.b32 %r3, [%r2 + {4 * i}]; st.global.b32 [%rd7 + {4 * i}], %r3;" for i in range(count)
        )
        body = f"{copy} {place} {move} {form} [%r1], {{{names}}}; bar.sync 0; {after}"
    out = torch.zeros_like(data)
    run(body, data, out, shared_bytes=128 * count)
    held, stored = (out, data) if form.startswith("ldmatrix") else (data, out)
    backwards = stored.view(8 * count, 8).flip(0).view(count, 8, 8)
    assert torch.equal(matrices(held.view(32, count, 2), transposed), backwards)


@pytest.mark.parametrize("form", ["redux.sync.add.u32", "redux.sync.max.s32", "redux.sync.max.u32"])
def test_a_warp_reduces(form: str) -> None:
    values = torch.randint(-100, 100, (64,), dtype=torch.int32)
    out = torch.zeros(64, dtype=torch.int32)
    address = "mul.wide.u32 %rd5, %r0, 4; add.s64 %rd6, %rd5, %rd0; add.s64 %rd7, %rd5, %rd1;"
    run(
        f"{address} ld.global.b32 %r1, [%rd6]; {form} %r2, %r1, -1; st.global.b32 [%rd7], %r2;",
        values,
        out,
        threads=64,
    )
    numbers = values.long() % 2**32 if form.endswith("u32") else values.long()
    warps = numbers.view(2, 32)
    expected = warps.sum(1) if ".add." in form else warps.amax(1)
    assert torch.equal(out.view(2, 32), expected.int().view(2, 1).expand(2, 32))


def test_one_lane_of_each_warp_is_elected() -> None:
    out = torch.zeros(64, 2, dtype=torch.int32)
    body = """elect.sync %r1|%p1, -1; selp.b32 %r2, 1, 0, %p1; mul.wide.u32 %rd5, %r0, 8;
    add.s64 %rd5, %rd5, %rd0; st.global.v2.b32 [%rd5], {%r1, %r2};"""
    run(body, out, threads=64)
    for warp in out.view(2, 32, 2):
        assert warp[:, 1].sum() == 1 and torch.all(warp[:, 0] == warp[:, 1].argmax())


def test_pairs_are_compared_by_halves() -> None:
    numbers = torch.tensor([1.0, 2.0, -1.0, torch.nan, 0.0, -0.0, torch.inf, -torch.inf])
    left, right = torch.cartesian_prod(numbers, numbers).to(torch.bfloat16).unbind(1)
    out = torch.zeros(32, 2, dtype=torch.int32)
    body = """mul.wide.u32 %rd5, %r0, 4; add.s64 %rd6, %rd5, %rd0; add.s64 %rd7, %rd5, %rd1;
    ld.global.b32 %r1, [%rd6]; ld.global.b32 %r2, [%rd7]; setp.lt.bf16x2 %p1|%p2, %r1, %r2;
    selp.b32 %r3, 1, 0, %p1; selp.b32 %r4, 1, 0, %p2; mul.wide.u32 %rd8, %r0, 8; add.s64 %rd8, %rd8, %rd2;
    st.global.v2.b32 [%rd8], {%r3, %r4};"""
    run(body, left.contiguous(), right.contiguous(), out)
    assert torch.equal(out.flatten(), (left.float() < right.float()).int())


def test_global_addresses_are_generic_ones() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    first = "setp.eq.b32 %p1, %r0, 0;"
    run(f"cvta.to.global.u64 %rd5, %rd0; mov.b32 %r1, 7; {first} @%p1 st.b32 [%rd5], %r1;", out)
    assert out.item() == 7


@pytest.mark.parametrize("form", ptx_forms.WITHOUT_EFFECT)
def test_what_has_no_effect_on_numbers(form: str) -> None:
    values = torch.arange(128, dtype=torch.int32)
    operand = "[%rd5]" if form.startswith("prefetch") else "64"
    body = f"""mul.wide.u32 %rd5, %r0, 4; add.s64 %rd5, %rd5, %rd0; ld.global.b32 %r1, [%rd5];
    {form} {operand}; add.s32 %r2, %r1, 3; st.global.b32 [%rd5], %r2;"""
    run(body, values, threads=128)
    assert torch.equal(values, torch.arange(3, 131, dtype=torch.int32))


# --- blocks


@pytest.mark.parametrize("form", ptx_forms.BARRIERS)
def test_warps_meet_at_a_barrier(form: str) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    body = f"""shl.b32 %r1, %r0, 2; st.shared.b32 [%r1], %r0; {form} 0; xor.b32 %r2, %r1, 252;
    ld.shared.b32 %r3, [%r2]; mul.wide.u32 %rd5, %r0, 4; add.s64 %rd5, %rd5, %rd0;
    st.global.b32 [%rd5], %r3;"""
    run(body, out, threads=64, shared_bytes=256)
    assert out.tolist() == list(range(63, -1, -1))


@pytest.mark.parametrize("form", ptx_forms.COPIES)
@pytest.mark.parametrize("given", ["", ", 16", ", 8", ", 0"])
def test_an_asynchronous_copy_fills_up_with_zeros(form: str, given: str) -> None:
    source, out = octets(16), torch.ones(32, 16, dtype=torch.uint8)
    body = f"""shl.b32 %r1, %r0, 4; mul.wide.u32 %rd5, %r0, 16; add.s64 %rd6, %rd5, %rd0;
    add.s64 %rd7, %rd5, %rd1;
    {form} [%r1], [%rd6], 16{given}; cp.async.commit_group; cp.async.wait_group 0;
    ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r1];
    st.global.v4.b32 [%rd7], {{%r10, %r11, %r12, %r13}};"""
    run(body, source, out, shared_bytes=512)
    amount = int(given.strip(", ") or 16)
    assert torch.equal(out[:, :amount], source[:, :amount]) and not out[:, amount:].any()


def test_the_place_of_a_barrier_is_memory_again() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    body = """mov.b32 %r1, 0; setp.eq.b32 %p1, %r0, 0; @%p1 mbarrier.init.shared::cta.b64 [%r1], 32;
    bar.sync 0;
    mbarrier.arrive.shared::cta.b64 _, [%r1];
    $w: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0; @!%p2 bra $w; bar.sync 0;
    @%p1 mbarrier.inval.shared::cta.b64 [%r1]; bar.sync 0; shl.b32 %r2, %r0, 2; st.shared.b32 [%r2], %r0;
    ld.shared.b32 %r3, [%r2]; mul.wide.u32 %rd5, %r0, 4; add.s64 %rd5, %rd5, %rd0;
    st.global.b32 [%rd5], %r3;"""
    run(body, out, shared_bytes=128)
    assert out.tolist() == list(range(32))


# --- warpgroups


def warpgroup_product(
    form: str, n: int, b: torch.Tensor, a: torch.Tensor, descriptor_of_b: int, flags: str, registers: bool
) -> torch.Tensor:
    """A, 64 x 16, in rows of 128 bytes at 0 or in registers; B at 8192 as it is: both by the copy engine."""
    count, rows = n // 2, b.shape[0]
    names = ", ".join(f"%r{60 + i}" for i in range(count))
    left = "{%r10, %r11, %r12, %r13}" if registers else "%rd10"
    # Warp w has rows 16 w to 16 w + 15, lane l of these l / 4 and 8 more, columns 2 (l mod 4) and 8 more.
    load = """shr.u32 %r4, %r0, 5; shl.b32 %r4, %r4, 4; and.b32 %r5, %r0, 31; shr.u32 %r6, %r5, 2;
    add.s32 %r4, %r4, %r6; and.b32 %r5, %r5, 3; mul.lo.s32 %r4, %r4, 128; mad.lo.s32 %r4, %r5, 4, %r4;
    cvt.u64.u32 %rd12, %r4; add.s64 %rd12, %rd12, %rd1; ld.global.b32 %r10, [%rd12];
    ld.global.b32 %r11, [%rd12 + 1024]; ld.global.b32 %r12, [%rd12 + 16];
    ld.global.b32 %r13, [%rd12 + 1040];"""
    stores = "".join(f"st.global.b32 [%rd5 + {4 * i}], %r{60 + i};" for i in range(count))
    body = f"""mov.b64 %rd6, k_param_2; cvta.param.u64 %rd7, %rd6; mov.b64 %rd8, k_param_3;
    cvta.param.u64 %rd9, %rd8; mov.b32 %r1, 40960; mov.b32 %r2, 0; mov.b32 %r3, 8192;
    setp.eq.b32 %p1, %r0, 0; @%p1 mbarrier.init.shared::cta.b64 [%r1], 1; fence.proxy.async.shared::cta;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {8192 + 128 * rows};
    @%p1 {TILE} [%r2], [%rd7, {{%r2, %r2}}], [%r1]; @%p1 {TILE} [%r3], [%rd9, {{%r2, %r2}}], [%r1];
    $w: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0; @!%p2 bra.uni $w; {load}
    mov.b64 %rd10, {1 << 62 | 64 << 32}; mov.b64 %rd11, {descriptor_of_b}; setp.ne.b32 %p3, %r2, 0;
    wgmma.fence.sync.aligned; {form} {{{names}}}, {left}, %rd11, %p3, 1, 1, {flags};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    mul.wide.u32 %rd5, %r0, {4 * count}; add.s64 %rd5, %rd5, %rd0; {stores}"""
    out = torch.zeros(128, count)
    maps = [TensorMap(x, tuple(x.shape), (64, 1), (len(x), 64), 3) for x in (a, b)]
    more = "".join(f", .param .align 64 .b8 k_param_{i}[128]" for i in (2, 3))
    execute(module(body, 2, 128, more), (1,), (out, a, *maps), shared_bytes=40968)
    found = torch.zeros(64, n)
    for thread in range(128):
        for i in range(count):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
            found[row, 8 * (i // 4) + 2 * (thread % 4) + i % 2] = out[thread, i]
    return found


def extent(form: str) -> int:
    """The n of a product's shape."""
    return int(form.split("m64n")[1].split("k16")[0])


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize(
    ("form", "transposed"),
    [
        (form, transposed)
        for form in ptx_forms.PRODUCTS
        for transposed in (False, True)
        if not transposed or extent(form) <= 64  # a row of 128 bytes
    ],
)
def test_a_warpgroup_multiplies(form: str, registers: bool, transposed: bool) -> None:
    """Columns 0 to 15 of A, and of B; or B's rows 0 to 15, where it lies with n innermost."""
    torch.manual_seed(0)
    n = extent(form)
    a = torch.randn(64, 64, dtype=torch.bfloat16)
    b = torch.randn(16, 64, dtype=torch.bfloat16) if transposed else torch.randn(n, 64, dtype=torch.bfloat16)
    # Mode 1: 128 bytes; 1024 bytes from 8 rows to the next, in units of 16.
    descriptor = 1 << 62 | 64 << 32 | 8192 >> 4
    flags = f"{int(transposed)}" if registers else f"0, {int(transposed)}"
    found = warpgroup_product(form, n, b, a, descriptor, flags, registers)
    dense = a[:, :16].double() @ (b[:, :n] if transposed else b[:, :16].T).double()
    torch.testing.assert_close(found, dense.float(), rtol=1e-6, atol=1e-6)


# --- all forms


def test_the_other_forms_stand_in_tests() -> None:
    every = "".join(path.read_text() for path in HERE.glob("test_ptx_*.py"))
    for form, name in ptx_forms.OWN.items():
        assert f"def {name}(" in every, form
    for file, forms in ptx_forms.ELSEWHERE.items():
        text = (HERE / file).read_text()
        for form in forms:
            assert re.search(rf"(?<![\w.]){re.escape(form)}(?![\w.])", text), (form, file)
