"""Requests in, tokens out: the cache of keys and values, and what runs a model over it."""
