from gptkern.ops.rotary.op import rotary

__all__ = ["rotary"]
