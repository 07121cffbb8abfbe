"""What a run must not lose: its state in memory, and its checkpoints in the store."""
