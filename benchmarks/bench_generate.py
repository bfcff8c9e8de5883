"""Generation end to end: prompt in, tokens out, sampling included."""


def test_generate(measure) -> None:
    measure()
