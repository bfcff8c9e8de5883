"""A line of JSON for each kernel: the number of accesses, and what does not hold."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from gptkern.testing.bounds import SPECS, kernel


def main() -> None:
    """The command."""
    for name in sys.argv[1:] or SPECS:
        asked = kernel(name)
        findings = [asdict(finding) for finding in asked.findings()]
        line = {"kernel": name, "accesses": len(asked.model.accesses), "findings": findings}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
