"""Random calls of the extension, right and wrong: each gives the right answer, or a TypeError or ValueError.

    python fuzz_boundary.py CALLS SEED [EXTENSION]

EXTENSION is a build of ``gptkern._C`` to take in place of the installed one, such as one under the address
sanitizer (which then has to be preloaded). Nothing may crash, and no wrong argument may go unnoticed: a
call's arguments are right, and some of them are then made wrong in a way that is known to be wrong.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

import gptkern

Arguments = dict[str, Any]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# What may be otherwise and still be right.
_LISTS: dict[str, dict[str, Any]] = {
    name: {"any_size": (1,)} for name in ("banned_ids", "eos_ids", "bitmask")
}
_LOGITS = {"any_stride": (0, 1), "dtypes": FLOATS}
_DRAFTS = {"any_stride": (0, 1), "dtypes": (torch.int32,)}
_PLACES: dict[str, dict[str, Any]] = {
    "lengths": {"any_size": (0,)},
    "page_table": {"any_size": (0, 1), "any_stride": (0,)},
}
# Tensors that share a size that nothing else gives: both narrowed alike are right.
_ALIKE = (("bias_ids", "bias_values"), ("logits", "counts"), ("logits", "draft_tokens"), ("k", "v"))
REFUSALS = (TypeError, ValueError)


def _load(path: str) -> None:
    """Take the file at ``path`` for ``gptkern._C``."""
    spec = importlib.util.spec_from_file_location("gptkern._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gptkern._C"] = module
    spec.loader.exec_module(module)
    gptkern._C = module  # type: ignore[attr-defined]


class Wrong:
    """Ways to make one right argument a wrong one."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw

    def tensor(
        self,
        right: torch.Tensor,
        *,
        any_size: tuple[int, ...] = (),
        any_stride: tuple[int, ...] = (),
        dtypes: tuple[torch.dtype, ...] = (),
    ) -> Any:
        """What does not fit where ``right`` does.

        ``any_size`` and ``any_stride`` are dimensions in which others than ``right``'s are right too, and
        ``dtypes`` those that are.
        """
        ways: list[Callable[[], Any]] = [
            lambda: right.to(self._other_dtype((right.dtype, *dtypes))),
            lambda: right[..., None],
            lambda: right.flatten() if right.dim() > 1 else right[None],
            lambda: right.to("meta"),
            lambda: right.tolist(),
            lambda: self._draw.choice([0, 2**63, -1, "x", b"", 1.5, object()]),
            lambda: self.without_memory(right, 0),
            lambda: right.to_sparse(),
        ]
        if right.numel() > 1:
            ways.append(lambda: self.without_memory(right, right.element_size() * (right.numel() - 1)))
        for dim, size in enumerate(right.shape):
            if dim not in any_size:
                ways.append(lambda dim=dim, size=size: right.narrow(dim, 0, size - 1).contiguous())
                ways.append(lambda dim=dim: torch.cat([right, right], dim))
            if size > 1 and dim not in any_stride:
                ways.append(lambda dim=dim: self._strided(right, dim))
                ways.append(lambda dim=dim: right.narrow(dim, 0, 1).expand(right.shape))
        return self._draw.choice(ways)()

    def number(self, low: int, high: int) -> int:
        """A number outside of ``low`` to ``high``."""
        return self._draw.choice([low - 1, high + 1, -(2**31), 2**31, 2**40, -(2**62)])

    def _other_dtype(self, right: tuple[torch.dtype, ...]) -> torch.dtype:
        kinds = {torch.float64, torch.float32, torch.int64, torch.int32, torch.int8, torch.bool, torch.uint8}
        return self._draw.choice(sorted(kinds - set(right), key=str))

    def without_memory(self, right: torch.Tensor, bytes_left: int) -> torch.Tensor:
        tensor = right.clone(memory_format=torch.contiguous_format)
        tensor.untyped_storage().resize_(bytes_left)
        return tensor

    def _strided(self, right: torch.Tensor, dim: int) -> torch.Tensor:
        """The same numbers, of which every second one along ``dim`` is somebody else's."""
        wide = right.repeat_interleave(2, dim)
        return wide[(slice(None),) * dim + (slice(None, None, 2),)]


