"""A pool over HTTP: one method for each of the gateway's ``/admin`` routes. Plain HTTP, so a command needs neither Ray nor a second to start.

The environment's proxies never count: a command speaks with the address that it was given, and with no other.
"""

import os
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import certifi
import httpx
from pydantic import BaseModel

from cluster import endpoint as endpoints
from cluster import machine
from cluster.config import Config
from cluster.endpoint import Endpoint
from cluster.errors import PoolUnavailable, received
from cluster.jobspec import Options
from cluster.publishing.gate import Verdict
from cluster.publishing.rollout import Policy, Rollout
from cluster.store.jobs import JobEvent, JobProgress, JobResult, JobStatus
from cluster.types import PUBLISH_TIMEOUT_S, Generation, Manifest, VersionId

READ_TIMEOUT_S = 30
LOOK_S = 10
"""How long a command that redraws waits for one answer."""
ASK_TIMEOUT_S = 300
"""How long one answer of a model may take, a cold start included."""
SUBMIT_TIMEOUT_S = 120
"""How long Ray may take to start a job, or a job or fleet to end."""
UPLOAD_TIMEOUT_S = 600
CHUNK_BYTES = 1 << 20


class Described(NamedTuple):
    """One version: what it is, and how it was judged."""

    manifest: Manifest
    verdicts: list[Verdict]
    """Oldest first."""


class History(NamedTuple):
    """An alias's moves, and its rollouts with all their records. Oldest first."""

    moves: list[Generation]
    rollouts: list[list[Rollout]]


class Watched(NamedTuple):
    """A rollout as it stands now."""

    record: Rollout
    seen: dict[str, Any]
    """``{"waiting_for", "canary": {…}, "stable": {…}}``: what it waits for, and what the gateways measured where they did."""


class Job(BaseModel):
    """A job as its record and its driver say; what a newer release adds is ignored."""

    id: str
    verb: str
    status: JobStatus
    owner: str
    created_s: float
    progress: JobProgress | None
    waiting: str
    """What it waits for; empty where it does not."""
    message: str
    result: JobResult | None

    @property
    def made(self) -> dict[str, Any]:
        """What came out of it: ``version``, ``kind``, ``eval_loss``, ``stage``, …"""
        return self.result.made if self.result else {}


class Log(NamedTuple):
    text: str
    next: int
    """Where to go on."""


class Answer(NamedTuple):
    text: str
    version: str
    seconds: float


class Said(NamedTuple):
    """The first choice of a chat completion, as it is on the wire, and the version that gave it."""

    choice: dict[str, Any]
    version: str


class Completed(NamedTuple):
    """Every choice of a completion, as it is on the wire, and the version that gave them."""

    choices: list[dict[str, Any]]
    version: str


