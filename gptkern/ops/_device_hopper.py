"""Device functions that several of Hopper's kernels in Gluon share."""

from gptkern.ops._gluon import gl, gluon, mbarrier


@gluon.jit
def new_barriers(number: gl.constexpr, arrivals: gl.constexpr):
    """Barriers in shared memory, each of so many arrivals a phase."""
    made = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(made.index(i), count=arrivals)
    return made
