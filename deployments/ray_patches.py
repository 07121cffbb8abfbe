"""Close the port that Ray Serve opens unasked. The only file that reaches into Serve's private parts; a contract test names Ray 2.60.

Every Serve replica starts a gRPC server for calls between deployments on all interfaces, without authentication, and unpickles what
arrives (``ray/serve/_private/replica.py``, ``add_port_to_grpc_server(self._server, "[::]:0")``). With RAY_SERVE_USE_GRPC_BY_DEFAULT=0, which
`cluster.pool.local` and the Kubernetes manifests set, handles call over Ray's own token-authenticated RPC, so nothing needs that port.
"""

from typing import Any

from ray.serve._private import replica


def _bind_nothing(server: Any, address: str) -> int:
    return 0


def seal() -> None:
    """Call in a replica's constructor: Serve binds the port right after it."""
    if not hasattr(replica, "add_port_to_grpc_server"):
        raise RuntimeError("This Ray opens its inter-deployment port in another way; see deployments/ray_patches.py.")
    replica.add_port_to_grpc_server = _bind_nothing  # pyright: ignore[reportPrivateImportUsage]
