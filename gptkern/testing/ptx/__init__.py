"""An executor of PTX on a CPU: what the compiler made of a kernel, run on real arrays and watched.

Triton's interpreter runs a kernel's source. Between it and a GPU stands the compiler, with layouts, waits and
barriers of its own. This executes the text that the assembler is given, all lanes of a block as arrays,
blocks in a seeded order, and checks what a GPU does not: bounds and alignment of every access, memory that
nobody wrote, asynchronous copies read before their wait, shared memory between barriers, the order of blocks.
"""

from gptkern.testing.ptx.counters import Counters
from gptkern.testing.ptx.hopper import TensorMap
from gptkern.testing.ptx.launch import execute, reachable
from gptkern.testing.ptx.memory import Fault

__all__ = ["Counters", "Fault", "TensorMap", "execute", "reachable"]
