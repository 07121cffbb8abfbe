"""What is wrong in the Ray that we pin, put right in our own processes. A contract test names Ray 2.60.

Every Serve replica opens a gRPC port for calls between deployments: on all interfaces, without authentication, and it unpickles what
arrives (``ray/serve/_private/replica.py``, ``add_port_to_grpc_server(self._server, "[::]:0")``). `cluster.pool.local` and the Kubernetes
manifests set RAY_SERVE_USE_GRPC_BY_DEFAULT=0, so handles call over Ray's own token-authenticated RPC and nothing needs that port.
"""

from typing import Any

from ray.serve._private import replica


def _bind_nothing(server: Any, address: str) -> int:
    return 0


def close_internal_port() -> None:
    """Call this in a replica's constructor: Serve binds the port right after it."""
    if not hasattr(replica, "add_port_to_grpc_server"):
        raise RuntimeError("This Ray opens its inter-deployment port in another way; see deployments/ray_patches.py.")
    replica.add_port_to_grpc_server = _bind_nothing  # pyright: ignore[reportPrivateImportUsage]
