"""Attention of one new token per sequence over the paged cache: bound by memory."""


def test_decode_attention(measure) -> None:
    measure()
