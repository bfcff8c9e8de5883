"""Using a model: generate ids, stream or complete text, score text."""

from gptkern.engine.options import GenerateOptions
from gptkern.generate.run import GenerateOutput, generate
from gptkern.generate.score import Score, score
from gptkern.generate.text import Completion, TextStream, generate_text, stream

__all__ = [
    "Completion",
    "GenerateOptions",
    "GenerateOutput",
    "Score",
    "TextStream",
    "generate",
    "generate_text",
    "score",
    "stream",
]
