"""Texts as a batch for a model: ids and mask, cut and filled up, under transformers' names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Padding = bool | Literal["longest", "max_length", "do_not_pad"]
Side = Literal["left", "right"]


class Encoding(dict[str, Any]):
    """``input_ids`` and ``attention_mask``, as keys and as attributes: ``model.generate(**encoding)``.

    Attributes:
        input_ids: The ids, with ``return_tensors="pt"`` int64 of shape ``(batch, seq)``.
        attention_mask: 1 for tokens and 0 for padding, of the same shape.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"Encoding has no {name!r}; it has {', '.join(self)}")
        return self[name]

    def to(self, device: torch.device | str) -> Encoding:
        """A copy with all tensors on ``device``."""
        return Encoding({name: value.to(device) for name, value in self.items()})


def encode_batch(
    texts: str | Sequence[str],
    encode: Callable[[str], tuple[list[int], list[int], list[int]]],
    *,
    pad_id: int,
    padding: Padding,
    truncation: bool,
    max_length: int | None,
    return_tensors: str | None,
    padding_side: Side,
    truncation_side: Side,
) -> Encoding:
    """The encoding of a batch of texts; ``Tokenizer.__call__`` explains the options.

    Args:
        encode: A text's ids and those that stand before and after them, which cutting leaves whole.
    """
    _check(texts, padding, truncation, max_length, return_tensors, padding_side)
    single = isinstance(texts, str)
    rows = [encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
    ids = [_cut(*row, max_length if truncation else None, truncation_side) for row in rows]
    masks = [[1] * len(row) for row in ids]
    if padding not in (False, "do_not_pad"):
        longest = max(map(len, ids), default=0)
        length = (max_length or 0) if padding == "max_length" else longest
        ids = [_filled(row, pad_id, length, padding_side) for row in ids]
        masks = [_filled(row, 0, length, padding_side) for row in masks]
    if return_tensors is None:
        if single:
            return Encoding(input_ids=ids[0], attention_mask=masks[0])
        return Encoding(input_ids=ids, attention_mask=masks)
    if len({len(row) for row in ids}) > 1:
        raise ValueError(
            f"Tokenizer: the texts have {min(map(len, ids))} to {max(map(len, ids))} tokens, and "
            "return_tensors needs rows of one length: give padding=True, or truncation=True and max_length"
        )
    import torch

    shape = (len(ids), len(ids[0]) if ids else 0)
    return Encoding(
        input_ids=torch.tensor(ids, dtype=torch.int64).view(shape),
        attention_mask=torch.tensor(masks, dtype=torch.int64).view(shape),
    )


def _check(
    texts: object,
    padding: object,
    truncation: bool,
    max_length: int | None,
    return_tensors: str | None,
    padding_side: str,
) -> None:
    if not isinstance(texts, str) and not (
        isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts)
    ):
        raise TypeError(f"Tokenizer: texts is {type(texts).__name__}; a str or a sequence of str is needed")
    if padding not in (True, False, "longest", "max_length", "do_not_pad"):
        raise ValueError(
            f"Tokenizer: padding is {padding!r}; "
            "True, False, 'longest', 'max_length' or 'do_not_pad' is needed"
        )
    if return_tensors not in (None, "pt"):
        raise ValueError(f"Tokenizer: return_tensors is {return_tensors!r}; 'pt' or None is needed")
    if padding_side not in ("left", "right"):
        raise ValueError(f"Tokenizer: padding_side is {padding_side!r}; 'left' or 'right' is needed")
    if max_length is None and (truncation or padding == "max_length"):
        raise ValueError(
            "Tokenizer: truncation and padding='max_length' need max_length: the tokenizer names none"
        )
    if max_length is not None and max_length < 1:
        raise ValueError(f"Tokenizer: max_length is {max_length}; 1 or more is needed")


def _cut(ids: list[int], before: list[int], after: list[int], most: int | None, side: Side) -> list[int]:
    """A text's tokens, the inner ones cut so that all are ``most`` at most."""
    room = len(ids) if most is None else max(0, most - len(before) - len(after))
    inner = ids[max(0, len(ids) - room) :] if side == "left" else ids[:room]
    return [*before, *inner, *after][:most]


def _filled(row: list[int], value: int, length: int, side: Side) -> list[int]:
    more = [value] * (length - len(row))
    return [*more, *row] if side == "left" else [*row, *more]
