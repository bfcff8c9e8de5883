"""Triton as the kernels see it; where it is not installed, names that launch a pack's code all the same.

Without Triton a kernel is its name and its parameters. ``_launch`` finds its machine code in a pack (see
``gptkern.ops.pack``); whatever a pack lacks then cannot be compiled, and says so.
"""

from __future__ import annotations

from gptkern.ops import _without_triton

__all__ = ["TensorDescriptor", "gdc_launch_dependents", "gdc_wait", "tl", "triton"]

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.tools.tensor_descriptor import TensorDescriptor as _Checked

    class TensorDescriptor(_Checked):
        """A map whose conditions the ops have asked for already, and which checks none again."""

        round_f32_to_tf32 = False  # Triton 3.6 has no such field

        def __post_init__(self) -> None: ...

except ImportError:
    triton, tl = _without_triton.triton, _without_triton.language
    gdc_launch_dependents = gdc_wait = None
    TensorDescriptor = _without_triton.TensorDescriptor  # type: ignore[assignment,misc]
