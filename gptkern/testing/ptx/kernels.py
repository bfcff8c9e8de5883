"""Triton kernels through the executor: an op's launches run as the compiler's text, not as their source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gptkern.ops import _aot, _launch
from gptkern.testing.ptx.counters import Counters
from gptkern.testing.ptx.dependent import Stream
from gptkern.testing.ptx.hopper import TensorMap
from gptkern.testing.ptx.launch import execute


def _descriptor(value: Any, layout: dict[str, Any]) -> list[Any]:
    """The parameters that a tensor descriptor becomes: the map, its shape, its strides."""
    box = tuple(layout["block_size"])
    made = TensorMap(value.base, tuple(value.shape), tuple(value.strides), box, layout["swizzle"])
    return [made, *value.shape, *value.strides]


def run(
    launch: _launch.Launch,
    arch: int,
    seed: int = 0,
    stream: Stream | None = None,
    counters: Counters | None = None,
) -> None:
    """Compile a recorded launch for ``arch`` and execute it on its tensors, which are on the CPU."""
    compiled = _aot.compile_launch(launch, arch)
    arguments = launch.arguments
    layouts = iter(compiled.metadata.tensordesc_meta or ())
    values: list[Any] = []
    names: list[str] = []
    for name, kind in compiled.src.signature.items():
        if kind.startswith("tensordesc"):
            values += _descriptor(arguments[name], next(layouts))
        elif kind != "constexpr":
            values.append(arguments[name])
        names += [name] * (len(values) - len(names))
    execute(
        compiled.asm["ptx"],
        launch.grid,
        values,
        names=names,
        shared_bytes=compiled.metadata.shared,
        seed=seed,
        stream=stream,
        dependent=compiled.metadata.launch_pdl,
        # Who writes Gluon makes barriers and fences; Triton's compiler makes barriers without a fence.
        fenced_barriers=launch.kernel.is_gluon(),
        counters=counters,
    )


@contextmanager
def executed(
    arch: int,
    seed: int = 0,
    done: Callable[[_launch.Launch], None] | None = None,
    counters: dict[str, Counters] | None = None,
) -> Iterator[None]:
    """Run every launch within the block through the executor, as if CPU tensors were on a GPU of ``arch``.

    Args:
        done: Called after each launch.
        counters: Gets the counts of each kernel, by its name.
    """
    stream = Stream()

    def observer(launch: _launch.Launch) -> bool:
        counts = None if counters is None else counters.setdefault(launch.name, Counters())
        run(launch, arch, seed, stream, counts)
        if done is not None:
            done(launch)
        return False

    with _launch.record(arch), _launch.observe(observer):
        yield