class Fuzzer:
    """Draws calls, makes them, and counts what came of each."""

    def __init__(self, seed: int) -> None:
        # Here and not above: another extension may have been loaded first.
        from gptkern import _C, _native
        from gptkern.engine.executors import cpu_model

        self._C, self._cpu, self._native = _C, cpu_model, _native
        self._draw, self.wrong = random.Random(seed), Wrong(random.Random(seed + 1))
        torch.manual_seed(seed)
        self.counts: Counter[str] = Counter()

    def run(self, calls: int) -> None:
        """Make so many calls."""
        kinds = (self.sample, self.operators, self.top_k, self.decoder, self.step)
        for _ in range(calls):
            kind = self._draw.choice(kinds)
            outcome = kind(self._draw.random() < 0.4)
            self.counts[f"{kind.__name__}: {outcome}"] += 1

    def _between(self, low: int, high: int) -> int:
        return self._draw.randint(low, high)

    def _call(self, function: Callable[[], Any], wrong: list[str], right: Callable[[Any], None]) -> str:
        """``function()`` is refused where something is ``wrong``, and gives what is ``right`` otherwise."""
        try:
            result = function()
        except REFUSALS as error:
            if not wrong:
                raise AssertionError(f"right arguments were refused: {error}") from error
            return "refused"
        if wrong:
            raise AssertionError(f"wrong and not refused: {wrong}")
        right(result)
        return "right"

    def _params(self) -> tuple[Any, Any, torch.Tensor]:
        from gptkern.ops import SamplerState, SamplingParams

        batch, vocab = self._between(0, 4), self._between(1, 90)
        ids = lambda: self._draw.sample(range(vocab), min(vocab - 1, self._between(0, 3)))  # noqa: E731
        params = SamplingParams.make(
            batch,
            vocab,
            temperature=self._draw.choice([0.0, 0.5, 1.0]),
            top_k=self._between(0, min(vocab, 7)),
            top_p=self._draw.choice([1.0, 0.8]),
            presence_penalty=self._draw.choice([0.0, 0.3]),
            min_new_tokens=self._between(0, 2),
            logit_bias=dict.fromkeys(ids(), 0.5),
            banned=ids(),
            n_logprobs=self._draw.choice([None, 0, min(vocab, 2)]),
        )
        if self._between(0, 3) == 0:
            params.bitmask = torch.full((batch, self._between(-(-vocab // 32), 4)), -1, dtype=torch.int32)
        state = SamplerState.make(batch, vocab, seed=self._between(0, 9), history=True)
        kind = self._draw.choice([torch.float32, torch.float16, torch.bfloat16])
        logits = (torch.randn(batch, vocab + self._between(0, 5)) * 2).to(kind)[:, :vocab]
        return params, state, logits

    def _spoil(self, given: Arguments, **freedoms: dict[str, Any]) -> list[str]:
        """Make one to three of the tensors in ``given`` wrong; which. ``freedoms``: see ``Wrong.tensor``."""
        names = [name for name, value in given.items() if isinstance(value, torch.Tensor) and value.numel()]
        chosen = self._draw.sample(names, min(len(names), self._draw.choice([1, 1, 1, 2, 3])))
        for one, other in _ALIKE:
            if one in chosen and other in chosen:
                chosen.remove(other)
        for name in chosen:
            given[name] = self.wrong.tensor(given[name], **freedoms.get(name, {}))
        return chosen

    def sample(self, spoiled: bool) -> str:
        """``_C.sample`` itself, its outputs included."""
        from gptkern.ops import sample
        from gptkern.ops.sample.launch import Machine, Outputs, sample_outputs

        params, state, logits = self._params()
        outputs = vars(sample_outputs(logits, params.max_logprobs))
        if params.max_logprobs is None:
            outputs = {name: outputs[name] for name in ("tokens", "status")}
        lists = ("values", "bias_ids", "bias_values", "banned_ids", "eos_ids", "bitmask")
        given: Arguments = {name: getattr(params, name) for name in lists}
        given |= {
            "counters": state.counters.clone(),
            "counts": None if state.counts is None else state.counts.clone(),
        }
        given |= outputs
        given["logits"] = logits
        numbers = {"commit": self._between(0, 1), "threads": self._between(1, 3)}
        wrong = self._spoil(given, **_LISTS, logits=_LOGITS) if spoiled else []
        if spoiled and self._between(0, 4) == 0:
            name, low, high = self._draw.choice([("commit", 0, 1), ("threads", 1, 1024)])
            numbers[name] = self.wrong.number(low, high)
            wrong.append(name)

        def right(bad: int) -> None:
            assert bad == -1, bad
            expected = sample(logits, params, state=dataclasses.replace(state))
            assert torch.equal(given["tokens"], expected.tokens)
            if expected.logprobs is not None:
                assert torch.equal(given["logprobs"], expected.logprobs)

        def call() -> int:
            return self._C.sample(
                given["logits"],
                dataclasses.replace(params, **{name: given[name] for name in lists}),
                dataclasses.replace(state, counters=given["counters"], counts=given["counts"]),
                Outputs(**{name: given[name] for name in outputs}),
                commit=numbers["commit"],
                machine=Machine(numbers["threads"]),
            )

        return self._call(call, wrong, right)

    def operators(self, spoiled: bool) -> str:
        """Registered operators, against the reference."""
        from gptkern.ops import sampling_probs, speculative_accept
        from gptkern.ops.sample import SamplerState

        params, state, logits = self._params()
        fields = ("values", "bias_ids", "bias_values", "banned_ids", "eos_ids")
        given: Arguments = {"logits": logits} | {name: getattr(params, name) for name in fields}
        given |= {"counters": state.counters.clone(), "counts": state.counts.clone()}
        drafted = self._between(0, 2) if self._between(0, 1) else None
        if drafted is None:
            wrong = self._spoil(given, **_LISTS, logits=_LOGITS) if spoiled else []
            tail = (given["counters"], given["counts"])
            call = lambda: torch.ops.gptkern.sampling_probs(  # noqa: E731
                given["logits"], *(given[name] for name in fields), params.bitmask, *tail
            )

            def right_probs(result: Any) -> None:
                with gptkern.backend("reference"):
                    expected = sampling_probs(logits, params, state=state)
                torch.testing.assert_close(result[0], expected, rtol=1e-5, atol=1e-7)

            return self._call(self._dispatched(call), wrong, right_probs)
        target = torch.randn(logits.shape[0], drafted + 1, logits.shape[1])
        tokens = torch.randint(logits.shape[1], (logits.shape[0], drafted))
        given |= {"logits": target, "draft_tokens": tokens, "draft_lengths": None}
        if self._flag():
            given["draft_lengths"] = lengths = torch.randint(drafted + 1, (logits.shape[0],))
        else:
            lengths = None
        wrong = (
            self._spoil(given, **_LISTS, logits=_LOGITS, draft_tokens=_DRAFTS, draft_lengths=_DRAFTS)
            if spoiled
            else []
        )
        call = lambda: torch.ops.gptkern.speculative_accept(  # noqa: E731
            given["draft_tokens"], None, given["logits"], *(given[name] for name in fields), params.bitmask,
            given["counters"], given["counts"], given["draft_lengths"],
        )  # fmt: skip

        def right(result: Any) -> None:
            other = SamplerState(state.counters.clone(), state.counts.clone())
            with gptkern.backend("reference"):
                expected = speculative_accept(
                    tokens, None, target, params, state=other, draft_lengths=lengths
                )
            assert torch.equal(result[0], expected.tokens) and torch.equal(result[1], expected.n_accepted)
            assert torch.equal(given["counters"], other.counters)

        return self._call(self._dispatched(call), wrong, right)

    def _dispatched(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """torch itself refuses what is no tensor, or has no kernel, by errors of its own."""

        def run() -> Any:
            try:
                return call()
            except (RuntimeError, NotImplementedError) as error:
                raise ValueError(str(error)) from error

        return run

    def top_k(self, spoiled: bool) -> str:
        """``_C.top_k`` against torch."""
        from gptkern.ops.sample.launch import Machine, Outputs

        rows, vocab = self._between(0, 4), self._between(1, 300)
        k = self._between(0, min(vocab, 9))
        logits = torch.randn(rows, vocab)
        given: Arguments = {
            "logits": logits,
            "tokens": torch.empty(rows, k, dtype=torch.int64),
            "logprobs": torch.empty(rows, k),
            "status": torch.empty(rows, dtype=torch.int32),
        }
        machine = Machine(self._between(1, 3))
        free = {"any_size": (1,), "any_stride": (0,), "dtypes": FLOATS}
        wrong = self._spoil(given, logits=free) if spoiled else []
        if spoiled and (not wrong or self._between(0, 3) == 0):
            k = self.wrong.number(0, vocab)
            wrong.append("k")

        def right(bad: int) -> None:
            values, best = torch.log_softmax(logits.double(), -1).topk(k)
            assert bad == -1 and torch.equal(given["tokens"], best)
            torch.testing.assert_close(given["logprobs"].double(), values, rtol=1e-6, atol=1e-7)

        def call() -> int:
            outputs = Outputs(**{name: given[name] for name in ("tokens", "logprobs", "status")})
            return self._C.top_k(given["logits"], k, outputs, machine=machine)

        return self._call(call, wrong, right)

    def _model(self) -> Arguments:
        """The fields of a ``CpuModel`` of random switches; norms come before branches or on them."""
        dtype = self._draw.choice([torch.float32, torch.bfloat16])
        kv_heads, head_dim = self._between(1, 3), self._between(1, 20)
        width, inner = (self._draw.choice([32, 64, self._between(1, 50)]) for _ in range(2))
        heads, vocab = kv_heads * self._between(1, 3), self._between(1, 50)
        context, gated, whole = self._between(1, 20), self._flag(), self._flag()
        place, layers = self._between(0, 1), range(self._between(1, 2))
        shape = (width, heads * head_dim, kv_heads * head_dim, inner, gated)
        row = lambda: self._cpu.CpuNorm(torch.randn(width).to(dtype), torch.randn(width).to(dtype))  # noqa: E731
        stages = [self._stage("embed", "x")]
        for layer in layers:
            stages += self._layer_stages(layer, shape, dtype, row, on_branch=bool(place))
        head = self._linear(vocab, width, dtype)
        stages.append(self._stage("linear", "logits", "x", norm=row(), linear=head))
        offset = self._between(0, 2)
        return {
            "context": context,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "inner": inner,
            "activation": self._between(0, 3),
            "gated": gated,
            "rms": self._flag(),
            "unit_offset": self._flag(),
            "whole_qk_norm": whole,
            "eps": 1e-5,
            "embedding_scale": 0.7,
            "residual_scale": 1.0,
            "logits_scale": 0.5,
            "attention_softcap": self._draw.choice([0.0, 2.0]),
            "logits_softcap": self._draw.choice([0.0, 2.0]),
            "position_offset": offset,
            "tokens": torch.randn(vocab, width).to(dtype),
            "positions": torch.randn(context + offset, width).to(dtype) if self._flag() else None,
            "layers": [self._attention(context, heads, kv_heads, head_dim, whole, dtype) for _ in layers],
            "stages": stages,
        }

    def _flag(self) -> bool:
        return self._draw.random() < 0.5

    def _linear(self, outs: int, ins: int, dtype: torch.dtype) -> Any:
        bias = torch.randn(outs).to(dtype) if self._flag() else None
        how = self._between(0, 4)
        if how == 0:
            values = torch.randint(-9, 9, (outs, ins), dtype=torch.int8)
            return self._cpu.CpuLinear(values, bias, torch.rand(outs))
        if how == 3 and ins % 32 == 0:
            codes = torch.randint(256, (outs, ins // 2), dtype=torch.uint8)
            scales, minimums = torch.randn(2, outs, ins // 32).half()
            return self._cpu.CpuLinear(codes, bias, scales, minimums if self._flag() else None)
        if how >= 3:
            values = torch.randint(256, (outs, ins), dtype=torch.uint8)
            return self._cpu.CpuLinear(values, bias, torch.rand(outs))
        weight = torch.randn(outs, ins) if how == 1 else torch.randn(ins, outs).t()
        return self._cpu.CpuLinear(weight.to(dtype), bias, None)

    def _stage(self, kind: str, write: str, read: str = "none", layer: int = 0, **other: Any) -> Any:
        buffers, residual = self._native.BUFFERS, other.pop("residual", "none")
        right = self._cpu.CpuStage(
            self._native.STAGES[kind], layer, buffers[read], buffers[write],
            save=buffers["none"], residual=buffers[residual], norm=None, linear=None,
            activated=write == "inner",
        )  # fmt: skip
        return right._replace(**other)

    def _layer_stages(
        self,
        layer: int,
        shape: tuple[int, int, int, int, bool],
        dtype: torch.dtype,
        row: Any,
        on_branch: bool,
    ) -> list[Any]:
        width, q_width, kv_width, inner, gated = shape
        linear = lambda outs, ins: self._linear(outs, ins, dtype)  # noqa: E731
        norm = None if on_branch else row()

        def end(read: str, ins: int, write: str, residual: str) -> list[Any]:
            if not on_branch:
                product = linear(width, ins)
                return [self._stage("linear", write, read, layer, linear=product, residual=residual)]
            return [
                self._stage("linear", "branch", read, layer, linear=linear(width, ins)),
                self._stage("add_norm", write, "branch", layer, norm=row(), residual=residual),
            ]

        fc = linear(2 * inner if gated else inner, width)
        return [
            self._stage("qkv", "q", "x", layer, norm=norm, linear=linear(q_width + 2 * kv_width, width)),
            self._stage("attention", "attended", "q", layer),
            *end("attended", q_width, "middle", "x"),
            self._stage("linear", "inner", "middle", layer, norm=norm, linear=fc),
            *end("inner", inner, "x", "middle"),
        ]

    def _attention(
        self, context: int, heads: int, kv_heads: int, head_dim: int, whole: bool, dtype: torch.dtype
    ) -> Any:
        pairs, normed = self._between(0, head_dim // 2), self._flag()
        cos, sin = (torch.randn(context, pairs) if pairs else None for _ in range(2))
        q_norm, k_norm = (
            torch.randn(count * head_dim if whole else head_dim).to(dtype) if normed else None
            for count in (heads, kv_heads)
        )
        window = self._between(0, context + 1)
        return self._cpu.CpuLayer(0.3, window, 2 * pairs, self._flag(), cos, sin, q_norm, k_norm)

    def decoder(self, spoiled: bool) -> str:
        """``_C.Decoder``: a tensor somewhere in a model, or one of its numbers, is wrong."""
        given = self._model()
        wrong: list[str] = []
        if spoiled:
            ranges = {
                "heads": (1, 2**29 - 1),
                "head_dim": (1, 2**29 - 1),
                "activation": (0, 3),
                "context": (1, 2**29 - 1),
                "position_offset": (0, 2**29 - 1),
            }
            wrong = [self._draw.choice([*ranges, "layers", "stages", "embeddings"])]
            if wrong[0] in ranges:
                given[wrong[0]] = self.wrong.number(*ranges[wrong[0]])
            elif wrong[0] == "layers":
                given["layers"][-1] = self._spoiled_attention(given["layers"][-1])
            elif wrong[0] == "stages":
                self._spoil_stages(given["stages"])
            elif given["positions"] is None:
                given["tokens"] = self.wrong.tensor(given["tokens"], any_size=(0, 1), any_stride=(0,))
            else:
                given["positions"] = self.wrong.tensor(given["positions"], any_stride=(0,))
        return self._call(lambda: self._C.Decoder(self._cpu.CpuModel(**given)), wrong, lambda _: None)

    def _spoiled_attention(self, layer: Any) -> Any:
        """A layer's attention with one tensor, or else one number, that is wrong."""
        names = [name for name in ("cos", "sin", "q_norm", "k_norm") if getattr(layer, name) is not None]
        name = self._draw.choice([*names, "scale", "window", "rotary"])
        if name in names:
            return layer._replace(**{name: self.wrong.tensor(getattr(layer, name))})
        if name == "scale":
            return layer._replace(scale=self._draw.choice(["x", None, []]))
        low, high = (0, 2**31 - 1) if name == "window" else (layer.rotary, layer.rotary)
        return layer._replace(**{name: self.wrong.number(low, high)})

    def _spoil_stages(self, stages: list[Any]) -> None:
        """One stage gets a wrong tensor or a wrong number, or is left out."""
        place = self._between(0, len(stages) - 1)
        stage = stages[place]
        ways = ["drop", "kind", "write"]
        ways += [name for name in ("norm", "linear") if getattr(stage, name) is not None]
        way = self._draw.choice(ways)
        if way == "drop":
            # Without the second layer's attention its product reads the first one's.
            del stages[0 if self._flag() else -1]
        elif way == "norm":
            stages[place] = stage._replace(norm=self._spoiled_vectors(stage.norm))
        elif way == "linear":
            stages[place] = stage._replace(linear=self._spoiled_linear(stage.linear))
        else:
            stages[place] = stage._replace(**{way: self.wrong.number(0, 4 if way == "kind" else 9)})

    def _spoiled_vectors(self, pair: Any) -> Any:
        which = self._between(0, 1)
        return type(pair)(*(self.wrong.tensor(v) if i == which else v for i, v in enumerate(pair)))

    def _spoiled_linear(self, layer: Any) -> Any:
        weight, bias, scales, minimums = layer
        if bias is not None and self._between(0, 1):
            return layer._replace(bias=self.wrong.tensor(bias))
        if scales is not None and self._between(0, 1):
            return layer._replace(scales=self.wrong.tensor(scales))
        if minimums is not None and self._between(0, 1):
            return layer._replace(minimums=self.wrong.tensor(minimums))
        if scales is None:
            return layer._replace(weight=self.wrong.tensor(weight, any_stride=(0, 1)))
        return layer._replace(weight=weight.float())

    def step(self, spoiled: bool) -> str:
        """``Decoder.step``, rows alone and in company; wrong tensors, and wrong numbers in right ones."""
        given = self._model()
        decoder = self._C.Decoder(self._cpu.CpuModel(**given))
        dtype, vocab = given["tokens"].dtype, given["tokens"].shape[0]
        context, kv_heads, layers = given["context"], given["kv_heads"], len(given["layers"])
        page_size, pages_each, rows = self._between(1, 8), self._between(1, 3), self._between(0, 4)
        longest = min(context, page_size * pages_each)
        pages = max(rows * pages_each, 1)
        shape = (layers, pages, page_size, kv_heads, given["head_dim"])
        call: Arguments = {
            "k": torch.randn(shape).to(dtype),
            "v": torch.randn(shape).to(dtype),
            "page_table": torch.arange(rows * pages_each, dtype=torch.int32).reshape(rows, pages_each),
            "lengths": torch.randint(longest, (rows,), dtype=torch.int32),
            "tokens": torch.randint(vocab, (rows,)),
            "wanted": torch.arange(rows, dtype=torch.int32),
            "logits": torch.empty(rows, vocab, dtype=dtype),
        }
        wrong: list[str] = []
        if spoiled and rows:
            values: dict[str, list[int]] = {
                "tokens": [-1, vocab, 10**9, -(2**63), 2**63 - 1],
                "lengths": [-1, longest, 2**31 - 1, -(2**31)],
                "page_table": [-1, pages, 2**31 - 1, -(2**31)],
                "wanted": [-1, rows, 2**31 - 1, -(2**31)],
            }
            if self._between(0, 1):
                name = self._draw.choice(list(values))
                # The first page of a row is always read.
                place = (self._between(0, rows - 1),) + ((0,) if name == "page_table" else ())
                call[name][place] = self._draw.choice(values[name])
                wrong.append(name)
            else:
                wrong = self._spoil(call, **_PLACES)
        threads = self._between(1, 3)

        def right(done: bool) -> None:
            assert done
            alone = torch.empty(1, vocab, dtype=dtype)
            for row in range(rows):
                assert decoder.step(
                    call["k"], call["v"], call["page_table"][row : row + 1], call["lengths"][row : row + 1],
                    call["tokens"][row : row + 1], torch.zeros(1, dtype=torch.int32), alone, 1,
                )  # fmt: skip
                assert torch.equal(alone[0].nan_to_num(), call["logits"][row].nan_to_num())

        return self._call(lambda: decoder.step(*call.values(), threads), wrong, right)


def main() -> None:
    """Runs what the command line asks for."""
    calls, seed = int(sys.argv[1]), int(sys.argv[2])
    if len(sys.argv) > 3:
        _load(sys.argv[3])
    fuzzer = Fuzzer(seed)
    fuzzer.run(calls)
    for outcome, count in sorted(fuzzer.counts.items()):
        print(f"{outcome}: {count}")
    print(f"{sum(fuzzer.counts.values())} calls")


if __name__ == "__main__":
    main()
