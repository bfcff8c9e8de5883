"""Sampling with top-k and top-p: bound by reading the logits once."""


def test_sample(measure) -> None:
    measure()
