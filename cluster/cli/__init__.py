"""The springtide command."""
