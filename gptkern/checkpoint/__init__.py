"""Reading and writing weights, safely.

``locate`` finds a checkpoint (path, hub id, the embedded model), one module a format says what is in
it (``hf``, ``nanogpt``, ``llmc``), ``load`` puts it into a model, ``save`` writes one, all or nothing
(``replace``). ``storage`` is how tensors lie in files.
"""

from gptkern.checkpoint.errors import CheckpointError

__all__ = ["CheckpointError"]
