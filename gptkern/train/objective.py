"""Objectives: modules that hold the model and return a batch's summed loss.

The head and the loss are one fused op, so no training step ever holds the logits of its batch.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from gptkern import ops
from gptkern.as_built import untouched
from gptkern.checkpoint.errors import CheckpointError, first_line, shown
from gptkern.checkpoint.files import LARGEST_JSON, read_bytes
from gptkern.checkpoint.locate import LABELS
from gptkern.checkpoint.storage import read_safetensors
from gptkern.gpt import GPT
from gptkern.model.attend import DenseAttend
from gptkern.model.layers import LINEAR
from gptkern.ops.linear_cross_entropy.reference import logit_losses


def hidden_states(model: GPT, ids: torch.Tensor, *, dropout: bool = True) -> torch.Tensor:
    """The last hidden states, ``(rows, seq, width)``. Rows are padded on the right, if at all.

    Padding needs no mask: attention is causal, so no token sees what follows it.

    Args:
        dropout: False leaves it out in training mode too.
    """
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    dropout_p = model.spec.attention_dropout if model.training and dropout else 0.0
    hidden: torch.Tensor = model.transformer(ids, positions, DenseAttend(dropout_p, dropout))
    return hidden


class LanguageModelling(nn.Module):
    """Cross-entropy of each next token."""

    def __init__(self, model: GPT, z_loss: float = 0.0, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.z_loss, self.label_smoothing = z_loss, label_smoothing

    def forward(
        self, ids: torch.Tensor, targets: torch.Tensor, last: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The sum of the losses of ``targets (rows, seq)``; in evaluation without z-loss or smoothing."""
        extras = (self.z_loss, self.label_smoothing) if self.training else (0.0, 0.0)
        hidden, head = hidden_states(self.model, ids), self.model.lm_head
        spec = self.model.spec
        bias = getattr(head, "bias", None)
        if untouched(head, *LINEAR) and (bias is None or spec.logits_scale == 1.0):
            hidden = hidden if spec.logits_scale == 1.0 else hidden * spec.logits_scale
            return ops.linear_cross_entropy(
                hidden, head.weight, targets, -100, "sum", *extras, bias=bias, softcap=spec.logits_softcap
            )
        # A head that is hooked or put in is called, at the price of its logits.
        return logit_losses(self.model.logits(hidden).flatten(0, -2), targets.flatten(), -100, *extras).sum()


class Classification(nn.Module):
    """Cross-entropy of each row's label, by a small head on the hidden state of its last token."""

    def __init__(self, model: GPT, labels: list[str], label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.labels = model, labels
        self.label_smoothing = label_smoothing
        self.head = nn.Linear(model.spec.width, len(labels))
        nn.init.normal_(self.head.weight, std=model.config.initializer_range)
        nn.init.zeros_(self.head.bias)
        # The language model's head has no part in it; its matrix is the embedding's where they are tied.
        if not model.config.tie_word_embeddings:
            model.lm_head.weight.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Classification:
        """The classifier that a run wrote into its ``model``, ``best`` or a checkpoint, in evaluation mode.

        Raises:
            CheckpointError: There is no model there, or no classifier's head with it; one is damaged.
        """
        folder = Path(folder)
        labels = _read_labels(folder / LABELS)
        found = cls(GPT.from_pretrained(folder), labels)
        path = folder / "classifier.safetensors"
        weights = read_safetensors(path)
        for name, parameter in found.head.named_parameters():
            if name not in weights or weights[name].shape != parameter.shape:
                raise CheckpointError(f"{path}: {name} of shape {tuple(parameter.shape)} is needed")
        found.head.load_state_dict({name: stored.data for name, stored in weights.items()}, strict=False)
        return found.eval()

    def logits(self, ids: torch.Tensor, last: torch.Tensor, *, dropout: bool = True) -> torch.Tensor:
        """``(rows, labels)`` in fp32: ``ids (rows, seq)``, each row's last token at ``last``."""
        hidden = hidden_states(self.model, ids, dropout=dropout)
        rows = torch.arange(len(ids), device=ids.device)
        scores: torch.Tensor = self.head(hidden[rows, last].to(self.head.weight.dtype))
        return scores.float()

    def forward(
        self, ids: torch.Tensor, targets: torch.Tensor, last: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The sum of the losses of ``targets (rows,)``."""
        assert last is not None
        smoothing = self.label_smoothing if self.training else 0.0
        return nn.functional.cross_entropy(
            self.logits(ids, last), targets, reduction="sum", label_smoothing=smoothing
        )

    @torch.no_grad()
    def classify(self, texts: list[str]) -> list[str]:
        """The label of each text, without dropout in any mode."""
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            raise ValueError("classify: the model has no tokenizer")
        device = self.model.device
        found = []
        for text in texts:
            ids = torch.tensor([tokenizer.encode(text)[-self.model.spec.context :]], device=device)
            scores = self.logits(ids, torch.tensor([ids.shape[1] - 1], device=device), dropout=False)
            found.append(self.labels[int(scores.argmax())])
        return found


def _read_labels(path: Path) -> list[str]:
    try:
        labels = json.loads(read_bytes(path, LARGEST_JSON))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no labels of a classifier: {first_line(error)}") from error
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise CheckpointError(f"{path}: a list of labels is needed, {shown(labels)} found")
    return labels
