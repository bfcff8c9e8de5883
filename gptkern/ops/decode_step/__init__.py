from gptkern.ops.decode_step.checks import MOST_ROWS
from gptkern.ops.decode_step.op import persistent_step
from gptkern.ops.decode_step.weights import LayerWeights, Linear, NormWeights, StepWeights

__all__ = ["MOST_ROWS", "LayerWeights", "Linear", "NormWeights", "StepWeights", "persistent_step"]
