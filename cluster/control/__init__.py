"""The control actor: it makes the pool what the store says, and is the only process that does."""
