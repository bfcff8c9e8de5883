"""What runs a model over the tokens of one pass: each executor says what it serves, or why not."""
