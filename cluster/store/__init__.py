"""Durable state: objects under one URL, and what is kept there. Everything is written create-only."""
