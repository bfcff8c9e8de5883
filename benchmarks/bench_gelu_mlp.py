"""The GELU-MLP at GPT-2's widths: bound by the matrix units."""


def test_gelu_mlp(measure) -> None:
    measure()
