"""Proof of the drop-in on any checkpoint: numbers against the unaccelerated model, then speed.

Both models are compared with the same model in a wider dtype. gptkern's error may be twice the library's own,
plus one rounding error of the result's scale.

The library's error is a yardstick where it is the sum of many roundings. In one layer's gradient of a short
text it may be that of a few (a norm of heads has head_dim weights, and with two keys a head one score), and
by chance next to nothing. So a parameter's errors are taken together over all layers, by root mean square.
Seen with 60 random texts and a small Gemma 3 in bf16, on a CPU: gptkern's errors were the library's on
average; of single layers 30 of 5,580 gradients were beyond what is allowed, together none came nearer to it
than 0.8.
"""

from __future__ import annotations

import copy
import math
import random
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from gptkern.bench import ceilings
from gptkern.checkpoint.load import open_checkpoint
from gptkern.checkpoint.locate import locate
from gptkern.checkpoint.pending import check_settled
from gptkern.routes import Explanation
from gptkern.transformers.swap import accelerate, explain, refuse_quantised

_LONGEST_PROMPT = 48
_NEW = 12
_SPEED_NEW = 32
Gradients = dict[str, torch.Tensor]
_WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        case: The setting: batch, tokens, padding.
        what: The quantity: "logits", "tokens" or "gradients".
        error: gptkern's distance from the wider dtype, as a share of the result's scale; for tokens, the gap
            between the first different choice and the most likely token, 0 if all agree.
        allowed: The largest error that passes.
    """

    case: str
    what: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """True if the error is allowed; NaN never is."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Speed:
    """Seconds of one new token at batch 1, and the least that reading the weights takes."""

    library: float
    gptkern: float
    floor: float


