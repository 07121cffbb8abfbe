"""What the live graph and the jobs must agree on: versions, aliases, configuration, control."""

__version__ = "0.1.0"
