"""The forms of instructions that the kernels use, by the tests that have answers for them.

Triton's kernels in the small calls of all ops and in persistent steps, sm_80 and sm_90, and nvcc's sampler. A
form that none of these lists has is refused where the calls are swept.
"""

from __future__ import annotations

_TILE = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"

# Registers to registers: ``ptx_answers`` has them. The other lists are of ``test_ptx_forms``.
ARITHMETIC = [
    "abs.f32", "abs.f64", "abs.ftz.f32", "add.bf16", "add.bf16x2", "add.f32", "add.rn.f32", "add.rn.f64",
    "add.s16", "add.s16x2", "add.s32", "add.s64", "add.u64", "and.b16", "and.b32", "and.b64", "and.pred",
    "bfe.s32", "bfe.u32", "bfi.b32", "bfi.b64", "cvt.bf16.f16", "cvt.f32.bf16", "cvt.f32.f16", "cvt.f64.f32",
    "cvt.rn.bf16.f32", "cvt.rn.bf16.s16", "cvt.rn.bf16.u16", "cvt.rn.bf16x2.f32", "cvt.rn.f16x2.e4m3x2",
    "cvt.rn.f32.f64",
    "cvt.rn.f32.s16", "cvt.rn.f32.s32", "cvt.rn.f32.s8", "cvt.rn.f32.u16", "cvt.rn.f32.u32",
    "cvt.rn.f32.u64", "cvt.rn.f64.s32", "cvt.rn.f64.s64", "cvt.rn.f64.u32", "cvt.rn.f64.u64",
    "cvt.rn.satfinite.e4m3x2.f32", "cvt.rzi.s32.f32", "cvt.rzi.s32.f64", "cvt.rzi.s64.f64",
    "cvt.rzi.u32.f64", "cvt.rzi.u64.f64", "cvt.s16.s8", "cvt.s32.s16", "cvt.s32.s8", "cvt.s64.s32",
    "cvt.u16.u32", "cvt.u32.u16", "cvt.u32.u64", "cvt.u64.u16", "cvt.u64.u32", "div.approx.f32",
    "div.full.f32", "div.rn.f32", "div.rn.f64", "div.s32", "div.s64", "div.u32", "ex2.approx.f32",
    "ex2.approx.ftz.f32", "fma.rn.bf16", "fma.rn.bf16x2", "fma.rn.f32", "fma.rn.f64", "fma.rn.ftz.f32",
    "mad.lo.s32", "mad.lo.s64", "mad.wide.s16", "mad.wide.s32", "mad.wide.u16", "mad.wide.u32",
    "max.NaN.bf16", "max.NaN.f32", "max.f32", "max.f64", "max.relu.s32", "max.s32", "max.u32", "max.u64",
    "min.f32", "min.f64", "min.relu.s32", "min.s32", "min.s64", "min.u32", "mov.b16", "mov.b32",
    "mov.b64", "mov.f32", "mov.f64", "mov.pred", "mov.u16", "mov.u32", "mov.u64", "mul.f32", "mul.hi.s32",
    "mul.hi.u16", "mul.hi.u64", "mul.lo.s16", "mul.lo.s32", "mul.lo.s64", "mul.rn.f32", "mul.rn.f64",
    "mul.wide.s16", "mul.wide.s32", "mul.wide.u16", "mul.wide.u32", "neg.f32", "neg.f64", "neg.s32",
    "not.b32", "not.pred", "or.b16", "or.b32", "or.b64", "or.pred", "prmt.b32", "rcp.rn.f64", "rem.s32",
    "rem.s64", "rem.u32", "rsqrt.approx.ftz.f32", "selp.b16", "selp.b32", "selp.b64", "selp.f32",
    "selp.f64", "selp.u16", "selp.u32", "selp.u64", "setp.eq.b32", "setp.eq.b64", "setp.eq.f32",
    "setp.eq.f64", "setp.eq.s16", "setp.eq.s32", "setp.eq.s64", "setp.eq.u32", "setp.ge.f32",
    "setp.ge.s32", "setp.ge.s64", "setp.ge.u32", "setp.ge.u64", "setp.geu.f32", "setp.geu.f64", "setp.gt.f32",
    "setp.gt.f64", "setp.gt.s32", "setp.gt.s64", "setp.gt.u16", "setp.gt.u32", "setp.gt.u64",
    "setp.gtu.f32", "setp.gtu.f64", "setp.le.bf16", "setp.le.f32", "setp.le.s32", "setp.le.s64",
    "setp.le.u32", "setp.le.u64", "setp.leu.f32", "setp.leu.f64", "setp.lt.bf16", "setp.lt.f32",
    "setp.lt.f64", "setp.lt.s32", "setp.lt.s64", "setp.lt.u32", "setp.lt.u64", "setp.ltu.f32",
    "setp.ltu.f64", "setp.ne.b16", "setp.ne.b32", "setp.ne.b64", "setp.ne.s16", "setp.ne.s32",
    "setp.ne.s64", "setp.neu.f64", "shl.b16", "shl.b32", "shl.b64", "shr.s16", "shr.s32", "shr.s64",
    "shr.u16", "shr.u32", "shr.u64", "sqrt.rn.f64", "sub.bf16", "sub.bf16x2", "sub.f32", "sub.rn.f32",
    "sub.rn.f64", "sub.s16", "sub.s32", "sub.s64", "xor.b16", "xor.b32", "xor.b64", "xor.pred",
]  # fmt: skip
LOADS = [
    "ld.acquire.gpu.global.s32", "ld.f32", "ld.global.b16", "ld.global.b32", "ld.global.b64",
    "ld.global.b8", "ld.global.cg.b32", "ld.global.cg.v2.b32", "ld.global.cg.v4.b32", "ld.global.f32",
    "ld.global.f64", "ld.global.s32", "ld.global.u16", "ld.global.u32", "ld.global.u64",
    "ld.global.v2.b32", "ld.global.v4.b32", "ld.global.v4.f32", "ld.global.v4.u32", "ld.param.b32",
    "ld.param.b64", "ld.param.s32",
    "ld.param.u32", "ld.param.u64", "ld.param.v2.u32", "ld.shared.b16", "ld.shared.b32", "ld.shared.b64",
    "ld.shared.b8", "ld.shared.s32", "ld.shared.u32", "ld.shared.u64", "ld.shared.v2.b16",
    "ld.shared.v2.b32", "ld.shared.v2.b8", "ld.shared.v2.u32", "ld.shared.v2.u64", "ld.shared.v4.b16",
    "ld.shared.v4.b32", "ld.shared.v4.u32", "ld.u32", "ld.u64", "ld.v2.u64", "ld.v4.u32",
]  # fmt: skip
STORES = [
    "st.global.b16", "st.global.b32", "st.global.b64", "st.global.b8", "st.global.f32", "st.global.u32",
    "st.global.u64", "st.global.v2.b32", "st.global.v4.b32", "st.global.v4.f32", "st.global.v4.u32",
    "st.shared.b16", "st.shared.b32",
    "st.shared.b64", "st.shared.b8", "st.shared.u32", "st.shared.u64", "st.shared.v2.b32", "st.shared.v2.u32",
    "st.shared.v4.b32", "st.shared::cta.b16", "st.shared::cta.b32", "st.shared::cta.b64",
    "st.shared::cta.b8", "st.shared::cta.v2.b16", "st.shared::cta.v2.b32", "st.shared::cta.v4.b16",
    "st.shared::cta.v4.b32", "st.shared::cta.v4.b8", "st.u32", "st.u64",
]  # fmt: skip
ATOMICS = [
    "atom.add.u32", "atom.global.gpu.acq_rel.add.u32", "atom.global.gpu.release.add.u32",
    "atom.shared.add.u32", "atom.shared.add.u64", "red.global.gpu.release.add.u32",
]  # fmt: skip
# Matrices by rows.
ROWS = [
    "ldmatrix.sync.aligned.m8n8.x1.shared.b16", "ldmatrix.sync.aligned.m8n8.x2.shared.b16",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16", "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
    "stmatrix.sync.aligned.m8n8.x1.shared.b16", "stmatrix.sync.aligned.m8n8.x1.trans.shared.b16",
    "stmatrix.sync.aligned.m8n8.x2.shared.b16", "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16",
    "stmatrix.sync.aligned.m8n8.x4.shared.b16", "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
]  # fmt: skip
# Of warpgroups.
PRODUCTS = [
    "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
    "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16",
    "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16",
    "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16",
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16",
]  # fmt: skip
BARRIERS = [
    "bar.sync", "barrier.sync",
]  # fmt: skip
COPIES = [
    "cp.async.ca.shared.global", "cp.async.cg.shared.global",
]  # fmt: skip
WITHOUT_EFFECT = [
    "prefetch.global.L2", "setmaxnreg.dec.sync.aligned.u32", "setmaxnreg.inc.sync.aligned.u32",
]  # fmt: skip
# The test that has the answer, where a form does not stand in its text as it is.
OWN = {
    "setp.lt.bf16x2": "test_pairs_are_compared_by_halves",
    "elect.sync": "test_one_lane_of_each_warp_is_elected",
    "redux.sync.add.u32": "test_a_warp_reduces",
    "redux.sync.max.s32": "test_a_warp_reduces",
    "redux.sync.max.u32": "test_a_warp_reduces",
    "cvta.to.global.u64": "test_global_addresses_are_generic_ones",
    "mbarrier.inval.shared::cta.b64": "test_the_place_of_a_barrier_is_memory_again",
    _TILE.replace("2d", "4d"): "test_a_tile_is_copied_swizzled_and_multiplied_by_a_warpgroup",
    "shfl.sync.bfly.b32": "test_shuffles",
    "shfl.sync.down.b32": "test_shuffles",
    "shfl.sync.idx.b32": "test_shuffles",
    "shfl.sync.up.b32": "test_shuffles",
}
# The file in which a test uses a form as it is, and has its answer.
ELSEWHERE = {
    "test_ptx_instructions.py": [
        "bra", "bra.uni", "brx.idx", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "cvta.param.u64", "wgmma.fence.sync.aligned", "wgmma.commit_group.sync.aligned",
        "wgmma.wait_group.sync.aligned",
    ],
    "test_ptx_clusters.py": [
        "barrier.cluster.arrive", "barrier.cluster.wait", "mapa.u64", "cvta.shared.u64",
    ],
    "test_ptx_sampler.py": [
        "rcp.approx.ftz.f64",
    ],
    "test_ptx_faults.py": [
        "bar.warp.sync", "fence.proxy.async.shared::cta", "mbarrier.init.shared::cta.b64",
        "mbarrier.arrive.expect_tx.shared::cta.b64", "mbarrier.try_wait.parity.shared::cta.b64",
    ],
    "test_ptx_pairs.py": [
        "mbarrier.arrive.shared::cta.b64", "cp.async.commit_group", "cp.async.wait_group",
    ],
    "test_ptx_dependent.py": [
        "griddepcontrol.launch_dependents", "griddepcontrol.wait",
    ],
    "ptx_support.py": [
        "ret", _TILE,
    ],
}  # fmt: skip


def known() -> set[str]:
    """All forms that have an answer."""
    lists = (ARITHMETIC, LOADS, STORES, ATOMICS, ROWS, PRODUCTS, BARRIERS, COPIES, WITHOUT_EFFECT, OWN)
    return {form for forms in (*lists, *ELSEWHERE.values()) for form in forms}
