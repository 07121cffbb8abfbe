"""What every verb does that trains: it begins or resumes a run, trains it, and registers the result with its lineage."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cluster.config import Config
from cluster.jobspec import Trainer
from cluster.store.jobs import JobProgress, JobSnapshot
from cluster.store.registry import Registry
from cluster.types import Lineage, Manifest, VersionId
from jobs.training import recipe
from jobs.training.drivers import driver, rounds
from jobs.training.drivers.driver import Listener
from jobs.training.drivers.ray_train import code_revision
from jobs.training.progress import Progress
from jobs.training.runs import begin, result, resume
from jobs.training.work import Work


class Job(Listener, Protocol):
    """What a launch needs of `jobs.record.JobRecord`."""

    id: str
    snapshot: JobSnapshot

    def begin_run(self, run: str) -> None: ...


class Learning(NamedTuple):
    """A request that has been checked: what to train, and as what to register it."""

    work: Callable[[dict[str, Any]], Work]
    settings: dict[str, Any]
    """``work``'s own."""
    recipe: recipe.Recipe
    """With its defaults resolved."""
    examples: int
    """How many there are to train on."""
    dataset_sha256: str
    name: str
    """Of which the result becomes the next version."""
    parent: VersionId | None
    """What training starts from; None for a new model."""
    facts: dict[str, Any] = {}  # noqa: RUF012 (never written to)
    """What else decided the result; the lineage has it beside the recipe."""
    check: Callable[[], None] = lambda: None
    """Called all the time while the run trains. What it raises ends the run."""

    @property
    def base(self) -> VersionId | None:
        """What the result is an adapter on; None for weights."""
        return self.parent if self.recipe.lora else None


def begun(registry: Registry, resumed: str, inputs: dict[str, Any], job: Job) -> str:
    """Begin a run under the job's id, or go on with the run ``resumed``, and return its name.

    ``inputs``: what the run depends on. Raises `BadRequest` where the run to resume is another one.
    """
    name = resume(registry.store, resumed, inputs) if resumed else begin(registry.store, job.id, inputs)
    job.begin_run(name)
    return name


TRAINERS = {"elastic": driver.fit, "ray_train": rounds.fit}


def trained(
    config: Config, registry: Registry, run: str, learning: Learning, priority: int, job: Job, trainer: Trainer = "elastic"
) -> Manifest:
    """Train to the end, and register the result: an adapter on its base, or weights. Raises `JobFailed`; the run stays then."""
    settings = {"config": config.dump(), "recipe": learning.recipe.model_dump(), **learning.settings}
    ended = TRAINERS[trainer](config, learning.work, settings, run, priority, job, learning.check, learning.recipe.sharding.parts)
    steps = recipe.schedule(learning.recipe, learning.examples).steps
    job.watch(whole(steps, ended.metrics, job.snapshot.progress))
    lineage = Lineage(
        parent=learning.parent,
        dataset_sha256=learning.dataset_sha256,
        recipe={**learning.recipe.model_dump(exclude_none=True), **learning.facts},
        job=job.id,
        code_revision=code_revision(),
        metrics={**ended.metrics, "examples": learning.examples},
    )
    kind = "adapter" if learning.base else "weights"
    with tempfile.TemporaryDirectory() as scratch, result(config, ended.name, Path(scratch)) as folder:
        return registry.register(learning.name, kind, learning.base, folder, lineage)


def whole(steps: int, metrics: dict[str, float], last: JobProgress | None) -> Progress:
    """The progress of a run at its end. The driver looks once a second, so it may have missed the last step, or all of a short run."""
    loss, tokens = metrics.get("train_loss", math.nan), int(metrics.get("tokens", 0))
    if last is None:
        return Progress(steps, steps, loss, tokens, 0.0, 0.0, 0)
    return Progress(steps, steps, loss, tokens, last.tokens_per_s, 0.0, last.workers, last.mfu, last.memory_mb)
