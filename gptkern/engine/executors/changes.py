"""The check that a model is as it was built, so that its weights determine all that it computes."""

from __future__ import annotations

import functools

import torch
from torch import nn

from gptkern.as_built import Blueprint, forwards_of, own_method, skeleton
from gptkern.config import Config
from gptkern.model.decoder import Decoder, Transformer
from gptkern.model.layers import MLP, Attention, Block, Norm
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


@functools.lru_cache(maxsize=8)
def _blueprint(config: Config) -> Blueprint:
    built = skeleton(lambda: Decoder(config))
    return Blueprint(built, forwards=_FORWARDS, instead={nn.Linear: (QuantizedLinear,)})
