"""What a forward pass returns, as transformers' users read it; a model that torch.compile takes whole."""

from __future__ import annotations

import pytest
import torch

from gptkern import GPT, GPTConfig

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=64, n_positions=8, n_layer=1, n_head=2, n_embd=32)).eval()


def test_the_output_is_indexed_as_transformers_is(model: GPT) -> None:
    output = model(IDS, labels=IDS)
    assert output[0] is output["loss"] is output.loss
    assert output[1] is output["logits"] is output[-1] is output.logits
    loss, logits = output[:2]
    assert (loss, logits) == output.to_tuple() == (output.loss, output.logits)
    bare = model(IDS)
    assert bare[0] is bare.logits and bare.to_tuple() == (bare.logits,)
    with pytest.raises(KeyError, match="no 'loss' here: logits always, loss where labels were given"):
        bare["loss"]
    with pytest.raises(IndexError):
        bare[1]


def test_a_model_compiles_in_one_graph(model: GPT) -> None:
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)
        torch.testing.assert_close(compiled(IDS, labels=IDS).loss, model(IDS, labels=IDS).loss)
        with pytest.raises((IndexError, RuntimeError)):
            compiled(IDS + 64)
    finally:
        torch._dynamo.reset()
    with pytest.raises(ValueError, match="input_ids holds 70; token ids from 0 to 63 are accepted"):
        model(IDS + 64)
