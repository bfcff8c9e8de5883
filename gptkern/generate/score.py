"""The log-likelihood of texts, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gptkern.engine.option_checks import plain
from gptkern.engine.packed_pass import hidden_states, logits_at
from gptkern.generate.run import needed_tokenizer

if TYPE_CHECKING:
    from gptkern.generate.text import Prompt
    from gptkern.gpt import GPT
    from gptkern.tokenizer import Tokenizer

# A bound on memory: the tokens of the windows in one forward pass.
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Score:
    """The log-likelihood of one text.

    Attributes:
        token_ids: The tokens with a score: the text's, without the first one if nothing comes before it.
        logprobs: The natural logarithm of each token's probability after all tokens before it.
        greedy: True if each token is the most likely one in its place.
    """

    token_ids: list[int]
    logprobs: list[float]
    greedy: bool

    @property
    def total(self) -> float:
        """The logarithm of the probability of all tokens together."""
        return sum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp(-mean log-probability)."""
        # torch's exp overflows to inf; math.exp raises
        return float(torch.tensor(-self.total / len(self.logprobs), device="cpu").exp())


@dataclass(frozen=True)
class _Window:
    """Tokens of one text in one forward pass; those from index ``first`` on get a score."""

    text: int
    ids: list[int]
    first: int


def score(
    model: GPT,
    texts: Prompt | Sequence[Prompt],
    context: Prompt | Sequence[Prompt] | None = None,
    *,
    stride: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[Score]:
    """Score texts; see ``GPT.score``."""
    if stride is not None and (not isinstance(stride, int) or not 0 < stride < model.spec.context):
        raise ValueError(
            f"score: stride is {stride!r}; a whole number from 1 to {model.spec.context - 1} is needed"
        )
    bodies = _as_list("texts", texts)
    contexts = [None] * len(bodies) if context is None else _as_list("context", context)
    if len(contexts) == 1:
        contexts = contexts * len(bodies)
    if len(contexts) != len(bodies):
        raise ValueError(
            f"score: {len(contexts)} contexts for {len(bodies)} texts; one, or one each, is needed"
        )
    windows: list[_Window] = []
    results: list[tuple[list[int], list[float], list[bool]]] = []
    for index, (body, before) in enumerate(zip(bodies, contexts, strict=True)):
        ids = _ids(model, body, tokenizer, whole=before is None)
        if not ids:
            raise ValueError(f"score: text {index} is empty")
        start = _start(model, before, tokenizer)
        if not start and len(ids) == 1:
            raise ValueError(
                f"score: text {index} is one token with none before it, which has no score: "
                'give a longer text, or context="" to begin at the beginning-of-text token'
            )
        results.append((ids if start else ids[1:], [], []))
        windows += _windows(index, start + ids, max(len(start), 1), model.spec.context, stride)
    with torch.inference_mode():
        for group in _groups(windows):
            for window, (logprobs, greedy) in zip(group, _run(model, group), strict=True):
                results[window.text][1].extend(logprobs)
                results[window.text][2].extend(greedy)
    return [Score(ids, logprobs, all(greedy)) for ids, logprobs, greedy in results]


def _as_list(name: str, texts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of texts; one text, or the token ids of one, become a list of one."""
    plainly: Any = plain(texts)
    if isinstance(plainly, str) or _are_ids(plainly, least=1):
        return [plainly]
    if isinstance(plainly, list | tuple):
        for text in plainly:
            if not isinstance(text, str) and not _are_ids(text):
                raise TypeError(f"score: {name} holds {text!r:.60}; texts, or lists of token ids, are needed")
        return list(plainly)
    kind = type(texts).__name__
    raise TypeError(f"score: {name} is {kind}; a text, a list of texts, or token ids are needed")


def _are_ids(value: Any, least: int = 0) -> bool:
    return (
        isinstance(value, list | tuple) and len(value) >= least and all(type(entry) is int for entry in value)
    )


def _ids(model: GPT, text: Prompt, tokenizer: Tokenizer | None, *, whole: bool) -> list[int]:
    """Token ids of a text; only before a ``whole`` text may the tokenizer put a beginning-of-text token."""
    if isinstance(text, str):
        ids = needed_tokenizer(model, tokenizer).encode(text, add_special_tokens=whole)
    else:
        ids = list(text)
    bad = [i for i in ids if not 0 <= i < model.spec.vocab_size]
    if bad:
        raise ValueError(
            f"score: token id {bad[0]} found; ids from 0 to {model.spec.vocab_size - 1} are accepted"
        )
    return ids


def _start(model: GPT, context: Prompt | None, tokenizer: Tokenizer | None) -> list[int]:
    """The tokens before a text: none, its context, or for an empty context the beginning-of-text token."""
    if context is None:
        return []
    ids = _ids(model, context, tokenizer, whole=False)
    if isinstance(context, str):
        ids = needed_tokenizer(model, tokenizer).prefix_ids + ids
    if ids:
        return ids
    bos = model.config.bos_token_id
    if bos is None or bos >= model.spec.vocab_size:
        raise ValueError("score: the context is empty, and the model has no beginning-of-text token")
    return [bos]


def _windows(text: int, ids: list[int], first: int, size: int, stride: int | None) -> Iterator[_Window]:
    """Cut ``ids`` into windows that score every token from ``first`` on exactly once."""
    if first >= len(ids):
        return
    # The last token is only scored, never read.
    if len(ids) <= size + 1:
        yield _Window(text, ids, first)
        return
    if stride is None:
        raise ValueError(
            f"score: text {text} has {len(ids)} tokens with its context, the model's context is {size}: "
            "give stride, the tokens that each further window moves on by"
        )
    end = min(max(size + 1, first + 1), len(ids))
    while True:
        begin = max(0, end - size - 1)
        yield _Window(text, ids[begin:end], first - begin)
        if end == len(ids):
            return
        first, end = end, min(end + stride, len(ids))


def _groups(windows: list[_Window]) -> Iterator[list[_Window]]:
    group: list[_Window] = []
    for window in windows:
        if group and sum(len(w.ids) for w in group) + len(window.ids) > TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def _run(model: GPT, windows: list[_Window]) -> Iterator[tuple[list[float], list[bool]]]:
    """Log-probabilities of each window's tokens, and for each token True if it is the most likely one."""
    states = hidden_states(model, [window.ids[:-1] for window in windows])
    for window, hidden in zip(windows, states, strict=True):
        logprobs: list[float] = []
        greedy: list[bool] = []
        for logits, targets in logits_at(model, hidden[window.first - 1 :], window.ids[window.first :]):
            chosen = logits.gather(1, targets)[:, 0]
            logprobs += (chosen - logits.logsumexp(1)).tolist()
            greedy += (chosen >= logits.amax(1)).tolist()
        yield logprobs, greedy
