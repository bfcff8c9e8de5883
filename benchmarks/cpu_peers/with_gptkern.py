"""gptkern's ``GPT.generate``."""

from pathlib import Path

import torch
from worker import Generate, serve

import gptkern


def make(folder: Path, form: str, threads: int) -> Generate:
    torch.set_num_threads(threads)
    weights = {} if form in ("fp32", "bf16") else {"weights": form}
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    model = gptkern.GPT.from_pretrained(folder / "hf", dtype=dtype, device="cpu", **weights)

    def generate(ids: list[list[int]], new: int) -> list[list[int]]:
        found = model.generate(torch.tensor(ids), max_new_tokens=new, do_sample=False, eos_token_id=None)
        return found[:, len(ids[0]) :].tolist()

    return generate


if __name__ == "__main__":
    serve(make, "torch")
