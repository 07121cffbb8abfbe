"""Configuration → Ray job. The CLI uses it now; the fine-tuning API will."""

import contextlib
import getpass
import logging
import os
import re
import shlex
import subprocess
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster import __version__
from cluster.config import ENV_PREFIX, Config
from cluster.errors import BadRequest, JobFailed, JobNotFound, PoolUnavailable
from cluster.jobspec import Options, new_id, parse
from cluster.pool import local
from cluster.store.jobs import JobSpec, JobStore, document
from cluster.store.jobs import JobStatus as Status
from cluster.store.objects import Store

PROGRESS = re.compile(r"^.*?\bprogress ((?:\w+=\S+ ?)+)$", re.MULTILINE)
"""The line that a job prints about once a second: ``progress stage=finetune step=12/100 loss=1.23 tokens_per_s=5310 eta_s=17``."""
RUN = re.compile(r"^run ([a-z]+-[0-9a-f]{12})$", re.MULTILINE)
"""The line in which an elastic job says how its run is called, for ``--resume``."""
WAITING = re.compile(r"^(?:waiting for slots: (.+)|may have \d+ slots?)$", re.MULTILINE)
"""The lines in which an elastic job says why it has none, or that it has some; what its workers say may come late and between."""
TRAINING = f"{ENV_PREFIX}TRAINING__"
"""What the caller's environment says of training is meant for the job; the pool's configuration has the rest."""
NO_AGENT = "No available agent"
"""Ray's words where the process that starts jobs has not registered yet, on a slow machine some seconds after everything else."""
AGENT_S = 60
"""How long that is waited for."""
STOP_S = 10
"""How long a job may take to keep its state when it is asked to end; Ray kills it then, after 3 s where it was submitted without this."""

ENDED = tuple(status.value for status in Status if status.ended)


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
            self.ray = JobSubmissionClient(address)
        for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)  # what it leaves out of an upload, and that it uploads, is no news

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
    jobs.create(JobSpec(id=id, verb=verb, options=asked.recorded(), owner=getpass.getuser(), created_s=time.time()))
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
        if now["status"] in ENDED:
            break
        time.sleep(interval_s)
    if now["status"] != "succeeded":
        words = now["message"] or (known.last_words if known else "")
        raise JobFailed(f"Job {id} is {now['status']}: {words}", f"See `springtide logs {id}`.")


class Progress(NamedTuple):
    """The newest progress line of a job, as text fields; ``step`` and ``steps`` as numbers."""

    step: int
    steps: int
    fields: dict[str, str]


def client(config: Config) -> JobSubmissionClient:
    try:
        made = JobSubmissionClient(local.require(config).dashboard)
    except (ConnectionError, RuntimeError) as error:
        raise PoolUnavailable(f"Ray's job server does not answer yet: {error}", "Try again in some seconds.") from error
    for name in (
        "ray",
        "ray.dashboard.modules.dashboard_sdk",
    ):  # what it leaves out of the upload, and that it uploads, is no news
        logging.getLogger(name).setLevel(logging.ERROR)
    return made


