"""A warning where Python imports gptkern from a source checkout whose extension is not built.

Started inside a clone, Python imports the clone and not what ``pip install .`` has put elsewhere.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from gptkern import _warn

_ROOT = Path(__file__).parent.parent


def warning(root: Path = _ROOT) -> str | None:
    """The warning's text, with what to type; None where gptkern is installed or its extension is built."""
    if find_spec("gptkern._C") is not None or not (
        (root / "setup.py").is_file() and (root / "csrc").is_dir()
    ):
        return None
    return (
        f"gptkern comes from the source checkout {root}, where its extension is not built, so that sampling "
        "and generation on a CPU are many times slower: type `pip install -e .` there, or start Python in "
        "another folder to use the gptkern that is installed"
    )


def warn() -> None:
    text = warning()
    if text is not None:
        _warn.warn(text, RuntimeWarning)
