"""The check that a model is as it was built, so that its weights determine all that it computes."""

from __future__ import annotations

import functools

import torch
from torch import nn

from gptkern.as_built import Blueprint, forwards_of, own_method, skeleton
from gptkern.config import Config
from gptkern.model.decoder import MLP, Attention, Block, Decoder, Norm, Transformer
from gptkern.model.spec import DecoderSpec
from gptkern.quantize import QuantizedLinear

_FORWARD = Decoder.forward
_PASS = ("__call__", "forward")
_TORCHS: tuple[type, ...] = (nn.Embedding, nn.ModuleList, nn.Linear)
_OURS: tuple[type, ...] = (QuantizedLinear, Transformer, Block, Norm, Attention, MLP)
_FORWARDS = {kind: forwards_of(kind) for kind in (*_TORCHS, *_OURS)}


def changed(model: Decoder) -> str | None:
    """The first difference between ``model`` and the model as built; None if there is none."""
    if type(model).forward is not _FORWARD or own_method(model, _PASS) is not None:
        return f"the model, a {type(model).__name__}, has a forward of its own"
    return _blueprint(model.config).difference(model)


def weights_alone(model: Decoder) -> str | None:
    """The reason why a decoder's weights do not say all that it computes; None if they do."""
    reason = changed(model)
    if reason is None and torch.is_autocast_enabled(model.device.type):
        reason = "autocast is on"
    return reason


def unlike_gpt(spec: DecoderSpec) -> str | None:
    """The first part of a decoder that GPT-1 and GPT-2 do not have; None if there is none."""
    parts = {
        "RMS norms": spec.norm.kind == "rms",
        "key and value heads of a number of their own": spec.kv_heads != spec.heads,
        "heads that are not width / heads wide": spec.q_width != spec.width,
        f"norms in the place {spec.norm_place!r}": spec.norm_place not in ("before", "after"),
        "parallel branches": spec.parallel,
        "gated MLPs": spec.gated,
        "norms of queries and keys": spec.qk_norm is not None,
        "rotary positions": bool(spec.rotaries),
        "no learned positions": not spec.learned_positions or spec.position_offset > 0,
        "windows": any(layer.window is not None for layer in spec.layers),
        "soft caps": spec.attention_softcap is not None or spec.logits_softcap is not None,
        "a bias of the head": spec.head_bias,
        "scaled embeddings, branches or logits": any(
            scale != 1.0 for scale in (spec.embedding_scale, spec.residual_scale, spec.logits_scale)
        ),
    }
    found = next((part for part, there in parts.items() if there), None)
    return found and f"this model's {found} are not among what it computes"


@functools.lru_cache(maxsize=8)
def _blueprint(config: Config) -> Blueprint:
    built = skeleton(lambda: Decoder(config))
    return Blueprint(built, forwards=_FORWARDS, instead={nn.Linear: (QuantizedLinear,)})
