"""The nouns of the design as frozen types. Durable ones are pydantic models, because they are read back from a store."""

import hashlib
import re
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
)

from cluster.errors import BadRequest

Kind = Literal["weights", "adapter"]
Task = Literal["generate", "embed", "classify", "score"]
"""What a fleet's engines do with a model: write text, make vectors, choose among labels, or compare two texts."""
TASKS: tuple[Task, ...] = get_args(Task)

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,62}")
"""Model names become paths and URL parts: no separators, no leading dot, no ``..``, at most 63 characters."""

PUBLISH_TIMEOUT_S = 660
"""How long a client waits until a version is published: replicas may take ten minutes to load it, and control may still be starting."""


INTERIM = "interim--"
"""How the names of interim models begin: the versions that a run makes on its way, and that replicas hold although no alias means them. Clients
see none of them, nobody can take such a name, and what follows the prefix is the run."""


def interim_name(run: str) -> str:
    """
    >>> interim_name("rl-65f0a1b2c3d4"), is_interim("interim--rl-65f0a1b2c3d4"), is_interim("seedling")
    ('interim--rl-65f0a1b2c3d4', True, False)
    """
    return INTERIM + run


def is_interim(name: str) -> bool:
    """Whether a model's name, or a version's id, is that of an interim model."""
    return name.startswith(INTERIM)


def check_name(name: str) -> str:
    """Return ``name``, or raise `BadRequest` where nobody may call a model or a fleet so."""
    if is_interim(check_path(name)):
        raise BadRequest(
            f"{name} is a name for what a run makes on its way.",
            f"Choose a name that does not begin with {INTERIM}",
            param="model",
        )
    return name


def check_path(name: str) -> str:
    """Return ``name``, or raise `BadRequest` where it could not safely become a path. An interim model's has a run's name after the prefix."""
    if not NAME.fullmatch(name.removeprefix(INTERIM)):
        raise BadRequest(
            f"{name[:80]!r} is not a model name.",
            "Use letters, digits, '-', '_' and single dots, at most 63 characters, starting with a letter or digit.",
            param="model",
        )
    return name


class VersionId(NamedTuple):
    """``name@n``: immutable, and the only name the engine ever sees."""

    name: str
    n: int

    def __str__(self) -> str:
        return f"{self.name}@{self.n}"

    @classmethod
    def parse(cls, text: "str | VersionId") -> "VersionId":
        """``"seedling@2"`` → ``VersionId("seedling", 2)``; `BadRequest` for anything else."""
        if isinstance(text, VersionId):
            return text
        name, at, n = text.partition("@")
        if not (at and n.isascii() and n.isdigit() and len(n) <= 9 and n == str(int(n)) and int(n) > 0):
            raise BadRequest(f"{text[:80]!r} is not a version.", "Write it as NAME@NUMBER, for example seedling@2.", "model")
        return cls(check_path(name), int(n))


Version = Annotated[VersionId, BeforeValidator(VersionId.parse), PlainSerializer(str, return_type=str)]


class Durable(BaseModel):
    """Part of a document in the store. It has exactly the fields that are declared, unless a `Record` of a newer release brought more."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_serializer(mode="wrap")
    def _with_unknown_fields(self, known: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {**known(self), **(self.__pydantic_extra__ or {})}


class Record(Durable):
    """A document of its own in the store. `cluster.store.journal.decode` reads it.

    An older release may meet the records of a newer one, after a downgrade. It ignores the fields that it does not know, and writes them
    again where it derives the next record from this one. An unknown field in a record of its own release, or of an older one, is damage.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    SCHEMA: ClassVar[int] = 1
    """The newest form of this document that this release knows. Add one with every new field, its parts' included."""
    schema_version: int = Field(default=1, alias="schema", ge=1)
    """The form in which this document was written; the first had no such field."""


class File(Durable):
    path: str
    """Relative to the version's ``files/`` folder, and inside it."""
    sha256: str
    size_bytes: int

    @field_validator("path")
    @classmethod
    def inside(cls, path: str) -> str:
        if not path or "\\" in path or any(part in ("", ".", "..") for part in path.split("/")):
            raise ValueError(f"{path!r} is not a path inside a version's folder")
        return path


class Lineage(Durable):
    """Where a version came from."""

    parent: Version | None = None
    dataset_sha256: str | None = None
    recipe: dict[str, Any] = {}
    job: str | None = None
    code_revision: str | None = None
    metrics: dict[str, float] = {}
    """What the run measured: ``train_loss``, ``eval_loss_before``, ``eval_loss``, ``examples``, …"""


