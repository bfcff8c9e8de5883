"""Prefill: a whole prompt through the model, the logits of its last token out."""


def test_prefill(measure) -> None:
    measure()
