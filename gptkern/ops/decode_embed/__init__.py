from gptkern.ops.decode_embed.op import decode_embed

__all__ = ["decode_embed"]
