"""Distillation: trains a small student on a data file and on what a teacher says of it, and registers the student.

``python -m jobs.distill --data FILE_OR_URL --teacher seedling --layers 2 --name sprout`` makes a student of two of the teacher's layers and trains
all its weights. ``--student NAME@N`` trains a version that is there. `jobs.training.objectives.distill` has the loss. It checks the whole request
before it starts anything in Ray.
"""

import json
from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple

from cluster.config import Config, load
from cluster.errors import BadRequest, ConfigError
from cluster.jobspec import Distill, command_line, with_workers
from cluster.store.registry import Registry, registry_of
from cluster.types import Manifest, check_name
from jobs import main, reach, sources
from jobs.data import chat
from jobs.data.chat import Example
from jobs.record import JobRecord, record
from jobs.release import release
from jobs.training import recipe
from jobs.training.base import Base, Divided, divided, opened, resolve

COMPARED = 100
"""Examples on which the tokenizers of teacher and student are compared."""


class Plan(NamedTuple):
    """A request that has been checked: everything a run needs."""

    teacher: Manifest
    student: Manifest | None
    """None for a new one, made of the teacher."""
    size: tuple[int | None, float]
    """`jobs.training.prune.Size`, for a new one."""
    recipe: recipe.Recipe
    """With its defaults resolved."""
    data: Divided
    dataset_sha256: str
    source: str
    """The dataset's name in messages and records."""

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the result besides the recipe and the data."""
        layers, width = self.size
        made = {"student": str(self.student.id)} if self.student else {"layers": layers, "width": width}
        return {"teacher": str(self.teacher.id), **{key: value for key, value in made.items() if value is not None}}


def run() -> None:
    options: Distill = command_line("distill")
    config = load()
    config = config.model_copy(update={"training": with_workers(config.training, options.workers)})
    with record(config, options) as job:
        distill(config, options, job)


def distill(config: Config, options: Distill, job: JobRecord) -> None:
    """Check the request, train the student, register it, and publish it if the options say so."""
    registry = registry_of(config)
    plan = prepare(config, registry, options)
    job.know(**plan.facts, dataset_sha256=plan.dataset_sha256, recipe=plan.recipe.model_dump(exclude_none=True))
    manifest = train(config, registry, plan, options, job)
    from jobs.training.ray_train import result

    losses = {"teacher_loss": manifest.lineage.metrics["teacher_loss"]}
    job.made(**result(manifest, None), **losses)  # before the publish, so that a refusal does not hide what was trained
    if options.publish:
        reason = f"distilled from {plan.teacher.id} on {plan.source}"
        rollout = release(config, registry, manifest, reason, plan.data.held_out_examples, options.priority, job)
        job.made(**result(manifest, rollout.stage))


# before Ray


def prepare(config: Config, registry: Registry, options: Distill) -> Plan:
    """Check the whole request, cheapest first. Raises a `SpringtideError` that says what is wrong."""
    fetch = sources.of(config)
    chosen = recipe.load(options.recipe, options.set, options.epochs, fetch, "distill")
    if chosen.lora:
        raise ConfigError("A student is trained with all its weights.", "Leave lora out of the recipe.", param="lora")
    chosen = chosen.model_copy(update={"distillation": chosen.distillation or recipe.Distillation()})
    check_name(options.name or "unnamed")
    dataset = chat.read(options.data, fetch)
    held_out = chat.read(options.eval_data, fetch).examples if options.eval_data else None
    registry.store.check_writable()
    teacher = registry.resolve(options.teacher)
    student = resolve(registry, options.student) if options.student else None
    reach(config)
    size = options.layers, options.width or 1.0
    base = opened_pair(config, registry, teacher, student, chosen, dataset.examples)
    if student is None:
        check_prunes(config, registry, base.manifest, size)
    return Plan(teacher, student, size, base.recipe, divided(base, dataset, held_out), dataset.sha256, dataset.source)


def opened_pair(
    config: Config, registry: Registry, teacher: Manifest, student: Manifest | None, chosen: recipe.Recipe, data: list[Example]
) -> Base:
    """What the student starts from, with the shorter context of the two. Raises `BadRequest` where both do not have the same tokens."""
    whole = opened(config, registry, registry.manifest(teacher.weights), chosen)
    if student is None:
        return whole
    base = opened(config, registry, student, chosen)
    texts = (message["content"] for example in islice(data, COMPARED) for message in example.prompt + example.completion)
    if differ := difference(whole.tokenizer, base.tokenizer, texts):
        raise BadRequest(
            f"{teacher.id} and {student.id} have different tokenizers: {differ}.",
            "A student learns a teacher's distributions only over the same tokens. Choose another student, or prune the teacher: --layers.",
            "student",
        )
    return base._replace(limit_tokens=min(base.limit_tokens, whole.limit_tokens))


def difference(one: Any, other: Any, texts: Iterable[str]) -> str:
    """How two tokenizers differ; empty where they have the same vocabulary and encode the texts alike."""
    mine, its = one.get_vocab(), other.get_vocab()
    if mine != its:
        token = min(key for key in mine.keys() | its.keys() if mine.get(key) != its.get(key))
        return f"the token {token!r} is {mine.get(token, 'missing')} in one and {its.get(token, 'missing')} in the other"
    for text in texts:
        if one(text)["input_ids"] != other(text)["input_ids"]:
            return f"they encode {text[:40]!r} in two ways"
    return ""


def check_prunes(config: Config, registry: Registry, teacher: Manifest, size: tuple[int | None, float]) -> None:
    """Raise `ConfigError` where the teacher cannot be pruned to this size."""
    from jobs.training.prune import Size, smaller

    with registry.candidate(teacher.id, config.home / "cache") as candidate:
        shape = json.loads((candidate.settings / "config.json").read_text())
        made = smaller(shape, candidate.tensors, Size(*size))
    print(f"a student of {made['num_hidden_layers']} layers with {made['intermediate_size']:,} neurons each")


# with Ray


def train(config: Config, registry: Registry, plan: Plan, options: Distill, job: JobRecord) -> Manifest:
    """Train the student as planned, and register it."""
    from jobs.training import ray_train
    from jobs.training.launch import Learning, begun, trained
    from jobs.training.objectives.distill import Distilling

    ray_train.connect()
    facts = plan.facts
    run = begun(registry, options.resume, {**facts, "recipe": plan.recipe.model_dump(), "data": plan.dataset_sha256}, job)
    student, data = str(plan.student.id) if plan.student else "", plan.data
    rows = {"train": data.train, "held_out": data.held_out}
    settings = {"teacher": str(plan.teacher.id), "student": student, "size": plan.size, "stage": "distill", **rows}
    start = plan.student or plan.teacher
    name = options.name or start.id.name
    learning = Learning(Distilling, settings, plan.recipe, len(data.train), plan.dataset_sha256, name, start.id, facts)
    return trained(config, registry, run, learning, options.priority, job)


if __name__ == "__main__":
    main(run)
