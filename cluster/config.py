"""The whole configuration, one typed tree.

Later wins: a preset (``cluster/presets/*.yaml``) < ``springtide.yaml`` < ``SPRINGTIDE_…`` variables < ``--set`` overrides. Nested keys
are dotted on the command line (``--set fleet.max_replicas=3``) and joined by ``__`` in the environment
(``SPRINGTIDE_FLEET__MAX_REPLICAS=3``). An unknown key anywhere is an error. ``springtide config`` prints the resolved form.
"""

import os
import re
from pathlib import Path
from typing import Any, Literal, Self, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cluster import engine_options
from cluster.address import LOOPBACK, bare
from cluster.capacity import options
from cluster.capacity.arbiter import Budget
from cluster.capacity.fit import Fit
from cluster.capacity.kv_cache import Slot
from cluster.errors import BadRequest, ConfigError
from cluster.machine import expanded
from cluster.publishing.gate import GatePolicy
from cluster.publishing.rollout import Policy
from cluster.types import Task, check_name

PRESETS = Path(__file__).parent / "presets"
ENV_PREFIX = "SPRINGTIDE_"
POOL_URL, API_KEY = f"{ENV_PREFIX}POOL", f"{ENV_PREFIX}API_KEY"
"""The pool that a command speaks with, and its key there (`cluster.endpoint`): no keys of the configuration."""
DEFAULT_HOME = ".springtide"
CACHE_BYTES = 64 << 30
ORIGIN = re.compile(r"https?://[^/\s*]+")
"""A scheme, a host, and a port where it is not the usual one: what a browser sends as ``Origin``."""
RENAMED = {"standby": "warm_pool_size", "standby_s": "warm_pool_s"}
"""Former name → present name of a key."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Pool(Section):
    """The Ray cluster that `springtide up` starts. On Kubernetes KubeRay starts it, and this section is unused."""

    accelerator: Literal["slot", "gpu"] = "slot"
    """What one slot is: a unit of the logical Ray resource ``slot``, or a GPU. The same on Kubernetes."""
    slots: int = Field(default=2, ge=1)
    """Units of accelerator to arbitrate."""
    host: str = LOOPBACK
    """The address that every Ray process binds to."""
    gcs_port: int = Field(default=6399, ge=1, le=65535)
    dashboard_port: int = Field(default=8265, ge=1, le=65535)
    """The Jobs API listens here, for `ray job submit`."""
    agent_ports: int = Field(default=28500, ge=1024, le=65000)
    """First of the ports for Ray's agents and metrics, HAProxy's statistics and the replicas' direct ingress on this machine."""
    object_store_bytes: int = Field(default=200 << 20, ge=80 << 20)

    @field_validator("host")
    @classmethod
    def address(cls, host: str) -> str:
        host = bare(host)
        if host == "localhost":  # Ray would take the machine's outer address for it
            return LOOPBACK
        if host == "::1":
            raise ValueError("Ray has no loopback but 127.0.0.1; write that. Only gateway.host may be ::1")
        return host


