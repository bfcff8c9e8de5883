"""Linear layers with their epilogue fused, at GPT-2's shapes: bound by the matrix units."""


def test_linear(measure) -> None:
    measure()
