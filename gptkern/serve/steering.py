"""Steering vectors that a server has under names, and the sums of them that requests ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from gptkern.checkpoint.storage import read_safetensors
from gptkern.engine.steering import Steering
from gptkern.model.decoder import Decoder
from gptkern.serve.errors import bad_field

# More names than these are not listed in an error.
_MOST_LISTED = 20


class SteeringVectors:
    """The named vectors of a server, in fp32 on the CPU.

    Args:
        registered: ``NAME=FILE`` each, as ``ServeSettings.steering`` has them, checked. A file is safetensors
            with a tensor ``(width,)`` for each layer, named by the layer's number.

    Raises:
        CheckpointError: A file that is not there, or no safetensors.
        TypeError, ValueError: A tensor whose name is no layer of the model, or that is no vector of floats of
            its width; a file without tensors.
    """

    def __init__(self, registered: Sequence[str], model: Decoder) -> None:
        self._vectors: dict[str, dict[int, torch.Tensor]] = {}
        for entry in registered:
            name, _, file = entry.partition("=")
            self._vectors[name] = _read(Path(file), model)

    @property
    def names(self) -> list[str]:
        """The names, as they were registered."""
        return list(self._vectors)

    def sum(self, strengths: Mapping[str, float] | None) -> dict[int, torch.Tensor] | None:
        """The sum of named vectors, each times its strength, by layer; None where nothing is to be added.

        Raises:
            ApiProblem: A name that is not registered.
        """
        strengths = strengths or {}
        for name in strengths:
            if name not in self._vectors:
                raise bad_field("steering", name, self._accepted(), code="steering_not_found")
        total: dict[int, torch.Tensor] = {}
        # In the order of registration: a sum of three does not depend on a request's order then.
        for name, vectors in self._vectors.items():
            strength = strengths.get(name, 0.0)
            for layer, vector in vectors.items() if strength else ():
                added = strength * vector
                total[layer] = total[layer] + added if layer in total else added
        return total or None

    def _accepted(self) -> str:
        if not self._vectors:
            return "this server has no steering vectors: start it with --steering NAME=FILE"
        listed = ", ".join(repr(name) for name in self.names[:_MOST_LISTED])
        more = len(self._vectors) - _MOST_LISTED
        return f"{listed}{f' and {more} more' if more > 0 else ''} are registered"


def _read(file: Path, model: Decoder) -> dict[int, torch.Tensor]:
    vectors: dict[int, torch.Tensor] = {}
    for name, stored in read_safetensors(file).items():
        # Another spelling of the same number ("01") would be a second vector of one layer.
        if not name.isascii() or not name.isdigit() or str(int(name)) != name:
            raise ValueError(f'{file}: tensor {name!r} found; tensors named by their layer ("6") are needed')
        vectors[int(name)] = stored.data
    if not vectors:
        raise ValueError(f"{file}: no tensor found; one for each steered layer is needed")
    Steering.of(vectors, model, source=str(file))
    # Copies: what was read is a view of the file.
    return {layer: vector.to(torch.float32, copy=True) for layer, vector in vectors.items()}
