"""Ray Serve's REST API on the dashboard's port, which Ray documents: what is deployed, and deploying it."""

from typing import Any

import httpx

from cluster.address import WITHOUT_TLS
from cluster.errors import PoolUnavailable

APPLICATIONS = "/api/serve/applications/"
DECLARATIVE, IMPERATIVE = "declarative", "imperative"
"""An application's ``source``: a configuration declares it, or `serve.run` started it."""
TIMEOUT_S = 60
"""A deployment of many applications takes Serve's controller some seconds."""


class ServeApi:
    def __init__(self, dashboard: str, headers: dict[str, str]) -> None:
        self.dashboard = dashboard
        self.headers = headers

    def deploy(self, schema: dict[str, Any]) -> None:
        """Declare all applications. Serve begins to bring them up; raises `PoolUnavailable` with its words where it refuses."""
        self._ask("PUT", schema)

    def applications(self) -> dict[str, Any]:
        """Application → ``{"status", "message", "source", "deployments": {name: {"replicas": […], …}}, …}``."""
        return self._ask("GET").json()["applications"]

    def _ask(self, method: str, body: dict[str, Any] | None = None) -> httpx.Response:
        url = f"{self.dashboard}{APPLICATIONS}"
        try:
            # the shell's proxies are not for the pool's own dashboard
            with httpx.Client(headers=self.headers, timeout=TIMEOUT_S, trust_env=False, verify=WITHOUT_TLS) as client:
                response = client.request(method, url, json=body)
        except httpx.HTTPError as error:
            raise PoolUnavailable(
                f"Ray's dashboard at {self.dashboard} does not answer: {error}.", "See `springtide status`."
            ) from error
        if response.status_code != 200:
            words = response.text.strip()[-500:]  # the end of a traceback says what happened
            raise PoolUnavailable(f"Ray Serve answers {response.status_code}: {words}", "See `springtide doctor`.")
        return response
