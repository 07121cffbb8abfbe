"""Distillation: trains a small student on a data file and on what a teacher says of it, and registers the student.

``python -m jobs.distill --data FILE_OR_URL --teacher seedling --layers 2 --name sprout`` makes a student of two of the teacher's layers and trains
all its weights. ``--student NAME@N`` trains a version that is there. `jobs.training.objectives.distill` has the loss.

``--by answers`` is for a student with another tokenizer: a fleet that serves the teacher answers the prompts (`jobs.answers`), and the student is
fine-tuned on that. The job checks the whole request before it starts anything in Ray.
"""

import json
from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple

from cluster import endpoint
from cluster.client import Client
from cluster.config import Config, load
from cluster.errors import BadRequest, ConfigError
from cluster.jobspec import Distill, command_line, with_workers
from cluster.store.registry import Registry, registry_of
from cluster.types import Manifest, check_name
from jobs import answers, main, reach, sources
from jobs.data import chat
from jobs.data.chat import Dataset, Example
from jobs.data.rows import Row
from jobs.record import JobRecord, record
from jobs.release import release
from jobs.training import recipe
from jobs.training.base import EXAMPLES, Base, Divided, divided, opened, resolve

COMPARED = 100
"""Examples on which the tokenizers of teacher and student are compared."""


class Plan(NamedTuple):
    """A request that has been checked: everything a run needs."""

    teacher: Manifest
    student: Manifest | None
    """None for a new one, made of the teacher."""
    size: tuple[int | None, float]
    """`jobs.training.objectives.prune.Size`, for a new one."""
    base: Base
    """What the student starts from."""
    dataset: Dataset
    held_out: list[Example] | None
    """The examples of --eval-data."""
    data: Divided[Row] | None
    """None where the teacher answers the prompts first."""

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the result besides the recipe and the data."""
        layers, width = self.size
        made = {"student": str(self.student.id)} if self.student else {"layers": layers, "width": width}
        by = "logits" if self.data else "answers"
        return {"teacher": str(self.teacher.id), "by": by, **{key: value for key, value in made.items() if value is not None}}


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
    chosen, sha256 = plan.base.recipe, plan.dataset.sha256
    job.know(**plan.facts, dataset_sha256=sha256, recipe=chosen.model_dump(exclude_none=True))
    from jobs.training.drivers import ray_train  # and with it Ray
    from jobs.training.launch import begun

    ray_train.connect()
    run = begun(registry, options.resume, {**plan.facts, "recipe": chosen.model_dump(), "data": sha256}, job)
    data = plan.data or taught(registry, plan, run, job)
    manifest = train(config, registry, plan, data, run, options, job)
    job.made(**ray_train.result(manifest, None))  # before the publish, so that a refusal does not hide what was trained
    if options.publish:
        reason = f"distilled from {plan.teacher.id} on {plan.dataset.source}"
        rollout = release(config, registry, manifest, reason, data.held_out_examples, options.priority, job)
        job.made(**ray_train.result(manifest, rollout.stage))


# before Ray


def prepare(config: Config, registry: Registry, options: Distill) -> Plan:
    """Check the whole request, cheapest first. Raises a `SpringtideError` that says what is wrong."""
    fetch, by_logits = sources.of(config), options.by == "logits"
    chosen = chosen_recipe(options, fetch)
    check_name(options.name or "unnamed")
    dataset = chat.read(options.data, fetch)
    held_out = chat.read(options.eval_data, fetch).examples if options.eval_data else None
    registry.store.check_writable()
    teacher = registry.resolve(options.teacher)
    student = resolve(registry, options.student) if options.student else None
    reach(config)
    size = options.layers, options.width or 1.0
    if student is not None and not by_logits:
        answers.check_served(Client(endpoint.find()), teacher.id)
        return Plan(teacher, student, size, opened(config, registry, student, chosen), dataset, held_out, None)
    base = opened_pair(config, registry, teacher, student, chosen, dataset.examples)
    if student is None:
        check_prunes(config, registry, base.manifest, size)
    return Plan(teacher, student, size, base, dataset, held_out, divided(base, EXAMPLES, dataset.examples, held_out))


def chosen_recipe(options: Distill, fetch: sources.Fetch) -> recipe.Recipe:
    """The recipe of a student. Raises `ConfigError` where it has what does nothing for it."""
    shipped, verb = ("distill", "distill") if options.by == "logits" else ("full", "finetune")
    chosen = recipe.load(options.recipe or shipped, options.set, options.epochs, fetch, verb)
    if chosen.lora:
        raise ConfigError("A student is trained with all its weights.", "Leave lora out of the recipe.", param="lora")
    return chosen


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
            "Learn from what the teacher says: --by answers, while it is served.",
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
    from jobs.training.objectives.prune import Size, smaller

    with registry.candidate(teacher.id, config.home / "cache") as candidate:
        shape = json.loads((candidate.settings / "config.json").read_text())
        made = smaller(shape, candidate.tensors, Size(*size))
    print(f"a student of {made['num_hidden_layers']} layers with {made['intermediate_size']:,} neurons each")


# with Ray


def taught(registry: Registry, plan: Plan, run: str, job: JobRecord) -> Divided[Row]:
    """The data with the teacher's answers in the place of its own."""
    pool = Client(endpoint.find())
    examples = answers.answered(pool, registry.store, run, plan.teacher.id, plan.dataset.examples, job.note)
    return divided(plan.base, EXAMPLES, examples, plan.held_out)


def train(
    config: Config, registry: Registry, plan: Plan, data: Divided[Row], run: str, options: Distill, job: JobRecord
) -> Manifest:
    """Train the student as planned, and register it."""
    from jobs.training.launch import Learning, trained
    from jobs.training.objectives.distill import Distilling
    from jobs.training.objectives.finetune import SupervisedFineTuning

    start = plan.student or plan.teacher
    rows = {"train": data.train, "held_out": data.held_out, "stage": "distill"}
    if plan.data is None:
        work, settings = SupervisedFineTuning, {"base": str(start.id), **rows}
    else:
        student = str(plan.student.id) if plan.student else ""
        work, settings = Distilling, {"teacher": str(plan.teacher.id), "student": student, "size": plan.size, **rows}
    name, sha256 = options.name or start.id.name, plan.dataset.sha256
    learning = Learning(work, settings, plan.base.recipe, len(data.train), sha256, name, start.id, plan.facts)
    return trained(config, registry, run, learning, options.priority, job, options.trainer)


if __name__ == "__main__":
    main(run)
