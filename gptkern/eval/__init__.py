"""Evaluation harnesses: gptkern's models as those programs take them, each an extra of its own."""
