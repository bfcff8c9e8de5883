"""Claims about kernels' addresses, planted faults among them: a line of JSON for each.

    python tests/bounds_run.py NAME...

Needs a process in which kernels are compiled, not interpreted.
"""

from __future__ import annotations

import json
import sys

from gptkern.testing.bounds import kernel

# Name: the kernel, a piece of its text and what is read in its place.
FAULTS = {
    "a row too many": (
        "norm_forward_kernel",
        "arith.cmpi slt, %row_9, %mask",
        "arith.cmpi sle, %row_9, %mask",
    ),
    "rows twice": ("norm_forward_kernel", "arith.muli %2, %c8_i32", "arith.addi %2, %c8_i32"),
    "offsets in int32": (
        *(
            "norm_forward_kernel",
            "%at_out_33, %cst_1 : tensor<8x1xi64>",
            "%at_out_33, %cst_1 : tensor<8x1xi32>",
        ),
    ),
    "a column too many": ("norm_forward_kernel", "arith.cmpi slt, %columns", "arith.cmpi sle, %columns"),
    "all programs own one token": ("append_kv_kernel", "tt.get_program_id x", "tt.get_num_programs x"),
    "parts in one place": ("column_sum", "tt.get_program_id y", "tt.get_num_programs y"),
}


def main() -> None:
    """The command."""
    for name in sys.argv[1:]:
        planted, *change = FAULTS[name]
        findings = kernel(planted, seconds=20, change=(change[0], change[1])).findings()
        print(json.dumps({"name": name, "claims": sorted({f.claim for f in findings})}), flush=True)


if __name__ == "__main__":
    main()
