"""One small call of everything in which programs of a launch work together, for compute-sanitizer.

The sampler in clusters of eight and of two blocks, a linear layer whose K is split, attention in several
splits, and a persistent step of two layers. Each result is compared, so that the script also runs without
the tool.
"""

from __future__ import annotations

import torch
from stages import tiny

from gptkern.bench.suites import _models as models
from gptkern.bench.suites.decode_step import filled
from gptkern.engine.executors.graph import GraphExecutor
from gptkern.engine.executors.persistent import PersistentExecutor
from gptkern.ops.sample import SamplerState, SamplingParams, sample

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sampler(batch: int) -> None:
    """Top-k, top-p and the draw, on the device as on the CPU."""
    vocab = 50257 if DEVICE.type == "cuda" else 257
    logits = torch.randn(batch, vocab)
    tokens = []
    for where in (torch.device("cpu"), DEVICE):
        params = SamplingParams.make(batch, vocab, temperature=0.8, top_k=50, top_p=0.9, device=where)
        state = SamplerState.make(batch, vocab, seed=1, device=where)
        tokens.append(sample(logits.to(where), params, state=state).tokens.cpu())
    assert torch.equal(*tokens), "the sampler's tokens differ"


def steps(*, dry: bool = DEVICE.type == "cpu") -> None:
    """Two steps of two layers, by separate launches and by one; several splits of K and of the sequence."""
    config = tiny(models.GPT2) if dry else models.GPT2.replace(n_layer=2, n_positions=2048)
    dtype = torch.float32 if dry else torch.bfloat16
    model = models.ours(config, dtype, DEVICE)
    found = []
    for kind in (GraphExecutor, PersistentExecutor):
        step = kind(model, filled(config, 2, 20 if dry else 600, dtype, DEVICE))
        tokens = torch.tensor([3, 5], device=DEVICE)
        with torch.inference_mode():
            found += [step(tokens) for _ in range(2)][-1:]
    assert torch.equal(*found), "the persistent step's bits differ"


if __name__ == "__main__":
    torch.manual_seed(0)
    sampler(1)
    sampler(33)
    steps()
    print("all the same")
