"""Causal attention, forward and backward: bound by the matrix and the exponential units."""


def test_flash_attention(measure) -> None:
    measure()
