"""Layer norm, alone and with the residual addition before it: bound by memory."""


def test_layer_norm(measure) -> None:
    measure()
