"""Taps: the hidden states that a pass hands out, what is added to them, and the layer where it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from gptkern.model.spec import DecoderSpec


@dataclass
class Taps:
    """The hidden states that a pass hands out, what is added to them, and the layer where it ends.

    Attributes:
        layers: Counted as in transformers: 0 is the embeddings, i what block i - 1 made; after the last block
            with the final norm.
        stop: Run only so many blocks; None: all.
        added: By layer, what is added to the residual stream there; after the last block before the norm.
        states: What was found, by layer.
    """

    layers: frozenset[int]
    stop: int | None
    added: Mapping[int, torch.Tensor] = field(default_factory=dict)
    states: dict[int, torch.Tensor] = field(default_factory=dict)

    def wants(self, layer: int) -> bool:
        """True if the whole residual stream is needed there."""
        return layer in self.layers or layer in self.added or layer == self.stop

    def steered(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """``x`` with what is added there."""
        return x + self.added[layer].to(x.dtype) if layer in self.added else x

    def take(self, layer: int, x: torch.Tensor) -> bool:
        """Note ``x`` if it is wanted; True if the pass ends here."""
        if layer in self.layers:
            self.states[layer] = x
        return layer == self.stop


def checked_taps(
    spec: DecoderSpec, hidden_states: Sequence[int], stop_at_layer: int | None, *, cached: bool, scored: bool
) -> Taps | None:
    """The hidden states that a pass hands out; None where none are asked for.

    Args:
        cached, scored: The pass has a cache, or labels.

    Raises:
        TypeError: No numbers of layers.
        ValueError: Layers that the pass does not run, or that go with no cache or labels.
    """
    _check_layers("hidden_states", hidden_states)
    if stop_at_layer is not None:
        _check_layers("stop_at_layer", [stop_at_layer])
    if not len(hidden_states) and stop_at_layer is None:
        return None
    layers = len(spec.layers)
    last = layers if stop_at_layer is None else stop_at_layer
    if stop_at_layer is not None and not 0 <= stop_at_layer < layers:
        raise ValueError(f"GPT: stop_at_layer is {stop_at_layer}; a number from 0 to {layers - 1} is needed")
    if not hidden_states or not all(0 <= layer <= last for layer in hidden_states):
        raise ValueError(f"GPT: hidden_states is {list(hidden_states)}; layers from 0 to {last} are needed")
    if cached:
        raise ValueError("GPT: hidden_states are not handed out of a pass with a cache: run one without")
    if scored and stop_at_layer is not None:
        raise ValueError("GPT: labels need all layers; stop_at_layer is given")
    return Taps(frozenset(hidden_states), stop_at_layer)


def _check_layers(name: str, layers: object) -> None:
    good = isinstance(layers, Sequence) and all(type(layer) is int for layer in layers)
    if not good:
        raise TypeError(f"GPT: {name} is {layers!r:.60}; the numbers of layers are needed")


def checked_steering(
    spec: DecoderSpec,
    steering: Mapping[int, torch.Tensor],
    shape: tuple[int, int],
    attention_mask: torch.Tensor | None,
    *,
    packed: bool,
    last: int | None,
) -> dict[int, torch.Tensor]:
    """Steering vectors by layer, checked, in a shape that adds to the hidden states of a pass.

    Args:
        shape: (batch, seq) of the tokens.
        packed: Tokens lie in one row without a mask, too, as a cache has them.
        last: The layer where the pass ends; None: the last.

    Raises:
        TypeError: No mapping.
        ValueError: A layer that the pass does not run, or vectors of another shape.
    """
    if not isinstance(steering, Mapping):
        raise TypeError(f"GPT: steering is {type(steering).__name__}; a mapping from layers is needed")
    batch, seq = shape
    last, width = len(spec.layers) if last is None else last, spec.width
    found: dict[int, torch.Tensor] = {}
    for layer, vectors in steering.items():
        if layer not in range(last + 1):
            raise ValueError(f"GPT: steering has layer {layer!r}; layers from 0 to {last} are needed")
        if not isinstance(vectors, torch.Tensor) or (
            vectors.shape != (width,) and vectors.shape != (batch, width)
        ):
            given = tuple(vectors.shape) if isinstance(vectors, torch.Tensor) else type(vectors).__name__
            raise ValueError(
                f"GPT: steering of layer {layer} is {given}; a tensor of shape ({width},) or "
                f"({batch}, {width}) is needed"
            )
        if vectors.dim() == 1:
            found[layer] = vectors
        elif attention_mask is not None:
            found[layer] = vectors[attention_mask.bool().nonzero()[:, 0]]
        else:
            found[layer] = vectors.repeat_interleave(seq, 0) if packed else vectors[:, None]
    return found