class Gateway(Section):
    host: str = LOOPBACK
    """Where clients connect. Loopback unless you say otherwise; put your own TLS in front before you do."""
    port: int = Field(default=8000, ge=1, le=65535)
    replicas: int = Field(default=1, ge=1)
    max_body_bytes: int = Field(default=8 << 20, ge=1024)
    max_choices: int = Field(default=16, ge=1)
    """The largest ``n`` or ``best_of`` a request may ask for; vLLM itself would try 16,384."""
    max_prompts: int = Field(default=128, ge=1)
    """Answers that one request with a list of prompts may ask for: prompts times ``n``."""
    max_inputs: int = Field(default=2048, ge=1)
    """Texts that one request may send to be embedded, scored, ranked or classified."""
    max_requests: int = Field(default=4096, ge=1)
    """Generating requests that one gateway has in hand, waiting or being answered. The next one is told to come back later."""
    max_buffered_bytes: int = Field(default=256 << 20, ge=1024)
    """Bytes of bodies that one gateway holds. A request beyond them is told to come back later."""
    hold_timeout_s: float = Field(default=30, ge=0)
    """How long a request may wait for a replica that holds its version."""
    cold_start_timeout_s: float = Field(default=120, gt=0)
    """How long a request may wait for a fleet without a replica to start one."""
    max_held: int = Field(default=256, ge=0)
    """Requests that one gateway keeps waiting for a fleet without a replica. The next one is told to come back later."""
    first_byte_timeout_s: float = Field(default=300, gt=0)
    """How long a stream may wait for a replica's first byte before the client gets an error."""
    idle_timeout_s: float = Field(default=120, gt=0)
    """How long a replica may pause in the middle of a stream."""
    answer_timeout_s: float = Field(default=1800, gt=0)
    """How long an answer may take that is not streamed: its first byte comes when it is complete."""
    early_comment_s: float | None = Field(default=None, gt=0)
    """After so long without a first byte a stream gets a comment line, and again after as long: proxies give up on a silent connection. An
    error that comes later is an event of the stream, and the stream's headers do not name its version. None: never."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the API from a browser, for example ``https://chat.example.org``; ``*`` for all. ``/admin`` stays closed to
    pages."""

    @field_validator("cors_origins")
    @classmethod
    def origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin; write it as https://host or http://host:port, without a path")
        return origins

    @field_validator("host")
    @classmethod
    def address(cls, host: str) -> str:
        return bare(host)


class Fleet(Section):
    """The replicas that host one base model, and vLLM's engine arguments for them."""

    model: str = "seedling"
    """The alias whose base weights the fleet hosts."""
    task: Task = "generate"
    """What the fleet's engines do with the model: write text, make vectors (``embed``), choose among labels (``classify``), or compare two texts
    (``score``). It decides which routes answer for the model."""
    priority: int = 0
    """Which fleet gets slots first where there are too few for all: the higher number."""
    min_replicas: int = Field(default=1, ge=0)
    """With 0 the fleet sleeps while nobody asks, and the first request waits until an engine has started. A fleet whose adapters need more
    than one replica does not sleep."""
    max_replicas: int = Field(default=1, ge=1)
    target_running: int = Field(default=32, ge=1)
    """Requests per replica that autoscaling aims at, those that wait in the engine included."""
    target_kv_use: float = Field(default=0.8, gt=0, le=1)
    """The share of the KV cache that autoscaling aims at."""
    target_ttft_s: float = Field(default=1.0, gt=0)
    """The time to the first token that autoscaling aims at, for nine requests in ten."""
    scale_up_after_s: float = Field(default=1, ge=0)
    """How long the load must ask for more replicas."""
    scale_down_after_s: float = Field(default=60, ge=0)
    """How long the load must ask for fewer."""
    sleep_after_s: float = Field(default=300, ge=0)
    """How long nobody must have asked before the last replica ends, where min_replicas is 0."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Slots per replica."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = Field(default=None, ge=16)
    """Tokens of prompt and answer together. By default the model's own limit, or as much of it as the KV cache has room for."""
    max_num_seqs: int = Field(default=64, ge=1)
    kv_cache_bytes: int | None = Field(default=None, ge=1 << 20)
    """Size of the KV cache. By default what vLLM finds free of `gpu_memory_utilization`; without a GPU it is chosen from the model and the
    machine (`cluster.capacity.fit`)."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    cpu_threads: int = Field(default=1, ge=1)
    """Threads for the engine's arithmetic where there is no GPU."""
    enforce_eager: bool = False
    """Skip compilation: a faster start and slower tokens."""
    max_loras: int = Field(default=4, ge=1)
    """Adapters in one batch."""
    max_cpu_loras: int = Field(default=16, ge=1)
    """Adapters resident in one replica."""
    when_full: Literal["evict", "refuse"] = "evict"
    """Whether a version of an adapter that no alias means any more makes room when all places of a replica are taken: ``evict`` unloads it,
    ``refuse`` keeps it, so that clients can go on pinning it. With ``refuse`` a rollout that needs its place is rolled back. A live adapter
    that other replicas hold makes room either way; one that control wants there never does."""
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 16
    swap: Literal["wait", "keep"] = "wait"
    """What streams do while weights are swapped in place: they end first, or they stand still and go on with the new weights, under the
    name of the version they began with."""
    swap_drain_s: float = Field(default=20, ge=0)
    """How long streams may take to end before a swap of weights is given up. With one replica everybody else waits meanwhile."""
    drain_timeout_s: float = Field(default=60, ge=0)
    """How long an ending replica waits for its own streams."""
    warm_pool_size: int = Field(default=1, ge=0)
    """Engines per machine that stay asleep, without a slot, when their replica ends. The next replica takes one over within seconds. Each engine
    keeps its memory on the host; on a GPU its weights move there."""
    warm_pool_s: float = Field(default=900, ge=0)
    """How long an engine sleeps before it ends. A machine on which one sleeps is not idle to Ray's autoscaler."""
    engine: dict[str, Any] = {}
    """Any other argument of vLLM's engine or server, by vLLM's own name: ``tool_call_parser: hermes``. `cluster.engine_options` lists those
    that are refused, with the reasons. None leaves an argument to vLLM."""

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}; raise it")
        if self.max_cpu_loras < self.max_loras:
            raise ValueError(f"max_cpu_loras {self.max_cpu_loras} is below max_loras {self.max_loras}; raise it")
        return self

    @field_validator("engine")
    @classmethod
    def options(cls, engine: dict[str, Any]) -> dict[str, Any]:
        engine_options.check(engine)
        return engine

    @field_validator("model")
    @classmethod
    def name(cls, model: str) -> str:
        try:
            return check_name(model)
        except BadRequest as error:
            raise ValueError(str(error)) from error


