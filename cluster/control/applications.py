"""Serve's applications as control sees them, and those that control itself starts: fleets added at run time, and surge fleets.

A surge fleet is there only while weights take over that the fleet cannot host beside its own: an engine reads other weights of its own
shape in place, but another architecture, quantization or tokenizer needs another engine, and somebody has to answer while the fleet's
replicas start theirs. A fleet of one replica also has none to spare for a canary. Kubernetes calls the same thing a surge of a rolling
update. The name of a surge's application says what it hosts, so a control that was restarted finds it again.

A redeployment of the declared applications leaves these alone (``ray/serve/_private/application_state.py``, ``apply_app_configs``).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ray import serve

from cluster import logs
from cluster.config import FleetSpec
from cluster.control import serve_details
from cluster.pool import graph
from cluster.pool.serve_api import DECLARATIVE, ServeApi
from cluster.types import NAME, VersionId

PREFIX = "surge-"
SHOWN_S = 10.0
"""Serve shows an application at once; a look that began before it was asked for does not."""
SURGE = re.compile(rf"{PREFIX}({NAME.pattern})@{NAME.pattern}-[1-9][0-9]*")

log = logs.logger(__name__)


class Application(NamedTuple):
    """One application, with its replicas counted."""

    status: str
    """Serve's: DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY, DELETING."""
    message: str = ""
    running: int = 0
    starting: int = 0
    """Replicas that wait for their place, or are being started."""
    ending: int = 0
    """Serve lists one until it has heard of its end, and one that ends before it had a slot as well."""

    @property
    def steady(self) -> bool:
        """Whether no replica comes or goes."""
        return self.status == "RUNNING" and not (self.starting or self.ending)

    @property
    def failed(self) -> str:
        """Serve's own words where its replicas could not start, else empty."""
        return graph.cause(self.message) if self.status in ("DEPLOY_FAILED", "UNHEALTHY") else ""


STARTING = Application("DEPLOYING", starting=1)
"""What Serve was just asked for."""


class Applications:
    """What Serve has, as of the last look. One thread looks (`refresh`); others read ``known``, which is replaced and never changed."""

    def __init__(self, api: Callable[[], ServeApi]) -> None:
        """``api``: Serve's REST API. It is made when it is first needed, since Ray's dashboard may start later than control."""
        self.api = api
        self.known: dict[str, Application] = {}
        self.read = False
        """Whether Serve was ever asked: before that an application that is not known may well exist."""
        self._started: dict[str, float] = {}
        """Applications that Serve was asked for and has not shown yet → when that was. To start one again would deploy it again."""
        self._deletions: set[str] = set()
        """Applications for which a thread waits until they are gone."""

    def refresh(self) -> None:
        found = serve_details.applications()
        now_s = time.monotonic()
        self._started = {app: at_s for app, at_s in self._started.items() if app not in found and now_s - at_s < SHOWN_S}
        self.known = {**dict.fromkeys(self._started, STARTING), **{name: _counted(app) for name, app in found.items()}}
        self.read = True

    def _start(self, app: str) -> None:
        self._started = {**self._started, app: time.monotonic()}
        self.known = {**self.known, app: STARTING}

    def sources(self) -> dict[str, str]:
        """Application → who has deployed it: `IMPERATIVE` or `DECLARATIVE`. It blocks. Raises `PoolUnavailable`."""
        return {name: app["source"] for name, app in self.api().applications().items()}

    def there(self, name: str) -> Application | None:
        """The application, unless it is on its way out."""
        app = self.known.get(name)
        return None if app is None or app.status == "DELETING" else app

    def surge_of(self, fleet: str) -> VersionId | None:
        """The weights that a surge of the fleet hosts; None without one."""
        weights = (hosted_by(name) for name in self.known if self.there(name) and surged(name) == fleet)
        return next(weights, None)

    def start_fleet(self, spec: FleetSpec) -> None:
        """Ask Serve for the fleet's application; returns at once."""
        log.info("the fleet %s for %s", spec.name, spec.fleet.model)
        graph.start_fleet(spec)
        self._start(graph.fleet_app(spec.name))

    def start_surge(self, spec: FleetSpec, weights: VersionId, replicas: int) -> None:
        """Ask Serve for a surge of the fleet that hosts ``weights``; returns at once."""
        log.info("a surge of %d for %s on %s", replicas, spec.name, weights)
        app = surge_app(spec.name, weights)
        graph.start_surge(spec, app, weights, replicas)
        self._start(app)

    def end(self, name: str) -> None:
        """Let it finish its streams and go; returns at once. Serve's own call waits for the end, so a thread of its own makes it."""
        if name not in self._deletions:
            log.info("%s is not needed any more", name)
            self._deletions.add(name)
            threading.Thread(target=self._delete, args=(name,), name=f"delete-{name}", daemon=True).start()

    def _delete(self, name: str) -> None:
        try:
            if surged(name) or self.sources().get(name) != DECLARATIVE:  # while it drained a configuration may have taken it over
                serve.delete(name)
        except Exception:
            # Serve is away, or a replica drains for longer than Serve waits: whoever wants it gone asks again.
            log.exception("deleting %s", name)
        finally:
            self._deletions.discard(name)


def surge_app(fleet: str, weights: VersionId) -> str:
    """The application of a fleet's surge.

    >>> surge_app("chat", VersionId("seedling", 12))
    'surge-chat@seedling-12'
    """
    return f"{PREFIX}{fleet}@{weights.name}-{weights.n}"


def surged(app: str) -> str:
    """The fleet whose surge it is; empty where it is another kind of application.

    >>> surged("surge-chat@seedling-12"), surged("surge-chat"), surged("fleet-chat")
    ('chat', '', '')
    """
    found = SURGE.fullmatch(app)
    return found[1] if found else ""


def hosted_by(app: str) -> VersionId:
    """What a surge's application hosts.

    >>> hosted_by("surge-chat@seedling-12")
    VersionId(name='seedling', n=12)
    """
    name, _, n = app.partition("@")[2].rpartition("-")
    return VersionId(name, int(n))


def _counted(app: Mapping[str, Any]) -> Application:
    """
    >>> replicas = [{"state": "RUNNING"}, {"state": "STARTING"}]
    >>> _counted({"status": "DEPLOYING", "message": "", "deployments": {"Replica": {"message": "", "replicas": replicas}}})
    Application(status='DEPLOYING', message='', running=1, starting=1, ending=0)
    """
    deployments = app["deployments"].values()
    counts = Counter(_word(replica["state"]) for one in deployments for replica in one["replicas"])
    starting, ending = counts["STARTING"], counts["STOPPING"]
    message = graph.message_of(app["message"], (one["message"] for one in deployments))
    return Application(_word(app["status"]), message, counts.total() - starting - ending, starting, ending)


def _word(state: object) -> str:
    """Serve says its states as members of an enum in some places, and as text in others."""
    return str(getattr(state, "value", state))
