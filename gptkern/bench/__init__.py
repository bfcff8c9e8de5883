"""The benchmark suite: measure, compare, see."""
