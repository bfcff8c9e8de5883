"""Every way in which weights are updated makes another version, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptkern import GPT, GPTConfig
from gptkern.engine.weights_version import WeightsVersion

CONFIG = GPTConfig(vocab_size=11, n_positions=8, n_layer=2, n_head=2, n_embd=8)


def _step(model: GPT, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-30)
    optimizer(model.parameters()).step()


@torch.no_grad()
def _write(model: GPT) -> None:
    model.transformer.h[1].mlp.c_fc.weight[3, 5] = 0.0


@torch.inference_mode()
def _write_in_inference_mode(model: GPT) -> None:
    model.transformer.h[0].ln_2.bias[7] = 1.0


def _set(model: GPT, name: str, value: Any) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: _step(m, lambda p: torch.optim.SGD(p, lr=1.0)),
        lambda m: _step(m, lambda p: torch.optim.AdamW(p, lr=1e-9, weight_decay=0.0, fused=True)),
        _write,
        _write_in_inference_mode,
        lambda m: m.load_state_dict(GPT(CONFIG).state_dict()),
        lambda m: m.double(),
        lambda m: _set(m, "transformer.h.0.ln_1.weight", torch.nn.Parameter(torch.ones(8))),
        lambda m: m.transformer.h[1].attn.c_proj.weight.data.add_(1.0),
        lambda m: _set(m, "transformer.h.1.attn.scale", 0.25),
        lambda m: _set(m, "transformer.h.1.mlp", m.transformer.h[0].mlp),
        lambda m: vars(m)["scaling"].update(default=2.0),
        lambda m: vars(m)["active"].append("other"),
        lambda m: _set(m, "transformer.h.0.mlp.forward", lambda x: 2 * x),
    ],
)  # fmt: skip
def test_a_change_makes_another_version(change: Callable[[GPT], object]) -> None:
    model = GPT(CONFIG)
    # As adapters have them.
    vars(model).update(scaling={"default": 1.0}, active=["default"])
    _set(model, "transformer.h.0.mlp.forward", lambda x: x)
    versions = WeightsVersion(model)
    seen = [versions.current(), versions.current()]
    change(model)
    seen += [versions.current(), versions.current()]
    assert seen == [0, 0, 1, 1]
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert versions.current() == 2


def test_a_hook_makes_another_version_at_every_look() -> None:
    model = GPT(CONFIG)
    versions = WeightsVersion(model)
    assert versions.current() == 0
    hook = model.transformer.h[0].register_forward_hook(lambda *_: None)
    assert [versions.current(), versions.current()] == [1, 2]
    hook.remove()
    assert [versions.current(), versions.current()] == [3, 3]


def test_another_forward_of_a_class_makes_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(CONFIG)
    versions = WeightsVersion(model)
    monkeypatch.setattr(type(model.transformer.h[0].ln_1), "forward", lambda self, x: x)
    assert [versions.current(), versions.current()] == [1, 1]


def test_use_makes_none() -> None:
    model = GPT(CONFIG)
    versions = WeightsVersion(model)
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=3)
    model(torch.tensor([[1, 2]]), torch.tensor([[1, 2]])).loss.backward()
    model.train()
    model.eval()
    assert versions.current() == 0


def test_a_model_made_in_inference_mode_is_watched_by_its_values() -> None:
    with torch.inference_mode():
        model = GPT(CONFIG)
    versions = WeightsVersion(model)
    assert versions.current() == 0
    with torch.inference_mode():
        model.lm_head.weight.mul_(2.0)
    assert versions.current() == 1


def test_a_write_that_leaves_no_trace_is_told() -> None:
    model = GPT(CONFIG)
    versions = WeightsVersion(model)
    model.transformer.wte.weight.data[1, 1] += 1.0
    versions.changed()
    assert versions.current() == 1