class FleetSpec(Section):
    """All that a replica needs to know: one fleet, and where versions come from. Serve builds each fleet's application from it."""

    name: str
    fleet: Fleet
    store: str
    home: Path
    accelerator: Literal["slot", "gpu"]
    cache_bytes: int = CACHE_BYTES
    adapters: bool = Field(default=True, exclude=True)
    """Whether its engine has places for adapters. `fitted` says so, of the model that it is to host; no configuration does."""

    def slot(self, memory_bytes: int | None) -> Slot:
        """One slot as its engine uses it. ``memory_bytes``: of one device, None where it is not known."""
        fleet = self.fleet
        return Slot(
            accelerator=self.accelerator,
            memory_bytes=memory_bytes,
            gpu_memory_utilization=fleet.gpu_memory_utilization,
            kv_cache_bytes=fleet.kv_cache_bytes,
            tensor_parallel_size=fleet.tensor_parallel_size,
            dtype=fleet.dtype,
            max_model_len=fleet.max_model_len,
            max_loras=fleet.max_loras if fleet.task == "generate" else 0,
            max_lora_rank=fleet.max_lora_rank,
            **options.changed(fleet.engine),
        )

    def fitted(self, found: Fit) -> Self:
        """The same with what was left open as it was chosen for one model."""
        fleet = self.fleet.model_copy(update=found.settings)
        return self.model_copy(update={"fleet": fleet, "adapters": found.takes_adapters})

    @property
    def sleeps(self) -> bool:
        """Whether engines are started so that vLLM can free the accelerator's memory while they sleep."""
        return self.accelerator == "gpu" and self.fleet.warm_pool_size > 0

    def engine_arguments(self) -> dict[str, Any]:
        """Arguments of vLLM's engine and server by their names. What is None is left to vLLM."""
        values = {
            "runner": "generate" if self.fleet.task == "generate" else "pooling",
            "convert": "embed" if self.fleet.task == "embed" else None,
            "dtype": self.fleet.dtype,
            "tensor_parallel_size": self.fleet.tensor_parallel_size,
            "max_model_len": self.fleet.max_model_len,
            "max_num_seqs": self.fleet.max_num_seqs,
            "kv_cache_memory_bytes": self.fleet.kv_cache_bytes,
            "gpu_memory_utilization": self.fleet.gpu_memory_utilization,
            "enforce_eager": self.fleet.enforce_eager,
            "enable_lora": self.adapters and self.fleet.task == "generate",
            "max_loras": self.fleet.max_loras,
            "max_cpu_loras": self.fleet.max_cpu_loras,
            "max_lora_rank": self.fleet.max_lora_rank,
            "enable_sleep_mode": self.sleeps or None,
            **self.fleet.engine,
        }
        return {key: value for key, value in values.items() if value is not None}

    def engine_environment(self) -> dict[str, str]:
        """Variables for the engine's processes.

        On CPUs vLLM puts the worker into a process of its own, so that it can set OpenMP up there. Core and worker then wait for each
        other by spinning on shared memory, which on a small machine takes the time that everything else needs, and the worker imports
        everything once more. With OpenMP set up here there is no need: one process and half a gigabyte less.
        """
        # vLLM compiles its sampler even in eager mode: the first request with a temperature would wait 6 to 29 s on two cores.
        eager = {"TORCH_COMPILE_DISABLE": "1"} if self.fleet.enforce_eager else {}
        if self.accelerator == "gpu" or self.fleet.tensor_parallel_size > 1:
            return eager
        return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(self.fleet.cpu_threads), **eager}


