"""The same requests to bare vLLM and to Springtide, and what differs."""
