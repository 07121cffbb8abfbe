"""Ray's job server: what starts, ends and knows jobs as processes. What a job *is* stands in its record (`cluster.store.jobs`).

Control asks it for whoever asks control (`cluster.control.jobs`). `start` and `follow` are for a pool on this machine that does not serve
yet, so that there is no control to ask.
"""

import contextlib
import logging
import os
import shlex
import subprocess
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cluster import __version__, machine
from cluster.config import Config
from cluster.errors import BadRequest, JobFailed, JobNotFound, PoolUnavailable
from cluster.jobspec import Options, new_id, parse
from cluster.pool import local
from cluster.store.jobs import JobSpec, JobStatus, JobStore, document
from cluster.store.objects import Store

NO_AGENT = "No available agent"
"""Ray's words where the process that starts jobs has not registered yet, on a slow machine some seconds after everything else."""
AGENT_S = 60
"""How long that is waited for."""
STOP_S = 10
"""How long a job may take to keep its state when it is asked to end; Ray kills it then, after 3 s where it was submitted without this."""


class RayJob(NamedTuple):
    """What Ray knows of a job."""

    status: str
    """``PENDING``, ``RUNNING``, ``STOPPED``, ``SUCCEEDED`` or ``FAILED``."""
    exit_code: int | None = None
    error: str = ""
    """What kind of failure it was, in Ray's words."""
    message: str = ""

    @property
    def ended(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")

    @property
    def killed(self) -> bool:
        """Whether a signal ended its process, or the machine that it ran on is gone.

        >>> RayJob("FAILED", exit_code=-9).killed, RayJob("FAILED", exit_code=137).killed, RayJob("FAILED", exit_code=2).killed
        (True, True, False)
        """
        return self.error.endswith("ACTOR_DIED") or (self.exit_code is not None and (self.exit_code < 0 or self.exit_code > 128))

    @property
    def last_words(self) -> str:
        """The last line of the log's end, which Ray adds to its own words.

        >>> RayJob("FAILED", 2, message="failed with exit code 2, last available logs:\\nreading\\nerror: no data\\n").last_words
        'error: no data'
        """
        lines = [line.strip() for line in self.message.splitlines() if line.strip()]
        return lines[-1][:500] if lines else "It wrote nothing."


class JobServer:
    """Ray's job server: it starts, ends and knows jobs. Raises `PoolUnavailable` where it does not answer."""

    def __init__(self, address: str) -> None:
        """``address``: its URL, or ``host:port`` of the pool's GCS, which knows it."""
        with _unavailable(), _told_nothing():
            from ray.job_submission import (
                JobSubmissionClient,  # a gateway has this file beside control's handle, and submits nothing
            )

            self.ray = JobSubmissionClient(address)
        for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)  # what it leaves out of an upload, and that it uploads, is no news

    @property
    def dashboard(self) -> str:
        """The URL of Ray's dashboard, which it is a part of."""
        return self.ray.get_address()

    def start(self, id: str, options: Options, environment: dict[str, str], folder: Path | None = None) -> None:
        """Start ``python -m jobs.VERB …`` as the job ``id``, in a copy of ``folder`` or where Springtide is installed."""
        told = {**environment, "CODE_REVISION": revision(), "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}
        runtime: dict[str, Any] = {**({"working_dir": str(folder)} if folder else {}), "env_vars": told}
        entrypoint = shlex.join(["python", "-m", f"jobs.{options.verb}", *options.arguments()])
        metadata, deadline_s = {"springtide_verb": options.verb}, time.monotonic() + AGENT_S
        while True:
            try:
                self.ray.submit_job(entrypoint=entrypoint, submission_id=id, runtime_env=runtime, metadata=metadata)
                return
            except (RuntimeError, ValueError) as error:  # Ray's client could not upload the folder, or the server refuses
                if NO_AGENT not in str(error) or time.monotonic() > deadline_s:
                    words = "Large files here belong into .gitignore, or elsewhere."
                    raise BadRequest(f"Ray did not take the job: {error}", words) from error
                time.sleep(0.5)
            except OSError as error:
                raise PoolUnavailable(f"Ray's job server does not answer: {error}", "Try again in some seconds.") from error

    def state(self, id: str) -> RayJob | None:
        """None where Ray does not know the job: it never got it, or it was started anew since."""
        with _unavailable():
            try:
                known = self.ray.get_job_info(id)
            except RuntimeError as error:
                if _unknown(error):
                    return None
                raise
        return RayJob(known.status.value, known.driver_exit_code, known.error_type or "", known.message or "")

    def stop(self, id: str) -> None:
        """Ask a job to end; nothing where Ray does not know it, or it has ended."""
        with _unavailable():
            try:
                self.ray.stop_job(id)
            except RuntimeError as error:
                if not _unknown(error):
                    raise

    def log(self, id: str) -> str:
        """Everything that a job has printed. Raises `JobNotFound`."""
        with _unavailable():
            try:
                return self.ray.get_job_logs(id)
            except RuntimeError as error:
                if not _unknown(error):
                    raise
                raise JobNotFound(
                    f"The log of {id[:80]!r} is gone with the pool that ran it.", "`springtide jobs` lists them."
                ) from error


@contextlib.contextmanager
def _unavailable() -> Generator[None]:
    """What Ray's client raises where its server does not answer: requests' errors, which are `OSError`s, or a bare `RuntimeError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise PoolUnavailable(f"Ray's job server does not answer: {error}", "Try again in some seconds.") from error


@contextlib.contextmanager
def _told_nothing() -> Generator[None]:
    """Ray's client takes the address from these variables, whatever it was given; a shell may have them for another pool."""
    kept = {name: os.environ.pop(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _unknown(error: RuntimeError) -> bool:
    return "status code 404" in str(
        error
    )  # Ray's client raises the same for every answer that is not 200, and keeps the status in words


def server(config: Config) -> JobServer:
    """Of the pool that runs from this home. Raises `PoolUnavailable`."""
    return JobServer(local.require(config).dashboard)


# a pool on this machine, whether or not it serves yet: everybody else asks control


def start(config: Config, verb: str, **options: Any) -> str:
    """Start a job on the pool that runs from this home, like ``ray job submit --working-dir .``, and return its id."""
    asked, id, here = parse(verb, options), new_id(verb), Path.cwd()
    jobs = JobStore(Store(config.store))
    jobs.create(JobSpec(id=id, verb=verb, options=asked.recorded(), owner=machine.user(), created_s=time.time()))
    server(config).start(id, asked, {}, here if (here / "jobs" / f"{verb}.py").is_file() else None)
    return id


def follow(config: Config, id: str, interval_s: float = 0.5) -> Iterator[dict[str, Any]]:
    """Yield the job's document (`cluster.store.jobs.document`) until it has ended. Raises `JobFailed` with its own last words."""
    jobs, ray = JobStore(Store(config.store)), server(config)
    while True:
        known = ray.state(id)
        alive = known is not None and not known.ended
        now = document(jobs.record(id), alive)  # read after Ray was asked: a driver writes how it ended before it ends
        yield now
        if JobStatus(now["status"]).ended:
            break
        time.sleep(interval_s)
    if now["status"] != "succeeded":
        words = now["message"] or (known.last_words if known else "")
        raise JobFailed(f"Job {id} is {now['status']}: {words}", f"See `springtide logs {id}`.")


def revision() -> str:
    """The commit of the code here, for a version's lineage: Ray leaves ``.git`` out of what it uploads."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"springtide {__version__}"
