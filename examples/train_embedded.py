"""Train the model that ships in the package: a byte-level GPT on Tiny Shakespeare.

    python examples/train_embedded.py tinyshakespeare.txt --out embedded

The first 90% of the text trains, the last 10% is held out and only ever measured. About an hour on
one CPU core. ``--out`` gets a checkpoint that `gptkern generate --model` opens, and report.json with
the settings and the held-out bits per byte of the stored, bf16-rounded weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from gptkern.config import GPTConfig
from gptkern.durable import write_file
from gptkern.gpt import GPT
from gptkern.tokenizer import Tokenizer

CONFIG = GPTConfig(
    vocab_size=256,
    n_positions=512,
    n_layer=4,
    n_head=3,
    n_embd=192,
    resid_pdrop=0.1,
    embd_pdrop=0.1,
    attn_pdrop=0.0,
    bos_token_id=None,
    eos_token_id=None,
)
BATCH, SEQ = 32, 512
STRIDE = 128
MUON_LR, ADAM_LR, WARMUP = 0.02, 3e-3, 50


def window_starts(data: torch.Tensor, steps: int) -> torch.Tensor:
    """Where each step's windows of SEQ + 1 bytes start, ``(steps, BATCH)``."""
    return torch.randint(len(data) - SEQ, (steps, BATCH))


def learning_rate_scale(step: int, steps: int) -> float:
    """Linear warm-up, constant, then linear decay to zero over the last 60%."""
    warm = min(1.0, (step + 1) / WARMUP)
    return warm * min(1.0, (steps - step) / (0.6 * steps))


@torch.no_grad()
def bits_per_byte(model: GPT, data: torch.Tensor) -> float:
    """Held-out bits per byte: windows of SEQ bytes every STRIDE, each byte scored once.

    Every byte but those of the first window has at least SEQ - STRIDE bytes of context.
    """
    model.eval()
    total, counted, scored_to = 0.0, 0, 1
    for start in range(0, len(data), STRIDE):
        window = data[start : start + SEQ + 1]
        logits = model(window[None, :-1]).logits[0].float()
        losses = F.cross_entropy(logits, window[1:], reduction="none")
        fresh = losses[max(0, scored_to - start - 1) :]
        total += fresh.sum().item()
        counted += len(fresh)
        scored_to = start + len(window)
        if scored_to >= len(data):
            break
    assert counted == len(data) - 1
    model.train()
    return total / counted / math.log(2)


def optimizers(model: GPT) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, biases and norms."""
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def train(data: torch.Tensor, held_out: torch.Tensor, steps: int) -> GPT:
    """Train for ``steps`` steps of BATCH windows, printing the losses."""
    model = GPT(CONFIG).train()
    stepping = optimizers(model)
    peaks = [group["lr"] for optimizer in stepping for group in optimizer.param_groups]
    starts = window_starts(data, steps)
    window = torch.arange(SEQ + 1)
    began = time.monotonic()
    for step in range(steps):
        scale = learning_rate_scale(step, steps)
        groups = [group for optimizer in stepping for group in optimizer.param_groups]
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * scale
        rows = data[starts[step][:, None] + window]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(rows[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in stepping:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            print(f"step {step} loss {loss.item():.4f} {time.monotonic() - began:.0f}s", flush=True)
        if step % 200 == 199:
            print(f"step {step} held-out {bits_per_byte(model, held_out[:20000]):.4f} bits/byte", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="the training text, UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    text = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8).long()
    cut = len(text) * 9 // 10
    model = train(text[:cut], text[cut:], args.steps).to(torch.bfloat16)
    model.tokenizer = Tokenizer.bytes()
    model.save_pretrained(args.out)
    report = {
        "held_out_bits_per_byte": round(bits_per_byte(model.float(), text[cut:]), 4),
        "context": SEQ,
        "stride": STRIDE,
        "steps": args.steps,
        "tokens": args.steps * BATCH * SEQ,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": args.seed,
    }
    write_file(args.out / "report.json", json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
