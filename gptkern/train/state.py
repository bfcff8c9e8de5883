"""Training state on disk: trained weights and the optimizers' tensors, as safetensors.

A file a process: the first holds every tensor that the processes have alike, each its own rows of those
that are spread over them. Read one after another the files' rows make the whole tensor, so any number
of processes can go on with what any other number wrote. Nothing in a file is executed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from gptkern.checkpoint.errors import CheckpointError
from gptkern.checkpoint.storage import StoredTensor, read_safetensors, write_safetensors
from gptkern.durable import new_file

_FILES = "rank-*.safetensors"


def state_tensors(objective: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """The tensors that training changes, by name: trained weights, and the optimizers' state."""
    names: dict[torch.Tensor, str] = {
        parameter: name for name, parameter in objective.named_parameters() if parameter.requires_grad
    }
    tensors = {f"weights.{name}": parameter.detach() for parameter, name in names.items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{names[parameter]}.{key}"] = value
    return tensors


def write_state(folder: Path, tensors: dict[str, torch.Tensor], rank: int) -> None:
    """Write this process's file; every process must.

    Raises:
        OSError: It could not be written.
    """
    mine = [
        (name, _local(tensor)[0], None)
        for name, tensor in tensors.items()
        if rank == 0 or isinstance(tensor, DTensor)
    ]
    if mine:
        with new_file(folder / _FILES.replace("*", f"{rank:05}")) as file:
            write_safetensors(file, mine)


def read_state(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill ``tensors``, this process's rows of them, from what ``write_state`` wrote.

    Raises:
        CheckpointError: A tensor is missing there, of another shape or of another dtype.
    """
    files = sorted(folder.glob(_FILES))
    if not files:
        raise CheckpointError(
            f"{folder}: no training state of this version of gptkern ({_FILES}) there; "
            "its model can be trained on from the first step: [model] from"
        )
    stored = [read_safetensors(file) for file in files]
    for name, tensor in tensors.items():
        parts = [file[name] for file in stored if name in file]
        _check(folder, name, tensor, parts)
        local, first = _local(tensor)
        _fill(local, first, parts)


def _check(folder: Path, name: str, tensor: torch.Tensor, parts: list[StoredTensor]) -> None:
    if not parts:
        raise CheckpointError(f"{folder}: no {name} in it")
    shape = list(parts[0].data.shape)
    if shape:
        shape[0] = sum(len(part.data) if part.data.dim() else 0 for part in parts)
    alike = all(part.data.shape[1:] == parts[0].data.shape[1:] for part in parts)
    if shape != list(tensor.shape) or not alike or any(part.data.dtype != tensor.dtype for part in parts):
        raise CheckpointError(
            f"{parts[0].file}: {name}: shape {shape} in {parts[0].data.dtype} found; "
            f"this run's is {list(tensor.shape)} in {tensor.dtype}"
        )


def _local(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This process's rows of a tensor, and the first one's number."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    mesh = tensor.device_mesh
    # FSDP2 cuts rows as torch.chunk does: equal parts, the last ones shorter or empty.
    rows = -(-len(tensor) // mesh.size())
    return tensor.to_local(), min(mesh.get_local_rank() * rows, len(tensor))


def _fill(local: torch.Tensor, first: int, parts: list[StoredTensor]) -> None:
    """Copy rows ``first`` and following from the parts, laid end to end, into ``local``."""
    if not local.dim():
        local.copy_(parts[0].data)
        return
    start = 0
    for part in parts:
        stop = start + len(part.data)
        low, high = max(first, start), min(first + len(local), stop)
        if low < high:
            local[low - first : high - first].copy_(part.data[low - start : high - start])
        part.release()
        start = stop
