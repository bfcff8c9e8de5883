"""transformers' ``generate``, and of a model that gptkern has accelerated: a format ``accelerated-bf16``."""

from pathlib import Path

import torch
from transformers import GPT2LMHeadModel
from worker import Generate, Missing, serve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make(folder: Path, form: str, threads: int) -> Generate:
    torch.set_num_threads(threads)
    accelerated, form = form.startswith("accelerated-"), form.removeprefix("accelerated-")
    if form not in DTYPES:
        raise Missing("transformers has no such weights on a CPU without further libraries")
    model = GPT2LMHeadModel.from_pretrained(folder / "hf", dtype=DTYPES[form]).eval()
    if accelerated:
        import gptkern

        model = gptkern.accelerate(model)

    def generate(ids: list[list[int]], new: int) -> list[list[int]]:
        rows = torch.tensor(ids)
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found = model.generate(rows, attention_mask=torch.ones_like(rows), **options)
        return found[:, rows.shape[1] :].tolist()

    return generate


if __name__ == "__main__":
    serve(make, "transformers", "torch")
