"""What the live graph and the jobs must agree on: versions, aliases, configuration, control."""

import os

__version__ = "0.1.0"

os.environ.setdefault("RAY_AUTH_MODE", "token")
"""Ray reads this once, when it is imported. Its own default is on from 2.61; until then we say it before anything imports Ray."""
