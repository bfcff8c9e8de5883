"""The dtype and the device that a model is asked for in, by name or as PyTorch's objects."""

from __future__ import annotations

import difflib
from collections.abc import Collection

import torch

# What callers of transformers' from_pretrained write, and what does the same here.
_INSTEAD = {
    "torch_dtype": "dtype is its name here",
    "device_map": "device is its name here",
    "load_in_8bit": "weights='int8' does this",
    "load_in_4bit": "weights='int4' does this",
    "quantization_config": "weights='int8', 'fp8' or 'int4' quantises",
    "cache_dir": "the environment variable HF_HOME names the cache",
    "attn_implementation": "gptkern's attention is always used",
    "low_cpu_mem_usage": "weights are always read straight into their places",
    "use_safetensors": "safetensors are always preferred",
    "trust_remote_code": "code of a checkpoint never runs",
    "config": "the checkpoint's config.json is read",
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def refuse_options(unknown: Collection[str], known: Collection[str]) -> None:
    """Refuse options that ``GPT.from_pretrained`` does not have, with what does the same.

    Raises:
        TypeError: There are any.
    """
    for name in unknown:
        close = difflib.get_close_matches(name, known, 1)
        hint = _INSTEAD.get(name) or (
            f"did you mean {close[0]!r}?" if close else f"options: {', '.join(known)}"
        )
        raise TypeError(f"GPT.from_pretrained: {name} is no option; {hint}")


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
