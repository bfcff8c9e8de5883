"""The description of a decoder and its modules."""
