"""Ray Serve's private API for what runs: the answer of Serve's controller as it comes. A contract test names Ray 2.60.

The public ``serve.status()`` asks the same question, and makes Serve's own objects of the answer first. Those pickle every application's
routing and scaling policies again, which was most of what control's process did.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
from typing import Any

from ray.serve.context import _get_global_client  # pyright: ignore[reportPrivateUsage]
from ray.serve.exceptions import RayServeException


def applications() -> dict[str, dict[str, Any]]:
    """Application → ``{"status", "message", "deployments": {name: {"message", "replicas": [{"state"}, …]}}, …}``; none before Serve has started.

    It blocks. Raises what Ray raises while Serve is away.
    """
    try:
        client = _get_global_client(raise_if_no_controller_running=False)
        return client.get_serve_details()["applications"] if client is not None else {}
    except RayServeException:  # it has just been shut down
        return {}
