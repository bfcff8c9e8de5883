"""The table of a whole pass's weights, as the persistent kernel takes it, from the decoder's program."""

from __future__ import annotations

from gptkern.model.decoder import Decoder
from gptkern.model.program import program
from gptkern.model.weights import decoder_weights
from gptkern.ops.decode_step import LayerWeights, StepWeights


def step_weights(model: Decoder) -> StepWeights:
    """All of the model's weights where they lie now."""
    spec, weights = model.spec, decoder_weights(model)
    assert weights.positions is not None
    norms = {
        (stage.layer, stage.weight): None if stage.norm is None else weights.norm(stage.norm)
        for stage in program(spec)
    }
    layers = []
    for index, (layer, its) in enumerate(zip(weights.layers, spec.layers, strict=True)):
        norm_1, norm_2 = norms[index, "qkv"], norms[index, "fc"]
        assert norm_2 is not None
        layers.append(
            LayerWeights(norm_1, layer.qkv, layer.out, norm_2, layer.fc, layer.proj, its.attention_scale)
        )
    last = norms[len(layers), "head"]
    assert last is not None
    return StepWeights(
        weights.tokens,
        weights.positions,
        tuple(layers),
        last,
        weights.head,
        heads=spec.heads,
        eps=spec.norm.eps,
        activation=spec.activation,
    )
