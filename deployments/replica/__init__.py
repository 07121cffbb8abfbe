"""A Serve replica with its vLLM engine."""
