"""Builds the Serve applications; what `cluster.pool.graph.schema` names as import paths. The only place where handles are bound.

Imports nothing heavy: Serve runs these builders in a process of their own before the first replica starts.
"""

from typing import Any

from ray.serve import Application

from cluster.config import Config, FleetSpec
from cluster.types import VersionId
from deployments.gateway import Gateway
from deployments.replica.replica import Replica


def build_fleet(args: FleetSpec) -> Application:
    return Replica.bind(args)  # pyright: ignore[reportFunctionMemberAccess] (the decorator's annotation is lost)


def fleet(spec: FleetSpec, weights: VersionId | None, options: dict[str, Any]) -> Application:
    """A fleet that control deploys beside the declared ones (`cluster.pool.graph`). ``weights``: what it hosts whatever is live."""
    return Replica.options(**options).bind(spec, weights)  # pyright: ignore[reportFunctionMemberAccess]


def build_gateway(args: Config) -> Application:
    return Gateway.bind(args)  # pyright: ignore[reportFunctionMemberAccess]