class Publishing(Section):
    """How a version goes live."""

    policy: Policy = Policy()
    gate: GatePolicy = GatePolicy()
    held_out: str = ""
    """Path or URL of examples (as for fine-tuning) on which a version's loss is compared with the incumbent's."""
    tasks: str = ""
    """Path or URL of examples whose answers must be met exactly; the share that is met is compared."""
    golden: str = ""
    """Path or URL of prompts with assertions; `jobs.evaluate` has the format."""


class Training(Section):
    workers: int = Field(default=1, ge=1)
    """The most that a job uses."""
    min_workers: int = Field(default=1, ge=1)
    """The least that a job goes on with; with room for fewer it waits."""
    slots_per_worker: int = Field(default=1, ge=1)
    threads_per_worker: int = Field(default=1, ge=1)
    """CPU threads for torch in each worker. One leaves the rest to serving."""
    yield_deadline_s: float = Field(default=30, gt=0)
    """How long a job may take to save its work when it is asked for slots; then it is ended, and goes on from its last checkpoint."""
    checkpoint_s: float = Field(default=60, gt=0)
    """How often a job saves its work unasked."""
    report_s: float = Field(default=1, ge=0)
    """At most how often a job prints its progress; 0 prints every step."""
    max_data_bytes: int = Field(default=1 << 30, ge=1024)
    """The largest file that a job reads."""
    data_prefixes: tuple[str, ...] = ()
    """Object-store URLs under which a job that came over HTTP may read, for example ``s3://bucket/datasets``."""
    budget: Budget = Budget()

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is above workers {self.workers}; lower it")
        return self


