"""Trains a new model from scratch, and registers it: on your own text, or the seedling that ships with Springtide.

``python -m jobs.pretrain --data FOLDER --name mine`` learns a tokenizer from the text, tokenises it with Ray Data (`jobs.training.corpus`), and
trains a Llama whose size one dial sets (``--depth``) on as many slots as there are. The held-out loss decides which weights are kept.

``python -m jobs.pretrain --name seedling`` takes about a minute on two cores and trains the seedling (`jobs.training.seedling`).

If the alias does not exist yet, both make the version live.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.config import Config, load
from cluster.errors import BadRequest, ConfigError, DataError
from cluster.jobspec import Pretrain, command_line, with_workers
from cluster.store.objects import Store
from cluster.store.registry import Registry, registry_of
from cluster.types import Generation, Lineage, Manifest, check_name
from jobs import main, reach, sources
from jobs.data import chat, rows
from jobs.data.blocks import blocks_of
from jobs.data.text import listed
from jobs.record import JobRecord, record
from jobs.training import recipe
from jobs.training.base import resolve
from jobs.training.drivers.relay import relayed

if TYPE_CHECKING:
    from jobs.training.corpus import Corpus
    from jobs.training.shape import Shape

CONTEXT_TOKENS = 512
HELD_OUT_TOKENS = 1 << 17
"""Measuring takes no more than these, however long the text is."""
MEASUREMENTS = 20
"""How often a run is measured, unless its recipe says it."""


def run() -> None:
    options: Pretrain = command_line("pretrain")
    config = load()
    config = config.model_copy(update={"training": with_workers(config.training, options.workers)})
    with record(config, options) as job:
        if options.data:
            pretrain(config, options, job)
        else:
            grow_seedling(config, options, job)


# on text


class Parts(NamedTuple):
    """Which blocks of a text are learnt, and which are measured."""

    train: list[int]
    held_out: list[int]


def pretrain(config: Config, options: Pretrain, job: JobRecord) -> None:
    """Read the text, train a new model on it, and register it."""
    check_name(options.name)
    fetch, registry = sources.of(config), registry_of(config)
    chosen = recipe.load(options.recipe, options.set, options.epochs, fetch, "pretrain")
    if chosen.lora:
        raise ConfigError("A new model has no frozen weights to put an adapter on.", "Leave lora out of the recipe.", "lora")
    named = listed(options.data)
    registry.store.check_writable()
    reach(config)
    from jobs.training.drivers import ray_train
    from jobs.training.launch import Learning, begun, trained
    from jobs.training.objectives.pretrain import Pretraining
    from jobs.training.step import kernels

    kernels.check(chosen, config.pool.accelerator == "gpu")
    ray_train.connect()
    asked = options.model_dump(mode="json", exclude={"live", "priority", "resume", "workers", "trainer"})
    name = begun(registry, options.resume, {**asked, "recipe": chosen.model_dump()}, job)
    corpus, shape = read(config, registry, options, chosen, named, name, job)
    kernels.check(chosen, config.pool.accelerator == "gpu", shape.config.get_text_config().model_type)
    length = shape.context_tokens
    parts = divided(blocks_of(corpus.tokens, length), length, chosen)
    resolved = for_text(chosen, shape.hidden_size, len(parts.train), options.steps, config)
    resolved = sharded(resolved, config, registry.store, name, shape)
    print(described(corpus, parts, length, shape), flush=True)
    job.know(dataset_sha256=corpus.sha256, parameters=shape.parameters, recipe=resolved.model_dump(exclude_none=True))
    settings: dict[str, Any] = {
        **parts._asdict(),
        "run": name,
        "shards": [tuple(shard) for shard in corpus.shards],
        "length": length,
        "bytes_per_token": corpus.bytes_per_token,
        "stage": "pretrain",
    }
    learning = Learning(Pretraining, settings, resolved, len(parts.train), corpus.sha256, options.name, parent=None)
    manifest = trained(config, registry, name, learning, options.priority, job, options.trainer)
    move = go_live(registry, manifest, options.live)
    job.made(**ray_train.result(manifest, "live" if move else None))


def read(
    config: Config, registry: Registry, options: Pretrain, chosen: recipe.Recipe, named: list[str], run: str, job: JobRecord
) -> "tuple[Corpus, Shape]":
    """The run's text and its model's shape, from the sources, or from the store where a resumed run has left them there."""
    from jobs.training import corpus
    from jobs.training.shape import Shape, shaped
    from jobs.training.sharding import pipeline_parallel, tensor_parallel

    if found := corpus.stored(registry.store, run):
        return found, Shape.stored(registry.store, run)
    fetch, context_tokens = sources.of(config), options.context_tokens or CONTEXT_TOKENS
    try:
        if options.tokenizer:
            tokenizer = tokenizer_of(config, registry, options.tokenizer)
        else:
            job.note(f"learning a tokenizer from {len(named):,} files")
            tokenizer = corpus.learnt_tokenizer(named, fetch, options.vocabulary, context_tokens)
        shape = shaped(options, tokenizer, context_tokens, fetch)
        tensor_parallel.check(shape.config, chosen.sharding.tensor)
        pipeline_parallel.check(shape.config, chosen.sharding.pipeline)
        tokens = corpus.tokenised(named, fetch, tokenizer, job.note)
        return corpus.write(registry.store, run, shape.config, tokenizer, tokens), shape
    except BadRequest:  # there is nothing to resume
        registry.store.remove(f"runs/{run}")
        raise


def tokenizer_of(config: Config, registry: Registry, named: str) -> Any:
    """The tokenizer of a model or version. Raises `ConfigError` where it marks no end of a text."""
    from transformers import AutoTokenizer

    folder = registry.files.fetch_settings(resolve(registry, named), config.home / "cache")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"The tokenizer of {named} has no token for the end of a text.", "Choose another one.", "tokenizer")
    return tokenizer


def divided(count: int, length: int, chosen: recipe.Recipe) -> Parts:
    """The numbers of the blocks to learn and of those to hold out, the same for the same seed. Raises `DataError` for too short a text.

    ``count``: blocks of ``length`` tokens.
    """
    if count < 2:
        raise DataError(
            f"The text is shorter than two blocks of {length} tokens: one to learn, one to measure.",
            "Add text, or choose a smaller --context-tokens.",
        )
    fraction = min(chosen.held_out_fraction, max(1, HELD_OUT_TOKENS // length) / count)
    held_out = rows.split(range(count), fraction, chosen.seed)
    return Parts([number for number in range(count) if number not in held_out], sorted(held_out))


def for_text(chosen: recipe.Recipe, hidden_size: int, blocks: int, steps: int | None, config: Config) -> recipe.Recipe:
    """The recipe with what follows from the model's width and the length of the run."""
    from jobs.training.step import precision

    per_epoch = math.ceil(blocks / chosen.global_batch)
    epochs = steps / per_epoch if steps else chosen.epochs
    every = chosen.measure_every_steps or max(1, math.ceil(epochs * per_epoch) // MEASUREMENTS)
    rate = chosen.learning_rate or peak_rate(hidden_size)
    changed = {"epochs": epochs, "measure_every_steps": every, "learning_rate": rate}
    return precision.resolve(chosen.model_copy(update=changed), config.pool.accelerator == "gpu", hidden_size)


def sharded(resolved: recipe.Recipe, config: Config, store: Store, run: str, shape: "Shape") -> recipe.Recipe:
    """The recipe with its sharding chosen. A run that is resumed shards its model as it began, whatever there is room for now."""
    from jobs.training.sharding import fit

    if resolved.sharding.weights != "auto":
        return resolved
    path = f"runs/{run}/sharding"
    if found := store.get(path):
        return resolved.model_copy(update={"sharding": recipe.Sharding.model_validate(found.decode())})
    resolved = fit.resolve(resolved, config, shape.config)
    store.put_new(path, resolved.sharding.weights.encode())
    return resolved


def peak_rate(hidden_size: int) -> float:
    """The peak of the learning rate for new weights: 6e-4 · (768 / hidden)^0.9.

    A line through the rates of GPT-3's models from 768 to 5,140 wide (Brown et al. 2020, table 2.1). The seedling's own rate is on it as well.

    >>> [round(peak_rate(width), 5) for width in (128, 768, 2048)]
    [0.00301, 0.0006, 0.00025]
    """
    return 6e-4 * math.pow(768 / hidden_size, 0.9)


def described(corpus: "Corpus", parts: Parts, length: int, shape: "Shape") -> str:
    """What a run is about to learn, in one line."""
    return (
        f"{corpus.text_bytes:,} bytes of text are {corpus.tokens:,} tokens of {shape.vocabulary:,} kinds, "
        f"{corpus.bytes_per_token:.2f} bytes each: {len(parts.train):,} blocks of {length} tokens to learn, {len(parts.held_out):,} held out; "
        f"the model has {shape.parameters:,} parameters"
    )


# the seedling


def grow_seedling(config: Config, options: Pretrain, job: JobRecord) -> None:
    name = options.name or "seedling"
    check_name(name)
    registry = Registry(Store(config.store))
    registry.store.check_writable()
    reach(config)
    from jobs.training import seedling
    from jobs.training.drivers import ray_train

    facts = chat.read(str(seedling.FACTS))
    job.know(dataset_sha256=facts.sha256)
    recipe = {**seedling.RECIPE, "steps": options.steps or seedling.STEPS}
    recipe |= {"hidden_size": options.hidden_size or seedling.HIDDEN_SIZE, "layers": options.layers or seedling.LAYERS}
    ray_train.connect()
    settings = {"config": config.dump(), "recipe": recipe, "examples": facts.examples}
    with relayed(job.watch) as tell:
        result = ray_train.fit(config, seedling.train, {**settings, "tell": tell}, job.id)
    lineage = Lineage(
        dataset_sha256=facts.sha256,
        recipe=recipe,
        job=job.id,
        code_revision=ray_train.code_revision(),
        metrics=result.metrics or {},
    )
    with ray_train.files(result) as folder:
        manifest = registry.register(name, "weights", None, folder, lineage)
    move = go_live(registry, manifest, options.live)
    job.made(**ray_train.result(manifest, "live" if move else None))


def go_live(registry: Registry, manifest: Manifest, live: bool | None) -> Generation | None:
    """Move the alias to the new version. Returns the alias's new generation; None if it stays.

    ``live``: True moves the alias, False leaves it, None moves it only if it does not exist yet. Control takes no part, because before the
    first version no replica serves anything. Raises `Conflict` if somebody else moves the alias at the same time.
    """
    now = registry.alias(manifest.id.name)
    if live is False or (live is None and now is not None):
        return None
    after = now.generation if now else 0
    return registry.move(manifest.id.name, manifest.id, "pretrained", manifest.lineage.job or "pretrain", after)


if __name__ == "__main__":
    main(run)
