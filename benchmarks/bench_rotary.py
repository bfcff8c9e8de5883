"""Rotary positions of queries and keys: bound by memory."""


def test_rotary(measure) -> None:
    measure()