class Config(Section):
    store: str = ""
    """URL of the store. Empty: the folder `store` under `home`."""
    home: Path = Path(DEFAULT_HOME)
    """Logs, the pool's process id, cached files. Nothing that matters lives only here, except the default store."""
    cache_bytes: int = Field(default=CACHE_BYTES, ge=1 << 20)
    """Above this the versions that were not used for the longest leave the folder `cache` under `home`; those in use stay. A store that is a
    folder is read in place and needs no cache."""
    pool: Pool = Pool()
    gateway: Gateway = Gateway()
    fleet: Fleet = Fleet()
    """What every fleet has unless `fleets` says otherwise."""
    fleet_overrides: dict[str, dict[str, Any]] = Field(default={}, alias="fleets")
    """Fleet → what it has of its own. Without any there is one fleet, named after `fleet.model`. A fleet's model is its name unless set."""
    publishing: Publishing = Publishing()
    training: Training = Training()

    @model_validator(mode="after")
    def absolute(self) -> Self:
        home = _folder(self.home)
        store = self.store or (home / "store").as_uri()
        if "://" not in store:
            store = _folder(store).as_uri()
        for name, fleet in self.fleets.items():
            if self.gateway.hold_timeout_s <= fleet.swap_drain_s:
                hold, drain = self.gateway.hold_timeout_s, fleet.swap_drain_s
                raise ValueError(
                    f"gateway.hold_timeout_s {hold} must be longer than swap_drain_s {drain} of the fleet {name}: requests wait for a swap"
                )
        check_one_fleet_per_model(self.fleets)
        object.__setattr__(self, "home", home)
        object.__setattr__(self, "store", store)
        return self

    @property
    def fleets(self) -> dict[str, Fleet]:
        """Every declared fleet by its name, in the order in which they were declared.

        >>> two = Config(fleet=Fleet(dtype="float32"), fleets={"chat": {}, "embed": {"model": "minilm"}})
        >>> [(name, fleet.model, fleet.dtype) for name, fleet in two.fleets.items()]
        [('chat', 'chat', 'float32'), ('embed', 'minilm', 'float32')]
        """
        if not self.fleet_overrides:
            return {self.fleet.model: self.fleet}
        return {name: self.fleet_with(name, overrides) for name, overrides in self.fleet_overrides.items()}

    @property
    def default_fleet(self) -> str:
        """The fleet that a command means when it names none: the first declared."""
        return next(iter(self.fleets))

    @property
    def default_model(self) -> str:
        """The alias that a command means when it names none."""
        return self.fleets[self.default_fleet].model

    def fleet_with(self, name: str, overrides: dict[str, Any]) -> Fleet:
        """The fleet ``name``: `fleet` with these ``overrides``. Raises `ValueError` naming the key at fault."""
        try:
            check_name(name)
            return Fleet.model_validate(merge(self.fleet.model_dump(), {"model": name, **overrides}))
        except BadRequest as error:
            raise ValueError(f"fleets: {error}") from error
        except ValidationError as error:
            raise ValueError("; ".join(f"fleets.{name}.{problem}" for problem in problems(error))) from error

    def spec(self, name: str) -> FleetSpec:
        """What the replicas of a declared fleet are built from."""
        return self.spec_of(name, self.fleets[name])

    def spec_of(self, name: str, fleet: Fleet) -> FleetSpec:
        return FleetSpec(
            name=name,
            fleet=fleet,
            store=self.store,
            home=self.home,
            cache_bytes=self.cache_bytes,
            accelerator=self.pool.accelerator,
        )

    def dump(self) -> dict[str, Any]:
        """The resolved configuration as plain JSON values, without defaults left out. Another process can load it back."""
        return self.model_dump(mode="json", by_alias=True)


def _folder(path: str | Path) -> Path:
    """An absolute path that JSON can hold. Raises `ValueError`."""
    try:
        found = expanded(path).resolve()
        str(found).encode()
        return found
    except (BadRequest, UnicodeEncodeError) as error:
        raise ValueError(
            str(error) if isinstance(error, BadRequest) else f"the path {os.fsencode(path)!r} is not UTF-8"
        ) from error


def check_one_fleet_per_model(fleets: dict[str, Fleet]) -> None:
    """An alias's new weights go to the one fleet whose `model` it is. Raises `ValueError` where two claim it."""
    owner: dict[str, str] = {}
    for name, fleet in fleets.items():
        if (other := owner.setdefault(fleet.model, name)) != name:
            raise ValueError(f"the fleets {other} and {name} both host the model {fleet.model}; give one of them another model")


def load(preset: str | None = None, file: Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """Read every layer and validate. Raises `ConfigError` naming the key, what is wrong and where it came from."""
    environment = from_environment(dict(os.environ))
    preset = preset or str(environment.pop("preset", "laptop"))
    named = environment.pop("config", None)
    file = file or Path(named or "springtide.yaml")
    if named and not file.is_file():
        raise ConfigError(f"SPRINGTIDE_CONFIG names {file}, which does not exist.", "Correct it or unset it.", param="config")
    layers = [_yaml(_preset(preset)), _yaml(file) if file.exists() else {}, environment, overrides or {}]
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, layer)
    return parse(with_templates(merged))


