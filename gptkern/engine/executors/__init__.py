"""The executors, which run a model over the tokens of one pass; each names what it cannot serve."""
