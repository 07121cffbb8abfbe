"""Start, reach and stop the local pool: one Ray head and everything on it, owned by one supervising process.

The supervisor (``python -m cluster.pool.local``) makes itself the reaper of all its descendants, so when it stops it can end whatever is
left by process id. A Ray that is killed leaves workers and engines behind; a stopped supervisor does not.
"""

import contextlib
import ctypes
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster import address as addresses
from cluster import machine, niceness
from cluster.address import LOOPBACK
from cluster.config import ENV_PREFIX, Config, parse
from cluster.errors import PoolUnavailable
from cluster.pool import folders, haproxy

PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG = 36, 1
START_TIMEOUT_S = 90
JOBS_S = 10
"""How long jobs may take to keep their state when the pool ends."""
STOP_TIMEOUT_S = 3
ELSEWHERE = (
    *("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_NAMESPACE", "RAY_REDIS_ADDRESS", "RAY_REDIS_PASSWORD", "RAY_GCS_SERVER_PORT"),
    *("RAY_OVERRIDE_DASHBOARD_URL", "RAY_OVERRIDE_RESOURCES", "RAY_START_HOOK", "RAY_JOB_SUBMIT_HOOK", "RAY_JOB_HEADERS"),
    *("RAY_RUNTIME_ENV", "RAY_RUNTIME_ENV_HOOK", "RAY_JOB_ID", "RAY_RAYLET_PID"),
)
"""What a shell may have set for another Ray: where that is, how to start and ask it, and which of its processes the shell runs in. A new pool
takes none of it, nor our own variables: the resolved file has them all."""
SERVING_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # 15 by default, which starves the gateway beside a busy engine
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # a gateway writes to its clients' connections itself
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.2",  # 0.1 by default; each turn asks Ray, also while nothing happens
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # the gateway counts requests then, and no process reads HAProxy's log of each
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",  # its port is open to all; see deployments/ray_patches.py
    "RAY_DEDUP_LOGS": "0",  # it would swallow what a job says while its workers come and go: the same words with another number
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_XGRAMMAR_CACHE_MB": "32",  # 512 by default: compiled grammars, which an engine keeps until it has so many
    "TOKENIZERS_PARALLELISM": "false",
}
"""What every Ray process that serves must be told, on a laptop and in a pod (`cluster.pool.k8s`) alike."""


@dataclass(frozen=True)
class Pool:
    """A running pool: the supervisor's process, and where Ray listens."""

    pid: int
    created_s: float
    """When that began, in seconds since the epoch. For a file of an older release only: the machine's clock may be set since."""
    address: str
    """Ray's GCS, ``host:port``."""
    dashboard: str
    """The Jobs API and the dashboard, ``http://host:port``."""
    gateway: str = ""
    """Where clients connect, ``http://host:port``."""
    token: str = field(default="", repr=False)
    """What Ray's own API and the gateway's admin routes ask for."""
    started_ticks: int = 0
    """When the process began, as `cluster.machine.start_ticks` says. 0 in a file of an older release."""

    @property
    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return self._is(process) and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return False

    def _is(self, process: psutil.Process) -> bool:
        """Whether it is the supervisor, and not another process that has its number now."""
        if self.started_ticks:
            return machine.start_ticks(self.pid) == self.started_ticks
        return abs(process.create_time() - self.created_s) < 1

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)


def up(config: Config, watch: Callable[[str], None] = lambda _: None, began: Callable[[Pool], None] = lambda _: None) -> Pool:
    """Start Ray for ``config`` unless its pool already runs. ``watch`` hears what is being waited for, and ``began`` of the pool that this call
    starts, as soon as there is one: whoever interrupts the start can stop that one.

    Raises `PoolUnavailable` with the end of Ray's log where it does not come up.
    """
    if (running := find(config)) is not None:
        return running
    resolved = remember(config)
    os.environ.update(environment(config))
    log = config.home / "pool.log"
    watch("starting Ray")
    with log.open("wb") as output:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "cluster.pool.local", str(resolved)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal is for the command in front, which then stops the pool in order
        )
    began_s, ticks = psutil.Process(supervisor.pid).create_time(), machine.start_ticks(supervisor.pid)
    pool = Pool(supervisor.pid, began_s, address(config), dashboard(config), gateway(config), token(), ticks)
    began(pool)
    write_json(config.home / "pool.json", asdict(pool))  # at once: `springtide down` can stop it while it starts
    _wait(lambda: _answers(pool), supervisor, log)
    return pool


