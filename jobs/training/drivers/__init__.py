"""What moves a run: the elastic driver and Ray Train's rounds, and the worker that both have."""
