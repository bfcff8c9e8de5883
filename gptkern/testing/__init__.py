"""Checks for people who add kernels: does an op compute what its reference means, however it is called?

``check`` is the whole list in one call; ``assert_accurate`` is the measure of error that it uses.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gptkern.ops._cases import Call, tensors
from gptkern.ops._dispatch import backend, kernel_answers

__all__ = [
    "DTYPES",
    "Call",
    "assert_accurate",
    "attention_terms",
    "check",
    "check_values",
    "layouts",
    "norm_terms",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What every kernel takes, and ``check`` runs in unless told otherwise."""

Op = Callable[..., Any]
OpCall = tuple[torch._ops.OpOverload, tuple[Any, ...], dict[str, Any]]


def check(
    op: Op,
    sample_inputs: Iterable[Call | tuple[Any, ...]],
    *,
    reference: Op | None = None,
    dtypes: Iterable[torch.dtype] = DTYPES,
) -> None:
    """Check an op against its reference, its gradients, its layouts and its registration with PyTorch.

    For every sample, in every dtype:

    * results, and gradients of every input that requires grad, by the measure of ``assert_accurate``;
    * permuted and sliced inputs: the same results, or a ``ValueError`` that names the argument.

    For the first sample with elements, in its own dtype:

    * ``torch.compile(fullgraph=True)``: no graph break, the same results and gradients;
    * ``torch.library.opcheck`` on every registered op that the compiled forward pass contains, and its
      schema and fake kernel (shapes, dtypes, strides) on compact, permuted and sliced inputs and in
      the backward pass.

    Args:
        op: The public function. It must be deterministic: no dropout.
        sample_inputs: Arguments as a tuple or, with keywords, a ``Call``; on the GPU, or on the CPU
            with ``TRITON_INTERPRET=1`` in the environment. Small shapes: the interpreter is slow.
        reference: The plain PyTorch expression, differentiable, in any dtype, float64 included. By
            default what ``op`` itself does under ``gptkern.backend("reference")``; an op that does the same
            there as always would be compared with itself, and needs one.
        dtypes: In which to run. Floating tensors of the dtype of the first one are converted, others
            stay as they are.

    Raises:
        AssertionError: names what differs, where, and by how much.
        ValueError: ``reference`` is missing, or calls ``op`` itself.

    Example::

        from gptkern.ops import layer_norm
        from gptkern.testing import check

        x = torch.randn(4, 17, requires_grad=True)
        check(layer_norm, [(x, torch.ones(17, requires_grad=True))])
    """
    if reference is op:
        raise ValueError("check: reference is op itself; give the plain PyTorch expression")
    calls = [c if isinstance(c, Call) else Call(tuple(c)) for c in sample_inputs]
    for number, call in enumerate(calls):
        for dtype in dtypes:
            converted = _converted(call, dtype)
            check_values(op, converted, reference=reference, what=f"sample {number}, {dtype}")
    whole = [c for c in calls if all(t.numel() for t in tensors((c.args, c.kwargs)))]
    if whole:
        _check_registration(op, whole[0])


