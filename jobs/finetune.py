"""Supervised fine-tuning: a base version and a data file in, the next version out.

``python -m jobs.finetune --data FILE_OR_URL --base seedling --publish`` trains a LoRA adapter (or all the weights with
``--full``) on as many slots as there are (`jobs.training.driver`), measures the loss on held-out examples before and after, registers the
result with its lineage and asks control to make it live. Everything that can be wrong with the request is checked before Ray is touched.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from cluster.config import Config, load
from cluster.errors import ConfigError, VersionRefused
from cluster.publishing.rollout import Rollout
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import Lineage, Manifest, check_name
from jobs import Parser, data, main, reach
from jobs.data import Dataset, Row
from jobs.publish import publish
from jobs.training import recipe

DECIDED_S = 60
"""How long control may take to see a verdict; it looks twice a second."""


class Plan(NamedTuple):
    """A request that has been checked: everything a run needs."""

    base: Manifest
    recipe: recipe.Recipe
    """With its defaults resolved."""
    train: list[Row]
    held_out: list[Row]
    held_out_examples: list[data.Example]
    """The same, before they were tokenised."""
    dataset_sha256: str


def run() -> None:
    arguments = parse_arguments()
    config = load()
    registry = Registry(Store(config.store))
    plan = prepare(config, registry, arguments)
    manifest = train(config, registry, plan, arguments.name or plan.base.id.name, arguments.priority, arguments.resume)
    from jobs.training.ray_train import print_result

    print_result(manifest, None)  # before the publish, so that a refusal does not hide what was trained
    if arguments.publish:
        rollout = publish(manifest.id, manifest.id.name, f"fine-tuned on {arguments.data}", manifest.lineage.job or "finetune")
        if rollout.stage == "registered":
            rollout = judged(config, registry, plan, rollout)
        print_result(manifest, rollout.stage)


def judged(config: Config, registry: Registry, plan: Plan, rollout: Rollout) -> Rollout:
    """Measure for the gate, and wait for what it decides. Raises `VersionRefused` where it says no.

    Without sets of its own in the configuration the gate compares the loss on the examples that this run did not train on.
    """
    from jobs.evaluate import Sets, evaluate, supplied

    sets = supplied(config)
    sets = sets if any(sets) else Sets(plan.held_out_examples, [], [])
    verdict = evaluate(config, registry, registry.manifest(rollout.version), rollout.incumbent, sets)
    print(verdict.words, flush=True)
    deadline_s = time.monotonic() + DECIDED_S
    while rollout.stage == "registered" and time.monotonic() < deadline_s:
        time.sleep(0.2)
        rollout = registry.records(rollout.alias, rollout.number)[-1]
    if rollout.stage == "rolled_back":
        raise VersionRefused(f"{rollout.version} is registered and not live: {rollout.reason}", "The live version is untouched.")
    return rollout


def parse_arguments() -> argparse.Namespace:
    parser = Parser("jobs.finetune", description="Fine-tune a version and register the result.")
    parser.add_argument("--data", required=True, help="JSON lines: a path or URL; the formats are in jobs/data.py")
    parser.add_argument("--eval-data", help="measure on this file instead of a held-out part of --data")
    parser.add_argument("--base", default="seedling", help="an alias, or a version such as seedling@1")
    parser.add_argument("--name", help="register as the next version of this name; the base's by default")
    parser.add_argument("--recipe", default="lora", help="lora, full, or the path of a YAML file")
    parser.add_argument("--full", dest="recipe", action="store_const", const="full", help="train all the weights: --recipe full")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--priority", type=int, default=0, help="where slots are few, jobs of a higher priority have them first")
    parser.add_argument(
        "--resume", default="", metavar="RUN", help="go on with a run whose process was lost, from its newest checkpoint"
    )
    parser.add_argument("--publish", action=argparse.BooleanOptionalAction, default=False, help="make the result live")
    return parser.parse_args()


# before Ray


def prepare(config: Config, registry: Registry, arguments: argparse.Namespace) -> Plan:
    """Check the whole request, cheapest first. Raises a `SpringtideError` that says what is wrong."""
    chosen = recipe.load(arguments.recipe, arguments.set, arguments.epochs)
    check_fits(chosen, config)
    check_name(arguments.name or "unnamed")
    dataset = data.read(arguments.data)
    held_out = data.read(arguments.eval_data).examples if arguments.eval_data else None
    registry.store.check_writable()
    base = resolve(registry, arguments.base)
    reach(config)
    return tokenized(config, registry, base, chosen, dataset, held_out)


def check_fits(chosen: recipe.Recipe, config: Config) -> None:
    """Refuse now what the engine would refuse after the training."""
    limit = config.fleet.max_lora_rank
    if chosen.lora and chosen.lora.rank > limit:
        raise ConfigError(
            f"lora.rank {chosen.lora.rank} is above fleet.max_lora_rank {limit}: the engine could not load the adapter.",
            f"Use --set lora.rank={limit}, or start the pool with a larger fleet.max_lora_rank.",
            param="lora.rank",
        )


def resolve(registry: Registry, base: str) -> Manifest:
    """The weights to train on. An alias or version that is an adapter stands for the weights beneath it, which the log then says."""
    found = registry.meant(base)
    if found.kind == "adapter":
        print(f"{found.id} is an adapter; training starts from its base {found.weights}")
    return registry.manifest(found.weights)


def tokenized(
    config: Config,
    registry: Registry,
    base: Manifest,
    chosen: recipe.Recipe,
    dataset: Dataset,
    held_out: list[data.Example] | None,
) -> Plan:
    from transformers import AutoConfig, AutoTokenizer

    folder = registry.fetch(base, config.home / "cache")
    shape = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    resolved = chosen.resolved(shape.hidden_size, shape.max_position_embeddings)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.chat_template is None:
        raise ConfigError(f"{base.id} has no chat template.", "Use a chat model as the base.", param="base")
    examples = dataset.examples
    if held_out is None:
        examples, held_out = data.split(examples, resolved.held_out_fraction, resolved.seed)
    limit = resolved.max_tokens or shape.max_position_embeddings
    train_rows, long = data.tokenize(examples, tokenizer, limit)
    held_rows, held_long = data.tokenize(held_out, tokenizer, limit)
    print(f"{len(train_rows)} examples to train on, {len(held_rows)} held out, {long + held_long} left out above {limit} tokens")
    return Plan(base, resolved, train_rows, held_rows, held_out, dataset.sha256)


# with Ray


def train(config: Config, registry: Registry, plan: Plan, target: str, priority: int = 0, resume: str = "") -> Manifest:
    """Run the plan and register what comes out of it as ``target``'s next version: an adapter on the base, or weights descended from it."""
    from jobs.training import driver, ray_train, runs, sft

    ray_train.connect()
    settings = {
        "config": config.dump(),
        "recipe": plan.recipe.model_dump(),
        "base": str(plan.base.id),
        "train": plan.train,
        "held_out": plan.held_out,
    }
    of = {"base": settings["base"], "recipe": settings["recipe"], "data": plan.dataset_sha256}
    name = runs.resumed(registry.store, resume, of) if resume else runs.begun(registry.store, "finetune", of)
    ended = driver.fit(config, sft.SupervisedFineTuning, settings, name, priority)
    lineage = Lineage(
        parent=plan.base.id,
        dataset_sha256=plan.dataset_sha256,
        recipe=plan.recipe.model_dump(exclude_none=True),
        job=ray_train.job_id(),
        code_revision=ray_train.code_revision(),
        metrics={**ended.metrics, "examples": len(plan.train)},
    )
    kind, base = ("adapter", plan.base.id) if plan.recipe.lora else ("weights", None)
    with tempfile.TemporaryDirectory() as scratch, runs.result(config, ended.name, Path(scratch)) as folder:
        return registry.register(target, kind, base, folder, lineage)


if __name__ == "__main__":
    main(run)
