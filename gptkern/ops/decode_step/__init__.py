from gptkern.ops.decode_step.checks import MOST_ROWS
from gptkern.ops.decode_step.op import persistent_step
from gptkern.ops.decode_step.rows import (
    Linear,
    NormWeights,
    Positions,
    StepProgram,
    StepRow,
    widest_normed_head,
)
from gptkern.ops.decode_step.table import ALIGNMENT

__all__ = [
    "ALIGNMENT",
    "MOST_ROWS",
    "Linear",
    "NormWeights",
    "Positions",
    "StepProgram",
    "StepRow",
    "persistent_step",
    "widest_normed_head",
]