def with_templates(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the text of each chat template where they name a file. Raises `ConfigError`."""
    fleets: Any = values.get("fleets")
    if isinstance(fleets, dict):
        own = cast(dict[str, Any], fleets)
        values = {**values, "fleets": {name: engine_options.with_template(fleet) for name, fleet in own.items()}}
    return {**values, "fleet": engine_options.with_template(values.get("fleet", {}))}


def parse(values: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            f"The configuration is not valid: {'; '.join(problems(error))}.",
            "`springtide config` prints every key with its value.",
            param=".".join(map(str, error.errors()[0]["loc"])),
        ) from error


def problems(error: ValidationError) -> list[str]:
    """``["max_replicas: Input should be greater than 0", …]``: each key at fault, and what is wrong with it."""
    return [f"{'.'.join(map(str, one['loc'])) or 'configuration'}: {_words(one)}" for one in error.errors()]


def _words(one: Any) -> str:
    if one["type"] != "extra_forbidden":
        return str(one["msg"]).removeprefix("Value error, ")
    name = RENAMED.get(str(one["loc"][-1]))
    return f"this key is called {name} now" if name else "there is no such key"


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """A fleet's keys as they are called now. For stored records only: in a configuration an old name is an error.

    >>> renamed({"standby_s": 60, "max_replicas": 2})
    {'warm_pool_s': 60, 'max_replicas': 2}
    """
    return {RENAMED.get(key, key): value for key, value in values.items()}


def merge(under: Any, over: Any) -> Any:
    """Deep merge of plain dictionaries; ``over`` wins."""
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    below, above = cast(dict[str, Any], under), cast(dict[str, Any], over)
    return {**below, **{key: merge(below.get(key), value) for key, value in above.items()}}


def from_environment(environment: dict[str, str]) -> dict[str, Any]:
    """``{"SPRINGTIDE_FLEET__DTYPE": "float32"}`` → ``{"fleet": {"dtype": "float32"}}``."""
    own = {key: value for key, value in environment.items() if key.startswith(ENV_PREFIX) and key not in (POOL_URL, API_KEY)}
    pairs = [(key[len(ENV_PREFIX) :].lower(), value) for key, value in own.items()]
    return from_pairs((key.replace("__", "."), value) for key, value in pairs)


def from_pairs(pairs: Any) -> dict[str, Any]:
    """``[("fleet.dtype", "float32")]`` → ``{"fleet": {"dtype": "float32"}}``. Values are read as `_value` says."""
    values: dict[str, Any] = {}
    for dotted, text in pairs:
        *path, last = dotted.split(".")
        nested: Any = _value(text)
        for key in reversed([*path, last]):
            nested = {key: nested}
        values = merge(values, nested)
    return values


def _value(text: str) -> Any:
    """A number, a truth value, ``null``, and what YAML writes in brackets or quotes, are what YAML takes them for. All else is text as it
    stands, because paths and addresses may hold what means something in YAML.

    >>> [_value(text) for text in ("2", "null", "[1, 2]", "/home/a #1", "::", "[::1]", "~")]
    [2, None, [1, 2], '/home/a #1', '::', '[::1]', '~']
    """
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    marked = text.lstrip()[:1] in ("[", "{", '"', "'")
    return value if marked or isinstance(value, bool | int | float) or text.strip().lower() == "null" else text


def _preset(name: str) -> Path:
    path = PRESETS / f"{name}.yaml"
    known = sorted(p.stem for p in PRESETS.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"There is no preset {name!r}.", f"Choose one of: {', '.join(known)}.", param="preset")
    return path


def _yaml(path: Path) -> dict[str, Any]:
    try:
        values: Any = yaml.safe_load(path.read_text("utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", "Fix the file or remove it.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values.", "See cluster/presets/laptop.yaml.")
    return cast(dict[str, Any], values)
