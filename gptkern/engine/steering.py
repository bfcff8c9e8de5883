"""Steering vectors: what a request adds to the hidden states between a model's layers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gptkern.model.decoder import Decoder


@dataclass(frozen=True, eq=False)
class Steering:
    """One request's vectors, in the dtype and on the device of a model.

    Attributes:
        vectors: By layer, ``(width,)``; layers are counted as in ``GPT.forward``.
        key: Equal for equal vectors: keys and values that were computed with others are not found again.
    """

    vectors: Mapping[int, torch.Tensor]
    key: bytes

    @classmethod
    def of(cls, vectors: Mapping[int, Any], model: Decoder, source: str = "Engine.add") -> Steering:
        """The vectors of a request for ``model``, a copy of each.

        Args:
            source: The function that errors name.

        Raises:
            TypeError: A vector that is no tensor of floating-point numbers.
            ValueError: A layer that the model does not have, a vector of another shape, or not finite.
        """
        layers, width = len(model.spec.layers), model.spec.width
        found: dict[int, torch.Tensor] = {}
        digest = hashlib.blake2b(digest_size=16)
        for layer, vector in sorted(vectors.items()):
            where = f"{source}: steering of layer {layer}"
            if not 0 <= layer <= layers:
                raise ValueError(f"{where}; layers from 0 to {layers} are needed")
            if not isinstance(vector, torch.Tensor) or not vector.is_floating_point():
                kind = vector.dtype if isinstance(vector, torch.Tensor) else type(vector).__name__
                raise TypeError(f"{where} is {kind}; a tensor of floats is needed")
            if vector.shape != (width,):
                shape = tuple(vector.shape)
                raise ValueError(f"{where} has shape {shape}; the model's width, ({width},), is needed")
            own = vector.detach().to(model.device, model.dtype, copy=True)
            if not own.isfinite().all():
                raise ValueError(f"{where} is not finite in {model.dtype}")
            digest.update(layer.to_bytes(4, "little"))
            digest.update(own.cpu().view(torch.uint8).numpy().tobytes())
            found[layer] = own
        return cls(found, digest.digest())
