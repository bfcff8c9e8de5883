"""The head and its loss with both gradients: bound by three matrix products."""


def test_linear_cross_entropy(measure) -> None:
    measure()