class Client:
    """Errors arrive as they were raised on the other side: with the sender's class, status, code and words."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.url = endpoint.url
        key = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        self.http = httpx.Client(base_url=endpoint.url, headers=key, trust_env=False, verify=_certificates(endpoint.url))

    # what there is

    def status(self) -> dict[str, Any]:
        """``{"slots": {"total", "free"}, "aliases": {…}, "replicas": […], …}``"""
        return self._call("GET", "/admin/status")

    def slots(self, since_s: float = 0.0) -> dict[str, Any]:
        """``{"allocation": {…}, "snapshots": […], "slots": {…}}``: how the slots are divided, and each change after ``since_s`` (seconds since the
        epoch), as `cluster.capacity.handover.parse` reads it."""
        return self._call("GET", "/admin/slots", query={"since_s": repr(since_s)}, timeout_s=LOOK_S)

    def models(self, name: str | None = None) -> list[dict[str, Any]]:
        """A row for each version, oldest first: ``{"version", "kind", "base", "live_as", "created_s", "job", "metrics"}``."""
        return self._call("GET", f"/admin/models/{name}" if name else "/admin/models")["versions"]

    def version(self, id: VersionId) -> Described:
        told = self._call("GET", f"/admin/models/{id}")
        verdicts = [Verdict.model_validate(verdict) for verdict in told["verdicts"]]
        return Described(Manifest.model_validate(told["manifest"]), verdicts)

    def served(self) -> list[str]:
        """What can be asked now, the pool's first model first: aliases, and versions that a replica holds."""
        return [str(model["id"]) for model in self._call("GET", "/v1/models")["data"]]

    def history(self, alias: str) -> History:
        told = self._call("GET", f"/admin/history/{alias}")
        moves = [Generation.model_validate(move) for move in told["moves"]]
        return History(moves, [[Rollout.model_validate(one) for one in records] for records in told["rollouts"]])

    def rollout(self, alias: str) -> Watched:
        """The newest rollout of an alias. Costs the same however many there were."""
        told = self._call("GET", f"/admin/rollouts/{alias}", timeout_s=LOOK_S)
        return Watched(Rollout.model_validate(told["record"]), told["seen"])

    # publishing

    def publish(self, version: VersionId, alias: str, reason: str, policy: Policy | None = None) -> Rollout:
        """Begin a rollout; see `cluster.control.actor.Control.publish` for what can be refused."""
        order = {"version": str(version), "alias": alias, "reason": reason, "claimed_author": author()}
        return self._order("publish", order | ({"policy": policy.model_dump(mode="json")} if policy else {}))

    def step(self, what: Literal["promote", "abort"], alias: str, reason: str, version: VersionId | None = None) -> Rollout:
        """Bring the alias's rollout to 100 % now, or end it. ``version``: only if it is the rollout of this one."""
        order = {"alias": alias, "reason": reason, "version": str(version) if version else None, "claimed_author": author()}
        return self._order(what, order)

    def rollback(self, alias: str, to: VersionId | None, reason: str) -> Rollout:
        """Make the alias mean what it meant before, or ``to``."""
        order = {"alias": alias, "to": str(to) if to else None, "reason": reason, "claimed_author": author()}
        return self._order("rollback", order)

    def _order(self, what: str, order: dict[str, Any]) -> Rollout:
        return Rollout.model_validate(self._call("POST", f"/admin/{what}", order, timeout_s=PUBLISH_TIMEOUT_S))

    # jobs

    def jobs(self, limit: int = 20) -> list[Job]:
        """The newest jobs, the newest first."""
        return [Job.model_validate(job) for job in self._call("GET", "/admin/jobs", query={"limit": str(limit)})["jobs"]]

    def job(self, id: str) -> Job:
        return Job.model_validate(self._call("GET", f"/admin/jobs/{id}", timeout_s=LOOK_S))

    def submit(self, options: Options) -> str:
        """Start a job; returns its id. Files that it names must be where the pool can read them: see `upload`."""
        order = {"verb": options.verb, "options": options.document(), "claimed_author": author()}
        return str(self._call("POST", "/admin/jobs", order, timeout_s=SUBMIT_TIMEOUT_S)["id"])

    def cancel(self, id: str) -> Job:
        """End a job; returns once it has ended."""
        told = self._call("POST", f"/admin/jobs/{id}/cancel", {"claimed_author": author()}, timeout_s=SUBMIT_TIMEOUT_S)
        return Job.model_validate(told)

    def log(self, id: str, offset: int = 0) -> Log:
        """A job's log from byte ``offset`` on, as much of it as fits into one answer."""
        return Log(**self._call("GET", f"/admin/jobs/{id}/logs", query={"offset": str(offset)}))

    def events(self, id: str, limit: int = 100) -> list[JobEvent]:
        """The newest of what happened to a job, oldest first. None for one of the older jobs that have ended."""
        told = self._call("GET", f"/admin/jobs/{id}/events", query={"limit": str(limit)})
        return [JobEvent.model_validate(event) for event in told["events"]]

    # fleets

    def fleets(self) -> list[dict[str, Any]]:
        """A row for each fleet: ``{"name", "model", "phase", "words", "replicas", "min_replicas", "max_replicas", …}``."""
        return self._call("GET", "/admin/fleets")["fleets"]

    def add_fleet(self, name: str, overrides: dict[str, Any]) -> list[dict[str, Any]]:
        """Host one more base model. ``overrides``: what the fleet has of its own, as under ``fleets:`` in the configuration."""
        order = {"name": name, "overrides": overrides, "claimed_author": author()}
        return self._call("POST", "/admin/fleets", order, timeout_s=SUBMIT_TIMEOUT_S)["fleets"]

    def remove_fleet(self, name: str, force: bool = False) -> list[dict[str, Any]]:
        """Let a fleet's replicas finish and end. Without ``force`` refused while an alias means one of its versions."""
        query = {"force": str(force).lower(), "claimed_author": author()}
        return self._call("DELETE", f"/admin/fleets/{name}", query=query, timeout_s=SUBMIT_TIMEOUT_S)["fleets"]

    # data

    def upload(self, file: Path, sent: Callable[[int], None] = lambda _: None) -> str:
        """Copy a file into the pool's store; returns how a job names it (``upload:<sha256>``). ``sent`` hears how many bytes have left."""
        headers = {"content-length": str(file.stat().st_size), "content-type": "application/octet-stream"}
        answer = self._send("PUT", "/admin/uploads", content=_chunks(file, sent), headers=headers, timeout=UPLOAD_TIMEOUT_S)
        return str(answer["source"])

    # models

    def ask(self, model: str, question: str) -> Answer:
        """One greedy answer, and the version that gave it."""
        body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 64}
        began_s = time.monotonic()
        said = self.chat(body)
        text = str(said.choice["message"]["content"] or "")
        return Answer(text.strip(), said.version, time.monotonic() - began_s)

    def chat(self, body: dict[str, Any]) -> Said:
        """Send a request in OpenAI's chat format, without streaming."""
        response = self._exchange("POST", "/v1/chat/completions", json=body, timeout=ASK_TIMEOUT_S)
        return Said(self._document(response)["choices"][0], response.headers.get("x-model-version", ""))

    def complete(self, body: dict[str, Any]) -> Completed:
        """Send a request in OpenAI's completion format, without streaming."""
        response = self._exchange("POST", "/v1/completions", json=body, timeout=ASK_TIMEOUT_S)
        return Completed(self._document(response)["choices"], response.headers.get("x-model-version", ""))

    # the wire

    def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        query: dict[str, str] | None = None,
        timeout_s: float = READ_TIMEOUT_S,
    ) -> dict[str, Any]:
        return self._send(method, path, json=body, params=query, timeout=timeout_s)

    def _send(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        return self._document(self._exchange(method, path, **request))

    def _exchange(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            return self.http.request(method, path, **request)
        except httpx.HTTPError as error:
            words = str(error) or type(error).__name__
            raise PoolUnavailable(
                f"The gateway at {self.url} does not answer: {words}.", "It may still be starting; try again soon."
            ) from error

    def _document(self, response: httpx.Response) -> dict[str, Any]:
        try:
            document = response.json()
        except ValueError as error:
            raise PoolUnavailable(
                f"{self.url} answered {response.status_code} and no JSON: {response.text[:200]!r}.", "Is it a gateway's URL?"
            ) from error
        if response.status_code != 200:
            raise received(response.status_code, document)
        return document


def of(config: Config) -> Client:
    """The client of the pool that runs from this home."""
    return Client(endpoints.of(config))


def author() -> str:
    """Who says to have asked. Nothing verifies it: everybody who has the pool's token may write any name."""
    return machine.user()


def _certificates(url: str) -> ssl.SSLContext | bool:
    """What an https gateway is checked against: ``SSL_CERT_FILE``, which a pool with an authority of its own needs, or the usual ones."""
    if not url.startswith("https://"):
        return False
    return ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE") or certifi.where())


def _chunks(file: Path, sent: Callable[[int], None]) -> Iterator[bytes]:
    done_bytes = 0
    with file.open("rb") as source:
        while block := source.read(CHUNK_BYTES):
            yield block
            done_bytes += len(block)
            sent(done_bytes)
