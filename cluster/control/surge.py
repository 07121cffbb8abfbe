"""A second fleet, there only while weights take over that the first cannot host beside its own.

An engine reads other weights of its own shape in place. Another architecture, quantization or tokenizer needs another engine, and while
the fleet's replicas start theirs somebody has to answer; and a fleet of one replica has none to spare for a canary. So there is a Serve
application of its own, deployed by control beside the declared ones
(which a redeployment of those leaves alone: ``ray/serve/_private/application_state.py``, ``apply_app_configs``) and deleted when the
fleet itself holds what clients may get. Its name says what it hosts, so a control that was restarted finds it again.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
from importlib import import_module

from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from cluster import logs
from cluster.config import Config
from cluster.pool import graph
from cluster.types import VersionId

PREFIX = "surge-"
ATTEMPTS = 2
"""How often an engine may fail to start. Nobody waits for this one, and what it lacks it will lack again."""

log = logs.logger(__name__)


class Surge:
    """Control's side of the second fleet."""

    def __init__(self) -> None:
        self.weights: VersionId | None = None
        """What it hosts, or is about to; None while there is none."""
        self.replicas = 0

    @property
    def app(self) -> str:
        return app_name(self.weights) if self.weights else ""

    def find(self) -> None:
        """Look for one that a control before this one has started."""
        try:
            found = [name for name, app in serve.status().applications.items() if _stays(name, app.status)]
        except RayServeException:  # nothing is served yet
            return
        if found:
            name, _, n = found[0].removeprefix(PREFIX).rpartition("-")
            self.weights, self.replicas = VersionId(name, int(n)), 1

    def start(self, config: Config, weights: VersionId, replicas: int) -> None:
        """Ask Serve for it; returns at once."""
        log.info("a second fleet of %d for %s", replicas, weights)
        build = import_module("deployments.app").build_surge  # the path by which Serve itself finds the applications
        spec = config.spec(config.default_fleet)
        options = {**graph.replica_options(spec), "num_replicas": replicas, "max_constructor_retry_count": ATTEMPTS}
        target = serve.RunTarget(build(spec, weights, options), app_name(weights), None)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        self.weights, self.replicas = weights, replicas

    def end(self) -> None:
        """Let it finish its streams and go."""
        log.info("the second fleet for %s is not needed any more", self.weights)
        serve.delete(self.app, _blocking=False)
        self.weights, self.replicas = None, 0

    def trouble(self) -> str:
        """Serve's own words where it could not start, else empty."""
        app = serve.status().applications.get(self.app)
        failed = app is not None and app.status == ApplicationStatus.DEPLOY_FAILED
        return f"Its own replicas did not start: {graph.cause(app.message)}" if app and failed else ""


def app_name(weights: VersionId) -> str:
    return f"{PREFIX}{weights.name}-{weights.n}"


def _stays(name: str, status: ApplicationStatus) -> bool:
    return name.startswith(PREFIX) and status != ApplicationStatus.DELETING
