"""One training step: forward, loss, backward, AdamW."""


def test_train_step(measure) -> None:
    measure()
