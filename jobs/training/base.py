"""What a run starts from: a version of weights, its tokenizer, and the recipe with what this model leaves no choice about."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple

from cluster.config import Config, Fleet
from cluster.errors import ConfigError
from cluster.store.fleets import FleetRecords
from cluster.store.registry import Registry
from cluster.types import Manifest
from jobs import sources
from jobs.data import chat, pairs, rows
from jobs.data.chat import Dataset, Example
from jobs.data.rows import Made, Source, Tokenized
from jobs.training.recipe import Recipe


class Base(NamedTuple):
    manifest: Manifest
    tokenizer: Any
    recipe: Recipe
    """With its defaults resolved for this model."""
    limit_tokens: int
    """Longer examples are left out."""


class Lines(NamedTuple, Generic[Source, Made]):
    """What the lines of a data file are, and how they are read."""

    name: str
    """In messages."""
    read: Callable[[str, sources.Fetch], Dataset[Source]]
    tokenize: Callable[[Sequence[Source], Any, int], Tokenized[Source, Made]]
    """See `jobs.data.rows.tokenize`."""
    described: Callable[[Sequence[Made], Sequence[Made], Sequence[int], int], str]
    """See `jobs.data.rows.described`."""
    example: Callable[[Source], Example]
    """What the gate compares the loss on."""


EXAMPLES = Lines("examples", chat.read, rows.tokenize, rows.described, lambda example: example)
PAIRS = Lines("pairs", pairs.read, pairs.tokenize, pairs.described, lambda pair: pair.chosen)


class Divided(NamedTuple, Generic[Made]):
    """A dataset in a base's tokens."""

    train: list[Made]
    held_out: list[Made]
    held_out_examples: list[Example]
    """The held-out examples before they were tokenised; of pairs, the preferred answers."""


def check_fits(chosen: Recipe, config: Config, registry: Registry, base: str) -> None:
    """Raise `ConfigError` for an adapter that the engine would refuse after the training."""
    if chosen.lora is None:
        return
    name, fleet = hosting_fleet(config, registry, base)
    if chosen.lora.rank > fleet.max_lora_rank:
        whose = f"the fleet {name}" if name else "every fleet"
        raise ConfigError(
            f"lora.rank {chosen.lora.rank} is above max_lora_rank {fleet.max_lora_rank} of {whose}: the engine could not load the adapter.",
            f"Use --set lora.rank={fleet.max_lora_rank}, or host {base} with a larger max_lora_rank.",
            param="lora.rank",
        )


def hosting_fleet(config: Config, registry: Registry, base: str) -> tuple[str, Fleet]:
    """The fleet that would serve an adapter on ``base``, with its name: of the configuration, or one that was added since. Where none hosts
    ``base`` yet, what every fleet has, without a name."""
    fleets = FleetRecords(registry.store).with_declared(config)
    for name, fleet in fleets.items():
        if fleet.model == base.partition("@")[0]:
            return name, fleet
    weights = registry.resolve(base).weights
    for name, fleet in fleets.items():
        live = registry.alias(fleet.model)
        if live is not None and registry.manifest(live.stable).weights == weights:
            return name, fleet
    return "", config.fleet


def resolve(registry: Registry, base: str) -> Manifest:
    """The weights to train on. For an adapter these are the weights under it, and the log says so."""
    found = registry.resolve(base)
    if found.kind == "adapter":
        print(f"{found.id} is an adapter; training starts from its base {found.weights}")
    return registry.manifest(found.weights)


def opened(config: Config, registry: Registry, manifest: Manifest, chosen: Recipe) -> Base:
    """Read a version's settings and tokenizer, and resolve the recipe for it. Raises `ConfigError` where it is no chat model, cannot be sharded as
    the recipe says, or the recipe asks for kernels that are not there."""
    from transformers import AutoConfig, AutoTokenizer

    from jobs.training.sharding import fit, pipeline_parallel, tensor_parallel
    from jobs.training.step import kernels, precision

    folder = registry.files.fetch_settings(manifest, config.home / "cache")
    model_config = AutoConfig.from_pretrained(folder, local_files_only=True)
    tensor_parallel.check(model_config, chosen.sharding.tensor)
    pipeline_parallel.check(model_config, chosen.sharding.pipeline)
    shape = model_config.get_text_config()
    resolved = chosen.resolved(shape.hidden_size, shape.max_position_embeddings)
    gpu = config.pool.accelerator == "gpu"
    kernels.check(chosen, gpu, shape.model_type)
    resolved = precision.resolve(resolved, gpu, shape.hidden_size)
    resolved = fit.resolve(resolved, config, model_config)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.chat_template is None:
        raise ConfigError(f"{manifest.id} has no chat template.", "Use a chat model as the base.", param="base")
    return Base(manifest, tokenizer, resolved, resolved.max_tokens or shape.max_position_embeddings)


def divided(base: Base, lines: Lines[Source, Made], data: Sequence[Source], held_out: Sequence[Source] | None) -> Divided[Made]:
    """Tokenise a dataset and hold a part of it out, or take all of it where ``held_out`` has other examples. Prints how much that is.

    Raises `DataError` where nothing fits, or where the base's chat template refuses an example.
    """
    limit, recipe = base.limit_tokens, base.recipe
    # What is too long is left out before anything is held out, so that the held-out fraction is of what is learnt.
    learnt = lines.tokenize(data, base.tokenizer, limit)
    if held_out is None:
        kept, measured = learnt.parted(recipe.held_out_fraction, recipe.seed)
    else:
        kept, measured = learnt, lines.tokenize(held_out, base.tokenizer, limit)
    print(lines.described(kept.rows, measured.rows, learnt.too_long, limit))
    if measured.too_long:
        print(f"{len(measured.too_long)} {lines.name} of --eval-data left out, longer than {limit:,} tokens")
    return Divided(kept.rows, measured.rows, [lines.example(one) for one in measured.examples])