def submit(config: Config, verb: str, *arguments: str) -> str:
    """Start ``python -m jobs.<verb> …`` on the pool, like ``ray job submit --working-dir .``; returns the submission id."""
    here = Path.cwd()
    folder = {"working_dir": str(here)} if (here / "jobs" / f"{verb}.py").is_file() else {}
    meant = {key: value for key, value in os.environ.items() if key.startswith(TRAINING)}
    told = {**meant, "CODE_REVISION": revision(), "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}
    runtime: dict[str, Any] = {**folder, "env_vars": told}
    entrypoint = shlex.join(["python", "-m", f"jobs.{verb}", *arguments])
    deadline_s, id = time.monotonic() + AGENT_S, new_id(verb)
    while True:
        try:
            return client(config).submit_job(
                entrypoint=entrypoint, submission_id=id, runtime_env=runtime, metadata={"springtide_verb": verb}
            )
        except (RuntimeError, ValueError) as error:  # Ray's client could not upload the folder, or the server refuses
            if NO_AGENT not in str(error) or time.monotonic() > deadline_s:
                words = "Large files here belong into .gitignore, or elsewhere."
                raise BadRequest(f"Ray did not take the job: {error}", words) from error
            time.sleep(0.5)


def revision() -> str:
    """The commit of the code here, for a version's lineage: Ray leaves ``.git`` out of what it uploads."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"springtide {__version__}"


def jobs(config: Config) -> list[JobDetails]:
    """Every submitted job, newest first."""
    listed = [job for job in client(config).list_jobs() if job.submission_id]
    return sorted(listed, key=lambda job: job.start_time or 0, reverse=True)


def log(config: Config, submission_id: str) -> str:
    """Everything a job has printed. Raises `JobNotFound`."""
    try:
        return client(config).get_job_logs(submission_id)
    except RuntimeError as error:  # what Ray's client raises for every answer that is not 200
        raise JobNotFound(f"There is no job {submission_id[:80]!r}.", "`springtide jobs` lists them.") from error


def named(config: Config, job: str) -> str:
    """The submission id of a job that is called by it, or by the name of its run: then the newest, where the run was resumed."""
    if not RUN.fullmatch(f"run {job}"):
        return job
    ids = [listed.submission_id or "" for listed in jobs(config)]
    return next((id for id in ids if run(log(config, id)) == job), job)


def cancel(config: Config, submission_id: str) -> None:
    """Stop a job, and remove what it has kept to be resumed. Raises `JobNotFound`."""
    log(config, submission_id)
    asked, deadline_s = client(config), time.monotonic() + 2 * STOP_S
    asked.stop_job(submission_id)
    while not asked.get_job_status(submission_id).is_terminal() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    if asked.get_job_status(submission_id) == JobStatus.STOPPED:
        for name in RUN.findall(log(config, submission_id)):
            Store(config.store).remove(f"runs/{name}")


def progress(log: str) -> Progress | None:
    """The last progress line in a job's log.

    >>> progress("progress stage=finetune step=12/100 loss=1.25 eta_s=7").step
    12
    """
    found = PROGRESS.findall(log)
    if not found:
        return None
    fields = dict(pair.split("=", 1) for pair in found[-1].split())
    done, _, total = fields.pop("step", "0/0").partition("/")
    return Progress(int(done), int(total or 0), fields)


def run(log: str) -> str:
    """The name of a job's run, as `springtide status`, ``--resume`` and the metrics have it; empty where it has none yet.

    >>> run("8 examples to train on\\nrun finetune-0123456789ab\\n")
    'finetune-0123456789ab'
    """
    return next(iter(RUN.findall(log)), "")


def waiting(log: str) -> str:
    """Why a job waits for slots; empty where it does not.

    >>> waiting("run finetune-0123456789ab\\nwaiting for slots: it needs 2 slots\\n")
    'it needs 2 slots'
    """
    found: list[str] = WAITING.findall(log)
    return found[-1] if found else ""


def watch(config: Config, submission_id: str, interval_s: float = 0.5) -> Iterator[tuple[JobStatus, str]]:
    """Yield (status, whole log so far) until the job ends. Raises `JobFailed` with the job's own last words."""
    jobs_api = client(config)
    while True:
        status = jobs_api.get_job_status(submission_id)
        log = jobs_api.get_job_logs(submission_id)
        yield status, log
        if status.is_terminal():
            break
        time.sleep(interval_s)
    if status != JobStatus.SUCCEEDED:
        ended = "was stopped." if status == JobStatus.STOPPED else f"failed: {last_words(log)}"
        raise JobFailed(f"Job {submission_id} {ended}", f"See `springtide logs {submission_id}`.")


def last_words(log: str) -> str:
    """The job's own ``error: …`` line, or the last line it wrote."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it wrote nothing"])[-1]
