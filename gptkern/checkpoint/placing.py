"""The dtype and the device that a model is asked for in, by name or as PyTorch's objects."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point dtype; text names one: ``"bfloat16"``, ``"torch.bfloat16"``. None stays None.

    Raises:
        ValueError: It is none of the four that weights may have.
    """
    found = _BY_NAME.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if dtype is None or found in FLOATS:
        return found
    raise ValueError(f"dtype is {dtype!r}; accepted are {', '.join(_BY_NAME)}, or None: the checkpoint's own")


def checked_device(device: torch.device | str | int | None) -> torch.device:
    """A device that this machine has; PyTorch's default device when None.

    Raises:
        ValueError: There is no such device.
    """
    if device is None:
        return torch.get_default_device()
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}; cpu or cuda (cuda:0, cuda:1, ...) is needed") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        why = " (this PyTorch was built without CUDA)" if torch.version.cuda is None else ""
        raise ValueError(f"device is {device!r}, and {count} CUDA devices are visible{why}: take 'cpu'")
    return found