def remember(config: Config) -> Path:
    """Write the configuration in force where later commands on this home find it."""
    resolved = folders.home(config) / "resolved.json"
    write_json(resolved, config.dump())
    return resolved


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Readable by its owner only. Whoever reads ``path`` meanwhile gets the old document or the new one, and never half of one."""
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # mode 0600
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(
            document, file, indent=1, ensure_ascii=False
        )  # YAML, as which `config.load` reads it, takes no pairs of surrogates
    os.replace(partial, path)


def remembered(config: Config) -> Config:
    """The configuration in force on this home."""
    return parse(json.loads((config.home / "resolved.json").read_text("utf-8")))


def find(config: Config) -> Pool | None:
    """The pool started from this home, None where none runs. This process, and what it starts, speak with that pool from now on.

    Raises `PoolUnavailable` where its file cannot be read.
    """
    pool = _read(config.home / "pool.json")
    if pool is None or not pool.alive:
        return None
    if not pool.gateway:  # written by an older release
        pool = replace(pool, gateway=gateway(config), token=token_of(environment(config)))
    os.environ.update(environment(config))
    os.environ["RAY_API_SERVER_ADDRESS"] = pool.dashboard  # it would win over the address that Ray's client is given
    if token() != pool.token:
        os.environ["RAY_AUTH_TOKEN"] = pool.token  # the shell's own is for another Ray
    return pool


def _read(path: Path) -> Pool | None:
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise folders.others(path) from error
    known = {one.name for one in fields(Pool)}
    return Pool(**{key: value for key, value in values.items() if key in known})


def require(config: Config) -> Pool:
    """The running pool, or `PoolUnavailable`."""
    pool = find(config)
    if pool is None:
        raise PoolUnavailable(f"No pool runs from {config.home}.", "Start one with `springtide up`.")
    return pool


def down(config: Config) -> bool:
    """Stop the pool and everything it started. False where none ran."""
    pool = find(config)
    if pool is None:
        return False
    stop(config, pool)
    return True


def stop(config: Config, pool: Pool) -> None:
    """Stop this pool and everything it started, and no other that runs from the same home by now. It may have ended already."""
    if pool.alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            _terminate(pool)
    path = config.home / "pool.json"
    written = _read(path)
    if written is not None and (written.pid, written.started_ticks) == (pool.pid, pool.started_ticks):
        path.unlink(missing_ok=True)


def _terminate(pool: Pool) -> None:
    process = psutil.Process(pool.pid)
    process.terminate()
    try:
        process.wait(START_TIMEOUT_S)
    except psutil.TimeoutExpired:
        _end([*pool.descendants(), process], grace_s=0)


def address(config: Config) -> str:
    return addresses.authority(config.pool.host, config.pool.gcs_port)


def dashboard(config: Config) -> str:
    return f"http://{addresses.authority(config.pool.host, config.pool.dashboard_port)}"


def gateway(config: Config) -> str:
    """Where commands on this machine reach the gateway."""
    return f"http://{addresses.authority(addresses.destination(config.gateway.host), config.gateway.port)}"


def metrics_port(config: Config) -> int:
    """Where Ray's agent answers ``GET /metrics`` for Prometheus; see `cluster.metrics`."""
    return config.pool.agent_ports + 4  # behind those of HAProxy's statistics


def environment(config: Config) -> dict[str, str]:
    """What this process, and everything it starts, needs in order to speak with Ray: its token and its network.

    A token is made once per home, readable by its owner only. On loopback Ray must be told to stay there: it resolves 127.0.0.1 to the
    machine's outer address unless clusters of several machines are switched off, which the variable below does on Linux as well
    (``ray/_private/services.py::get_node_ip_address``).
    """
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if config.pool.host == LOOPBACK else {}
    excepted = [one.strip() for name in ("NO_PROXY", "no_proxy") for one in os.environ.get(name, "").split(",")]
    ours = [LOOPBACK, "::1", "localhost", config.pool.host, config.gateway.host]
    direct = ",".join(dict.fromkeys(filter(None, [*excepted, *ours])))
    return {
        **loopback,
        "NO_PROXY": direct,
        "no_proxy": direct,
        **_token(config),
    }  # where both are set, the second counts for most


def use(config: Config) -> None:
    """Set Ray's variables for this process. Call it before Ray is imported, which reads some of them then: a shell may have others.

    Raises `PoolUnavailable` where the home cannot be used.
    """
    folders.home(config)
    for name in ELSEWHERE:
        os.environ.pop(name, None)
    os.environ.update(environment(config))


def _token(config: Config) -> dict[str, str]:
    given = {key: os.environ[key] for key in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if key in os.environ}
    if given:
        return {"RAY_AUTH_MODE": "token", **given}
    path = config.home / "ray_token"
    if not path.exists():
        folders.home(config)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def client_environment(config: Config) -> dict[str, str]:
    """What a shell needs for `ray job submit` (which looks at the first), `ray status` and other Ray commands on this pool."""
    return {"RAY_API_SERVER_ADDRESS": dashboard(config), "RAY_ADDRESS": address(config), **environment(config)}


def _answers(pool: Pool) -> bool:
    try:
        url = f"{pool.dashboard}/api/version"
        return httpx.get(url, timeout=2, headers=bearer(), trust_env=False, verify=addresses.WITHOUT_TLS).status_code == 200
    except httpx.HTTPError:
        return False


