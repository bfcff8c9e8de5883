"""One process or several: ranks, reductions, and how a model is spread."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from gptkern.train.errors import SettingsError

# Modules with functions whose default arguments are the group, if there is one when they are imported: they
# would keep it for good.
_BEFORE_THE_GROUP = ("torch.distributed.nn.functional", "torch.distributed.fsdp")


@dataclass(frozen=True)
class Processes:
    """This process among those that ``torchrun`` started; alone where it did not.

    Attributes:
        meshes: The meshes that models are sharded over; the group's end is theirs.
    """

    rank: int
    world: int
    device: torch.device
    meshes: list[DeviceMesh] = field(default_factory=list)

    @property
    def first(self) -> bool:
        """True if this process writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()

    def total(self, *values: float) -> list[float]:
        """Each value's sum over the processes, in float64."""
        if self.world == 1:
            return list(values)
        # NCCL takes CUDA tensors alone, gloo either.
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return [float(x) for x in summed.tolist()]


@contextlib.contextmanager
def processes(device: str) -> Iterator[Processes]:
    """The processes of this run; with several, their group, left at the end.

    What was trained should be gone by then: a sharded model holds the group.

    Raises:
        SettingsError: ``device`` is not there.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    chosen = _device(device, world)
    if world == 1:
        yield Processes(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    for name in _BEFORE_THE_GROUP:
        importlib.import_module(name)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    group = Processes(rank, world, chosen)
    try:
        yield group
    finally:
        _leave(group)


def _leave(group: Processes) -> None:
    """Destroy the group and end its threads.

    DTensor's caches hold a mesh for good, and a mesh its groups. gloo's threads would then outlive the group;
    one that frees its last tensors while the interpreter ends is killed by Python inside C++ code, and the
    process aborts ("terminate called without an active exception").
    """
    dist.destroy_process_group()
    for mesh in group.meshes:
        getattr(mesh, "_pg_registry", {}).clear()
    gc.collect()


def _device(name: str, world: int) -> torch.device:
    """The device of [train] device; with several processes, this one's GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen = torch.device(name or ("cuda" if count else "cpu"))
    if chosen.type == "cpu":
        return chosen
    if not count:
        raise SettingsError(f"[train] device is {name!r}; PyTorch finds no GPU here")
    if world > 1:
        if ":" in name:
            raise SettingsError(
                f"[train] device is {name!r}; {world} processes take a GPU each: 'cuda' is needed"
            )
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if (chosen.index or 0) >= count:
        raise SettingsError(
            f"[train] device is {name!r}: {chosen} is wanted, PyTorch finds {count} GPUs here"
        )
    return chosen


def spread(objective: nn.Module, group: Processes, strategy: str) -> nn.Module:
    """The module that training calls: ``objective``, a DDP wrapper of it, or itself sharded (FSDP2)."""
    if group.world == 1:
        return objective
    if strategy == "ddp":
        ids = [group.device] if group.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(objective, device_ids=ids)
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(group.device.type, (group.world,))
    group.meshes.append(mesh)
    model: Any = objective.model
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    # Resharded after every forward pass, the root too: after an evaluation weights are saved.
    fully_shard(objective, mesh=mesh, reshard_after_forward=True)
    return objective


@contextlib.contextmanager
def no_sync(module: nn.Module, active: bool) -> Iterator[None]:
    """Leave gradients unreduced inside, where more of the same step is to come."""
    if active and isinstance(module, nn.parallel.DistributedDataParallel):
        with module.no_sync():
            yield
        return
    synchronise: Any = getattr(module, "set_requires_gradient_sync", None)
    if synchronise is not None:  # FSDP2
        synchronise(not active)
    yield


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be spread over the processes; every process must ask."""
    if isinstance(tensor, DTensor):
        gathered: torch.Tensor = DTensor.full_tensor(tensor)
        return gathered
    return tensor
