"""Checks of anybody's Triton kernels: a file's ``check_*`` functions, whose launches run on a CPU."""

from __future__ import annotations

import importlib.util
import linecache
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from gptkern.ops import _aot, _launch
from gptkern.testing.ptx import kernels
from gptkern.testing.ptx.counters import Counters
from gptkern.testing.ptx.dependent import Stream
from gptkern.testing.ptx.memory import NO_TENSOR, Fault

PREFIX = "check_"
_NO_GPU = "a check's tensors are on the CPU: triton.runtime.driver.active.get_active_torch_device() says so"
_PLACE = re.compile(r"^\s*(\S+):(\d+), block \((\d+), (\d+), (\d+)\)$", re.MULTILINE)


@dataclass
class Finding:
    """A check that failed.

    Attributes:
        check: The function's name.
        seed: The order of blocks; None where nothing was executed, or where results are wrong.
        what: The executor's check, ``result``, or the error's name.
        lines: The message, for people.
    """

    check: str
    arch: int
    seed: int
    kernel: str
    what: str
    lines: list[str]


class _Driver(_aot._Target):
    """Triton's driver while checks run: tensors are on the CPU, kernels are compiled for a GPU."""

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Launches:
    """Executes whatever is launched within ``active``, with tensors on the CPU.

    Attributes:
        counters: By kernel.
        last: The kernel launched last.
    """

    def __init__(self, arch: int, every_config: bool = False) -> None:
        self.arch, self.every_config = arch, every_config
        self.counters: dict[str, Counters] = {}
        self.seed, self.count, self.last = 0, 0, ""
        self._stream = Stream()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Stand in for Triton's launches and its choice of configurations."""
        launch, driver = JITFunction.run, triton.runtime.driver
        before = driver._active

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            if warmup:
                return launch(kernel, *args, grid=grid, warmup=True, **kwargs)
            return self._execute(kernel, grid, args, kwargs)

        def tuned(tuner: Any, *args: Any, **kwargs: Any) -> Any:
            tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
            configs = tuner.prune_configs(kwargs) if len(tuner.configs) > 1 else tuner.configs
            for config in configs if self.every_config else configs[:1]:
                values = {**tuner.nargs, **kwargs, **config.all_kwargs()}
                if config.pre_hook is not None:
                    config.pre_hook(values)
                tuner.fn.run(*args, **kwargs, **config.all_kwargs())

        with ExitStack() as stack:
            # A kernel in Triton's cache may have the name of another file, from which it was copied.
            stack.enter_context(mock.patch.object(triton.knobs.compilation, "always_compile", True))
            stack.enter_context(mock.patch.object(JITFunction, "run", run))
            stack.enter_context(mock.patch.object(Autotuner, "run", tuned))
            stack.callback(setattr, driver, "_active", before)
            driver.set_active(_Driver(self.arch))
            yield

    def _execute(self, kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.count, self.last = self.count + 1, kernel.fn.__name__
        launch = _launch.Launch(kernel, (), args, kwargs)
        launch.grid = tuple(grid(launch.arguments) if callable(grid) else grid)
        if 0 in launch.grid:
            return
        for name, value in launch.arguments.items():
            if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                raise ValueError(f"{self.last}: {name} is on {value.device}; checks take tensors on the CPU")
        counters = self.counters.setdefault(self.last, Counters())
        kernels.run(launch, self.arch, self.seed, self._stream, counters)


def load(path: Path) -> ModuleType:
    """The file as a module, executed anew."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def checks_of(module: ModuleType) -> dict[str, Callable[[], Any]]:
    """Its check functions by name, in their order."""
    return {
        name: value for name, value in vars(module).items() if name.startswith(PREFIX) and callable(value)
    }


def run_check(
    name: str, check: Callable[[], Any], launches: Launches, seeds: int, path: Path
) -> Finding | None:
    """Run a check in so many orders of blocks; the first thing found."""
    for seed in range(seeds):
        launches.seed, launches.count, launches.last = seed, 0, ""
        torch.manual_seed(0)
        try:
            check()
        except Fault as fault:
            return _finding(name, launches, fault.check, _fault_lines(fault, path))
        except AssertionError as error:
            # torch tells that it has no CUDA by an AssertionError as well.
            what = "AssertionError" if "Torch not compiled with CUDA" in str(error) else "result"
            return _finding(name, launches, what, _error_lines(error, path))
        except NotImplementedError as error:
            lines = [f"the executor does not serve {error}: this kernel cannot be checked"]
            return _finding(name, launches, "not served", lines)
        except Exception as error:  # whatever it is, it is the check's
            return _finding(name, launches, type(error).__name__, _error_lines(error, path))
    return None


def _finding(name: str, launches: Launches, what: str, lines: list[str]) -> Finding:
    return Finding(name, launches.arch, launches.seed, launches.last, what, lines)


def _fault_lines(fault: Fault, path: Path) -> list[str]:
    """The message: what, where in the source, by which instruction."""
    message, _, rest = str(fault).partition(": ")[2].partition("\n")
    instruction = rest.strip().splitlines()[0] if rest else ""
    place = _PLACE.search(rest)
    lines = [message]
    if place is not None:
        file, line, *block = place.groups()
        lines[0] += f", in block ({', '.join(block)})"
        source = linecache.getline(str(path), int(line)).strip() if file == path.name else ""
        lines.append(f"{file}:{line}: {source}".rstrip(": "))
    if instruction:
        lines.append(f"by {instruction}")
    if NO_TENSOR in message:
        lines.append("tensors that a kernel finds by addresses in memory: see gptkern.testing.ptx.reachable")
    return lines


def _error_lines(error: Exception, path: Path) -> list[str]:
    """The error's message, and the line of the file that it came from."""
    text = str(error).strip() or type(error).__name__
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path.resolve()
    ]
    place = [f"{path.name}:{frames[-1].lineno}: {frames[-1].line}"] if frames else []
    hint = [_NO_GPU] if "Torch not compiled with CUDA" in text or "NVIDIA driver" in text else []
    return [*text.splitlines(), *hint, *place]
