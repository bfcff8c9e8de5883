"""Attention backward for Hopper: numbers of a call, a tile and a turn, in shared memory.

In registers they would take the place of accumulators: a kernel's arguments, too, since warps that have a
part of their own are given copies. See ``kernels_hopper_backward`` for the layout and the barriers.
"""

from gptkern.ops._gluon import gl, gluon

# Numbers in shared memory, in groups of four, of which a load may take all. The call's own, from the start:
SEQUENCES, HEADS, HEADS_K, GROUP = (gl.constexpr(i) for i in range(4))
MAX_SEQ_Q, MAX_SEQ_K, TOKENS_Q, TOKENS_K = (gl.constexpr(4 + i) for i in range(4))
LEFT, RIGHT, SECTION, TILES = (gl.constexpr(8 + i) for i in range(4))
TOTAL, PROGRAMS, PADDED = (gl.constexpr(12 + i) for i in range(3))
# Those that the producer leaves of each tile of keys:
SUMS = gl.constexpr(16)  # times BLOCK_M queries of all heads of the group; 0: none sees the tile; -1: no tile
BLOCKS = gl.constexpr(17)  # times BLOCK_M queries of a head
FULL_FIRST = gl.constexpr(18)  # of these, the first that no mask cuts,
FULL_END = gl.constexpr(19)  # and the first behind them that one cuts
START_N = gl.constexpr(20)  # the first key
LENGTH_K = gl.constexpr(21)  # keys from there to the sequence's end
LENGTH_Q = gl.constexpr(22)  # queries from the tile's first to the sequence's end
SHIFT = gl.constexpr(23)  # the key on the first query's diagonal, from the tile's first on
# Rows times heads fit in int32: 2^31 rows of 64 halves are 275 GB.
KEY_ROW = gl.constexpr(24)  # in dk, of the first key
OUT_ROW = gl.constexpr(25)  # in dq, of the first query
SUM_ROW = gl.constexpr(26)  # in dq's sums, of the first query
# And those that the warp that keeps turns leaves of each of two turns:
TURN = gl.constexpr(28)
TURN_NUMBERS = gl.constexpr(4)
TURN_SUM = gl.constexpr(0)  # the row of the sum
TURN_EARLIER = gl.constexpr(1)  # tiles of keys that have added to it
TURN_LENGTH = gl.constexpr(2)  # queries to the sequence's end
TURN_OUT = gl.constexpr(3)  # the row of dq; -1: the turn is not the last
NUMBERS = gl.constexpr(36)


@gluon.jit
def here():
    """Zero, as only the machine knows: what is computed with it stays where it stands.

    Places of a lane's numbers that few tiles need would else be computed before the loops, and held in
    registers that the accumulators need.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def hidden(x):
    """A number whose multiples are computed where they are used.

    Else each offset that grows with it is a register that grows beside it, which the accumulators need.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def number(numbers, i):
    """One of some numbers in shared memory."""
    return gl.sum(numbers.index(i).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def tell(numbers, i, value):
    """Set one of some numbers in shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    numbers.index(i).store(gl.zeros([1], gl.int32, layout) + value)