class Manifest(Record):
    """``versions/<name>/<n>/manifest.json``. Written last: its presence means the version is complete."""

    id: Version
    kind: Kind
    base: Version | None
    """The weights version that an adapter sits on; None for weights."""
    files: tuple[File, ...]
    lineage: Lineage
    created_s: float
    """Seconds since the epoch."""

    @property
    def digest(self) -> str:
        """sha256 over the sorted file digests: what a replica acknowledges after it has checked every byte."""
        lines = sorted(f"{file.sha256}  {file.path}\n" for file in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def weights(self) -> VersionId:
        """The weights version that must be resident to serve this one: itself, or its base."""
        return self.base or self.id


class Generation(Record):
    """``aliases/<alias>/<generation>.json``: one move of an alias. The highest number wins; a rollback is a new one."""

    alias: str
    generation: int
    stable: Version
    canary: Version | None = None
    percent: int = 0
    """Share of sessions that get ``canary``."""
    shadow_percent: int = 0
    """Share of the stable version's requests that ``canary`` answers too, for comparison only."""
    reason: str
    author: str
    time_s: float
    rollout: int | None = None
    """Number of the rollout that made this move; None where somebody moved the alias by hand."""
    record: int = 0
    """The rollout's record that this move carries out."""

    @property
    def versions(self) -> tuple[VersionId, ...]:
        """Every version that a client of the alias may get."""
        return (self.stable,) if self.canary is None else (self.stable, self.canary)


class ReplicaBounds(NamedTuple):
    """How many replicas of a fleet there may be now, beside its own ``min_replicas`` and ``max_replicas``."""

    floor: int = 0
    """With fewer some adapter has no place (`cluster.publishing.adapter_placement`), so a fleet with a floor does not sleep. 0: one replica has a
    place for every adapter."""
    ceiling: int | None = None
    """Another fleet needs the slots of those beyond it (`cluster.capacity.arbiter`). None: nothing limits it. It goes before the floor."""


UNBOUNDED = ReplicaBounds()


class ReplicaState(NamedTuple):
    """What one replica says of itself. ``secret`` opens its internal port; it travels over Ray's authenticated RPC only."""

    id: str
    url: str
    secret: str
    base: str
    held: dict[str, str]
    """Version id → digest of everything this replica can answer with, its base included."""
    refused: dict[str, str]
    """Version id → why it could not be loaded."""
    running: int
    staged: dict[str, str] = {}  # noqa: RUF012 (a NamedTuple's default, never changed)
    """Version id → digest of what lies ready on this machine for another base: this replica can host it within a moment."""
    revision: int = 0
    """Grows with every change of what it holds, so that an answer which was overtaken on its way is known as such."""
    pause_s: float = 0.0
    """How long the last change of weights kept this replica from answering, draining included."""
    fingerprint: str = ""
    """Checksum of the weights in the accelerator's memory; equal on all replicas of one base."""
    app: str = ""
    """The Serve application that it belongs to: the fleet, or a second one while another shape takes over (`cluster.control.applications`)."""
    pid: int = 0
    """The engine's process, on the machine that ``url`` names."""
    waiting: dict[str, str] = {}  # noqa: RUF012 (a NamedTuple's default, never changed)
    """Version id → what it waits for before it can be loaded."""
    bounds: ReplicaBounds = UNBOUNDED
    """What it has heard from control of its fleet."""
    context_tokens: int = 0
    """The longest request that its engine takes."""
    kv_cache_tokens: int = 0
    """The tokens for which its KV cache has room, as vLLM counts them. 0: the model keeps nothing."""

    def __repr__(self) -> str:
        return f"ReplicaState({self.id}, {self.url}, {self.base})"  # never the secret, which a log line would keep


class FleetState(NamedTuple):
    """What a gateway knows of one fleet, whether it runs or sleeps."""

    name: str
    model: str
    """The alias whose weights the fleet hosts."""
    versions: tuple[str, ...]
    """Ids of every version that a replica of the fleet answers for once it runs: its weights, and the adapters that it loads. Sorted."""
    app: str
    """The Serve application of its replicas, as in `ReplicaState.app`."""
    surge: str = ""
    """The Serve application of its surge; empty without one."""
    task: Task = "generate"
    failed: str = ""
    """Why its engine did not start a moment ago, in vLLM's words. Nobody starts another yet, so no request waits for one."""


class HoldOrder(NamedTuple):
    """What control orders one replica to hold; ids of versions."""

    load: tuple[str, ...]
    """To load now, or to stage where they sit on other weights."""
    keep: tuple[str, ...] = ()
    """Adapters that must not be unloaded to make room for those (`cluster.publishing.adapter_placement`)."""


class FleetPhase(StrEnum):
    """Where a fleet is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    ASLEEP = "asleep"
    """No replica runs, and a request wakes one."""
    DRAINING = "draining"
    """It was removed: its replicas finish their streams and end."""
    FAILED = "failed"
    """Its replicas could not start."""


class View(NamedTuple):
    """What a gateway needs for routing, built by control and pushed to every gateway. ``revision`` only grows."""

    revision: int
    aliases: dict[str, Generation]
    replicas: tuple[ReplicaState, ...]
    fleets: dict[str, FleetState] = {}  # noqa: RUF012 (a NamedTuple's default, never changed)
    alias_fleets: dict[str, str] = {}  # noqa: RUF012 (a NamedTuple's default, never changed)
    """Alias → the name of the fleet that it belongs to; empty where no fleet hosts its weights."""


EMPTY_VIEW = View(0, {}, ())


class ColdStage(StrEnum):
    """How far a fleet without a replica is on the way to its first one."""

    ASLEEP = "asleep"
    """No replica runs, and none is being started. A request starts one."""
    QUEUED = "queued"
    """A replica waits for a slot or for its process."""
    STARTING = "starting"
    """A replica starts its engine."""
    RUNNING = "running"
    """A replica runs."""


class ColdStart(NamedTuple):
    """The answer of control to a gateway whose client waits for a fleet's first replica. ``words`` are one sentence for that client."""

    stage: ColdStage
    words: str
