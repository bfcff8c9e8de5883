"""The gated MLP: bound by the matrix units."""


def test_gated_mlp(measure) -> None:
    measure()
