"""Calls at the edges of an op: sizes around its tiles, strides beyond 2^31, numbers that trip kernels.

``trial(seed)`` draws one call of one op, ``check`` compares it with the reference, values and gradients, by
the op's own measure. A trial's ``repr`` is the whole call, so that a failing one can be pasted::

    from gptkern.testing.shapes import Trial, check
    check(Trial("layer_norm", sizes=(2, 17), values="inf", seed=5))

Ops that do not take part have tests of their own for this: the sampler, and the persistent step, whose
phases are those of the decode ops bit for bit.
"""

from __future__ import annotations

from gptkern.testing.shapes.compare import check as check
from gptkern.testing.shapes.drawing import VALUES as VALUES
from gptkern.testing.shapes.drawing import Trial as Trial
from gptkern.testing.shapes.drawing import distant as distant
from gptkern.testing.shapes.families import FAMILIES as FAMILIES
from gptkern.testing.shapes.families import trial as trial
