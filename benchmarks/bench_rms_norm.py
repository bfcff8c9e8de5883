"""RMS norm, alone and with the residual addition before it: bound by memory."""


def test_rms_norm(measure) -> None:
    measure()
