"""The one error of everything that reads or writes checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written.

    The message names the file, the tensor where there is one, what was expected and what was found.
    """


def some(names: list[str], shown: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
