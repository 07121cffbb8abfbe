"""What `jobs.finetune` and `jobs.dpo` do alike: they train a base version on a data file, register the next version, and publish it if asked.

They differ in what a line of the file is (`jobs.training.base.Lines`), and in what the workers do with it (`jobs.training.work.Work`). The whole
request is checked before anything starts in Ray.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from cluster.config import Config
from cluster.jobspec import Tuning
from cluster.store.registry import Registry
from cluster.types import Manifest, check_name
from jobs import reach, sources
from jobs.data.chat import Example
from jobs.record import JobRecord
from jobs.release import release
from jobs.training import recipe
from jobs.training.base import Lines, check_fits, divided, opened, resolve


class Plan(NamedTuple):
    """A request that has been checked: everything a run needs."""

    base: Manifest
    recipe: recipe.Recipe
    """With its defaults resolved."""
    train: list[Any]
    held_out: list[Any]
    held_out_examples: list[Example]
    """What the gate may compare the loss on."""
    dataset_sha256: str
    eval_sha256: str
    """Empty if a part of the data is held out."""
    source: str
    """The dataset's name in messages and records."""

    @property
    def inputs(self) -> dict[str, Any]:
        """What a run depends on, see `jobs.training.runs.begin`."""
        return {"base": str(self.base.id), "recipe": self.recipe.model_dump(), "data": self.dataset_sha256}


# before Ray


def prepare(config: Config, registry: Registry, options: Tuning, recipe_name: str, lines: Lines[Any, Any]) -> Plan:
    """Check the whole request, cheapest first. Raises a `SpringtideError` that says what is wrong."""
    fetch, base_name = sources.of(config), options.base or config.default_model
    chosen = recipe.load(recipe_name, options.set, options.epochs, fetch, options.verb)
    check_fits(chosen, config, registry, base_name)
    check_name(options.name or "unnamed")
    dataset = lines.read(options.data, fetch)
    held_out = lines.read(options.eval_data, fetch) if options.eval_data else None
    registry.store.check_writable()
    manifest = resolve(registry, base_name)
    reach(config)
    base = opened(config, registry, manifest, chosen)
    data = divided(base, lines, dataset.examples, held_out.examples if held_out else None)
    digests = dataset.sha256, held_out.sha256 if held_out else ""
    return Plan(manifest, base.recipe, *data, *digests, dataset.source)


# with Ray


def tune(
    config: Config,
    registry: Registry,
    plan: Plan,
    options: Tuning,
    work: Callable[[], Any],
    inputs: dict[str, Any],
    reason: str,
    job: JobRecord,
) -> None:
    """Train as planned, register the result, and publish it if the options say so.

    ``work`` imports what the workers make. ``inputs``: what the run depends on. ``reason``: why a publish moves the alias.
    """
    job.know(base=str(plan.base.id), dataset_sha256=plan.dataset_sha256, recipe=plan.recipe.model_dump(exclude_none=True))
    from jobs.training.drivers import ray_train
    from jobs.training.launch import Learning, begun, trained

    ray_train.connect()
    run = begun(registry, options.resume, inputs, job)
    settings = {"base": str(plan.base.id), "train": plan.train, "held_out": plan.held_out, "run": run, "stage": options.verb}
    name = options.name or plan.base.id.name
    learning = Learning(work(), settings, plan.recipe, len(plan.train), plan.dataset_sha256, name, parent=plan.base.id)
    manifest = trained(config, registry, run, learning, options.priority, job, options.trainer)
    job.made(**ray_train.result(manifest, None))  # before the publish, so that a refusal does not hide what was trained
    if options.publish:
        rollout = release(config, registry, manifest, reason, plan.held_out_examples, options.priority, job)
        job.made(**ray_train.result(manifest, rollout.stage))
