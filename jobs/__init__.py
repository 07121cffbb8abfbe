"""What `ray job submit -- python -m jobs.<verb>` runs: one verb, one module."""