def load(name: str, *, dtype: torch.dtype | None, device: torch.device) -> Any:
    """A checkpoint as transformers loads it, in evaluation mode.

    Args:
        name: A folder, a hub id, or ``"embedded"``, the package's own model.

    Raises:
        CheckpointError: There is no checkpoint, or a save was cut off.
        ValueError: A single file, or weights that ``gptkern quantize`` wrote.
    """
    folder = locate(name, revision=None, local_files_only=False)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; verify takes a folder that transformers opens")
    check_settled(folder)
    # transformers draws missing weights at random; both models would agree on them.
    open_checkpoint(folder)
    refuse_quantised(transformers.AutoConfig.from_pretrained(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    return model.eval().to(device)


class Verification:
    """A model, its accelerated copy, and the same in a wider dtype.

    Args:
        model: A model that ``accelerate`` takes, in evaluation mode.
        seed: The seed of the random settings.

    Raises:
        TypeError, ValueError: A model that ``accelerate`` refuses, or a dtype without a wider one.
    """

    def __init__(self, model: Any, seed: int = 0) -> None:
        if model.dtype not in _WIDER:
            accepted = ", ".join(str(dtype) for dtype in _WIDER)
            raise ValueError(f"verify: the model is {model.dtype}; accepted are {accepted}")
        self.library = model
        self.gptkern = accelerate(copy.deepcopy(model))
        self.exact = copy.deepcopy(model).to(_WIDER[model.dtype])
        self._seed = seed

    def routes(self) -> Explanation:
        """The routes of the accelerated model."""
        return explain(self.gptkern)

    def checks(self, cases: int) -> Iterator[Check]:
        """Three comparisons for each of ``cases`` random settings."""
        draw = random.Random(self._seed)
        for _ in range(cases):
            batch = draw.randint(1, 3)
            longest = min(_LONGEST_PROMPT, self.library.config.max_position_embeddings - _NEW)
            seq = draw.randint(1, max(longest, 1))
            padding = draw.randint(0, seq - 1) if draw.random() < 0.5 else 0
            generator = torch.Generator().manual_seed(draw.randrange(2**31))
            ids = torch.randint(self.library.config.vocab_size, (batch, seq), generator=generator)
            mask = torch.ones_like(ids)
            mask[0, :padding] = 0
            ids, mask = ids.to(self.library.device), mask.to(self.library.device)
            case = f"batch {batch}, {seq} tokens, {padding} of them padding"
            yield from self._case(case, ids, mask)

    def _case(self, case: str, ids: torch.Tensor, mask: torch.Tensor) -> Iterator[Check]:
        logits, gradients = zip(
            *(_forward_backward(m, ids, mask) for m in (self.gptkern, self.library, self.exact)), strict=True
        )
        ulp = torch.finfo(self.library.dtype).eps
        ours, theirs = (_distance(result, logits[2]) for result in logits[:2])
        allowed = 2 * theirs + ulp
        yield Check(case, "logits", ours, allowed)
        errors = _gradient_errors(gradients[0], gradients[1], gradients[2], ulp)
        found = [Check(case, "gradients", mine, 2 * its + ulp) for mine, its in errors.values()]
        yield max(found, key=lambda check: check.error - check.allowed)
        yield Check(case, "tokens", self._token_gap(ids, mask), 2 * allowed)

    @torch.no_grad()
    def _token_gap(self, ids: torch.Tensor, mask: torch.Tensor) -> float:
        """The gap between the first different choices, relative to the scale of logits; 0 if all agree."""
        options = {"max_new_tokens": _NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        pair = [m.generate(ids, attention_mask=mask, **options) for m in (self.gptkern, self.library)]
        gap = 0.0
        for row in (pair[0] != pair[1]).any(1).nonzero().flatten().tolist():
            first = int((pair[0][row] != pair[1][row]).nonzero()[0])
            start = int(mask[row].argmax())
            logits = self.exact(pair[1][row : row + 1, start:first]).logits[0, -1]
            choices = logits[torch.stack([p[row, first] for p in pair])]
            gap = max(gap, float((choices[0] - choices[1]).abs() / logits.abs().max()))
        return gap

    def speed(self) -> Speed:
        """Time a token of greedy generation at batch 1, the better of two runs each, in turns."""
        ids = torch.ones(1, 16, dtype=torch.long, device=self.library.device)
        best = [float("inf"), float("inf")]
        for _ in range(2):
            for index, model in enumerate((self.library, self.gptkern)):
                best[index] = min(best[index], _seconds(model, ids))
        weights = sum(p.numel() * p.element_size() for p in self.library.parameters())
        floor = weights / ceilings.measure(self.library.device).copy
        return Speed(library=best[0], gptkern=best[1], floor=floor)


def _forward_backward(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
    """Logits of the tokens, and the gradient of every parameter."""
    model.zero_grad()
    output = model(input_ids=ids, attention_mask=mask)
    logits = output.logits[mask.bool()]
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits.to(wide).log_softmax(-1)[:, 0].mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), gradients


def _gradient_errors(
    ours: Gradients, theirs: Gradients, exact: Gradients, ulp: float
) -> dict[str, tuple[float, float]]:
    """(gptkern's error, the library's) of each parameter's gradient, over all layers by root mean square."""
    # What cancels further than this is rounding alone: of a softmax over one key nothing at all is left.
    floor = ulp * ulp * max(float(gradient.abs().max()) for gradient in exact.values())
    errors: dict[str, list[tuple[float, float]]] = {}
    for name, gradient in exact.items():
        pair = (_distance(ours[name], gradient, floor), _distance(theirs[name], gradient, floor))
        errors.setdefault(re.sub(r"\.\d+\.", ".", name), []).append(pair)
    return {name: (_rms(pair[0] for pair in of), _rms(pair[1] for pair in of)) for name, of in errors.items()}


def _rms(values: Iterable[float]) -> float:
    squares = [value * value for value in values]
    return math.sqrt(sum(squares) / len(squares))


def _distance(result: torch.Tensor, exact: torch.Tensor, floor: float = 0.0) -> float:
    """The largest difference, as a share of the largest number of ``exact``, or of ``floor``."""
    scale = exact.abs().max().clamp_min(max(floor, torch.finfo(result.dtype).tiny))
    return float((result.to(exact.dtype) - exact).abs().max() / scale)


def _seconds(model: Any, ids: torch.Tensor) -> float:
    new: int = min(_SPEED_NEW, model.config.max_position_embeddings - ids.shape[1])
    began = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return (time.perf_counter() - began) / float(new)