def token() -> str:
    """The pool's token, from the environment that `environment` made. Ray's own API and the gateway's admin routes ask for it."""
    return token_of(os.environ)


def token_of(environment: Mapping[str, str]) -> str:
    return environment.get("RAY_AUTH_TOKEN") or Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text().strip()


def bearer() -> dict[str, str]:
    return {"Authorization": f"Bearer {token()}"}


def _wait(ready: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while process.poll() is not None or not ready():
        if process.poll() is not None or time.monotonic() > deadline_s:
            process.terminate()
            process.wait()
            end = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-15:])
            raise PoolUnavailable(
                f"Ray did not start.\n{end}\n", f"The whole log is {log}. Is another pool using the same ports?"
            )
        time.sleep(0.2)


# the supervisor


def ray_command(config: Config) -> list[str]:
    """``ray start`` with every listener on one host and every port stated, so that two pools can share a machine."""
    pool = config.pool
    slots = (
        {"num-gpus": pool.slots}
        if config.pool.accelerator == "gpu"
        else {"resources": json.dumps({"slot": pool.slots}), "num-gpus": 0}
    )
    options = {
        **({} if pool.host == LOOPBACK else {"node-ip-address": pool.host}),
        "port": pool.gcs_port,
        "dashboard-host": pool.host,
        "dashboard-port": pool.dashboard_port,
        "dashboard-agent-listen-port": pool.agent_ports,
        "ray-client-server-port": pool.agent_ports + 1,
        "metrics-export-port": metrics_port(config),
        "min-worker-port": 0,  # any free one: Ray's own range starts at the same port for every pool of the machine
        "max-worker-port": 0,
        "object-store-memory": pool.object_store_bytes,
        **slots,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats", *flags]


def ray_environment(config: Config, resolved: Path, run: Path) -> dict[str, str]:
    """The environment that every Ray process of the pool inherits. ``run`` is a folder for sockets and Ray's own files; see `folders.run_folder`."""
    base = config.pool.agent_ports
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith(ENV_PREFIX) and key not in ELSEWHERE},
        **environment(config),
        **folders.account(config),
        "RAY_TMPDIR": str(run),  # of this pool alone: in /tmp/ray, another user's Ray may own what ours would write
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",  # jobs say `python` and mean this one
        "SPRINGTIDE_CONFIG": str(resolved),
        haproxy.NICENESS: str(niceness.CARRYING),
        haproxy.HOST: config.gateway.host,
        **SERVING_ENVIRONMENT,
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(haproxy.WRAPPER),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(run / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, (os.cpu_count() or 1) // 4))),  # each may take a core from an engine
        "RAY_SERVE_HAPROXY_MAXCONN": str(machine.connections(machine.open_files())),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(run / "admin"),  # Serve puts a node's id of 56 characters in between
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(run / "metrics"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(run),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(run / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(base + 2),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(base + 3),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(base + 10),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(base + 60),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(base + 61),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(base + 99),
    }


def supervise(config: Config, resolved: Path) -> int:
    """Run Ray until a signal, then end every descendant. Returns Ray's exit status.

    Jobs first, which keep what they have learnt. Then all at once: Ray's own way waits up to 30 s for one process after the other, and
    nothing else here has state to save.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    machine.raise_open_files()
    run = folders.run_folder()
    folders.show_logs(config, run)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stopping.set())
    ray = subprocess.Popen(ray_command(config), env=ray_environment(config, resolved, run), preexec_fn=_end_with_parent)
    while ray.poll() is None and not stopping.wait(0.2):
        _reap(keep=ray.pid)
    _end(_jobs(), grace_s=JOBS_S)
    while left := psutil.Process().children(recursive=True):  # a process that ends may leave others to us
        _end(left, grace_s=STOP_TIMEOUT_S)
        _reap()
    folders.keep_logs(config, run)
    return ray.returncode or 0


def _jobs() -> list[psutil.Process]:
    """``python -m jobs.<verb>``, as Ray runs what was submitted."""
    found: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[1:2] == ["-m"] and process.cmdline()[2].startswith("jobs."):
                found.append(process)
    return found


def _end_with_parent() -> None:
    """In `ray start`: SIGTERM, which ends Ray in order, when the supervisor dies without having had the time to."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _reap(keep: int = 0) -> None:
    """Collect every ended child but ``keep``: orphans become ours, and would stay as zombies."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != keep:
            os.waitpid(ended.si_pid, os.WNOHANG)


def _end(processes: list[psutil.Process], grace_s: float) -> None:
    """SIGTERM, wait, SIGKILL. psutil checks creation times, so a recycled process id is never hit."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    _, left = psutil.wait_procs(processes, timeout=grace_s)
    for process in left:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(left, timeout=5)


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    sys.exit(supervise(parse(json.loads(path.read_text("utf-8"))), path))
