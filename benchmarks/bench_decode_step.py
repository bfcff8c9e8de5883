"""One decode step: a token of every sequence through the model and its cache, the logits out."""


def test_decode_step(measure) -> None:
    measure()
