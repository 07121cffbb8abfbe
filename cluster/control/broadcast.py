"""Ask every running replica of a Serve application's deployment, over Ray's authenticated RPC."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
from typing import Any, cast

from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster import logs

log = logs.logger(__name__)


def broadcast(app: str, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
    """Call every running replica of an application's ingress deployment. Exceptions are among the answers; no replicas: no answers.

    Where not all answered in time, the one answer is that `TimeoutError`.
    """
    try:
        handle = cast(DeploymentHandle[Any], serve.get_app_handle(app))
        return handle.broadcast(method, *arguments).results(timeout_s=timeout_s, return_exceptions=True)
    except TimeoutError as error:
        return [error]
    except (RayServeException, KeyError) as error:  # not deployed yet, or no replica runs
        log.debug("%s.%s: %s", app, method, error)
        return []