def assert_accurate(
    got: torch.Tensor,
    plain: torch.Tensor,
    exact: torch.Tensor,
    what: str = "result",
    *,
    terms: float = 0.0,
) -> None:
    """The error against float64 is at most twice the plain expression's, plus one ulp of the output's scale.

    Infinities and NaN must stand where the exact result has them and nowhere else, except where the
    plain expression overflows too. Integers must be equal.

    For attention's gradients and for the norms the scale is that of their terms, as ``attention_terms`` and
    ``norm_terms`` give it and explain.

    Args:
        got: What the kernel gave.
        plain: What the plain PyTorch expression gives in the same dtype.
        exact: The same expression in float64.
        what: Names the tensor in the message.
        terms: The largest of the terms that the result is summed from; an ulp of it is accepted as well.

    Raises:
        AssertionError: says where, or by how much.
    """
    if got.dtype != plain.dtype or got.shape != plain.shape:
        raise AssertionError(
            f"{what} is {tuple(got.shape)} {got.dtype}; {tuple(plain.shape)} {plain.dtype} is right"
        )
    if not got.is_floating_point():
        if not torch.equal(got, plain):
            raise AssertionError(f"{what} is {got.tolist()}; {plain.tolist()} is right")
        return
    epsilon = torch.finfo(got.dtype).eps
    got, plain, exact = (t.detach().double().cpu() for t in (got, plain, exact))
    finite = exact.isfinite()
    comparable = finite & plain.isfinite()
    wrong = (comparable & ~got.isfinite()) | (exact.isnan() & ~got.isnan()) | (exact.isinf() & (got != exact))
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(f"{what} is {got[where]} at {where}; {exact[where]} is right")
    if not comparable.any():
        return
    error, plain_error = ((t - exact)[comparable].abs().max().item() for t in (got, plain))
    ulp = epsilon * max(exact[comparable].abs().max().item(), terms)
    if error > 2 * plain_error + ulp:
        raise AssertionError(
            f"{what} has error {error:.3e} against float64; accepted is twice the plain expression's "
            f"({plain_error:.3e}) plus one ulp of the scale ({ulp:.3e})"
        )


def attention_terms(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None = None,
) -> dict[str, float]:
    """The largest terms of ``dq``, ``dk`` and ``dv`` of attention: an ulp of them is accepted.

    With ``p = exp(s - lse)`` and ``ds = p (dp - delta)`` they are sums of ``ds k``, ``ds q`` and ``p grad``.
    Two things tell the kernels' rounding from that of the plain expression:

    * ``p`` is computed again from the stored ``lse``, one number a query. Its rounding, half an ulp of
      ``lse``, is a relative error of the whole row of ``p``: at scores of 200 it is 100 ulps. The plain
      expression keeps ``p`` itself.
    * ``delta = sum(grad * out)`` comes from the stored output and is rounded apart from ``dp = grad v^T``.
      The plain expression takes both from the same products: where a query in effect sees one key they
      cancel there exactly, and here to an ulp of ``dp``.

    ``lse`` is fp32 whatever the inputs are. Measured in fp32 for scores from 1 to 1e4, six draws each, causal
    and not: what passes twice the plain error is below a tenth of this.

    Args:
        q: ``(batch, seq_q, heads, head_dim)``.
        k: ``(batch, seq_k, heads_k, head_dim)``.
        v: As k.
        grad: The gradient of the output, as q.
        lse: What the forward pass returned.
        scale: Factor on the scores, ``1 / sqrt(head_dim)`` by default.
    """
    wider = torch.finfo(torch.float32).eps / torch.finfo(q.dtype).eps
    q, k, v, grad, lse = (t.detach().double() for t in (q, k, v, grad, lse))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    spread = 1.0 + wider * lse[lse.isfinite()].abs().max().item()
    # A row of p sums to 1; over the queries of a key errors add up as their root.
    queries = (q.shape[1] * q.shape[2] / k.shape[2]) ** 0.5
    dp = (grad.norm(dim=-1).max() * v.norm(dim=-1).max()).item()
    return {
        "dq": spread * scale * dp * k.abs().max().item(),
        "dk": spread * scale * dp * q.abs().max().item() * queries,
        "dv": spread * grad.abs().max().item() * queries,
    }


