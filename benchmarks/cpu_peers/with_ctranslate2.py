"""CTranslate2's generator, over a model that its own converter converts."""

from pathlib import Path

import ctranslate2
from worker import Generate, Missing, serve

TYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


def converted(folder: Path, vocab_size: int) -> Path:
    """The folder of the model in CTranslate2's files, which is made if there is none."""
    target = folder / "ctranslate2"
    if not target.exists():
        from ctranslate2.converters import transformers as theirs

        # The converter reads a tokenizer, of which this model has none: numbers stand for its tokens.
        class Converter(theirs.TransformersConverter):
            def load_tokenizer(self, *_: object, **__: object) -> "Numbers":
                return Numbers(vocab_size)

        Converter(str(folder / "hf")).convert(str(target))
    return target


class Numbers:
    """A vocabulary of numbers as the converter asks for one."""

    unk_token = bos_token = eos_token = "0"

    def __init__(self, size: int) -> None:
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self.size)}


def make(folder: Path, form: str, threads: int) -> Generate:
    import json

    kind = TYPES.get(form)
    if kind not in ctranslate2.get_supported_compute_types("cpu"):
        raise Missing(f"CTranslate2 does not compute in {form} on this processor")
    size = json.loads((folder / "hf" / "config.json").read_text())["vocab_size"]
    path = str(converted(folder, size))
    model = ctranslate2.Generator(path, "cpu", compute_type=kind, inter_threads=1, intra_threads=threads)

    def generate(ids: list[list[int]], new: int) -> list[list[int]]:
        found = model.generate_batch(
            [[str(token) for token in row] for row in ids],
            max_length=new,
            min_length=new,
            beam_size=1,
            include_prompt_in_result=False,
            end_token=[],
        )
        return [result.sequences_ids[0] for result in found]

    return generate


if __name__ == "__main__":
    serve(make, "ctranslate2")
