"""A look at a model's state sees what may change which executor serves it, and nothing that use leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptkern import GPT, GPTConfig
from gptkern.engine.model_state import ModelState

CONFIG = GPTConfig(vocab_size=11, n_positions=8, n_layer=2, n_head=2, n_embd=8)


def _lay(model: GPT, lay: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weight = model.transformer.h[1].attn.c_proj.weight
    weight.data = lay(weight.data)


def _set(model: GPT, name: str, value: Any) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


CHANGES: dict[str, Callable[[GPT], Any]] = {
    "an attribute": lambda m: _set(m, "transformer.h.0.attn.scale", 0.25),
    "an attribute more": lambda m: _set(m, "transformer.h.0.attn.more", 1),
    "an attribute of the model": lambda m: _set(m, "config", CONFIG.replace(n_positions=9)),
    "a list": lambda m: m.transformer.h[1].mlp.active.append("other"),
    "a module": lambda m: _set(m, "transformer.h.1.mlp.c_fc", torch.nn.Linear(8, 32)),
    "a parameter": lambda m: _set(m, "lm_head.weight", torch.nn.Parameter(torch.ones(11, 8))),
    "a buffer": lambda m: m.transformer.h[0].register_buffer("mask", torch.ones(2)),
    "the dtype of one": lambda m: _lay(m, torch.Tensor.double),
    "the layout of one": lambda m: _lay(m, torch.Tensor.t),
    "the shape of one": lambda m: _lay(m, torch.Tensor.flatten),
    "a forward of its own": lambda m: _set(m, "transformer.h.0.mlp.forward", lambda x: x),
    "a forward hook": lambda m: m.lm_head.register_forward_hook(lambda *_: None),
    "a backward hook": lambda m: m.lm_head.register_full_backward_hook(lambda *_: None),
    "another device": lambda m: m.to("meta"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change: Callable[[GPT], Any]) -> None:
    model = GPT(CONFIG)
    _set(model, "transformer.h.1.mlp.active", ["default"])
    state = ModelState(model)
    assert not state.differs()
    change(model)
    assert state.differs()


def test_another_forward_of_a_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(CONFIG)
    state = ModelState(model)
    monkeypatch.setattr(type(model.transformer.h[0].ln_1), "forward", lambda self, x: x)
    assert state.differs()


def test_autocast_is_seen() -> None:
    state = ModelState(model := GPT(CONFIG))
    with torch.autocast("cpu", torch.bfloat16):
        assert state.differs()
    assert not state.differs()
    assert model.device.type == "cpu"


def test_use_is_not_seen() -> None:
    model = GPT(CONFIG)
    state = ModelState(model)
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=3)
    model(torch.tensor([[1, 2]]), torch.tensor([[1, 2]])).loss.backward()
    model.train()
    model.eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    assert not state.differs()