def norm_terms(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, eps: float, *, centered: bool = True
) -> dict[str, float]:
    """The largest terms of a norm's output, dx and dweight: an ulp of them is accepted.

    They are ``h weight + bias``, ``rstd (g - h mean(g h) - mean(g))`` with ``g = grad * weight``, and the
    sum of ``grad h`` over the rows; h is ``(x - mean) rstd``. In rows of two columns dx's terms cancel, and
    what is left is their rounding. The mean is rounded once, to half an ulp of itself, by the kernel as by
    the plain expression, and neither way is it known which is nearer: where the mean is large beside the
    spread that is most of h's error.

    Measured in fp32 for widths from 2 to 17 and means to 1e6, five draws each: what passes twice the plain
    error of dx is below a quarter of this.
    """
    x, weight, grad = (t.detach().double() for t in (x, weight, grad))
    mean = x.mean(-1, keepdim=True) if centered else torch.zeros_like(x[..., :1])
    rstd = ((x - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    # By what an ulp of x is more than one of h.
    lost = 1.0 + mean.abs() * rstd
    h = ((x - mean) * rstd).abs().clamp(min=1.0)
    return {
        "out": (weight.abs() * h * lost).max().item(),
        "dx": (rstd * (grad * weight).abs() * lost).max().item(),
        "dweight": (grad.abs() * h * lost).max().item(),
    }


def layouts(value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) pairs: copies of a tensor in other layouts, each with a contiguous last dimension."""
    if value.dim() >= 3:
        permuted = value.detach().transpose(0, -2).contiguous().transpose(0, -2)
        yield "permuted", permuted.requires_grad_(value.requires_grad)
    if value.dim() >= 2:
        padded = value.new_zeros(*value.shape[:-1], value.shape[-1] + 8)
        sliced = padded[..., : value.shape[-1]].copy_(value.detach()).detach()
        yield "sliced", sliced.requires_grad_(value.requires_grad)


def _converted(call: Call, dtype: torch.dtype) -> Call:
    """``call`` on fresh leaves, its main dtype replaced."""
    floating = [t for t in tensors((call.args, call.kwargs)) if t.is_floating_point()]
    main = floating[0].dtype if floating else dtype

    def convert(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        fresh = value.detach().to(dtype if value.dtype == main else value.dtype)
        return fresh.clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)

    args, kwargs = pytree.tree_map(convert, (call.args, call.kwargs))
    return Call(args, kwargs)


def _run(op: Op, call: Call) -> list[torch.Tensor]:
    """Results, then gradients of what requires grad, for fixed gradients of the results."""
    call = _apart(call)
    results = tensors(op(*call.args, **call.kwargs))
    inputs = [t for t in tensors((call.args, call.kwargs)) if t.requires_grad]
    outputs = [t for t in results if t.requires_grad]
    if not inputs or not outputs:
        return results
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(t.shape, generator=generator, device="cpu").to(torch.bfloat16).to(t) for t in outputs
    ]
    return results + [
        torch.zeros_like(x) if grad is None else grad
        for x, grad in zip(
            inputs, torch.autograd.grad(outputs, inputs, grads, allow_unused=True), strict=True
        )
    ]


def _apart(call: Call) -> Call:
    """``call`` with integers of its own: an op may advance lengths in place, and is called again."""

    def copied(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.is_floating_point():
            return value
        return value.new_empty_strided(value.shape, value.stride()).copy_(value)

    args, kwargs = pytree.tree_map(copied, (call.args, call.kwargs))
    return Call(args, kwargs)


def _double(call: Call) -> Call:
    def widen(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    args, kwargs = pytree.tree_map(widen, (call.args, call.kwargs))
    return Call(args, kwargs)


def _variants(call: Call) -> Iterator[tuple[str, Call]]:
    """``call`` with one argument at a time in another layout."""
    for position, value in enumerate(call.args):
        if isinstance(value, torch.Tensor):
            for name, other in layouts(value):
                args = (*call.args[:position], other, *call.args[position + 1 :])
                yield f"argument {position} {name}", Call(args, call.kwargs)


def check_values(op: Op, call: Call, *, reference: Op | None = None, what: str = "call") -> None:
    """The first half of ``check``: results and gradients of one call, its inputs in every layout."""
    _refuse_itself(op, call, reference)
    with backend("reference"):
        plain, exact = _run(reference or op, call), _run(reference or op, _double(call))

    def compare(case: str, variant_call: Call) -> None:
        with backend("kernel"):
            got = _run(op, variant_call)
        if len(got) != len(plain):
            raise AssertionError(f"{case}: {len(got)} results and gradients; the reference has {len(plain)}")
        for index, (a, b, c) in enumerate(zip(got, plain, exact, strict=True)):
            assert_accurate(a, b, c, f"{case}: tensor {index} of results and gradients")

    compare(what, call)
    for name, variant in _variants(call):
        try:
            compare(f"{what}, {name}", variant)
        except ValueError as refusal:
            if "strides" not in str(refusal):
                raise


def _refuse_itself(op: Op, call: Call, reference: Op | None) -> None:
    """Raise where the op would be compared with itself.

    An op that asks for no backend does the same under each, so its own result is no reference.
    """
    call = _apart(call)
    with kernel_answers() as answers, backend("reference"), torch.no_grad():
        op(*call.args, **call.kwargs)
    if answers:
        return
    name = getattr(op, "__name__", op)
    if reference is None:
        raise ValueError(
            f"check: {name} does the same under gptkern.backend('reference') as always, so it would be "
            "compared with itself. Give reference=, the plain PyTorch expression"
        )
    if _calls(reference, op, _apart(call)):
        raise ValueError(
            f"check: reference calls {name}, so that would be compared with itself. Give the plain PyTorch "
            "expression"
        )


class _Dispatched(TorchDispatchMode):
    """Collects the operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.packets: set[Any] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.packets |= {func, func.overloadpacket}
        return func(*args, **(kwargs or {}))


def _calls(function: Op, op: Op, call: Call) -> bool:
    """True if ``function`` calls ``op``, a Python function or a registered operator."""
    code = getattr(inspect.unwrap(op), "__code__", None)
    entered = False

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal entered
        entered |= frame.f_code is code

    previous = sys.getprofile()
    with _Dispatched() as dispatched, torch.no_grad():
        sys.setprofile(note)
        try:
            function(*call.args, **call.kwargs)
        finally:
            sys.setprofile(previous)
    return entered or op in dispatched.packets


class _Recorder(torch.fx.Interpreter):
    """Runs a graph and keeps the calls of registered ops that are not PyTorch's own."""

    def __init__(self, graph: torch.fx.GraphModule, calls: list[OpCall]) -> None:
        super().__init__(graph)
        self.calls = calls

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        overload = target.default if isinstance(target, torch._ops.OpOverloadPacket) else target
        if isinstance(overload, torch._ops.OpOverload) and overload.namespace not in ("aten", "prims"):
            self.calls.append((overload, *pytree.tree_map_only(torch.Tensor, _leaf, (args, dict(kwargs)))))
        return super().call_function(target, args, kwargs)


def _leaf(value: torch.Tensor) -> torch.Tensor:
    return value.detach().clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)


def _compiled(op: Op, forward_calls: list[OpCall], backward_calls: list[OpCall]) -> Op:
    """``op`` under torch.compile without a graph break, its registered ops recorded."""

    def recording(calls: list[OpCall]) -> Callable[..., Any]:
        return lambda graph, _: make_boxed_func(_Recorder(graph, calls).run)

    lower = aot_autograd(fw_compiler=recording([]), bw_compiler=recording(backward_calls))

    def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            with torch.no_grad():
                _Recorder(graph, forward_calls).run(*values)
            return lowered(*values)

        lowered = lower(graph, inputs)
        return run

    compiled: Op = torch.compile(op, fullgraph=True, backend=compiler)
    return compiled


def _check_registration(op: Op, call: Call) -> None:
    cases = [("compact", _converted(call, torch.float32)), *_variants(_converted(call, torch.float32))]
    for name, variant_call in cases:
        forward: list[OpCall] = []
        backward: list[OpCall] = []
        torch._dynamo.reset()
        with backend("kernel"):
            try:
                eager = _run(op, variant_call)
            except ValueError:  # this layout is refused, which check_values has looked at
                continue
            compiled = _run(_compiled(op, forward, backward), variant_call)
            if not forward:
                raise AssertionError(f"{name}: the compiled op holds no registered op: it was traced through")
            if not all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True)):
                raise AssertionError(f"{name}: compiled and eager results differ")
            for overload, args, kwargs in forward:
                utils = "ALL" if name == "compact" else ("test_faketensor",)
                torch.library.opcheck(overload, args, kwargs, test_utils=utils)
            for overload, args, kwargs in backward:
                torch.library.opcheck(overload, args, kwargs, test_utils=("test_schema", "test_faketensor"))
    torch._dynamo.reset()
