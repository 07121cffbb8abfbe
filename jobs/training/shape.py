"""The shape of a new model: from one dial, or from a ``config.json``."""

from typing import Any, NamedTuple

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from cluster.errors import ConfigError
from cluster.jobspec import Pretrain
from cluster.store.objects import Store
from jobs import sources
from jobs.data.lines import decode
from jobs.training.objectives.pretrain import MODEL
from jobs.training.step.weightless import weightless

DEPTH = 4
ASPECT = 64
"""Width for each layer, and the dimensions of an attention head."""
NARROW = 32
"""The dimensions of a head where the width is no multiple of 64: the fewest that vLLM's attention on CPUs accepts."""
CONFIG_JSON = "A config.json as transformers writes it, for a model that generates text."


class Shape(NamedTuple):
    config: PretrainedConfig

    @classmethod
    def stored(cls, store: Store, run: str) -> "Shape":
        """What `jobs.training.corpus.write` has written."""
        return cls(_from_json(store.get(f"runs/{run}/{MODEL}/config.json") or b"{}"))

    @property
    def hidden_size(self) -> int:
        return self.config.get_text_config().hidden_size

    @property
    def vocabulary(self) -> int:
        return self.config.get_text_config().vocab_size

    @property
    def context_tokens(self) -> int:
        return self.config.get_text_config().max_position_embeddings

    @property
    def parameters(self) -> int:
        """How many numbers are trained. What is tied counts once."""
        return sum(one.numel() for one in weightless(self.config).parameters())


def shaped(options: Pretrain, tokenizer: Any, context_tokens: int, fetch: sources.Fetch) -> Shape:
    """The shape that the options ask for. Raises `ConfigError` where transformers knows no such model."""
    shape = _from_json(fetch(options.architecture)) if options.architecture else llama(options)
    for key, value in {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": context_tokens,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }.items():
        setattr(shape.get_text_config(), key, value)
    return Shape(shape)


def llama(options: Pretrain) -> LlamaConfig:
    """A Llama (Touvron et al. 2023) of ``depth`` layers, each 64 · ``depth`` wide, as nanochat has it (Karpathy 2025).

    >>> small = llama(Pretrain(data=["x"], name="x", depth=6))
    >>> small.num_hidden_layers, small.hidden_size, small.num_attention_heads
    (6, 384, 6)
    """
    depth = options.depth or DEPTH
    width = options.hidden_size or ASPECT * depth
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=options.layers or depth,
        num_attention_heads=width // (NARROW if width % ASPECT else ASPECT),
        tie_word_embeddings=True,
        initializer_range=0.02,
    )


def _from_json(raw: bytes) -> PretrainedConfig:
    try:
        values = decode(raw)
        if "auto_map" in values:
            raise ValueError("it names code to run (auto_map), and remote code is never run")
        shape = AutoConfig.for_model(values.pop("model_type"), **values)
        weightless(shape)
    except Exception as error:  # transformers raises what it likes
        raise ConfigError(f"--architecture does not describe a model: {error}.", CONFIG_JSON, "architecture") from error
    return shape
