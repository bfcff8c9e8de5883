"""gptkern's kernels in a model of your own: a small decoder that learns to count.

    python examples/kernels_alone.py --steps 60

Nothing of gptkern's own model is used. On a GPU the ops run as kernels, on a CPU as PyTorch expressions.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from gptkern.ops import add_rms_norm, flash_attention, gelu_mlp, linear_cross_entropy, rms_norm

VOCAB, SEQ = 32, 24


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a norm; the norm takes the residual addition along."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``x`` is what the block before has computed and not yet added to ``residual``."""
        normed, residual = add_rms_norm(x, residual, self.norm_1)
        q, k, v = self.qkv(normed).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        attended = self.out(flash_attention(q, k, v, causal=True).flatten(-2))
        normed, residual = add_rms_norm(attended, residual, self.norm_2)
        fc, proj = self.fc, self.proj
        return gelu_mlp(normed, fc.weight, fc.bias, proj.weight, proj.bias, activation="silu"), residual


class Decoder(nn.Module):
    """Embeddings, two blocks, and a head that shares the embedding's weights."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, width), nn.Embedding(SEQ, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.norm = nn.Parameter(torch.ones(width))

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        residual = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        x = torch.zeros_like(residual)
        for block in self.blocks:
            x, residual = block(x, residual)
        return rms_norm(x + residual, self.norm)

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of each next token; the logits of the whole batch are never in memory."""
        return linear_cross_entropy(self.hidden(ids[:, :-1]), self.tokens.weight, ids[:, 1:])


def counting(batch: int, device: torch.device) -> torch.Tensor:
    """Rows that count upwards from a random number, in steps of one, two or three."""
    start, stride = torch.randint(VOCAB, (batch, 1)), torch.randint(1, 4, (batch, 1))
    return ((start + stride * torch.arange(SEQ)) % VOCAB).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Decoder().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, args.steps + 1):
        loss = model.loss(counting(32, device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
