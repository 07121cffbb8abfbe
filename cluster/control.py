"""The control actor: observe → decide → act, twice a second, until what is live is what the store says.

One named, detached, restartable Ray actor. It holds nothing that it could not read again: desired state comes from the store, actual
state from the replicas. Killed at any point, Ray starts it again and the next tick goes on from there.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
import logging
import threading
import time
from typing import Any, Protocol, cast

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster import graph, logs
from cluster.config import Config, parse
from cluster.errors import NoReplica, PoolUnavailable, SpringtideError, VersionRefused
from cluster.registry import Registry, adapter_rank
from cluster.store import Store
from cluster.types import EMPTY_VIEW, Generation, Manifest, ReplicaState, VersionId, View

ACTOR, NAMESPACE = "springtide-control", "springtide"
TICK_S = 0.5
DESCRIBE_TIMEOUT_S = 2
LOAD_TIMEOUT_S = 120
"""How long a replica may take to load one version."""
PREPARE_TIMEOUT_S = 2
"""Far less than a gateway holds requests (`deployments.gateway.HOLD_TIMEOUT_S`), so that none gives up waiting before the move."""
ADOPT_TIMEOUT_S = 5
FORGET_S = 5
RETRY_REFUSED_S = 30
START_TIMEOUT_S = 60

log = logs.logger(__name__)


class Client(Protocol):
    """What callers outside the actor may ask. `SpringtideError`s arrive as themselves."""

    def publish(self, version: str, alias: str, reason: str, author: str) -> Generation: ...


class Control:
    """The actor's body. Threaded rather than async: everything it calls blocks."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config: Config = parse(config)
        self.registry = Registry(Store(self.config.store))
        self.publishing = threading.Lock()
        """One publish at a time. Loading may take minutes, and the loop goes on meanwhile."""
        self.changing = threading.RLock()
        """Whoever makes a new view holds this, briefly, and reads the aliases while it does."""
        self.current = EMPTY_VIEW
        self.histories: dict[str, list[Generation]] = {}
        self.seen: dict[str, tuple[ReplicaState, float]] = {}
        self.retry_refused_s = 0.0
        threading.Thread(target=self._run, daemon=True, name="control-loop").start()

    # asked from outside

    def view(self) -> View:
        """The newest view. A gateway that starts during a move waits for the move's end, so that it cannot adopt half of one."""
        with self.changing:
            return self.current

    def configure(self, config: dict[str, Any]) -> None:
        """Take over a newer configuration: on Kubernetes the graph may be redeployed while this actor lives on."""
        self.config = parse(config)
        if self.registry.store.url != Store(self.config.store).url:
            self.registry = Registry(Store(self.config.store))

    def status(self) -> dict[str, Any]:
        """What `springtide status` prints: ``{"slots", "aliases", "replicas"}``, without the replicas' secrets."""
        return {
            "slots": slots(),
            "aliases": {name: move.model_dump(mode="json") for name, move in self.current.aliases.items()},
            "replicas": [public(replica) for replica in self._observe()],
        }

    def publish(self, version: str, alias: str, reason: str, author: str) -> Generation:
        """Make ``version`` the one that ``alias`` means, on every replica and gateway, and return the new generation.

        Every replica has acknowledged the version's digest before the alias moves. Raises `VersionRefused` with the replica's words
        where one cannot load it, and then nothing has changed; `Conflict` where another publisher was faster.
        """
        manifest = self.registry.manifest(VersionId.parse(version))
        self._check_fits(manifest)
        with self.publishing:
            now = self.registry.alias(alias)
            if now is not None and now.stable == manifest.id:
                return now
            self._warm(manifest)
            with self.changing:
                return self._flip(alias, manifest.id, reason, author, after=now.generation if now else 0)

    # the loop

    def _run(self) -> None:
        while True:
            try:
                self.tick()
            except Exception:
                # Whatever stopped this tick (store away, application still starting, a damaged object), the loop must go on: a thread
                # that ended would leave an actor that looks alive and converges nothing.
                log.exception("tick")
            time.sleep(TICK_S)

    def tick(self) -> None:
        """One round: read both sides, load what is missing, and tell the gateways if anything changed.

        What a replica has refused it is asked again only every `RETRY_REFUSED_S`: most refusals are for good, some are a bad moment.
        """
        # Observed and adopted under one lock: a stale observation must not undo what a publish has just loaded.
        with self.changing:
            replicas = self._observe()
            self.histories = self.registry.histories()
            self._adopt(replicas)
        bases = {VersionId.parse(replica.base) for replica in replicas}
        limit = self.config.fleet.max_cpu_loras
        wanted = [manifest for base in bases for manifest in self.registry.ever_live(base, limit)]
        again = time.monotonic() >= self.retry_refused_s
        missing = [m for m in wanted if any(lacks(r, m) and (again or str(m.id) not in r.refused) for r in replicas)]
        if again:
            self.retry_refused_s = time.monotonic() + RETRY_REFUSED_S
        if missing:
            self._ask_fleet("hold", [str(m.id) for m in missing], timeout_s=LOAD_TIMEOUT_S)  # the next tick sees the outcome

    def _observe(self) -> list[ReplicaState]:
        """The replicas heard lately. Silence for less than `FORGET_S` is no death: the machine may be busy, and gateways avoid a replica
        that breaks a connection by themselves."""
        now_s = time.monotonic()
        for answer in self._ask_fleet("describe", timeout_s=DESCRIBE_TIMEOUT_S):
            if isinstance(answer, ReplicaState):
                self.seen[answer.id] = answer, now_s
        self.seen = {id: (state, at_s) for id, (state, at_s) in self.seen.items() if now_s - at_s < FORGET_S}
        return [state for state, _ in self.seen.values()]

    def _ask_fleet(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        return broadcast(graph.fleet_app(self.config.fleet.model), method, *arguments, timeout_s=timeout_s)

    # publish, step by step

    def _check_fits(self, manifest: Manifest) -> None:
        """Refuse what the engine would choke on, before it sees it."""
        base = self._base()
        if manifest.weights != base:
            raise VersionRefused(
                f"{manifest.id} needs {manifest.weights}, but the fleet hosts {base}.",
                f"Train it on {base}, or serve its base: springtide up --model {manifest.weights}.",
                param="base",
            )
        if manifest.kind == "adapter":
            rank = adapter_rank(self.registry.fetch(manifest, self.config.home / "cache"))
            limit = self.config.fleet.max_lora_rank
            if rank > limit:
                raise VersionRefused(
                    f"{manifest.id} has rank {rank}, but the engine takes at most {limit}.",
                    f"Train with a smaller r, or start the pool with fleet.max_lora_rank={rank} or more.",
                    param="fleet.max_lora_rank",
                )

    def _base(self) -> VersionId:
        replicas = self.current.replicas or tuple(self._observe())
        if not replicas:
            raise NoReplica("No replica is running yet.", "Wait until `springtide status` shows one, then publish again.")
        return VersionId.parse(replicas[0].base)

    def _warm(self, manifest: Manifest) -> None:
        states = self._ask_fleet("hold", [str(manifest.id)], timeout_s=LOAD_TIMEOUT_S)
        if not states:
            raise NoReplica("No replica answered.", "Wait until `springtide status` shows one, then publish again.")
        for state in states:
            if not isinstance(state, ReplicaState):
                raise PoolUnavailable(
                    f"A replica did not acknowledge {manifest.id}: {state}.", "Nothing has changed; publish again."
                )
            self.seen[state.id] = state, time.monotonic()  # newer than what the last round heard
            if lacks(state, manifest):
                words = state.refused.get(str(manifest.id), "it did not say why")
                raise VersionRefused(
                    f"Replica {state.id} could not load {manifest.id}: {words}", "The live version is untouched."
                )

    def _flip(self, alias: str, version: VersionId, reason: str, author: str, after: int) -> Generation:
        """Move the alias so that no client sees it go back: every gateway holds new requests for it until all know the move.

        Two phases over one lock. A gateway that does not prepare stops the move. If this process dies between the phases, the gateways
        go on after a time of their own with what they know, and the next control announces what the store says.
        """
        replicas = self._observe()
        try:
            if silent := self._ask_gateways("prepare", alias, time.time_ns(), timeout_s=PREPARE_TIMEOUT_S):
                raise PoolUnavailable(f"A gateway did not answer: {silent[0]}.", "Nothing has changed; publish again.")
            move = self.registry.move(alias, version, reason, author, after)
        except SpringtideError:
            self._adopt(replicas, force=True)
            raise
        self.histories[alias] = [*self.histories.get(alias, []), move]
        self._adopt(replicas)
        log.info("%s is %s at generation %d: %s", alias, version, move.generation, reason)
        return move

    def _adopt(self, replicas: list[ReplicaState], force: bool = False) -> None:
        if not replicas and self.current is EMPTY_VIEW:
            return  # just started and nothing heard yet: the gateways know better
        ordered = tuple(sorted(replicas))
        aliases = {name: answerable(history, ordered) for name, history in self.histories.items()}
        changed = force or aliases != self.current.aliases or routing(ordered) != routing(self.current.replicas)
        if changed:
            self.current = View(time.time_ns(), aliases, ordered)
            for error in self._ask_gateways("adopt", self.current, timeout_s=ADOPT_TIMEOUT_S):
                log.warning("a gateway did not adopt the view: %s", error)  # it fetches it by itself

    def _ask_gateways(self, method: str, *arguments: Any, timeout_s: float) -> list[Exception]:
        """Tell every gateway; returns what went wrong."""
        answers = broadcast(graph.GATEWAY_APP, method, *arguments, timeout_s=timeout_s)
        return [answer for answer in answers if isinstance(answer, Exception)]


def answerable(history: list[Generation], replicas: tuple[ReplicaState, ...]) -> Generation:
    """The generation that gateways should follow: the newest whose version somebody holds; the newest of all where nobody holds any.

    They differ where an alias was moved in the store by other hands, or control was killed between a move and its announcement: until a
    replica has loaded the version, requests go on being answered by the one before.
    """
    held = {id for replica in replicas for id in replica.held}
    return next((move for move in reversed(history) if str(move.stable) in held), history[-1])


def lacks(replica: ReplicaState, manifest: Manifest) -> bool:
    """Whether this replica should hold the version and does not, by digest."""
    return replica.base == str(manifest.weights) and replica.held.get(str(manifest.id)) != manifest.digest


def routing(replicas: tuple[ReplicaState, ...]) -> list[tuple[Any, ...]]:
    """The part of the replicas' states that a gateway routes by; load changes alone are not worth a push."""
    return [(r.id, r.url, r.secret, r.held) for r in replicas]


def public(replica: ReplicaState) -> dict[str, Any]:
    return {key: value for key, value in replica._asdict().items() if key != "secret"}


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


# outside the actor


class _Remote:
    """`Client` over the actor's handle."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def publish(self, version: str, alias: str, reason: str, author: str) -> Generation:
        return self._call("publish", LOAD_TIMEOUT_S + START_TIMEOUT_S, version, alias, reason, author)

    def _call(self, method: str, timeout_s: float, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(self.actor, method).remote(*arguments), timeout=timeout_s)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, SpringtideError) else error) from None
        except (RayActorError, GetTimeoutError) as error:
            raise PoolUnavailable(
                "The control actor does not answer.", "It restarts by itself; try again in some seconds."
            ) from error


def ensure(config: Config) -> Any:
    """The control actor's handle, started if there is none. Anyone on the pool may call this: the first one wins."""
    actor = ray.remote(Control).options(
        name=ACTOR,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_concurrency=8,
        num_cpus=0,
        runtime_env={"env_vars": {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1"}},  # this actor has no event loop to route in
    )
    return actor.remote(config.dump())


def connect() -> Client:
    """The control of the pool that this process runs on, for jobs. Others speak HTTP: `cluster.admin`. Raises `PoolUnavailable`."""
    if not ray.is_initialized():
        ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
    try:
        return _Remote(ray.get_actor(ACTOR, namespace=NAMESPACE))
    except ValueError as error:
        raise PoolUnavailable(
            "The pool has no control actor: nothing is being served.", "Start serving with `springtide up`."
        ) from error


def slots() -> dict[str, float]:
    """Slots of this pool: ``{"total", "free"}``. GPUs where there are any, else the logical resource."""
    total, free = ray.cluster_resources(), ray.available_resources()
    kind = "GPU" if total.get("GPU") else "slot"
    return {"total": total.get(kind, 0.0), "free": free.get(kind, 0.0)}
