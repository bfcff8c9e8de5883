from gptkern.ops.linear_cross_entropy.op import CrossEntropy, linear_cross_entropy

__all__ = ["CrossEntropy", "linear_cross_entropy"]
