"""Measure Springtide beside its peers: ``python -m jobs.bench``."""
