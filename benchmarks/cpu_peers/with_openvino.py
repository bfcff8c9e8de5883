"""OpenVINO GenAI's pipeline, over a model that optimum-intel converts."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from worker import Generate, serve

# Activations are in bf16 where the processor computes with it: what OpenVINO picks by itself.
PRECISION = {"fp32": "f32", "bf16": "bf16", "int8": "bf16", "int4": "bf16"}
WEIGHTS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, "sym": False},
    "int4": {"bits": 4, "sym": True, "group_size": 128, "ratio": 1.0},
}


def converted(folder: Path, form: str) -> Path:
    """The folder of the model in OpenVINO's files, which is made if there is none."""
    target = folder / f"openvino-{form if form in WEIGHTS else 'fp32'}"
    if not target.exists():
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

        options: dict[str, Any] = {"load_in_8bit": False}
        if form in WEIGHTS:
            options = {"quantization_config": OVWeightQuantizationConfig(**WEIGHTS[form])}
        model = OVModelForCausalLM.from_pretrained(folder / "hf", export=True, compile=False, **options)
        model.save_pretrained(target)
    return target


def make(folder: Path, form: str, threads: int) -> Generate:
    options = {"INFERENCE_PRECISION_HINT": PRECISION[form], "INFERENCE_NUM_THREADS": threads}
    pipeline = openvino_genai.LLMPipeline(converted(folder, form), "CPU", **options)
    config = openvino_genai.GenerationConfig()
    config.ignore_eos, config.do_sample = True, False

    def generate(ids: list[list[int]], new: int) -> list[list[int]]:
        rows = np.array(ids, dtype=np.int64)
        config.max_new_tokens = new
        mask = openvino.Tensor(np.ones_like(rows))
        found = pipeline.generate(openvino_genai.TokenizedInputs(openvino.Tensor(rows), mask), config)
        return [list(map(int, row)) for row in found.tokens]

    return generate


if __name__ == "__main__":
    serve(make, "openvino-genai", "optimum-intel")
