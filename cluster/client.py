"""The operator's side of the gateway's ``/admin`` routes. Plain HTTP, so a command needs neither Ray nor a second to start."""

import getpass
from typing import Any, Literal

import httpx

from cluster.config import Config
from cluster.errors import PoolUnavailable, refused
from cluster.pool import local
from cluster.publishing.rollout import Policy, Rollout
from cluster.types import VersionId

TIMEOUT_S = 660
"""Longer than a replica may take to load a version."""
LOOK_S = 10
"""How long who only looks waits for an answer."""


def author() -> str:
    return getpass.getuser()


def status(config: Config) -> dict[str, Any]:
    """``{"slots": {"total", "free"}, "aliases": {…}, "replicas": […]}`` of the running pool."""
    return _call(config, "GET", "/admin/status")


def slots(config: Config, since_s: float = 0.0) -> dict[str, Any]:
    """``{"allocation": {…}, "snapshots": […], "slots": {…}}``: how the slots are divided, and each change after ``since_s`` (seconds since the
    epoch), as `cluster.capacity.handover.parse` reads it."""
    return _call(config, "GET", f"/admin/slots?since_s={since_s!r}", timeout_s=LOOK_S)


def publish(config: Config, version: VersionId, alias: str, reason: str, policy: Policy | None = None) -> Rollout:
    """Ask control to begin a rollout; see `cluster.control.actor.Control.publish` for what can be refused."""
    order = {"version": str(version), "alias": alias, "reason": reason, "author": author()}
    asked = {"policy": policy.model_dump(mode="json")} if policy else {}
    return Rollout.model_validate(_call(config, "POST", "/admin/publish", order | asked))


def step(config: Config, what: Literal["promote", "abort"], alias: str, reason: str) -> Rollout:
    """Bring the alias's rollout to 100 % now, or end it."""
    return Rollout.model_validate(_call(config, "POST", f"/admin/{what}", {"alias": alias, "reason": reason, "author": author()}))


def rollback(config: Config, alias: str, to: VersionId | None, reason: str) -> Rollout:
    """Make the alias mean what it meant before, or ``to``."""
    order = {"alias": alias, "to": str(to) if to else None, "reason": reason, "author": author()}
    return Rollout.model_validate(_call(config, "POST", "/admin/rollback", order))


def _call(
    config: Config, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = TIMEOUT_S
) -> dict[str, Any]:
    local.require(config)
    url = f"http://{config.gateway.host}:{config.gateway.port}"
    try:
        response = httpx.request(method, url + path, json=body, headers=local.bearer(), timeout=timeout_s)
        document = response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise PoolUnavailable(
            f"The gateway at {url} does not answer: {error}.", "It may still be starting; try again soon."
        ) from error
    if response.status_code != 200:
        raise refused(response.status_code, document)
    return document
