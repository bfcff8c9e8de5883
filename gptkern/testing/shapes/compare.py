"""A call's kernels beside its reference."""

from __future__ import annotations

import torch

from gptkern import ops
from gptkern.ops._cases import Call, tensors
from gptkern.ops._dispatch import backend
from gptkern.testing import _double, _run, assert_accurate
from gptkern.testing.shapes.drawing import VALUES, Numbers, Trial
from gptkern.testing.shapes.families import FAMILIES


def _comparable(trial: Trial, call: Call, results: list[torch.Tensor], forward: int) -> list[torch.Tensor]:
    """The tensors that are compared: where one row is inf or NaN, no gradients but those of other rows.

    No expression says what that row's gradient is. The weights' are sums over all rows, and those of keys NaN
    in the query's tiles, whether it sees them or not: to look would cost every tile.
    """
    if trial.values not in ("inf", "nan") or len(results) == forward:
        return results
    alive = call.args[0].detach().isfinite().all(-1, keepdim=True)
    return [*results[:forward], results[forward].masked_fill(~alive, 0.0)]


def _compare(trial: Trial) -> None:
    family = FAMILIES[trial.op]
    function = family.function or getattr(ops, trial.op)
    call = family.make(Numbers(trial), trial.sizes)
    call = Call(call.args, {**call.kwargs, **trial.options})
    with backend("reference"):
        results = [_run(function, call), _run(function, _double(call))]
    with backend("kernel"):
        results.insert(0, _run(function, call))
    inputs = sum(t.requires_grad for t in tensors((call.args, call.kwargs)))
    forward = len(results[0]) - inputs
    compared = [_comparable(trial, call, r, forward) for r in results]
    terms = [] if family.terms is None else family.terms(trial, call)
    terms += [0.0] * (len(compared[0]) - len(terms))
    for index, (got, plain, exact) in enumerate(zip(*compared, strict=True)):
        assert_accurate(got, plain, exact, f"tensor {index} of results and gradients", terms=terms[index])


def check(trial: Trial) -> None:
    """Compare the kernels' results and gradients with the reference's.

    Raises:
        AssertionError: as ``assert_accurate``, with the trial as a call that can be pasted.
        ValueError: An op that does not take part, or a kind of numbers that there is not.
    """
    for name, value, accepted in (("op", trial.op, list(FAMILIES)), ("values", trial.values, VALUES)):
        if value not in accepted:
            raise ValueError(f"check: {name} is {value!r}; one of {', '.join(accepted)} is needed")
    try:
        _compare(trial)
    except Exception as error:
        raise AssertionError(f"check({trial!r})\n{type(error).__name__}: {error}") from error
